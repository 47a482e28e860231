"""Label distillation, for its recipes: flags, data, and the run from a published pair to an exported student."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
import tyro

from gkl_vl import cli
from gkl_vl.data.augment import imagenet_augmentation, imagenet_center
from gkl_vl.data.identity import images_identity
from gkl_vl.data.labelled import LabelledSet, in_memory, open_labelled, refuse_unused_options
from gkl_vl.data.loaders import LabelledLoader, batches_per_epoch
from gkl_vl.data.subsets import balanced_subset, long_tailed, shot_groups
from gkl_vl.data.views import DiskViews, MemoryViews, Views
from gkl_vl.errors import UserError
from gkl_vl.losses.labels import Distillation
from gkl_vl.models.classifiers import Classifier, load_classifier
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.labels import LabelKd
from gkl_vl.teachers.online import LabelTeacher, online_label_teacher
from gkl_vl.teachers.store import store_logits, stored_label_teacher
from gkl_vl.training.classifiers import (
    GklFlags,
    evaluate_classifier,
    finish,
    in_order_of,
    in_training_order,
    overridden,
)
from gkl_vl.training.engine import FitConfig, fit
from gkl_vl.training.optim import multi_step, sgd, warmup_cosine
from gkl_vl.training.run import EpochIntervals, Run, RunFlags

Method = Literal["ce", "kd", "kd-ls", "dkd", "dist", "dkl", "ikl", "gkl"]
_KD = ("ce_weight", "warmup_epochs", "temperature")
_DKL = (*_KD, "soft_ce_weight", "wmse_weight", "weight_temperature")
LOSS_FLAGS: dict[Method, tuple[str, ...]] = {
    "ce": (),
    **dict.fromkeys(("kd", "kd-ls", "dkd", "dist"), _KD),
    "dkl": _DKL,
    "ikl": (*_DKL, "class_prior"),
    "gkl": (*_DKL, "class_prior", "gamma"),
}
"""The flags of `LabelLoss` that each method uses."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A published experiment: teacher, student, schedule, and the settings of each method."""

    teacher: str
    """As `load_classifier` takes it, like the student."""
    student: str
    teacher_weights: str | None = None
    """`pretrained`, or None: --teacher-weights must name them."""
    epochs: int
    batch_size: int
    """Images per update, of all processes together."""
    lr: float
    wd: float
    milestones: tuple[float, ...] = ()
    """Epochs at which the learning rate falls to a tenth; none = a cosine to 0."""
    methods: dict[str, Distillation]
    expected: dict[str, float]
    """Published top-1 in percent: `teacher`, `student` (labels alone), and methods."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What distinguishes one label recipe from another."""

    name: str
    pairs: dict[str, Pair]
    data: str | None
    """Default of --data; None = it must be given."""
    splits: tuple[str, str]
    """For training and for evaluation."""
    image_size: int | None
    """None = small images in memory, cropped and flipped; else random crops of images on disk, resized to this size."""


# ---- flags -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LabelModels:
    """Teacher and student. None = the pair's."""

    teacher: str | None = None
    """A name of the CIFAR zoo, timm:NAME, torchvision:NAME, hf-hub:org/repo or local-dir:path."""
    teacher_weights: str | None = None
    """A file of weights, or `pretrained` for timm and torchvision."""
    student: str | None = None
    """As --teacher."""
    student_weights: str | None = None
    """Initial weights of the student, as --teacher-weights. None = random weights."""
    compile: bool = False
    """Compile the student with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class LabelData:
    """Images for training and evaluation, and stored teacher logits."""

    data: str | None = None
    """Folder of parquet, CIFAR's files or images, shards `a-{000..9}.tar`, a list `x.txt`, or a Hub dataset."""
    eval_data: str | None = None
    """Source of the evaluation split, if not in --data; always needed beside shards and lists."""
    root: str | None = None
    """Folder that the paths of a list are relative to. None = the list's own folder."""
    columns: tuple[str, str] | None = None
    """Image and label column of a table, if not the usual ones."""
    images: int | None = None
    """Train on so many images only, drawn evenly from the classes."""
    imbalance: float | None = None
    """Make the training set long-tailed: images of the most frequent class over those of the rarest."""
    stored_views: int = 0
    """Train on so many views of each image, with teacher logits stored once; 0 = new views, an online teacher."""
    stored_top_k: int | None = None
    """Logits stored of each view; None = all."""


