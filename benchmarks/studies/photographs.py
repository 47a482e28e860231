"""The study on photographs in recipes/README.md: soft CE and GKL with and without captions, on equal seeds.

    python benchmarks/studies/photographs.py --cifar CIFAR10

CIFAR10 is the folder of the parquet files of uoft-cs/cifar10. The images get captions from their class, colours,
brightness and layout (`photographs_data.py`), and a CLIP is trained on all 50,000 with the contrastive loss: the
teacher. Its students see 20,000 of them, with captions in `recipes/clip_kd.py`, and alone, against the ten class names,
in `recipes/clip_unlabelled.py`: 2,000 images a class, which is what the class prior is for. Teacher and runs that are
done already are not run again. Prints a Markdown table for each kind of students: zero-shot accuracy on the 10,000 test
images with CLIP's 18 prompts, mean and standard deviation over seeds, and the paired difference to the arms that have
a term less or another in its place, with its standard error. `--search` compares other weights on images alone; give it
seeds of its own.
"""

from pathlib import Path

from photographs_data import STUDENT_CONFIG, STUDENT_DATA, TEACHER_CONFIG, TEACHER_DATA, TEMPLATES, write_files
from study import ONLY_AT_THE_END, Arm, Arms, Study, make_clip_parser

TEACHER_FLAGS = ["--teacher", "none", "--steps", "2400", "--lr", "8e-3", "--warmup", "100", "--precision", "bf16"]
STUDENT_FLAGS = ["--lr", "6e-3"]
COLUMNS: dict[str, tuple[str | None, str]] = {"acc1": (None, "acc1"), "acc5": (None, "acc5")}


def weights(*, soft_ce: float = 1, wmse: float = 0, cross_soft_ce: float = 0, cross_wmse: float = 0) -> list[str]:
    """Flags of the halves of GKL on the student's own logits and on cross logits."""
    flags = ["--soft-ce-weight", str(soft_ce), "--wmse-weight", str(wmse)]
    return [*flags, "--cross-soft-ce-weight", str(cross_soft_ce), "--cross-wmse-weight", str(cross_wmse)]


PRIOR, NO_MIMICRY = ["--class-prior"], ["--mimicry-weight", "0"]
MIMICRY, SOFT_CE, CROSS_SOFT_CE = "mimicry + soft CE", "soft CE", "soft CE + cross soft CE"
# name: (flags, the arms to compare it with)
CAPTIONS: Arms = {
    MIMICRY: Arm(weights(), None),
    "mimicry + soft CE + cross soft CE": Arm(weights(cross_soft_ce=2), MIMICRY),
    "mimicry + soft CE + cross GKL": Arm(weights(cross_soft_ce=2, cross_wmse=6), "mimicry + soft CE + cross soft CE"),
    CROSS_SOFT_CE: Arm([*weights(cross_soft_ce=2), *NO_MIMICRY], None),
    "soft CE + cross GKL": Arm([*weights(cross_soft_ce=2, cross_wmse=6), *NO_MIMICRY], (CROSS_SOFT_CE, MIMICRY)),
}
IMAGES: Arms = {
    SOFT_CE: Arm(weights(), None),
    "GKL": Arm(weights(wmse=0.05), SOFT_CE),
    "GKL, class prior": Arm([*weights(wmse=0.05), *PRIOR], "GKL"),
    CROSS_SOFT_CE: Arm(weights(cross_soft_ce=1), SOFT_CE),
    "soft CE + cross GKL": Arm(weights(cross_soft_ce=1, cross_wmse=3), CROSS_SOFT_CE),
    "soft CE + cross GKL, class prior": Arm([*weights(cross_soft_ce=1, cross_wmse=3), *PRIOR], "soft CE + cross GKL"),
}
SEARCH: Arms = {
    SOFT_CE: Arm(weights(), None),
    **{f"wMSE {w}": Arm(weights(wmse=w), SOFT_CE) for w in (0.05, 0.5)},
    **{f"cross soft CE {w}": Arm(weights(cross_soft_ce=w), SOFT_CE) for w in (1, 4)},
    **{f"cross wMSE {w}": Arm(weights(cross_soft_ce=1, cross_wmse=w), "cross soft CE 1") for w in (0.5, 3)},
}


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1, 2], folder="runs/study_photographs")
    parser.add_argument("--cifar", type=Path, required=True, help="folder of the parquet files of CIFAR-10")
    parser.add_argument("--search", action="store_true", help="the arms of the search over rates and weights instead")
    parser.add_argument("--only", choices=["captions", "images"], help="one of the two kinds of students")
    options = parser.parse_args()
    data: Path = options.output_dir / "data"
    write_files(options.cifar, data)
    common = ["--eval-data", "cifar10", "--dataset-root", str(options.cifar), "--workers", "0", *ONLY_AT_THE_END]
    teacher = Study(
        recipe="clip_kd",
        arms={"teacher": Arm(TEACHER_FLAGS, None)},
        flags=[*common, "--student", str(data / TEACHER_CONFIG), "--train-data", str(data / TEACHER_DATA)],
        columns=COLUMNS,
        seeds=[0],
        jobs=1,
        folder=options.output_dir,
    )
    (accuracy,) = teacher.run().values()
    print(f"teacher: {', '.join(f'{heading} {percent:.2f}' for heading, percent in accuracy.items())}\n")
    common += ["--teacher", f"local-dir:{teacher.folder_of('teacher', 0) / 'model'}", "--steps", str(options.steps)]
    common += ["--student", str(data / STUDENT_CONFIG), "--train-data", str(data / STUDENT_DATA), *STUDENT_FLAGS]
    images = ("clip_unlabelled", SEARCH if options.search else IMAGES, ["--prompts", str(data / TEMPLATES)])
    studies: list[tuple[str, Arms, list[str]]] = [] if options.only == "captions" else [images]
    studies += [] if options.search or options.only == "images" else [("clip_kd", CAPTIONS, [])]
    for recipe, arms, flags in studies:
        study = Study(
            recipe=recipe,
            arms=arms,
            flags=[*common, *flags],
            columns=COLUMNS,
            seeds=options.seeds,
            jobs=options.jobs,
            folder=options.output_dir / str(options.steps) / ("search" if options.search else recipe),
        )
        print(f"{study.table(study.run())}\n")


if __name__ == "__main__":
    main()
