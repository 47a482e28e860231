"""The semi-supervised study of recipes/README.md: few labels of CIFAR-10, methods on equal seeds, a laptop's budget.

    python benchmarks/studies/semi_supervised.py --data CIFAR10

Each arm is `recipes/semi_supervised.py` on a small ResNet and a part of the images, called METHOD, METHOD:TERM or
METHOD:TERM:prior; the same seed is the same labels, initial weights, batches and views. Prints, for each number of
labels, a table of accuracy and one of the pseudo-labels in the last quarter of the training, and draws those over time.
"""

from pathlib import Path
from statistics import fmean

from study import ONLY_AT_THE_END, Arm, Arms, Study, make_parser, spread

from gkl_vl.report.figures import draw_pseudo_labels, pseudo_labels
from gkl_vl.training.checkpoint import RunFolder

ARMS = ["supervised", "fixmatch:hard", "fixmatch:kl", "fixmatch:ikl", "fixmatch:gkl"]


def arms_of(names: list[str], mu: int) -> Arms:
    """Each arm's flags; `fixmatch:gkl:prior` = with the class prior. FixMatch's others are compared with KL's."""
    arms: Arms = {}
    for name in names:
        method, *rest = name.split(":")
        flags = ["--method", method, *(["--consistency", rest[0]] if rest else [])]
        flags += [] if method == "supervised" else ["--mu", str(mu)]
        flags += ["--class-prior"] if rest[1:] == ["prior"] else []
        other = {"supervised": None, "fixmatch:hard": "supervised", "fixmatch:kl": "supervised"}.get(
            name, "fixmatch:kl"
        )
        arms[name] = Arm(flags, other if other in names else None)
    return arms


def records(run: Path) -> list[dict]:
    return RunFolder(run, is_main=False).records()


def mean_of(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The runs' points, one by one."""
    return [{key: fmean(point[key] for point in points) for key in points[0]} for points in zip(*runs, strict=True)]


def main() -> None:
    parser = make_parser(__doc__, seeds=[0, 1, 2], folder="runs/study_semi_supervised")
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--num-labels", type=int, nargs="+", default=[40, 250], help="of all classes together")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="METHOD, METHOD:TERM or METHOD:TERM:prior")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--images", type=int, default=10_000, help="training images, most of them without label")
    parser.add_argument("--steps", type=int, nargs="+", default=[800, 3000], help="for each number of labels")
    parser.add_argument("--batch-size", type=int, default=16, help="labelled images")
    parser.add_argument("--mu", type=int, default=4)
    parser.add_argument("--lr", default="0.1")
    parser.add_argument("--picture", type=Path, help="where to draw; None = beside the runs")
    options = parser.parse_args()
    drawn = {}
    if len(options.steps) != len(options.num_labels):
        parser.error(f"{len(options.num_labels)} numbers of labels, {len(options.steps)} of steps: give one for each")
    for num_labels, steps in zip(options.num_labels, options.steps, strict=True):
        flags = ["--preset", "cifar10-250", "--num-labels", str(num_labels), "--data", options.data]
        flags += ["--model", options.model, "--images", str(options.images), "--steps", str(steps)]
        flags += ["--batch-size", str(options.batch_size), "--lr", options.lr]
        flags += ["--ema-decay", "0.99", "--workers", "0", *ONLY_AT_THE_END]
        setting = f"{options.images}-{steps}-{options.batch_size}-{options.mu}-{options.lr}"
        study = Study(
            recipe="semi_supervised",
            arms=arms_of(options.arms, options.mu),
            flags=flags,
            columns={"acc1": (None, "acc1")},
            seeds=options.seeds,
            jobs=options.jobs,
            folder=options.output_dir / setting / str(num_labels),
        )
        print(f"\n{num_labels} labels\n\n{study.table(study.run())}")
        print("\n| arm, last quarter | pseudo-labels that count | of those right |\n|---|---|---|")
        drawn[f"{num_labels} labels"] = {}
        for arm in [name for name in study.arms if name != "supervised"]:
            of_runs = [records(study.folder_of(arm, seed)) for seed in options.seeds]
            ends = [pseudo_labels(run, windows=4)[-1] for run in of_runs]
            cells = [spread([end[key] for end in ends]) for key in ("mask_rate", "acc1")]
            print(f"| {arm} | {cells[0]} | {cells[1]} |")
            drawn[f"{num_labels} labels"][arm] = mean_of([pseudo_labels(run, windows=10) for run in of_runs])
    picture = options.picture or options.output_dir / "pseudo_labels.png"
    draw_pseudo_labels(path=picture, runs=drawn)
    print(f"\n{picture}")


if __name__ == "__main__":
    main()
