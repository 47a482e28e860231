"""Zero-shot classification (acc1, acc5, mean_per_class_recall) with CLIP_benchmark's flags, keys and values.

The bundled teacher on the bundled emoji, a style and concepts that training never saw:

    python eval/zero_shot.py

Your student on sets from the Hub (https://huggingface.co/clip-benchmark), any model on sets in folders:

    python eval/zero_shot.py --model local-dir:runs/clip_kd/model --dataset wds/imagenet1k wds/vtab/cifar100
    python eval/zero_shot.py --model RN50 --pretrained openai --dataset a b --dataset_root "sets/{dataset}"

A student that was trained against attacks, under APGD within 4/255:

    python eval/zero_shot.py --model local-dir:runs/clip_kd/model --attack apgd --epsilon 4/255

Results are appended to --output, one JSON line per dataset. `clip_benchmark build` reads one result per file:
--output "{dataset}_{pretrained}_{model}_{language}_{task}.json".
"""

from dataclasses import dataclass
from typing import Literal

from accelerate import Accelerator

from gkl_vl.adversarial import USUAL_CLIP_EPSILON
from gkl_vl.attacks import Norm, radius
from gkl_vl.cli import run
from gkl_vl.data.benchmark_sets import BUNDLED, load_benchmark_sets
from gkl_vl.errors import UserError
from gkl_vl.evaluate import append_result, evaluate_clip, format_metrics, refuse_random_weights, result_path
from gkl_vl.robustness import attack_zero_shot, import_autoattack
from gkl_vl.towers import BUNDLED_TEACHER, load_clip

TASK = "zeroshot_classification"


@dataclass(frozen=True, kw_only=True)
class Config:
    dataset: tuple[str, ...] = BUNDLED
    """Sets to evaluate on: bundled (emoji, emoji_unseen), a folder, or wds/NAME on the Hub."""
    dataset_root: str | None = None
    """Folder of the set, or its URL on the Hub; {dataset} and {dataset_cleaned} are filled in."""
    split: str = "test"
    """Subfolder with the shards."""
    model: str = BUNDLED_TEACHER
    """open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, or a .json model config."""
    pretrained: str | None = None
    """open_clip's tag or a checkpoint, for models given by name."""
    batch_size: int = 64
    """Images, or prompts, per forward pass."""
    num_workers: int = 2
    """Processes that decode images; 0 = this one."""
    attack: Literal["none", "apgd"] = "none"
    """Also attack images, white box: APGD, 100 steps on the cross entropy of the zero-shot logits. An upper bound."""
    attack_norm: Norm = "linf"
    """Of what the attack may add to an image, at the model's size."""
    epsilon: str | None = None
    """The most that it may add, like 4/255 or 0.03; pixels are in [0, 1]. None = 4/255 for linf, 0.5 for l2."""
    attack_images: int = 500
    """Attack so many images of each set, evenly spaced in its order, always the same ones."""
    seed: int = 0
    """Of the attack's random starts."""
    output: str = "result.json"
    """Results file; {dataset}, {pretrained}, {model}, {language} and {task} are filled in."""
    allow_pickle: bool = False
    """Read weights stored as a pickle."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    refuse_random_weights(config.model, config.pretrained)
    epsilon = find_epsilon(config)
    names = dict(model=config.model, pretrained=config.pretrained or "", task=TASK)
    sets = load_benchmark_sets(config.dataset, root=config.dataset_root, split=config.split)
    paths = [result_path(config.output, dataset=dataset.name, **names) for dataset in sets]
    device = Accelerator().device
    clip = load_clip(config.model, config.pretrained, allow_pickle=config.allow_pickle)
    clip.towers.to(device)
    rows, attacked = {}, []
    for asked, dataset, path in zip(config.dataset, sets, paths, strict=True):
        rows[dataset.name] = evaluate_clip(
            clip=clip,
            dataset=dataset,
            tasks=["zero_shot"],
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            device=device,
            progress=True,
        )
        under_attack = {}
        if epsilon is not None:
            under_attack, warnings = attack_zero_shot(
                clip=clip,
                dataset=dataset,
                norm=config.attack_norm,
                epsilon=epsilon,
                images=config.attack_images,
                seed=config.seed,
                batch_size=config.batch_size,
                device=device,
            )
            attacked += [attack_line(config, dataset.name, under_attack), *(f"warning: {line}" for line in warnings)]
        append_result(path, dataset=asked, metrics=rows[dataset.name] | under_attack, **names)
    print("\n".join([format_metrics(rows), *attacked]))
    print(f"appended to {', '.join(dict.fromkeys(map(str, paths)))}")


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
