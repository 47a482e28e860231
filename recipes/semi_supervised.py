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
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from jaxtyping import Int64, UInt8
from torch import Tensor, nn
from torchvision.transforms import v2

from gkl_vl import cli
from gkl_vl.data.augment import randaugment_cutout
from gkl_vl.data.label_splits import UNKNOWN, draw_labelled, labelled_lines, read_labelled
from gkl_vl.data.labelled import LabelledSet, balanced_subset, in_memory, open_image_set, open_labelled
from gkl_vl.data.loaders import SemiSupervisedLoader
from gkl_vl.data.views import DiskViews, MemoryImages, MemoryViews
from gkl_vl.errors import UserError
from gkl_vl.export import hub
from gkl_vl.export.cards import ClassifierCard
from gkl_vl.losses.consistency import ClassThresholds, Consistency, Method, SemiSupervised
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.semi_supervised import SemiSupervisedTraining
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.classifiers import conclude, evaluate_on, overridden, require_same_classes
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import layered_adamw, sgd, warmup_fixmatch
from gkl_vl.training.run import refuse_shards, start


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published experiment."""

    data: str | None
    """None = it must be given."""
    num_labels: int
    """Of all classes together."""
    unlabelled_split: str | None = None
    """With more images without labels, beside the training split's own."""
    image_size: int
    upside_down: bool = False
    """Images have no up and down."""
    model: str
    steps: int = 204_800
    warmup_steps: int = 5120
    batch_size: int = 8
    """Labelled images, of all processes together."""
    mu: int = 1
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float
    layer_decay: float = 1.0
    wd: float = 5e-4
    ema_decay: float = 0.0
    """Mean Teacher's is 0.999 at least."""
    expected: dict[str, float]
    """Published top-1 in percent, by `arm`."""


