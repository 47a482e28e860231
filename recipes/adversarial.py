"""Train classifiers that resist attacks: GKL, IKL or TRADES between attacked and natural logits, with AWP.

    accelerate launch recipes/adversarial.py --preset cifar100-basic --precision bf16

runs a published row: CIFAR-100 from the Hub (or `--data` a folder with it), WRN-34-10, 200 epochs of SGD at a batch of
128, attacks of 5 steps of growing size, adversarial weight perturbation from epoch 10 and an average of the weights
from epoch 150. About 60 hours on one A100 (an estimate). Accuracy of the averaged model on natural images and under
PGD-20 is measured while training; AutoAttack, the number to report, is `eval/autoattack.py` on the run folder. On a
laptop: `--model wrn_16_1 --images 10000 --epochs 10`.

Papers: Cui et al., arXiv 2305.13948 and 2503.08038; code: jiequancui/DKL, `DKLv2/Adv-training-dkl`. Rows with
synthesized images (`--synthesized 50m.npz`, from https://huggingface.co/datasets/P2333/DM-Improves-AT) follow Wang et
al., ICML 2023, arXiv 2302.04638. Published numbers are in `PRESETS`, ours in recipes/README.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn
from torchvision.transforms import v2

from gkl_vl import cli
from gkl_vl.data.augment import cifar_autoaugment, cifar_cutout
from gkl_vl.data.labelled import LabelledSet, in_memory, open_labelled
from gkl_vl.data.loaders import LabelledLoader, batches_per_epoch
from gkl_vl.data.subsets import balanced_subset
from gkl_vl.data.synthesized import Synthesized, WithSynthesized, open_synthesized, synthesized_per_batch
from gkl_vl.data.views import DiskViews, MemoryViews, MixedViews, Views
from gkl_vl.errors import UserError
from gkl_vl.models.classifiers import Classifier, OnPixels, load_classifier
from gkl_vl.objectives.adversarial import Adversarial, AdversarialTraining, Budget, Method, MultiBatch
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.protocols import Record
from gkl_vl.robustness.autoattack import survives_pgd
from gkl_vl.robustness.pgd import Norm, radius
from gkl_vl.robustness.results import wilson_interval
from gkl_vl.training.classifiers import (
    GklFlags,
    evaluate_classifier,
    finish,
    in_order_of,
    in_training_order,
    overridden,
    recompute_batchnorm,
)
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import sgd, warmup_cosine
from gkl_vl.training.run import EpochIntervals, Run, RunFlags

STATISTICS_IMAGES = 25_600
"""Largest number of training images that an average's BatchNorm statistics are recomputed on."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published experiment."""

    data: str
    model: str
    """As `load_classifier` takes it."""
    epochs: int = 200
    batch_size: int = 128
    """Images per update, of all processes together."""
    lr: float = 0.2
    wd: float = 5e-4
    warmup: float = 0.0
    """Share of the epochs over which the learning rate grows, before its cosine."""
    nesterov: bool = False
    ema_decay: float = 0.9996
    ema_epoch: int = 150
    """Epochs before the weights are averaged."""
    second_view: Literal["none", "autoaugment", "cutout"] = "none"
    fraction: float = 0.0
    """Share of a batch that is synthesized."""
    methods: dict[Method, AdversarialTraining]
    expected: dict[Method, tuple[float, float]]
    """Published accuracy in percent: natural images, AutoAttack."""


def prior_at(settings: AdversarialTraining, temperature: float) -> AdversarialTraining:
    """The settings with another temperature of the class prior."""
    return replace(settings, gkl=replace(settings.gkl, weight_temperature=temperature))


def methods(shared: AdversarialTraining, *, gamma: float, kl_weight: float) -> dict[Method, AdversarialTraining]:
    """GKL's prior has temperature 1, IKL's 4; TRADES with the attack of the others, as released."""
    return {
        "natural": replace(shared, method="natural"),
        "trades": replace(shared, method="trades", kl_weight=kl_weight),
        "ikl": prior_at(replace(shared, method="ikl"), 4),
        "gkl": replace(shared, method="gkl", gkl=replace(shared.gkl, gamma=gamma)),
    }


