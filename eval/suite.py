"""A collection of evaluation sets in one command: a table, JSON, CSV, and accuracy against size and speed.

    python eval/suite.py --model runs/NAME --teacher bundled                      # the bundled collection
    python eval/suite.py --model runs/NAME --collection vtab+ retrieval
    accelerate launch --num_processes 8 eval/suite.py --model hf-hub:org/name --collection datacomp --resume

Collections: bundled, imagenet_robustness, vtab, vtab+, retrieval, sugar_crepe, datacomp; names of sets may stand among
them, and files with a name a line. Sets come from https://huggingface.co/clip-benchmark, or from folders with
--dataset_root "sets/{dataset_cleaned}". What cannot be had is listed as skipped, and the average says over how many
results it goes.

The folder --output holds a file for each task of each set and model, named as CLIP_benchmark names it and written as it
comes; benchmark.csv as `clip_benchmark build` writes it; and suite.png. Calls with other models and the same folder add
to it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from accelerate import Accelerator

from gkl_vl.cli import run
from gkl_vl.evaluation.flags import Flags, load_subject
from gkl_vl.evaluation.suite import Suite, all_lines, load_entries, refuse_mixing, run_suite
from gkl_vl.evaluation.tables import skipped_text, suite_text, tradeoff, write_csv
from gkl_vl.report import draw_tradeoff


@dataclass(frozen=True, kw_only=True)
class Config:
    model: tuple[str, ...] = ("bundled",)
    """Run folders, open_clip names, hf-hub:org/repo, local-dir:path, transformers:org/repo, or .json model configs."""
    pretrained: tuple[str, ...] = ()
    """open_clip's tags or checkpoints: one for each model, `none` for those that carry their weights."""
    teacher: str | None = None
    """A model to compare all with on the same images; `bundled` is the bundled one."""
    collection: tuple[str, ...] = ("bundled",)
    """Collections, names of sets, and files with a name a line."""
    flags: Annotated[Flags, tyro.conf.arg(name="")] = field(default_factory=Flags)
    recall_k: tuple[int, ...] = (1, 5, 10)
    """K of recall@K."""
    output: Path = Path("results")
    """Folder of the results."""
    resume: bool = False
    """Go on in a folder with results: those of the same weights and settings are not measured again."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    refuse_mixing(config.output, resume=config.resume)
    sets, skipped = load_entries(config.collection, config.flags)
    accelerator = Accelerator()
    config.output.mkdir(parents=True, exist_ok=True)
    suite = Suite(
        sets=sets,
        output=config.output,
        recall_k=config.recall_k,
        seed=config.flags.seed,
        resume=config.resume,
        is_main=accelerator.is_main_process,
    )
    entries = {name: of_set for name, _, of_set in sets}
    teacher = None
    if config.teacher is not None:
        teacher = load_subject(config.teacher, None, config.flags, accelerator.device)
    for model, pretrained in pairs(config):
        subject = load_subject(model, pretrained, config.flags, accelerator.device)
        lines = list(run_suite(suite, subject, teacher))
        accelerator.print(f"{model} {pretrained or ''}".rstrip())
        accelerator.print(suite_text(lines, entries) + "\n")
    if skipped:
        accelerator.print(skipped_text(skipped))
    if accelerator.is_main_process:
        found = all_lines(config.output)
        write_csv(config.output / "benchmark.csv", found)
        draw_tradeoff(path=config.output / "suite.png", points=tradeoff(found, entries))
        print(f"{len(found)} results in {config.output}, with benchmark.csv and suite.png")
    accelerator.end_training()


def pairs(config: Config) -> list[tuple[str, str | None]]:
    """Each model with its weights."""
    if config.pretrained and len(config.pretrained) != len(config.model):
        told = f"{len(config.pretrained)} --pretrained for {len(config.model)} --model"
        raise ValueError(f"{told}: give one for each, `none` for a model that carries its weights")
    weights = [None if tag == "none" else tag for tag in config.pretrained] or [None] * len(config.model)
    return list(zip(config.model, weights, strict=True))


if __name__ == "__main__":
    run(main, Config)
