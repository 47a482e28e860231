"""The run folder, and checkpoints that are complete or absent.

runs/clip_kd-20260102-030405/
    .lock                the process that the run belongs to while it lives
    config.json          flags, command line, commit
    labelled.txt         semi-supervised: the images that keep their label
    results.jsonl        one line per log and per evaluation
    checkpoints/step_00000600/   Accelerate's state, ema.safetensors, memory_RANK.safetensors, and loop.json: the step,
                         the positions in the data, the run's id, versions, size and SHA-256 of each other file
    model/               the exported student
    adapter/             LoRA: its adapters, in peft's format
    report.png           and interpolation.png of a fine-tuning run
    report.html          the run on a page
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.constants import RNG_STATE_NAME, SAFE_WEIGHTS_NAME
from accelerate.utils.other import load
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gkl_vl.atomic import (
    append_line,
    hold_folder,
    holder_of,
    in_use,
    json_text,
    leftovers,
    nan_for_null,
    read_json,
    read_lines,
    release_folder,
    remove_folder,
    replace_folder,
    write_json,
    write_text,
)
from gkl_vl.errors import UserError, notice
from gkl_vl.models.fingerprint import add_tensors
from gkl_vl.provenance import versions

_PREFIX, _INCOMPLETE = "step_", "writing_"
_MANIFEST = "loop.json"
_REMEDY = "resume from another checkpoints/step_* folder"


class RunFolder:
    """Folder of a run. All processes have one; only the main process writes to it.

    It is made by `take` or the first write, so that an error before it leaves no folder behind.

    Args:
        keep_checkpoints: after each save all but the newest so many checkpoints are removed, except the best one (see
            `best_step`); 0 = all are kept.
    """

    def __init__(self, path: Path, *, is_main: bool, keep_checkpoints: int = 0):
        self.path, self._is_main, self._keep = path, is_main, keep_checkpoints

    @property
    def results(self) -> Path:
        """results.jsonl."""
        return self.path / "results.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    # ---- taking it

    def check_free(self) -> None:
        """Writes nothing. Raises: UserError for a folder that cannot be made, holds a run or is in use."""
        path = self.path
        parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            reason = "is not writable" if parent.is_dir() else "is a file"
            raise UserError(f"--output-dir {str(path)!r} cannot be made, {str(parent)!r} {reason}: name another")
        if (holder := holder_of(path)) is not None:
            raise UserError(in_use(path, holder))
        if self.results.is_file() or self.saved():
            raise UserError(f"{str(path)!r} already holds a run: add --resume latest, or name another --output-dir")

    def take(self, *, renamed: bool = False, resumed: bool = False) -> Path:
        """Takes the folder for this process until `release`, or the end of the process, and returns its path.

        Files that a killed writer left are removed. Main process.

        Args:
            renamed: an existing folder is left alone, and -2, -3, ... is added to the name.
            resumed: the folder holds the run that goes on.

        Raises: UserError for a folder that another process holds, and for another run in it unless `resumed`.
        """
        if renamed:
            self.path = new_folder(self.path)
        hold_folder(self.path)
        if not resumed:
            try:
                self.check_free()  # another process may have been here since the first check
            except UserError:
                self.release()
                raise
        incomplete = [
            path for path in self.checkpoints.glob(f"{_INCOMPLETE}*") if path.name[len(_INCOMPLETE) :].isdigit()
        ]
        for path in [*leftovers(self.path), *leftovers(self.checkpoints), *incomplete]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.path

    def release(self) -> None:
        """Ends `take`."""
        release_folder(self.path)

    # ---- config.json, results.jsonl and other files

    def write_json(self, name: str, content: Any) -> None:
        """Replaces a JSON file."""
        if self._is_main:
            write_json(self.path / name, content, indent=2)

    def write_text(self, name: str, content: str) -> None:
        """Replaces a text file."""
        if self._is_main:
            write_text(self.path / name, content)

    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises: UserError where there is none, or a damaged one."""
        path = self.path / "config.json"
        if not path.is_file():
            raise UserError(f"{str(self.path)!r} holds no config.json: it is not a run folder")
        return read_json(path, remedy="restore it from a copy, or start in another --output-dir")

    def run_id(self) -> str | None:
        """The id in config.json; None where there is no such file."""
        return self.config().get("run_id") if (self.path / "config.json").is_file() else None

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to results.jsonl."""
        if self._is_main:
            append_line(self.results, record)

    def records(self) -> list[dict[str, Any]]:
        """All lines of results.jsonl, with nan where the file has null. A last line that a kill cut short is left out.

        Raises: UserError for a damaged line.
        """
        records = [nan_for_null(record) for record in read_lines(self.results)] if self.results.is_file() else []
        for number, record in enumerate(records, 1):
            if not isinstance(record.get("step"), int):
                raise UserError(f"{str(self.results)!r}: record {number} has no number of a step: remove that line")
            if not all(isinstance(record.get(name, ""), str) for name in ("model", "dataset")):
                raise UserError(f"{str(self.results)!r}: record {number} has no names of a model and a set: remove it")
        return records

    # ---- checkpoints

    def rewind(self, step: int) -> None:
        """Drops the lines and checkpoints after `step`, which a resumed run writes again. Prints the number of those.

        Checkpoints that stayed would be taken for this run's by the next --resume latest.
        """
        if not self._is_main:
            return
        if self.results.is_file():
            kept = [record for record in self.records() if record["step"] <= step]
            self.write_text(self.results.name, "".join(json_text(record) for record in kept))
        later = [path for saved, path in self.saved().items() if saved > step]
        for path in later:
            remove_folder(path)
        if later:
            print(f"removed {len(later)} checkpoints after step {step:,}, which this run writes again")

    def saved(self) -> dict[int, Path]:
        """Step -> folder of each complete checkpoint, in the order of the steps."""
        names = [(re.fullmatch(rf"{_PREFIX}(\d{{8,}})", path.name), path) for path in self.checkpoints.glob("*")]
        steps = {int(match[1]): path for match, path in names if match and (path / _MANIFEST).is_file()}
        return dict(sorted(steps.items()))

    def remove_old(self) -> None:
        """Removes the checkpoints that `keep_checkpoints` does not keep. Main process."""
        saved = self.saved()
        if not self._keep or len(saved) <= self._keep:
            return
        kept = {*list(saved)[-self._keep :], best_step(self.records(), saved)}
        for step, path in saved.items():
            if step not in kept and not path.is_symlink():
                remove_folder(path)

    def find_checkpoint(self, resume: str) -> Path:
        """The checkpoint that `--resume` names: `latest`, the newest whole one of this run, or a path.

        Reads all of its files. Prints a line for each newer one that is damaged or of another run.

        Raises: UserError where there is none, and for a path to one that is damaged or of another run.
        """
        if resume != "latest":
            checkpoint = Path(resume)
            if not (checkpoint / _MANIFEST).is_file():
                raise UserError(
                    f"--resume {resume!r} is not a checkpoint folder: take 'latest' or a checkpoints/step_* folder"
                )
            if checkpoint.resolve().parent != self.checkpoints.resolve():
                raise UserError(
                    f"--resume {resume!r} is not a checkpoint of {str(self.path)!r}: leave out --output-dir"
                )
            if (damage := damage_of(checkpoint, self.run_id())) is not None:
                raise UserError(f"--resume {resume!r} {damage}: {_REMEDY}")
            return checkpoint
        for checkpoint in reversed(self.saved().values()):
            if (damage := damage_of(checkpoint, self.run_id())) is None:
                return checkpoint
            notice(f"checkpoint {str(checkpoint)!r} {damage}: it is left out")
        raise UserError(
            f"--resume latest: {str(self.checkpoints)!r} holds no whole checkpoint: start in another --output-dir"
        )


def new_folder(path: Path) -> Path:
    """Makes the folder, under another name where it exists: PATH, PATH-2, PATH-3, ... No two callers get the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")