def arm(method: Method, consistency: Consistency) -> str:
    """What is trained, in words."""
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
# Of the IKL paper, which ran them again; there Mean Teacher leaves out what is not sure.
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a classifier on few labels. None = what the preset, or the method, says."""

    preset: str = "cifar10-250"
    """A published setting, SET-LABELS: see `PRESETS`."""
    method: Method = "fixmatch"
    """What makes pseudo-labels: the model, with one threshold or one a class, or the average of its weights."""
    consistency: Consistency = "gkl"
    """How a strong view is held to the weak view's word; supervised does not read it."""
    data: str | None = None
    """Folder of parquet, CIFAR's or STL-10's files or images, or a Hub dataset, with splits train and test."""
    num_labels: int | None = None
    """Images that keep their label, of all classes together, as many of each."""
    labelled: str | None = None
    """Which ones: a run's labelled.txt, or a .npy of USB's, of CIFAR's own files. None = drawn by --seed."""
    images: int | None = None
    """Use so many training images only, drawn evenly from the classes, with and without label."""
    unlabelled_split: str | None = None
    """A split of --data with more images without labels; STL-10's is called unlabeled."""
    model: str | None = None
    """A name of the CIFAR zoo (wrn_28_2, vit_small_patch2_32, resnet20, ...), timm:NAME, local-dir:path, ..."""
    weights: str | None = None
    """Where the model starts: a file, whose classifier is left out, or timm's `pretrained`. None = random weights."""
    output_dir: Path | None = None
    """The run folder. None = runs/semi_supervised-<time>."""
    steps: int | None = None
    """Optimizer updates."""
    warmup_steps: int | None = None
    """Of the learning rate. None = the preset's share of the steps."""
    batch_size: int | None = None
    """Labelled images per process; None = the preset's, shared out."""
    mu: int | None = None
    """Images without label for each labelled one of a batch."""
    lr: float | None = None
    """Peak learning rate; FixMatch's cosine, which ends at a fifth of it."""
    layer_decay: float | None = None
    """AdamW: the rate of each layer over that of the next one."""
    wd: float | None = None
    """Weight decay; none on biases and norms."""
    precision: Literal["fp32", "amp", "fp16", "amp_bf16", "bf16"] | None = None
    """None = what `accelerate launch` or `accelerate config` say."""
    workers: int = 2
    """Processes that make strong views, per training process."""
    seed: int = 0
    """Of labels, initial weights, order, augmentations, and of what --images draws."""
    threshold: float | None = None
    """Least probability of a pseudo-label that counts. None = 0.95, and 0 for Mean Teacher with mse."""
    unlabelled_weight: float | None = None
    """Of the consistency term (paper: lambda_u). None = 1, and 50 for mse."""
    temperature: float | None = None
    """Sharpens the weak view's softmax: kl, ikl, gkl."""
    soft_ce_weight: float | None = None
    """GKL, IKL: weight of the soft cross entropy (paper: beta)."""
    wmse_weight: float | None = None
    """GKL, IKL: weight of the weighted MSE of logit differences (paper: alpha)."""
    gamma: float | None = None
    """GKL: exponent of the classes' weights."""
    class_prior: bool = False
    """GKL, IKL: weigh classes by what was thought of the pseudo-label's class in the pass before, where it was sure."""
    ema_decay: float | None = None
    """Average of the weights, per step, that is evaluated and exported, and Mean Teacher's teacher; 0 = none."""
    eval_every_steps: int = 5000
    """0 = at the end only."""
    checkpoint_every_steps: int = 5000
    """0 = at the end only."""
    resume: str | None = None
    """`latest`, or a checkpoint folder; with the flags of the run that is taken up."""
    push_to_hub: str | None = None
    """org/name: upload the exported folder when done."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers besides results.jsonl."""
    allow_pickle: bool = False
    """Read weights stored as pickles (.pth, .pt), with weights_only=True; USB's are."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    if config.push_to_hub:
        hub.check_repo_id(config.push_to_hub)
    preset, settings = find_preset(config)
    run, accelerator, asked = start(config, recipe="semi_supervised")
    refuse_shards(accelerator, "pseudo-labels")
    set_seed(config.seed)  # the same initial weights on every rank
    data = open_data(config, preset)
    student = load_classifier(
        preset.model,
        num_classes=data.train.num_classes,
        weights=config.weights,
        new_head=config.weights is not None,
        allow_pickle=config.allow_pickle,
    )
    student.model.to(memory_format=torch.channels_last)
    average = moving_average(student.model, preset.ema_decay)
    batch_size = config.batch_size or max(preset.batch_size // accelerator.num_processes, 1)
    if not config.resume:  # from here on there is a run
        run.write_json("config.json", asked)
        run.write_text("labelled.txt", labelled_lines(data.labelled, data.train.labels))
    told = title(config, preset, data)
    accelerator.print(
        f"{told} · seed {config.seed} · {accelerator.num_processes} x {accelerator.device.type} · {run.path}"
    )
    objective = SemiSupervisedTraining(
        student=student,
        average=average if config.method == "mean-teacher" else None,
        settings=settings,
        thresholds=find_thresholds(settings, data),
        prior=EpochPrior(data.train.num_classes, settings.weight_temperature) if has_prior(settings) else None,
    )
    set_seed(config.seed, device_specific=True)  # from here on each rank draws its own
    test_views = MemoryViews(images=in_memory(data.test, size=preset.image_size), seed=0)
    exported = fit(
        accelerator=accelerator,
        model=student.model,
        objective=objective,
        make_optimizer=make_optimizer(preset),
        learning_rate=partial(warmup_fixmatch, lr=preset.lr, steps=preset.steps, warmup_steps=preset.warmup_steps),
        make_loader=partial(
            make_loader, config, preset, data, batch_size, accelerator.process_index, accelerator.num_processes
        ),
        run=run,
        config=FitConfig(
            steps=preset.steps,
            grad_clip_norm=float("inf"),
            log_every_steps=min(50, max(preset.steps // 40, 1)),
            eval_every_steps=config.eval_every_steps,
            checkpoint_every_steps=config.checkpoint_every_steps,
        ),
        evaluate=lambda model: [
            {"model": "student"}
            | evaluate_on(data.test, test_views, {}, accelerator.device, replace(student, model=model))
        ],
        after_step=lambda: None,
        average=average,
        checkpoint=run.find_checkpoint(config.resume) if config.resume else None,
    )
    if accelerator.is_main_process:
        finish(config, preset, run, replace(student, model=exported), data, told)
    accelerator.end_training()


# ---- before ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on."""

    train: LabelledSet
    labelled: Int64[Tensor, " m"]
    """Numbers of the images that keep their label."""
    pool: UInt8[Tensor, "M 3 h w"]
    """Images without label: all of the training split, and then those of --unlabelled-split."""
    hidden_labels: Int64[Tensor, " M"]
    test: LabelledSet


def find_preset(config: Config) -> tuple[Preset, SemiSupervised]:
    """The published setting and the method's, with what the flags say otherwise."""
    preset = cli.named(PRESETS, config.preset, flag="--preset")
    cli.require_positive(config, "steps", "batch_size", "images")
    steps = config.steps or preset.steps
    preset = replace(preset, warmup_steps=round(preset.warmup_steps * steps / preset.steps))
    if config.method == "mean-teacher":
        preset = replace(preset, ema_decay=max(preset.ema_decay, MEAN_TEACHER_DECAY))
    preset = overridden(preset, config, but=("batch_size",))  # there of all processes together
    if preset.mu < 1 and config.method != "supervised":
        raise UserError(
            f"--mu {preset.mu} leaves the batch of unlabelled images empty: at least 1, or --method supervised"
        )
    if config.method == "mean-teacher" and not preset.ema_decay:
        raise UserError("--method mean-teacher learns from an average of the weights: --ema-decay 0 leaves it none")
    return preset, overridden(find_settings(config, preset.steps), config)


