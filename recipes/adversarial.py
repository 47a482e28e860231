"""Train classifiers that hold under attack: GKL, IKL or TRADES between attacked and natural logits, with AWP.

    accelerate launch recipes/adversarial.py --preset cifar100-basic --precision bf16

runs a published row: CIFAR-100 from the Hub (or `--data` a folder with it), WRN-34-10, 200 epochs of SGD at a batch of
128, attacks of 5 steps of growing size, adversarial weight perturbation from epoch 10 and an average of the weights
from epoch 150. About 60 hours on one A100 (an estimate). The averaged model's accuracy on natural images and under
PGD-20 is measured on the way; AutoAttack, the number that counts, is `eval/autoattack.py` on the run folder. A laptop:
`--model wrn_16_1 --images 10000 --epochs 10`.

Papers: Cui et al., arXiv 2305.13948 and 2503.08038; code: jiequancui/DKL, `DKLv2/Adv-training-dkl`. Rows with
synthesized images (`--synthesized 50m.npz`, from https://huggingface.co/datasets/P2333/DM-Improves-AT) follow Wang et
al., ICML 2023, arXiv 2302.04638. Published numbers are in `PRESETS`, ours in recipes/README.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from torch import nn
from torchvision.transforms import v2

from gkl_vl import cli
from gkl_vl.data.augment import cifar_autoaugment, cifar_cutout
from gkl_vl.data.labelled import LabelledSet, balanced_subset, in_memory, open_labelled
from gkl_vl.data.loaders import LabelledLoader, batches_per_epoch
from gkl_vl.data.synthesized import Synthesized, WithSynthesized, open_synthesized, synthesized_per_batch
from gkl_vl.data.views import DiskViews, MemoryViews, MixedViews, Views
from gkl_vl.errors import UserError
from gkl_vl.export import hub
from gkl_vl.export.cards import ClassifierCard
from gkl_vl.models.classifiers import Classifier, OnPixels, load_classifier
from gkl_vl.objectives.adversarial import Adversarial, AdversarialTraining, Budget, Method, MultiBatch
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.robustness.autoattack import survives_pgd
from gkl_vl.robustness.pgd import Norm, radius
from gkl_vl.training.classifiers import conclude, evaluate_on, overridden, recompute_batchnorm
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import sgd, warmup_cosine
from gkl_vl.training.run import refuse_shards, start

STATISTICS_IMAGES = 25_600
"""Training images that an average's BatchNorm statistics are taken from, at most."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published experiment."""

    data: str
    model: str
    """As `load_classifier` takes it."""
    epochs: int = 200
    batch_size: int = 128
    """Of all processes together."""
    lr: float = 0.2
    wd: float = 5e-4
    warmup: float = 0.0
    """Share of the epochs over which the rate grows, before its cosine."""
    nesterov: bool = False
    ema_decay: float = 0.9996
    ema_epoch: int = 150
    """Epochs before the weights are averaged."""
    second_view: Literal["none", "autoaugment", "cutout"] = "none"
    fraction: float = 0.0
    """Of a batch that is synthesized."""
    methods: dict[Method, AdversarialTraining]
    expected: dict[Method, tuple[float, float]]
    """Published accuracy in percent: natural images, AutoAttack."""


def methods(shared: AdversarialTraining, *, gamma: float, kl_weight: float) -> dict[Method, AdversarialTraining]:
    """GKL's prior is taken at temperature 1, IKL's at 4; TRADES with the attack of the others, as released."""
    return {
        "natural": replace(shared, method="natural"),
        "trades": replace(shared, method="trades", kl_weight=kl_weight),
        "ikl": replace(shared, method="ikl", prior_temperature=4),
        "gkl": replace(shared, method="gkl", gamma=gamma),
    }


