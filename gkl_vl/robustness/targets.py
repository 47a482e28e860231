"""The model under attack and the images that are attacked.

Axis letters: N = images of the set, h w = pixels.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from gkl_vl.data.augment import imagenet_center
from gkl_vl.data.labelled import LabelledSet, in_memory
from gkl_vl.data.subsets import balanced_subset
from gkl_vl.errors import UserError, first_line
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.models.modes import evaluating
from gkl_vl.robustness.autoattack import import_autoattack, to_pixels
from gkl_vl.robustness.pgd import Norm

DRAW_SEED = 0
"""Seed for drawing a part of a set. Not the attack's seed, so that runs with several seeds attack the same images."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model under attack."""

    architecture: str
    model: nn.Module
    """Maps pixels in [0, 1] to logits; in evaluation mode, weights without gradients."""
    classnames: tuple[str, ...] | None = None
    """Names of the logits; None if unknown: labels of the data are then taken as they are."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The images that are attacked, in memory."""

    name: str
    images: UInt8[Tensor, "N 3 h w"]
    labels: Int64[Tensor, " N"]
    num_classes: int
    draw: str
    """Describes which images of the set these are."""


def load_target(
    name: str, *, num_classes: int, norm: Norm, weights: str | None = None, allow_pickle: bool = False
) -> Target:
    """Loads the model to attack.

    Args:
        name: a run folder (its `model/` is loaded) or an exported folder; `robustbench:NAME`; else as for
            `load_classifier`.
        num_classes: classes of the data; selects RobustBench's dataset: 10 = CIFAR-10, 100 = CIFAR-100,
            1000 = ImageNet.
        norm: selects RobustBench's threat model.

    Raises: UserError as `load_classifier` does, for a model without weights, and where robustbench is not installed.
    """
    if name.startswith("robustbench:"):
        if weights is not None:
            raise UserError(f"--weights {weights} cannot be used with {name!r}, which has its own: leave them out")
        model = _load_robustbench(name.partition(":")[2], num_classes=num_classes, norm=norm)
        return Target(architecture=name, model=model.eval().requires_grad_(False))
    if Path(name).is_dir():
        name = f"local-dir:{Path(name) / 'model' if (Path(name) / 'model').is_dir() else name}"
    has_weights = name.startswith(("local-dir:", "hf-hub:"))
    if weights is None and not has_weights:
        raise UserError(f"model {name!r} has random weights: give a checkpoint as --weights, or name a run folder")
    classes = None if has_weights else num_classes
    classifier = load_classifier(name, num_classes=classes, weights=weights, allow_pickle=allow_pickle)
    model = classifier.on_pixels().eval().requires_grad_(False)
    return Target(architecture=classifier.name, model=model, classnames=classifier.classnames)


def in_model_order(data: LabelledSet, target: Target) -> LabelledSet:
    """The set with its classes in the order of the model's logits, matched by name where the model has names.

    Raises: UserError for a class that the model lacks.
    """
    if target.classnames is None:
        return data
    return data.in_order(
        target.classnames, num_classes=len(target.classnames), others=f"the model {target.architecture}"
    )


def _load_robustbench(name: str, *, num_classes: int, norm: Norm) -> nn.Module:
    utils = _import_robustbench()
    datasets = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}
    if num_classes not in datasets:
        raise UserError(f"RobustBench has models for 10, 100 or 1000 classes, the data has {num_classes}")
    dataset, threat = datasets[num_classes], {"linf": "Linf", "l2": "L2"}[norm]
    try:
        return utils.load_model(name, dataset=dataset, threat_model=threat)
    except Exception as error:  # KeyError for an unknown name; a download can raise anything
        raise UserError(
            f"RobustBench's {name!r} for {dataset} and {threat} could not be loaded "
            f"({type(error).__name__}: {first_line(error)}): check the name, --norm and the connection"
        ) from error


def _import_robustbench() -> ModuleType:
    # robustbench 1.1 depends on pyautoattack but imports autoattack, the name of that module before it was on PyPI
    sys.modules.setdefault("autoattack", import_autoattack())
    sys.modules.setdefault("autoattack.state", importlib.import_module("pyautoattack.state"))
    try:
        from robustbench import utils  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"robustbench: models need robustbench, which cannot be imported here ({first_line(error)}): pip install "
            "'gkl-vl[robustbench]', then pip install --no-deps robustbench, which requires an old timm"
        ) from error
    return utils


def load_examples(data: LabelledSet, *, images: int | None = None, image_size: int | None = None) -> Examples:
    """Decodes the images of a set.

    Args:
        images: number of images, drawn evenly from the classes with a fixed seed. None = all, as RobustBench reports
            for CIFAR. A part of a set in RobustBench is its first images, which are not balanced by class.
        image_size: resizes the shorter side to 256 / 224 of this and crops the centre. None = keep the images' size.

    Raises: UserError for more images than the set has, and for images that cannot be decoded or differ in size.
    """
    part = data if images is None else balanced_subset(data, images, DRAW_SEED)
    draw = f"all {len(data)}" if images is None else f"{images} of {len(data)}, evenly by class, seed {DRAW_SEED}"
    pixels = in_memory(part) if image_size is None else _resized(part, image_size)
    return Examples(name=data.name, images=pixels, labels=part.labels, num_classes=data.num_classes, draw=draw)


def _resized(data: LabelledSet, size: int) -> UInt8[Tensor, "N 3 h w"]:
    if size < 1:
        raise UserError(f"--image-size {size} must be at least 1")
    transform = imagenet_center(size)
    numbers = tqdm(range(len(data)), desc=f"decode {data.name}", unit="image", leave=False, disable=None)
    return torch.stack([transform(data.read(index)) for index in numbers])


def check_model(target: Target, examples: Examples, device: torch.device | str) -> int:
    """Returns the number of classes of the model.

    Raises: UserError for a model that does not take the images, whose classes are not those of the data, or whose
        logits are not finite.
    """
    h, w = examples.images.shape[2:]
    try:
        with evaluating(target.model), torch.no_grad():
            logits = target.model(to_pixels(examples.images[:2], device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{target.architecture} does not accept images of {w}x{h} ({first_line(error)}): give its --image-size"
        ) from error
    if logits.ndim != 2 or logits.shape[1] != examples.num_classes:
        raise UserError(
            f"{target.architecture} returns logits of shape {list(logits.shape)} for 2 images and {examples.name} has "
            f"{examples.num_classes} classes: use the data that it was trained on"
        )
    if not logits.isfinite().all():
        raise UserError(f"{target.architecture} returns logits that are not finite: check its weights")
    return logits.shape[1]
