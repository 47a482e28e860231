"""Training of a CLIP student, for the CLIP recipes: flags, data, the run, evaluation and export.

A recipe opens its data, builds its objective and calls `train_clip`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
import tyro

from gkl_vl import cli
from gkl_vl.data.pair_stream import PairLoader, PairStream, Position
from gkl_vl.data.pairs import open_source
from gkl_vl.data.sources import Source
from gkl_vl.errors import UserError
from gkl_vl.evaluation.sets import BUNDLED, BenchmarkSet, load_benchmark_sets
from gkl_vl.export.cards import ClipCard, RunFacts
from gkl_vl.export.formats import Format, check_formats
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.models.clip import Clip, comes_with_weights
from gkl_vl.models.depth import rate_scales
from gkl_vl.models.lora import save_adapters, trainable_table
from gkl_vl.models.student import OneTower, Student
from gkl_vl.models.towers import Side, clamp_scale
from gkl_vl.objectives.clip import ClipKd, ClipKdWeights, ImageAttack
from gkl_vl.protocols import Objective
from gkl_vl.teachers.bank import Bank
from gkl_vl.teachers.dataset_dr import DatasetDr
from gkl_vl.teachers.online import Teacher, numbered
from gkl_vl.training.clip_mixing import Interpolation, export_mixed, role_of
from gkl_vl.training.clip_models import ClipModels, StudentFlags
from gkl_vl.training.clip_results import STUDENT, add_formats, evaluate_student, finish, log_once, models_beside
from gkl_vl.training.clip_student import is_partly_frozen, load_student, make_model, whole
from gkl_vl.training.clip_teacher import (
    RunTeachers,
    make_teacher,
    open_teachers,
    views_at,
    with_bundled_store,
)
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import clip_adamw, warmup_cosine
from gkl_vl.training.run import Run, RunFlags, StepIntervals

BUNDLED_STEPS = 300
BUNDLED_CAPTIONS = 2
BUNDLED_LOSS = {"mimicry_weight": 0.0, "cross_soft_ce_weight": 2.0, "cross_wmse_weight": 6.0}
LOSS = {"mimicry_weight": 2000.0, "cross_soft_ce_weight": 0.0, "cross_wmse_weight": 0.0}
"""Defaults of the terms against the teacher's embeddings: the best of recipes/README.md for each kind of data."""
BANK_SIZE = 2048
LR = 1e-3
WARMUP_STEPS = 50

# ---- flags -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairData:
    """Image-text pairs."""

    train_data: str | None = None
    """Shards `a-{000..9}.tar::b.tar`, .csv, .tsv, .jsonl, .parquet, FOLDER[:SPLIT], org/name[:SPLIT]. None = emoji."""
    columns: tuple[str, ...] | None = None
    """Image and caption columns (`a.b` = a struct's field); endings or JSON fields in shards. None = the usual ones."""
    caption_lines: bool = False
    """A text file beside an image holds one caption per line. Otherwise all of it is one caption."""
    quoted: bool | None = None
    """CSV, TSV: cells may be in double quotes. None = yes for .csv, no for .tsv: a quote is a letter there."""


@dataclass(frozen=True, kw_only=True)
class CaptionData:
    """Image-text pairs for training."""

    pairs: Annotated[PairData, tyro.conf.arg(name="")] = PairData()
    captions_per_image: int | None = None
    """Captions drawn for an image in a step, all of them its positives. None = 1; bundled data with a teacher: 2."""
    caption_weights: tuple[float, ...] | None = None
    """Share of each of several caption columns in the captions drawn, such as real and synthetic. None = equal."""


@dataclass(frozen=True, kw_only=True)
class CaptionLoss:
    """Weights of the loss terms, and the settings of GKL."""

    contrastive_weight: float = 1.0
    """Weight of the student's own contrastive loss."""
    mimicry_weight: float | None = None
    """Weight of the MSE between normalised embeddings. None = CLIP-KD's 2000; 0 on bundled data."""
    cross_soft_ce_weight: float | None = None
    """Soft CE of the student's images against the teacher's texts and the reverse. None = 0; 2 on bundled data."""
    cross_wmse_weight: float | None = None
    """wMSE of these cross logits; gamma and the temperatures are GKL's. None = 0; 6 on bundled data."""
    bank_size: int | None = None
    """Teacher embeddings that the student is compared with: the last ones, at least the batch. None = 2048."""
    gkl: Annotated[GklSettings, tyro.conf.arg(name="")] = GklSettings(wmse_weight=0.0, gamma=0.5)


