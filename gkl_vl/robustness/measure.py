"""Attacks a whole set in batches, shared by all processes and resumable.

Each batch is attacked separately, from the same seed, so the result for an image depends neither on the number of
processes nor on interruptions. Finished batches are written to a state folder, from which a rerun resumes.

Axis letters: n = images of a batch, N = images of the set.
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

from gkl_vl.atomic import read_json, write_json
from gkl_vl.distributed import rank, sum_across_processes, world_size
from gkl_vl.errors import UserError
from gkl_vl.models.fingerprint import add_weights, architecture, versions
from gkl_vl.report.tables import percent
from gkl_vl.robustness.autoattack import (
    PGD_ATTACKS,
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

MIN_CLASSES: dict[Version, int] = {"standard": 4, "plus": 4, "rand": 3}
"""Smallest number of classes: AutoAttack's loss DLR (difference of logits ratio) ranks this many logits."""
USUAL_EPSILON: dict[Norm, str] = {"linf": "8/255", "l2": "0.5"}
"""RobustBench's radii for CIFAR-10."""

SQUARE_THRESHOLD = 0.002
"""Largest share of images that Square may add without a warning; pyautoattack's value, checks.py::check_square_sr."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of an attack on a set."""

    attack: Attack
    flags: dict[str, Bool[Tensor, " N"]]
    """Flags as in `survivors`, for all images of the set."""
    warnings: list[str]
    """Reasons to doubt the accuracies, one line each."""
    seconds: float
    """Sum over all batches, of whichever run and process attacked them."""
    settings: dict[str, Any]
    """Everything that determines the flags, except the machine."""
    state_dir: Path

    def accuracies(self) -> dict[str, float]:
        """Shares in [0, 1]: "clean", then the accuracy after each part of the attack; the last is the robust one."""
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
    """Attacks a set in batches, shared by all processes. Every process calls this and returns the complete outcome.

    Batch k consists of the images from k * batch_size on. Its result is written to `state_dir` atomically when it is
    finished; batches that are already in the folder are not attacked again.

    Args:
        target: on `device`.
        state_dir: on a file system that all processes share. None = runs/attack-HASH, with a hash of everything that
            determines the flags, so that a rerun of the same evaluation uses the same folder.

    Raises: UserError for a state folder of another evaluation, a model that does not fit the images or whose logits
        are not finite, a radius that covers all images, too few classes for AutoAttack, and without pyautoattack.
    """
    check_attack(attack, target, examples, batch_size, device)
    settings = _settings(attack, target, examples, batch_size)
    folder = state_dir or Path("runs") / f"attack-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    _check_state_dir(folder, settings)
    batches = torch.arange(len(examples.labels)).split(batch_size)
    finished = _read_results(folder)
    _barrier(device)  # all ranks: no process writes before all have read which batches are finished
    remaining = [number for number in range(len(batches)) if number not in finished]
    write_json(folder / "settings.json", settings)
    bar = tqdm(desc=attack.name, total=len(batches), unit="batch", disable=None if rank() == 0 else True)
    with bar, deterministic_cudnn():
        _update_bar(bar, finished)
        for number in remaining[rank() :: world_size()]:
            result = attack_batch(attack, target, examples, batches[number], device)
            write_json(folder / f"batch_{number:05d}.json", {"batch": number} | result)
            if rank() == 0:
                _update_bar(bar, _read_results(folder))
    _barrier(device)  # all ranks: all batches are written
    return _outcome(attack, folder, settings, len(batches))


def check_attack(
    attack: Attack, target: Target, examples: Examples, batch_size: int, device: torch.device | str
) -> None:
    """Raises: UserError for settings that do not fit the attack, the model or the images."""
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size} must be at least 1")
    if attack.name != "autoattack" and attack.version != "standard":
        raise UserError(
            f"--version {attack.version} is a version of AutoAttack and does not apply to --attack {attack.name}: "
            "leave it out"
        )
    if attack.name not in PGD_ATTACKS:
        import_autoattack()
    largest = 1.0 if attack.norm == "linf" else examples.images[0].numel() ** 0.5
    if not 0 < attack.epsilon <= largest:
        raise UserError(
            f"--epsilon {attack.epsilon:g} must be above 0 and at most {largest:g}, the {attack.norm} distance of "
            "black and white: pixels are in [0, 1], so write 8/255, not 8"
        )
    classes = check_model(target, examples, device)
    least = MIN_CLASSES[attack.version] if attack.name == "autoattack" else 2
    if classes < least:
        raise UserError(
            f"AutoAttack {attack.version} ranks {least} logits and the model has {classes}: use --attack pgd100"
        )


