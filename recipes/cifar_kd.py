"""Distil CIFAR classifiers with GKL, and with the methods that it is compared with.

    accelerate launch recipes/cifar_kd.py --pair resnet56-resnet20 --teacher-weights TEACHER.pth --allow-pickle

runs a published pair: CIFAR-100 from the Hub (or `--data` a folder with it), 240 epochs of SGD, a teacher of
mdistiller's `cifar_teachers` (https://github.com/megvii-research/mdistiller/releases, for this pair
`resnet56_vanilla/ckpt_epoch_240.pth`). `--method ce|kd|kd-ls|dkd|dist|dkl|ikl|gkl`. One GPU, one to three hours (an
estimate). Long-tailed CIFAR: `--imbalance 100`; a laptop: `--images 10000 --epochs 8 --stored-views 8`.

Papers: Cui et al., arXiv 2305.13948 (IKL) and 2503.08038 (GKL). Expected top-1, from the IKL paper's Table 3 (mean of 3
runs), is in `PAIRS`; GKL was not published pair by pair. Results of our own: recipes/README.md.
"""

from functools import partial

from gkl_vl import cli
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.labels import Distillation
from gkl_vl.training.label_kd import LabelConfig, Pair, Recipe, train_classifier

LIGHT = ("ShuffleV1", "ShuffleV2", "MobileNetV2")

# teacher, student, GKL's soft CE and wMSE weight and gamma, its class prior, DKD's weight of the non-target classes;
# published top-1 of the teacher, of the student alone, of KD, DKD and IKL.
ROWS = (
    ("resnet56", "resnet20", 1, 4, 0.2, True, 2, (72.34, 69.06, 70.66, 71.97, 71.44)),
    ("resnet110", "resnet32", 1, 4, 0.1, False, 2, (74.31, 71.14, 73.08, 74.11, 74.26)),
    ("resnet32x4", "resnet8x4", 1, 16, 0.05, True, 8, (79.42, 72.50, 73.33, 76.32, 76.59)),
    ("wrn_40_2", "wrn_16_2", 3, 20, 0.3, False, 6, (75.61, 73.26, 74.92, 76.24, 76.45)),
    ("wrn_40_2", "wrn_40_1", 1, 12, 0.3, False, 6, (75.61, 71.98, 73.54, 74.81, 74.98)),
    ("vgg13", "vgg8", 1, 8, 0.2, True, 6, (74.64, 70.36, 72.98, 74.68, 74.98)),
    ("resnet32x4", "ShuffleV1", 1, 8, 0.0, True, 8, (79.42, 70.50, 74.07, 76.45, 76.64)),
    ("wrn_40_2", "ShuffleV1", 1, 8, 0.0, False, 8, (75.61, 70.50, 74.83, 76.70, 77.19)),
    ("resnet32x4", "ShuffleV2", 3, 12, 0.1, True, 8, (79.42, 71.82, 74.45, 77.07, 77.16)),
    ("vgg13", "MobileNetV2", 4, 12, 0.1, True, 6, (74.64, 64.60, 67.37, 69.71, 70.40)),
    ("ResNet50", "MobileNetV2", 1, 8, 0.05, True, 8, (79.34, 64.60, 67.35, 70.35, 70.62)),
)


def pair(
    teacher: str,
    student: str,
    soft_ce_weight: float,
    wmse_weight: float,
    gamma: float,
    class_prior: bool,
    dkd_weight: float,
    expected: tuple[float, ...],
) -> Pair:
    """GKL as released, DKD as in mdistiller's configs, the others with one setting for all pairs as in their papers."""
    return Pair(
        teacher=teacher,
        student=student,
        epochs=240,
        batch_size=64,
        lr=0.01 if student in LIGHT else 0.05,
        wd=5e-4,
        milestones=(150, 180, 210),
        methods={
            "gkl": Distillation(
                gkl=GklSettings(
                    soft_ce_weight=soft_ce_weight,
                    wmse_weight=wmse_weight,
                    gamma=gamma,
                    temperature=4,
                    weight_temperature=4,
                ),
                class_prior=class_prior,
                warmup_epochs=20,
            ),
            "kd": Distillation(ce_weight=0.1, weight=0.9, temperature=4, warmup_epochs=0),
            "kd-ls": Distillation(ce_weight=0.1, weight=9, temperature=2, warmup_epochs=0),
            "dkd": Distillation(target_weight=1, other_weight=dkd_weight, temperature=4, warmup_epochs=20),
            "dist": Distillation(weight=1, target_weight=2, other_weight=2, temperature=4, warmup_epochs=0),
        },
        expected=dict(zip(("teacher", "student", "kd", "dkd", "ikl"), expected, strict=True)),
    )


PAIRS = {f"{row[0]}-{row[1]}": pair(*row) for row in ROWS}
RECIPE = Recipe(name="cifar_kd", pairs=PAIRS, data="uoft-cs/cifar100", splits=("train", "test"), image_size=None)


if __name__ == "__main__":
    cli.run(partial(train_classifier, recipe=RECIPE), LabelConfig)