@dataclass(frozen=True, kw_only=True)
class ClipOptimisation:
    """Length of the run, batch and optimizer (AdamW)."""

    steps: int | None = None
    """Optimizer updates. None = --epochs, or 300 on bundled data."""
    epochs: int | None = None
    """Passes over the data, in place of --steps; needs a data set with a known size."""
    batch_size: int = 256
    """Samples per process and forward pass."""
    accum_steps: int = 1
    """Batches per update: exactly the loss of the joined batch, in the memory of one."""
    lr: float | None = None
    """Peak learning rate: linear warm-up, then cosine to 0. None = 1e-3; bundled data has its own."""
    text_lr: float | None = None
    """Peak learning rate of the text tower. None = --lr; bundled data without --lr has its own."""
    wd: float = 0.2
    """Weight decay; none on biases, norms and the logit scale."""
    warmup: int | None = None
    """Warm-up steps. None = 50, at most all."""
    layer_decay: float = 1.0
    """The rate falls by this factor from each group of layers to the one before it. 1 = one rate for a tower."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, which is evaluated and exported; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class ClipEvaluation:
    """Evaluation while training, and checkpoints."""

    eval_data: tuple[str, ...] | None = None
    """Sets as eval/zero_shot.py names them; no name = no set. None = the bundled ones for bundled data, else none."""
    dataset_root: str | None = None
    """Folder of these sets, or its URL on the Hub; {dataset} and {dataset_cleaned} are filled in."""
    export: tuple[Format, ...] = ()
    """Further formats of the student, as of `python -m gkl_vl.export`; int8 is judged on the sets of --eval-data."""
    intervals: Annotated[StepIntervals, tyro.conf.arg(name="")] = StepIntervals(
        eval_every_steps=100, checkpoint_every_steps=250
    )


@runtime_checkable
class ClipFlags(Protocol):
    """Flags that every CLIP recipe has."""

    @property
    def model(self) -> ClipModels: ...
    @property
    def student(self) -> StudentFlags: ...
    @property
    def optimisation(self) -> ClipOptimisation: ...
    @property
    def run(self) -> RunFlags: ...
    @property
    def evaluation(self) -> ClipEvaluation: ...


def caption_weights(loss: CaptionLoss, *, distils: bool, bundled: bool) -> ClipKdWeights:
    """The weights of a run on captions. Raises: UserError where all are 0, and for flags that have no effect."""
    if not distils:
        given, usual = cli.flat(loss), cli.flat(CaptionLoss())
        of_teacher = {name: None if given[name] == usual[name] else given[name] for name in given}
        cli.refuse_unused(
            of_teacher, [n for n in given if n != "contrastive_weight"], "has no effect with --teacher none"
        )
    defaults = BUNDLED_LOSS if bundled and distils else LOSS
    chosen = {
        name: default if getattr(loss, name) is None else getattr(loss, name) for name, default in defaults.items()
    }
    weights = ClipKdWeights(
        contrastive_weight=loss.contrastive_weight,
        mimicry_weight=chosen["mimicry_weight"],
        gkl=loss.gkl,
        cross=replace(loss.gkl, soft_ce_weight=chosen["cross_soft_ce_weight"], wmse_weight=chosen["cross_wmse_weight"]),
    )
    compared = weights.cross.counts or weights.gkl.counts or weights.mimicry_weight
    if not loss.contrastive_weight and not (distils and compared):
        others = "" if not distils else ", --soft-ce-weight, --cross-soft-ce-weight or --mimicry-weight"
        raise UserError(f"every weight is 0, so there is nothing to train on: set --contrastive-weight{others}")
    if not weights.cross.counts:
        cli.refuse_unused(
            vars(loss), ["bank_size"], "has no effect without --cross-soft-ce-weight or --cross-wmse-weight"
        )
    return weights


def make_bank(loss: CaptionLoss) -> Bank:
    """The columns of the cross logits."""
    return Bank(BANK_SIZE if loss.bank_size is None else loss.bank_size)


# ---- the run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipData:
    """What a recipe trains on."""

    source: Source
    name: str | None
    """As the user named it; None = the bundled emoji."""
    flag: str = "--train-data"
    """The flag that names it, for messages."""
    captions_per_image: int = 1
    caption_weights: Sequence[float] | None = None

    @property
    def bundled(self) -> bool:
        """The bundled emoji have stored teacher views, their own augmentation, evaluation sets and defaults."""
        return self.name is None


def open_pairs(flags: PairData) -> Source:
    """The pairs of the flags. Raises: UserError as `open_source`, and for flags that the bundled data do not use."""
    if flags.train_data is None:
        refuse_without_data(flags)
    return open_source(flags.train_data, columns=flags.columns, caption_lines=flags.caption_lines, quoted=flags.quoted)


def refuse_without_data(flags: PairData) -> None:
    """Raises: UserError for flags on how --train-data is read."""
    cli.refuse_unused(vars(flags), ["columns", "quoted"], "has no effect without --train-data")
    if flags.caption_lines:
        raise UserError("--caption-lines has no effect without --train-data: leave it out")


def open_captions(flags: CaptionData, *, distils: bool) -> ClipData:
    """The pairs of the flags, for a run with or without a teacher. Raises: UserError as `open_pairs`."""
    source, name, captions = open_pairs(flags.pairs), flags.pairs.train_data, flags.captions_per_image
    if captions is None:
        captions = BUNDLED_CAPTIONS if name is None and distils else 1
    columns = max(len(flags.pairs.columns or ()) - 1, 1)
    if flags.caption_weights is not None and len(flags.caption_weights) != columns:
        count = len(flags.caption_weights)
        raise UserError(f"--caption-weights has {count} values for {columns} caption columns: give one for each")
    return ClipData(source=source, name=name, captions_per_image=captions, caption_weights=flags.caption_weights)


@dataclass(frozen=True, kw_only=True)
class ClipSetup:
    """What an objective is built from."""

    student: Clip
    teachers: RunTeachers
    teach: Teacher | None
    """Embeddings of the teachers for a batch, online or stored; None without a teacher."""
    device: torch.device


def caption_objective(
    loss: CaptionLoss, weights: ClipKdWeights, attack: ImageAttack | None = None
) -> Callable[[ClipSetup], ClipKd]:
    """For `train_clip`: distillation on captions with these weights, see `caption_weights`."""
    return lambda setup: ClipKd(
        student=setup.student,
        teacher=setup.teach,
        weights=weights,
        bank=make_bank(loss),
        teacher_weights=setup.teachers.shares,
        attack=attack,
    )


def train_clip(
    config: ClipFlags,
    *,
    recipe: str,
    data: ClipData,
    make_objective: Callable[[ClipSetup], Objective],
    bundled_rates: tuple[float, float] = (LR, LR),
    mapped: Sequence[str] = (),
    one_tower: Side | None = None,
    detail: str = "",
    attack: str | None = None,
    check: Callable[[int, RunTeachers], None] = lambda images, teachers: None,
    sets: Sequence[BenchmarkSet] | None = None,
    interpolation: Interpolation | None = None,
) -> None:
    """Trains a student from flags to the exported folder.

    Args:
        recipe: run folders are runs/RECIPE-TIME.
        bundled_rates: defaults of --lr and --text-lr on bundled data.
        mapped: for `Student`: the sides whose embeddings the objective compares with the teacher's.
        one_tower: the only tower that is trained; the other one is the teacher's.
        detail: part of the run's title, behind the teacher.
        attack: for the card: radius and norm of attacks in training. FSDP is then refused.
        check: called before the run folder is made, with the number of images that the run will see and its teachers.
        sets: evaluation sets in place of those of the flags.
        interpolation: the average with the initial weights that is exported, in place of the trained ones.
    """
    run = Run(config, recipe=recipe, compiled=config.student.memory.torchcompile)
    if attack is not None:
        run.refuse_shards("attacks")
    teachers, student, inherited = load_models(config, data, run.device, one_tower)
    start = None if interpolation is None else copy.deepcopy(whole(student, config.student.adaptation).towers)
    decay = config.optimisation.layer_decay
    scales = rate_scales(student.towers, decay) if decay != 1 else {}
    largest_scale = max(student.towers.log_scale().exp().item(), 100.0)
    sets = evaluation_sets(config.evaluation, bundled=data.bundled) if sets is None else list(sets)
    check_formats(student, config.evaluation.export, sets)
    steps = count_steps(config.optimisation, data, run.num_processes)
    count_warmup(config.optimisation, steps)  # raises before there is a run folder
    images_per_step = config.optimisation.batch_size * config.optimisation.accum_steps
    check(steps * images_per_step * run.num_processes, teachers)
    origin = "" if teachers.title is None else f" distilled from {teachers.title}"
    if start is not None:
        run.hold_start(start)
    run.begin(f"{config.model.student}{origin}{detail} · {steps:,} steps of {images_per_step:,}")
    augment = views_at(student, teachers, bundled=data.bundled)
    if data.bundled:
        teachers = with_bundled_store(run, teachers, student)
    model = make_model(student, teachers, config.student.adaptation, mapped=mapped, one_tower=one_tower)
    for line in [*inherited, *([trainable_table(model)] if is_partly_frozen(model) else [])]:
        run.accelerator.print(line)
    run.seed_ranks()
    rates = peak_rates(config.optimisation, bundled_rates if data.bundled and teachers.names else (LR, LR))
    if one_tower is not None:
        rates = (rates[one_tower == "text"],) * 2
    teach = make_teacher(teachers, run.device)
    exported = fit(
        accelerator=run.accelerator,
        model=model,
        objective=make_objective(ClipSetup(student=student, teachers=teachers, teach=teach, device=run.device)),
        make_optimizer=partial(
            clip_adamw,
            of_text=model.text_parameters(),
            lr=rates[0],
            text_lr=rates[1],
            wd=config.optimisation.wd,
            scales=scales,
        ),
        learning_rate=partial(
            warmup_cosine, lr=max(rates), steps=steps, warmup_steps=count_warmup(config.optimisation, steps)
        ),
        make_loader=partial(make_loader, config, run, data, augment, student, teachers),
        run=run.folder,
        config=FitConfig(
            steps=steps,
            grad_clip_norm=1.0,
            accum_steps=config.optimisation.accum_steps,
            **vars(config.evaluation.intervals),
        ),
        evaluate=partial(evaluate_student, sets, student, run.device),
        after_step=partial(clamp_scale, student.towers, largest=largest_scale),
        average=moving_average(model, config.optimisation.ema_decay),
        checkpoint=run.checkpoint(),
        stop=run.stop,
    )
    assert isinstance(exported, Student | OneTower)  # the model or its average
    trained, role = whole(replace(student, towers=exported.towers), config.student.adaptation), STUDENT
    if interpolation is not None and start is not None:
        trained = export_mixed(run, start, trained, interpolation, sets, step=steps)  # all ranks
        role = role_of(interpolation.share)
    log_once(run.folder, steps, models_beside(model, trained, teachers), sets, run.device)  # all ranks
    if run.accelerator.is_main_process:
        if config.student.adaptation.lora_rank is not None:
            share = 1.0 if interpolation is None else interpolation.share
            save_adapters(exported.towers, run.folder.path / "adapter", base=initial_weights(config), share=share)
        card = partial(make_card, config, data, teachers, attack, one_tower, interpolation)
        further = partial(add_formats, formats=config.evaluation.export, images=data.source, sets=sets)
        finish(run, trained, teachers, card, steps=steps, bundled=data.bundled, role=role, sets=sets, further=further)
    run.end()


def load_models(
    config: ClipFlags, data: ClipData, device: torch.device, one_tower: Side | None
) -> tuple[RunTeachers, Clip, list[str]]:
    """Teachers, student, and lines on what it inherited. Raises: UserError as `open_teachers` and `load_student`."""
    allow_pickle = config.run.allow_pickle
    teachers = open_teachers(
        config.model,
        data.source,
        bundled=data.bundled,
        device=device,
        allow_pickle=allow_pickle,
        loaded_too=one_tower is not None or config.student.start.init_from_teacher,
    )
    student, inherited = load_student(
        config.model,
        config.student,
        teachers,
        data.source,
        bundled=data.bundled,
        allow_pickle=allow_pickle,
        one_tower=one_tower,
    )
    return teachers, student, inherited


# ---- before the first step ---------------------------------------------------------------------------------------


def evaluation_sets(evaluation: ClipEvaluation, *, bundled: bool) -> list[BenchmarkSet]:
    """The sets of --eval-data, loaded before the first step."""
    names = (BUNDLED if bundled else ()) if evaluation.eval_data is None else evaluation.eval_data
    if not names:
        cli.refuse_unused(vars(evaluation), ["dataset_root"], "has no effect without sets in --eval-data")
    return load_benchmark_sets(names, root=evaluation.dataset_root, split="test")


def count_steps(optimisation: ClipOptimisation, data: ClipData, num_processes: int) -> int:
    """Updates of the run, from --steps or --epochs."""
    if optimisation.steps is not None and optimisation.epochs is not None:
        raise UserError(f"--steps {optimisation.steps} and --epochs {optimisation.epochs} exclude each other: give one")
    if optimisation.steps is not None:
        return optimisation.steps
    if optimisation.epochs is None:
        if data.bundled:
            return BUNDLED_STEPS
        raise UserError(f"{data.flag} needs --steps or --epochs")
    if data.source.num_pairs is None:
        raise UserError(
            f"--epochs needs the size of {data.source.name!r}: put sizes.json beside the shards, or give --steps"
        )
    global_batch = optimisation.batch_size * optimisation.accum_steps * num_processes
    return max(optimisation.epochs * data.source.num_pairs // global_batch, 1)


def count_warmup(optimisation: ClipOptimisation, steps: int) -> int:
    """Warm-up steps of a run of so many steps. Raises: UserError where --warmup is longer than the run."""
    if optimisation.warmup is None:
        return min(WARMUP_STEPS, steps)
    if optimisation.warmup > steps:
        raise UserError(f"--warmup {optimisation.warmup} is longer than the run of {steps} steps: lower it")
    return optimisation.warmup


def peak_rates(optimisation: ClipOptimisation, usual: tuple[float, float]) -> tuple[float, float]:
    """Peak learning rates of the image and the text tower; a --lr without --text-lr is for both."""
    lr, text_lr = optimisation.lr, optimisation.text_lr
    if lr is None:
        return usual[0], usual[1] if text_lr is None else text_lr
    return lr, lr if text_lr is None else text_lr


def make_loader(
    config: ClipFlags,
    run: Run,
    data: ClipData,
    augment: Callable,
    student: Clip,
    teachers: RunTeachers,
    position: dict[str, Any] | None,
) -> PairLoader:
    """Batches of this rank from a position. An online teacher gets the captions in its own tokens."""
    tokenizers = {"text": student.tokenize}
    if teachers.store is None:
        tokenizers |= {numbered("teacher_text", number): clip.tokenize for number, clip in enumerate(teachers.clips)}
    source, stored = data.source, teachers.store
    if isinstance(stored, DatasetDr):
        source, stored = stored.with_embeddings(source), stored.at_size(student.image_size)
    stream = PairStream(
        source,
        augment=augment,
        tokenizers=tokenizers,
        batch_size=config.optimisation.batch_size,
        seed=run.flags.seed,
        rank=run.accelerator.process_index,
        world_size=run.num_processes,
        num_workers=run.flags.workers,
        captions_per_image=data.captions_per_image,
        caption_weights=data.caption_weights,
        stored=stored,
        start=None if position is None else Position.of(position),
    )
    return PairLoader(stream, pin_memory=run.device.type == "cuda")


def make_card(
    config: ClipFlags,
    data: ClipData,
    teachers: RunTeachers,
    attack: str | None,
    one_tower: Side | None,
    interpolation: Interpolation | None,
    facts: RunFacts,
) -> ClipCard:
    """The exported student's model card."""
    ours = data.bundled and set(teachers.names) <= {"bundled"} and start_is_ours(config)
    return ClipCard(
        student=config.model.student,
        teachers=teachers.names,
        license="mit" if ours else "other",  # of other data and weights the licence is not known
        datasets=["bundled emoji (Noto, Twemoji)" if data.name is None else data.name],
        run=facts,
        attack=attack,
        one_tower=one_tower,
        start=initial_weights(config),
        averaged=None if interpolation is None else interpolation.share,
    )


def initial_weights(config: ClipFlags) -> str:
    """The student's name, and that of the weights that it starts from."""
    start, name = config.student.start, config.model.student
    if start.init_from_teacher:
        return f"{name} from its teacher"
    if start.student_init == "random" or not (start.student_pretrained or comes_with_weights(name)):
        return f"{name}, random"
    return name if start.student_pretrained is None else f"{name} {start.student_pretrained}"


def start_is_ours(config: ClipFlags) -> bool:
    """Whether the student's initial weights are random, its teacher's, or bundled."""
    name = config.model.student
    return name == "bundled" or initial_weights(config).startswith((f"{name}, random", f"{name} from its teacher"))
