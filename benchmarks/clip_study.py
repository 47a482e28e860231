"""The study of recipes/README.md: which terms of the CLIP distillation help, on equal seeds.

    python benchmarks/clip_study.py --seeds 5 --steps 600

Every arm is `recipes/clip_kd.py` on the bundled default with other weights; runs that are done already are not run
again, so the study can be stopped and taken up. It prints a Markdown table: mean and standard deviation over seeds, and
the paired difference to the arm `soft CE` (same seed = same initial weights, same batches) with its standard error.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "clip_kd.py"
REFERENCE = "soft CE"
ARMS = {
    "contrastive": ["--soft-ce-weight", "0", "--wmse-weight", "0"],
    "soft CE": ["--wmse-weight", "0"],
    "GKL": [],
    "mimicry": ["--soft-ce-weight", "0", "--wmse-weight", "0", "--mimicry-weight", "500"],
    "mimicry + GKL": ["--mimicry-weight", "500"],
}
SEARCH = {
    "GKL, wMSE .02": ["--wmse-weight", "0.02"],
    "GKL, wMSE .2": ["--wmse-weight", "0.2"],
    "GKL, wMSE .1, gamma .5": ["--wmse-weight", "0.1", "--gamma", "0.5"],
    "GKL, wMSE .5, gamma .5": ["--wmse-weight", "0.5", "--gamma", "0.5"],
    "GKL, wMSE 2, gamma 1": ["--wmse-weight", "2", "--gamma", "1"],
    "soft CE 3": ["--wmse-weight", "0", "--soft-ce-weight", "3"],
    "soft CE 3 + wMSE .05": ["--wmse-weight", "0.05", "--soft-ce-weight", "3"],
    "mimicry 2000": ["--soft-ce-weight", "0", "--wmse-weight", "0", "--mimicry-weight", "2000"],
}
SETS = {"emoji": ("acc1", "acc5"), "emoji_unseen": ("acc1",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to n-1 for every arm")
    parser.add_argument("--steps", type=int, default=600, help="updates of every run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--search", action="store_true", help="the arms of the search over weights and gamma instead")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    arms = {REFERENCE: ARMS[REFERENCE]} | SEARCH if options.search else ARMS
    # Seed by seed, so that a study cut short still has complete pairs.
    runs = [(arm, seed) for seed in range(options.seeds) for arm in arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        first = run_once(runs[0], arms, options)  # alone: it stores the teacher's embeddings for all others
        results = [first, *pool.map(lambda run: run_once(run, arms, options), runs[1:])]
    print(table(dict(zip(runs, results, strict=True)), list(arms)))


def run_once(run: tuple[str, int], arms: dict[str, list[str]], options: argparse.Namespace) -> dict[str, float]:
    """Metrics of one finished run, run if need be: {"emoji acc1": ...}."""
    arm, seed = run
    folder = options.output_dir / f"{options.steps}-{seed}" / "".join(c if c.isalnum() else "_" for c in arm)
    if not (folder / "report.png").is_file():
        flags = ["--steps", str(options.steps), "--seed", str(seed), "--output-dir", str(folder), "--workers", "0"]
        flags += ["--eval-every-steps", "0", "--checkpoint-every-steps", "0", *arms[arm]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, RECIPE, *flags], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arm}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
        print(f"{arm}, seed {seed}: done", file=sys.stderr)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    student = {record["dataset"]: record for record in records if record.get("model") == "student"}
    return {f"{name} {key}": 100 * student[name][key] for name, keys in SETS.items() for key in keys}


def table(results: dict[tuple[str, int], dict[str, float]], arms: list[str]) -> str:
    """Markdown: a row per arm, percent."""
    seeds = sorted({seed for _, seed in results})
    columns = [f"{name} {key}" for name, keys in SETS.items() for key in keys]
    lines = ["| terms | " + " | ".join(columns) + f" | {columns[0]}, paired with {REFERENCE} |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for arm in arms:
        cells = [spread([results[arm, seed][column] for seed in seeds]) for column in columns]
        pairs = [results[arm, seed][columns[0]] - results[REFERENCE, seed][columns[0]] for seed in seeds]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        wins = sum(difference > 0 for difference in pairs)
        paired = (
            "" if arm == REFERENCE else f"{statistics.mean(pairs):+.2f} ± {error:.2f}, {wins} of {len(pairs)} seeds"
        )
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {paired} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """mean ± standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.2f}"


if __name__ == "__main__":
    main()
