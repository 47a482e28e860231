"""Zero-shot retrieval (image_ and text_retrieval_recall@K) with CLIP_benchmark's flags, keys and values, and
compositional choice (SugarCrepe: text_acc), with 95 % intervals and optionally a comparison with the teacher.

Image retrieval searches the image of a text, text retrieval any of the texts of an image. The bundled teacher on
the bundled emoji, each with several names:

    python eval/retrieval.py

Your student, compared with its teacher; sets from the Hub (https://huggingface.co/clip-benchmark) or in folders:

    python eval/retrieval.py --model runs/NAME --teacher bundled
    python eval/retrieval.py --model runs/NAME --dataset wds/mscoco_captions wds/flickr30k
    python eval/retrieval.py --model RN50 --pretrained openai --dataset flickr8k --dataset_root sets/flickr8k
    python eval/retrieval.py --model RN50 --pretrained openai --dataset sugar_crepe/add_att --dataset_root sugar_crepe

Results are appended to --output, one JSON line per dataset. `clip_benchmark build` reads one result per file:
--output "{dataset}_{pretrained}_{model}_{language}_{task}.json". For a collection of sets: eval/suite.py.
"""

from dataclasses import dataclass, field

from accelerate import Accelerator

from gkl_vl.atomic import append_line
from gkl_vl.cli import refuse_unused, run
from gkl_vl.evaluation.benchmark import evaluate_set, result_path
from gkl_vl.evaluation.flags import EvalFlags, load_sets, load_subjects
from gkl_vl.evaluation.sets import BUNDLED
from gkl_vl.evaluation.suite import text_task
from gkl_vl.evaluation.tables import print_results


@dataclass(frozen=True, kw_only=True)
class Config:
    dataset: tuple[str, ...] = BUNDLED
    """Sets to evaluate on: bundled (emoji, emoji_unseen), wds/NAME on the Hub, a folder, sugar_crepe/TASK."""
    model: str = "bundled"
    """A run folder, open_clip name, hf-hub:org/repo, local-dir:path, transformers:org/repo, onnx:path, .json config."""
    pretrained: str | None = None
    """open_clip's tag or a checkpoint, for models given by name."""
    teacher: str | None = None
    """Teacher to compare with on the same images, named as for --model; `bundled` is the bundled one."""
    evaluation: EvalFlags = field(default_factory=EvalFlags)
    recall_k: tuple[int, ...] = (1, 5, 10)
    """K of recall@K."""
    output: str = "result.json"
    """Results file; {dataset}, {pretrained}, {model}, {language} and {task} are replaced."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    unused = ["custom_classname_file", "custom_template_file"]
    refuse_unused(vars(config.evaluation), unused, "has no effect on retrieval")
    sets = load_sets(config.dataset, config.evaluation)
    names = dict(model=config.model, pretrained=config.pretrained or "")
    paths = [result_path(config.output, dataset=dataset.name, task=text_task(dataset), **names) for dataset in sets]
    accelerator = Accelerator()
    subject, teacher = load_subjects(
        config.model, config.pretrained, config.teacher, config.evaluation, accelerator.device
    )
    lines = []
    for name, dataset, path in zip(config.dataset, sets, paths, strict=True):
        (line,) = evaluate_set(
            subject,
            teacher,
            dataset,
            [text_task(dataset)],
            name=name,
            recall_k=config.recall_k,
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
