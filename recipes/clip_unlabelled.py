"""Distil a CLIP teacher on images without captions or labels; the target is its zero-shot logits over class prompts.

    accelerate launch recipes/clip_unlabelled.py

runs on the bundled emoji without their captions, with the 1,658 names as classes; three minutes on two CPU cores. With
your own images and prompts, where pets.json holds {"classnames": ["Abyssinian", ...], "templates": ["a photo of a {c},
a type of pet."]}:

    accelerate launch recipes/clip_unlabelled.py --teacher ViT-L-14 --teacher-pretrained openai --student ViT-T-16 \
        --train-data /data/pets --prompts pets.json --epochs 20

Expected on bundled data (two seeds): 16.4 % top-1 on `emoji`; with --class-prior 15.0 %.

Papers: Li et al., "PromptKD", CVPR 2024, arXiv 2403.02781 (the setting); Cui et al., arXiv 2305.13948 and 2503.08038
(the loss and the class prior). The combination is this project's. Results: recipes/README.md.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from gkl_vl import cli
from gkl_vl.data.pairs import open_images
from gkl_vl.data.prompts import Prompts, bundled_prompts, read_prompts
from gkl_vl.data.sources import Source
from gkl_vl.errors import UserError
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.zero_shot import ZeroShotKd, prompt_tokens
from gkl_vl.training.clip import ClipData, ClipEvaluation, ClipOptimisation, ClipSetup, train_clip
from gkl_vl.training.clip_models import ClipModels, StudentFlags
from gkl_vl.training.clip_teacher import RunTeachers
from gkl_vl.training.run import RunFlags


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Images for training, and the classes that the teacher compares them with."""

    train_data: str | None = None
    """A folder of images, or shards and tables whose captions are not read. None = the bundled emoji."""
    image_column: str | None = None
    """Image column of a table, ending of the images of shards. None = `filepath` in CSV, `image` or `img` elsewhere."""
    quoted: bool | None = None
    """CSV, TSV: cells may be in double quotes. None = yes for .csv, no for .tsv: a quote is a letter there."""
    prompts: str | None = None
    """.json of `classnames` and `templates` with {c}, or .txt of templates. None = the bundled ones."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Settings of GKL."""

    gkl: Annotated[GklSettings, tyro.conf.arg(name="")] = GklSettings(wmse_weight=0.05, gamma=0.5)
    cross_soft_ce_weight: float = 0.0
    """Soft cross entropy of the student's images against the teacher's class embeddings, on the teacher's scale."""
    cross_wmse_weight: float = 0.0
    """wMSE of the same logits; gamma, the temperatures and the class prior are GKL's."""
    class_prior: bool = False
    """Weigh wMSE by the teacher's mean softmax, in the last pass, over images with the same likeliest class."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distil a CLIP teacher on images without captions. Without flags: the bundled default."""

    model: ClipModels = ClipModels()
    student: StudentFlags = StudentFlags()
    data: ImageData = ImageData()
    loss: Loss = Loss()
    optimisation: ClipOptimisation = ClipOptimisation()
    run: RunFlags = RunFlags(workers=1)
    evaluation: ClipEvaluation = ClipEvaluation()


def main(config: Config) -> None:
    gkl, name = config.loss.gkl, config.data.train_data
    if not config.model.distils:
        raise UserError("--teacher none: without captions the teacher's logits are the only target, so name a teacher")
    if not gkl.counts:
        raise UserError(
            "--soft-ce-weight 0 and --wmse-weight 0: no other term trains the student's text tower, so set one of them"
        )
    if name is not None and config.data.prompts is None:
        raise UserError(f"--train-data {name} needs classes for the teacher's logits: give --prompts")
    if name is None:
        cli.refuse_unused(vars(config.data), ["image_column"], "has no effect without --train-data")
    source = open_images(name, column=config.data.image_column, quoted=config.data.quoted)
    prompts = find_prompts(config.data, source)
    train_clip(
        config,
        recipe="clip_unlabelled",
        data=ClipData(source=source, name=name),
        make_objective=lambda setup: make_objective(config, setup, prompts, source),
        bundled_rates=(3e-3, 3e-3),
        mapped=("image",) if cross_settings(config.loss).counts else (),
        detail=f" on images of {source.name}",
        check=lambda images, teachers: check_run(config, source, prompts, images, teachers),
    )


def cross_settings(loss: Loss) -> GklSettings:
    """GKL of the cross logits."""
    return replace(loss.gkl, soft_ce_weight=loss.cross_soft_ce_weight, wmse_weight=loss.cross_wmse_weight)


def find_prompts(data: ImageData, source: Source) -> Prompts:
    """The classes and templates of --prompts, or the bundled ones."""
    if data.prompts is None:
        return bundled_prompts()
    return read_prompts(data.prompts, classnames=source.classnames)


def check_run(config: Config, source: Source, prompts: Prompts, images: int, teachers: RunTeachers) -> None:
    """Raises: UserError for stores of other prompts, and where a run that sees so many images never uses the class
    prior."""
    if teachers.store is not None:
        teachers.store.classes(prompts)
    if not config.loss.class_prior:
        return
    if not (config.loss.gkl.wmse_weight or config.loss.cross_wmse_weight):
        raise UserError("--class-prior weighs wMSE and has no effect with --wmse-weight 0: give --no-class-prior")
    if source.num_pairs is None:
        raise UserError(
            f"--class-prior needs the number of images in a pass, and the size of {source.name!r} is unknown: put "
            "sizes.json beside the shards, or give --no-class-prior"
        )
    if images <= source.num_pairs:
        raise UserError(
            f"--class-prior is collected in a pass over the data and used in the next, and the run sees {images:,} of "
            f"{source.num_pairs:,} images: train longer, or give --no-class-prior"
        )


def make_objective(config: Config, setup: ClipSetup, prompts: Prompts, source: Source) -> ZeroShotKd:
    """The objective with the teachers' class embeddings, which all ranks compute together."""
    teachers = setup.teachers
    assert setup.teach is not None  # main refuses --teacher none
    prior = EpochPrior(len(prompts.classnames), config.loss.gkl.weight_temperature) if config.loss.class_prior else None
    return ZeroShotKd(
        student=setup.student,
        teacher=setup.teach,
        classes=teachers.classes(prompts, setup.device),  # all ranks
        teacher_weights=teachers.shares,
        tokens=prompt_tokens(prompts, setup.student, setup.device),
        gkl=config.loss.gkl,
        cross=cross_settings(config.loss),
        prior=prior,
        num_images=source.num_pairs,
        seed=config.run.seed,
    )


if __name__ == "__main__":
    cli.run(main, Config)
