"""What attacks leave of a classifier's accuracy: AutoAttack, quick looks, and whether gradients can be trusted.

A set is attacked batch by batch, each batch by itself from the same seed. So what becomes of an image depends neither
on the number of processes nor on interruptions; finished batches lie in a state folder, where a rerun goes on.

Axis letters: n = images of a batch, N = of the set, C = classes, h w = pixels.
"""

import hashlib
import importlib
import json
import logging
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from gkl_vl.attacks import Norm, evaluating, pgd
from gkl_vl.classifiers import load_classifier
from gkl_vl.data.benchmark_sets import BenchmarkSet
from gkl_vl.data.labelled import LabelledSet, first, in_memory
from gkl_vl.data.views import imagenet_center
from gkl_vl.embed import Embedder, class_weights
from gkl_vl.errors import UserError, first_line
from gkl_vl.gather import rank, sum_across_processes, world_size
from gkl_vl.gkl import Number
from gkl_vl.towers import Clip, ImageTower

Version = Literal["standard", "plus", "rand"]
AttackName = Literal["autoattack", "pgd20", "pgd100", "cw", "apgd-ce", "square"]
PgdLoss = Literal["ce", "margin"]

QUICK: dict[str, tuple[int, PgdLoss]] = {"pgd20": (20, "ce"), "pgd100": (100, "ce"), "cw": (30, "margin")}
"""Steps and loss of the looks that need no pyautoattack; each step is epsilon / 4, from a uniform start in the ball."""
LEAST_CLASSES: dict[Version, int] = {"standard": 4, "plus": 4, "rand": 3}
"""The difference of logits ratio, DLR, ranks this many logits."""
USUAL_EPSILON: dict[Norm, str] = {"linf": "8/255", "l2": "0.5"}
"""RobustBench's for CIFAR-10."""
DRAW_SEED = 0
"""Of the images of a part of a set. Not the attack's seed, or runs with several seeds would differ by their images."""
UPPER_BOUND = "not AutoAttack: an upper bound"
CLEARLY = 0.02
"""Share of the images from which on a weaker attack's lead over a stronger one is no accident."""
SQUARE_MAY_ADD = 0.002
"""pyautoattack's own threshold, checks.py::check_square_sr."""

# ---- numbers -----------------------------------------------------------------------------------------------------


def wilson_interval(*, hits: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share of which `hits` of `n` independent images were seen.

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),   p = hits/n,  z = 1.96

    Both ends lie in [0, 1], and unlike p -+ z sqrt(p (1 - p)/n) it does not shrink to a point at 0 or n hits. It speaks
    of the choice of images, not of the attack: a stronger attack may leave less than its lower end.

    Source: Wilson, JASA 22 (1927) 209-212.

    Raises: ValueError unless 0 <= hits <= n and n >= 1.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} hits of {n}: it takes 0 to n hits of at least one")
    z = 1.959963984540054
    p = hits / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (end / (1 + z * z / n) for end in (middle - half, middle + half))
    return (0.0 if hits == 0 else low, 1.0 if hits == n else high)  # exactly, whatever the rounding


# ---- PGD ---------------------------------------------------------------------------------------------------------


