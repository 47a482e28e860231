"""Linear probe: logistic regression on a model's image embeddings, all of the training split or a few shots, with
CLIP_benchmark's flags and keys (lp_acc1, lp_acc5, lp_mean_per_class_recall, or lp_mean_average_precision).

The regularisation is chosen on a part of the training split; the test split is used only for the final metrics.

    python eval/linear_probe.py --model runs/NAME --dataset wds/cifar10 wds/vtab/pets
    python eval/linear_probe.py --model runs/NAME --dataset cifar10 --dataset_root CIFAR10 --fewshot_k 16

Results are appended to --output, one JSON line per dataset, in the format of eval/zero_shot.py.
"""

from dataclasses import dataclass, field

from accelerate import Accelerator

from gkl_vl.atomic import append_line
from gkl_vl.cli import refuse_unused, run
from gkl_vl.evaluation.benchmark import evaluate_probe, result_path
from gkl_vl.evaluation.flags import EvalFlags, load_sets, load_subjects
from gkl_vl.evaluation.tables import print_results

TASK = "linear_probe"


@dataclass(frozen=True, kw_only=True)
class Config:
    dataset: tuple[str, ...]
    """Sets with a training split: wds/NAME or hf-hub:ORG/NAME on the Hub, a folder."""
    train_split: str = "train"
    """Split that the probe is fitted to; it is evaluated on --split."""
    model: str = "bundled"
    """A run folder, open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, or a .json model config."""
    pretrained: str | None = None
    """open_clip's tag or a checkpoint, for models given by name."""
    teacher: str | None = None
    """Teacher to compare with on the same images, named as for --model; `bundled` is the bundled one."""
    fewshot_k: int = -1
    """Images of each class to fit on, drawn by --seed; -1 = all."""
    evaluation: EvalFlags = field(default_factory=EvalFlags)
    output: str = "result.json"
    """Results file; {dataset}, {pretrained}, {model}, {language} and {task} are replaced."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    refuse_unused(vars(config.evaluation), ["custom_template_file"], "has no effect on a linear probe")
    tests = load_sets(config.dataset, config.evaluation)
    trains = load_sets(config.dataset, config.evaluation, split=config.train_split)
    names = dict(model=config.model, pretrained=config.pretrained or "", task=TASK)
    paths = [result_path(config.output, dataset=dataset.name, **names) for dataset in tests]
    accelerator = Accelerator()
    subject, teacher = load_subjects(
        config.model, config.pretrained, config.teacher, config.evaluation, accelerator.device
    )
    lines = []
    for name, train, test, path in zip(config.dataset, trains, tests, paths, strict=True):
        line = evaluate_probe(
            subject,
            teacher,
            train,
            test,
            name=name,
            shots=None if config.fewshot_k == -1 else config.fewshot_k,
            seed=config.evaluation.seed,
        )
        lines.append(line)
        if accelerator.is_main_process:
            append_line(path, line)
    if accelerator.is_main_process:
        print_results(lines, paths)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, Config)
