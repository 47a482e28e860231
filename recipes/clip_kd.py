"""Distil a CLIP teacher into a small student on image-text logits with GKL.

    accelerate launch recipes/clip_kd.py

runs the bundled default: a teacher trained here on emoji drawings of two styles, a student of a fraction of its size,
and an evaluation on drawings of a third style and on things that neither has seen. With your own teacher and shards:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/clip_kd.py \
        --teacher ViT-L-14 --teacher-pretrained laion400m_e32 --student ViT-T-16 \
        --train-data '/data/cc12m-{0000..2175}.tar' --epochs 32 --batch-size 512 --precision bf16

`--teacher none` trains on the contrastive loss alone; that is how the bundled teacher was made.

`--adversarial linf --epsilon 4/255` makes a student that holds under attack: its images are moved, within the radius,
so that its image-text logits leave the teacher's of the clean images, and it is trained on the moved ones towards them.
An update costs about twice as much. `eval/zero_shot.py --attack apgd` measures what is left under attack.

`--unlabelled` takes images without captions or labels, and a list of class prompts: the teacher's zero-shot logits over
them are what the student learns (PromptKD's setting). pets.json holds {"classnames": ["Abyssinian", ...], "templates":
["a photo of a {c}, a type of pet."]}; without --prompts and with `bundled` images it is the bundled emoji again:

    accelerate launch recipes/clip_kd.py --teacher ViT-L-14 --teacher-pretrained openai --student ViT-T-16 \
        --unlabelled /data/pets --prompts pets.json --epochs 20
    accelerate launch recipes/clip_kd.py --unlabelled bundled

Paper: Cui et al., "Generalized Kullback-Leibler Divergence Loss", arXiv 2503.08038, and arXiv 2305.13948. The
image-text form is this project's. Results, with commands and spread: recipes/README.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from gkl_vl import cli, report
from gkl_vl.data.augment import drawing_augmentation, light_augmentation, mild_drawing_augmentation
from gkl_vl.data.pair_stream import PairLoader, PairStream, Position
from gkl_vl.data.pairs import Source, bundled_pairs, open_images, open_source
from gkl_vl.data.prompts import Prompts, bundled_prompts, read_prompts
from gkl_vl.disk_cache import cache_folder
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import TASK_OF, measure, metrics_of
from gkl_vl.evaluation.embed import Embedder, milliseconds_per_image, top_names, zero_shot_classifier
from gkl_vl.evaluation.set_collections import BenchmarkTask
from gkl_vl.evaluation.sets import BUNDLED, BenchmarkSet, load_benchmark_set, load_benchmark_sets
from gkl_vl.export import hub
from gkl_vl.export.cards import ClipCard
from gkl_vl.models.clip import BUNDLED_TEACHER, Clip, Student, clamp_scale, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.objectives.clip import ClipKd, ClipKdWeights, ImageAttack, image_attack
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.zero_shot import ZeroShotKd, ZeroShotWeights, by_length, prompt_tokens
from gkl_vl.robustness.pgd import USUAL_CLIP_EPSILON, Norm, radius
from gkl_vl.teachers.online import Teacher, online_teacher, zero_shot_teacher
from gkl_vl.teachers.store import StoredViews, store_views, stored_teacher
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import adamw, warmup_cosine
from gkl_vl.training.protocols import Objective
from gkl_vl.training.run import refuse_shards, start

# The bundled set is small: a fixed number of views lets the teacher embed each once (gkl_vl/teacher_cache.py).
BUNDLED_VIEWS = 6
BUNDLED_STEPS = 300
BUNDLED_LR, BUNDLED_UNLABELLED_LR = 6e-3, 3e-3
BUNDLED_MIMICRY_WEIGHT, MIMICRY_WEIGHT = 10_000.0, 2000.0
WMSE_WEIGHT, UNLABELLED_WMSE_WEIGHT = 0.5, 0.05
SHEET_IMAGES = 12


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distil a CLIP teacher into a small student with GKL. Without flags: the bundled default."""

    teacher: str = "bundled"
    """An open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, `bundled`, or `none` (no teacher)."""
    teacher_pretrained: str | None = None
    """open_clip's tag or a file of weights, for a teacher given by an open_clip name."""
    student: str = "emoji-student"
    """As --teacher, or a shipped config: ViT-T-16, FastViT-T8, emoji-student; random weights for a plain name."""
    train_data: str | None = None
    """Shards `a-{000..9}.tar::b.tar`, a .csv or .tsv, parquet, or a Hub dataset id. None = the bundled emoji."""
    unlabelled: str | None = None
    """In place of --train-data, images alone: `bundled`, a folder, or shards and tables whose captions are not read."""
    prompts: str | None = None
    """For --unlabelled: .json of `classnames` and `templates` with {c}, or .txt of templates. None = the bundled."""
    class_prior: bool = False
    """For --unlabelled: wMSE's weights are what the teacher said, in the last pass, of an image's likeliest class."""
    columns: tuple[str, str] | None = None
    """Columns of a table; --unlabelled reads the first. None = `filepath title` in CSV, `image caption` elsewhere."""
    output_dir: Path | None = None
    """The run folder. None = runs/clip_kd-<time>."""
    steps: int | None = None
    """Optimizer updates. None = --epochs, or 300 for the bundled default."""
    epochs: int | None = None
    """Passes over the data, in place of --steps; needs a data set that knows its size."""
    batch_size: int = 256
    """Pairs per process and forward pass."""
    accum_steps: int = 1
    """Batches in an update: exactly the loss of one that is so many times as large, in the memory of --batch-size."""
    lr: float | None = None
    """Peak learning rate: linear warm-up, then cosine to 0. None = 1e-3; on bundled data 6e-3, unlabelled 3e-3."""
    wd: float = 0.2
    """AdamW's weight decay; none on biases, norms and the scale."""
    warmup: int = 50
    """Warm-up steps."""
    precision: Literal["fp32", "amp", "fp16", "amp_bf16", "bf16"] | None = None
    """None = what `accelerate launch` or `accelerate config` say."""
    workers: int = 1
    """Data-loading processes per training process."""
    seed: int = 0
    """Of initial weights, order, captions, templates and augmentations."""
    eval_data: tuple[str, ...] | None = None
    """Sets to evaluate on, as eval/zero_shot.py names them. None = the bundled ones for bundled data, else none."""
    dataset_root: str | None = None
    """Folder of the sets of --eval-data, or its URL on the Hub; {dataset} and {dataset_cleaned} are filled in."""
    eval_every_steps: int = 100
    """Evaluate every so many steps and at the end; 0 = at the end only."""
    checkpoint_every_steps: int = 250
    """Save every so many steps and at the end; 0 = at the end only."""
    resume: str | None = None
    """`latest`, or a checkpoint folder; with the flags of the run that is taken up."""
    contrastive_weight: float = 1.0
    """Weight of the student's own contrastive loss. This one and --mimicry-weight are not for --unlabelled."""
    soft_ce_weight: float = 1.0
    """Weight of GKL's soft cross entropy (paper: beta)."""
    wmse_weight: float | None = None
    """Weight of GKL's weighted MSE of logit differences (paper: alpha). None = 0.5, and 0.05 for --unlabelled."""
    mimicry_weight: float | None = None
    """Weight of feature mimicry, the MSE of normalised embeddings. None = CLIP-KD's 2000, 10000 on bundled data."""
    gamma: float = 0.5
    """Exponent of the wMSE's weights: 0 = all candidates alike, 1 = the teacher's softmax (IKL)."""
    temperature: float = 1.0
    """Of the soft cross entropy."""
    weight_temperature: float = 1.0
    """Of the softmax that the wMSE's weights come from."""
    adversarial: Literal["none", "linf", "l2"] = "none"
    """Train on attacked images, within --epsilon in this norm; the teacher sees the clean ones."""
    epsilon: str | None = None
    """Radius of the attack, a fraction or a number; pixels are in [0, 1]. None = 4/255 for linf, 0.5 for l2."""
    ema_decay: float = 0.0
    """Moving average of the weights, per step, that is evaluated and exported; 0 = none."""
    push_to_hub: str | None = None
    """org/name: upload the exported folder when done."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers besides results.jsonl."""
    allow_pickle: bool = False
    """Read weights stored as pickles (.bin, .pt), with weights_only=True."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    if config.push_to_hub:
        hub.check_repo_id(config.push_to_hub)
    check_unlabelled(config)
    terms, attack = weights(config), find_attack(config)
    run, accelerator, asked = start(config, recipe="clip_kd")
    if attack is not None:
        refuse_shards(accelerator, "attacks")
    set_seed(config.seed)  # the same initial weights on every rank
    teacher = load_teacher(config, accelerator)
    student = load_clip(config.student, allow_pickle=config.allow_pickle)
    if student.model_cfg is None:
        raise UserError(
            f"--student {config.student} is a transformers model, which cannot be exported: take an open_clip one"
        )
    student.towers.to(memory_format=torch.channels_last)
    sets = evaluation_sets(config)
    source = open_data(config)
    prompts = find_prompts(config, source)
    steps = count_steps(config, source, accelerator.num_processes)
    check_prior(config, source, steps * config.batch_size * config.accum_steps * accelerator.num_processes)
    if not config.resume:  # from here on there is a run
        run.write_json("config.json", asked)
    accelerator.print(f"{title(config, steps)} · {accelerator.num_processes} x {accelerator.device.type} · {run.path}")
    augment = augmentation(config, student, teacher)
    stored = None
    if teacher is not None and own_data(config) is None:
        stored = store_bundled_views(config, teacher, student, augment, accelerator)
    mimicry_dim = teacher.embed_dim if teacher is not None and prompts is None and terms.mimicry_weight else None
    model = Student(student.towers, embed_dim=student.embed_dim, mimicry_dim=mimicry_dim)
    set_seed(config.seed, device_specific=True)  # from here on each rank draws its own

    def make_loader(position: dict[str, Any] | None) -> PairLoader:
        stream = PairStream(
            source,
            augment=augment,
            tokenizers=tokenizers(student, teacher if stored is None else None),
            batch_size=config.batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=config.workers,
            stored_views=None if stored is None else stored.pixels,
            start=None if position is None else Position.of(position),
        )
        return PairLoader(stream, pin_memory=accelerator.device.type == "cuda")

    bundled_lr = BUNDLED_LR if prompts is None else BUNDLED_UNLABELLED_LR
    lr = config.lr or (1e-3 if stored is None else bundled_lr)
    taught_by = make_teacher(teacher, stored, accelerator.device)
    objective: Objective = ClipKd(student=student, teacher=taught_by, weights=terms, attack=attack)
    if prompts is not None:
        assert teacher is not None and taught_by is not None  # by check_unlabelled
        objective = zero_shot_kd(config, terms, student, teacher, taught_by, prompts, source, accelerator.device)
    exported = fit(
        accelerator=accelerator,
        model=model,
        objective=objective,
        make_optimizer=partial(adamw, lr=lr, wd=config.wd),
        learning_rate=partial(warmup_cosine, lr=lr, steps=steps, warmup_steps=min(config.warmup, steps)),
        make_loader=make_loader,
        run=run,
        config=FitConfig(
            steps=steps,
            accum_steps=config.accum_steps,
            eval_every_steps=config.eval_every_steps,
            checkpoint_every_steps=config.checkpoint_every_steps,
        ),
        evaluate=partial(evaluate, sets, student, accelerator.device),
        after_step=partial(clamp_scale, student.towers),
        average=moving_average(model, config.ema_decay),
        checkpoint=run.find_checkpoint(config.resume) if config.resume else None,
    )
    if teacher is not None:
        log_teacher(run, steps, evaluate_clip(teacher, "teacher", sets, accelerator.device, cache_folder("embeddings")))
    if accelerator.is_main_process:
        finish(config, run, replace(student, towers=exported.towers), teacher, steps, accelerator.device)
    accelerator.end_training()


# ---- before -----------------------------------------------------------------------------------------------------


def load_teacher(config: Config, accelerator: Accelerator) -> Clip | None:
    """The frozen teacher on its device, unwrapped."""
    if config.teacher == "none":
        return None
    teacher = freeze(load_clip(config.teacher, config.teacher_pretrained, allow_pickle=config.allow_pickle))
    device: torch.device = accelerator.device
    teacher.towers.to(device).to(memory_format=torch.channels_last)
    return teacher


def own_data(config: Config) -> str | None:
    """What the user trains on; None = the bundled emoji."""
    return config.train_data if config.unlabelled in (None, "bundled") else config.unlabelled


def check_unlabelled(config: Config) -> None:
    """What does not go with --unlabelled, or without it."""
    if config.unlabelled is None:
        for flag, given in (f"--prompts {config.prompts}", config.prompts), ("--class-prior", config.class_prior):
            if given:
                raise UserError(f"{flag} is for images without captions: add --unlabelled")
        return
    if config.train_data is not None:
        raise UserError("--unlabelled and --train-data are two sets of images: give one")
    if config.teacher == "none":
        raise UserError("--unlabelled learns from what a teacher says: --teacher none has nothing to say")
    if config.adversarial != "none":
        raise UserError(f"--adversarial {config.adversarial} attacks image-text logits: leave it out with --unlabelled")
    if config.prompts is None and config.unlabelled != "bundled":
        raise UserError(f"--unlabelled {config.unlabelled} needs the classes to ask the teacher about: give --prompts")


def open_data(config: Config) -> Source:
    if config.unlabelled is None:
        return open_source(config.train_data, columns=config.columns)
    return open_images(config.unlabelled, columns=config.columns)


def find_prompts(config: Config, source: Source) -> Prompts | None:
    """What the teacher is asked about images without captions."""
    if config.unlabelled is None:
        return None
    return bundled_prompts() if config.prompts is None else read_prompts(config.prompts, classnames=source.classnames)


def check_prior(config: Config, source: Source, images: int) -> None:
    """Whether a run that sees so many images has a use for --class-prior."""
    if not config.class_prior:
        return
    if source.num_pairs is None:
        raise UserError(
            f"--class-prior is of a pass over the data, and {source.name!r} does not tell its size: put sizes.json "
            "beside the shards, or give --no-class-prior"
        )
    if images <= source.num_pairs:
        raise UserError(
            f"--class-prior is collected in a pass over the data and used in the next, and the run sees {images:,} of "
            f"{source.num_pairs:,} images: train longer, or give --no-class-prior"
        )


def zero_shot_kd(
    config: Config,
    terms: ClipKdWeights,
    student: Clip,
    teacher: Clip,
    taught_by: Teacher,
    prompts: Prompts,
    source: Source,
    device: torch.device,
) -> ZeroShotKd:
    """The objective for images without captions. All ranks embed the teacher's prompts together."""
    prompts = by_length(prompts, student)
    embedder = Embedder(clip=teacher, device=device, batch_size=256, cache=cache_folder("embeddings"))
    classes = zero_shot_classifier(embedder, classnames=prompts.classnames, templates=prompts.templates)
    return ZeroShotKd(
        student=student,
        teacher=zero_shot_teacher(taught_by, classes.to(device)),
        tokens=prompt_tokens(prompts, student, device),
        weights=ZeroShotWeights(
            soft_ce_weight=terms.soft_ce_weight,
            wmse_weight=terms.wmse_weight,
            gamma=terms.gamma,
            temperature=terms.temperature,
            weight_temperature=terms.weight_temperature,
        ),
        prior=EpochPrior(len(prompts.classnames), config.weight_temperature) if config.class_prior else None,
        num_images=source.num_pairs,
        seed=config.seed,
    )


