"""Zero-shot retrieval (image_ and text_retrieval_recall@K) with CLIP_benchmark's flags, keys and values, and
compositional choice (SugarCrepe: text_acc); 95 % intervals, and the teacher beside.

Image retrieval finds the image of a text, text retrieval any of the texts of an image. The bundled teacher on
the bundled emoji, each with several names:

    python eval/retrieval.py

Your student, beside its teacher; sets from the Hub (https://huggingface.co/clip-benchmark) or in folders:

    python eval/retrieval.py --model runs/NAME --teacher bundled
    python eval/retrieval.py --model runs/NAME --dataset wds/mscoco_captions wds/flickr30k
    python eval/retrieval.py --model RN50 --pretrained openai --dataset flickr8k --dataset_root sets/flickr8k
    python eval/retrieval.py --model RN50 --pretrained openai --dataset sugar_crepe/add_att --dataset_root sugar_crepe

Results are appended to --output, one JSON line per dataset. `clip_benchmark build` reads one result per file:
--output "{dataset}_{pretrained}_{model}_{language}_{task}.json". A collection of sets in one go: eval/suite.py.
"""

from dataclasses import dataclass, field
from typing import Annotated

import tyro
from accelerate import Accelerator

from gkl_vl.atomic import append_line
from gkl_vl.cli import run
from gkl_vl.evaluation.benchmark import evaluate_set, result_path
from gkl_vl.evaluation.flags import Flags, load_sets, load_subjects
from gkl_vl.evaluation.sets import BUNDLED
from gkl_vl.evaluation.suite import text_task
from gkl_vl.evaluation.tables import tell


@dataclass(frozen=True, kw_only=True)
class Config:
    dataset: tuple[str, ...] = BUNDLED
    """Sets to evaluate on: bundled (emoji, emoji_unseen), wds/NAME on the Hub, a folder, sugar_crepe/TASK."""
    model: str = "bundled"
    """A run folder, open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, or a .json model config."""
    pretrained: str | None = None
    """open_clip's tag or a checkpoint, for models given by name."""
    teacher: str | None = None
    """A model to compare with on the same images, as --model; `bundled` is the bundled one."""
    flags: Annotated[Flags, tyro.conf.arg(name="")] = field(default_factory=Flags)
    recall_k: tuple[int, ...] = (1, 5, 10)
    """K of recall@K."""
    output: str = "result.json"
    """Results file; {dataset}, {pretrained}, {model}, {language} and {task} are filled in."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    sets = load_sets(config.dataset, config.flags)
    names = dict(model=config.model, pretrained=config.pretrained or "")
    paths = [result_path(config.output, dataset=of.name, task=text_task(of), **names) for of in sets]
    accelerator = Accelerator()
    subject, teacher = load_subjects(config.model, config.pretrained, config.teacher, config.flags, accelerator.device)
    lines = []
    for asked, dataset, path in zip(config.dataset, sets, paths, strict=True):
        (line,) = evaluate_set(
            subject,
            teacher,
            dataset,
            [text_task(dataset)],
            asked=asked,
            recall_k=config.recall_k,
            seed=config.flags.seed,
        )
        lines.append(line)
        if accelerator.is_main_process:
            append_line(path, line)
    if accelerator.is_main_process:
        tell(lines, paths)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, Config)
