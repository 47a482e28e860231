"""A model and evaluation sets -> results with CLIP_benchmark's names, keys and values, and what a distiller asks.

    from gkl_vl.benchmark import evaluate

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
from gkl_vl.evaluation.sets import TARGET_OF, BenchmarkSet, Kind, load_benchmark_sets
from gkl_vl.evaluation.sources import Target
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.provenance import git_commit

Task = BenchmarkTask | Literal["linear_probe"]
Line = dict[str, Any]
"""A result, as `result` makes it."""
TASK_OF: dict[Kind, BenchmarkTask] = {
    "classification": "zeroshot_classification",
    "multilabel": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "choice": "image_caption_selection",
}
MEAN_RECALL = "mean_recall@1"
DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one task on one set, before it becomes numbers."""

    task: Task
    images: int
    broken: int
    """Images that could not be decoded, and are not among `images`."""
    metrics: Statistics
    """Under CLIP_benchmark's keys."""
    extra: Statistics
    """What CLIP_benchmark does not say."""
    logits: Float[Tensor, "n C"] | None = None
    """Of a classification with one label an image; as the model scales them."""
    labels: Int[Tensor, " n"] | None = None


def measure(
    embedder: Embedder,
    dataset: BenchmarkSet,
    tasks: Sequence[BenchmarkTask] = (),
    *,
    recall_k: Sequence[int] = (1, 5, 10),
) -> list[Outcome]:
    """One task or several on a set whose images are embedded once. All processes take part.

    Args:
        tasks: zeroshot_classification needs labels, class names and templates; zeroshot_retrieval captions, one or
            several an image; image_caption_selection a right caption and wrong ones. Default: what the set is for.
        recall_k: K of retrieval's recall@K.

    Raises:
        UserError: a set without what a task needs or with an unusable sample; embeddings not finite.
        ValueError: no K, or one below 1.
    """
    tasks = tasks or (TASK_OF[dataset.kind],)
    if "zeroshot_classification" in tasks:
        require_classes(dataset)
    check_recall_k(recall_k)
    label = TARGET_OF["multilabel" if dataset.kind == "multilabel" else "classification"]
    wanted: list[Target] = [label if task == "zeroshot_classification" else "txt" for task in tasks]
    images = embed_images(embedder, dataset, *dict.fromkeys(wanted))
    found = []
    for task in tasks:
        count = {"task": task, "images": len(images.rows), "broken": images.broken}
        if task == "zeroshot_classification":
            found.append(Outcome(**count, **_classified(embedder, dataset, images.rows, images.targets[label])))
            continue
        captions = images.targets["txt"]
        text = embed_texts(embedder, [caption for of_image in captions for caption in of_image])
        owners = torch.tensor([index for index, of_image in enumerate(captions) for _ in of_image])
        if task == "zeroshot_retrieval":
            statistics = retrieval_statistics(image=images.rows, text=text, owners=owners, recall_k=recall_k)
            found.append(Outcome(**count, metrics=statistics, extra=_mean_recall(statistics)))
        else:
            statistics = choice_statistics(image=images.rows, text=text, owners=owners)
            found.append(Outcome(**count, metrics=statistics, extra={}))
    return found


def _mean_recall(recalls: Statistics) -> Statistics:
    """DataComp's main metric of retrieval: the mean of both directions at K = 1."""
    both = [recalls[name] for name in recalls if name.endswith("_recall@1")]
    return {MEAN_RECALL: lambda counts: (both[0](counts) + both[1](counts)) / 2} if both else {}


def _classified(embedder: Embedder, dataset: BenchmarkSet, rows: Tensor, labels: list) -> dict[str, Any]:
    cosines = rows @ class_weights(embedder, dataset).T
    if dataset.kind == "multilabel":
        return {"metrics": multilabel_statistics(scores=cosines, targets=torch.tensor(labels)), "extra": {}}
    numbers = torch.tensor(labels)
    logits = cosines * embedder.clip.towers.log_scale().detach().exp().float().cpu()
    return {
        "metrics": classification_statistics(logits=cosines, labels=numbers),
        "extra": calibration_statistics(logits=logits, labels=numbers),
        "logits": logits,
        "labels": numbers,
    }


