"""What the studies share: runs of recipes on equal seeds, and the closing table."""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gkl_vl.training.checkpoint import RunFolder

RECIPES = Path(__file__).parents[2] / "recipes"
IN_BATCH = ["--wmse-weight", "0.5", "--cross-soft-ce-weight", "0", "--cross-wmse-weight", "0"]
IN_BATCH += ["--mimicry-weight", "10000", "--captions-per-image", "1", "--lr", "6e-3"]
"""Terms and settings of the CLIP recipes that the studies of the batch's own logits were run with."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""Of every run: one thread, and glibc's memory kept as in the Makefile."""
ONLY_AT_THE_END = ["--eval-every-steps", "0", "--checkpoint-every-steps", "0"]
"""No evaluation and no checkpoint before the last step."""
EMOJI_COLUMNS: dict[str, tuple[str | None, str]] = {
    "emoji acc1": ("emoji", "acc1"),
    "emoji acc5": ("emoji", "acc5"),
    "emoji_unseen acc1": ("emoji_unseen", "acc1"),
}


@dataclass(frozen=True)
class Arm:
    """One row of a study's table."""

    flags: list[str]
    other: str | tuple[str, ...] | None
    """The arm that it is compared with, or several."""
    recipe: str | None = None
    """Another script than the study's."""

    @property
    def others(self) -> tuple[str, ...]:
        """`other`, as a tuple."""
        if self.other is None:
            return ()
        return (self.other,) if isinstance(self.other, str) else self.other


Arms = dict[str, Arm]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Every arm on every seed."""

    recipe: str
    """Name of the script, in recipes/ or beside this file."""
    arms: Arms
    flags: list[str]
    """Flags of all arms."""
    columns: dict[str, tuple[str | None, str]]
    """Heading: (evaluation set, or None where there is only one, metric). Differences are taken of the first."""
    seeds: list[int]
    jobs: int
    """Runs at a time, one thread each."""
    folder: Path
    """Folder of the runs. Finished runs are not repeated."""
    model: str = "student"
    """Whose records count."""

    def run(self) -> dict[tuple[str, int], dict[str, float]]:
        """Percent by arm, seed and column."""
        # Seed by seed, so that a study cut short still has complete pairs.
        runs = [(arm, seed) for seed in self.seeds for arm in self.arms]
        with ThreadPoolExecutor(self.jobs) as pool:
            return dict(zip(runs, pool.map(self._run_once, runs), strict=True))

    def folder_of(self, arm: str, seed: int) -> Path:
        """The run folder of an arm and a seed."""
        flags = zlib.crc32(" ".join(self.flags + self.arms[arm].flags).encode())  # an arm with other flags runs again
        return self.folder / str(seed) / f"{''.join(c if c.isalnum() else '_' for c in arm)}_{flags:08x}"

    def _run_once(self, run: tuple[str, int]) -> dict[str, float]:
        arm, seed = run
        folder = self.folder_of(arm, seed)
        if (results := self._results(folder)) is None:
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was stopped
            flags = [*self.flags, "--seed", str(seed), "--output-dir", str(folder), *self.arms[arm].flags]
            name = f"{self.arms[arm].recipe or self.recipe}.py"
            script = next(path for path in (RECIPES / name, Path(__file__).with_name(name)) if path.is_file())
            environment = os.environ | ENVIRONMENT
            done = subprocess.run([sys.executable, script, *flags], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{arm}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
            results = self._results(folder)
            if results is None:
                raise SystemExit(f"{arm}, seed {seed}: {folder} lacks one of {', '.join(self.columns)}")
            print(f"{arm}, seed {seed}: done", file=sys.stderr)
        return results

    def _results(self, folder: Path) -> dict[str, float] | None:
        """Percent by column of a finished run; None where there is none."""
        if not (folder / "report.png").is_file():
            return None
        records = RunFolder(folder, is_main=False).records()
        student = [record for record in records if record.get("model") == self.model]
        by_heading: dict[str, float] = {}
        for heading, (dataset, key) in self.columns.items():
            values = [r[key] for r in student if dataset in (None, r["dataset"]) and key in r]
            if not values:
                return None
            by_heading[heading] = 100 * values[-1]
        return by_heading

    def table(self, results: dict[tuple[str, int], dict[str, float]]) -> str:
        """Markdown: a row per arm. Mean and standard deviation over seeds; paired differences with standard error."""
        headings = list(next(iter(results.values())))
        headline = headings[0]
        lines = [f"| arm | {' | '.join(headings)} | {headline}, paired difference |"]
        lines.append("|---" * (len(headings) + 2) + "|")
        for name, arm in self.arms.items():
            cells = [spread([results[name, seed][heading] for seed in self.seeds]) for heading in headings]
            comparisons = [
                paired([results[name, s][headline] - results[other, s][headline] for s in self.seeds], other)
                for other in arm.others
                if other in self.arms
            ]
            cells.append("; ".join(comparisons))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def make_parser(description: str | None, *, seeds: list[int], folder: str) -> argparse.ArgumentParser:
    """The flags of every study: --seeds, --jobs and --output-dir."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="every arm runs on each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--output-dir", type=Path, default=Path(folder))
    return parser


def make_clip_parser(
    description: str | None, *, seeds: list[int], folder: str, steps: int = 300
) -> argparse.ArgumentParser:
    """The flags of every study, --steps of the CLIP recipes, and --arms."""
    parser = make_parser(description, seeds=seeds, folder=folder)
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--steps", type=int, default=steps, help="updates of every run")
    return parser


def make_clip_study(
    options: argparse.Namespace,
    *,
    recipe: str,
    arms: Arms,
    columns: dict[str, tuple[str | None, str]] = EMOJI_COLUMNS,
    flags: Sequence[str] = (),
) -> Study:
    """A study on the bundled data from the options of `make_clip_parser`. `flags`: further ones of all arms."""
    return Study(
        recipe=recipe,
        arms={name: arm for name, arm in arms.items() if options.arms is None or name in options.arms},
        flags=["--steps", str(options.steps), "--workers", "0", *ONLY_AT_THE_END, *flags],
        columns=columns,
        seeds=options.seeds,
        jobs=options.jobs,
        folder=options.output_dir / str(options.steps),
    )


def paired(differences: list[float], other: str) -> str:
    """mean ± standard error."""
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    wins = sum(difference > 0 for difference in differences)
    return f"{statistics.mean(differences):+.2f} ± {error:.2f} over `{other}`, {wins} of {len(differences)} seeds"


def spread(values: list[float]) -> str:
    """mean ± standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.2f}"
