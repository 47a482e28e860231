"""What the label recipes share: their flags, their data, and the run from a published pair to an exported student."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed

from gkl_vl import cli
from gkl_vl.data.augment import imagenet_augmentation, imagenet_center
from gkl_vl.data.labelled import LabelledSet, balanced_subset, in_memory, long_tailed, open_labelled, shot_groups
from gkl_vl.data.loaders import LabelledLoader, batches_per_epoch
from gkl_vl.data.views import DiskViews, MemoryViews, Views
from gkl_vl.errors import UserError
from gkl_vl.export import hub
from gkl_vl.export.cards import ClassifierCard
from gkl_vl.losses.labels import Distillation
from gkl_vl.models.classifiers import Classifier, load_classifier
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.labels import LabelKd
from gkl_vl.teachers.online import LabelTeacher, online_label_teacher
from gkl_vl.teachers.store import store_logits, stored_label_teacher
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.classifiers import conclude, evaluate_on, overridden, require_same_classes
from gkl_vl.training.engine import FitConfig, fit
from gkl_vl.training.optim import multi_step, sgd, warmup_cosine
from gkl_vl.training.run import start


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A published experiment: who learns from whom, how long, and with which settings of each method."""

    teacher: str
    """As `load_classifier` takes it, like the student."""
    student: str
    teacher_weights: str | None = None
    """`pretrained`, or None: the user brings them."""
    epochs: int
    batch_size: int
    """Of all processes together."""
    lr: float
    wd: float
    milestones: tuple[float, ...] = ()
    """Epochs from which on the rate is a tenth; none = a cosine to 0."""
    methods: dict[str, Distillation]
    expected: dict[str, float]
    """Published top-1 in percent: `teacher`, `student` (labels alone), and methods."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What tells one label recipe from another."""

    name: str
    pairs: dict[str, Pair]
    data: str | None
    """The default of --data; None = it must be given."""
    splits: tuple[str, str]
    """For training and for evaluation."""
    image_size: int | None
    """None = small images, kept in memory, cropped and flipped; else random parts of images on disk, so many pixels."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Distil a classifier. None = what the pair says."""

    pair: str
    """A published pair of the recipe's table: models, length, rate and each method's settings."""
    method: Literal["ce", "kd", "kd-ls", "dkd", "dist", "dkl", "ikl", "gkl"] = "gkl"
    """ce = labels alone; kd-ls = KD on standardised logits."""
    data: str | None = None
    """Folder of parquet, CIFAR's files or images, shards `a-{000..9}.tar`, a list `x.txt`, or a Hub dataset."""
    eval_data: str | None = None
    """Where the evaluation split is, if not in --data; always needed beside shards and lists."""
    root: str | None = None
    """Where the paths of a list begin. None = its own folder."""
    columns: tuple[str, str] | None = None
    """Names of the image and label column, where they are not the usual ones."""
    images: int | None = None
    """Train on so many images only, drawn evenly from the classes."""
    imbalance: float | None = None
    """Make the training set long-tailed: images of the most frequent class over those of the rarest."""
    teacher: str | None = None
    """A name of the CIFAR zoo, timm:NAME, torchvision:NAME, hf-hub:org/repo or local-dir:path."""
    teacher_weights: str | None = None
    """A file of weights, or `pretrained` for timm and torchvision."""
    student: str | None = None
    """As --teacher."""
    student_weights: str | None = None
    """Where the student starts, as --teacher-weights. None = random weights."""
    output_dir: Path | None = None
    """The run folder. None = runs/RECIPE-<time>."""
    epochs: int | None = None
    """Passes over the data; the published milestones move along."""
    steps: int | None = None
    """Stop after so many updates of a schedule that long, in place of --epochs."""
    batch_size: int | None = None
    """Per process; None = the pair's, shared out."""
    lr: float | None = None
    """Peak learning rate of SGD with momentum 0.9."""
    wd: float | None = None
    """Weight decay, of everything."""
    precision: Literal["fp32", "amp", "fp16", "amp_bf16", "bf16"] | None = None
    """None = what `accelerate launch` or `accelerate config` say."""
    workers: int = 2
    """Processes that read images from disk, per training process."""
    seed: int = 0
    """Of initial weights, order, augmentations, and of what --images and --imbalance draw."""
    eval_every_epochs: int = 10
    """0 = at the end only."""
    checkpoint_every_epochs: int = 10
    """0 = at the end only."""
    resume: str | None = None
    """`latest`, or a checkpoint folder; with the flags of the run that is taken up."""
    ce_weight: float | None = None
    """Weight of the cross entropy with the labels."""
    soft_ce_weight: float | None = None
    """GKL, IKL, DKL: weight of the soft cross entropy (paper: beta)."""
    wmse_weight: float | None = None
    """GKL, IKL, DKL: weight of the weighted MSE of logit differences (paper: alpha)."""
    gamma: float | None = None
    """GKL: exponent of the classes' weights."""
    temperature: float | None = None
    """Of the softmaxes that are compared."""
    weight_temperature: float | None = None
    """GKL, IKL, DKL: of the softmax that the weights or the class prior come from."""
    class_prior: bool | None = None
    """GKL, IKL: weigh classes by what the teacher thought of the label's class in the epoch before."""
    warmup_epochs: int | None = None
    """The distillation grows over these."""
    stored_views: int = 0
    """Ask the teacher about so many views of each image once, and train on these; 0 = ask it about every batch."""
    stored_top_k: int | None = None
    """Logits that are stored of each view; None = all."""
    compile: bool = False
    """torch.compile the student."""
    push_to_hub: str | None = None
    """org/name: upload the exported folder when done."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers besides results.jsonl."""
    allow_pickle: bool = False
    """Read weights stored as pickles (.pth, .pt), with weights_only=True; mdistiller's teachers are."""
    debug: bool = False
    """Show the traceback of an error."""


