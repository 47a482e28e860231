"""Before the first step of any recipe: the processes, the run folder, and whether a run goes on."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gkl_vl.errors import UserError
from gkl_vl.provenance import command_line, git_commit
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import check_all_processes_joined

ACCELERATE_PRECISION = {"fp32": "no", "amp": "fp16", "fp16": "fp16", "amp_bf16": "bf16", "bf16": "bf16", None: None}
MAY_DIFFER = {"output_dir", "resume", "debug", "report_to", "push_to_hub", "allow_pickle"}
"""Flags that a resumed run need not share with the run that it takes up."""


@runtime_checkable
class RunConfig(Protocol):
    """A recipe's flags, a dataclass; these are read here."""

    @property
    def output_dir(self) -> Path | None: ...
    @property
    def precision(self) -> str | None: ...
    @property
    def resume(self) -> str | None: ...
    @property
    def report_to(self) -> tuple[str, ...]: ...


def start(config: RunConfig, *, recipe: str) -> tuple[RunFolder, Accelerator, dict[str, Any]]:
    """The run folder, the same on all ranks; Accelerate; and what a new run's config.json is to say.

    Args:
        recipe: the run folder is runs/RECIPE-TIME where `output_dir` is None.

    Raises: UserError for a run that is there and not resumed, or resumed with other flags.
    """
    accelerator = Accelerator(
        mixed_precision=ACCELERATE_PRECISION[config.precision],
        log_with=list(config.report_to) or None,
        project_dir=str(config.output_dir or "runs"),
    )
    check_all_processes_joined(accelerator)
    folder = [config.output_dir or default_folder(config.resume, recipe)]
    broadcast_object_list(folder)  # all ranks: clocks differ
    run = RunFolder(folder[0], is_main=accelerator.is_main_process)
    wanted = json.loads(json.dumps(asdict(config), default=str))  # type: ignore[call-overload] # a dataclass
    if config.resume:
        before = run.config()
        other = [k for k in wanted if k not in MAY_DIFFER and wanted[k] != before.get(k)]
        if other:
            told = ", ".join(f"--{k.replace('_', '-')} {wanted[k]} (was {before.get(k)})" for k in other)
            raise UserError(f"--resume takes up the run as it was, but {told}: use the same flags")
    elif run.results.is_file():
        raise UserError(f"{str(run.path)!r} already holds a run: add --resume latest, or name another --output-dir")
    accelerator.wait_for_everyone()  # all ranks: nobody looks for results after the main process wrote some
    if config.report_to:
        accelerator.init_trackers(
            "gkl_vl", config={k: v for k, v in wanted.items() if isinstance(v, int | float | str)}
        )
    # The commit that a run starts from, whatever is checked out when it ends.
    return run, accelerator, wanted | {"command": command_line(), "commit": git_commit()}


def refuse_shards(accelerator: Accelerator, what: str) -> None:
    """Raises: UserError under FSDP, for what needs the whole model outside the loop's own passes."""
    if accelerator.is_fsdp2:
        raise UserError(
            f"FSDP keeps a model in shards, and {what} need it whole: use accelerate_configs/multi_gpu.yaml"
        )


def default_folder(resume: str | None, recipe: str) -> Path:
    """A new folder under runs/, or the newest one to resume."""
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
