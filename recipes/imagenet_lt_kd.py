"""Distil classifiers on long-tailed data with GKL: ImageNet-LT, and Places-LT or iNaturalist 2018 by their lists.

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/imagenet_lt_kd.py \
        --pair resnext101-resnet18 --data ImageNet_LT_train.txt --eval-data ImageNet_LT_test.txt --root /data/imagenet \
        --teacher-weights TEACHER.safetensors

runs the published setting: 90 epochs of SGD at a batch of 128 over all processes, cosine rate, and a ResNeXt-101-32x4d
teacher that was trained on the same long-tailed set (bring its weights). Evaluation adds the accuracy on classes with
many (more than 100 images), medium (20 to 100) and few. One GPU, about 10 hours (an estimate).

Papers: Cui et al., arXiv 2305.13948 (IKL) and 2503.08038 (GKL). Expected top-1 is in `PAIRS`.
"""

from functools import partial

from gkl_vl import cli
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.labels import Distillation
from gkl_vl.training.label_kd import LabelConfig, Pair, Recipe, train_classifier

METHODS = {
    "gkl": Distillation(
        gkl=GklSettings(soft_ce_weight=4, wmse_weight=4, gamma=0.3),
        class_prior=True,
        warmup_epochs=0,
    ),
    "kd": Distillation(ce_weight=1, weight=1, temperature=1, warmup_epochs=0),
    "kd-ls": Distillation(ce_weight=0.1, weight=9, temperature=2, warmup_epochs=0),
    "dkd": Distillation(target_weight=1, other_weight=0.5, temperature=1, warmup_epochs=1),
    "dist": Distillation(weight=1, target_weight=1, other_weight=1, temperature=1, warmup_epochs=0),
}


def pair(student: str, *, expected: dict[str, float]) -> Pair:
    return Pair(
        teacher="timm:resnext101_32x4d",
        student=student,
        epochs=90,
        batch_size=128,
        lr=0.05,
        wd=5e-4,
        methods=METHODS,
        expected=expected,
    )


PAIRS = {
    "resnext101-resnet18": pair("timm:resnet18", expected={"student": 41.15, "kd": 44.32, "ikl": 45.21, "gkl": 45.40}),
    "resnext101-resnet50": pair("timm:resnet50", expected={"student": 45.47, "kd": 48.31, "ikl": 49.29, "gkl": 49.40}),
}

RECIPE = Recipe(name="imagenet_lt_kd", pairs=PAIRS, data=None, splits=("train", "test"), image_size=224)


if __name__ == "__main__":
    cli.run(partial(train_classifier, recipe=RECIPE), LabelConfig)