def survives_pgd(
    *,
    model: nn.Module,
    images: UInt8[Tensor, "n 3 h w"],
    labels: Int64[Tensor, " n"],
    epsilon: Number,
    steps: int,
    step_size: Number,
    norm: Norm = "linf",
    loss: PgdLoss = "ce",
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Bool[Tensor, " n"]:
    """Whether each image is classified right, and still is after the last step of PGD from a uniform start.

    An upper bound of robustness, cheap enough to be watched during training. The model's modes and gradients and the
    global random state are left alone; the start is drawn by `seed`, and also depends on `batch_size`.

    Args:
        model: on `device`, takes pixels in [0, 1] and normalises them itself (`Classifier.on_pixels`).
        epsilon, step_size: in units of pixels of [0, 1], as for `attacks.pgd`.
        loss: what the attack maximises: ce = cross entropy; margin = max_{j != y} z_j - z_y, the "CW" of the
            literature on adversarial training, after Carlini and Wagner, 2017, arXiv 1608.04644.

    Returns: flags, on the CPU. Raises: ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(model), torch.inference_mode(False):  # a caller's inference mode would keep gradients away
        flags = torch.zeros(len(images), dtype=torch.bool)
        for index in torch.arange(len(images)).split(batch_size):
            pixels, wanted = _pixels(images[index], device), labels[index].to(device)
            right = _is_right(model, pixels, wanted)
            if right.any():
                pixels, wanted = pixels[right], wanted[right]
                objective = _cross_entropy(wanted) if loss == "ce" else _margin(wanted)
                attacked = pgd(
                    model,
                    pixels,
                    loss=objective,
                    epsilon=epsilon,
                    step_size=step_size,
                    steps=steps,
                    norm=norm,
                    start="uniform",
                    generator=generator,
                )
                right[right.clone()] = _is_right(model, attacked, wanted)
            flags[index] = right.cpu()
    return flags


def _pixels(images: UInt8[Tensor, "n 3 h w"], device: torch.device | str) -> Float[Tensor, "n 3 h w"]:
    # Contiguous, not channels_last: pyautoattack takes views of its images as rows.
    return images.to(device).float() / 255


@torch.no_grad()
def _is_right(model: nn.Module, pixels: Float[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    return model(pixels).argmax(dim=1) == labels


def _cross_entropy(labels: Int64[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")


def _margin(labels: Int64[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    def margin(logits: Tensor) -> Tensor:
        wanted = F.one_hot(labels, logits.shape[1]).bool()
        return (logits.masked_fill(wanted, -math.inf).amax(dim=1) - logits[wanted]).sum()

    return margin


# ---- one batch under one attack ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What is done to each batch."""

    name: AttackName
    """autoattack; pgd20, pgd100, cw = `QUICK`; apgd-ce, square = these parts of AutoAttack, each alone."""
    norm: Norm
    epsilon: Number
    """In units of pixels of [0, 1]; for l2 the length of an image's difference."""
    version: Version = "standard"
    """Of AutoAttack: standard; plus = more attacks and restarts; rand = for randomised defences."""
    seed: int = 0
    """Of every batch's random starts."""

    def described(self) -> str:
        """For people, in a few words."""
        if self.name == "autoattack":
            return f"AutoAttack {self.version}"
        if self.name in QUICK:
            steps, loss = QUICK[self.name]
            told = "cross entropy" if loss == "ce" else "CW margin loss"
            return f"PGD-{steps} on the {told}, steps of epsilon/4, uniform start"
        return {"apgd-ce": "APGD on the cross entropy, 100 steps", "square": "Square, 5000 queries"}[self.name]


def survivors(
    attack: Attack,
    *,
    model: nn.Module,
    images: UInt8[Tensor, "n 3 h w"],
    labels: Int64[Tensor, " n"],
    device: torch.device | str = "cpu",
) -> dict[str, Bool[Tensor, " n"]]:
    """Flags of one batch, on the CPU: "clean" = classified right, and then after each part of the attack whether still.

    An image that is classified wrongly to begin with has not survived anything. The last entry is the robust one.
    `model` as in `survives_pgd`; the global random state is left alone.
    """
    with evaluating(model):
        if attack.name not in QUICK:
            return _after_autoattack(attack, model, _pixels(images, device), labels.to(device))
        steps, loss = QUICK[attack.name]
        after = survives_pgd(
            model=model,
            images=images,
            labels=labels,
            epsilon=attack.epsilon,
            steps=steps,
            step_size=attack.epsilon / 4,
            norm=attack.norm,
            loss=loss,
            batch_size=len(images),
            seed=attack.seed,
            device=device,
        )
        clean = _is_right(model, _pixels(images, device), labels.to(device)).cpu()
    return {"clean": clean, attack.name: after}


def _after_autoattack(
    attack: Attack, model: nn.Module, pixels: Float[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"]
) -> dict[str, Bool[Tensor, " n"]]:
    """AutoAttack's own order, one part at a time on what is left, which is what it does, to see what each part took."""
    right = _is_right(model, pixels, labels)
    flags = {"clean": right.cpu()}
    with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):  # it seeds the global generator
        with torch.no_grad():
            num_classes = model(pixels[:1]).shape[1]
        adversary = _adversary(attack, model, num_classes, pixels.device)
        for part in list(adversary.attacks_to_run):
            left = right.nonzero().flatten()
            if len(left):
                adversary.attacks_to_run = [part]
                _, told = adversary.run_standard_evaluation(pixels[left], labels[left], batch_size=len(left))
                right = right.index_put((left,), told == labels[left])
            flags[part] = right.cpu()
    return flags


def _adversary(attack: Attack, model: nn.Module, num_classes: int, device: torch.device) -> Any:
    """pyautoattack.AutoAttack. Its seed is always given: without, it would take the time of day."""
    make = import_autoattack().AutoAttack
    options = {"norm": {"linf": "Linf", "l2": "L2"}[attack.norm], "eps": float(attack.epsilon), "seed": attack.seed}
    if attack.name == "autoattack":
        adversary = make(model, version=attack.version, device=device, **options)
    else:
        adversary = make(model, version="custom", attacks=[attack.name], device=device, **options)
        adversary.apgd.n_restarts = 1  # as in the standard version
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = target_classes(num_classes)
    return adversary


def target_classes(num_classes: int) -> int:
    """Classes that AutoAttack's targeted parts aim at: 9, or all other classes where there are fewer."""
    return min(9, num_classes - 1)


def import_autoattack() -> ModuleType:
    """pyautoattack. Raises: UserError where it is not installed."""
    try:
        import pyautoattack
    except ImportError as error:
        raise UserError("AutoAttack comes from pyautoattack: pip install 'gkl-vl[attack]'") from error
    return pyautoattack


# ---- what is attacked --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model under attack."""

    architecture: str
    model: nn.Module
    """pixels in [0, 1] -> logits; in evaluation mode, its weights without gradients."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The images that are attacked, in memory."""

    name: str
    images: UInt8[Tensor, "N 3 h w"]
    labels: Int64[Tensor, " N"]
    num_classes: int
    draw: str
    """Which images of their set these are, in words."""


def load_target(
    name: str, *, num_classes: int, norm: Norm, weights: str | None = None, allow_pickle: bool = False
) -> Target:
    """The model of a name.

    Args:
        name: a run folder (its `model/` is taken) or an exported folder; `robustbench:NAME`; else as for
            `load_classifier`.
        num_classes: of the data; of RobustBench, 10 stands for CIFAR-10, 100 for CIFAR-100, 1000 for ImageNet.
        norm: RobustBench's threat model.

    Raises: UserError as `load_classifier` does, for a model without weights, and where robustbench is not installed.
    """
    if name.startswith("robustbench:"):
        if weights is not None:
            raise UserError(f"--weights {weights} do not go with {name!r}, which brings its own: leave them out")
        model = _load_robustbench(name.partition(":")[2], num_classes=num_classes, norm=norm)
        return Target(architecture=name, model=model.eval().requires_grad_(False))
    if Path(name).is_dir():
        name = f"local-dir:{Path(name) / 'model' if (Path(name) / 'model').is_dir() else name}"
    carries = name.startswith(("local-dir:", "hf-hub:"))
    if weights is None and not carries:
        raise UserError(f"model {name!r} has random weights: give a checkpoint as --weights, or name a run folder")
    classes = None if carries else num_classes
    classifier = load_classifier(name, num_classes=classes, weights=weights, allow_pickle=allow_pickle)
    return Target(architecture=classifier.name, model=classifier.on_pixels().eval().requires_grad_(False))


def _load_robustbench(name: str, *, num_classes: int, norm: Norm) -> nn.Module:
    utils = _import_robustbench()
    datasets = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}
    if num_classes not in datasets:
        raise UserError(f"RobustBench has models for 10, 100 or 1000 classes, the data has {num_classes}")
    dataset, threat = datasets[num_classes], {"linf": "Linf", "l2": "L2"}[norm]
    try:
        return utils.load_model(name, dataset=dataset, threat_model=threat)
    except Exception as error:  # an unknown name is a KeyError, a download can fail in any way
        raise UserError(
            f"RobustBench's {name!r} for {dataset} and {threat} could not be loaded "
            f"({type(error).__name__}: {first_line(error)}): check the name, --norm and the connection"
        ) from error


