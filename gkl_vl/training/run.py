"""A training run around the loop: its flags, processes, folder, random numbers and resume.

Every recipe does the same in the same order:

    run = Run(config, recipe="NAME")        # processes and folder; equal seeds on all ranks
    ...                                     # load models and data; errors up to here leave no folder behind
    run.begin("STUDENT from TEACHER ...")   # config.json, the title line
    run.seed_ranks()                        # from here on each rank draws its own random numbers
    fit(accelerator=run.accelerator, run=run.folder, checkpoint=run.checkpoint(), ...)
    run.push()
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from gkl_vl import cli
from gkl_vl.errors import UserError
from gkl_vl.export import hub
from gkl_vl.export.cards import RunFacts
from gkl_vl.provenance import command_line, git_commit
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import check_all_processes_joined

ACCELERATE_PRECISION = {"fp32": "no", "amp": "fp16", "fp16": "fp16", "amp_bf16": "bf16", "bf16": "bf16", None: None}
MAY_DIFFER = {"output_dir", "resume", "debug", "report_to", "push_to_hub", "allow_pickle"}
"""Flags that a resumed run need not share with the run that it continues."""


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Output, resume, processes and seed."""

    output_dir: Path | None = None
    """Run folder. None = runs/RECIPE-<time>."""
    resume: str | None = None
    """Continue a run with the same flags: `latest`, or a checkpoint folder."""
    seed: int = 0
    """Seed of initial weights, data order, augmentations and everything else that is random."""
    precision: Literal["fp32", "amp", "fp16", "amp_bf16", "bf16"] | None = None
    """None = as set by `accelerate launch` or `accelerate config`."""
    workers: int = 2
    """Data-loading processes per training process."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers beside results.jsonl."""
    push_to_hub: str | None = None
    """org/name: upload the exported folder at the end."""
    allow_pickle: bool = False
    """Read weights stored as pickles (.pth, .pt, .bin), with weights_only=True."""
    debug: bool = False
    """Print the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class StepIntervals:
    """Intervals of evaluation and checkpoints, in updates."""

    eval_every_steps: int = 0
    """Evaluate every so many steps and at the end; 0 = at the end only."""
    checkpoint_every_steps: int = 0
    """Save a checkpoint every so many steps and at the end; 0 = at the end only."""


@dataclass(frozen=True, kw_only=True)
class EpochIntervals:
    """Intervals of evaluation and checkpoints, in epochs."""

    eval_every_epochs: int = 10
    """Evaluate every so many epochs and at the end; 0 = at the end only."""
    checkpoint_every_epochs: int = 10
    """Save a checkpoint every so many epochs and at the end; 0 = at the end only."""

    def in_steps(self, steps_per_epoch: int) -> dict[str, int]:
        """The same as fields of `FitConfig`."""
        return {
            "eval_every_steps": self.eval_every_epochs * steps_per_epoch,
            "checkpoint_every_steps": self.checkpoint_every_epochs * steps_per_epoch,
        }


@runtime_checkable
class HasRunFlags(Protocol):
    """Flags of a recipe: a dataclass with `RunFlags` among its fields."""

    @property
    def run(self) -> RunFlags: ...


class Run:
    """A training run: the same folder on all ranks, Accelerate, and equal random numbers on all ranks.

    Args:
        config: flags of the recipe. They are recorded in config.json and compared with it on resume.
        recipe: the run folder is runs/RECIPE-TIME where `output_dir` is None.

    Raises: UserError for a malformed `push_to_hub`, a folder that holds another run, a resume with other flags.
    """

    def __init__(self, config: HasRunFlags, *, recipe: str):
        self.flags = flags = config.run
        if flags.push_to_hub:
            hub.check_repo_id(flags.push_to_hub)
        self.accelerator = Accelerator(
            mixed_precision=ACCELERATE_PRECISION[flags.precision],
            log_with=list(flags.report_to) or None,
            project_dir=str(flags.output_dir or "runs"),
        )
        check_all_processes_joined(self.accelerator)
        folder = [flags.output_dir or default_folder(flags.resume, recipe)]
        broadcast_object_list(folder)  # all ranks: clocks differ
        self.folder = RunFolder(folder[0], is_main=self.accelerator.is_main_process)
        self.title = recipe
        record = json.loads(json.dumps(cli.flat(config), default=str))
        if flags.resume:
            self._check_same_flags(record)
        elif self.folder.results.is_file():
            path = str(self.folder.path)
            raise UserError(f"{path!r} already holds a run: add --resume latest, or name another --output-dir")
        self.accelerator.wait_for_everyone()  # all ranks: nobody looks for results after the main process wrote some
        if flags.report_to:
            values = {name: value for name, value in record.items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("gkl_vl", config=values)
        # The commit at the start of the run, whatever is checked out when it ends.
        self._record = record | {"command": command_line(), "commit": git_commit()}
        set_seed(flags.seed)  # the same initial weights on every rank

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.accelerator.device

    @property
    def num_processes(self) -> int:
        """Number of processes, 1 when alone."""
        return self.accelerator.num_processes

    def refuse_shards(self, what: str) -> None:
        """Raises: UserError under FSDP, for `what` needs the whole model outside the loop's own passes."""
        if self.accelerator.is_fsdp2:
            raise UserError(
                f"FSDP keeps a model in shards, and {what} need it whole: use accelerate_configs/multi_gpu.yaml"
            )

    def begin(self, title: str) -> None:
        """Writes config.json, unless the run is resumed, and prints a line. Call it when nothing can be refused."""
        self.title = f"{title} · seed {self.flags.seed}"
        if not self.flags.resume:
            self.folder.write_json("config.json", self._record)
        self.accelerator.print(f"{self.title} · {self.num_processes} x {self.device.type} · {self.folder.path}")

    def seed_ranks(self) -> None:
        """Seeds each rank differently, for dropout and attacks. Call it when the models exist."""
        set_seed(self.flags.seed, device_specific=True)

    def checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None for a new run. Raises: UserError where --resume names none."""
        return self.folder.find_checkpoint(self.flags.resume) if self.flags.resume else None

    def facts(self, *, steps: int) -> RunFacts:
        """What a model card says about this run, with the evaluations after `steps` updates."""
        config = self.folder.config()
        return RunFacts(
            command=config["command"],
            commit=config["commit"],
            steps=steps,
            seed=self.flags.seed,
            metrics=[record for record in self.folder.records() if "model" in record and record["step"] == steps],
            repo_id=self.flags.push_to_hub,
        )

    def push(self) -> None:
        """Uploads the exported folder where --push-to-hub asks for it. Main process."""
        if self.flags.push_to_hub:
            url = hub.push_to_hub(folder=self.folder.path / "model", repo_id=self.flags.push_to_hub)
            print(f"Pushed: {url}")

    def _check_same_flags(self, record: dict[str, Any]) -> None:
        before = self.folder.config()
        changed = [name for name in record if name not in MAY_DIFFER and record[name] != before.get(name)]
        if changed:
            differences = ", ".join(
                f"--{name.replace('_', '-')} {record[name]} (was {before.get(name)})" for name in changed
            )
            raise UserError(f"--resume continues a run as it was, but {differences}: use the same flags")


def default_folder(resume: str | None, recipe: str) -> Path:
    """A new folder under runs/, or the newest one with a checkpoint to resume."""
    if not resume:
        return Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if resume != "latest":
        return Path(resume).parent.parent
    folders = sorted(path.parents[1] for path in Path("runs").glob(f"{recipe}-*/checkpoints/step_*"))
    if not folders:
        raise UserError(
            f"--resume latest: no runs/{recipe}-* folder here has a checkpoint: name the run with --output-dir"
        )
    return folders[-1]