@dataclass(frozen=True, kw_only=True)
class LabelLoss:
    """Settings of the method. None = the pair's."""

    ce_weight: float | None = None
    """Weight of the cross entropy with the labels."""
    gkl: Annotated[GklFlags, tyro.conf.arg(name="")] = GklFlags()
    class_prior: bool | None = None
    """GKL, IKL: weigh classes by the teacher's mean softmax over the label's class in the epoch before."""
    warmup_epochs: int | None = None
    """Epochs over which the distillation term grows linearly."""


@dataclass(frozen=True, kw_only=True)
class LabelOptimisation:
    """Length of the run, batch and optimizer (SGD with momentum 0.9). None = the pair's."""

    epochs: int | None = None
    """Passes over the data; the published milestones scale with it."""
    steps: int | None = None
    """Optimizer updates, in place of --epochs."""
    batch_size: int | None = None
    """Images per process; None = the pair's, divided by the number of processes."""
    lr: float | None = None
    """Peak learning rate."""
    wd: float | None = None
    """Weight decay of all parameters."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Distil a classifier with the settings of a published pair."""

    pair: str
    """A published pair of the recipe's table: models, schedule and each method's settings."""
    method: Method = "gkl"
    """ce = labels alone; kd-ls = KD on standardised logits."""
    model: LabelModels = LabelModels()
    data: LabelData = LabelData()
    loss: LabelLoss = LabelLoss()
    optimisation: LabelOptimisation = LabelOptimisation()
    run: RunFlags = RunFlags()
    evaluation: EpochIntervals = EpochIntervals()


# ---- the run -----------------------------------------------------------------------------------------------------


def train_classifier(config: LabelConfig, *, recipe: Recipe) -> None:
    """Trains a student from flags to the exported folder."""
    pair = find_pair(recipe, config)
    settings = find_settings(pair, config)
    run = Run(config, recipe=recipe.name)
    train, test = open_data(recipe, config)
    teacher = None if config.method == "ce" else load_teacher(pair, config, train, run.device)
    student = load_classifier(
        pair.student,
        num_classes=train.num_classes,
        weights=config.model.student_weights,
        allow_pickle=config.run.allow_pickle,
    )
    train, test = in_order_of({"--teacher": teacher, "--student": student}, train, test)
    student.model.to(memory_format=torch.channels_last)
    batch_size, per_epoch, steps = count_steps(pair, config, len(train), run.num_processes)
    origin = "" if teacher is None else f" from {pair.teacher} by {config.method}"
    run.begin(f"{pair.student}{origin} · {len(train):,} images · {steps:,} steps of {batch_size}")
    views = make_views(recipe, config.run, train)
    test_views = make_views(recipe, config.run, test)
    with run.accelerator.main_process_first():  # the others find the file
        teach = make_teacher(config.data, teacher, views, train, run.device)
    if config.model.compile:
        student.model.compile()
    has_prior = teacher is not None and config.method in ("gkl", "ikl") and settings.class_prior
    prior = EpochPrior(train.num_classes, settings.gkl.weight_temperature) if has_prior else None
    run.seed_ranks()
    counts = train.counts()
    groups = shot_groups(counts) if len(counts.unique()) > 1 else {}
    evaluate = partial(evaluate_classifier, test, test_views, groups, run.device)
    exported = fit(
        accelerator=run.accelerator,
        model=student.model,
        objective=LabelKd(student=student, teacher=teach, settings=settings, prior=prior),
        make_optimizer=partial(sgd, lr=pair.lr, wd=pair.wd),
        learning_rate=lr_schedule(pair, steps),
        make_loader=lambda position: LabelledLoader(
            views=views,
            labels=train.labels,
            batch_size=batch_size,
            seed=config.run.seed,
            rank=run.accelerator.process_index,
            world_size=run.num_processes,
            num_views=config.data.stored_views or None,  # 0 = a new view in each epoch
            position=position,
        ),
        run=run.folder,
        config=FitConfig(steps=steps, log_every_steps=min(50, per_epoch), **config.evaluation.in_steps(per_epoch)),
        evaluate=lambda model: [{"model": "student"} | evaluate(replace(student, model=model))],
        checkpoint=run.checkpoint(),
        stop=run.stop,
    )
    if run.accelerator.is_main_process:
        if teacher is not None and not any(record.get("model") == "teacher" for record in run.folder.records()):
            run.folder.log({"step": steps, "model": "teacher"} | evaluate(teacher))
        finish(
            run,
            student=replace(student, model=exported),
            teacher=None if teacher is None else (pair.teacher, teacher),
            made=made(pair, config),
            data=train,
            steps=steps,
            published=published(pair, config),
        )
    run.end()


