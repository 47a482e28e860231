"""Robust accuracy of a label model under standard AutoAttack or a faster attack; several processes, resumable.

A run of a label recipe, an exported folder, or a model of the zoo with its weights:

    python eval/autoattack.py --model runs/NAME --data DATA
    accelerate launch --multi_gpu --num_processes 8 eval/autoattack.py --model hf-hub:org/name --data DATA
    python eval/autoattack.py --model resnet20_a --weights resnet20.safetensors --data DATA --attack pgd20 --images 1000

A model from RobustBench, evaluated in the same way (robustbench requires an older timm, hence two steps:
pip install -e '.[robustbench]', then pip install --no-deps robustbench):

    python eval/autoattack.py --model robustbench:Carmon2019Unlabeled --data DATA

Only the accuracy under AutoAttack is comparable with published ones: the other attacks give upper bounds, which the
record and the table note. RobustBench uses all 10,000 test images of CIFAR, as this script does without --images; with
it, that many images are drawn evenly from the classes with a fixed seed, and the interval gives the sampling error.

Each batch is attacked separately from --seed, so the result does not depend on the number of processes. After an
interruption the same command resumes. Results are appended to --output, one JSON line each.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from gkl_vl.atomic import append_line
from gkl_vl.cli import run
from gkl_vl.data.labelled import open_labelled, refuse_unused_options
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import result_path
from gkl_vl.robustness.autoattack import Attack, AttackName, Version
from gkl_vl.robustness.masking import check_masking
from gkl_vl.robustness.measure import USUAL_EPSILON, measure
from gkl_vl.robustness.pgd import Norm, radius
from gkl_vl.robustness.results import result_record, results_table
from gkl_vl.robustness.targets import in_model_order, load_examples, load_target

TASK = "adversarial_robustness"
TIMEOUT = timedelta(days=7)  # a process that has finished its batches may wait for the others for hours


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """A run folder, robustbench:NAME, local-dir:path, hf-hub:org/repo, timm:NAME, torchvision:NAME, or a zoo name."""
    weights: str | None = None
    """A file of weights for models given by name, or `pretrained` for timm and torchvision."""
    data: str
    """Folder of parquet, CIFAR's files or images, shards `a-{000..9}.tar`, a list `x.txt`, or a Hub dataset."""
    split: str = "test"
    """Split of --data."""
    root: str | None = None
    """Folder that the paths of a list are relative to. None = the folder of the list."""
    columns: tuple[str, str] | None = None
    """Names of the image and the label column. None = the usual names."""
    images: int | None = None
    """Number of images, drawn evenly from the classes with a fixed seed. None = all, as RobustBench."""
    image_size: int | None = None
    """Resize and crop the centre to this many pixels a side. None = keep the images' size, the same for all."""
    attack: AttackName = "autoattack"
    """pgd20, pgd100, cw (PGD-30 on the margin): fast. apgd-ce, square: parts of AutoAttack. All give upper bounds."""
    version: Version = "standard"
    """Version of AutoAttack; rand = for randomised defences."""
    norm: Norm = "linf"
    """Norm that limits the perturbation of an image."""
    epsilon: str | None = None
    """Radius of the attack, as 8/255 or 0.03, for pixels in [0, 1]. None = 8/255 for linf, 0.5 for l2."""
    batch_size: int = 250
    """Images per attack, in one process. The result depends on it: a rerun must use the same value."""
    seed: int = 0
    """Seed of the attack's random starts."""
    check_masking: bool = False
    """Also compare attacks with and without gradients, and growing epsilons; warn of signs of masked gradients."""
    masking_images: int = 200
    """Number of images for --check-masking."""
    state_dir: Path | None = None
    """Folder of finished batches, on a shared disk. None = runs/attack-HASH, a hash of settings, model and data."""
    output: str = "results.jsonl"
    """Results file; {dataset}, {pretrained}, {model} and {task} are filled in."""
    allow_pickle: bool = False
    """Read weights from a pickle, tensors only. RobustBench's models are loaded by robustbench."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    epsilon = radius(USUAL_EPSILON[config.norm] if config.epsilon is None else config.epsilon, config.norm)
    if not config.check_masking and config.masking_images != Config.masking_images:
        raise UserError(f"--masking-images {config.masking_images} has no effect without --check-masking: add it")
    refuse_unused_options([config.data], root=config.root, columns=config.columns)
    attack = Attack(name=config.attack, norm=config.norm, epsilon=epsilon, version=config.version, seed=config.seed)
    names = dict(model=config.model, pretrained=config.weights or "")
    path = result_path(config.output, dataset=config.data, task=TASK, **names)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    data = open_labelled(config.data, config.split, root=config.root, columns=config.columns)
    with accelerator.main_process_first():  # the others read its downloads from the cache
        target = load_target(
            config.model,
            num_classes=data.num_classes,
            norm=config.norm,
            weights=config.weights,
            allow_pickle=config.allow_pickle,
        )
    target.model.to(accelerator.device)
    examples = load_examples(in_model_order(data, target), images=config.images, image_size=config.image_size)
    masking, warnings = {}, []
    if config.check_masking:  # first, so that a user can stop before the long attack
        masking, warnings = check_masking(
            attack=attack,
            target=target,
            examples=examples,
            images=config.masking_images,
            batch_size=config.batch_size,
            state_dir=config.state_dir,
            device=accelerator.device,
        )
    outcome = measure(
        attack=attack,
        target=target,
        examples=examples,
        batch_size=config.batch_size,
        state_dir=config.state_dir,
        device=accelerator.device,
    )
    if accelerator.is_main_process:
        record = result_record(outcome, examples=examples, masking=masking, warnings=warnings, **names)
        append_line(path, record)
        print(results_table(record))
        print(f"appended to {path}; batches in {outcome.state_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run(main, Config)
