"""Train classifiers on few labels and many images without: FixMatch, FlexMatch, Mean Teacher with GKL, IKL, KL.

    accelerate launch recipes/semi_supervised.py --preset cifar100-200 --method fixmatch --consistency ikl \
        --weights vit_small_patch2_32_mlp_im_1k_32.pth --allow-pickle

runs a published row: CIFAR-100 from the Hub (or `--data` a folder with it) with 2 labels a class, a ViT-S/2 from the
weights of USB's release v.0.0.0 (https://github.com/microsoft/Semi-supervised-learning), 204,800 updates of AdamW.
`--method supervised|fixmatch|flexmatch|mean-teacher`, `--consistency hard|kl|mse|ikl|gkl`; FixMatch as it was published
is `fixmatch` with `hard`, Mean Teacher is `mean-teacher` with `mse`. About 10 hours on one GPU (an estimate). A laptop:

    accelerate launch recipes/semi_supervised.py --preset cifar10-250 --data CIFAR10 --model resnet8 --steps 2000 \
        --batch-size 16 --mu 3 --ema-decay 0.99 --workers 0

Papers: Cui et al., arXiv 2305.13948 (IKL), whose code has no GKL here: gamma and the class prior are ours; Sohn et al.,
arXiv 2001.07685; Zhang et al., arXiv 2110.08263; Tarvainen and Valpola, arXiv 1703.01780; settings of USB, Wang et al.,
arXiv 2208.07204. Published numbers are in `PRESETS`, ours in recipes/README.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Int64, UInt8
from torch import Tensor, nn
from torchvision.transforms import v2

from gkl_vl import cli
from gkl_vl.data.augment import randaugment_cutout
from gkl_vl.data.label_splits import UNKNOWN, draw_labelled, labelled_lines, read_labelled
from gkl_vl.data.labelled import LabelledSet, in_memory, open_image_set, open_labelled
from gkl_vl.data.loaders import SemiSupervisedLoader
from gkl_vl.data.subsets import balanced_subset
from gkl_vl.data.views import DiskViews, MemoryImages, MemoryViews
from gkl_vl.errors import UserError
from gkl_vl.losses.consistency import ClassThresholds, Consistency, Method, SemiSupervised
from gkl_vl.models.classifiers import Classifier, load_classifier
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.semi_supervised import SemiSupervisedTraining
from gkl_vl.training.classifiers import (
    GklFlags,
    evaluate_classifier,
    finish,
    in_order_of,
    in_training_order,
    overridden,
)
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import layered_adamw, sgd, warmup_fixmatch
from gkl_vl.training.run import Run, RunFlags, StepIntervals


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published experiment."""

    data: str | None
    """None = --data must be given."""
    num_labels: int
    """Labelled images, of all classes together."""
    unlabelled_split: str | None = None
    """A split with more images without labels, beside those of the training split."""
    image_size: int
    upside_down: bool = False
    """Whether images may be flipped vertically."""
    model: str
    steps: int = 204_800
    warmup_steps: int = 5120
    batch_size: int = 8
    """Labelled images per update, of all processes together."""
    mu: int = 1
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float
    layer_decay: float = 1.0
    wd: float = 5e-4
    ema_decay: float = 0.0
    """At least 0.999 for Mean Teacher."""
    expected: dict[str, float]
    """Published top-1 in percent, by `arm`."""


def arm(method: Method, consistency: Consistency) -> str:
    """Method and consistency term, for titles and tables."""
    return method if method == "supervised" else f"{method} with {consistency}"


def published(supervised: float, fixmatch: float, flexmatch: float, mean_teacher: float) -> dict[str, float]:
    """From USB's tables of error rates, results/usb_cv.csv and results/classic_cv.csv."""
    errors = {"supervised": supervised, "fixmatch with hard": fixmatch}
    errors |= {"flexmatch with hard": flexmatch, "mean-teacher with mse": mean_teacher}
    return {name: 100 - error for name, error in errors.items()}