def find_pair(recipe: Recipe, config: LabelConfig) -> Pair:
    """The published pair with the overrides of the flags."""
    pair, length = cli.named(recipe.pairs, config.pair, flag="--pair"), config.optimisation
    if length.steps is not None and length.epochs is not None:
        raise UserError(f"--steps {length.steps} and --epochs {length.epochs} exclude each other: give one")
    refuse_unused_flags(config)
    if length.epochs is not None:  # the milestones keep their share of the training
        moved = tuple(epoch * length.epochs / pair.epochs for epoch in pair.milestones)
        pair = replace(pair, milestones=moved, epochs=length.epochs)
    if config.model.teacher is not None:
        pair = replace(pair, teacher=config.model.teacher, teacher_weights=None)
    flags = cli.flat(config)
    del flags["batch_size"]  # per process; the pair's is of all processes together
    return overridden(pair, flags)


def refuse_unused_flags(config: LabelConfig) -> None:
    """Raises: UserError for a flag that the run would not use."""
    flags = cli.flat(config)
    unused = [name for name in LOSS_FLAGS["gkl"] if name not in LOSS_FLAGS[config.method]]
    if config.method == "ce":
        unused += ["teacher", "teacher_weights", "stored_top_k"]
    cli.refuse_unused(flags, unused, f"has no effect with --method {config.method}")
    if not config.data.stored_views:
        cli.refuse_unused(flags, ["stored_top_k"], "has no effect without --stored-views")


def find_settings(pair: Pair, config: LabelConfig) -> Distillation:
    """The published settings of the method with the overrides of the flags."""
    if config.method == "ce":
        return Distillation(method="ce")
    of_methods = {"ikl": pair.methods["gkl"], "dkl": pair.methods["gkl"]} | pair.methods
    return overridden(replace(of_methods[config.method], method=config.method), cli.flat(config))