def train_classifier(config: LabelConfig, *, recipe: Recipe) -> None:
    """A run from flags to an exported student."""
    if config.push_to_hub:
        hub.check_repo_id(config.push_to_hub)
    pair = find_pair(recipe, config)
    settings = find_settings(pair, config)
    run, accelerator, asked = start(config, recipe=recipe.name)
    set_seed(config.seed)  # the same initial weights on every rank
    train, test = open_data(recipe, config)
    teacher = None if config.method == "ce" else load_teacher(pair, config, train, accelerator.device)
    student = load_classifier(
        pair.student,
        num_classes=train.num_classes,
        weights=config.student_weights,
        allow_pickle=config.allow_pickle,
    )
    student.model.to(memory_format=torch.channels_last)
    batch_size, per_epoch, steps = count_steps(pair, config, len(train), accelerator.num_processes)
    if not config.resume:  # from here on there is a run
        run.write_json("config.json", asked)
    told = "" if teacher is None else f" from {pair.teacher} by {config.method}"
    title = f"{pair.student}{told} · {len(train):,} images · {steps:,} steps of {batch_size} · seed {config.seed}"
    accelerator.print(f"{title} · {accelerator.num_processes} x {accelerator.device.type} · {run.path}")
    views = make_views(recipe, config, train)
    test_views = make_views(recipe, config, test)
    with accelerator.main_process_first():  # the others find the file
        ask = make_teacher(config, teacher, views, train, accelerator.device)
    if config.compile:
        student.model.compile()
    has_prior = teacher is not None and config.method in ("gkl", "ikl") and settings.class_prior
    prior = EpochPrior(train.num_classes, settings.weight_temperature) if has_prior else None
    set_seed(config.seed, device_specific=True)  # from here on each rank draws its own

    def make_loader(position: dict[str, Any] | None) -> LabelledLoader:
        return LabelledLoader(
            views=views,
            labels=train.labels,
            batch_size=batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_views=config.stored_views or None,
            position=position,
        )

    counts = train.counts()
    groups = shot_groups(counts) if len(counts.unique()) > 1 else {}
    evaluate = partial(evaluate_on, test, test_views, groups, accelerator.device)
    exported = fit(
        accelerator=accelerator,
        model=student.model,
        objective=LabelKd(student=student, teacher=ask, settings=settings, prior=prior),
        make_optimizer=partial(sgd, lr=pair.lr, wd=pair.wd),
        learning_rate=lr_schedule(pair, steps),
        make_loader=make_loader,
        run=run,
        config=FitConfig(
            steps=steps,
            grad_clip_norm=float("inf"),
            log_every_steps=min(50, per_epoch),
            eval_every_steps=config.eval_every_epochs * per_epoch,
            checkpoint_every_steps=config.checkpoint_every_epochs * per_epoch,
        ),
        evaluate=lambda model: [{"model": "student"} | evaluate(replace(student, model=model))],
        after_step=lambda: None,
        checkpoint=run.find_checkpoint(config.resume) if config.resume else None,
    )
    if accelerator.is_main_process:
        if teacher is not None and not any(record.get("model") == "teacher" for record in run.records()):
            run.log({"step": steps, "model": "teacher"} | evaluate(teacher))
        finish(config, pair, run, replace(student, model=exported), teacher, train, steps, title)
    accelerator.end_training()