def _import_robustbench() -> ModuleType:
    # robustbench 1.1 asks pip for pyautoattack and Python for autoattack, its name before it came to PyPI
    sys.modules.setdefault("autoattack", import_autoattack())
    sys.modules.setdefault("autoattack.state", importlib.import_module("pyautoattack.state"))
    try:
        from robustbench import utils  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"robustbench: models need robustbench, which cannot be imported here ({first_line(error)}): pip install "
            "'gkl-vl[robustbench]', then pip install --no-deps robustbench, which asks for an old timm"
        ) from error
    return utils


def load_examples(data: LabelledSet, *, images: int | None = None, image_size: int | None = None) -> Examples:
    """The images of a set, decoded.

    Args:
        images: so many only, drawn evenly from the classes, always the same ones. None = all, which is what RobustBench
            reports for CIFAR; its part of a test set would be the first so many, whose classes come as they fall.
        image_size: shorter side resized to 256 / 224 of this and the middle cut out; None = as the images are.

    Raises: UserError for more images than there are, images that cannot be decoded or differ in size.
    """
    part = data if images is None else first(data, images, DRAW_SEED)
    draw = f"all {len(data)}" if images is None else f"{images} of {len(data)}, evenly by class, seed {DRAW_SEED}"
    pixels = in_memory(part) if image_size is None else _resized(part, image_size)
    return Examples(name=data.name, images=pixels, labels=part.labels, num_classes=data.num_classes, draw=draw)


