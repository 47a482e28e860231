"""One batch under PGD, APGD, Square or AutoAttack.

Axis letters: n = images of a batch, C = classes, h w = pixels.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from gkl_vl.errors import UserError
from gkl_vl.models.modes import evaluating
from gkl_vl.robustness.pgd import Norm, pgd

Version = Literal["standard", "plus", "rand"]
AttackName = Literal["autoattack", "pgd20", "pgd100", "cw", "apgd-ce", "square"]
PgdLoss = Literal["ce", "margin"]

QUICK: dict[str, tuple[int, PgdLoss]] = {"pgd20": (20, "ce"), "pgd100": (100, "ce"), "cw": (30, "margin")}
"""Steps and loss of the looks that need no pyautoattack; each step is epsilon / 4, from a uniform start in the ball."""


def survives_pgd(
    *,
    model: nn.Module,
    images: UInt8[Tensor, "n 3 h w"],
    labels: Int64[Tensor, " n"],
    epsilon: float,
    steps: int,
    step_size: float,
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
            pixels, wanted = to_pixels(images[index], device), labels[index].to(device)
            right = is_correct(model, pixels, wanted)
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
                right[right.clone()] = is_correct(model, attacked, wanted)
            flags[index] = right.cpu()
    return flags


def to_pixels(images: UInt8[Tensor, "n 3 h w"], device: torch.device | str) -> Float[Tensor, "n 3 h w"]:
    # Contiguous, not channels_last: pyautoattack takes views of its images as rows.
    return images.to(device).float() / 255


@torch.no_grad()
def is_correct(model: nn.Module, pixels: Float[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    return model(pixels).argmax(dim=1) == labels


def _cross_entropy(labels: Int64[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")


def _margin(labels: Int64[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    def margin(logits: Tensor) -> Tensor:
        wanted = F.one_hot(labels, logits.shape[1]).bool()
        return (logits.masked_fill(wanted, -math.inf).amax(dim=1) - logits[wanted]).sum()

    return margin


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What is done to each batch."""

    name: AttackName
    """autoattack; pgd20, pgd100, cw = `QUICK`; apgd-ce, square = these parts of AutoAttack, each alone."""
    norm: Norm
    epsilon: float
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
            return _after_autoattack(attack, model, to_pixels(images, device), labels.to(device))
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
        clean = is_correct(model, to_pixels(images, device), labels.to(device)).cpu()
    return {"clean": clean, attack.name: after}


def _after_autoattack(
    attack: Attack, model: nn.Module, pixels: Float[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"]
) -> dict[str, Bool[Tensor, " n"]]:
    """AutoAttack's own order, one part at a time on what is left, which is what it does, to see what each part took."""
    right = is_correct(model, pixels, labels)
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


def distinct_warnings(heard: list[list[str]]) -> list[str]:
    """pyautoattack's warnings; those that differ in their numbers only are told once."""
    alike = [{re.sub(r"[\d.]+", "", message): message for message in of_batch} for of_batch in heard]
    batches = Counter(key for of_batch in alike for key in of_batch)
    sample = {key: message for of_batch in reversed(alike) for key, message in of_batch.items()}
    return [f"AutoAttack, {batches[key]} of {len(heard)} batches: {sample[key]}" for key in batches]


@contextmanager
def captured_warnings(heard: list[str]) -> Iterator[None]:
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
def deterministic_cudnn() -> Iterator[None]:
    """cuDNN's deterministic algorithms for a while: a batch attacked again must come out as before."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
