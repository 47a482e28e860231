"""What attacks leave of a classifier's accuracy: AutoAttack, quick looks, and whether gradients can be trusted.

A set is attacked batch by batch, each batch by itself from the same seed. So what becomes of an image depends neither
on the number of processes nor on interruptions; finished batches lie in a state folder, where a rerun goes on.

Axis letters: n = images of a batch, N = of the set, C = classes, h w = pixels.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from tqdm import tqdm

from gkl_vl.atomic import write_text
from gkl_vl.distributed import rank, sum_across_processes, world_size
from gkl_vl.errors import UserError
from gkl_vl.models.fingerprint import add_weights
from gkl_vl.report import percent
from gkl_vl.robustness.autoattack import (
    QUICK,
    Attack,
    Version,
    captured_warnings,
    deterministic_cudnn,
    distinct_warnings,
    import_autoattack,
    survivors,
)
from gkl_vl.robustness.pgd import Norm
from gkl_vl.robustness.targets import Examples, Target, check_model

LEAST_CLASSES: dict[Version, int] = {"standard": 4, "plus": 4, "rand": 3}
"""The difference of logits ratio, DLR, ranks this many logits."""
USUAL_EPSILON: dict[Norm, str] = {"linf": "8/255", "l2": "0.5"}
"""RobustBench's for CIFAR-10."""

SQUARE_MAY_ADD = 0.002
"""pyautoattack's own threshold, checks.py::check_square_sr."""

# ---- a set, batch by batch ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an attack left of a set."""

    attack: Attack
    flags: dict[str, Bool[Tensor, " N"]]
    """As of `survivors`."""
    warnings: list[str]
    """What makes the number doubtful, a line each."""
    seconds: float
    """Of all batches together, whichever run and process attacked them."""
    settings: dict[str, Any]
    """All that decides the flags."""
    state_dir: Path

    def accuracies(self) -> dict[str, float]:
        """Shares in [0, 1]: "clean", then what is left after each part of the attack; the last is the robust one."""
        return {name: int(flags.sum()) / len(flags) for name, flags in self.flags.items()}


