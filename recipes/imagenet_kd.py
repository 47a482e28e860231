"""Distil ImageNet classifiers with GKL.

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/imagenet_kd.py \
        --pair resnet34-resnet18 --data /data/imagenet --precision bf16 --workers 12

runs a published pair: 100 epochs of SGD at a batch of 512 over all processes, with torchvision's first weights (through
timm) as the teacher. `--data` is a folder with train/ and val/, web shards (then `--eval-data` too), or a Hub dataset
(ILSVRC/imagenet-1k, the default, is gated). `--stored-views 5 --stored-top-k 50` stores the teacher's logits of five
views of each image once. Eight GPUs, about 6 hours (an estimate).

Papers: Cui et al., arXiv 2305.13948 (IKL) and 2503.08038 (GKL). Expected top-1 is in `PAIRS`.
"""

from functools import partial

from gkl_vl import cli
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.labels import Distillation
from gkl_vl.training.label_kd import LabelConfig, Pair, Recipe, train_classifier


def pair(teacher: str, student: str, *, gkl: Distillation, expected: dict[str, float]) -> Pair:
    """GKL as released; the others with their papers' settings for ImageNet."""
    return Pair(
        teacher=teacher,
        teacher_weights="pretrained",
        student=student,
        epochs=100,
        batch_size=512,
        lr=0.2,
        wd=1e-4,
        milestones=(30, 60, 90),
        methods={
            "gkl": gkl,
            "kd": Distillation(ce_weight=0.5, weight=0.5, temperature=1, warmup_epochs=0),
            "kd-ls": Distillation(ce_weight=0.1, weight=9, temperature=2, warmup_epochs=0),
            "dkd": Distillation(target_weight=1, other_weight=0.5, temperature=1, warmup_epochs=1),
            "dist": Distillation(weight=1, target_weight=1, other_weight=1, temperature=1, warmup_epochs=0),
        },
        expected=expected,
    )


def gkl(soft_ce_weight: float, wmse_weight: float, gamma: float) -> Distillation:
    """The released settings: class prior, both temperatures 1, warm-up over 5 epochs."""
    return Distillation(
        gkl=GklSettings(soft_ce_weight=soft_ce_weight, wmse_weight=wmse_weight, gamma=gamma),
        class_prior=True,
        warmup_epochs=5,
    )


PAIRS = {
    "resnet34-resnet18": pair(
        "timm:resnet34.tv_in1k",
        "timm:resnet18",
        gkl=gkl(1, 0.5, 0.6),
        expected={"teacher": 73.31, "student": 69.75, "kd": 71.03, "dkd": 71.70, "ikl": 71.91, "gkl": 71.91},
    ),
    "resnet50-mobilenetv1": pair(
        "timm:resnet50.tv_in1k",
        "timm:mobilenetv1_100",
        gkl=gkl(4, 1, 0.5),
        expected={"teacher": 76.16, "student": 68.87, "kd": 70.50, "dkd": 72.05, "ikl": 72.84, "gkl": 72.92},
    ),
}

RECIPE = Recipe(
    name="imagenet_kd", pairs=PAIRS, data="ILSVRC/imagenet-1k", splits=("train", "validation"), image_size=224
)


if __name__ == "__main__":
    cli.run(partial(train_classifier, recipe=RECIPE), LabelConfig)