def best_step(records: list[dict[str, Any]], steps: Collection[int]) -> int | None:
    """Of these steps, the one where the student's main metric was highest, the newest of equals; None without any.

    The main metric is the first metric of the first evaluation of a step, by default top-1 accuracy on the first
    evaluation set. Steps that were evaluated on another set or by another metric than the newest one do not count.
    """
    first: dict[int, tuple[str, str, float]] = {}
    for record in records:
        metrics = ((name, value) for name, value in record.items() if isinstance(value, float))
        name, value = next(metrics, ("", 0.0))
        if record.get("model") == "student" and record["step"] in steps and name:
            first.setdefault(record["step"], (record.get("dataset", ""), name, value))
    if not first:
        return None
    newest = first[max(first)][:2]
    comparable = [(value, step) for step, (*what, value) in first.items() if (*what,) == newest and value == value]
    return max(comparable)[1] if comparable else None


def save_checkpoint(
    accelerator: Accelerator,
    run: RunFolder,
    *,
    step: int,
    position: dict[str, Any],
    ema: nn.Module | None,
    memory: dict[str, Tensor],
    frozen: str | None,
) -> None:
    """Saves everything that the loop needs to continue after `step`. All ranks, each with its own `memory`.

    Frozen parameters are those of the run's start and left out, but for FSDP's shards; their hash, `frozen`, is kept.
    Written under another name and renamed when complete, so that a kill leaves a complete checkpoint or none.
    """
    scratch = run.checkpoints / f"{_INCOMPLETE}{step:08d}"
    final = run.checkpoints / f"{_PREFIX}{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a kill
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()  # all ranks
    hook = accelerator.register_save_state_pre_hook(_leave_out_frozen)
    accelerator.save_state(str(scratch))  # all ranks: model, optimizer, scaler, RNG of every rank
    hook.remove()
    if memory:
        save_file(
            {name: _contiguous_copy(tensor) for name, tensor in memory.items()},
            scratch / _memory(accelerator.process_index),
        )
    positions = gather_object([position])  # all ranks: and all have written
    if accelerator.is_main_process:
        if ema is not None:
            average = ema.state_dict()
            _leave_out_frozen([ema], [average])
            save_file({n: _contiguous_copy(tensor) for n, tensor in average.items()}, scratch / "ema.safetensors")
        manifest = {"step": step, "run_id": run.run_id(), "positions": positions, "frozen": frozen}
        manifest |= {"versions": versions(), "files": contents_of(scratch)}
        (scratch / _MANIFEST).write_text(json_text(manifest))
        replace_folder(scratch, final)
        run.remove_old()
    accelerator.wait_for_everyone()  # all ranks