BASIC = AdversarialTraining()
AUTOAUGMENT: dict[Method, AdversarialTraining] = {
    "gkl": replace(BASIC, gkl=replace(BASIC.gkl, gamma=1, weight_temperature=4))
}
ON_CIFAR10 = replace(BASIC, attack_wmse_weight=0)
# Wang et al.'s training with the IKL weights that the released logs are named after. Epochs and batch are from memory.
SYNTHESIZED = prior_at(replace(BASIC, budget="trades", awp_gamma=0, label_smoothing=0.1), 4)
ON_100 = replace(SYNTHESIZED, epochs=1600, gkl=replace(SYNTHESIZED.gkl, soft_ce_weight=5, wmse_weight=12))
ON_10 = replace(SYNTHESIZED, epochs=2400, gkl=replace(SYNTHESIZED.gkl, soft_ce_weight=3, wmse_weight=10))
WANG: dict[str, Any] = {
    "model": "wrn_28_10_silu",
    "batch_size": 2048,
    "warmup": 0.025,
    "nesterov": True,
    "ema_decay": 0.995,
    "ema_epoch": 0,
    "fraction": 0.8,
}

PRESETS = {
    "cifar100-basic": Preset(
        data="uoft-cs/cifar100",
        model="wrn_34_10",
        methods=methods(BASIC, gamma=0.4, kl_weight=9),
        expected={"gkl": (65.76, 31.91)},
    ),
    "cifar100-autoaugment": Preset(
        data="uoft-cs/cifar100",
        model="wrn_34_10",
        second_view="autoaugment",
        methods=methods(BASIC, gamma=0.4, kl_weight=9) | AUTOAUGMENT,
        expected={"gkl": (65.93, 32.52)},
    ),
    "cifar100-synthesized": Preset(
        data="uoft-cs/cifar100",
        epochs=1600,
        methods=methods(ON_100, gamma=1, kl_weight=5),
        expected={"gkl": (73.65, 39.37)},
        **WANG,
    ),
    "cifar10-basic": Preset(
        data="uoft-cs/cifar10",
        model="wrn_34_10",
        methods=methods(ON_CIFAR10, gamma=0.2, kl_weight=6),
        expected={"gkl": (85.31, 57.13)},
    ),
    "cifar10-synthesized": Preset(
        data="uoft-cs/cifar10",
        epochs=2400,
        methods=methods(replace(ON_10, attack_wmse_weight=0), gamma=1, kl_weight=5),
        expected={"gkl": (92.16, 67.75)},
        **WANG,
    ),
}


# ---- flags -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model. None = the preset's."""

    model: str | None = None
    """A name of the CIFAR zoo (wrn_34_10, wrn_28_10_silu, preact_resnet18, ...), timm:NAME, local-dir:path, ..."""
    weights: str | None = None
    """Initial weights. None = random weights."""


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Training images. None = the preset's."""

    data: str | None = None
    """Folder of parquet, CIFAR's files or images, or a Hub dataset, with splits train and test."""
    images: int | None = None
    """Train on so many images only, drawn evenly from the classes."""
    synthesized: str | None = None
    """More images with labels: an .npz as Wang et al. released them, or a folder with image.npy and label.npy."""
    fraction: float | None = None
    """Share of a batch that is synthesized."""
    second_view: Literal["none", "autoaugment", "cutout"] | None = None
    """A second view of each image, attacked and trained on as well."""


@dataclass(frozen=True, kw_only=True)
class AttackFlags:
    """The attack in training."""

    norm: Norm = "linf"
    """Norm of the perturbation."""
    epsilon: str = "8/255"
    """Radius at the end of training, a fraction or a number, in pixel values of [0, 1]."""
    budget: Budget | None = None
    """Steps of the attack: low = 2, high = 5, ladder = 2 to 5 in the course of training, trades = 10 at full radius."""
    awp_gamma: float | None = None
    """Adversarial weight perturbation, relative to the weights; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """Settings of the method. None = the preset's."""

    kl_weight: float | None = None
    """TRADES: weight of the KL divergence (paper: 1 / lambda)."""
    gkl: Annotated[GklFlags, tyro.conf.arg(name="")] = GklFlags()
    class_prior: bool | None = None
    """GKL, IKL: weigh classes by the model's mean softmax over the label's class in the epoch before."""


@dataclass(frozen=True, kw_only=True)
class OptimisationFlags:
    """Length of the run, batch and optimizer (SGD with momentum 0.9). None = the preset's."""

    epochs: int | None = None
    """Passes over the data; epochs at which the preset changes something scale with it."""
    batch_size: int | None = None
    """Images per process; None = the preset's, divided by the number of processes."""
    lr: float | None = None
    """Peak learning rate, followed by a cosine to 0."""
    wd: float | None = None
    """Weight decay of all parameters."""
    ema_decay: float | None = None
    """Decay per step of a moving average of the weights, which is evaluated and exported; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """Evaluation while training, and checkpoints."""

    intervals: Annotated[EpochIntervals, tyro.conf.arg(name="")] = EpochIntervals()
    robust_images: int = 1000
    """Number of test images that PGD-20 attacks in each evaluation, the first ones."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a classifier that resists attacks, with the settings of a published row."""

    preset: str = "cifar10-basic"
    """A published row of the recipe's table."""
    method: Method = "gkl"
    """natural = no attack."""
    model: ModelFlags = ModelFlags()
    data: DataFlags = DataFlags()
    loss: LossFlags = LossFlags()
    attack: AttackFlags = AttackFlags()
    optimisation: OptimisationFlags = OptimisationFlags()
    run: RunFlags = RunFlags()
    evaluation: EvaluationFlags = EvaluationFlags()


