"""Train a small image tower into a CLIP teacher's embedding space; its text tower stays, and so does a search index.

    accelerate launch recipes/clip_image_tower.py

trains on the bundled emoji without their captions; three minutes on two CPU cores. The exported CLIP has the small
image tower, and the teacher's text tower, tokenizer and logit scale, so that text embeddings and indexes of the
teacher's remain valid. With your own images, and texts that they are compared with:

    accelerate launch recipes/clip_image_tower.py --teacher ViT-L-14 --teacher-pretrained openai --student ViT-T-16 \
        --train-data /data/pets --prompts pets.json --epochs 20

Terms: feature mimicry of the teacher's image embeddings, and GKL of the logits against its class prompts where there
are some. `--text-only` trains a small text tower on captions instead, and the image tower is the teacher's.

Expected on bundled data (three seeds): 40.6 % top-1 on `emoji`, with --text-only 38.7 %; the teacher has 42.9 %.

Papers: CLIP-KD (Yang et al., CVPR 2024) for mimicry; Cui et al., arXiv 2305.13948 and 2503.08038 for GKL, whose form
against the teacher's texts is this project's (docs/cross_logits.md).
"""

from dataclasses import dataclass

from gkl_vl import cli
from gkl_vl.data.pairs import open_images
from gkl_vl.data.prompts import Prompts, bundled_prompts, read_prompts
from gkl_vl.errors import UserError
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.models.towers import Side
from gkl_vl.objectives.one_tower import OneTowerKd
from gkl_vl.teachers.bank import Bank
from gkl_vl.training.clip import (
    BANK_SIZE,
    CaptionData,
    ClipData,
    ClipEvaluation,
    ClipOptimisation,
    ClipSetup,
    open_captions,
    train_clip,
)
from gkl_vl.training.clip_models import ClipModels, StudentFlags
from gkl_vl.training.clip_teacher import RunTeachers
from gkl_vl.training.run import RunFlags


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Weights of the loss terms."""

    mimicry_weight: float = 2000.0
    """Weight of the MSE between normalised embeddings."""
    cross_soft_ce_weight: float | None = None
    """Soft CE of the logits against the teacher's other side. None = 2; 0 for images without --prompts."""
    cross_wmse_weight: float | None = None
    """wMSE of the same logits. None = 6; 0 for images without --prompts."""
    gamma: float = 0.5
    """Of the weights of wMSE: softmax(teacher's logits)^gamma."""
    bank_size: int | None = None
    """With --text-only: the teacher's image embeddings that texts are compared with, the last ones. None = 2048."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train one tower of a CLIP into its teacher's embedding space. Without flags: an image tower, on bundled data."""

    text_only: bool = False
    """Train the text tower, on captions. Without it the image tower, on images alone."""
    model: ClipModels = ClipModels()
    student: StudentFlags = StudentFlags()
    data: CaptionData = CaptionData()
    prompts: str | None = None
    """Texts that images are compared with, as in clip_unlabelled.py. None = none; for bundled data their names."""
    loss: Loss = Loss()
    optimisation: ClipOptimisation = ClipOptimisation()
    run: RunFlags = RunFlags(workers=1)
    evaluation: ClipEvaluation = ClipEvaluation()


def main(config: Config) -> None:
    side: Side = "text" if config.text_only else "image"
    if not config.model.distils:
        raise UserError("--teacher none: a tower is trained into its teacher's space, so name a teacher")
    data = open_captions(config.data, distils=True) if config.text_only else open_images_alone(config)
    prompts = find_prompts(config, data)
    cross = cross_settings(config.loss, compared=config.text_only or prompts is not None)
    if not (config.loss.mimicry_weight or cross.counts):
        raise UserError("every weight is 0, so there is nothing to train on: set --mimicry-weight")
    if not config.text_only:
        cli.refuse_unused(vars(config.optimisation), ["text_lr"], "has no effect without --text-only")
    elif not cross.counts:
        cli.refuse_unused(vars(config.loss), ["bank_size"], "has no effect where both cross weights are 0")
    train_clip(
        config,
        recipe="clip_text_tower" if config.text_only else "clip_image_tower",
        data=data,
        make_objective=lambda setup: make_objective(config, setup, side, prompts, cross),
        bundled_rates=(1.4e-2, 3e-3),
        one_tower=side,
        detail=f", {side} tower",
        check=lambda images, teachers: check_store(teachers, prompts, cross),
    )


