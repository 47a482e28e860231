"""Zero-shot classification and retrieval, embeddings to metrics, with CLIP_benchmark's names and values.

The first half knows tensors only. The second half, `evaluate_clip`, embeds a whole evaluation set with a `Clip`, and is
what recipes and eval scripts call.

Axis letters: n = images, m = texts, C = classes, d = embedding.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from gkl_vl.classifiers import Classifier
from gkl_vl.data.benchmark_sets import BenchmarkSet, Record, Target
from gkl_vl.data.views import Views
from gkl_vl.errors import UserError
from gkl_vl.towers import Clip, Towers

Templates = Sequence[str] | dict[str, list[str]]
Task = Literal["zero_shot", "retrieval"]
TARGETS: dict[Task, Target] = {"zero_shot": "cls", "retrieval": "txt"}


def top_k_accuracy(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], k: int) -> float:
    """Share of rows whose label is among the k largest logits, in [0, 1]. Ties fall as torch.topk lets them.

    Raises:
        ValueError: no rows, or k not in 1..C.
    """
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k={k} must lie in 1..{logits.shape[1]}, the number of classes")
    return _accuracies(logits, labels, ks=(k,))[0]


def _accuracies(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], ks: tuple[int, ...]) -> list[float]:
    if len(logits) == 0:
        raise ValueError("the accuracy of 0 rows is not defined")
    # One topk for all: of equal logits, topk(1) may take another than the first of topk(5).
    nearest = logits.topk(max(ks), dim=1).indices
    return [int(_hits(nearest[:, :k], labels).sum()) / len(labels) for k in ks]


def mean_per_class_recall(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    """Mean over the classes that occur in `labels` of the share of their rows with the right argmax.

    Same as scikit-learn's `balanced_accuracy_score(labels, logits.argmax(1))`, which CLIP_benchmark takes.
    """
    total = torch.bincount(labels, minlength=logits.shape[1])
    right = torch.bincount(labels[logits.argmax(dim=1) == labels], minlength=logits.shape[1])
    occurs = total > 0
    return (right[occurs].double() / total[occurs]).mean().item()


def classification_metrics(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """acc1, acc5 (nan with fewer than 5 classes) and mean_per_class_recall, shares in [0, 1].

    Source: CLIP_benchmark 1.6.2, `metrics/zeroshot_classification.py::evaluate`.
    """
    if logits.shape[1] >= 5:
        acc1, acc5 = _accuracies(logits, labels, ks=(1, 5))
    else:
        acc1, acc5 = *_accuracies(logits, labels, ks=(1,)), float("nan")
    recall = mean_per_class_recall(logits=logits, labels=labels)
    return {"acc1": acc1, "acc5": acc5, "mean_per_class_recall": recall}


def shot_accuracies(
    *, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], groups: dict[str, Bool[Tensor, " C"]]
) -> dict[str, float]:
    """`many_acc1`, `medium_acc1`, `few_acc1`: accuracy on each group's classes; groups without images left out.

    Source: Liu et al., CVPR 2019, arXiv 1904.05160.
    """
    right = logits.argmax(dim=1) == labels
    members = {name: group[labels] for name, group in groups.items()}
    return {f"{name}_acc1": right[mine].float().mean().item() for name, mine in members.items() if mine.any()}


def retrieval_metrics(
    *,
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "m d"],
    owners: Int[Tensor, " m"],
    recall_k: Sequence[int] = (1, 5, 10),
    tile_rows: int = 1024,
) -> dict[str, float]:
    """Recall@K in both directions, shares in [0, 1]. Text j belongs to image owners[j]; images may own many.

        image_retrieval_recall@K = mean over texts  of [owner among the K images that score highest]
        text_retrieval_recall@K  = mean over images of [any own text among the K texts that score highest]

    "Hit if any", as in CLIP papers, not found / all. The owner is the only positive: an equal caption of
    another image counts as another's, as in CLIP_benchmark. K beyond the number of candidates is a hit. Only
    tile_rows rows of the score matrix exist at a time, which changes the memory and nothing else.
    Source: CLIP_benchmark 1.6.2, `metrics/zeroshot_retrieval.py`.

    Raises:
        ValueError: no images or no texts, no K or one below 1, an owner that is no row of `image`.
    """
    if len(image) == 0 or len(text) == 0:
        raise ValueError(f"recall of {len(image)} images and {len(text)} texts is not defined")
    _check_recall_k(recall_k)
    if owners.min() < 0 or owners.max() >= len(image):
        raise ValueError(f"owners lie in {owners.min()}..{owners.max()}, but there are {len(image)} images")
    images = torch.arange(len(image), device=image.device)
    metrics = {}
    for name, queries, keys, query_ids, key_ids in (
        ("image", text, image, owners, images),
        ("text", image, text, images, owners),
    ):
        hits = {k: 0 for k in recall_k}
        for start in range(0, len(queries), tile_rows):
            rows = slice(start, start + tile_rows)
            scores = _lift(queries[rows]) @ _lift(keys).T
            for k in hits:
                nearest = scores.topk(min(k, len(keys)), dim=1).indices
                hits[k] += int(_hits(key_ids[nearest], query_ids[rows]).sum())
        metrics |= {f"{name}_retrieval_recall@{k}": found / len(queries) for k, found in hits.items()}
    return metrics


def _check_recall_k(recall_k: Sequence[int]) -> None:
    if not recall_k or min(recall_k) < 1:
        raise ValueError(f"recall_k={tuple(recall_k)} must hold numbers from 1")


def zero_shot_classifier(
    *,
    encode_text: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Templates,
    batch_size: int,
    progress: bool = False,
) -> Float[Tensor, "C d"]:
    """One unit vector per class: the normalised mean of the normalised embeddings of its prompts.

        w_c = z / |z|,  z = mean_t e(prompt_t(c)) / |e(prompt_t(c))|

    Args:
        templates: prompts with {c} for the class name, or {class name: [prompts]} (CuPL, arXiv 2209.03320).
        batch_size: prompts per call of encode_text, across class boundaries.

    Source: CLIP_benchmark 1.6.2, `metrics/zeroshot_classification.py::zero_shot_classifier`; the same as
    open_clip's `build_zero_shot_classifier`, transposed.

    Raises:
        UserError: a template without {c}, a class without prompts.
    """
    prompts = [_prompts(name, templates) for name in classnames]
    texts = [prompt for of_class in prompts for prompt in of_class]
    text = embed_texts(
        encode_text=encode_text, tokenize=tokenize, texts=texts, batch_size=batch_size, progress=progress
    )
    means = [of_class.mean(dim=0) for of_class in text.split([len(of_class) for of_class in prompts])]
    return F.normalize(torch.stack(means), dim=-1)


def _prompts(classname: str, templates: Templates) -> list[str]:
    if isinstance(templates, dict):
        if not templates.get(classname):
            raise UserError(f"the prompts have none for the class {classname!r}")
        return templates[classname]
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"the template {template!r} has no place for the class name: write {{c}}")
    return [template.replace("{c}", classname) for template in templates]


def embed_texts(
    *,
    encode_text: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    batch_size: int,
    progress: bool = False,
) -> Float[Tensor, "m d"]:
    """Unit embeddings of texts, on the CPU, fp32 or wider. encode_text takes what tokenize gives."""
    rows = []
    with _bar("text", progress, total=len(texts)) as bar:
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            rows.append(F.normalize(_lift(encode_text(tokenize(batch))), dim=-1).cpu())
            bar.update(len(batch))
    return torch.cat(rows)


def embed_images(
    *,
    encode_image: Callable[[Tensor], Tensor],
    transform: Callable[[Any], Tensor],
    dataset: BenchmarkSet,
    targets: Sequence[Target],
    batch_size: int,
    num_workers: int,
    progress: bool = False,
) -> tuple[Float[Tensor, "n d"], dict[Target, list]]:
    """Unit embeddings of a set's images, on the CPU, fp32 or wider, and their labels ("cls") or captions ("txt").

    Rows are in the order of the set, whatever batch_size and num_workers.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be 1 or more")
    batches = _Batches(dataset, targets, transform, batch_size)
    # Its own generator: a DataLoader draws a seed, and evaluation must not move training's RNG.
    loader = DataLoader(batches, batch_size=None, num_workers=num_workers, generator=torch.Generator())
    rows, records = [], []
    with _bar("image", progress, total=None) as bar:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            rows.append(F.normalize(_lift(encode_image(batch[0])), dim=-1).cpu())
            records.extend(batch[1])
            bar.update(len(batch[1]))
    return torch.cat(rows), {target: [of_record[target] for of_record in records] for target in targets}


