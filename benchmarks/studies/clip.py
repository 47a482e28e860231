"""The study of recipes/README.md: which terms in the batch help the CLIP distillation, on equal seeds.

    python benchmarks/studies/clip.py

Every arm is `recipes/clip_kd.py` on the bundled data with other weights; runs that are done already are not run
again, so the study can be stopped and taken up. It prints a Markdown table: mean and standard deviation over seeds, and
the paired difference to the arm that has a term less (same seed = same initial weights, same batches) with its standard
error. `--search` compares other weights and gammas with `+ mimicry + GKL`; give it other seeds than the study, so
that what it picks is judged on runs that had no part in the picking.
"""

from study import IN_BATCH, Arm, Arms, make_clip_parser, make_clip_study

NO_MIMICRY = ["--mimicry-weight", "0"]
NO_WMSE = [*IN_BATCH, "--wmse-weight", "0"]
NO_GKL = [*NO_WMSE, "--soft-ce-weight", "0"]
# name: (flags, the arm to compare it with: the one that has a term less)
ARMS: Arms = {
    "contrastive": Arm([*NO_GKL, *NO_MIMICRY], None),
    "+ soft CE": Arm([*NO_WMSE, *NO_MIMICRY], "contrastive"),
    "+ GKL": Arm([*IN_BATCH, *NO_MIMICRY], "+ soft CE"),
    "+ mimicry": Arm(NO_GKL, "contrastive"),
    "+ mimicry + soft CE": Arm(NO_WMSE, "+ mimicry"),
    "+ mimicry + GKL": Arm(IN_BATCH, "+ mimicry + soft CE"),
}
DEFAULT = "+ mimicry + GKL"
SEARCH: Arms = {
    DEFAULT: Arm(IN_BATCH, None),
    "wMSE 2, gamma 1": Arm([*IN_BATCH, "--wmse-weight", "2", "--gamma", "1"], DEFAULT),
    "wMSE .05, gamma 0": Arm([*IN_BATCH, "--wmse-weight", "0.05", "--gamma", "0"], DEFAULT),
    "wMSE .2, gamma 0": Arm([*IN_BATCH, "--wmse-weight", "0.2", "--gamma", "0"], DEFAULT),
    "no contrastive, wMSE .05, gamma 0": Arm(
        [*IN_BATCH, "--contrastive-weight", "0", "--wmse-weight", "0.05", "--gamma", "0"],
        "wMSE .05, gamma 0",
    ),
}


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1, 2, 3, 4], folder="runs/study_clip")
    parser.add_argument("--search", action="store_true", help="the arms of the search over weights and gamma instead")
    options = parser.parse_args()
    study = make_clip_study(options, recipe="clip_kd", arms=SEARCH if options.search else ARMS)
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
