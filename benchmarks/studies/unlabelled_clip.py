"""The study of recipes/README.md: zero-shot logits on images alone, with and without the class prior, on equal seeds.

    python benchmarks/studies/unlabelled_clip.py

Every arm is `recipes/clip_unlabelled.py`: the training drawings without their captions, and the 1,658
class names. Runs that are done already are not run again, so the study can be stopped and taken up. It prints a
Markdown table: mean and standard deviation over seeds, and the paired difference to the arm that has a term less (same
seed = same initial weights, same batches) with its standard error.
"""

from study import Arm, Arms, make_clip_parser, make_clip_study

SOFT_CE = "soft CE alone"
# name: (flags, the arm to compare it with)
ARMS: Arms = {
    SOFT_CE: Arm(["--wmse-weight", "0"], None),
    "wMSE .05": Arm(["--wmse-weight", "0.05"], SOFT_CE),
    "wMSE .05, class prior": Arm(["--wmse-weight", "0.05", "--class-prior"], "wMSE .05"),
    "wMSE .5": Arm(["--wmse-weight", "0.5"], SOFT_CE),
    "wMSE .5, class prior": Arm(["--wmse-weight", "0.5", "--class-prior"], "wMSE .5"),
}


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1], folder="runs/study_unlabelled_clip")
    options = parser.parse_args()
    study = make_clip_study(options, recipe="clip_unlabelled", arms=ARMS)
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
