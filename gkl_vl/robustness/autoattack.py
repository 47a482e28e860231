"""Attacks on one batch of images: PGD, AutoAttack, and two of AutoAttack's parts alone, APGD and Square.

Also contexts and text handling around pyautoattack: its warnings, deterministic cuDNN.

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

PGD_ATTACKS: dict[str, tuple[int, PgdLoss]] = {"pgd20": (20, "ce"), "pgd100": (100, "ce"), "cw": (30, "margin")}
"""Steps and loss of the attacks that do not use pyautoattack; step size epsilon / 4, uniform start in the ball."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Settings of the attack on each batch."""

    name: AttackName
    """autoattack; pgd20, pgd100, cw = `PGD_ATTACKS`; apgd-ce, square = this part of AutoAttack alone."""
    norm: Norm
    epsilon: float
    """Radius in pixel values of [0, 1]; for l2 the norm of the perturbation of an image."""
    version: Version = "standard"
    """Version of AutoAttack: standard; plus = more attacks and restarts; rand = for randomised defences."""
    seed: int = 0
    """Seed of the random starts, the same for every batch."""

    def described(self) -> str:
        """A short description for tables."""
        if self.name == "autoattack":
            return f"AutoAttack {self.version}"
        if self.name in PGD_ATTACKS:
            steps, loss = PGD_ATTACKS[self.name]
            loss_name = "cross entropy" if loss == "ce" else "CW margin loss"
            return f"PGD-{steps} on the {loss_name}, steps of epsilon/4, uniform start"
        return {"apgd-ce": "APGD on the cross entropy, 100 steps", "square": "Square, 5000 queries"}[self.name]


def survivors(
    attack: Attack,
    *,
    model: nn.Module,
    images: UInt8[Tensor, "n 3 h w"],
    labels: Int64[Tensor, " n"],
    device: torch.device | str = "cpu",
) -> dict[str, Bool[Tensor, " n"]]:
    """Attacks one batch. Returns flags on the CPU: "clean" = classified correctly; then, after each part of the attack,
    whether the image is still classified correctly. The last entry is the robust one.

    An image that is misclassified before the attack is False in every entry. `model` as in `survives_pgd`; the global
    random state does not change.
    """
    with evaluating(model):
        if attack.name not in PGD_ATTACKS:
            return _after_autoattack(attack, model, to_pixels(images, device), labels.to(device))
        steps, loss = PGD_ATTACKS[attack.name]
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
    """Whether each image is classified correctly before PGD from a uniform start and after its last step.

    An upper bound of robustness, cheap enough to be logged during training. The model's modes and gradients and the
    global random state do not change; the start depends on `seed` and on `batch_size`.

    Args:
        model: on `device`, takes pixels in [0, 1] and normalises them itself (`Classifier.on_pixels`).
        epsilon, step_size: in pixel values of [0, 1], as in `pgd`.
        loss: objective that the attack maximises: ce = cross entropy; margin = max_{j != y} z_j - z_y, called CW in the
            literature on adversarial training, after Carlini and Wagner, 2017, arXiv 1608.04644.

    Returns: flags, on the CPU. Raises: ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(model), torch.inference_mode(False):  # inference mode of the caller would disable gradients
        flags = torch.zeros(len(images), dtype=torch.bool)
        for index in torch.arange(len(images)).split(batch_size):
            pixels, targets = to_pixels(images[index], device), labels[index].to(device)
            correct = is_correct(model, pixels, targets)
            if correct.any():
                pixels, targets = pixels[correct], targets[correct]
                objective = _cross_entropy(targets) if loss == "ce" else _margin(targets)
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
                correct[correct.clone()] = is_correct(model, attacked, targets)
            flags[index] = correct.cpu()
    return flags


def to_pixels(images: UInt8[Tensor, "n 3 h w"], device: torch.device | str) -> Float[Tensor, "n 3 h w"]:
    # Contiguous, not channels_last: pyautoattack calls `view` on its images.
    return images.to(device).float() / 255


@torch.no_grad()
def is_correct(model: nn.Module, pixels: Float[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    return model(pixels).argmax(dim=1) == labels


def _cross_entropy(labels: Int64[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")


def _margin(labels: Int64[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    def margin(logits: Tensor) -> Tensor:
        is_label = F.one_hot(labels, logits.shape[1]).bool()
        return (logits.masked_fill(is_label, -math.inf).amax(dim=1) - logits[is_label]).sum()

    return margin


def _after_autoattack(
    attack: Attack, model: nn.Module, pixels: Float[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"]
) -> dict[str, Bool[Tensor, " n"]]:
    """Runs the parts in AutoAttack's order, one call each, on the images still correct, to get the flags of each part.

    AutoAttack does the same within one call, so the last flags are its own.
    """
    correct = is_correct(model, pixels, labels)
    flags = {"clean": correct.cpu()}
    with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):  # it seeds the global generator
        with torch.no_grad():
            num_classes = model(pixels[:1]).shape[1]
        adversary = _adversary(attack, model, num_classes, pixels.device)
        for part in list(adversary.attacks_to_run):
            remaining = correct.nonzero().flatten()
            if len(remaining):
                adversary.attacks_to_run = [part]
                _, predicted = adversary.run_standard_evaluation(
                    pixels[remaining], labels[remaining], batch_size=len(remaining)
                )
                correct = correct.index_put((remaining,), predicted == labels[remaining])
            flags[part] = correct.cpu()
    return flags


def _adversary(attack: Attack, model: nn.Module, num_classes: int, device: torch.device) -> Any:
    """Returns a pyautoattack.AutoAttack. The seed is always passed: by default it is the time of day."""
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
    """Number of target classes of AutoAttack's targeted parts: 9, or all other classes where there are fewer."""
    return min(9, num_classes - 1)


def import_autoattack() -> ModuleType:
    """Returns the module pyautoattack. Raises: UserError where it is not installed."""
    try:
        import pyautoattack
    except ImportError as error:
        raise UserError("AutoAttack needs the package pyautoattack: pip install 'gkl-vl[attack]'") from error
    return pyautoattack


@contextmanager
def captured_warnings(warnings: list[str]) -> Iterator[None]:
    """Appends pyautoattack's warnings to a list. On the terminal they would repeat for every batch, amid the bar."""
    logger = logging.getLogger("auto-attack")
    before = logger.level, logger.propagate
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def distinct_warnings(warnings: list[list[str]]) -> list[str]:
    """One line for each distinct warning of pyautoattack, with the number of batches that have it.

    Messages that differ only in their numbers count as one. `warnings`: the messages of each batch.
    """
    by_key = [{re.sub(r"[\d.]+", "", message): message for message in of_batch} for of_batch in warnings]
    batches = Counter(key for of_batch in by_key for key in of_batch)
    sample = {key: message for of_batch in reversed(by_key) for key, message in of_batch.items()}
    return [f"AutoAttack, {batches[key]} of {len(warnings)} batches: {sample[key]}" for key in batches]


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Selects cuDNN's deterministic algorithms, so that a batch attacked again gives the same result."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
