"""A collection of evaluation sets in one command: a table, JSON, CSV, and accuracy against size and speed.

    python eval/suite.py --model runs/NAME --teacher bundled                      # the bundled collection
    python eval/suite.py --model runs/NAME --collection vtab+ retrieval
    accelerate launch --num_processes 8 eval/suite.py --model hf-hub:org/name --collection datacomp --resume

Collections: bundled, imagenet_robustness, vtab, vtab+, retrieval, sugar_crepe, datacomp. --collection also takes names
of sets, and text files with one name per line. Sets come from https://huggingface.co/clip-benchmark, or from folders
with --dataset_root "sets/{dataset_cleaned}". Sets that cannot be loaded are listed as skipped, and the table states how
many results the average covers.

The folder --output holds one JSON file for each model, set and task, with CLIP_benchmark's default name, written as
soon as the result is known; benchmark.csv in the format of `clip_benchmark build`; and suite.png. Calls with --resume,
other models and the same folder add to it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from gkl_vl.atomic import hold_folder, release_folder
from gkl_vl.cli import run
from gkl_vl.evaluation.flags import EvalFlags, load_subject
from gkl_vl.evaluation.suite import Suite, all_lines, load_entries, refuse_mixing, run_suite
from gkl_vl.evaluation.tables import skipped_text, suite_text, tradeoff, write_csv
from gkl_vl.report.figures import draw_tradeoff


@dataclass(frozen=True, kw_only=True)
class Config:
    model: tuple[str, ...] = ("bundled",)
    """Run folders, open_clip names, hf-hub:org/repo, local-dir:path, transformers:org/repo, or .json model configs."""
    pretrained: tuple[str, ...] = ()
    """open_clip's tags or checkpoints: one for each model, `none` for a model that includes its weights."""
    teacher: str | None = None
    """Teacher to compare all models with on the same images; `bundled` is the bundled one."""
    collection: tuple[str, ...] = ("bundled",)
    """Collections, names of sets, and text files with one name per line."""
    evaluation: EvalFlags = field(default_factory=EvalFlags)
    recall_k: tuple[int, ...] = (1, 5, 10)
    """K of recall@K."""
    output: Path = Path("results")
    """Folder of the results."""
    resume: bool = False
    """Allow an output folder that has results, and reuse those with the same weights and settings."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    refuse_mixing(config.output, resume=config.resume)
    sets, skipped = load_entries(config.collection, config.evaluation)
    accelerator = Accelerator()
    if accelerator.is_main_process and not config.resume:
        hold_folder(config.output)
        refuse_mixing(config.output, resume=False)  # another call may have begun since the first check
    config.output.mkdir(parents=True, exist_ok=True)
    suite = Suite(
        sets=sets,
        output=config.output,
        recall_k=config.recall_k,
        seed=config.evaluation.seed,
        resume=config.resume,
        is_main=accelerator.is_main_process,
    )
    entries = {name: of_set for name, _, of_set in sets}
    teacher = None
    if config.teacher is not None:
        teacher = load_subject(config.teacher, None, config.evaluation, accelerator.device)
    for model, pretrained in pairs(config):
        subject = load_subject(model, pretrained, config.evaluation, accelerator.device)
        lines = list(run_suite(suite, subject, teacher))
        accelerator.print(f"{model} {pretrained or ''}".rstrip())
        accelerator.print(suite_text(lines, entries) + "\n")
    if skipped:
        accelerator.print(skipped_text(skipped))
    if accelerator.is_main_process:
        results = all_lines(config.output)
        write_csv(config.output / "benchmark.csv", results)
        draw_tradeoff(path=config.output / "suite.png", points=tradeoff(results, entries))
        print(f"{len(results)} results in {config.output}, with benchmark.csv and suite.png")
    release_folder(config.output)
    accelerator.end_training()


def pairs(config: Config) -> list[tuple[str, str | None]]:
    """Pairs each model with its --pretrained. Raises: ValueError for no model, or another number of them."""
    if not config.model:
        raise ValueError("--model names no model: give one, or leave it out")
    if config.pretrained and len(config.pretrained) != len(config.model):
        counts = f"{len(config.pretrained)} --pretrained for {len(config.model)} --model"
        raise ValueError(f"{counts}: give one for each, `none` for a model that includes its weights")
    weights = [None if tag == "none" else tag for tag in config.pretrained] or [None] * len(config.model)
    return list(zip(config.model, weights, strict=True))


if __name__ == "__main__":
    run(main, Config)
