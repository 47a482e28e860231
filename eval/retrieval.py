"""Zero-shot retrieval (image_ and text_retrieval_recall@K) with CLIP_benchmark's flags, keys and values.

Image retrieval finds the image of a text, text retrieval any of the texts of an image. The bundled teacher on
the bundled emoji, each with several names:

    python eval/retrieval.py

Your student on sets from the Hub (https://huggingface.co/clip-benchmark), any model on sets in folders:

    python eval/retrieval.py --model local-dir:runs/clip_kd/model --dataset wds/mscoco_captions wds/flickr30k
    python eval/retrieval.py --model RN50 --pretrained openai --dataset flickr8k --dataset_root sets/flickr8k

Results are appended to --output, one JSON line per dataset. `clip_benchmark build` reads one result per file:
--output "{dataset}_{pretrained}_{model}_{language}_{task}.json".
"""

from dataclasses import dataclass

from accelerate import Accelerator

from gkl_vl.cli import run
from gkl_vl.data.benchmark_sets import BUNDLED, load_benchmark_sets
from gkl_vl.evaluate import append_result, evaluate_clip, format_metrics, refuse_random_weights, result_path
from gkl_vl.towers import BUNDLED_TEACHER, load_clip

TASK = "zeroshot_retrieval"


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
    """Images, or captions, per forward pass."""
    num_workers: int = 2
    """Processes that decode images; 0 = this one."""
    recall_k: tuple[int, ...] = (1, 5, 10)
    """K of recall@K."""
    output: str = "result.json"
    """Results file; {dataset}, {pretrained}, {model}, {language} and {task} are filled in."""
    allow_pickle: bool = False
    """Read weights stored as a pickle."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> None:
    refuse_random_weights(config.model, config.pretrained)
    names = dict(model=config.model, pretrained=config.pretrained or "", task=TASK)
    sets = load_benchmark_sets(config.dataset, root=config.dataset_root, split=config.split)
    paths = [result_path(config.output, dataset=dataset.name, **names) for dataset in sets]
    device = Accelerator().device
    clip = load_clip(config.model, config.pretrained, allow_pickle=config.allow_pickle)
    clip.towers.to(device)
    rows = {}
    for asked, dataset, path in zip(config.dataset, sets, paths, strict=True):
        rows[dataset.name] = evaluate_clip(
            clip=clip,
            dataset=dataset,
            tasks=["retrieval"],
            recall_k=config.recall_k,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            device=device,
            progress=True,
        )
        append_result(path, dataset=asked, metrics=rows[dataset.name], **names)
    print(format_metrics(rows))
    print(f"appended to {', '.join(dict.fromkeys(map(str, paths)))}")


if __name__ == "__main__":
    run(main, Config)