def contents_of(folder: Path) -> dict[str, list]:
    """[size, SHA-256] of each file in a folder of a checkpoint but its manifest, by relative name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / _MANIFEST]
    return {str(path.relative_to(folder)): [path.stat().st_size, _sha256(path)] for path in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def damage_of(checkpoint: Path, run_id: str | None) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None where it is whole and of the run."""
    try:
        manifest = read_json(checkpoint / _MANIFEST, remedy=_REMEDY)
    except UserError:
        return f"has a damaged {_MANIFEST}"
    stored = manifest.get("files")
    if not isinstance(stored, dict):
        return f"has no checksums in {_MANIFEST}"
    if manifest.get("run_id") != run_id:
        return "is of another run than its folder"
    found = contents_of(checkpoint)
    for name in sorted({*stored, *found}):
        if name not in found:
            return f"lacks {name}"
        if stored.get(name) != found[name]:
            return f"has a damaged {name}" if name in stored else f"holds {name}, which is not its own"
    return None


def read_loop_state(
    checkpoint: Path, *, rank: int, world_size: int, frozen: str | None = ""
) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint and this rank's position in the data. `frozen`: see `frozen_weights`; None with FSDP.

    Raises: UserError for another number of processes, for other frozen weights, which the checkpoint does not hold, and
        for a damaged file.
    """
    path = checkpoint / _MANIFEST
    state = read_json(path, remedy=_REMEDY)
    step, positions = state.get("step"), state.get("positions")
    whole = isinstance(positions, list) and all(isinstance(each, dict) for each in positions)
    if not whole or type(step) is not int or checkpoint.name != f"{_PREFIX}{step:08d}":
        raise UserError(f"{str(path)!r} is damaged (no positions, or not those of {checkpoint.name}): {_REMEDY}")
    if len(state["positions"]) != world_size:
        raise UserError(
            f"{str(checkpoint)!r} was written by {len(state['positions'])} processes, now there are {world_size}: "
            "resume with the same number"
        )
    if state.get("frozen") not in (None, frozen):  # None with FSDP, and in earlier checkpoints
        raise UserError(
            f"checkpoint {str(checkpoint)!r} was trained beside other frozen weights than those that --student and "
            "--teacher have now: restore these, or start a new run"
        )
    return state["step"], state["positions"][rank]


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, *, ema: nn.Module | None) -> dict[str, Tensor]:
    """Restores model, optimizer, scaler, RNG and EMA; returns the objective's state of this rank. All ranks.

    Raises: UserError for a checkpoint that is damaged or of another model.
    """
    ema_path, memory_path = checkpoint / "ema.safetensors", checkpoint / _memory(accelerator.process_index)
    if ema is not None and not ema_path.is_file():
        raise UserError(f"{str(checkpoint)!r} holds no moving average: resume without --ema-decay")
    try:
        load(checkpoint / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")  # load_state goes on without it
        hook = accelerator.register_load_state_pre_hook(_load_trained)
        accelerator.load_state(str(checkpoint))  # all ranks
        hook.remove()
        if ema is not None:
            _load_around_frozen(ema, load_file(ema_path))
        return load_file(memory_path) if memory_path.is_file() else {}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors, pickle, torch and FSDP each have errors of their own for a damaged file
        raise UserError(
            f"checkpoint {str(checkpoint)!r} cannot be loaded ({type(error).__name__}: {error}): {_REMEDY}"
        ) from error


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def frozen_weights(model: nn.Module) -> str:
    """A hash of `frozen_parameters`; empty without any."""
    digest, frozen = hashlib.sha256(), frozen_parameters(model)
    add_tensors(digest, frozen.items())
    return digest.hexdigest() if frozen else ""


def _leave_out_frozen(models: list[Any], states: list[Any], folder: str = "") -> None:
    """Removes frozen parameters from state dicts in place. With FSDP Accelerate gives no state dicts."""
    for model, state in zip(models, states, strict=False):
        for name in frozen_parameters(model):
            del state[name]


def _load_trained(models: list[Any], folder: str) -> None:
    """Loads models with frozen parameters, and leaves the others to Accelerate. With FSDP it gives none."""
    for model in list(models):
        if frozen_parameters(model):
            _load_around_frozen(model, load_file(Path(folder) / SAFE_WEIGHTS_NAME))
            models.remove(model)


def _load_around_frozen(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Loads all of a model but its frozen parameters, which older checkpoints hold as well."""
    frozen = frozen_parameters(model)
    fit = model.load_state_dict({name: t for name, t in stored.items() if name not in frozen}, strict=False)
    if others := [*fit.unexpected_keys, *(set(fit.missing_keys) - frozen.keys())]:
        raise ValueError(f"tensors of another model, such as {others[0]}")


def _memory(rank: int) -> str:
    return f"memory_{rank}.safetensors"


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()
