"""A training run around the loop: its flags, processes, folder, random numbers and resume.

Every recipe does the same in the same order:

    run = Run(config, recipe="NAME")        # processes and folder; equal seeds on all ranks
    ...                                     # load models and data; errors up to here leave no folder behind
    run.begin("STUDENT from TEACHER ...")   # config.json, the title line
    run.seed_ranks()                        # from here on each rank draws its own random numbers
    fit(accelerator=run.accelerator, run=run.folder, checkpoint=run.checkpoint(), ...)
    run.push()
    run.end()
"""

import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
    set_seed,
)
from torch import nn

from gkl_vl import cli
from gkl_vl.addresses import fetched, is_local
from gkl_vl.atomic import holder_of, in_use
from gkl_vl.errors import UserError
from gkl_vl.export import push
from gkl_vl.export.cards import RunFacts
from gkl_vl.models.fingerprint import add_weights
from gkl_vl.protocols import Record
from gkl_vl.provenance import command_line, git_commit, versions
from gkl_vl.teachers.embeddings import MANIFEST
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import check_all_processes_joined
from gkl_vl.training.stopping import StopRequest, end_with_launcher

ACCELERATE_PRECISION = {"fp32": "no", "amp": "fp16", "fp16": "fp16", "amp_bf16": "bf16", "bf16": "bf16", None: None}
TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
"""Value of --report-to, which is the name of its package -> whether it is installed."""
MAY_DIFFER = {
    "output_dir": "the folder itself, which may have been moved",
    "resume": "says where to go on",
    "debug": "of error messages only",
    "report_to": "copies of the log",
    "push_to_hub": "after the training",
    "export": "after the training",
    "private": "after the training",
    "revision": "after the training",
    "allow_pickle": "whether weights may be read, not which",
    "precision": "`mixed_precision`, which the launcher can set as well, is compared in its place",
    "keep_checkpoints": "removes finished checkpoints",
    "stop_after": "when this process ends",
    "checkpoint_every_steps": "saving draws no random numbers",
    "checkpoint_every_epochs": "saving draws no random numbers",
    "eval_every_steps": "evaluation draws no random numbers from training's generators",
    "eval_every_epochs": "as eval_every_steps",
    "dataset_root": "of evaluation sets only",
    "eval_data": "evaluation draws no random numbers from training's generators",
    "robust_images": "of the evaluation under attack only",
    "workers": "batches do not depend on them; a stream of pairs, whose order does, refuses other workers itself",
}
"""Flags that a resumed run need not share with the run that it continues -> why they cannot change the weights."""