def augmentation(config: Config, student: Clip, teacher: Clip | None) -> Callable[..., torch.Tensor]:
    """One view for both models, as large as the larger of them wants it."""
    size = max(clip.image_size for clip in (student, teacher) if clip is not None)
    if own_data(config) is not None:
        return light_augmentation(size)
    return drawing_augmentation(size) if teacher is None else mild_drawing_augmentation(size)


def tokenizers(student: Clip, online: Clip | None) -> dict[str, Callable]:
    """The student's tokens, and the teacher's where it embeds the captions itself."""
    return {"text": student.tokenize} | ({} if online is None else {"teacher_text": online.tokenize})


def store_bundled_views(
    config: Config, teacher: Clip, student: Clip, augment: Callable, accelerator: Accelerator
) -> StoredViews:
    with accelerator.main_process_first():  # the others find the file
        return store_views(
            clip=teacher,
            pairs=bundled_pairs(),
            num_views=BUNDLED_VIEWS,
            augment=augment,
            size=student.image_size,
            num_workers=config.workers,
        )


def make_teacher(teacher: Clip | None, stored: StoredViews | None, device: torch.device) -> Teacher | None:
    """What gives the teacher's embeddings of a batch: stored ones for the bundled set, otherwise the teacher itself."""
    if teacher is None:
        return None
    return online_teacher(teacher) if stored is None else stored_teacher(teacher, stored, device)


