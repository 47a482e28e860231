"""Zero-shot classification with CLIP_benchmark's flags, keys and values: acc1, acc5 and mean_per_class_recall, or
mean_average_precision for multi-label sets, with 95 % intervals, calibration, and optionally a comparison with the
teacher.

The bundled teacher on the bundled emoji, whose style (emoji) and concepts (emoji_unseen) are not in its training data:

    python eval/zero_shot.py

Your student, compared with its teacher; sets from the Hub (https://huggingface.co/clip-benchmark) or in folders:

    python eval/zero_shot.py --model runs/NAME --teacher bundled
    python eval/zero_shot.py --model runs/NAME --dataset wds/imagenet1k wds/vtab/cifar100
    python eval/zero_shot.py --model RN50 --pretrained openai --dataset a b --dataset_root "sets/{dataset}"

Its images with the texts of its teacher, as in a search index that the teacher made:

    python eval/zero_shot.py --model runs/NAME --teacher bundled --texts-of teacher

An adversarially trained student under APGD with radius 4/255:

    python eval/zero_shot.py --model runs/NAME --attack apgd --epsilon 4/255

Several processes share the images of a set; the metrics do not depend on their number:

    accelerate launch --num_processes 8 eval/zero_shot.py --model runs/NAME --dataset wds/imagenet1k

Results are appended to --output, one JSON line per dataset. `clip_benchmark build` reads one result per file:
--output "{dataset}_{pretrained}_{model}_{language}_{task}.json". For a collection of sets: eval/suite.py.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from accelerate import Accelerator

from gkl_vl.atomic import append_line
from gkl_vl.cli import run
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import Subject, evaluate_set, result_path
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.flags import EvalFlags, load_sets, load_subjects
from gkl_vl.evaluation.sets import BUNDLED, BenchmarkSet
from gkl_vl.evaluation.tables import print_results
from gkl_vl.models.student import paired
from gkl_vl.robustness.autoattack import import_autoattack
from gkl_vl.robustness.pgd import USUAL_CLIP_EPSILON, Norm, radius
from gkl_vl.robustness.zero_shot import attack_zero_shot

TASK = "zeroshot_classification"


@dataclass(frozen=True, kw_only=True)
class Config:
    dataset: tuple[str, ...] = BUNDLED
    """Sets to evaluate on: bundled (emoji, emoji_unseen), wds/NAME or hf-hub:ORG/NAME on the Hub, a folder."""
    model: str = "bundled"
    """A run folder, open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, onnx:path, .json config."""
    pretrained: str | None = None
    """open_clip's tag or a checkpoint, for models given by name."""
    teacher: str | None = None
    """Teacher to compare with on the same images, named as for --model; `bundled` is the bundled one."""
    texts_of: Literal["model", "teacher"] = "model"
    """`teacher`: the model's images with the texts and the scale of --teacher, whose embedding space they share."""
    evaluation: EvalFlags = field(default_factory=EvalFlags)
    attack: Literal["none", "apgd"] = "none"
    """Also accuracy under a white-box attack, an upper bound: APGD, 100 steps on the zero-shot cross entropy."""
    attack_norm: Norm = "linf"
    """Norm of the perturbation, at the input resolution of the model."""
    epsilon: str | None = None
    """Radius of the attack, like 4/255 or 0.03, for pixels in [0, 1]. None = 4/255 for linf, 0.5 for l2."""
    attack_images: int = 500
    """Number of images of each set to attack: evenly spaced in its order, the same in every run."""
    output: str = "result.json"
    """Results file; {dataset}, {pretrained}, {model}, {language} and {task} are replaced."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    epsilon = find_epsilon(config)
    sets = load_sets(config.dataset, config.evaluation)
    names = dict(model=config.model, pretrained=config.pretrained or "", task=TASK)
    paths = [result_path(config.output, dataset=dataset.name, **names) for dataset in sets]
    accelerator = Accelerator()
    subject, teacher = load_subjects(
        config.model, config.pretrained, config.teacher, config.evaluation, accelerator.device
    )
    if config.texts_of == "teacher":
        subject = with_texts_of(subject, teacher)
    lines, attack_lines = [], []
    for name, dataset, path in zip(config.dataset, sets, paths, strict=True):
        (line,) = evaluate_set(subject, teacher, dataset, [TASK], name=name, seed=config.evaluation.seed)
        if epsilon is not None:
            metrics, warnings = attacked(config, subject.embedder, dataset, epsilon)
            line["metrics"] |= metrics
            attack_lines += [
                attack_line(config, dataset.name, metrics),
                *(f"warning: {warning}" for warning in warnings),
            ]
        if config.texts_of == "teacher":
            line["texts_of"] = config.teacher
        lines.append(line)
        if accelerator.is_main_process:
            append_line(path, line)
    if accelerator.is_main_process:
        print_results(lines, paths, *attack_lines)
    accelerator.end_training()


def with_texts_of(subject: Subject, teacher: Subject | None) -> Subject:
    """The images of one model and the texts of the other. Raises: UserError without a teacher, or in another space."""
    if teacher is None:
        raise UserError("--texts-of teacher needs a teacher: name it with --teacher")
    clip = paired(image_of=subject.embedder.clip, text_of=teacher.embedder.clip)
    return replace(subject, embedder=replace(subject.embedder, clip=clip))


def find_epsilon(config: Config) -> float | None:
    """Returns the radius of the attack, None without an attack. Checks that AutoAttack can be imported.

    Raises: UserError for --epsilon without an attack, a malformed radius, or AutoAttack not installed.
    """
    if config.attack == "none":
        if config.epsilon is not None:
            raise UserError(f"--epsilon {config.epsilon} is the radius of an attack: add --attack apgd")
        for name in ("attack_norm", "attack_images"):
            if (value := vars(config)[name]) != vars(Config)[name]:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value} has no effect without an attack: add --attack apgd")
        return None
    import_autoattack()
    return radius(epsilon_text(config), config.attack_norm)


def epsilon_text(config: Config) -> str:
    """Returns --epsilon as text, or the default of the norm."""
    return USUAL_CLIP_EPSILON[config.attack_norm] if config.epsilon is None else config.epsilon


def attacked(
    config: Config, embedder: Embedder, dataset: BenchmarkSet, epsilon: float
) -> tuple[dict[str, Any], list[str]]:
    """Returns the metrics under attack, and warnings that put them in doubt."""
    return attack_zero_shot(
        embedder=embedder,
        dataset=dataset,
        norm=config.attack_norm,
        epsilon=epsilon,
        images=config.attack_images,
        seed=config.evaluation.seed,
    )


def attack_line(config: Config, dataset: str, metrics: dict[str, float]) -> str:
    """Formats the accuracy of a set's attacked images."""
    names = ("n", "clean_acc1", "acc1", "acc1_low", "acc1_high")
    n, clean, acc1, low, high = (metrics[f"apgd_{config.attack_norm}_{name}"] for name in names)
    return (
        f"{dataset} under APGD, {config.attack_norm} {epsilon_text(config)}, {n:.0f} images: acc1 {100 * clean:.2f} % "
        f"-> {100 * acc1:.2f} % (95 %: {100 * low:.2f} to {100 * high:.2f} %), an upper bound"
    )


if __name__ == "__main__":
    run(main, Config)
