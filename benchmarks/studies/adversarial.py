"""The adversarial study of recipes/README.md: natural training, TRADES, IKL and GKL on equal seeds, a laptop's budget.

    python benchmarks/studies/adversarial.py --data CIFAR10

Each arm is `recipes/adversarial.py --preset cifar10-basic` on a small WRN and a part of the images, with the `low`
budget (2 steps, epsilon growing to 8/255), without weight perturbation, and with an average of weights over some 100
steps. The models of the first seed are then attacked by standard AutoAttack on `--attacked` test images. Prints two
tables.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from study import Arm, Arms, Study, make_parser

HOUSE = Path(__file__).parents[2]
Interval = tuple[float, float]


def arms_of(names: list[str]) -> Arms:
    """Each arm's flags: a method, or `gkl-5` with another wMSE weight. IKL and GKL are compared with TRADES."""
    arms: Arms = {}
    for name in names:
        method, _, weight = name.partition("-")
        flags = ["--method", method] + (["--wmse-weight", weight] if weight else [])
        flags += [] if method == "natural" else ["--budget", "low", "--awp-gamma", "0"]
        other = None if name in ("natural", "trades") or "trades" not in names else "trades"
        arms[name] = Arm(flags, other)
    return arms


def autoattack(run: Path, data: str, images: int) -> dict:
    """The record of a run's model. What was measured before is not measured again."""
    output = run / f"autoattack-{images}.jsonl"
    if not output.is_file():
        command = [sys.executable, HOUSE / "eval" / "autoattack.py", "--model", run, "--data", data]
        command += ["--images", str(images), "--output", output, "--state-dir", run / "autoattack"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{run}: {done.stderr.strip().splitlines()[-1]}")
        print(f"{run.name}: attacked", file=sys.stderr)
    return json.loads(output.read_text().splitlines()[-1])


def with_interval(share: float, interval: Interval) -> str:
    return f"{100 * share:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def main() -> None:
    parser = make_parser(__doc__, seeds=[0, 1], folder="runs/study_adversarial")
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--arms", nargs="+", default=["natural", "trades", "ikl", "gkl"], help="gkl-5 = wMSE weight 5")
    parser.add_argument("--model", default="wrn_16_1")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", default="0.1")
    parser.add_argument(
        "--attacked", type=int, default=500, help="test images for AutoAttack, and for PGD-20 each time"
    )
    options = parser.parse_args()
    flags = ["--preset", "cifar10-basic", "--data", options.data, "--model", options.model]
    flags += [
        "--images",
        str(options.images),
        "--epochs",
        str(options.epochs),
        "--batch-size",
        "64",
        "--lr",
        options.lr,
    ]
    flags += ["--ema-decay", "0.99", "--robust-images", str(options.attacked)]
    flags += ["--eval-every-epochs", "0", "--checkpoint-every-epochs", "0"]
    test = f"{Path(options.data).name}:test"
    study = Study(
        recipe="adversarial",
        arms=arms_of(options.arms),
        flags=flags,
        columns={"PGD-20": (f"pgd20:{test}", "acc1"), "natural images": (test, "acc1")},
        seeds=options.seeds,
        jobs=options.jobs,
        folder=options.output_dir / f"{options.images}-{options.epochs}-{options.lr}",
    )
    print(study.table(study.run()))
    runs = {arm: study.folder_of(arm, options.seeds[0]) for arm in study.arms}
    with ThreadPoolExecutor(options.jobs) as pool:
        records = list(pool.map(lambda run: autoattack(run, options.data, options.attacked), runs.values()))
    print(f"\n| seed {options.seeds[0]}, {options.attacked} images | natural | AutoAttack | after each part |")
    print("|---|---|---|---|")
    for arm, record in zip(runs, records, strict=True):
        natural, robust = (with_interval(record[k], record[f"{k}_interval"]) for k in ("clean_acc1", "robust_acc1"))
        after = ", ".join(f"{name} {100 * share:.1f}" for name, share in record["after"].items())
        print(f"| {arm} | {natural} | {robust} | {after} |")


if __name__ == "__main__":
    main()
