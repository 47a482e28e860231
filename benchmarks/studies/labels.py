"""The CIFAR study of recipes/README.md: methods of label distillation on equal seeds, on a laptop's budget.

    python benchmarks/studies/labels.py --data CIFAR10 --teacher-weights RESNET56.safetensors
    python benchmarks/studies/labels.py --data CIFAR10 --teacher-weights RESNET56.safetensors --imbalance 100

Teacher resnet56_a, student resnet20_a, `recipes/cifar_kd.py` with the published settings of resnet56 -> resnet20, the
distillation's warm-up shortened with the run (20 of 240 epochs), the teacher's logits stored for as many views as there
are epochs, so nothing is approximated. IKL is GKL with gamma 1. Prints a Markdown table.
"""

from study import Arm, Arms, Study, make_parser

Columns = dict[str, tuple[str | None, str]]
BALANCED: Columns = {"acc1": (None, "acc1"), "acc5": (None, "acc5")}
LONG_TAILED: Columns = {"acc1": (None, "acc1"), **{name: (None, f"{name}_acc1") for name in ("many", "medium")}}
"""No class of CIFAR-10 has fewer than 20 images at a ratio of 100: `few` is empty."""


def arms_of(names: list[str], warmup: str, teacher: list[str]) -> Arms:
    """Each arm's flags: a method, or `gkl-0.5` with another wMSE weight. All but `ce` are compared with KD."""
    arms: Arms = {}
    for name in names:
        method, _, weight = name.partition("-")
        flags = ["--method", method] + (["--wmse-weight", weight] if weight else [])
        flags += ["--warmup-epochs", warmup] if method in ("dkd", "ikl", "gkl") else []
        flags += [] if method == "ce" else teacher
        other = {"ce": None, "kd": "ce"}.get(name, "kd")
        arms[name] = Arm(flags, other if other in names else None)
    return arms


def main() -> None:
    parser = make_parser(__doc__, seeds=[0, 1, 2], folder="runs/study_labels")
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--teacher-weights", required=True, help="of resnet56_a")
    parser.add_argument(
        "--arms", nargs="+", default=["ce", "kd", "dkd", "ikl", "gkl"], help="methods; gkl-0.5 = with that wMSE weight"
    )
    parser.add_argument("--lr", help="peak learning rate, in place of the published")
    parser.add_argument("--imbalance", type=float, help="the long-tailed study, at this ratio, on all images it leaves")
    parser.add_argument("--images", type=int, default=10_000, help="training images of the balanced study")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    flags = ["--pair", "resnet56-resnet20", "--data", options.data, "--epochs", str(options.epochs)]
    flags += ["--student", "resnet20_a"]
    flags += ["--stored-views", str(options.epochs), "--eval-every-epochs", "0", "--checkpoint-every-epochs", "0"]
    flags += ["--lr", options.lr] if options.lr else []
    long_tailed = options.imbalance is not None
    flags += ["--imbalance", str(options.imbalance)] if long_tailed else ["--images", str(options.images)]
    study = Study(
        recipe="cifar_kd",
        arms=arms_of(
            options.arms,
            warmup=str(max(round(20 * options.epochs / 240), 1)),
            teacher=["--teacher", "resnet56_a", "--teacher-weights", options.teacher_weights],
        ),
        flags=flags,
        columns=LONG_TAILED if long_tailed else BALANCED,
        seeds=options.seeds,
        jobs=options.jobs,
        folder=options.output_dir / "-".join([flags[-1], str(options.epochs), *([options.lr] if options.lr else [])]),
    )
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