def weights(config: Config) -> ClipKdWeights:
    mimicry_weight = config.mimicry_weight
    if mimicry_weight is None:
        mimicry_weight = BUNDLED_MIMICRY_WEIGHT if own_data(config) is None else MIMICRY_WEIGHT
    wmse_weight = config.wmse_weight
    if wmse_weight is None:
        wmse_weight = WMSE_WEIGHT if config.unlabelled is None else UNLABELLED_WMSE_WEIGHT
    if config.unlabelled is not None and not (config.soft_ce_weight or wmse_weight):
        raise UserError("every weight is 0, so there is nothing to train on: set --soft-ce-weight or --wmse-weight")
    of_teacher = (config.soft_ce_weight, wmse_weight, mimicry_weight)
    if not config.contrastive_weight and (config.teacher == "none" or not any(of_teacher)):
        with_teacher = "" if config.teacher == "none" else ", --soft-ce-weight, --wmse-weight or --mimicry-weight"
        raise UserError(f"every weight is 0, so there is nothing to train on: set --contrastive-weight{with_teacher}")
    return ClipKdWeights(
        contrastive_weight=config.contrastive_weight,
        soft_ce_weight=config.soft_ce_weight,
        wmse_weight=wmse_weight,
        mimicry_weight=mimicry_weight,
        gamma=config.gamma,
        temperature=config.temperature,
        weight_temperature=config.weight_temperature,
    )


