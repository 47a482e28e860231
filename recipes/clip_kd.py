"""Distil a CLIP teacher into a small student on image-text pairs with GKL.

    accelerate launch recipes/clip_kd.py

runs the bundled default: a teacher trained here on emoji drawings of two styles, a student of a fraction of its size,
and an evaluation on drawings of a third style and on concepts that neither model was trained on. Three minutes on two
CPU cores; the expected table is in the README. With your own teacher and shards (32 epochs of CC12M take one to two
days on 8 A100, an estimate):

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/clip_kd.py \
        --teacher ViT-L-14 --teacher-pretrained laion400m_e32 --student ViT-T-16 \
        --train-data '/data/cc12m-{0000..2175}.tar' --epochs 32 --batch-size 512 --precision bf16

Terms: the contrastive loss, soft CE on the student's image-text logits and, on bundled data, GKL between the student's
images and the teacher's texts and the reverse; elsewhere feature mimicry in its place, until `--cross-soft-ce-weight 2
--cross-wmse-weight 6 --mimicry-weight 0` are given: on photographs mimicry was better.

`--teacher none` trains with the contrastive loss alone; that is how the bundled teacher was made. Images without
captions: recipes/clip_unlabelled.py. Students that resist attacks: recipes/clip_robust.py.

Paper: Cui et al., "Generalized Kullback-Leibler Divergence Loss", arXiv 2503.08038, and arXiv 2305.13948. The
image-text form is this project's. Results, with commands and spread: recipes/README.md.
"""

from dataclasses import dataclass

from gkl_vl import cli
from gkl_vl.training.clip import (
    CaptionData,
    CaptionLoss,
    ClipEvaluation,
    ClipOptimisation,
    caption_objective,
    caption_weights,
    open_captions,
    train_clip,
)
from gkl_vl.training.clip_models import ClipModels, StudentFlags
from gkl_vl.training.run import RunFlags


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distil a CLIP teacher into a small student with GKL. Without flags: the bundled default."""

    model: ClipModels = ClipModels()
    student: StudentFlags = StudentFlags()
    data: CaptionData = CaptionData()
    loss: CaptionLoss = CaptionLoss()
    optimisation: ClipOptimisation = ClipOptimisation()
    run: RunFlags = RunFlags(workers=1)
    evaluation: ClipEvaluation = ClipEvaluation()


def main(config: Config) -> None:
    data = open_captions(config.data, distils=config.model.distils)
    weights = caption_weights(config.loss, distils=config.model.distils, bundled=data.bundled)
    train_clip(
        config,
        recipe="clip_kd",
        data=data,
        make_objective=caption_objective(config.loss, weights),
        bundled_rates=(1.4e-2, 3e-3),
        mapped=weights.mapped,
    )


if __name__ == "__main__":
    cli.run(main, Config)
