"""The study of recipes/README.md: zero-shot logits on images alone, with and without the class prior, on equal seeds.

    python benchmarks/studies/unlabelled_clip.py

Every arm is `recipes/clip_kd.py --unlabelled bundled`: the training drawings without their captions, and the 1,658
class names. Runs that are done already are not run again, so the study can be stopped and taken up. It prints a
Markdown table: mean and standard deviation over seeds, and the paired difference to the arm that has a term less (same
seed = same initial weights, same batches) with its standard error.
"""

import argparse
import os
from pathlib import Path

from study import Arms, Study

RECIPE = Path(__file__).parents[2] / "recipes" / "clip_kd.py"
SOFT_CE = "soft CE alone"
# name: (flags, the arm to compare it with)
ARMS: Arms = {
    SOFT_CE: (["--wmse-weight", "0"], None),
    "wMSE .05": (["--wmse-weight", "0.05"], SOFT_CE),
    "wMSE .05, class prior": (["--wmse-weight", "0.05", "--class-prior"], "wMSE .05"),
    "wMSE .5": (["--wmse-weight", "0.5"], SOFT_CE),
    "wMSE .5, class prior": (["--wmse-weight", "0.5", "--class-prior"], "wMSE .5"),
}
COLUMNS: dict[str, tuple[str | None, str]] = {
    "emoji acc1": ("emoji", "acc1"),
    "emoji acc5": ("emoji", "acc5"),
    "emoji_unseen acc1": ("emoji_unseen", "acc1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="every arm runs on each")
    parser.add_argument("--steps", type=int, default=300, help="updates of every run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study_unlabelled_clip"))
    options = parser.parse_args()
    study = Study(
        recipe=RECIPE,
        arms=ARMS,
        flags=["--unlabelled", "bundled", "--steps", str(options.steps), "--workers", "0"]
        + ["--eval-every-steps", "0", "--checkpoint-every-steps", "0"],
        columns=COLUMNS,
        seeds=options.seeds,
        jobs=options.jobs,
        folder=options.output_dir / str(options.steps),
    )
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
