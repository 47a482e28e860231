"""The study of recipes/README.md: one tower in the teacher's space, beside a student with two towers of its own.

    python benchmarks/studies/one_tower.py

`recipes/clip_image_tower.py` on the bundled default, with the teacher's texts, or with --text-only its images, on
equal seeds. Runs that are done already are not run again.
"""

from study import Arm, Arms, make_clip_parser, make_clip_study

IMAGES = "image tower"
ARMS: Arms = {
    "two towers, clip_kd": Arm([], None, recipe="clip_kd"),
    IMAGES: Arm([], "two towers, clip_kd"),
    "image tower, mimicry alone": Arm(["--cross-soft-ce-weight", "0", "--cross-wmse-weight", "0"], IMAGES),
    "image tower, cross GKL alone": Arm(["--mimicry-weight", "0"], IMAGES),
    "text tower": Arm(["--text-only"], "two towers, clip_kd"),
}
COLUMNS: dict[str, tuple[str | None, str]] = {
    "emoji acc1": ("emoji", "acc1"),
    "emoji acc5": ("emoji", "acc5"),
    "emoji_unseen acc1": ("emoji_unseen", "acc1"),
    "text recall@1": ("emoji", "text_retrieval_recall@1"),
    "image recall@1": ("emoji", "image_retrieval_recall@1"),
}


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1, 2], folder="runs/study_one_tower")
    options = parser.parse_args()
    study = make_clip_study(options, recipe="clip_image_tower", arms=ARMS, columns=COLUMNS)
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
