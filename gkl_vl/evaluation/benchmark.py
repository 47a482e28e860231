"""Evaluates models on sets: results with CLIP_benchmark's names, keys and values, and comparisons with a teacher.

    from gkl_vl.evaluation.benchmark import evaluate

    for result in evaluate("local-dir:runs/x/model", ["emoji", "wds/cifar10"], teacher="bundled"):
        print(result["dataset"], result["metrics"], result["intervals"])

Axis letters: n = images, C = classes.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gkl_vl.data.classes import unique_names
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import Embedder, class_weights, embed_images, embed_texts, require_classes
from gkl_vl.evaluation.linear_probe import Probe, probe
from gkl_vl.evaluation.metrics import (
    Counts,
    Statistic,
    Statistics,
    calibration_statistics,
    check_recall_k,
    choice_statistics,
    class_accuracies,
    classification_statistics,
    intervals,
    likeness_statistics,
    multilabel_statistics,
    paired_differences,
    retrieval_statistics,
    values,
)
from gkl_vl.evaluation.set_collections import BenchmarkTask
from gkl_vl.evaluation.sets import BUNDLED, TARGET_OF, BenchmarkSet, Kind, load_benchmark_sets
from gkl_vl.evaluation.sources import Target
from gkl_vl.models.clip import Clip, comes_with_weights, load_clip
from gkl_vl.provenance import git_commit

Task = BenchmarkTask | Literal["linear_probe"]
Result = dict[str, Any]
"""A result as `result` returns it: one JSON line."""
TASK_OF: dict[Kind, BenchmarkTask] = {
    "classification": "zeroshot_classification",
    "multilabel": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "choice": "image_caption_selection",
}
MEAN_RECALL = "mean_recall@1"
DRAWS = 1000
RESULT_RULES = 2
"""Version of the values of the metrics, part of the settings of stored results: raise it when one changes."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Statistics of one task on one set, from which `result` computes metrics and intervals."""

    task: Task
    images: int
    """Number of images, n."""
    broken: int
    """Number of images that could not be decoded; not included in `images`."""
    metrics: Statistics
    """Metrics under CLIP_benchmark's keys."""
    extra: Statistics
    """Metrics that CLIP_benchmark does not have."""
    logits: Float[Tensor, "n C"] | None = None
    """Logits, with the model's logit scale, of a classification with one label per image; else None."""
    labels: Int[Tensor, " n"] | None = None
    empty_classes: int = 0
    """Number of classes that no evaluated image has. They are no part of mean_per_class_recall, and count as 0 in
    mean_average_precision, as in CLIP_benchmark."""


def targets_of(dataset: BenchmarkSet, tasks: Sequence[Task]) -> list[Target]:
    """Which targets of a set's samples each of these tasks needs."""
    label = TARGET_OF["multilabel" if dataset.kind == "multilabel" else "classification"]
    return ["txt" if task in ("zeroshot_retrieval", "image_caption_selection") else label for task in tasks]