CIFAR100 = partial(
    Preset, data="uoft-cs/cifar100", image_size=32, model="vit_small_patch2_32", lr=5e-4, layer_decay=0.5
)
CIFAR10 = partial(
    Preset,
    data="uoft-cs/cifar10",
    image_size=32,
    model="wrn_28_2",
    steps=2**20,
    warmup_steps=0,
    batch_size=64,
    mu=7,
    optimizer="sgd",
    lr=0.03,
    ema_decay=0.999,
)
STL10 = partial(
    Preset,
    data=None,
    unlabelled_split="unlabeled",
    image_size=96,
    model="vit_base_patch16_96",
    lr=1e-4,
    layer_decay=0.65,
)
EUROSAT = partial(
    Preset, data="timm/eurosat-rgb", image_size=32, upside_down=True, model="vit_small_patch2_32", lr=5e-5
)
# From the IKL paper, which repeated them; its Mean Teacher leaves out images below the threshold.
DKL = {
    "fixmatch with hard": 69.20,
    "fixmatch with kl": 69.09,
    "fixmatch with ikl": 70.00,
    "mean-teacher with ikl": 70.05,
}

PRESETS = {
    "cifar100-200": CIFAR100(num_labels=200, expected=published(35.88, 29.60, 26.76, 35.47) | DKL),
    "cifar100-400": CIFAR100(num_labels=400, expected=published(26.76, 19.56, 18.24, 26.03)),
    "cifar10-10": CIFAR10(num_labels=10, expected={}),
    "cifar10-40": CIFAR10(num_labels=40, expected=published(77.58, 8.33, 5.21, 76.93)),
    "cifar10-250": CIFAR10(num_labels=250, expected=published(55.96, 4.97, 5.00, 56.06)),
    "stl10-40": STL10(num_labels=40, expected=published(19.00, 16.15, 14.40, 18.67)),
    "stl10-100": STL10(num_labels=100, expected=published(10.87, 8.11, 8.17, 24.19)),
    "eurosat-20": EUROSAT(num_labels=20, expected=published(26.49, 13.44, 5.17, 26.83)),
    "eurosat-40": EUROSAT(num_labels=40, expected=published(16.12, 5.91, 5.58, 15.85)),
}
MEAN_TEACHER_DECAY = 0.999


# ---- flags -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model. None = the preset's."""

    model: str | None = None
    """A name of the CIFAR zoo (wrn_28_2, vit_small_patch2_32, resnet20, ...), timm:NAME, local-dir:path, ..."""
    weights: str | None = None
    """Initial weights: a file, whose classifier is left out, or timm's `pretrained`. None = random weights."""


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Images, and which of them keep their label. None = the preset's."""

    data: str | None = None
    """Folder of parquet, CIFAR's or STL-10's files or images, or a Hub dataset, with splits train and test."""
    num_labels: int | None = None
    """Labelled images, of all classes together, equally many of each."""
    labelled: str | None = None
    """Which ones: a run's labelled.txt, or a .npy of USB's, of CIFAR's own files. None = drawn by --seed."""
    images: int | None = None
    """Use so many training images only, drawn evenly from the classes, with and without label."""
    unlabelled_split: str | None = None
    """A split of --data with more images without labels; STL-10's is called unlabeled."""


@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """Settings of the consistency term. None = the method's."""

    threshold: float | None = None
    """Least probability of a pseudo-label that counts. None = 0.95, and 0 for Mean Teacher with mse."""
    unlabelled_weight: float | None = None
    """Weight of the consistency term (paper: lambda_u). None = 1, and 50 for mse."""
    gkl: Annotated[GklFlags, tyro.conf.arg(name="")] = GklFlags()
    class_prior: bool = False
    """GKL, IKL: weigh classes by the mean softmax over the pseudo-label's class in the pass before."""


