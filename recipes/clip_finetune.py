"""Fine-tune a CLIP on a small set of pairs, held back by a teacher, and average its weights with those of its start.

    accelerate launch recipes/clip_finetune.py

fine-tunes the bundled teacher on drawings of a third style, those of every other concept, with itself as the teacher;
N minutes on two CPU cores. Without --train-data the evaluation is on the drawings of the other concepts (the new set)
and on `emoji_unseen` (the old one). With your own pairs:

    accelerate launch recipes/clip_finetune.py --student ViT-B-32 --student-pretrained openai \
        --teacher ViT-B-32 --teacher-pretrained openai --train-data pairs.csv --epochs 5 \
        --eval-data pets --old-data imagenet1k --dataset-root '/data/{dataset}'

The rates are low and fall from the output to the input (`--layer-decay`), evaluation is frequent, and the exported
weights are `--interpolate` parts fine-tuned and the rest the start's; RUN/interpolation.png shows the accuracy on new
and old sets along the line between the two. `--lock-image`, `--lock-text` and `--lora-rank` train a part of the model.

Papers: WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903) for the average; BEiT (arXiv 2106.08254) for rates by
layer. Results, with commands and spread: recipes/README.md.
"""

from dataclasses import dataclass, replace

from gkl_vl import cli
from gkl_vl.data.pairs import bundled_style
from gkl_vl.data.sources import memory_source
from gkl_vl.errors import UserError
from gkl_vl.evaluation.sets import BenchmarkSet, half_of, load_benchmark_set, load_benchmark_sets
from gkl_vl.models.clip import comes_with_weights
from gkl_vl.objectives.clip import ClipKd
from gkl_vl.training.clip import (
    CaptionData,
    CaptionLoss,
    ClipData,
    ClipEvaluation,
    ClipOptimisation,
    caption_weights,
    evaluation_sets,
    make_bank,
    open_captions,
    train_clip,
)
from gkl_vl.training.clip_mixing import Interpolation
from gkl_vl.training.clip_models import ClipModels, StudentFlags
from gkl_vl.training.run import RunFlags, StepIntervals

BUNDLED_STEPS = 60
BUNDLED_OLD = ("emoji_unseen",)
OWN_HALF = 0
"""Half of the concepts, by position, that is trained on; the other one is the new evaluation set."""


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """The average with the start's weights."""

    interpolate: float = 0.5
    """Share of the fine-tuned weights in the exported ones; the rest is the start's. 1 = no average."""
    old_data: tuple[str, ...] | None = None
    """Sets that show what the start was good at, as --eval-data. None = none; for bundled data emoji_unseen."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a CLIP on your own pairs. Without flags: the bundled teacher, on drawings of another style."""

    model: ClipModels = ClipModels(student="bundled")
    student: StudentFlags = StudentFlags()
    data: CaptionData = CaptionData()
    loss: CaptionLoss = CaptionLoss()
    averaging: Averaging = Averaging()
    optimisation: ClipOptimisation = ClipOptimisation(batch_size=128, lr=1e-4, wd=0.05, layer_decay=0.75)
    run: RunFlags = RunFlags(workers=1)
    evaluation: ClipEvaluation = ClipEvaluation(
        intervals=StepIntervals(eval_every_steps=20, checkpoint_every_steps=250)
    )


def main(config: Config) -> None:
    data = own_style() if config.data.pairs.train_data is None else open_captions(config.data, distils=False)
    check_start(config)
    weights = caption_weights(config.loss, distils=config.model.distils, bundled=False)
    new, old = open_sets(config)
    train_clip(
        with_length(config),
        recipe="clip_finetune",
        data=data,
        make_objective=lambda setup: ClipKd(
            student=setup.student,
            teacher=setup.teach,
            weights=weights,
            bank=make_bank(config.loss),
            teacher_weights=setup.teachers.shares,
        ),
        mapped=weights.mapped,
        sets=[*new, *old],
        interpolation=Interpolation(share=config.averaging.interpolate, old=[dataset.name for dataset in old]),
    )


def own_style() -> ClipData:
    """Drawings of the third style, of every other concept."""
    return ClipData(
        source=memory_source("emoji of one style", bundled_style(OWN_HALF)), name="bundled emoji, one style"
    )


def with_length(config: Config) -> Config:
    """The flags with the steps of the bundled data, where these are trained on and no length is given."""
    optimisation = config.optimisation
    if config.data.pairs.train_data is not None or optimisation.steps is not None or optimisation.epochs is not None:
        return config
    return replace(config, optimisation=replace(optimisation, steps=BUNDLED_STEPS))


def check_start(config: Config) -> None:
    """Raises: UserError for flags of data without data, and for a student whose start is random."""
    models, pairs = config.model, config.data.pairs
    if pairs.train_data is None:
        cli.refuse_unused(vars(pairs), ["columns", "quoted"], "has no effect without --train-data")
        cli.refuse_unused(vars(config.data), ["caption_weights"], "has no effect without --train-data")
    start = config.student.start
    inherits = start.student_pretrained is not None or start.init_from_teacher
    if start.student_init == "random" or not (inherits or comes_with_weights(models.student)):
        raise UserError(
            f"--student {models.student} has random weights, and fine-tuning starts from trained ones: add "
            "--student-pretrained, or train it with recipes/clip_kd.py"
        )


def open_sets(config: Config) -> tuple[list[BenchmarkSet], list[BenchmarkSet]]:
    """New and old evaluation sets. Raises: UserError for a set that is both."""
    evaluation, old = config.evaluation, config.averaging.old_data
    bundled = config.data.pairs.train_data is None
    if old is None:
        old = BUNDLED_OLD if bundled and evaluation.eval_data is None else ()
    if bundled and evaluation.eval_data is None:
        new = [half_of(load_benchmark_set("emoji"), 1 - OWN_HALF)]
    else:
        new = evaluation_sets(evaluation, bundled=False)
    if both := [dataset.name for dataset in new if dataset.name in old]:
        raise UserError(f"{both[0]} is in --eval-data and in --old-data: leave it out of one")
    return new, load_benchmark_sets(old, root=evaluation.dataset_root, split="test")


if __name__ == "__main__":
    cli.run(main, Config)