# ---- before ------------------------------------------------------------------------------------------------------


def find_pair(recipe: Recipe, config: LabelConfig) -> Pair:
    """The published pair, with what the flags say otherwise."""
    pair = cli.named(recipe.pairs, config.pair, flag="--pair")
    if config.steps is not None and config.epochs is not None:
        raise UserError(f"--steps {config.steps} and --epochs {config.epochs} say the same twice: give one")
    if config.stored_views < 0:
        raise UserError(f"--stored-views {config.stored_views} must be at least 1, or 0 for none")
    cli.require_positive(config, "steps", "epochs", "batch_size", "images", "stored_top_k")
    if config.epochs is not None:  # the milestones keep their share of the way
        moved = tuple(epoch * config.epochs / pair.epochs for epoch in pair.milestones)
        pair = replace(pair, milestones=moved, epochs=config.epochs)
    if config.teacher is not None:
        pair = replace(pair, teacher=config.teacher, teacher_weights=None)
    return overridden(pair, config, but=("batch_size",))  # there of all processes together


def find_settings(pair: Pair, config: LabelConfig) -> Distillation:
    """The method's published settings, with what the flags say otherwise."""
    if config.method == "ce":
        return Distillation(method="ce")
    of_methods = {"ikl": pair.methods["gkl"], "dkl": pair.methods["gkl"]} | pair.methods
    return overridden(replace(of_methods[config.method], method=config.method), config)