def _resized(data: LabelledSet, size: int) -> UInt8[Tensor, "N 3 h w"]:
    if size < 1:
        raise UserError(f"--image-size {size} must be at least 1")
    transform = imagenet_center(size)
    numbers = tqdm(range(len(data)), desc=f"decode {data.name}", unit="image", leave=False, disable=None)
    return torch.stack([transform(data.read(index)) for index in numbers])


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
    _check(attack, target, examples, batch_size, device)
    settings = _settings(attack, target, examples, batch_size)
    folder = state_dir or Path("runs") / f"attack-{_digest(json.dumps(settings).encode())[:12]}"
    _require_same(folder, settings)
    batches = torch.arange(len(examples.labels)).split(batch_size)
    done = _finished(folder)
    _wait(device)  # all ranks: nobody writes before everybody has read what is to do
    todo = [number for number in range(len(batches)) if number not in done]
    _write_json(folder / "settings.json", settings)
    bar = tqdm(desc=attack.name, total=len(batches), unit="batch", disable=None if rank() == 0 else True)
    with bar, _repeatable():
        _show(bar, done)
        for number in todo[rank() :: world_size()]:
            batch = _attack_batch(attack, target, examples, batches[number], device)
            _write_json(folder / f"batch_{number:05d}.json", {"batch": number} | batch)
            if rank() == 0:
                _show(bar, _finished(folder))
    _wait(device)  # all ranks: every batch is there
    return _collect(attack, folder, settings, len(batches))