def measure(
    embedder: Embedder,
    dataset: BenchmarkSet,
    tasks: Sequence[BenchmarkTask] = (),
    *,
    recall_k: Sequence[int] = (1, 5, 10),
) -> list[Outcome]:
    """Evaluates one or several tasks on a set, embedding its images once. All processes take part.

    Args:
        tasks: zeroshot_classification needs labels, class names and templates; zeroshot_retrieval one or more captions
            per image; image_caption_selection a correct caption, then wrong ones. Default: the task of the set's kind.
        recall_k: K of retrieval's recall@K.

    Raises:
        UserError: a set that lacks what a task needs, an unusable sample, embeddings that are not finite.
        ValueError: no K, or one below 1.
    """
    tasks = tasks or (TASK_OF[dataset.kind],)
    if "zeroshot_classification" in tasks:
        require_classes(dataset)
    check_recall_k(recall_k)
    targets = targets_of(dataset, tasks)
    images = embed_images(embedder, dataset, *dict.fromkeys(targets))
    outcomes = []
    for task, target in zip(tasks, targets, strict=True):
        count = {"task": task, "images": len(images.rows), "broken": images.broken}
        if task == "zeroshot_classification":
            outcomes.append(Outcome(**count, **_classification(embedder, dataset, images.rows, images.targets[target])))
            continue
        captions = images.targets["txt"]
        text = embed_texts(embedder, [caption for of_image in captions for caption in of_image])
        owners = torch.tensor([index for index, of_image in enumerate(captions) for _ in of_image])
        if task == "zeroshot_retrieval":
            statistics = retrieval_statistics(image=images.rows, text=text, owners=owners, recall_k=recall_k)
            outcomes.append(Outcome(**count, metrics=statistics, extra=_mean_recall(statistics)))
        else:
            statistics = choice_statistics(image=images.rows, text=text, owners=owners)
            outcomes.append(Outcome(**count, metrics=statistics, extra={}))
    return outcomes


def _mean_recall(recalls: Statistics) -> Statistics:
    """Statistic of DataComp's main retrieval metric: the mean of both directions' recall@1; none without K = 1."""
    both = [recalls[name] for name in recalls if name.endswith("_recall@1")]
    return {MEAN_RECALL: lambda counts: (both[0](counts) + both[1](counts)) / 2} if both else {}


def _classification(embedder: Embedder, dataset: BenchmarkSet, rows: Tensor, targets: list) -> dict[str, Any]:
    cosines = rows @ class_weights(embedder, dataset).T
    if dataset.kind == "multilabel":
        rows_of_labels = torch.tensor(targets)
        metrics = multilabel_statistics(scores=cosines, targets=rows_of_labels)
        return {"metrics": metrics, "extra": {}, "empty_classes": _empty_classes(rows_of_labels, cosines.shape[1])}
    labels = torch.tensor(targets)
    logits = cosines * embedder.clip.towers.log_scale().detach().exp().float().cpu()
    return {
        "metrics": classification_statistics(logits=cosines, labels=labels),
        "extra": calibration_statistics(logits=logits, labels=labels),
        "logits": logits,
        "labels": labels,
        "empty_classes": _empty_classes(labels, logits.shape[1]),
    }


def _empty_classes(targets: Tensor, classes: int) -> int:
    counts = targets.sum(dim=0) if targets.ndim == 2 else torch.bincount(targets, minlength=classes)
    return int((counts == 0).sum())


def measure_probe(
    embedder: Embedder, train: BenchmarkSet, test: BenchmarkSet, *, shots: int | None = None, seed: int = 0
) -> tuple[Outcome, Probe]:
    """Fits a linear probe to the training set (`linear_probe.probe`) and evaluates it on the test set. All processes.

    The metrics are those of zero-shot classification with the prefix lp_, as in CLIP_benchmark. The classes of the sets
    are matched by name (`BenchmarkSet.in_order_of`). Returns the outcome on the test set and the probe.

    Raises:
        UserError: as `measure` and `probe`; sets without labels.
    """
    label = TARGET_OF[train.kind]
    if label == "txt":
        raise UserError(f"{train.name} is a {train.kind} set: it has no labels to fit a probe to")
    test = test.in_order_of(train)
    train_images, test_images = embed_images(embedder, train, label), embed_images(embedder, test, label)
    train_targets, test_targets = torch.tensor(train_images.targets[label]), torch.tensor(test_images.targets[label])
    multilabel = train_targets.ndim == 2
    names = train.class_names or ()
    if names and not multilabel and int(test_targets.max()) >= len(names):
        last = len(names) - 1
        raise UserError(
            f"{test.name} has the label {int(test_targets.max())}: the {last + 1} class names of {train.name} cover "
            f"0 to {last}; add the others"
        )
    columns = train_targets.shape[1] if multilabel else int(torch.cat([train_targets, test_targets]).max()) + 1
    fitted = probe(
        features=train_images.rows.to(embedder.device),
        targets=train_targets.to(embedder.device),
        num_classes=len(names) or columns,
        shots=shots,
        seed=seed,
    )
    logits = fitted.classifier.logits(test_images.rows.to(embedder.device)).cpu()
    count = {"task": "linear_probe", "images": len(test_targets), "broken": test_images.broken, "extra": {}}
    count["empty_classes"] = _empty_classes(test_targets, logits.shape[1])
    if multilabel:
        return Outcome(**count, metrics=_prefixed(multilabel_statistics(scores=logits, targets=test_targets))), fitted
    metrics = _prefixed(classification_statistics(logits=logits, labels=test_targets))
    return Outcome(**count, metrics=metrics, logits=logits, labels=test_targets), fitted