def _bar(unit: str, progress: bool, *, total: int | None) -> tqdm:
    return tqdm(desc=f"{unit}s", unit=unit, total=total, leave=False, disable=None if progress else True)


@dataclass
class _Batches(IterableDataset):
    """(pixels, targets) in the order of the set.

    Worker w of W decodes batches w, w + W, ...; a loader asks its workers in turn, so the order stays, and
    all of them help where a set is one single shard.
    """

    dataset: BenchmarkSet
    targets: Sequence[Target]
    transform: Callable[[Any], Tensor]
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Tensor, list] | UserError]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for index, records in enumerate(_batched(self.dataset.records(*self.targets), self.batch_size)):
                if index % workers == mine:
                    pixels = torch.stack([self.transform(record.decode()) for record in records])
                    yield pixels, [record.targets for record in records]
        except UserError as error:
            yield error  # raised here, it would reach the user as a worker's traceback


def _batched(records: Iterable[Record], batch_size: int) -> Iterator[list[Record]]:
    records = iter(records)
    while batch := list(islice(records, batch_size)):
        yield batch


def evaluate_clip(
    *,
    clip: Clip,
    dataset: BenchmarkSet,
    tasks: Sequence[Task],
    recall_k: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, float]:
    """The metrics of one task or both on a set whose images are embedded once.

    The towers are on `device`; they run in eval mode and come back in the mode they were in; no RNG moves.

    Args:
        tasks: "zero_shot" (`classification_metrics`) for a set with labels, class names and templates; "retrieval"
            (`retrieval_metrics`) for one whose images have captions, one or several.
        recall_k: K of retrieval's recall@K.

    Raises:
        UserError: a set without what a task needs or with an unusable sample; embeddings not finite.
        ValueError: no K, or one below 1.
    """
    if "zero_shot" in tasks:
        _require_classes(dataset)
    if "retrieval" in tasks:
        _check_recall_k(recall_k)
    metrics = {}
    with _evaluating(clip.towers):
        image, targets = embed_images(
            encode_image=lambda pixels: clip.towers.encode_image(pixels.to(device)),
            transform=clip.image_transform(),
            dataset=dataset,
            targets=[TARGETS[task] for task in tasks],
            batch_size=batch_size,
            num_workers=num_workers,
            progress=progress,
        )
        if "zero_shot" in tasks:
            classifier = class_weights(
                clip=clip, dataset=dataset, batch_size=batch_size, device=device, progress=progress
            )
            _require_finite(clip, image=image, text=classifier)
            labels = torch.tensor(targets["cls"])
            metrics |= classification_metrics(logits=image @ classifier.T, labels=labels)
        if "retrieval" in tasks:
            captions = targets["txt"]
            text = embed_texts(
                encode_text=lambda tokens: clip.towers.encode_text(tokens.to(device)),
                tokenize=clip.tokenize,
                texts=[caption for of_image in captions for caption in of_image],
                batch_size=batch_size,
                progress=progress,
            )
            _require_finite(clip, image=image, text=text)
            owners = torch.tensor([index for index, of_image in enumerate(captions) for _ in of_image])
            metrics |= retrieval_metrics(image=image, text=text, owners=owners, recall_k=recall_k)
    return metrics