@dataclass(frozen=True, kw_only=True)
class OptimisationFlags:
    """Length of the run, batch and optimizer. None = the preset's."""

    steps: int | None = None
    """Optimizer updates."""
    warmup_steps: int | None = None
    """Updates over which the learning rate grows."""
    batch_size: int | None = None
    """Labelled images per process; None = the preset's, divided by the number of processes."""
    mu: int | None = None
    """Unlabelled images per labelled one."""
    lr: float | None = None
    """Peak learning rate."""
    layer_decay: float | None = None
    """AdamW: factor of the learning rate from each layer to the one below it."""
    wd: float | None = None
    """Weight decay."""
    ema_decay: float | None = None
    """Decay per step of a moving average, which is evaluated, exported, and Mean Teacher's teacher; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a classifier on few labels, with the settings of a published row."""

    preset: str = "cifar10-250"
    """A published setting, SET-LABELS: see `PRESETS`."""
    method: Method = "fixmatch"
    """Source of pseudo-labels: the model with one threshold, with one per class, or its moving average."""
    consistency: Consistency = "gkl"
    """Loss between strong and weak view; not used by supervised."""
    model: ModelFlags = ModelFlags()
    data: DataFlags = DataFlags()
    loss: LossFlags = LossFlags()
    optimisation: OptimisationFlags = OptimisationFlags()
    run: RunFlags = RunFlags()
    evaluation: StepIntervals = StepIntervals(eval_every_steps=5000, checkpoint_every_steps=5000)