def open_images_alone(config: Config) -> ClipData:
    """The images of the flags. Raises: UserError for flags of captions."""
    pairs, reason = config.data.pairs, "is of captions, and an image tower is trained without them"
    cli.refuse_unused(vars(config.data), ["captions_per_image", "caption_weights"], reason)
    if pairs.caption_lines:
        raise UserError(f"--caption-lines {reason}: leave it out, or add --text-only")
    columns = () if pairs.columns is None else pairs.columns
    if len(columns) > 1:
        raise UserError(f"--columns {' '.join(columns)}: the second {reason}: name the image column alone")
    if pairs.train_data is None:
        cli.refuse_unused(vars(pairs), ["columns", "quoted"], "has no effect without --train-data")
    source = open_images(pairs.train_data, column=next(iter(columns), None), quoted=pairs.quoted)
    return ClipData(source=source, name=pairs.train_data)


def find_prompts(config: Config, data: ClipData) -> Prompts | None:
    """The texts that images are compared with, if any."""
    if config.text_only:
        cli.refuse_unused(vars(config), ["prompts"], "is for images, and has no effect with --text-only")
        return None
    cli.refuse_unused(vars(config.loss), ["bank_size"], "has no effect without --text-only: prompts are the columns")
    if config.prompts is not None:
        return read_prompts(config.prompts, classnames=data.source.classnames)
    return bundled_prompts() if data.bundled else None


def check_store(teachers: RunTeachers, prompts: Prompts | None, cross: GklSettings) -> None:
    """Raises: UserError for a store of other prompts."""
    if teachers.store is not None and prompts is not None and cross.counts:
        teachers.store.classes(prompts)


def cross_settings(loss: Loss, *, compared: bool) -> GklSettings:
    """GKL of the cross logits. Raises: UserError for weights of logits that do not exist."""
    if not compared:
        reason = "compares images with texts, and there are none: give --prompts, or"
        for name in ("cross_soft_ce_weight", "cross_wmse_weight"):
            if vars(loss)[name]:
                raise UserError(f"{cli.flag_name(name)} {vars(loss)[name]:g} {reason} leave it out")
    usual = (2.0, 6.0) if compared else (0.0, 0.0)
    given = (loss.cross_soft_ce_weight, loss.cross_wmse_weight)
    soft_ce, wmse = (other if value is None else value for value, other in zip(given, usual, strict=True))
    return GklSettings(soft_ce_weight=soft_ce, wmse_weight=wmse, gamma=loss.gamma)


def make_objective(
    config: Config, setup: ClipSetup, side: Side, prompts: Prompts | None, cross: GklSettings
) -> OneTowerKd:
    """The objective with the teacher's class embeddings, which all ranks compute together, or a queue of its images."""
    columns = None
    assert setup.teach is not None  # main refuses --teacher none
    if side == "text":
        columns = Bank(BANK_SIZE if config.loss.bank_size is None else config.loss.bank_size)
    elif prompts is not None and cross.counts:
        (columns,) = setup.teachers.classes(prompts, setup.device)  # all ranks
    return OneTowerKd(
        student=setup.student,
        teacher=setup.teach,
        side=side,
        mimicry_weight=config.loss.mimicry_weight,
        cross=cross,
        columns=columns,
    )


if __name__ == "__main__":
    cli.run(main, Config)