def main(config: Config) -> None:
    preset, settings = find_preset(config)
    run = Run(config, recipe="adversarial")
    run.refuse_shards("attacks")
    train, test = open_data(config, preset)
    classifier = load_classifier(
        preset.model,
        num_classes=train.num_classes,
        weights=config.model.weights,
        allow_pickle=config.run.allow_pickle,
    )
    if config.data.synthesized is not None and classifier.classnames not in (None, train.classnames):
        raise UserError(
            f"--model {preset.model} has the classes of {train.name} in an order of its own, and the labels of "
            f"--synthesized {config.data.synthesized} count in that of the data: take another model"
        )
    train, test = in_order_of({"--model": classifier}, train, test)
    model = MultiBatch(classifier.on_pixels()).to(memory_format=torch.channels_last)
    batch_size = config.optimisation.batch_size
    if batch_size is None:
        batch_size = max(preset.batch_size // run.num_processes, 1)
    per_epoch = batches_per_epoch(len(train), batch_size, run.num_processes)
    steps = preset.epochs * per_epoch
    views = MemoryViews(images=in_memory(train), seed=config.run.seed)
    synthesized = open_more(preset, config, train, batch_size)
    second = second_views(preset, config, train, synthesized)
    against = "" if config.method == "natural" else f" · {config.attack.norm} {config.attack.epsilon}"
    run.begin(f"{preset.model} by {config.method} · {len(train):,} images · {steps:,} steps of {batch_size}{against}")
    has_prior = config.method in ("gkl", "ikl") and settings.class_prior
    prior = EpochPrior(train.num_classes, settings.gkl.weight_temperature) if has_prior else None
    run.seed_ranks()
    exported = fit(
        accelerator=run.accelerator,
        model=model,
        objective=Adversarial(model=model, settings=settings, prior=prior),
        make_optimizer=partial(sgd, lr=preset.lr, wd=preset.wd, nesterov=preset.nesterov),
        learning_rate=partial(warmup_cosine, lr=preset.lr, steps=steps, warmup_steps=round(preset.warmup * steps)),
        make_loader=lambda position: LabelledLoader(
            views=views if synthesized is None else MixedViews(original=views, synthesized=synthesized),
            labels=train.labels,
            batch_size=batch_size,
            seed=config.run.seed,
            rank=run.accelerator.process_index,
            world_size=run.num_processes,
            num_views=None,
            position=position,
            second_views=second,
            synthesized=synthesized,
            fraction=preset.fraction,
        ),
        run=run.folder,
        config=FitConfig(
            steps=steps,
            average_from_step=preset.ema_epoch * per_epoch,
            log_every_steps=min(50, per_epoch),
            **config.evaluation.intervals.in_steps(per_epoch),
        ),
        evaluate=Evaluation(
            trained=model,
            classifier=classifier,
            train_views=views,
            test=test,
            test_views=MemoryViews(images=in_memory(test), seed=0),
            robust_images=config.evaluation.robust_images,
            norm=settings.norm,
            epsilon=settings.epsilon,
            device=run.device,
        ),
        average=moving_average(model, preset.ema_decay),
        checkpoint=run.checkpoint(),
        stop=run.stop,
    )
    if run.accelerator.is_main_process:
        finish(
            run,
            student=replace(classifier, model=inner_model(exported).model),
            teacher=None,
            made=made(config),
            data=train,
            steps=steps,
            published=published(config, preset),
        )
    run.end()


_ATTACKED = ("budget", "awp_gamma")
_IKL = (*_ATTACKED, "soft_ce_weight", "wmse_weight", "temperature", "weight_temperature", "class_prior")
USED_FLAGS: dict[Method, tuple[str, ...]] = {
    "natural": (),
    "trades": (*_ATTACKED, "kl_weight"),
    "ikl": _IKL,
    "gkl": (*_IKL, "gamma"),
}
"""The flags of the loss and of the attack in training that each method uses."""
LOSS_FLAGS = (*USED_FLAGS["gkl"], "kl_weight")


def find_preset(config: Config) -> tuple[Preset, AdversarialTraining]:
    """The published row and its method with the overrides of the flags."""
    preset = cli.named(PRESETS, config.preset, flag="--preset")
    attack, flags = config.attack, cli.flat(config)
    unused = [name for name in LOSS_FLAGS if name not in USED_FLAGS[config.method]]
    cli.refuse_unused(flags, unused, f"has no effect with --method {config.method}")
    del flags["batch_size"]  # per process; the preset's is of all processes together
    flags["epsilon"] = radius(attack.epsilon, attack.norm)
    epochs = preset.epochs if config.optimisation.epochs is None else config.optimisation.epochs
    settings = preset.methods[config.method]
    settings = replace(settings, epochs=epochs, awp_epoch=round(settings.awp_epoch * epochs / preset.epochs))
    preset = replace(preset, ema_epoch=preset.ema_epoch * epochs // preset.epochs)
    return overridden(preset, flags), overridden(settings, flags)


def open_data(config: Config, preset: Preset) -> tuple[LabelledSet, LabelledSet]:
    """The sets for training and for evaluation."""
    train, test = (open_labelled(preset.data, split) for split in ("train", "test"))
    test = in_training_order(test, train)
    if config.data.images is not None:
        train = balanced_subset(train, config.data.images, config.run.seed)
    return train, test


def open_more(preset: Preset, config: Config, train: LabelledSet, batch_size: int) -> Synthesized | None:
    """Synthesized images, where the preset or a flag has them."""
    if preset.fraction and config.data.synthesized is None:
        raise UserError(
            f"{config.preset} trains on synthesized images as well: give --synthesized, see the recipe's text"
        )
    if config.data.synthesized is None:
        return None
    synthesized_per_batch(batch_size, preset.fraction)  # raises before there is a run folder
    return open_synthesized(config.data.synthesized, num_classes=train.num_classes)


def second_views(preset: Preset, config: Config, train: LabelledSet, synthesized: Synthesized | None) -> Views | None:
    """Second views of the images, made by worker processes."""
    if preset.second_view == "none":
        return None
    size = train.read(0).width
    augment = cifar_cutout(size) if preset.second_view == "cutout" else cifar_autoaugment(size, cutout=0)
    return DiskViews(
        data=train if synthesized is None else WithSynthesized(original=train, synthesized=synthesized),
        augment=augment,
        plain=v2.PILToTensor(),
        seed=config.run.seed,
        num_workers=config.run.workers,
        pin_memory=torch.cuda.is_available(),
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluates the model that `fit` passes, on natural and on attacked test images."""

    trained: nn.Module
    classifier: Classifier
    train_views: MemoryViews
    test: LabelledSet
    test_views: MemoryViews
    robust_images: int
    norm: Norm
    epsilon: float
    device: torch.device

    def __call__(self, model: nn.Module) -> Iterator[Record]:
        """Two records. For an average of weights, BatchNorm's statistics are recomputed first."""
        on_pixels = inner_model(model)
        if model is not self.trained:
            count = min(len(self.train_views.images), STATISTICS_IMAGES)
            recompute_batchnorm(on_pixels, self.train_views, count=count, device=self.device)
        classifier = replace(self.classifier, model=on_pixels.model)
        natural = evaluate_classifier(self.test, self.test_views, {}, self.device, classifier)
        yield {"model": "student"} | natural
        survived = survives_pgd(
            model=on_pixels,
            images=self.test_views.images[: self.robust_images],
            labels=self.test.labels[: self.robust_images],
            epsilon=self.epsilon,
            step_size=self.epsilon / 4,
            steps=20,
            norm=self.norm,
            device=self.device,
            seed=0,
        )
        yield {
            "model": "student",
            "dataset": f"pgd20:{natural['dataset']}",
            "n": len(survived),
            "acc1": survived.float().mean().item(),
            "intervals": {"acc1": wilson_interval(hits=int(survived.sum()), n=len(survived))},
        }


def inner_model(multi_batch: Any) -> OnPixels:
    """The model inside a `MultiBatch`."""
    return multi_batch.model


def made(config: Config) -> str:
    """For the card: how the model was trained."""
    if config.method == "natural":
        return "trained on natural images, without any attack,"
    return f"trained by {config.method} against attacks within {config.attack.epsilon} in {config.attack.norm}"


def published(config: Config, preset: Preset) -> str:
    """A line with the preset's published numbers; "" where there are none."""
    if config.method not in preset.expected:
        return ""
    natural, attacked = preset.expected[config.method]
    return f"Published for {config.preset} by {config.method}: {natural:.2f} %, under AutoAttack {attacked:.2f} %"


if __name__ == "__main__":
    cli.run(main, Config)