def find_attack(config: Config) -> ImageAttack | None:
    """What --adversarial and --epsilon say."""
    if config.adversarial == "none":
        if config.epsilon is not None:
            raise UserError(f"--epsilon {config.epsilon} is the radius of an attack: add --adversarial linf")
        return None
    return image_attack(config.adversarial, radius(epsilon_text(config, config.adversarial), config.adversarial))


def epsilon_text(config: Config, norm: Norm) -> str:
    """As --epsilon was written."""
    return config.epsilon or USUAL_CLIP_EPSILON[norm]


def count_steps(config: Config, source: Source, num_processes: int) -> int:
    """Updates of the run, from --steps or --epochs."""
    cli.require_positive(config, "steps", "epochs", "batch_size", "accum_steps")
    if config.steps is not None and config.epochs is not None:
        raise UserError(f"--steps {config.steps} and --epochs {config.epochs} say the same twice: give one")
    if config.steps is not None:
        return config.steps
    if config.epochs is None:
        if own_data(config) is None:
            return BUNDLED_STEPS
        raise UserError(f"--{'train-data' if config.unlabelled is None else 'unlabelled'} needs --steps or --epochs")
    if source.num_pairs is None:
        raise UserError(
            f"--epochs needs the size of {source.name!r}: put sizes.json beside the shards, or give --steps"
        )
    global_batch = config.batch_size * config.accum_steps * num_processes
    return max(config.epochs * source.num_pairs // global_batch, 1)


def title(config: Config, steps: int) -> str:
    """The run in a line."""
    origin = "" if config.teacher == "none" else f" distilled from {config.teacher}"
    against = (
        ""
        if config.adversarial == "none"
        else f" · against {config.adversarial} {epsilon_text(config, config.adversarial)}"
    )
    images = "" if config.unlabelled is None else f" on unlabelled {config.unlabelled}"
    batch = config.batch_size * config.accum_steps
    return f"{config.student}{origin}{images}{against} · {steps:,} steps of {batch:,} · seed {config.seed}"


# ---- during and after -------------------------------------------------------------------------------------------


def evaluation_sets(config: Config) -> list[BenchmarkSet]:
    """What --eval-data names, found before the first step."""
    if config.eval_data is None and own_data(config) is not None:
        return []
    return load_benchmark_sets(config.eval_data or BUNDLED, root=config.dataset_root, split="test")


def evaluate(
    sets: list[BenchmarkSet], student: Clip, device: torch.device, model: nn.Module
) -> Iterator[dict[str, Any]]:
    """Records of the student as it is."""
    yield from evaluate_clip(replace(student, towers=model.towers), "student", sets, device, cache=None)


def evaluate_clip(
    clip: Clip, role: str, sets: list[BenchmarkSet], device: torch.device, cache: Path | None
) -> Iterator[dict[str, Any]]:
    """A record for each set, with CLIP_benchmark's keys. All processes share the work."""
    embedder = Embedder(clip=clip, device=device, batch_size=256, cache=cache)
    for dataset in sets:
        tasks: list[BenchmarkTask] = [TASK_OF[dataset.kind]]
        if dataset.name in BUNDLED:  # they have captions too
            tasks.append("zeroshot_retrieval")
        yield {"model": role, "dataset": dataset.name} | metrics_of(measure(embedder, dataset, tasks))


def log_teacher(run: RunFolder, step: int, records: Iterator[dict[str, Any]]) -> None:
    """Once in a run, also where it was taken up after its end. All processes measure, the main one writes."""
    measured = list(records)  # all ranks
    if not any(record.get("model") == "teacher" for record in run.records()):
        for record in measured:
            run.log({"step": step} | record)


def finish(
    config: Config, run: RunFolder, student: Clip, teacher: Clip | None, steps: int, device: torch.device
) -> None:
    """Export the student, draw the report, print the table. Main process."""
    final = [r for r in run.records() if "model" in r and r["step"] == steps]
    student.towers.eval()
    card = ClipCard(
        student=config.student,
        teacher=None if teacher is None else config.teacher,
        license="mit" if own_data(config) is None else "other",  # whoever brings the data knows its licence
        datasets=[data] if (data := own_data(config)) else ["bundled emoji (Noto, Twemoji)"],
        command=run.config()["command"],
        commit=run.config()["commit"],
        metrics=final,
        steps=steps,
        seed=config.seed,
        attack=None
        if config.adversarial == "none"
        else f"{epsilon_text(config, config.adversarial)} in {config.adversarial}",
        repo_id=config.push_to_hub,
    )
    hub.export_clip(clip=student, folder=run.path / "model", card=card)
    sheet = draw_sheet(student, device) if own_data(config) is None else []
    report.draw_report(path=run.path / "report.png", records=run.records(), sheet=sheet, title=title(config, steps))
    rows = [table_row("teacher", teacher, final, device)] if teacher else []
    print(report.results_table([*rows, table_row("student", student, final, device)]))
    print(f"\nLoad the student:\n\n    import open_clip\n    model, _, preprocess = "
          f'open_clip.create_model_and_transforms("local-dir:{run.path / "model"}")\n')  # fmt: skip
    print(f"Pictures: {run.path / 'report.png'}")
    if config.push_to_hub:
        print(f"Pushed: {hub.push_to_hub(folder=run.path / 'model', repo_id=config.push_to_hub)}")


def table_row(role: str, clip: Clip, records: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    return {
        "model": role,
        "name": "bundled" if clip.name == BUNDLED_TEACHER else clip.name,
        "image_parameters": sum(p.numel() for p in clip.towers.image_parameters()),
        "parameters": sum(p.numel() for p in clip.towers.parameters()),
        "ms_per_image": milliseconds_per_image(clip=clip, device=device),
        "results": {
            r["dataset"]: {k: v for k, v in r.items() if isinstance(v, float)} for r in records if r["model"] == role
        },
    }


def draw_sheet(student: Clip, device: torch.device) -> list[report.SheetItem]:
    """Held-out drawings, evenly spaced through the set, with the student's three best names."""
    dataset = load_benchmark_set(BUNDLED[0])
    names = dataset.classnames
    assert names is not None  # the bundled set has them
    drawings: list[Any] = list(dataset)
    chosen = drawings[:: max(len(drawings) // SHEET_IMAGES, 1)][:SHEET_IMAGES]
    embedder = Embedder(clip=student, device=device, batch_size=256)
    best = top_names(embedder, images=[image for image, _ in chosen], dataset=dataset, k=3)
    return [report.SheetItem(image, names[label], top) for (image, label), top in zip(chosen, best, strict=True)]


if __name__ == "__main__":
    cli.run(main, Config)
