"""The study of recipes/README.md: GKL on cross logits, on equal seeds.

    python benchmarks/studies/cross_logits.py                        # the table: seeds 0 to 4
    python benchmarks/studies/cross_logits.py --search               # what the settings were chosen by: seeds 20 to 22
    python benchmarks/studies/cross_logits.py --steps 1200           # four times as long

Every arm is `cross_logits_arm.py`, which is `recipes/clip_kd.py` on the bundled default with further terms. Settings
are chosen on half A of the test drawings and seeds from 20 on, and reported on half B and seeds 0 to 4. Runs that are
done already are not run again.
"""

from study import Arm, Arms, Study, make_parser

NO_MIMICRY = ["--mimicry-weight", "0"]


def cross(*, soft_ce: float = 2, wmse: float = 0, bank_size: int = 4096) -> list[str]:
    """The recipe's own terms on cross logits, with its queue as bank."""
    flags = ["--wmse-weight", "0", "--cross-soft-ce-weight", str(soft_ce), "--cross-wmse-weight", str(wmse)]
    return [*flags, "--bank-size", str(bank_size)]


NO_CROSS = ["--wmse-weight", "0", "--cross-soft-ce-weight", "0", "--cross-wmse-weight", "0"]
SOFT_CE, GKL = [*NO_CROSS, "--cross-soft-ce", "2"], [*NO_CROSS, "--cross-soft-ce", "2", "--cross-wmse", "6"]
BASE, CROSS_SOFT_CE, CROSS_GKL = "mimicry + soft CE", "+ cross soft CE", "+ cross GKL"
# name: (flags, the arm to compare it with)
ARMS: Arms = {
    "mimicry": Arm([*NO_CROSS, "--soft-ce-weight", "0"], None),
    BASE: Arm(NO_CROSS, "mimicry"),
    "+ GKL in the batch": Arm([*NO_CROSS, "--wmse-weight", "0.5"], BASE),
    CROSS_SOFT_CE: Arm(cross(), BASE),
    CROSS_GKL: Arm(cross(wmse=6), CROSS_SOFT_CE),
    "cross soft CE, no mimicry": Arm([*cross(), *NO_MIMICRY], None),
    "cross GKL, no mimicry": Arm([*cross(wmse=6), *NO_MIMICRY], "cross soft CE, no mimicry"),
    "+ cross soft CE 4": Arm(cross(soft_ce=4), BASE),
    "+ cross soft CE 8": Arm(cross(soft_ce=8), BASE),
    "+ cross soft CE at T 1 and 2": Arm([*SOFT_CE, "--soft-ce-at-2", "24", "--bank", "queue"], CROSS_SOFT_CE),
    "+ distances of pairs": Arm([*NO_CROSS, "--relational", "20"], BASE),
    "+ cross DIST": Arm([*NO_CROSS, "--correlation", "2", "--bank", "queue"], BASE),
    "+ cross GKL, concepts of one half": Arm([*GKL, "--bank", "half"], BASE),
    "+ cross GKL, captions without a name": Arm([*GKL, "--bank", "keywords"], BASE),
}
SEARCH: Arms = {
    BASE: Arm(NO_CROSS, None),
    CROSS_GKL: Arm(cross(wmse=6), BASE),
    "mean of each name as bank": Arm([*GKL, "--bank", "names"], BASE),
    "sample of the store as bank": Arm([*GKL, "--bank", "store"], BASE),
    "the batch alone": Arm(cross(wmse=6, bank_size=0), BASE),
    "bank of 1,024": Arm(cross(wmse=6, bank_size=1024), BASE),
    "ratio of sums": Arm([*GKL, "--bank", "queue", "--ratio"], BASE),
    "gamma 0": Arm([*GKL, "--bank", "queue", "--cross-gamma", "0"], BASE),
    "gamma 0.35": Arm([*GKL, "--bank", "queue", "--cross-gamma", "0.35"], BASE),
    "gamma 1": Arm([*GKL, "--bank", "queue", "--cross-gamma", "1"], BASE),
    "prior of 200 clusters of captions": Arm([*GKL, "--bank", "names", "--prior", "200"], BASE),
}
COLUMNS: dict[str, tuple[str | None, str]] = {
    "emoji acc1": ("emoji", "acc1"),
    "half A": ("study", "acc1_a"),
    "half B": ("study", "acc1_b"),
    "emoji acc5": ("emoji", "acc5"),
    "emoji_unseen acc1": ("emoji_unseen", "acc1"),
    "image recall@1": ("emoji", "image_retrieval_recall@1"),
    "with the teacher's texts": ("study", "acc1_teacher_texts"),
    "100 KL": ("study", "kl"),
}


def main() -> None:
    parser = make_parser(__doc__, seeds=[0, 1, 2, 3, 4], folder="runs/study_cross_logits")
    parser.add_argument("--steps", type=int, default=300, help="updates of every run")
    parser.add_argument("--student", default="emoji-student", help="another student, for a shorter search")
    parser.add_argument("--search", action="store_true", help="the arms of the search")
    parser.add_argument("--arms", nargs="+", help="only these")
    options = parser.parse_args()
    arms = SEARCH if options.search else ARMS
    study = Study(
        recipe="cross_logits_arm",
        arms={name: arm for name, arm in arms.items() if options.arms is None or name in options.arms},
        flags=["--steps", str(options.steps), "--student", options.student]
        + ["--eval-every-steps", "0", "--checkpoint-every-steps", "0"],
        columns=COLUMNS,
        seeds=options.seeds,
        jobs=options.jobs,
        folder=options.output_dir / str(options.steps),
    )
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