BASIC = AdversarialTraining()
AUTOAUGMENT: dict[Method, AdversarialTraining] = {"gkl": replace(BASIC, gamma=1, prior_temperature=4)}
ON_CIFAR10 = replace(BASIC, attack_wmse_weight=0)
# Wang et al.'s training with the IKL weights that the released logs are named after. Epochs and batch are from memory.
SYNTHESIZED = replace(BASIC, budget="trades", prior_temperature=4, awp_gamma=0, label_smoothing=0.1)
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
        methods=methods(replace(SYNTHESIZED, soft_ce_weight=5, wmse_weight=12, epochs=1600), gamma=1, kl_weight=5),
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
        methods=methods(
            replace(SYNTHESIZED, soft_ce_weight=3, wmse_weight=10, epochs=2400, attack_wmse_weight=0),
            gamma=1,
            kl_weight=5,
        ),
        expected={"gkl": (92.16, 67.75)},
        **WANG,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a classifier that holds under attack. None = what the preset says."""

    preset: str = "cifar10-basic"
    """A published row of the recipe's table."""
    method: Method = "gkl"
    """natural = no attack."""
    data: str | None = None
    """Folder of parquet, CIFAR's files or images, or a Hub dataset, with splits train and test."""
    images: int | None = None
    """Train on so many images only, drawn evenly from the classes."""
    synthesized: str | None = None
    """Images with labels besides: an .npz as Wang et al. released them, or a folder with image.npy and label.npy."""
    fraction: float | None = None
    """Of a batch that is synthesized."""
    second_view: Literal["none", "autoaugment", "cutout"] | None = None
    """Another view of each image, attacked and trained on as well."""
    model: str | None = None
    """A name of the CIFAR zoo (wrn_34_10, wrn_28_10_silu, preact_resnet18, ...), timm:NAME, local-dir:path, ..."""
    weights: str | None = None
    """Where the model starts. None = random weights."""
    output_dir: Path | None = None
    """The run folder. None = runs/adversarial-<time>."""
    epochs: int | None = None
    """Passes over the data; what the preset does from an epoch on moves along."""
    batch_size: int | None = None
    """Per process; None = the preset's, shared out."""
    lr: float | None = None
    """Peak learning rate of SGD with momentum 0.9; a cosine to 0."""
    wd: float | None = None
    """Weight decay, of everything."""
    precision: Literal["fp32", "amp", "fp16", "amp_bf16", "bf16"] | None = None
    """None = what `accelerate launch` or `accelerate config` say."""
    workers: int = 2
    """Processes that make second views, per training process."""
    seed: int = 0
    """Of initial weights, order, augmentations, attacks, and of what --images draws."""
    norm: Norm = "linf"
    """Of the attack."""
    epsilon: str = "8/255"
    """Radius of the attack at the end of training, a fraction or a number; images are in [0, 1]."""
    budget: Budget | None = None
    """Steps of the attack: low = 2, high = 5, ladder = 2 to 5 as training goes on, trades = 10 at full radius."""
    kl_weight: float | None = None
    """TRADES: weight of the KL divergence (paper: 1 / lambda)."""
    soft_ce_weight: float | None = None
    """GKL, IKL: weight of the soft cross entropy (paper: beta)."""
    wmse_weight: float | None = None
    """GKL, IKL: weight of the weighted MSE of logit differences (paper: alpha)."""
    gamma: float | None = None
    """GKL: exponent of the classes' weights."""
    class_prior: bool | None = None
    """GKL, IKL: weigh classes by what the model thought of the label's class in the epoch before."""
    prior_temperature: float | None = None
    """GKL, IKL: of the softmax that the prior comes from."""
    awp_gamma: float | None = None
    """Adversarial weight perturbation, relative to the weights; 0 = none."""
    ema_decay: float | None = None
    """Average of the weights, per step, that is evaluated and exported; 0 = none."""
    eval_every_epochs: int = 10
    """0 = at the end only."""
    robust_images: int = 1000
    """The first so many test images are attacked by PGD-20 in each evaluation."""
    checkpoint_every_epochs: int = 10
    """0 = at the end only."""
    resume: str | None = None
    """`latest`, or a checkpoint folder; with the flags of the run that is taken up."""
    push_to_hub: str | None = None
    """org/name: upload the exported folder when done."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers besides results.jsonl."""
    allow_pickle: bool = False
    """Read weights stored as pickles (.pth, .pt), with weights_only=True."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    if config.push_to_hub:
        hub.check_repo_id(config.push_to_hub)
    preset, settings = find_preset(config)
    run, accelerator, asked = start(config, recipe="adversarial")
    refuse_shards(accelerator, "attacks")
    set_seed(config.seed)  # the same initial weights on every rank
    train, test = open_data(config, preset)
    classifier = load_classifier(
        preset.model, num_classes=train.num_classes, weights=config.weights, allow_pickle=config.allow_pickle
    )
    model = MultiBatch(classifier.on_pixels()).to(memory_format=torch.channels_last)
    batch_size = config.batch_size or max(preset.batch_size // accelerator.num_processes, 1)
    per_epoch = batches_per_epoch(len(train), batch_size, accelerator.num_processes)
    views = MemoryViews(images=in_memory(train), seed=config.seed)
    synthesized = open_more(preset, config, train, batch_size)
    second = second_views(preset, config, train, synthesized)
    if not config.resume:  # from here on there is a run
        run.write_json("config.json", asked)
    steps = preset.epochs * per_epoch
    title = f"{preset.model} by {config.method} · {len(train):,} images · {steps:,} steps of {batch_size}"
    title += "" if config.method == "natural" else f" · {config.norm} {config.epsilon}"
    accelerator.print(
        f"{title} · seed {config.seed} · {accelerator.num_processes} x {accelerator.device.type} · {run.path}"
    )
    has_prior = config.method in ("gkl", "ikl") and settings.class_prior
    prior = EpochPrior(train.num_classes, settings.prior_temperature) if has_prior else None
    set_seed(config.seed, device_specific=True)  # from here on each rank draws its own

    def make_loader(position: dict[str, Any] | None) -> LabelledLoader:
        return LabelledLoader(
            views=views if synthesized is None else MixedViews(original=views, synthesized=synthesized),
            labels=train.labels,
            batch_size=batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_views=None,
            position=position,
            second_views=second,
            synthesized=synthesized,
            fraction=preset.fraction,
        )

    exported = fit(
        accelerator=accelerator,
        model=model,
        objective=Adversarial(model=model, settings=settings, prior=prior),
        make_optimizer=partial(sgd, lr=preset.lr, wd=preset.wd, nesterov=preset.nesterov),
        learning_rate=partial(warmup_cosine, lr=preset.lr, steps=steps, warmup_steps=round(preset.warmup * steps)),
        make_loader=make_loader,
        run=run,
        config=FitConfig(
            steps=steps,
            grad_clip_norm=float("inf"),
            average_from_step=preset.ema_epoch * per_epoch,
            log_every_steps=min(50, per_epoch),
            eval_every_steps=config.eval_every_epochs * per_epoch,
            checkpoint_every_steps=config.checkpoint_every_epochs * per_epoch,
        ),
        evaluate=Evaluation(
            trained=model,
            classifier=classifier,
            train_views=views,
            test=test,
            test_views=MemoryViews(images=in_memory(test), seed=0),
            config=config,
            epsilon=settings.epsilon,
            device=accelerator.device,
        ),
        after_step=lambda: None,
        average=moving_average(model, preset.ema_decay),
        checkpoint=run.find_checkpoint(config.resume) if config.resume else None,
    )
    if accelerator.is_main_process:
        card = ClassifierCard(
            student=classifier.name,
            made=made(config),
            teacher=None,
            data=train.name,
            command=run.config()["command"],
            commit=run.config()["commit"],
            metrics=[r for r in run.records() if "model" in r and r["step"] == steps],
            steps=steps,
            seed=config.seed,
            repo_id=config.push_to_hub,
        )
        student = replace(classifier, model=plain(exported).model)
        conclude(run=run, student=student, teacher=None, card=card, title=title, published=published(config, preset))
    accelerator.end_training()


# ---- before ------------------------------------------------------------------------------------------------------


def find_preset(config: Config) -> tuple[Preset, AdversarialTraining]:
    """The published row and its method, with what the flags say otherwise."""
    preset = cli.named(PRESETS, config.preset, flag="--preset")
    cli.require_positive(config, "epochs", "batch_size", "images", "robust_images")
    settings = replace(preset.methods[config.method], norm=config.norm, epsilon=radius(config.epsilon, config.norm))
    epochs = config.epochs or preset.epochs
    settings = replace(settings, awp_epoch=round(settings.awp_epoch * epochs / preset.epochs))
    preset = replace(preset, ema_epoch=preset.ema_epoch * epochs // preset.epochs)
    preset = overridden(preset, config, but=("batch_size",))  # there of all processes together
    return preset, overridden(replace(settings, epochs=epochs), config, but=("epsilon",))


def open_data(config: Config, preset: Preset) -> tuple[LabelledSet, LabelledSet]:
    """For training and for evaluation."""
    train, test = (open_labelled(preset.data, split) for split in ("train", "test"))
    return (train if config.images is None else balanced_subset(train, config.images, config.seed)), test


def open_more(preset: Preset, config: Config, train: LabelledSet, batch_size: int) -> Synthesized | None:
    """Synthesized images, where the preset or a flag wants them."""
    if preset.fraction and config.synthesized is None:
        raise UserError(
            f"{config.preset} trains on synthesized images as well: give --synthesized, see the recipe's text"
        )
    if config.synthesized is None:
        return None
    synthesized_per_batch(batch_size, preset.fraction)  # says what is wrong with it before there is a run
    return open_synthesized(config.synthesized, num_classes=train.num_classes)


def second_views(preset: Preset, config: Config, train: LabelledSet, synthesized: Synthesized | None) -> Views | None:
    """Other views of the same images, made by worker processes."""
    if preset.second_view == "none":
        return None
    size = train.read(0).width
    augment = cifar_cutout(size) if preset.second_view == "cutout" else cifar_autoaugment(size, cutout=0)
    return DiskViews(
        data=train if synthesized is None else WithSynthesized(original=train, synthesized=synthesized),
        augment=augment,
        plain=v2.PILToTensor(),
        seed=config.seed,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
    )


# ---- during and after --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of the model that `fit` hands over, on natural and on attacked test images."""

    trained: nn.Module
    classifier: Classifier
    train_views: MemoryViews
    test: LabelledSet
    test_views: MemoryViews
    config: Config
    epsilon: float
    device: torch.device

    def __call__(self, together: nn.Module) -> Iterator[dict[str, Any]]:
        """Two records. An average of weights gets its own BatchNorm statistics first."""
        config, on_pixels = self.config, plain(together)
        if together is not self.trained:
            count = min(len(self.train_views.images), STATISTICS_IMAGES)
            recompute_batchnorm(on_pixels, self.train_views, count=count, device=self.device)
        classifier = replace(self.classifier, model=on_pixels.model)
        natural = evaluate_on(self.test, self.test_views, {}, self.device, classifier)
        yield {"model": "student"} | natural
        survived = survives_pgd(
            model=on_pixels,
            images=self.test_views.images[: config.robust_images],
            labels=self.test.labels[: config.robust_images],
            epsilon=self.epsilon,
            step_size=self.epsilon / 4,
            steps=20,
            norm=config.norm,
            device=self.device,
            seed=0,
        )
        yield {"model": "student", "dataset": f"pgd20:{natural['dataset']}", "acc1": survived.float().mean().item()}


def plain(together: Any) -> OnPixels:
    """The model inside a `MultiBatch`."""
    return together.model


def made(config: Config) -> str:
    """For the card."""
    if config.method == "natural":
        return "trained on natural images, without any attack,"
    return f"trained by {config.method} against attacks within {config.epsilon} in {config.norm}"


def published(config: Config, preset: Preset) -> str:
    """A line about the preset's published numbers, where there are some."""
    if config.method not in preset.expected:
        return ""
    natural, attacked = preset.expected[config.method]
    return f"Published for {config.preset} by {config.method}: {natural:.2f} %, under AutoAttack {attacked:.2f} %"


if __name__ == "__main__":
    cli.run(main, Config)