LARGEST_HASHED = 2**28
"""Bytes of a file that a flag names (a table, a model config) up to which its contents are compared on resume."""
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Output, resume, processes and seed."""

    output_dir: Path | None = None
    """Run folder. None = a new one, runs/RECIPE-<time>."""
    resume: str | None = None
    """Continue a run with the same flags: `latest`, or a checkpoint folder."""
    keep_checkpoints: int = 3
    """Checkpoints to keep, the newest; the one with the best main metric is kept beside them. 0 = all."""
    stop_after: float | None = None
    """Minutes after which the run ends with a checkpoint, to go on with --resume. None = no limit."""
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
    private: bool = False
    """Create the repository of --push-to-hub as a private one."""
    revision: str | None = None
    """Branch for --push-to-hub, created if it does not exist. None = main."""
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
        compiled: the model is compiled by torch.compile.

    Raises: UserError for numbers out of bounds, a tracker that is not installed, a `push_to_hub` that is malformed or
        not allowed, a folder that holds another run or is in use, a resume with other flags.
    """

    def __init__(self, config: HasRunFlags, *, recipe: str, compiled: bool = False):
        end_with_launcher()
        self.flags = flags = config.run
        self.stop = StopRequest(flags.stop_after)
        cli.check_values(cli.flat(config))
        check_push_flags(flags)
        check_trackers(flags.report_to)
        self.accelerator = Accelerator(
            mixed_precision=ACCELERATE_PRECISION[flags.precision],
            log_with=list(flags.report_to) or None,
            project_dir="runs",  # until `begin`, which knows the folder
            dynamo_backend="inductor" if compiled else None,  # None = as set by `accelerate launch`
        )
        check_all_processes_joined(self.accelerator)
        if (target := flags.push_to_hub) is not None:
            on_main(self.accelerator, lambda: push.check_access(target))  # all ranks
        record = json.loads(json.dumps(cli.flat(config), default=str))
        record |= {"inputs": input_files(record)}
        record |= {"mixed_precision": self.accelerator.mixed_precision, "cwd": str(Path.cwd())}
        usual = json.loads(json.dumps(cli.defaults(config), default=str))
        path, self._checkpoint = on_main(
            self.accelerator, lambda: open_folder(flags, recipe, record, usual)
        )  # all ranks
        self._use(path)
        self.title = recipe
        # At the start of the run, whatever is checked out and installed when it ends.
        self._record = record | {
            "run_id": uuid.uuid4().hex,
            "command": command_line(),
            "commit": git_commit(),
            "versions": versions(),
        }
        set_seed(flags.seed)  # the same initial weights on every rank

    def _use(self, path: Path) -> None:
        self.folder = RunFolder(
            path, is_main=self.accelerator.is_main_process, keep_checkpoints=self.flags.keep_checkpoints
        )

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

    def hold_start(self, start: nn.Module) -> None:
        """Records a hash of the initial weights, which the end of the run needs again; call it before `begin`.

        Raises: UserError where a resumed run has others than at its start.
        """
        digest = hashlib.sha256()
        add_weights(digest, start)
        weights = digest.hexdigest()
        if self.flags.resume is None:
            self._record |= {"start_weights": weights}
        elif self.folder.config().get("start_weights", weights) != weights:
            raise UserError(
                "--resume continues a run as it was, but --student has other weights than at its start: restore them, "
                "or start a new run"
            )

    def begin(self, title: str) -> None:
        """Takes the run folder, writes config.json unless the run is resumed, and prints a line. All ranks.

        Call it when nothing else can be refused. From here on no other run can take the folder.

        Raises: UserError where another run took it in the meantime.
        """
        self.title = f"{title} · seed {self.flags.seed}"
        resumed, renamed = self.flags.resume is not None, self.flags.output_dir is None and self.flags.resume is None
        self._use(
            on_main(self.accelerator, lambda: self.folder.take(resumed=resumed, renamed=renamed))  # all ranks
        )
        self.stop.listen()
        if not resumed:
            self.folder.write_json("config.json", self._record)
        if self.flags.report_to:
            self.accelerator.project_configuration.logging_dir = str(self.folder.path)
            values = {name: value for name, value in self._record.items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("gkl_vl", config=values)
        self.accelerator.print(f"{self.title} · {self.num_processes} x {self.device.type} · {self.folder.path}")

    def seed_ranks(self) -> None:
        """Seeds each rank differently, for dropout and attacks. Call it when the models exist."""
        set_seed(self.flags.seed, device_specific=True)

    def checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None for a new run."""
        return self._checkpoint

    def facts(self, *, steps: int) -> RunFacts:
        """What a model card says about this run, with the evaluations after `steps` updates."""
        config = self.folder.config()
        records = [record for record in self.folder.records() if record["step"] <= steps]
        images, seconds = images_and_seconds(records)
        return RunFacts(
            command=config["command"],
            commit=config["commit"],
            steps=steps,
            seed=self.flags.seed,
            metrics=[record for record in records if "model" in record and record["step"] == steps],
            images=images,
            hours=None if seconds is None else seconds / 3600,
            hardware=f"{self.num_processes} x {device_name(self.device)}",
            versions=config.get("versions", {}),  # not in runs that were started before it was recorded
        )

    def push(self) -> None:
        """Uploads the exported folder where --push-to-hub asks for it. Main process."""
        if self.flags.push_to_hub is not None:
            url = push.push_to_hub(
                folder=self.folder.path / "model",
                repo_id=self.flags.push_to_hub,
                private=self.flags.private,
                revision=self.flags.revision,
            )
            print(f"Pushed: {url}")

    def end(self) -> None:
        """Ends trackers and process group, and releases the folder. All ranks."""
        self.accelerator.end_training()
        self.folder.release()


def on_main(accelerator: Accelerator, function: Callable[[], Value]) -> Value:
    """What the function returns in the main process, on all ranks; they all raise its UserError. All ranks."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = function()
        except UserError as error:
            result[1] = str(error)
    broadcast_object_list(result)  # all ranks
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def check_push_flags(flags: RunFlags) -> None:
    """Checks without network. Raises: UserError as `push.check_target`, and for flags without --push-to-hub."""
    if flags.push_to_hub is not None:
        push.check_target(flags.push_to_hub, flags.revision)
        return
    cli.refuse_unused({"revision": flags.revision}, ["revision"], "has no effect without --push-to-hub")
    if flags.private:
        raise UserError("--private has no effect without --push-to-hub: leave it out")


def device_name(device: torch.device) -> str:
    """The model of a GPU; of other devices their kind and the machine's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"


def images_and_seconds(records: list[Record]) -> tuple[int | None, float | None]:
    """Images seen by all processes, and the seconds of training without evaluation, from the log of the loop.

    The time of a resumed run is that of all its sessions.
    """
    images, seconds = 0, 0.0
    for record in records:
        if "train/images_seen" in record:
            seconds += (record["train/images_seen"] - images) / record["train/images_per_second"]
            images = record["train/images_seen"]
    return (images, seconds) if images else (None, None)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises: UserError for a tracker whose package is not installed; Accelerate would leave it out."""
    for name in names:
        if not TRACKERS[name]():
            raise UserError(f"--report-to {name} needs its package: pip install {name}, or leave it out")


# ---- the folder, and what a resumed run may change


def open_folder(
    flags: RunFlags, recipe: str, record: dict[str, Any], usual: dict[str, Any]
) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to resume from; None for a new run. Writes nothing. Main process.

    `usual` are the defaults of the flags in `record`.

    Raises: UserError for a folder that cannot be used, and for a run that cannot be resumed with these flags.
    """
    path = default_folder(flags.resume, recipe) if flags.output_dir is None else flags.output_dir
    folder = RunFolder(path, is_main=True)
    if flags.resume is None:
        if flags.output_dir is not None:  # a default folder gets a new name where it exists
            folder.check_free()
        return path, None
    checkpoint = folder.find_checkpoint(flags.resume) if flags.resume != "latest" else None
    check_same_flags(record, usual | folder.config())  # a flag that did not exist then had its default
    if (holder := holder_of(path)) is not None:
        raise UserError(in_use(path, holder))
    return path, checkpoint or folder.find_checkpoint("latest")


def default_folder(resume: str | None, recipe: str) -> Path:
    """A new folder under runs/, or the newest one with a checkpoint to resume."""
    if resume is None:
        return Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if resume != "latest":
        return Path(resume).absolute().parent.parent
    runs = {path.parents[1] for path in Path("runs").glob(f"{recipe}-*/checkpoints/step_*")}
    folders = [folder for folder in runs if RunFolder(folder, is_main=False).saved()]
    if not folders:
        raise UserError(
            f"--resume latest: no runs/{recipe}-* folder here has a checkpoint: name the run with --output-dir"
        )
    return max(folders, key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)])


def check_same_flags(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises: UserError that names the flags, other than `MAY_DIFFER`, by which a resumed run differs from its start.

    Paths are the same if they lead to the same place from the folders in which the two commands ran.
    """
    folder = Path(before.get("cwd", "."))
    names = [name for name in now if name not in MAY_DIFFER and name not in ("cwd", "inputs")]
    if replaced := [
        name for name in now.get("inputs", {}) if now["inputs"][name] != before.get("inputs", {}).get(name)
    ]:
        name = replaced[0]
        raise UserError(
            f"--resume continues a run as it was, but {cli.flag_name(name)} {cli.shown(now[name])} has other contents "
            "than at its start: restore the file, or start a new run"
        )
    changed = [name for name in names if not is_same(now[name], before.get(name), folder)]
    if changed:
        differences = ", ".join(
            f"{cli.flag_name(name)} {cli.shown(now[name])} (was {cli.shown(before.get(name))})" for name in changed
        )
        raise UserError(f"--resume continues a run as it was, but {differences}: use the same flags")


def input_files(flags: dict[str, Any]) -> dict[str, list]:
    """Size and SHA-256 of each file that a flag names, by flag; of files above `LARGEST_HASHED` the size alone."""
    inputs = {}
    for name, value in flags.items():
        if name in MAY_DIFFER:
            continue
        known = [_input_file(name, text) for text in (value if isinstance(value, list) else [value])]
        if any(known):
            inputs[name] = known if isinstance(value, list) else known[0]
    return inputs


def _input_file(flag: str, value: Any) -> list | None:
    if flag == "teacher_store" and isinstance(value, str) and not is_local(value):
        with fetched(f"{value.rstrip('/')}/{MANIFEST}") as copy:
            return [copy.stat().st_size, hashlib.sha256(copy.read_bytes()).hexdigest()]
    place = resolved(value, Path.cwd()) if isinstance(value, str) else None
    if place is None:
        return None
    file = Path(place.rpartition("=")[2])
    if flag == "teacher_store" and not file.is_file():  # a file is MobileCLIP's config
        file = file / MANIFEST
    if not file.is_file():
        return None
    size = file.stat().st_size
    return [size, hashlib.sha256(file.read_bytes()).hexdigest() if size <= LARGEST_HASHED else None]


def is_same(now: Any, before: Any, folder: Path) -> bool:
    """Whether a value means what it meant in a command that ran in `folder`."""
    if isinstance(now, list) and isinstance(before, list):
        return len(now) == len(before) and all(is_same(a, b, folder) for a, b in zip(now, before, strict=True))
    if not (isinstance(now, str) and isinstance(before, str)):
        return now == before
    there = resolved(before, folder)
    return now == before if there is None else resolved(now, Path.cwd()) == there


def resolved(text: str, folder: Path) -> str | None:
    """`text` with absolute paths, seen from `folder`; None where it holds no path that exists.

    Paths are a whole text or a part of it between `::`, behind a prefix (local-dir:PATH, TAG=PATH), before :SPLIT, and
    the folder of a pattern (PATH/{0..9}.tar, PATH/*.tar).
    """
    parts = [_resolved_part(part, folder) for part in text.split("::")]
    return None if None in parts else "::".join(filter(None, parts))


def _resolved_part(text: str, folder: Path) -> str | None:
    pattern = re.search(r"[{*?\[]", text)
    if pattern is not None:
        parent, _, rest = text[: pattern.start()].rpartition("/")
        place = folder / (parent or ("/" if text.startswith("/") else "."))
        return f"{place.resolve()}/{rest}{text[pattern.start() :]}" if os.path.isdir(place) else None
    head, colon, tail = text.partition(":")
    tag, _, file = text.partition("=")
    for before, path, after in (
        ("", text, ""),
        (head + colon, tail, ""),
        ("", head, colon + tail),
        (f"{tag}=", file, ""),
    ):
        if path and os.path.exists(folder / path):
            return f"{before}{(folder / path).resolve()}{after}"
    return None