def _settings(attack: Attack, target: Target, examples: Examples, batch_size: int) -> dict[str, Any]:
    """Everything that determines the flags, except the machine: the attack and its steps, the model's weights and
    structure, pixels and labels in their order, the split into batches, versions, and the precision of products."""
    version = None if attack.name in PGD_ATTACKS else import_autoattack().__version__
    weights = hashlib.sha256()
    add_weights(weights, target.model)
    structure = hashlib.sha256(architecture(target.model).encode())
    data = hashlib.sha256(f"{tuple(examples.images.shape)} {examples.num_classes}".encode())
    data.update(examples.images.numpy().tobytes())
    data.update(examples.labels.numpy().tobytes())  # joining the bytes first would copy every image once more
    return asdict(attack) | {
        "settings": attack.described(),
        "architecture": target.architecture,
        "structure_sha256": structure.hexdigest(),
        "model_sha256": weights.hexdigest(),
        "data_sha256": data.hexdigest(),
        "images": len(examples.labels),
        "batch_size": batch_size,
        "pyautoattack": version,
        "versions": versions(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _check_state_dir(folder: Path, settings: dict[str, Any]) -> None:
    """Raises: UserError for a folder with other content, or with the state of another evaluation."""
    file = folder / "settings.json"
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--state-dir {str(folder)!r} is not the state of an attack: name another or a new folder")
        return
    before = read_json(file, remedy="name another --state-dir")
    changed = [f"{k} {settings.get(k)} (was {before.get(k)})" for k in settings if settings[k] != before.get(k)]
    if changed:
        raise UserError(
            f"--state-dir {str(folder)!r} belongs to another evaluation: {', '.join(changed)}; "
            "name another folder, or use the same flags, model and data"
        )


def _read_results(folder: Path) -> dict[int, dict[str, Any]]:
    """Number of a batch -> its result, for all finished batches."""
    files = sorted(folder.glob("batch_*.json"))
    results = [read_json(file, remedy="remove it, and the same command attacks that batch again") for file in files]
    return {result["batch"]: result for result in results}


def _barrier(device: torch.device | str) -> None:
    sum_across_processes(torch.zeros(1, device=device))  # all ranks


def _update_bar(bar: tqdm, finished: dict[int, dict[str, Any]]) -> None:
    robust = [flag for result in finished.values() for flag in list(result["flags"].values())[-1]]
    bar.n = len(finished)
    bar.set_postfix_str(f"robust so far {percent(sum(robust) / len(robust))}" if robust else "")


def attack_batch(
    attack: Attack, target: Target, examples: Examples, index: Int64[Tensor, " n"], device: torch.device | str
) -> dict[str, Any]:
    """Attacks the images at `index`. Returns indices, flags of `survivors` as 0/1, warnings and seconds, for JSON."""
    began, warnings = time.perf_counter(), []
    with captured_warnings(warnings):
        flags = survivors(
            attack, model=target.model, images=examples.images[index], labels=examples.labels[index], device=device
        )
    return {
        "indices": index.tolist(),
        "flags": {name: of_part.int().tolist() for name, of_part in flags.items()},
        "warnings": warnings,
        "seconds": time.perf_counter() - began,
    }


def _outcome(attack: Attack, folder: Path, settings: dict[str, Any], count: int) -> Outcome:
    finished = _read_results(folder)
    if missing := [number for number in range(count) if number not in finished]:
        raise UserError(
            f"batches {missing[:5]} are not in {str(folder)!r}: name a --state-dir on a disk that all processes share"
        )
    results = [finished[number] for number in range(count)]
    names = results[0]["flags"]
    flags = {name: torch.tensor([f for result in results for f in result["flags"][name]]).bool() for name in names}
    return Outcome(
        attack=attack,
        flags=flags,
        warnings=distinct_warnings([result["warnings"] for result in results]) + _square_warning(attack, flags),
        seconds=sum(result["seconds"] for result in results),
        settings=settings,
        state_dir=folder,
    )


def _square_warning(attack: Attack, flags: dict[str, Bool[Tensor, " N"]]) -> list[str]:
    # pyautoattack has this check too, but only within one batch and one call for all parts
    if attack.name != "autoattack" or "square" not in flags:
        return []
    names = list(flags)
    before = flags[names[names.index("square") - 1]]
    added = int(before.sum() - flags["square"].sum()) / len(before)
    if added <= SQUARE_THRESHOLD:
        return []
    return [
        f"Square, which uses no gradients, fools the model on {percent(added)} more images after all attacks that use "
        "them: gradients may be masked, and an adaptive attack may lower the accuracy further"
    ]