def _prefixed(statistics: Statistics) -> Statistics:
    return {f"lp_{name}": statistic for name, statistic in statistics.items()}


def usual_tasks(dataset: BenchmarkSet) -> list[BenchmarkTask]:
    """The task of the set's kind; of the bundled sets, which have captions too, also retrieval."""
    return [TASK_OF[dataset.kind], *(["zeroshot_retrieval"] if dataset.name in BUNDLED else [])]


def set_record(embedder: Embedder, dataset: BenchmarkSet) -> dict[str, Any]:
    """`usual_tasks` in one record: `dataset`, `n` images, metrics under CLIP_benchmark's keys, 95 % `intervals`.

    All processes take part.
    """
    outcomes = measure(embedder, dataset, usual_tasks(dataset))
    bounds: dict[str, tuple[float, float]] = {}
    for outcome in outcomes:
        bounds |= intervals(outcome.metrics, images=outcome.images)
    return {"dataset": dataset.name, "n": outcomes[0].images} | metrics_of(outcomes) | {"intervals": bounds}


def metrics_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The metrics of all outcomes in one dict, for logging."""
    metrics: dict[str, float] = {}
    for outcome in outcomes:
        metrics |= values(outcome.metrics, images=outcome.images)
    return metrics


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate, with the name that the user gave."""

    model: str
    pretrained: str
    embedder: Embedder


def evaluate_set(
    subject: Subject,
    teacher: Subject | None,
    dataset: BenchmarkSet,
    tasks: Sequence[BenchmarkTask],
    *,
    name: str,
    recall_k: Sequence[int] = (1, 5, 10),
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Result]:
    """Returns a result for each task of a set, with a comparison with the teacher. All processes take part.

    Args:
        name: the set's name in the results, as the user gave it (`wds/...`).
    """
    outcomes = measure(subject.embedder, dataset, tasks, recall_k=recall_k)
    teacher_outcomes: Sequence[Outcome | None] = [None] * len(outcomes)
    if teacher is not None:
        teacher_outcomes = measure(teacher.embedder, dataset, tasks, recall_k=recall_k)
    lines = []
    for outcome, of_teacher in zip(outcomes, teacher_outcomes, strict=True):
        line = result(
            outcome, dataset, model=subject.model, pretrained=subject.pretrained, name=name, draws=draws, seed=seed
        )
        if teacher is not None and of_teacher is not None:
            line |= comparison(outcome, of_teacher, dataset, teacher_name=teacher.model, draws=draws, seed=seed)
        lines.append(line)
    return lines