def count_steps(pair: Pair, config: LabelConfig, num_images: int, num_processes: int) -> tuple[int, int, int]:
    """Images per batch and process, batches per epoch, updates of the run."""
    batch_size = config.optimisation.batch_size
    if batch_size is None:
        batch_size = max(pair.batch_size // num_processes, 1)
    per_epoch = batches_per_epoch(num_images, batch_size, num_processes)
    steps = pair.epochs * per_epoch if config.optimisation.steps is None else config.optimisation.steps
    if config.loss.class_prior and steps <= per_epoch:
        raise UserError(
            f"--class-prior is collected in an epoch and used in the next, and {steps} steps are one epoch at most "
            f"({per_epoch} steps): train longer, or leave it out"
        )
    return batch_size, per_epoch, steps


def open_data(recipe: Recipe, config: LabelConfig) -> tuple[LabelledSet, LabelledSet]:
    """The sets for training and for evaluation."""
    flags = config.data
    source = recipe.data if flags.data is None else flags.data
    if source is None:
        raise UserError(f"{recipe.name} has no data of its own: give --data and --eval-data")
    if flags.eval_data is None and source.endswith((".tar", ".txt")):
        raise UserError(f"--data {source} is one split: name the other with --eval-data")
    sources = [source, source if flags.eval_data is None else flags.eval_data]
    refuse_unused_options(list(dict.fromkeys(sources)), root=flags.root, columns=flags.columns)
    open_split = partial(open_labelled, root=flags.root, columns=flags.columns)
    train, test = (open_split(*one) for one in zip(sources, recipe.splits, strict=True))
    test = in_training_order(test, train)
    if flags.imbalance is not None:
        train = long_tailed(train, ratio=flags.imbalance, seed=config.run.seed)
    if flags.images is not None:
        train = balanced_subset(train, flags.images, config.run.seed)
    return train, test


def load_teacher(pair: Pair, config: LabelConfig, train: LabelledSet, device: torch.device) -> Classifier:
    """The teacher, frozen, in evaluation mode, on its device."""
    has_weights = pair.teacher.startswith(("hf-hub:", "local-dir:"))
    if pair.teacher_weights is None and not has_weights:
        raise UserError(
            f"teacher {pair.teacher!r} comes without weights: give --teacher-weights, see the recipe's text"
        )
    teacher = load_classifier(
        pair.teacher,
        num_classes=train.num_classes,
        weights=pair.teacher_weights,
        allow_pickle=config.run.allow_pickle,
    )
    teacher.model.requires_grad_(False).eval().to(device).to(memory_format=torch.channels_last)
    return teacher


def make_views(recipe: Recipe, flags: RunFlags, data: LabelledSet) -> Views:
    """Augmented and plain views of a set, as the recipe prepares its images."""
    if recipe.image_size is None:
        return MemoryViews(images=in_memory(data), seed=flags.seed)
    return DiskViews(
        data=data,
        augment=imagenet_augmentation(recipe.image_size),
        plain=imagenet_center(recipe.image_size),
        seed=flags.seed,
        num_workers=flags.workers,
        pin_memory=torch.cuda.is_available(),
    )


def make_teacher(
    flags: LabelData, teacher: Classifier | None, views: Views, train: LabelledSet, device: torch.device
) -> LabelTeacher | None:
    """The teacher's logits of a batch: computed, or read from the store."""
    if teacher is None:
        return None
    if not flags.stored_views:
        return online_label_teacher(teacher)
    stored = store_logits(
        classifier=teacher,
        views=views,
        labels=train.labels,
        contents=_contents(train, views),
        num_views=flags.stored_views,
        top_k=flags.stored_top_k,
        device=device,
    )
    return stored_label_teacher(stored, train.num_classes)


def _contents(data: LabelledSet, views: Views) -> str:
    """Identity of the images: a hash of the pixels where they are in memory, else of their files or contents."""
    if isinstance(views, MemoryViews):
        digest = hashlib.sha256(f"{tuple(views.images.shape)}".encode())
        digest.update(views.images.numpy().tobytes())
        return digest.hexdigest()
    return images_identity(data.images(index).read for index in range(len(data)))


def lr_schedule(pair: Pair, steps: int) -> Callable[[int], float]:
    """The pair's learning rate over so many updates."""
    if not pair.milestones:
        return partial(warmup_cosine, lr=pair.lr, steps=steps, warmup_steps=0)
    return partial(multi_step, lr=pair.lr, milestones=tuple(round(e / pair.epochs * steps) for e in pair.milestones))


def made(pair: Pair, config: LabelConfig) -> str:
    """For the card: how the student was trained."""
    return "trained on labels alone" if config.method == "ce" else f"distilled from `{pair.teacher}` by {config.method}"


def published(pair: Pair, config: LabelConfig) -> str:
    """A line with the pair's published accuracy; "" where there is none."""
    accuracy = pair.expected.get("student" if config.method == "ce" else config.method)
    return f"Published for {config.pair} by {config.method}: {accuracy:.2f} % top-1" if accuracy else ""
