"""Robust accuracy of a label model: standard AutoAttack, batch by batch over processes, resumable; or quicker looks.

A run of a label recipe, an exported folder, a model of the zoo with its weights:

    python eval/autoattack.py --model runs/NAME --data DATA
    accelerate launch --multi_gpu --num_processes 8 eval/autoattack.py --model hf-hub:org/name --data DATA
    python eval/autoattack.py --model resnet20_a --weights resnet20.safetensors --data DATA --attack pgd20 --images 1000

Somebody else's from RobustBench, by the same evaluation (its timm is older than ours, hence two steps:
pip install -e '.[robustbench]', then pip install --no-deps robustbench):

    python eval/autoattack.py --model robustbench:Carmon2019Unlabeled --data DATA

Only AutoAttack's number is one to report: the others are upper bounds, and the record and the table say so.
RobustBench's are of all 10,000 images of CIFAR's test split, and so is ours without --images; with it, so many images
are drawn evenly from the classes, always the same ones, and the interval tells how far off a part can be.

Each batch is attacked by itself with --seed, so images fare the same whatever the number of processes; the same command
goes on where a killed one stopped. Results are appended to --output, one JSON line each.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from gkl_vl.atomic import append_line
from gkl_vl.cli import run
from gkl_vl.data.labelled import open_labelled
from gkl_vl.evaluation.benchmark import result_path
from gkl_vl.robustness.autoattack import Attack, AttackName, Version
from gkl_vl.robustness.masking import check_masking
from gkl_vl.robustness.measure import USUAL_EPSILON, measure
from gkl_vl.robustness.pgd import Norm, radius
from gkl_vl.robustness.results import result_record, results_table
from gkl_vl.robustness.targets import load_examples, load_target

TASK = "adversarial_robustness"
PATIENCE = timedelta(days=7)  # a process that has done its batches waits for the others, for hours at times


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """A run folder, robustbench:NAME, local-dir:path, hf-hub:org/repo, timm:NAME, torchvision:NAME, or a zoo name."""
    weights: str | None = None
    """A file of weights for models given by name, or `pretrained` for timm and torchvision."""
    data: str
    """Folder of parquet, CIFAR's files or images, shards `a-{000..9}.tar`, a list `x.txt`, or a Hub dataset."""
    split: str = "test"
    """Of --data."""
    root: str | None = None
    """Where the paths of a list begin. None = its own folder."""
    columns: tuple[str, str] | None = None
    """Names of the image and label column, where they are not the usual ones."""
    images: int | None = None
    """Attack so many images only, drawn evenly from the classes, always the same ones. None = all, as RobustBench."""
    image_size: int | None = None
    """Resize, and cut out the middle of so many pixels. None = the images as they are, all of one size."""
    attack: AttackName = "autoattack"
    """pgd20, pgd100, cw (PGD-30 on the margin): quick looks. apgd-ce, square: parts of AutoAttack. All upper bounds."""
    version: Version = "standard"
    """Of AutoAttack; rand = for randomised defences."""
    norm: Norm = "linf"
    """Of what the attack may add to an image."""
    epsilon: str | None = None
    """The most that it may add, like 8/255 or 0.03; pixels are in [0, 1]. None = 8/255 for linf, 0.5 for l2."""
    batch_size: int = 250
    """Images that are attacked together, by one process. It is part of the result: a rerun has to keep it."""
    seed: int = 0
    """Of the attack's random starts."""
    check_masking: bool = False
    """Also compare attacks that see gradients with one that does not, and let epsilon grow; warn where it looks odd."""
    masking_images: int = 200
    """For --check-masking."""
    state_dir: Path | None = None
    """Where finished batches are kept; all processes must see it. None = runs/attack-HASH, by all that decides them."""
    output: str = "results.jsonl"
    """Results file; {dataset}, {pretrained}, {model} and {task} are filled in."""
    allow_pickle: bool = False
    """Read weights stored as a pickle, still as tensors alone. RobustBench's are read as robustbench reads them."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    epsilon = radius(config.epsilon or USUAL_EPSILON[config.norm], config.norm)
    attack = Attack(name=config.attack, norm=config.norm, epsilon=epsilon, version=config.version, seed=config.seed)
    names = dict(model=config.model, pretrained=config.weights or "")
    path = result_path(config.output, dataset=config.data, task=TASK, **names)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    data = open_labelled(config.data, config.split, root=config.root, columns=config.columns)
    with accelerator.main_process_first():  # the others find what it downloads
        target = load_target(
            config.model,
            num_classes=data.num_classes,
            norm=config.norm,
            weights=config.weights,
            allow_pickle=config.allow_pickle,
        )
    target.model.to(accelerator.device)
    examples = load_examples(data, images=config.images, image_size=config.image_size)
    masking, warnings = {}, []
    if config.check_masking:  # first: whoever sees it fail may want to save the hours
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
