"""The study of recipes/README.md: which terms of the CLIP distillation help, on equal seeds.

    python benchmarks/clip_study.py

Every arm is `recipes/clip_kd.py` on the bundled default with other weights; runs that are done already are not run
again, so the study can be stopped and taken up. It prints a Markdown table: mean and standard deviation over seeds, and
the paired difference to the arm that has a term less (same seed = same initial weights, same batches) with its standard
error. `--search` compares other weights and gammas with the recipe's own; give it other seeds than the study, so
that what it picks is judged on runs that had no part in the picking.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "clip_kd.py"
NO_MIMICRY = ["--mimicry-weight", "0"]
NO_WMSE = ["--wmse-weight", "0"]
NO_GKL = ["--soft-ce-weight", "0", "--wmse-weight", "0"]
# name: (flags, the arm to compare it with: the one that has a term less)
ARMS = {
    "contrastive": ([*NO_GKL, *NO_MIMICRY], None),
    "+ soft CE": ([*NO_WMSE, *NO_MIMICRY], "contrastive"),
    "+ GKL": (NO_MIMICRY, "+ soft CE"),
    "+ mimicry": (NO_GKL, "contrastive"),
    "+ mimicry + soft CE": (NO_WMSE, "+ mimicry"),
    "+ mimicry + GKL": ([], "+ mimicry + soft CE"),
}
DEFAULT = "+ mimicry + GKL"
SEARCH = {
    DEFAULT: ([], None),
    "wMSE 2, gamma 1": (["--wmse-weight", "2", "--gamma", "1"], DEFAULT),
    "wMSE .05, gamma 0": (["--wmse-weight", "0.05", "--gamma", "0"], DEFAULT),
    "wMSE .2, gamma 0": (["--wmse-weight", "0.2", "--gamma", "0"], DEFAULT),
    "no contrastive, wMSE .05, gamma 0": (
        ["--contrastive-weight", "0", "--wmse-weight", "0.05", "--gamma", "0"],
        "wMSE .05, gamma 0",
    ),
}
Arms = dict[str, tuple[list[str], str | None]]
SETS = {"emoji": ("acc1", "acc5"), "emoji_unseen": ("acc1",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="every arm runs on each")
    parser.add_argument("--steps", type=int, default=300, help="updates of every run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--search", action="store_true", help="the arms of the search over weights and gamma instead")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    arms = SEARCH if options.search else ARMS
    # Seed by seed, so that a study cut short still has complete pairs.
    runs = [(arm, seed) for seed in options.seeds for arm in arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda run: run_once(run, arms, options), runs))
    print(table(dict(zip(runs, results, strict=True)), arms))


def run_once(run: tuple[str, int], arms: Arms, options: argparse.Namespace) -> dict[str, float]:
    """Metrics of one finished run, run if need be: {"emoji acc1": ...}."""
    arm, seed = run
    folder = options.output_dir / f"{options.steps}-{seed}" / "".join(c if c.isalnum() else "_" for c in arm)
    if not (folder / "report.png").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        flags = ["--steps", str(options.steps), "--seed", str(seed), "--output-dir", str(folder), "--workers", "0"]
        flags += ["--eval-every-steps", "0", "--checkpoint-every-steps", "0", *arms[arm][0]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, RECIPE, *flags], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arm}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
        print(f"{arm}, seed {seed}: done", file=sys.stderr)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    student = {record["dataset"]: record for record in records if record.get("model") == "student"}
    return {f"{name} {key}": 100 * student[name][key] for name, keys in SETS.items() for key in keys}


def table(results: dict[tuple[str, int], dict[str, float]], arms: Arms) -> str:
    """Markdown: a row per arm, percent."""
    seeds = sorted({seed for _, seed in results})
    columns = [f"{name} {key}" for name, keys in SETS.items() for key in keys]
    lines = ["| terms | " + " | ".join(columns) + f" | {columns[0]}, paired difference |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for arm, (_, other) in arms.items():
        cells = [spread([results[arm, seed][column] for seed in seeds]) for column in columns]
        if other is None:
            cells.append("")
        else:
            cells.append(paired([results[arm, s][columns[0]] - results[other, s][columns[0]] for s in seeds], other))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(differences: list[float], other: str) -> str:
    """mean ± standard error."""
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    wins = sum(difference > 0 for difference in differences)
    return f"{statistics.mean(differences):+.2f} ± {error:.2f} over `{other}`, {wins} of {len(differences)} seeds"


def spread(values: list[float]) -> str:
    """mean ± standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.2f}"


if __name__ == "__main__":
    main()
