"""The study of recipes/README.md: which terms of the CLIP distillation help, on equal seeds.

    python benchmarks/studies/clip.py

Every arm is `recipes/clip_kd.py` on the bundled default with other weights; runs that are done already are not run
again, so the study can be stopped and taken up. It prints a Markdown table: mean and standard deviation over seeds, and
the paired difference to the arm that has a term less (same seed = same initial weights, same batches) with its standard
error. `--search` compares other weights and gammas with the recipe's own; give it other seeds than the study, so
that what it picks is judged on runs that had no part in the picking.
"""

import argparse
import os
from pathlib import Path

from study import Arms, Study

RECIPE = Path(__file__).parents[2] / "recipes" / "clip_kd.py"
NO_MIMICRY = ["--mimicry-weight", "0"]
NO_WMSE = ["--wmse-weight", "0"]
NO_GKL = ["--soft-ce-weight", "0", "--wmse-weight", "0"]
# name: (flags, the arm to compare it with: the one that has a term less)
ARMS: Arms = {
    "contrastive": ([*NO_GKL, *NO_MIMICRY], None),
    "+ soft CE": ([*NO_WMSE, *NO_MIMICRY], "contrastive"),
    "+ GKL": (NO_MIMICRY, "+ soft CE"),
    "+ mimicry": (NO_GKL, "contrastive"),
    "+ mimicry + soft CE": (NO_WMSE, "+ mimicry"),
    "+ mimicry + GKL": ([], "+ mimicry + soft CE"),
}
DEFAULT = "+ mimicry + GKL"
SEARCH: Arms = {
    DEFAULT: ([], None),
    "wMSE 2, gamma 1": (["--wmse-weight", "2", "--gamma", "1"], DEFAULT),
    "wMSE .05, gamma 0": (["--wmse-weight", "0.05", "--gamma", "0"], DEFAULT),
    "wMSE .2, gamma 0": (["--wmse-weight", "0.2", "--gamma", "0"], DEFAULT),
    "no contrastive, wMSE .05, gamma 0": (
        ["--contrastive-weight", "0", "--wmse-weight", "0.05", "--gamma", "0"],
        "wMSE .05, gamma 0",
    ),
}
COLUMNS: dict[str, tuple[str | None, str]] = {
    "emoji acc1": ("emoji", "acc1"),
    "emoji acc5": ("emoji", "acc5"),
    "emoji_unseen acc1": ("emoji_unseen", "acc1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="every arm runs on each")
    parser.add_argument("--steps", type=int, default=300, help="updates of every run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--search", action="store_true", help="the arms of the search over weights and gamma instead")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study_clip"))
    options = parser.parse_args()
    study = Study(
        recipe=RECIPE,
        arms=SEARCH if options.search else ARMS,
        flags=["--steps", str(options.steps), "--workers", "0", "--eval-every-steps", "0"]
        + ["--checkpoint-every-steps", "0"],
        columns=COLUMNS,
        seeds=options.seeds,
        jobs=options.jobs,
        folder=options.output_dir / str(options.steps),
    )
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