def measure(
    *,
    attack: Attack,
    target: Target,
    examples: Examples,
    batch_size: int = 250,
    state_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Attack a set batch by batch, shared out over the processes; every process calls this and has the whole outcome.

    Batch k holds images k * batch_size and on, and is attacked as if it were alone. Its flags are written to
    `state_dir` in one move when it is done; batches that are there already are not attacked again.

    Args:
        target: on `device`.
        state_dir: on a file system that all processes share. None = runs/attack-HASH, HASH of all that decides the
            flags, so that the same evaluation finds its own.

    Raises: UserError for a state folder of another evaluation, a model that does not fit the images or whose logits
        are not finite, a radius that takes in every image, too few classes for AutoAttack, pyautoattack missing.
    """
    check_attack(attack, target, examples, batch_size, device)
    settings = _settings(attack, target, examples, batch_size)
    folder = state_dir or Path("runs") / f"attack-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    _require_same(folder, settings)
    batches = torch.arange(len(examples.labels)).split(batch_size)
    done = _finished(folder)
    _wait(device)  # all ranks: nobody writes before everybody has read what is to do
    todo = [number for number in range(len(batches)) if number not in done]
    write_text(folder / "settings.json", json.dumps(settings) + "\n")
    bar = tqdm(desc=attack.name, total=len(batches), unit="batch", disable=None if rank() == 0 else True)
    with bar, deterministic_cudnn():
        _show(bar, done)
        for number in todo[rank() :: world_size()]:
            batch = attack_batch(attack, target, examples, batches[number], device)
            write_text(folder / f"batch_{number:05d}.json", json.dumps({"batch": number} | batch) + "\n")
            if rank() == 0:
                _show(bar, _finished(folder))
    _wait(device)  # all ranks: every batch is there
    return _collect(attack, folder, settings, len(batches))


def attack_batch(
    attack: Attack, target: Target, examples: Examples, index: Int64[Tensor, " n"], device: torch.device | str
) -> dict[str, Any]:
    began, heard = time.perf_counter(), []
    with captured_warnings(heard):
        flags = survivors(
            attack, model=target.model, images=examples.images[index], labels=examples.labels[index], device=device
        )
    return {
        "indices": index.tolist(),
        "flags": {name: of_part.int().tolist() for name, of_part in flags.items()},
        "warnings": heard,
        "seconds": time.perf_counter() - began,
    }


def _collect(attack: Attack, folder: Path, settings: dict[str, Any], count: int) -> Outcome:
    found = _finished(folder)
    if missing := [number for number in range(count) if number not in found]:
        raise UserError(
            f"batches {missing[:5]} are not in {str(folder)!r}: name a --state-dir on a disk that all processes share"
        )
    batches = [found[number] for number in range(count)]
    names = batches[0]["flags"]
    flags = {name: torch.tensor([f for batch in batches for f in batch["flags"][name]]).bool() for name in names}
    return Outcome(
        attack=attack,
        flags=flags,
        warnings=distinct_warnings([batch["warnings"] for batch in batches]) + _square_warning(attack, flags),
        seconds=sum(batch["seconds"] for batch in batches),
        settings=settings,
        state_dir=folder,
    )


def _square_warning(attack: Attack, flags: dict[str, Bool[Tensor, " N"]]) -> list[str]:
    # pyautoattack makes this check itself, but within a batch and with all parts in one call
    if attack.name != "autoattack" or "square" not in flags:
        return []
    names = list(flags)
    before = flags[names[names.index("square") - 1]]
    taken = int(before.sum() - flags["square"].sum()) / len(before)
    if taken <= SQUARE_MAY_ADD:
        return []
    return [
        f"Square, which sees no gradients, took {percent(taken)} more after all that see them: they may be masked, "
        "so an adaptive attack may take more still"
    ]


def _wait(device: torch.device | str) -> None:
    sum_across_processes(torch.zeros(1, device=device))  # all ranks


def _show(bar: tqdm, done: dict[int, dict[str, Any]]) -> None:
    robust = [flag for batch in done.values() for flag in list(batch["flags"].values())[-1]]
    bar.n = len(done)
    bar.set_postfix_str(f"robust so far {percent(sum(robust) / len(robust))}" if robust else "")


# ---- the state folder --------------------------------------------------------------------------------------------


def _settings(attack: Attack, target: Target, examples: Examples, batch_size: int) -> dict[str, Any]:
    """All that decides the flags, beside the machine."""
    version = None if attack.name in QUICK else import_autoattack().__version__
    digest = hashlib.sha256()
    add_weights(digest, target.model)
    return asdict(attack) | {
        "architecture": target.architecture,
        "model_sha256": digest.hexdigest(),
        "data_sha256": hashlib.sha256(
            examples.images.numpy().tobytes() + examples.labels.numpy().tobytes()
        ).hexdigest(),
        "images": len(examples.labels),
        "batch_size": batch_size,
        "pyautoattack": version,
    }


def _require_same(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "settings.json"
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--state-dir {str(folder)!r} is no state of an attack: name another, or a new one")
        return
    before = json.loads(file.read_text())
    other = [f"{k} {settings.get(k)} (was {before.get(k)})" for k in settings if settings[k] != before.get(k)]
    if other:
        raise UserError(
            f"--state-dir {str(folder)!r} belongs to another evaluation, but {', '.join(other)}: "
            "name another, or use the same flags, model and data"
        )


def _finished(folder: Path) -> dict[int, dict[str, Any]]:
    batches = [json.loads(file.read_text()) for file in sorted(folder.glob("batch_*.json"))]
    return {batch["batch"]: batch for batch in batches}


# ---- mistakes ----------------------------------------------------------------------------------------------------


def check_attack(
    attack: Attack, target: Target, examples: Examples, batch_size: int, device: torch.device | str
) -> None:
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size} must be at least 1")
    if attack.name != "autoattack" and attack.version != "standard":
        raise UserError(f"--version {attack.version} is AutoAttack's, not that of --attack {attack.name}: leave it out")
    if attack.name not in QUICK:
        import_autoattack()
    widest = 1.0 if attack.norm == "linf" else examples.images[0].numel() ** 0.5
    if not 0 < attack.epsilon <= widest:
        raise UserError(
            f"--epsilon {attack.epsilon:g} must be above 0 and at most {widest:g}, the {attack.norm} distance of black "
            "and white: pixels are in [0, 1], so write 8/255, not 8"
        )
    classes = check_model(target, examples, device)
    least = LEAST_CLASSES[attack.version] if attack.name == "autoattack" else 2
    if classes < least:
        raise UserError(
            f"AutoAttack {attack.version} ranks {least} logits and the model has {classes}: use --attack pgd100"
        )