def measure_probe(
    embedder: Embedder, train: BenchmarkSet, test: BenchmarkSet, *, shots: int | None = None, seed: int = 0
) -> tuple[Outcome, Probe]:
    """The test set under a linear probe of the training set (`linear_probe.probe`), and the probe. All processes.

    Metrics are those of a zero-shot classification with lp_ before their names, as CLIP_benchmark has it.

    Raises:
        UserError: as `measure` and `probe`; sets without labels.
    """
    label = TARGET_OF[train.kind]
    if label == "txt":
        raise UserError(f"{train.name} is a {train.kind} set: it has no labels to fit a probe to")
    fitted_on, measured_on = embed_images(embedder, train, label), embed_images(embedder, test, label)
    targets, wanted = torch.tensor(fitted_on.targets[label]), torch.tensor(measured_on.targets[label])
    several = targets.ndim == 2
    if train.classnames and not several and int(wanted.max()) >= len(train.classnames):
        raise UserError(
            f"{test.name} has the label {int(wanted.max())}, its {len(train.classnames)} classes end before"
        )
    most = targets.shape[1] if several else int(torch.cat([targets, wanted]).max()) + 1
    found = probe(
        features=fitted_on.rows.to(embedder.device),
        targets=targets.to(embedder.device),
        num_classes=len(train.classnames or ()) or most,
        shots=shots,
        seed=seed,
    )
    logits = found.classifier.logits(measured_on.rows.to(embedder.device)).cpu()
    count = {"task": "linear_probe", "images": len(wanted), "broken": measured_on.broken, "extra": {}}
    if several:
        return Outcome(**count, metrics=_prefixed(multilabel_statistics(scores=logits, targets=wanted))), found
    metrics = _prefixed(classification_statistics(logits=logits, labels=wanted))
    return Outcome(**count, metrics=metrics, logits=logits, labels=wanted), found


def _prefixed(statistics: Statistics) -> Statistics:
    return {f"lp_{name}": statistic for name, statistic in statistics.items()}


def metrics_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Their metrics in one dict, for a log."""
    found: dict[str, float] = {}
    for outcome in outcomes:
        found |= values(outcome.metrics, images=outcome.images)
    return found


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under the name that it was asked for."""

    model: str
    pretrained: str
    embedder: Embedder


def evaluate_set(
    subject: Subject,
    teacher: Subject | None,
    dataset: BenchmarkSet,
    tasks: Sequence[BenchmarkTask],
    *,
    asked: str,
    recall_k: Sequence[int] = (1, 5, 10),
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Line]:
    """A result for each task of a set, with what the teacher says of the same images. All processes take part."""
    outcomes = measure(subject.embedder, dataset, tasks, recall_k=recall_k)
    taught: Sequence[Outcome | None] = [None] * len(outcomes)
    if teacher is not None:
        taught = measure(teacher.embedder, dataset, tasks, recall_k=recall_k)
    lines = []
    for outcome, of_teacher in zip(outcomes, taught, strict=True):
        line = result(
            outcome, dataset, model=subject.model, pretrained=subject.pretrained, asked=asked, draws=draws, seed=seed
        )
        if teacher is not None and of_teacher is not None:
            line |= against(outcome, of_teacher, dataset, teacher_name=teacher.model, draws=draws, seed=seed)
        lines.append(line)
    return lines


def evaluate_probe(
    subject: Subject,
    teacher: Subject | None,
    train: BenchmarkSet,
    test: BenchmarkSet,
    *,
    asked: str,
    shots: int | None,
    seed: int,
) -> Line:
    """The result of a linear probe, and of the teacher's on the same images. All processes take part."""
    outcome, fitted = measure_probe(subject.embedder, train, test, shots=shots, seed=seed)
    line = result(outcome, test, model=subject.model, pretrained=subject.pretrained, asked=asked, seed=seed)
    line["probe"] = {"fewshot_k": -1 if shots is None else shots, "c": fitted.c, "validation": fitted.validation}
    if teacher is not None:
        of_teacher, _ = measure_probe(teacher.embedder, train, test, shots=shots, seed=seed)
        line |= against(outcome, of_teacher, test, teacher_name=teacher.model, seed=seed)
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
    """Evaluate a model, with its teacher if there is one, and return a plain dict for each task of each set.

    Args:
        model: what `load_clip` takes, a run folder, or a Clip (`towers.as_clip` makes one of an open_clip model).
        datasets: names, as in `load_benchmark_set`, or sets.
        teacher: as `model`; see `against`.
        tasks: by default what each set is for.
        cache: folder for embeddings; None = keep none.
        draws, seed: of the bootstrap.

    Returns: as `result`.

    Raises: UserError as `load_clip`, `load_benchmark_set` and `measure`.
    """
    how = {"device": device, "batch_size": batch_size, "num_workers": num_workers, "amp": amp, "cache": cache}
    student = _subject(model, pretrained, how)
    other = None if teacher is None else _subject(teacher, None, how)
    found = []
    for dataset in datasets:
        loaded = dataset
        if isinstance(loaded, str):
            (loaded,) = load_benchmark_sets([loaded], root=dataset_root, split=split)
        found += evaluate_set(
            student, other, loaded, tasks, asked=loaded.name, recall_k=recall_k, draws=draws, seed=seed
        )
    return found


def _subject(model: str | Clip, pretrained: str | None, how: dict[str, Any]) -> Subject:
    clip, name = (load_clip(model, pretrained), model) if isinstance(model, str) else (model, model.name)
    clip.towers.to(how["device"])
    return Subject(model=name, pretrained=pretrained or "", embedder=Embedder(clip=clip, **how))