def find_settings(config: Config, steps: int) -> SemiSupervised:
    """As published: Mean Teacher's own term counts every image, with a weight that grows over 0.4 of the training."""
    settings = SemiSupervised(method=config.method, consistency=config.consistency)
    if config.consistency == "mse":
        settings = replace(settings, unlabelled_weight=50)
        if config.method == "mean-teacher":
            settings = replace(settings, threshold=0, rampup_steps=round(0.4 * steps))
    return settings


def open_data(config: Config, preset: Preset) -> Data:
    """Images and labels, all in memory."""
    if preset.data is None:
        raise UserError(f"--preset {config.preset} has no data of its own: give --data, see recipes/README.md")
    train, test = (open_labelled(preset.data, split) for split in ("train", "test"))
    require_same_classes(train, test)
    if config.images is not None:
        train = balanced_subset(train, config.images, config.seed)
    if config.labelled is None:
        labelled = draw_labelled(train, num_labels=preset.num_labels, seed=config.seed)
    else:
        labelled = read_labelled(config.labelled, train)
        if config.num_labels not in (None, len(labelled)):
            raise UserError(
                f"--num-labels {config.num_labels}, but --labelled {config.labelled!r} names {len(labelled)}: give one"
            )
    pool, hidden = in_memory(train, size=preset.image_size), train.labels
    if preset.unlabelled_split is not None and config.method != "supervised":
        more = in_memory(open_image_set(preset.data, preset.unlabelled_split), size=preset.image_size)
        pool, hidden = torch.cat([pool, more]), torch.cat([hidden, torch.full((len(more),), UNKNOWN)])
    return Data(train, labelled, pool, hidden, test)


def has_prior(settings: SemiSupervised) -> bool:
    return settings.class_prior and settings.consistency in ("ikl", "gkl") and settings.method != "supervised"


def find_thresholds(settings: SemiSupervised, data: Data) -> ClassThresholds | None:
    if settings.method != "flexmatch":
        return None
    return ClassThresholds(num_images=len(data.pool), num_classes=data.train.num_classes, threshold=settings.threshold)


def make_optimizer(preset: Preset) -> Callable[[nn.Module], torch.optim.Optimizer]:
    if preset.optimizer == "adamw":
        return partial(layered_adamw, lr=preset.lr, wd=preset.wd, layer_decay=preset.layer_decay)
    return partial(sgd, lr=preset.lr, wd=preset.wd, nesterov=True, norms_decay=False)


def make_loader(
    config: Config,
    preset: Preset,
    data: Data,
    batch_size: int,
    rank: int,
    world_size: int,
    position: dict[str, Any] | None,
) -> SemiSupervisedLoader:
    weak = MemoryViews(
        images=data.pool,
        seed=config.seed,
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
            seed=config.seed,
            num_workers=config.workers,
            pin_memory=torch.cuda.is_available(),
        ),
        hidden_labels=data.hidden_labels,
        batch_size=batch_size,
        mu=0 if config.method == "supervised" else preset.mu,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        position=position,
    )


def title(config: Config, preset: Preset, data: Data) -> str:
    """The run in a line."""
    without = "" if config.method == "supervised" else f" and {len(data.pool):,} images without"
    by = arm(config.method, config.consistency)
    return f"{preset.model} by {by} · {len(data.labelled):,} labels{without} · {preset.steps:,} steps"


# ---- after -------------------------------------------------------------------------------------------------------


def finish(config: Config, preset: Preset, run: RunFolder, student: Any, data: Data, told: str) -> None:
    """Export, picture, table. Main process."""
    by = arm(config.method, config.consistency)
    card = ClassifierCard(
        student=student.name,
        made=f"trained by {by} on {len(data.labelled):,} labels",
        teacher=None,
        data=data.train.name,
        command=run.config()["command"],
        commit=run.config()["commit"],
        metrics=[r for r in run.records() if "model" in r and r["step"] == preset.steps],
        steps=preset.steps,
        seed=config.seed,
        repo_id=config.push_to_hub,
    )
    expected = preset.expected.get(by)
    line = f"Published for {config.preset} by {by}: {expected:.2f} % top-1" if expected else ""
    conclude(run=run, student=student, teacher=None, card=card, title=told, published=line)


if __name__ == "__main__":
    cli.run(main, Config)
