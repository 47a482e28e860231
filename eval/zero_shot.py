"""Zero-shot classification with CLIP_benchmark's flags, keys and values: acc1, acc5 and mean_per_class_recall, or
mean_average_precision where images have several labels; 95 % intervals, calibration, and the teacher beside.

The bundled teacher on the bundled emoji, a style and concepts that training never saw:

    python eval/zero_shot.py

Your student, beside its teacher; sets from the Hub (https://huggingface.co/clip-benchmark) or in folders:

    python eval/zero_shot.py --model runs/NAME --teacher bundled
    python eval/zero_shot.py --model runs/NAME --dataset wds/imagenet1k wds/vtab/cifar100
    python eval/zero_shot.py --model RN50 --pretrained openai --dataset a b --dataset_root "sets/{dataset}"

A student that was trained against attacks, under APGD within 4/255:

    python eval/zero_shot.py --model runs/NAME --attack apgd --epsilon 4/255

Several processes share a set, and the numbers stay the same:

    accelerate launch --num_processes 8 eval/zero_shot.py --model runs/NAME --dataset wds/imagenet1k

Results are appended to --output, one JSON line per dataset. `clip_benchmark build` reads one result per file:
--output "{dataset}_{pretrained}_{model}_{language}_{task}.json". A collection of sets in one go: eval/suite.py.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from accelerate import Accelerator

from gkl_vl.atomic import append_line
from gkl_vl.cli import run
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import evaluate_set, result_path
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.flags import Flags, load_sets, load_subjects
from gkl_vl.evaluation.sets import BUNDLED, BenchmarkSet
from gkl_vl.evaluation.tables import tell
from gkl_vl.robustness.autoattack import import_autoattack
from gkl_vl.robustness.pgd import USUAL_CLIP_EPSILON, Norm, radius
from gkl_vl.robustness.zero_shot import attack_zero_shot

TASK = "zeroshot_classification"


@dataclass(frozen=True, kw_only=True)
class Config:
    dataset: tuple[str, ...] = BUNDLED
    """Sets to evaluate on: bundled (emoji, emoji_unseen), wds/NAME or hf-hub:ORG/NAME on the Hub, a folder."""
    model: str = "bundled"
    """A run folder, open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, or a .json model config."""
    pretrained: str | None = None
    """open_clip's tag or a checkpoint, for models given by name."""
    teacher: str | None = None
    """A model to compare with on the same images, as --model; `bundled` is the bundled one."""
    flags: Annotated[Flags, tyro.conf.arg(name="")] = field(default_factory=Flags)
    attack: Literal["none", "apgd"] = "none"
    """Also attack images, white box: APGD, 100 steps on the cross entropy of the zero-shot logits. An upper bound."""
    attack_norm: Norm = "linf"
    """Of what the attack may add to an image, at the model's size."""
    epsilon: str | None = None
    """The most that it may add, like 4/255 or 0.03; pixels are in [0, 1]. None = 4/255 for linf, 0.5 for l2."""
    attack_images: int = 500
    """Attack so many images of each set, evenly spaced in its order, always the same ones."""
    output: str = "result.json"
    """Results file; {dataset}, {pretrained}, {model}, {language} and {task} are filled in."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    epsilon = find_epsilon(config)
    sets = load_sets(config.dataset, config.flags)
    names = dict(model=config.model, pretrained=config.pretrained or "", task=TASK)
    paths = [result_path(config.output, dataset=dataset.name, **names) for dataset in sets]
    accelerator = Accelerator()
    subject, teacher = load_subjects(config.model, config.pretrained, config.teacher, config.flags, accelerator.device)
    lines, told = [], []
    for asked, dataset, path in zip(config.dataset, sets, paths, strict=True):
        (line,) = evaluate_set(subject, teacher, dataset, [TASK], asked=asked, seed=config.flags.seed)
        if epsilon is not None:
            metrics, warnings = attacked(config, subject.embedder, dataset, epsilon)
            line["metrics"] |= metrics
            told += [attack_line(config, dataset.name, metrics), *(f"warning: {warning}" for warning in warnings)]
        lines.append(line)
        if accelerator.is_main_process:
            append_line(path, line)
    if accelerator.is_main_process:
        tell(lines, paths, *told)
    accelerator.end_training()


def find_epsilon(config: Config) -> float | None:
    """The attack's radius; None = no attack. What it takes is asked for before the hours are spent."""
    if config.attack == "none":
        if config.epsilon is not None:
            raise UserError(f"--epsilon {config.epsilon} is the radius of an attack: add --attack apgd")
        return None
    import_autoattack()
    return radius(epsilon_text(config), config.attack_norm)


def epsilon_text(config: Config) -> str:
    """As --epsilon was written."""
    return config.epsilon or USUAL_CLIP_EPSILON[config.attack_norm]


def attacked(
    config: Config, embedder: Embedder, dataset: BenchmarkSet, epsilon: float
) -> tuple[dict[str, Any], list[str]]:
    """Metrics under attack, and what makes them doubtful."""
    return attack_zero_shot(
        embedder=embedder,
        dataset=dataset,
        norm=config.attack_norm,
        epsilon=epsilon,
        images=config.attack_images,
        seed=config.flags.seed,
    )


def attack_line(config: Config, dataset: str, metrics: dict[str, float]) -> str:
    """Accuracy of a set's attacked images, for people."""
    names = ("n", "clean_acc1", "acc1", "acc1_low", "acc1_high")
    n, clean, acc1, low, high = (metrics[f"apgd_{config.attack_norm}_{name}"] for name in names)
    return (
        f"{dataset} under APGD, {config.attack_norm} {epsilon_text(config)}, {n:.0f} images: acc1 {100 * clean:.2f} % "
        f"-> {100 * acc1:.2f} % (95 %: {100 * low:.2f} to {100 * high:.2f} %), an upper bound"
    )


if __name__ == "__main__":
    run(main, Config)