def _attack_batch(
    attack: Attack, target: Target, examples: Examples, index: Int64[Tensor, " n"], device: torch.device | str
) -> dict[str, Any]:
    began, heard = time.perf_counter(), []
    with _hearing(heard):
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
        warnings=_told_once([batch["warnings"] for batch in batches]) + _square_warning(attack, flags),
        seconds=sum(batch["seconds"] for batch in batches),
        settings=settings,
        state_dir=folder,
    )


def _told_once(heard: list[list[str]]) -> list[str]:
    """pyautoattack's warnings; those that differ in their numbers only are told once."""
    alike = [{re.sub(r"[\d.]+", "", message): message for message in of_batch} for of_batch in heard]
    batches = Counter(key for of_batch in alike for key in of_batch)
    sample = {key: message for of_batch in reversed(alike) for key, message in of_batch.items()}
    return [f"AutoAttack, {batches[key]} of {len(heard)} batches: {sample[key]}" for key in batches]


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
        f"Square, which sees no gradients, took {_percent(taken)} more after all that see them: they may be masked, "
        "so an adaptive attack may take more still"
    ]


@contextmanager
def _hearing(heard: list[str]) -> Iterator[None]:
    """Collect pyautoattack's warnings, which would be lost between bars, or come once for every batch."""
    logger = logging.getLogger("auto-attack")
    before = logger.level, logger.propagate
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextmanager
def _repeatable() -> Iterator[None]:
    """cuDNN's deterministic algorithms for a while: a batch attacked again must come out as before."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _wait(device: torch.device | str) -> None:
    sum_across_processes(torch.zeros(1, device=device))  # all ranks


def _show(bar: tqdm, done: dict[int, dict[str, Any]]) -> None:
    robust = [flag for batch in done.values() for flag in list(batch["flags"].values())[-1]]
    bar.n = len(done)
    bar.set_postfix_str(f"robust so far {_percent(sum(robust) / len(robust))}" if robust else "")


# ---- the state folder --------------------------------------------------------------------------------------------


def _settings(attack: Attack, target: Target, examples: Examples, batch_size: int) -> dict[str, Any]:
    """All that decides the flags, beside the machine."""
    version = None if attack.name in QUICK else import_autoattack().__version__
    return asdict(attack) | {
        "architecture": target.architecture,
        "model_sha256": _digest(*_bytes_of(target.model)),
        "data_sha256": _digest(examples.images.numpy().tobytes(), examples.labels.numpy().tobytes()),
        "images": len(examples.labels),
        "batch_size": batch_size,
        "pyautoattack": version,
    }


def _bytes_of(model: nn.Module) -> Iterator[bytes]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Aside and renamed: a file is whole or not there, whoever is killed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".writing{rank()}")
    aside.write_text(json.dumps(content) + "\n")
    os.replace(aside, path)


# ---- mistakes ----------------------------------------------------------------------------------------------------


def _check(attack: Attack, target: Target, examples: Examples, batch_size: int, device: torch.device | str) -> None:
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
    classes = _check_model(target, examples, device)
    least = LEAST_CLASSES[attack.version] if attack.name == "autoattack" else 2
    if classes < least:
        raise UserError(
            f"AutoAttack {attack.version} ranks {least} logits and the model has {classes}: use --attack pgd100"
        )


def _check_model(target: Target, examples: Examples, device: torch.device | str) -> int:
    """The number of classes."""
    h, w = examples.images.shape[2:]
    try:
        with evaluating(target.model), torch.no_grad():
            logits = target.model(_pixels(examples.images[:2], device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{target.architecture} does not take images of {w}x{h} ({first_line(error)}): give its --image-size"
        ) from error
    if logits.ndim != 2 or logits.shape[1] != examples.num_classes:
        raise UserError(
            f"{target.architecture} gives logits of shape {list(logits.shape)} for 2 images and {examples.name} has "
            f"{examples.num_classes} classes: name the data that it was trained for"
        )
    if not logits.isfinite().all():
        raise UserError(f"{target.architecture} gives logits that are not finite: its accuracy would be a guess")
    return logits.shape[1]


# ---- zero-shot CLIPs ---------------------------------------------------------------------------------------------


class ZeroShot(nn.Module):
    """A CLIP as a classifier of pixels in [0, 1] at its size: scale * <image embedding, class weight>."""

    classifier: Tensor

    def __init__(self, clip: Clip, classifier: Float[Tensor, "C d"]):
        super().__init__()
        self.tower = ImageTower(clip)
        self.register_buffer("classifier", classifier)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n C"]:
        scale = self.tower.towers.log_scale().exp()
        return scale * self.tower(pixels).float() @ self.classifier.T


def attack_zero_shot(
    *,
    embedder: Embedder,
    dataset: BenchmarkSet,
    norm: Norm,
    epsilon: Number,
    images: int,
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """Zero-shot accuracy before and under APGD on the cross entropy, 100 steps, white box, text left alone.

    The images are prepared as for `embed_images`, and the attack moves them as the model sees them, at its size, by at
    most `epsilon` in pixels of [0, 1]. It raises the cross entropy of the softmax over scaled similarities, whose
    gradients a large scale can mask: the number is an upper bound of what stronger attacks leave.

    Args:
        embedder: the model's modes and the global random state are left alone; precision is fp32.
        images: so many at most, evenly spaced in the set's order, always the same ones.
        seed: of each batch's random start.

    Returns: metrics with NORM in their names, and what makes them doubtful, a line each.

        apgd_NORM_acc1, apgd_NORM_acc1_low, apgd_NORM_acc1_high  share still classified right and its 95 % interval
        apgd_NORM_clean_acc1                                     of the same images, before the attack
        apgd_NORM_epsilon, apgd_NORM_n                           radius, number of images

    Raises: UserError for a set without classes, pyautoattack missing, fewer than 1 image, and as `measure`.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690.
    """
    clip, batch_size, device = embedder.clip, embedder.batch_size, embedder.device
    attack = Attack(name="apgd-ce", norm=norm, epsilon=epsilon, seed=seed)
    examples = _zero_shot_examples(clip, dataset, images)
    classifier = class_weights(embedder, dataset)
    target = Target(architecture=clip.name, model=ZeroShot(clip, classifier.to(device)))
    _check(attack, target, examples, batch_size, device)
    parts, heard = [], []
    bar = tqdm(
        torch.arange(len(examples.labels)).split(batch_size), desc="attack", unit="batch", leave=False, disable=None
    )
    with bar, _repeatable():
        for index in bar:
            part = _attack_batch(attack, target, examples, index, device)
            parts.append(part["flags"])
            heard.append(part["warnings"])
    n = len(examples.labels)
    clean, hits = (sum(sum(flags[name]) for flags in parts) for name in ("clean", "apgd-ce"))
    low, high = wilson_interval(hits=hits, n=n)
    found = {"acc1": hits / n, "acc1_low": low, "acc1_high": high, "clean_acc1": clean / n}
    found |= {"epsilon": float(epsilon), "n": float(n)}
    return {f"apgd_{norm}_{name}": value for name, value in found.items()}, _told_once(heard)


def _zero_shot_examples(clip: Clip, dataset: BenchmarkSet, images: int) -> Examples:
    if images < 1:
        raise UserError(f"--attack-images {images} must be at least 1")
    total = sum(1 for _ in dataset.records("cls"))
    count = min(images, total)
    chosen = {k * total // count for k in range(count)}
    transform = clip.scaled_transform()
    pixels, labels = [], []
    for number, record in enumerate(dataset.records("cls")):
        if number in chosen:
            pixels.append((transform(record.decode()) * 255).round().byte())  # exact: they are multiples of 1/255
            labels.append(record.targets["cls"])
    return Examples(
        name=dataset.name,
        images=torch.stack(pixels),
        labels=torch.tensor(labels),
        num_classes=len(dataset.classnames or ()),
        draw=f"{count} evenly spaced of {total}",
    )


# ---- can the gradients be trusted? -------------------------------------------------------------------------------


def growing_epsilons(epsilon: Number, *, norm: Norm, numbers: int) -> tuple[Number, ...]:
    """epsilon, 2 epsilon, 4 epsilon, ... up to the radius within which every image can be made plain grey.

    That is 0.5 for linf and 0.5 sqrt(numbers) for l2, `numbers` = values of an image (3 h w).
    """
    grey = 0.5 if norm == "linf" else 0.5 * numbers**0.5
    ladder = []
    while epsilon < grey:
        ladder.append(epsilon)
        epsilon = 2 * epsilon
    return (*ladder, grey if ladder else epsilon)


def masking_warnings(*, pgd: Number, apgd: Number, square: Number, growing: dict[Number, Number]) -> list[str]:
    """What in these accuracies hints at masked gradients, a line each; none is no proof that they are not.

    Args:
        pgd, apgd, square: accuracy in [0, 1] under PGD-100, APGD (cross entropy) and Square at the same epsilon.
        growing: epsilon -> accuracy under PGD-100, the last one where every image can be made plain grey.

    Source: Carlini et al., 2019, "On Evaluating Adversarial Robustness", arXiv 1902.06705, section 5; Athalye et al.,
    ICML 2018, arXiv 1802.00420, section 3.1.
    """
    lines = []
    if pgd < apgd - CLEARLY:
        lines.append(f"plain PGD leaves {_percent(pgd)}, less than APGD's {_percent(apgd)}: APGD is stuck")
    if square < apgd - CLEARLY:
        lines.append(
            f"Square, which sees no gradients, leaves {_percent(square)}, less than APGD's {_percent(apgd)}: gradients "
            "of the cross entropy are masked"
        )
    steps = list(growing.items())
    for (small, few), (large, many) in zip(steps, steps[1:], strict=False):
        if many > few + CLEARLY:
            lines.append(
                f"PGD leaves {_percent(many)} at epsilon {_told(large)}, more than {_percent(few)} at {_told(small)}: "
                "more room must not help the model"
            )
    epsilon, left = steps[-1]
    if left > CLEARLY:
        lines.append(
            f"PGD leaves {_percent(left)} at epsilon {_told(epsilon)}, where every image can be made plain grey: it "
            "must come to 0"
        )
    return [f"masked gradients? {line}; the robust accuracy may be far too high" for line in lines]


def check_masking(
    *,
    attack: Attack,
    target: Target,
    examples: Examples,
    images: int = 200,
    batch_size: int = 250,
    state_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], list[str]]:
    """Measure what `masking_warnings` asks for on evenly spaced images; the accuracies by name, and its lines.

    `attack` gives norm, epsilon and seed. Resumes as `measure` does, in folders below `STATE_DIR-masking`.
    """
    if images < 1:
        raise UserError(f"--masking-images {images} must be at least 1")
    count = min(images, len(examples.labels))
    chosen = torch.arange(count) * len(examples.labels) // count
    part = Examples(
        name=examples.name,
        images=examples.images[chosen],
        labels=examples.labels[chosen],
        num_classes=examples.num_classes,
        draw=f"{count} evenly spaced of {examples.draw}",
    )

    def left(name: AttackName, epsilon: Number) -> tuple[float, list[str]]:
        weaker = Attack(name=name, norm=attack.norm, epsilon=epsilon, seed=attack.seed)
        folder = None if state_dir is None else Path(f"{state_dir}-masking") / f"{name}-{epsilon:.6g}"
        outcome = measure(
            attack=weaker, target=target, examples=part, batch_size=batch_size, state_dir=folder, device=device
        )
        return outcome.accuracies()[name], outcome.warnings

    apgd, heard = left("apgd-ce", attack.epsilon)
    square, heard_too = left("square", attack.epsilon)
    ladder = growing_epsilons(attack.epsilon, norm=attack.norm, numbers=part.images[0].numel())
    growing: dict[Number, Number] = {epsilon: left("pgd100", epsilon)[0] for epsilon in ladder}
    lines = masking_warnings(pgd=growing[ladder[0]], apgd=apgd, square=square, growing=growing)
    found = {"apgd-ce": apgd, "square": square} | {f"pgd100 at {_told(e)}": float(a) for e, a in growing.items()}
    return found, list(dict.fromkeys(heard + heard_too)) + lines


# ---- results -----------------------------------------------------------------------------------------------------


def result_record(
    outcome: Outcome, *, model: str, pretrained: str, examples: Examples, masking: dict[str, float], warnings: list[str]
) -> dict[str, Any]:
    """The line that goes to the results file: shares in [0, 1], epsilon in pixels of [0, 1].

    `after` = accuracy after each part of the attack; `note` says of all but AutoAttack that it is an upper bound;
    intervals as of `wilson_interval`; `masking` and `warnings` = what `check_masking` measured and said.
    """
    attack, (clean, *_, robust) = outcome.attack, outcome.flags.values()
    is_autoattack = attack.name == "autoattack"
    shares = outcome.accuracies()
    return {
        "model": model,
        "pretrained": pretrained,
        "dataset": examples.name,
        "task": "adversarial_robustness",
        "attack": attack.name,
        "version": attack.version if is_autoattack else None,
        "note": None if is_autoattack else UPPER_BOUND,
        "settings": attack.described(),
        "norm": attack.norm,
        "epsilon": attack.epsilon,
        "n": len(clean),
        "draw": examples.draw,
        "seed": attack.seed,
        "clean_acc1": shares["clean"],
        "clean_acc1_interval": wilson_interval(hits=int(clean.sum()), n=len(clean)),
        "robust_acc1": list(shares.values())[-1],
        "robust_acc1_interval": wilson_interval(hits=int(robust.sum()), n=len(robust)),
        "after": {name: share for name, share in shares.items() if name != "clean"},
        "target_classes": target_classes(examples.num_classes) if is_autoattack else None,
        "masking": masking,
        "warnings": outcome.warnings + warnings,
        "batch_size": outcome.settings["batch_size"],
        "architecture": outcome.settings["architecture"],
        "model_sha256": outcome.settings["model_sha256"],
        "pyautoattack": outcome.settings["pyautoattack"],
        "torch": torch.__version__,
        "seconds": round(outcome.seconds, 1),
    }


def results_table(record: dict[str, Any]) -> str:
    """A record for people: what was measured, a line for each accuracy, then notes and warnings."""
    last = list(record["after"])[-1]
    rows = {"clean": (record["clean_acc1"], record["clean_acc1_interval"])}
    rows |= {f"after {name}": (share, None) for name, share in record["after"].items() if name != last}
    rows[f"robust, after {last}"] = (record["robust_acc1"], record["robust_acc1_interval"])
    lines = [
        f"{record['model']} on {record['dataset']} · {record['draw']} · {record['norm']} {_told(record['epsilon'])} · "
        f"seed {record['seed']}",
        record["settings"] + (f" · {record['note']}" if record["note"] else ""),
    ]
    for name, (share, interval) in rows.items():
        told = "" if interval is None else f"   95 %: {_percent(interval[0])} to {_percent(interval[1])}"
        lines.append(f"{name:24}{_percent(share):>10}{told}")
    if record["target_classes"] not in (None, 9):
        lines.append(f"targeted parts aim at {record['target_classes']} classes, all others that there are, not at 9")
    lines += [f"masking, {name:<15}{_percent(share):>10}" for name, share in record["masking"].items()]
    return "\n".join([*lines, *(f"warning: {line}" for line in record["warnings"])])


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _told(epsilon: Number) -> str:
    levels = 255 * epsilon
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{epsilon:.4g}"


def _percent(share: Number) -> str:
    return f"{100 * share:.2f} %"
