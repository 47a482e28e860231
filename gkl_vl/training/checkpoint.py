"""The run folder: configuration, results, checkpoints that are whole or absent.

runs/clip_kd-20260102-030405/
    config.json          what was asked for
    labelled.txt         semi-supervised: the images that keep their label
    results.jsonl        one line per log and per evaluation
    checkpoints/step_00000600/   to go on from: Accelerate's state, loop.json, ema.safetensors, memory_RANK.safetensors
    model/               the student as people load it
    report.png
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gkl_vl.atomic import append_line, replace_folder, write_text
from gkl_vl.errors import UserError

_PREFIX, _ASIDE = "step_", "writing_"


class RunFolder:
    """Where a run writes. All processes hold one; only the main process writes to it.

    It is made when there is something to write, so a mistake that ends a run before leaves no folder behind.
    """

    def __init__(self, path: Path, *, is_main: bool):
        self.path, self._is_main = path, is_main
        self.results, self.checkpoints = path / "results.jsonl", path / "checkpoints"
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if is_main and not (there.is_dir() and os.access(there, os.W_OK)):
            what = "is not writable" if there.is_dir() else "is a file"
            raise UserError(f"--output-dir {str(path)!r} cannot be made, {str(there)!r} {what}: name another")

    def write_json(self, name: str, content: Any) -> None:
        """Replaces a JSON file."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Replaces a text file."""
        if self._is_main:
            write_text(self.path / name, content)

    def config(self) -> dict[str, Any]:
        """What config.json says. Raises UserError where there is none."""
        path = self.path / "config.json"
        if not path.is_file():
            raise UserError(f"{str(self.path)!r} holds no config.json: it is not a run folder")
        return json.loads(path.read_text())

    def log(self, record: dict[str, Any]) -> None:
        """One line of results.jsonl."""
        if self._is_main:
            append_line(self.results, record)

    def records(self) -> list[dict[str, Any]]:
        """All lines so far. A last line that a kill cut short is left out."""
        if not self.results.is_file():
            return []
        lines = self.results.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`: the resumed run will write them again."""
        if self._is_main and self.results.is_file():
            kept = [record for record in self.records() if record["step"] <= step]
            self.write_text(self.results.name, "".join(json.dumps(record) + "\n" for record in kept))

    def find_checkpoint(self, resume: str) -> Path:
        """The checkpoint that `--resume` names: `latest`, or a path. Raises UserError when there is none."""
        if resume != "latest":
            if not (Path(resume) / "loop.json").is_file():
                raise UserError(
                    f"--resume {resume!r} is not a checkpoint folder: take 'latest' or a checkpoints/step_* folder"
                )
            return Path(resume)
        whole = sorted(self.checkpoints.glob(f"{_PREFIX}*"))
        if not whole:
            raise UserError(
                f"--resume latest: {str(self.checkpoints)!r} holds no checkpoint: start in another --output-dir"
            )
        return whole[-1]


def save_checkpoint(
    accelerator: Accelerator,
    run: RunFolder,
    *,
    step: int,
    position: dict[str, Any],
    ema: nn.Module | None,
    memory: dict[str, Tensor],
) -> None:
    """Save everything that the loop needs to go on after `step`. All ranks take part, each with its own `memory`.

    Written under another name and renamed when complete, so a kill leaves either the whole checkpoint or none.
    """
    aside = run.checkpoints / f"{_ASIDE}{step:08d}"
    final = run.checkpoints / f"{_PREFIX}{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)  # left by a kill
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()  # all ranks
    accelerator.save_state(str(aside))  # all ranks: model, optimizer, scaler, RNG of every rank
    if memory:
        save_file({name: _own(tensor) for name, tensor in memory.items()}, aside / _memory(accelerator.process_index))
    positions = gather_object([position])  # all ranks: and all have written
    if accelerator.is_main_process:
        if ema is not None:
            save_file({name: _own(tensor) for name, tensor in ema.state_dict().items()}, aside / "ema.safetensors")
        (aside / "loop.json").write_text(json.dumps({"step": step, "positions": positions}))
        replace_folder(aside, final)  # this very step may have been saved before a rewind
    accelerator.wait_for_everyone()  # all ranks


def read_loop_state(checkpoint: Path, *, rank: int, world_size: int) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint and my rank's position in the data. Raises UserError for another number of processes."""
    state = json.loads((checkpoint / "loop.json").read_text())
    if len(state["positions"]) != world_size:
        raise UserError(
            f"{str(checkpoint)!r} was written by {len(state['positions'])} processes, now there are {world_size}: "
            "resume with the same number"
        )
    return state["step"], state["positions"][rank]


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, *, ema: nn.Module | None) -> dict[str, Tensor]:
    """Restore model, optimizer, scaler and RNG of every rank, and the EMA; returns my rank's memory. All ranks."""
    accelerator.load_state(str(checkpoint))  # all ranks
    if ema is not None:
        path = checkpoint / "ema.safetensors"
        if not path.is_file():
            raise UserError(f"{str(checkpoint)!r} holds no moving average: resume without --ema-decay")
        ema.load_state_dict(load_file(path, device=str(accelerator.device)))
    path = checkpoint / _memory(accelerator.process_index)
    return load_file(path) if path.is_file() else {}


def _memory(rank: int) -> str:
    return f"memory_{rank}.safetensors"


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()