# ---- results ----------------------------------------------------------------------------------------------------


def result(
    outcome: Outcome,
    dataset: BenchmarkSet,
    *,
    model: str,
    pretrained: str,
    asked: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """CLIP_benchmark's dataset, model, pretrained, task, metrics and language; and beside them

        n, broken    images that were counted, and those that could not be decoded
        extra        ece of a classification, mean_recall@1 of a retrieval
        intervals    {metric: [low, high]}, 95 %, bootstrap over images
        seed         of the bootstrap
        commit       of this project, None outside of a checkout

    Args:
        asked: the set's name as it was asked for, with its `wds/`.
    """
    every = {**outcome.metrics, **outcome.extra}
    return {
        "dataset": asked or dataset.name,
        "model": model,
        "pretrained": pretrained,
        "task": outcome.task,
        "metrics": values(outcome.metrics, images=outcome.images),
        "language": "en",
        "n": outcome.images,
        "broken": outcome.broken,
        "extra": values(outcome.extra, images=outcome.images),
        "intervals": _lists(intervals(every, images=outcome.images, draws=draws, seed=seed)),
        "seed": seed,
        "commit": git_commit(),
    }


def against(
    student: Outcome, teacher: Outcome, dataset: BenchmarkSet, *, teacher_name: str, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """What distillation kept, under the key "teacher":

    model, metrics, extra, intervals    of the teacher on the same images
    kept         {metric: student / teacher}, and kept_intervals
    difference   {metric: {value, low, high, p}}: student minus teacher, paired bootstrap
    likeness     of classifications: agreement@1, top5_overlap, kl, and likeness_intervals
    per_class    {class name: {student, teacher, n}}: accuracies, and images; classes without images left out
    """
    how = {"images": student.images, "draws": draws, "seed": seed}
    own, every = ({**outcome.metrics, **outcome.extra} for outcome in (student, teacher))
    shares = {name: _ratio(own[name], every[name]) for name in own if name != "ece"}
    differences = paired_differences(own, every, **how)
    found: dict[str, Any] = {
        "model": teacher_name,
        "metrics": values(teacher.metrics, images=teacher.images),
        "extra": values(teacher.extra, images=teacher.images),
        "intervals": _lists(intervals(every, **how)),
        "kept": values(shares, images=student.images),
        "kept_intervals": _lists(intervals(shares, **how)),
        "difference": {name: asdict(difference) for name, difference in differences.items()},
    }
    if student.logits is not None and teacher.logits is not None and student.labels is not None:
        likeness = likeness_statistics(student=student.logits, teacher=teacher.logits)
        found["likeness"] = values(likeness, images=student.images)
        found["likeness_intervals"] = _lists(intervals(likeness, **how))
        found["per_class"] = _per_class(student.logits, teacher.logits, student.labels, dataset.classnames or [])
    return {"teacher": found}


def _ratio(one: Statistic, other: Statistic) -> Statistic:
    def ratio(counts: Counts) -> Tensor:
        below = other(counts)
        return torch.where(below > 0, one(counts) / below, torch.nan)

    return ratio


def _per_class(
    student: Tensor, teacher: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    own, other = (class_accuracies(logits=logits, labels=labels).tolist() for logits in (student, teacher))
    counts = torch.bincount(labels, minlength=len(own)).tolist()
    rows = zip(names or map(str, range(len(own))), own, other, counts, strict=True)
    return {name: {"student": mine, "teacher": theirs, "n": n} for name, mine, theirs, n in rows if n}


def _lists(found: Mapping[str, tuple[float, float]]) -> dict[str, list[float]]:
    return {name: list(interval) for name, interval in found.items()}


def refuse_random_weights(model: str, pretrained: str | None) -> None:
    """A bare name is an architecture; its weights come from `pretrained`. Without them the score is a guess.

    Raises:
        UserError: no weights.
    """
    if ":" not in model and model != "bundled" and not pretrained and not Path(model).is_dir():
        raise UserError(f"model {model!r} has random weights: give a tag or a checkpoint as --pretrained")


def result_path(output: str, *, dataset: str, model: str, pretrained: str, task: str, language: str = "en") -> Path:
    """--output with CLIP_benchmark's placeholders {dataset} {pretrained} {model} {language} {task} filled in.

    What cannot stand in a file name (the slashes and colon of `local-dir:runs/x/model`) becomes "_". Asked
    for before an evaluation, so that a file that cannot be written shows before the hours are spent.

    Raises:
        UserError: another placeholder, a path that is a folder or not ours to write.
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
        raise UserError(f"output {path} is a folder or may not be written: name another file with --output")
    return path


def file_safe(text: str) -> str:
    """`text` with "_" for what cannot stand in a file name."""
    return re.sub(r"[^\w.@+-]+", "_", text).strip("_")
