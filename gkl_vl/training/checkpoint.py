"""The run folder, and checkpoints that are complete or absent.

runs/clip_kd-20260102-030405/
    config.json          flags, command line, commit
    labelled.txt         semi-supervised: the images that keep their label
    results.jsonl        one line per log and per evaluation
    checkpoints/step_00000600/   Accelerate's state, loop.json, ema.safetensors, memory_RANK.safetensors
    model/               the exported student
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

_PREFIX, _INCOMPLETE = "step_", "writing_"


class RunFolder:
    """Folder of a run. All processes have one; only the main process writes to it.

    It is made by the first write, so that an error before it leaves no folder behind.
    """

    def __init__(self, path: Path, *, is_main: bool):
        self.path, self._is_main = path, is_main
        self.results, self.checkpoints = path / "results.jsonl", path / "checkpoints"
        parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if is_main and not (parent.is_dir() and os.access(parent, os.W_OK)):
            reason = "is not writable" if parent.is_dir() else "is a file"
            raise UserError(f"--output-dir {str(path)!r} cannot be made, {str(parent)!r} {reason}: name another")

    def write_json(self, name: str, content: Any) -> None:
        """Replaces a JSON file."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Replaces a text file."""
        if self._is_main:
            write_text(self.path / name, content)

    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises: UserError where there is none."""
        path = self.path / "config.json"
        if not path.is_file():
            raise UserError(f"{str(self.path)!r} holds no config.json: it is not a run folder")
        return json.loads(path.read_text())

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to results.jsonl."""
        if self._is_main:
            append_line(self.results, record)

    def records(self) -> list[dict[str, Any]]:
        """All lines of results.jsonl. A last line that a kill cut short is left out."""
        if not self.results.is_file():
            return []
        lines = self.results.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run writes again."""
        if self._is_main and self.results.is_file():
            kept = [record for record in self.records() if record["step"] <= step]
            self.write_text(self.results.name, "".join(json.dumps(record) + "\n" for record in kept))

    def find_checkpoint(self, resume: str) -> Path:
        """The checkpoint that `--resume` names: `latest`, or a path. Raises: UserError where there is none."""
        if resume != "latest":
            if not (Path(resume) / "loop.json").is_file():
                raise UserError(
                    f"--resume {resume!r} is not a checkpoint folder: take 'latest' or a checkpoints/step_* folder"
                )
            return Path(resume)
        complete = sorted(self.checkpoints.glob(f"{_PREFIX}*"))
        if not complete:
            raise UserError(
                f"--resume latest: {str(self.checkpoints)!r} holds no checkpoint: start in another --output-dir"
            )
        return complete[-1]


def save_checkpoint(
    accelerator: Accelerator,
    run: RunFolder,
    *,
    step: int,
    position: dict[str, Any],
    ema: nn.Module | None,
    memory: dict[str, Tensor],
) -> None:
    """Saves everything that the loop needs to continue after `step`. All ranks, each with its own `memory`.

    Written under another name and renamed when complete, so that a kill leaves a complete checkpoint or none.
    """
    scratch = run.checkpoints / f"{_INCOMPLETE}{step:08d}"
    final = run.checkpoints / f"{_PREFIX}{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a kill
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()  # all ranks
    accelerator.save_state(str(scratch))  # all ranks: model, optimizer, scaler, RNG of every rank
    if memory:
        save_file(
            {name: _contiguous_copy(tensor) for name, tensor in memory.items()},
            scratch / _memory(accelerator.process_index),
        )
    positions = gather_object([position])  # all ranks: and all have written
    if accelerator.is_main_process:
        if ema is not None:
            save_file(
                {name: _contiguous_copy(tensor) for name, tensor in ema.state_dict().items()},
                scratch / "ema.safetensors",
            )
        (scratch / "loop.json").write_text(json.dumps({"step": step, "positions": positions}))
        replace_folder(scratch, final)  # this very step may have been saved before a rewind
    accelerator.wait_for_everyone()  # all ranks


def read_loop_state(checkpoint: Path, *, rank: int, world_size: int) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint and this rank's position in the data.

    Raises: UserError for another number of processes.
    """
    state = json.loads((checkpoint / "loop.json").read_text())
    if len(state["positions"]) != world_size:
        raise UserError(
            f"{str(checkpoint)!r} was written by {len(state['positions'])} processes, now there are {world_size}: "
            "resume with the same number"
        )
    return state["step"], state["positions"][rank]


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, *, ema: nn.Module | None) -> dict[str, Tensor]:
    """Restores model, optimizer, scaler, RNG and EMA; returns the objective's state of this rank. All ranks."""
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


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()