def class_weights(
    *,
    clip: Clip,
    dataset: BenchmarkSet,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Float[Tensor, "C d"]:
    """`zero_shot_classifier` of a set's class names and templates, on the CPU; the towers are on `device`.

    Raises:
        UserError: a set without class names or templates.
    """
    _require_classes(dataset)
    assert dataset.classnames is not None and dataset.templates is not None  # asked above
    with _evaluating(clip.towers):
        weights = zero_shot_classifier(
            encode_text=lambda tokens: clip.towers.encode_text(tokens.to(device)),
            tokenize=clip.tokenize,
            classnames=dataset.classnames,
            templates=dataset.templates,
            batch_size=batch_size,
            progress=progress,
        )
    return weights.clone()  # made in inference mode, it could not take part in a gradient


def _require_classes(dataset: BenchmarkSet) -> None:
    if dataset.kind == "retrieval":
        raise UserError(f"{dataset.name} is a retrieval set: use eval/retrieval.py")
    if not dataset.classnames:
        raise UserError(f"{dataset.name} has no classnames.txt: write one name a line, by label")
    if not dataset.templates:
        file = "zeroshot_classification_templates.txt"
        raise UserError(f"{dataset.name} has no {file}: write one prompt a line, {{c}} for the class name")


@contextmanager
def _evaluating(towers: Towers) -> Iterator[None]:
    # Module by module: a student may train with part of it frozen in eval mode.
    modes = [(module, module.training) for module in towers.modules()]
    towers.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _require_finite(clip: Clip, *, image: Tensor, text: Tensor) -> None:
    # topk and argmax take nan for the largest: without this, a broken model scores like a guess.
    for tower, rows in (("image", image), ("text", text)):
        if not rows.isfinite().all():
            raise UserError(f"the {tower} tower of {clip.name!r} gives embeddings that are not finite")


def _hits(found: Int[Tensor, "n k"], wanted: Int[Tensor, " n"]) -> Tensor:
    return (found == wanted[:, None]).any(dim=1)


def _lift(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def refuse_random_weights(model: str, pretrained: str | None) -> None:
    """A bare name is an architecture; its weights come from `pretrained`. Without them the score is a guess.

    Raises:
        UserError: no weights.
    """
    if ":" not in model and not pretrained:
        raise UserError(f"model {model!r} has random weights: give a tag or a checkpoint as --pretrained")


def result_path(output: str, *, dataset: str, model: str, pretrained: str, task: str, language: str = "en") -> Path:
    """--output with CLIP_benchmark's placeholders {dataset} {pretrained} {model} {language} {task} filled in.

    What cannot stand in a file name (the slashes and colon of `local-dir:runs/x/model`) becomes "_". Asked
    for before an evaluation, so that a file that cannot be written shows before the hours are spent.

    Raises:
        UserError: another placeholder, a path that is a folder or not ours to write.
    """
    values = dict(dataset=dataset, model=model, pretrained=pretrained, task=task, language=language)
    names = {name: re.sub(r"[^\w.@+-]+", "_", value).strip("_") for name, value in values.items()}
    try:
        path = Path(output.format(**names))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise UserError(f"output {output!r} has an unknown placeholder: known are {known}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"output {path} is a folder or may not be written: name another file with --output")
    return path


def append_result(
    path: Path,
    *,
    dataset: str,
    model: str,
    pretrained: str,
    task: str,
    metrics: dict[str, float],
    language: str = "en",
) -> None:
    """Append one JSON line with CLIP_benchmark's keys; `clip_benchmark build` reads files of one line."""
    result = {"dataset": dataset, "model": model, "pretrained": pretrained, "task": task, "metrics": metrics}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result | {"language": language}) + "\n")


def format_metrics(rows: dict[str, dict[str, float]]) -> str:
    """A table for people: one line per row name, one column per metric, shares in percent.

    `image_retrieval_recall@5` is headed `image R@5`.
    """
    first = max(len(name) for name in rows)
    heads = [metric.replace("_retrieval_recall@", " R@").rjust(8) for metric in next(iter(rows.values()))]
    lines = ["  ".join([" " * first, *heads])]
    for name, metrics in rows.items():
        cells = (f"{100 * v:.2f} %".rjust(len(h)) for v, h in zip(metrics.values(), heads, strict=True))
        lines.append("  ".join([name.ljust(first), *cells]))
    return "\n".join(lines)


def top_names(
    *, clip: Clip, images: Sequence[Image.Image], dataset: BenchmarkSet, k: int, device: torch.device | str
) -> list[list[tuple[str, float]]]:
    """For each image the k most probable class names of the set: (name, softmax of scaled similarities)."""
    if not dataset.classnames or not dataset.templates:
        raise UserError(f"{dataset.name} has no class names or templates to choose from")
    with _evaluating(clip.towers):
        pixels = torch.stack([clip.image_transform()(image) for image in images]).to(device)
        classifier = class_weights(clip=clip, dataset=dataset, batch_size=256, device=device)
        image = _lift(clip.towers.encode_image(pixels)).cpu()
        scale = clip.towers.log_scale().exp().cpu()
        best = (scale * image @ classifier.T).softmax(dim=1).topk(min(k, len(classifier)), dim=1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(dataset.classnames[c], p) for c, p in zip(*row, strict=True)] for row in rows]


def milliseconds_per_image(*, clip: Clip, device: torch.device | str, batch_size: int = 64, repeats: int = 5) -> float:
    """Time of the image tower alone, median of `repeats` batches after one warm-up; no benchmark."""
    device = torch.device(device)
    pixels = clip.prepare(
        torch.zeros(batch_size, 3, clip.image_size, clip.image_size, dtype=torch.uint8, device=device)
    )
    seconds = []
    with _evaluating(clip.towers):
        for _ in range(repeats + 1):
            started = time.perf_counter()
            clip.towers.encode_image(pixels)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return 1000 * sorted(seconds[1:])[repeats // 2] / batch_size


# ---- classifiers -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    *, classifier: Classifier, views: Views, view: int, count: int, device: torch.device, batch_size: int = 256
) -> Float[Tensor, "n C"]:
    """Logits of a view of images 0 .. count - 1, on the CPU. The caller sets the mode of the model."""
    starts = range(0, count, batch_size)
    ids = ((view, torch.arange(start, min(start + batch_size, count))) for start in starts)
    batches = tqdm(views.batches(ids), total=len(starts), desc="classify", leave=False, disable=None)
    return torch.cat([classifier.model(classifier.prepare(images.to(device))).float().cpu() for images in batches])