def main(config: Config) -> None:
    preset, settings = find_preset(config)
    run = Run(config, recipe="semi_supervised")
    run.refuse_shards("pseudo-labels")
    data = open_data(config, preset)
    student = load_classifier(
        preset.model,
        num_classes=data.train.num_classes,
        weights=config.model.weights,
        new_head=config.model.weights is not None,
        allow_pickle=config.run.allow_pickle,
    )
    student.model.to(memory_format=torch.channels_last)
    average = moving_average(student.model, preset.ema_decay)
    batch_size = config.optimisation.batch_size
    if batch_size is None:
        batch_size = max(preset.batch_size // run.num_processes, 1)
    lines = labelled_lines(data.labelled, data.train.labels)  # with the labels of the data, as they are read again
    data = in_student_order(data, student)
    run.begin(title(config, preset, data))
    if not config.run.resume:
        run.folder.write_text("labelled.txt", lines)
    prior = EpochPrior(data.train.num_classes, settings.gkl.weight_temperature) if has_prior(settings) else None
    objective = SemiSupervisedTraining(
        student=student,
        average=average if config.method == "mean-teacher" else None,
        settings=settings,
        thresholds=find_thresholds(settings, data),
        prior=prior,
    )
    run.seed_ranks()
    test_views = MemoryViews(images=in_memory(data.test, size=preset.image_size), seed=0)
    evaluate = partial(evaluate_classifier, data.test, test_views, {}, run.device)
    exported = fit(
        accelerator=run.accelerator,
        model=student.model,
        objective=objective,
        make_optimizer=make_optimizer(preset),
        learning_rate=partial(warmup_fixmatch, lr=preset.lr, steps=preset.steps, warmup_steps=preset.warmup_steps),
        make_loader=partial(make_loader, config, preset, data, batch_size, run),
        run=run.folder,
        config=FitConfig(
            steps=preset.steps, log_every_steps=min(50, max(preset.steps // 40, 1)), **vars(config.evaluation)
        ),
        evaluate=lambda model: [{"model": "student"} | evaluate(replace(student, model=model))],
        average=average,
        checkpoint=run.checkpoint(),
        stop=run.stop,
    )
    if run.accelerator.is_main_process:
        by = arm(config.method, config.consistency)
        finish(
            run,
            student=replace(student, model=exported),
            teacher=None,
            made=f"trained by {by} on {len(data.labelled):,} labels",
            data=data.train,
            steps=preset.steps,
            published=published_line(config, preset, by),
        )
    run.end()


@dataclass(frozen=True)
class Data:
    """Images and labels of a run, all in memory."""

    train: LabelledSet
    labelled: Int64[Tensor, " m"]
    """Indices of the images that keep their label."""
    pool: UInt8[Tensor, "M 3 h w"]
    """Images without label: all of the training split, and then those of --unlabelled-split."""
    hidden_labels: Int64[Tensor, " M"]
    """Labels of the pool, for the log only."""
    test: LabelledSet


def find_preset(config: Config) -> tuple[Preset, SemiSupervised]:
    """The published setting and the method's, with the overrides of the flags."""
    preset, flags = cli.named(PRESETS, config.preset, flag="--preset"), cli.flat(config)
    refuse_unused_flags(config, preset)
    del flags["batch_size"]  # per process; the preset's is of all processes together
    steps = preset.steps if config.optimisation.steps is None else config.optimisation.steps
    preset = replace(preset, warmup_steps=round(preset.warmup_steps * steps / preset.steps))
    if config.method == "mean-teacher":
        preset = replace(preset, ema_decay=max(preset.ema_decay, MEAN_TEACHER_DECAY))
    preset = overridden(preset, flags)
    if preset.warmup_steps > preset.steps:
        raise UserError(
            f"--warmup-steps {preset.warmup_steps} is longer than the run of {preset.steps} steps: lower it"
        )
    if preset.mu < 1 and config.method != "supervised":
        raise UserError(
            f"--mu {preset.mu} leaves the batch of unlabelled images empty: at least 1, or --method supervised"
        )
    if config.method == "mean-teacher" and not preset.ema_decay:
        raise UserError(
            "--method mean-teacher takes its targets from an average of the weights: --ema-decay 0 leaves it none"
        )
    return preset, overridden(find_settings(config, preset.steps), flags)


_PSEUDO = ("threshold", "unlabelled_weight")
_IKL = (*_PSEUDO, "temperature", "soft_ce_weight", "wmse_weight", "weight_temperature", "class_prior")
USED_FLAGS: dict[Consistency, tuple[str, ...]] = {
    "hard": _PSEUDO,
    "mse": _PSEUDO,
    "kl": (*_PSEUDO, "temperature"),
    "ikl": _IKL,
    "gkl": (*_IKL, "gamma"),
}
"""The flags of `LossFlags` that each consistency term uses."""


def refuse_unused_flags(config: Config, preset: Preset) -> None:
    """Raises: UserError for a flag that the run would not use."""
    flags = cli.flat(config) | {"class_prior": config.loss.class_prior or None}
    if config.method == "supervised":
        unused = [*USED_FLAGS["gkl"], "mu", "unlabelled_split"]
        cli.refuse_unused(flags, unused, "has no effect with --method supervised")
    unused = [name for name in USED_FLAGS["gkl"] if name not in USED_FLAGS[config.consistency]]
    cli.refuse_unused(flags, unused, f"has no effect with --consistency {config.consistency}")
    if preset.optimizer == "sgd":
        cli.refuse_unused(flags, ["layer_decay"], f"has no effect with the SGD of --preset {config.preset}")


def find_settings(config: Config, steps: int) -> SemiSupervised:
    """The published settings. Mean Teacher's own term counts every image, and grows over 0.4 of the training."""
    settings = SemiSupervised(method=config.method, consistency=config.consistency)
    if config.consistency == "mse":
        settings = replace(settings, unlabelled_weight=50)
        if config.method == "mean-teacher":
            settings = replace(settings, threshold=0, rampup_steps=round(0.4 * steps))
    return settings


def open_data(config: Config, preset: Preset) -> Data:
    """Reads all images into memory."""
    if preset.data is None:
        raise UserError(f"--preset {config.preset} has no data of its own: give --data, see recipes/README.md")
    train, test = (open_labelled(preset.data, split) for split in ("train", "test"))
    test = in_training_order(test, train)
    if config.data.images is not None:
        train = balanced_subset(train, config.data.images, config.run.seed)
    if config.data.labelled is None:
        labelled = draw_labelled(train, num_labels=preset.num_labels, seed=config.run.seed)
    else:
        labelled = read_labelled(config.data.labelled, train)
        if config.data.num_labels not in (None, len(labelled)):
            raise UserError(
                f"--num-labels {config.data.num_labels}, but --labelled {config.data.labelled!r} names "
                f"{len(labelled)}: give one"
            )
    pool, hidden = in_memory(train, size=preset.image_size), train.labels
    if preset.unlabelled_split is not None and config.method != "supervised":
        more = in_memory(open_image_set(preset.data, preset.unlabelled_split), size=preset.image_size)
        pool, hidden = torch.cat([pool, more]), torch.cat([hidden, torch.full((len(more),), UNKNOWN)])
    return Data(train, labelled, pool, hidden, test)


def in_student_order(data: Data, student: Classifier) -> Data:
    """The data with the labels of a student that carries class names: an exported folder."""
    train, test = in_order_of({"--model": student}, data.train, data.test)
    hidden_labels = torch.cat([train.labels, data.hidden_labels[len(train) :]])
    return replace(data, train=train, test=test, hidden_labels=hidden_labels)


def has_prior(settings: SemiSupervised) -> bool:
    """Whether the method uses a class prior."""
    return settings.class_prior and settings.consistency in ("ikl", "gkl") and settings.method != "supervised"


def find_thresholds(settings: SemiSupervised, data: Data) -> ClassThresholds | None:
    """FlexMatch's thresholds; None for the other methods."""
    if settings.method != "flexmatch":
        return None
    return ClassThresholds(num_images=len(data.pool), num_classes=data.train.num_classes, threshold=settings.threshold)


def make_optimizer(preset: Preset) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """The preset's optimizer, for `fit`."""
    if preset.optimizer == "adamw":
        return partial(layered_adamw, lr=preset.lr, wd=preset.wd, layer_decay=preset.layer_decay)
    return partial(sgd, lr=preset.lr, wd=preset.wd, nesterov=True, norms_decay=False)


def make_loader(
    config: Config, preset: Preset, data: Data, batch_size: int, run: Run, position: dict[str, Any] | None
) -> SemiSupervisedLoader:
    """Batches of this rank from a position."""
    weak = MemoryViews(
        images=data.pool,
        seed=config.run.seed,
        padding=preset.image_size // 8,
        reflect=True,
        upside_down=preset.upside_down,
    )
    return SemiSupervisedLoader(
        labelled=replace(weak, images=data.pool[data.labelled]),
        labels=data.train.labels[data.labelled],
        weak=weak,
        strong=DiskViews(
            data=MemoryImages(data.pool),
            augment=randaugment_cutout(preset.image_size, upside_down=preset.upside_down),
            plain=v2.PILToTensor(),
            seed=config.run.seed,
            num_workers=config.run.workers,
            pin_memory=torch.cuda.is_available(),
        ),
        hidden_labels=data.hidden_labels,
        batch_size=batch_size,
        mu=0 if config.method == "supervised" else preset.mu,
        seed=config.run.seed,
        rank=run.accelerator.process_index,
        world_size=run.num_processes,
        position=position,
    )


def title(config: Config, preset: Preset, data: Data) -> str:
    """The run in a line."""
    unlabelled = "" if config.method == "supervised" else f" and {len(data.pool):,} images without"
    by = arm(config.method, config.consistency)
    return f"{preset.model} by {by} · {len(data.labelled):,} labels{unlabelled} · {preset.steps:,} steps"


def published_line(config: Config, preset: Preset, by: str) -> str:
    """A line with the preset's published accuracy; "" where there is none."""
    accuracy = preset.expected.get(by)
    return f"Published for {config.preset} by {by}: {accuracy:.2f} % top-1" if accuracy else ""


if __name__ == "__main__":
    cli.run(main, Config)