def count_steps(pair: Pair, config: LabelConfig, num_images: int, num_processes: int) -> tuple[int, int, int]:
    """Images in a batch of a process, batches in an epoch, and updates of the run."""
    batch_size = config.batch_size or max(pair.batch_size // num_processes, 1)
    per_epoch = batches_per_epoch(num_images, batch_size, num_processes)
    steps = config.steps or pair.epochs * per_epoch
    if config.class_prior and steps <= per_epoch:
        raise UserError(
            f"--class-prior is collected in an epoch and used in the next, and {steps} steps are one epoch at most "
            f"({per_epoch} steps): train longer, or leave it out"
        )
    return batch_size, per_epoch, steps


def open_data(recipe: Recipe, config: LabelConfig) -> tuple[LabelledSet, LabelledSet]:
    """For training and for evaluation."""
    source = config.data or recipe.data
    if source is None:
        raise UserError(f"{recipe.name} has no data of its own: give --data and --eval-data")
    if config.eval_data is None and source.endswith((".tar", ".txt")):
        raise UserError(f"--data {source} is one split: name the other with --eval-data")
    open_split = partial(open_labelled, root=config.root, columns=config.columns)
    train = open_split(source, recipe.splits[0])
    test = open_split(config.eval_data or source, recipe.splits[1])
    require_same_classes(train, test)
    if config.imbalance is not None:
        train = long_tailed(train, ratio=config.imbalance, seed=config.seed)
    if config.images is not None:
        train = balanced_subset(train, config.images, config.seed)
    return train, test


def load_teacher(pair: Pair, config: LabelConfig, train: LabelledSet, device: torch.device) -> Classifier:
    """Frozen, in evaluation mode, on its device."""
    carries = pair.teacher.startswith(("hf-hub:", "local-dir:"))
    if pair.teacher_weights is None and not carries:
        raise UserError(
            f"teacher {pair.teacher!r} comes without weights: give --teacher-weights, see the recipe's text"
        )
    teacher = load_classifier(
        pair.teacher,
        num_classes=train.num_classes,
        weights=pair.teacher_weights,
        allow_pickle=config.allow_pickle,
    )
    teacher.model.requires_grad_(False).eval().to(device).to(memory_format=torch.channels_last)
    return teacher


def make_views(recipe: Recipe, config: LabelConfig, data: LabelledSet) -> Views:
    if recipe.image_size is None:
        return MemoryViews(images=in_memory(data), seed=config.seed)
    return DiskViews(
        data=data,
        augment=imagenet_augmentation(recipe.image_size),
        plain=imagenet_center(recipe.image_size),
        seed=config.seed,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
    )


def make_teacher(
    config: LabelConfig, teacher: Classifier | None, views: Views, train: LabelledSet, device: torch.device
) -> LabelTeacher | None:
    """What says the teacher's logits of a batch: the teacher itself, or what it said once."""
    if teacher is None:
        return None
    if not config.stored_views:
        return online_label_teacher(teacher)
    stored = store_logits(
        classifier=teacher,
        views=views,
        labels=train.labels,
        contents=_contents(train, views),
        num_views=config.stored_views,
        top_k=config.stored_top_k,
        device=device,
    )
    return stored_label_teacher(stored, train.num_classes)


def _contents(data: LabelledSet, views: Views) -> str:
    """What tells the images from others: their bytes where they are at hand, else the name of their source."""
    if isinstance(views, MemoryViews):
        return hashlib.sha256(views.images.numpy().tobytes()).hexdigest()
    return data.name


def lr_schedule(pair: Pair, steps: int) -> Callable[[int], float]:
    """The pair's schedule over so many updates."""
    if not pair.milestones:
        return partial(warmup_cosine, lr=pair.lr, steps=steps, warmup_steps=0)
    return partial(multi_step, lr=pair.lr, milestones=tuple(round(e / pair.epochs * steps) for e in pair.milestones))


def finish(
    config: LabelConfig,
    pair: Pair,
    run: RunFolder,
    student: Classifier,
    teacher: Classifier | None,
    train: LabelledSet,
    steps: int,
    title: str,
) -> None:
    """Export, pictures, tables. Main process."""
    final = [r for r in run.records() if "model" in r and r["step"] == steps]
    card = ClassifierCard(
        student=student.name,
        made="trained on labels alone" if teacher is None else f"distilled from `{pair.teacher}` by {config.method}",
        teacher=None if teacher is None else pair.teacher,
        data=train.name,
        command=run.config()["command"],
        commit=run.config()["commit"],
        metrics=final,
        steps=steps,
        seed=config.seed,
        repo_id=config.push_to_hub,
    )
    published = pair.expected.get("student" if config.method == "ce" else config.method)
    told = f"Published for {config.pair} by {config.method}: {published:.2f} % top-1" if published else ""
    conclude(run=run, student=student, teacher=teacher, card=card, title=title, published=told)