def evaluate_probe(
    subject: Subject,
    teacher: Subject | None,
    train: BenchmarkSet,
    test: BenchmarkSet,
    *,
    name: str,
    shots: int | None,
    seed: int,
) -> Result:
    """Returns the result of a linear probe, with a comparison with the teacher's probe. All processes take part.

    Args:
        name: the set's name in the result, as the user gave it (`wds/...`).
    """
    outcome, fitted = measure_probe(subject.embedder, train, test, shots=shots, seed=seed)
    test = test.in_order_of(train)  # the names of the probe's classes
    line = result(outcome, test, model=subject.model, pretrained=subject.pretrained, name=name, seed=seed)
    line["probe"] = {"fewshot_k": -1 if shots is None else shots, "c": fitted.c, "validation": fitted.validation}
    if teacher is not None:
        of_teacher, _ = measure_probe(teacher.embedder, train, test, shots=shots, seed=seed)
        line |= comparison(outcome, of_teacher, test, teacher_name=teacher.model, seed=seed)
    return line


def evaluate(
    model: str | Clip,
    datasets: Sequence[str | BenchmarkSet],
    *,
    pretrained: str | None = None,
    teacher: str | Clip | None = None,
    tasks: Sequence[BenchmarkTask] = (),
    dataset_root: str | None = None,
    split: str = "test",
    recall_k: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    amp: bool = False,
    cache: Path | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Evaluates a model, optionally compared with a teacher. Returns a plain dict for each task of each set.

    Args:
        model: a name or run folder as for `load_clip`, or a Clip (`models.clip.as_clip` wraps an open_clip model).
        datasets: names, as in `load_benchmark_set`, or sets.
        teacher: as `model`; see `comparison`.
        tasks: default: the task of each set's kind.
        cache: folder of cached embeddings; None = no cache.
        draws, seed: number of draws and seed of the bootstrap.

    Returns: dicts as of `result`.

    Raises: UserError as `load_clip`, `load_benchmark_set` and `measure`.
    """
    settings = {"device": device, "batch_size": batch_size, "num_workers": num_workers, "amp": amp, "cache": cache}
    student = _subject(model, pretrained, settings)
    reference = None if teacher is None else _subject(teacher, None, settings)
    lines = []
    for dataset in datasets:
        loaded = dataset
        if isinstance(loaded, str):
            (loaded,) = load_benchmark_sets([loaded], root=dataset_root, split=split)
        lines += evaluate_set(
            student, reference, loaded, tasks, name=loaded.name, recall_k=recall_k, draws=draws, seed=seed
        )
    return lines


def _subject(model: str | Clip, pretrained: str | None, settings: dict[str, Any]) -> Subject:
    clip, name = (load_clip(model, pretrained), model) if isinstance(model, str) else (model, model.name)
    clip.towers.to(settings["device"])
    return Subject(model=name, pretrained=pretrained or "", embedder=Embedder(clip=clip, **settings))


def result(
    outcome: Outcome,
    dataset: BenchmarkSet,
    *,
    model: str,
    pretrained: str,
    name: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Result:
    """Returns CLIP_benchmark's keys dataset, model, pretrained, task, metrics and language, and these:

        n, broken    numbers of evaluated images, and of images that could not be decoded
        release      number of images in the published release of the set; None if unknown
        empty_classes    number of classes that no evaluated image has
        extra        ece of a classification, mean_recall@1 of a retrieval
        intervals    {metric: [low, high]}, 95 %, bootstrap over images
        seed         seed of the bootstrap
        commit       commit of this project; None outside a checkout

    Args:
        name: the set's name in the result, as the user gave it (`wds/...`); None = `dataset.name`.
    """
    statistics = {**outcome.metrics, **outcome.extra}
    return {
        "dataset": name or dataset.name,
        "model": model,
        "pretrained": pretrained,
        "task": outcome.task,
        "metrics": values(outcome.metrics, images=outcome.images),
        "language": "en",
        "n": outcome.images,
        "broken": outcome.broken,
        "release": dataset.release,
        "empty_classes": outcome.empty_classes,
        "extra": values(outcome.extra, images=outcome.images),
        "intervals": _lists(intervals(statistics, images=outcome.images, draws=draws, seed=seed)),
        "seed": seed,
        "commit": git_commit(),
    }


def comparison(
    student: Outcome, teacher: Outcome, dataset: BenchmarkSet, *, teacher_name: str, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Compares a student with its teacher. Returns under the key "teacher":

    model, metrics, extra, intervals    the teacher's, on the same images
    kept         {metric: student / teacher}, and kept_intervals
    difference   {metric: {value, low, high, p}}: student minus teacher, paired bootstrap
    likeness     classifications: agreement@1, top5_overlap, kl, and likeness_intervals
    per_class    classifications: {class name: {student, teacher, n}}, accuracies and number of images; only classes
                 with images. A name of several classes has the label behind it: "missile (label 657)"
    """
    bootstrap = {"images": student.images, "draws": draws, "seed": seed}
    own, reference = ({**outcome.metrics, **outcome.extra} for outcome in (student, teacher))
    ratios = {name: _ratio(own[name], reference[name]) for name in own if name != "ece"}
    differences = paired_differences(own, reference, **bootstrap)
    compared: dict[str, Any] = {
        "model": teacher_name,
        "metrics": values(teacher.metrics, images=teacher.images),
        "extra": values(teacher.extra, images=teacher.images),
        "intervals": _lists(intervals(reference, **bootstrap)),
        "kept": values(ratios, images=student.images),
        "kept_intervals": _lists(intervals(ratios, **bootstrap)),
        "difference": {name: asdict(difference) for name, difference in differences.items()},
    }
    if student.logits is not None and teacher.logits is not None and student.labels is not None:
        likeness = likeness_statistics(student=student.logits, teacher=teacher.logits)
        compared["likeness"] = values(likeness, images=student.images)
        compared["likeness_intervals"] = _lists(intervals(likeness, **bootstrap))
        compared["per_class"] = _per_class(student.logits, teacher.logits, student.labels, dataset.class_names or [])
    return {"teacher": compared}


def _ratio(numerator: Statistic, denominator: Statistic) -> Statistic:
    def ratio(counts: Counts) -> Tensor:
        below = denominator(counts)
        return torch.where(below > 0, numerator(counts) / below, torch.nan)

    return ratio


def _per_class(
    student: Tensor, teacher: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    accuracies = [class_accuracies(logits=logits, labels=labels).tolist() for logits in (student, teacher)]
    classes = range(student.shape[1])
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    rows = zip(unique_names(names or list(map(str, classes))), *accuracies, counts, strict=True)
    return {name: {"student": own, "teacher": other, "n": n} for name, own, other, n in rows if n}


def _lists(bounds: Mapping[str, tuple[float, float]]) -> dict[str, list[float]]:
    return {name: list(interval) for name, interval in bounds.items()}


def refuse_random_weights(model: str, pretrained: str | None) -> None:
    """Refuses an architecture name without `pretrained`: with random weights the score would be chance.

    Raises:
        UserError: no weights.
    """
    if not pretrained and not comes_with_weights(model):
        raise UserError(f"model {model!r} has random weights: give a tag or a checkpoint as --pretrained")


def result_path(output: str, *, dataset: str, model: str, pretrained: str, task: str, language: str = "en") -> Path:
    """Replaces CLIP_benchmark's placeholders {dataset} {pretrained} {model} {language} {task} in --output.

    Characters that are not allowed in file names (the slashes and colon of `local-dir:runs/x/model`) become "_". Call
    this before the evaluation: it creates the folder and checks that the file can be written.

    Raises:
        UserError: another placeholder, a path that is a folder or not writable.
    """
    values = dict(dataset=dataset, model=model, pretrained=pretrained, task=task, language=language)
    names = {name: file_safe(value) for name, value in values.items()}
    try:
        path = Path(output.format(**names))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise UserError(f"output {output!r} has an unknown placeholder: known are {known}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"output {path} is a folder or not writable: name another file with --output")
    return path


def file_safe(text: str) -> str:
    """`text` with "_" in place of characters that are not allowed in file names."""
    return re.sub(r"[^\w.@+-]+", "_", text).strip("_")
