"""What the recipes that train classifiers share: overrides of published settings, evaluation, export."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gkl_vl.data.classes import match_classes
from gkl_vl.data.labelled import LabelledSet
from gkl_vl.data.views import PLAIN, Views
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import predict
from gkl_vl.evaluation.metrics import classification_statistics, intervals, shot_accuracies, values
from gkl_vl.export import hub
from gkl_vl.export.cards import ClassifierCard, classifier_usage
from gkl_vl.models.classifiers import Classifier, scaled
from gkl_vl.protocols import Record
from gkl_vl.report.figures import draw_report
from gkl_vl.report.page import Page
from gkl_vl.report.tables import intervals_by_dataset, metrics_by_dataset, results_table
from gkl_vl.training.run import Run
from gkl_vl.training.run_page import classifier_summary, command_shown, run_facts, write_report

Settings = TypeVar("Settings", bound=Any)
"""A dataclass."""


@dataclass(frozen=True, kw_only=True)
class GklFlags:
    """Overrides of `GklSettings`; None = the published value."""

    soft_ce_weight: float | None = None
    """Weight of the soft cross entropy (paper: beta)."""
    wmse_weight: float | None = None
    """Weight of the weighted MSE of logit differences (paper: alpha)."""
    gamma: float | None = None
    """Exponent of the wMSE's class weights; IKL and DKL have 1."""
    temperature: float | None = None
    """Temperature of the soft cross entropy."""
    weight_temperature: float | None = None
    """Temperature of the softmax that the wMSE's weights, or the class prior, come from."""


def overridden(defaults: Settings, flags: Mapping[str, Any]) -> Settings:
    """`defaults` with the values of `flags` that are not None, by field name; also in fields that are dataclasses."""
    changes = {}
    for name in (field.name for field in fields(defaults)):
        value = vars(defaults)[name]
        if is_dataclass(value):
            changes[name] = overridden(value, flags)
        elif flags.get(name) is not None:
            changes[name] = flags[name]
    return replace(defaults, **changes)


def in_training_order(test: LabelledSet, train: LabelledSet) -> LabelledSet:
    """The evaluation set with the labels of the training set; classes are matched by name, and it may lack some.

    Raises: UserError for an evaluation set with classes that the training set lacks.
    """
    return test.in_order(train.classnames, num_classes=train.num_classes, others=train.name)


def in_order_of(
    models: Mapping[str, Classifier | None], train: LabelledSet, test: LabelledSet
) -> tuple[LabelledSet, LabelledSet]:
    """The sets with their classes in the order of the models' logits, matched by name where a model has names.

    Args:
        models: by the flag that names them.

    Raises: UserError for a model of other classes, or two models with the same classes in different orders.
    """
    named = [(f"{flag} {m.name}", m.classnames) for flag, m in models.items() if m is not None and m.classnames]
    if not named:
        return train, test
    (first, classnames), *others = named
    for other, names in others:
        if match_classes(names, classnames, whose=other, others=first) != list(range(len(classnames))):
            raise UserError(f"{other} has the classes of {first} in another order: take one without weights for it")
    train, test = (data.in_order(classnames, num_classes=len(classnames), others=first) for data in (train, test))
    return train, test


def evaluate_classifier(
    data: LabelledSet, views: Views, groups: dict[str, Tensor], device: torch.device, classifier: Classifier
) -> Record:
    """`dataset`, n, metrics and 95 % intervals of a classifier on an evaluation set."""
    classifier.model.eval()
    logits = predict(classifier=classifier, views=views, view=PLAIN, count=len(data), device=device)
    statistics = classification_statistics(logits=logits, labels=data.labels)
    metrics = values(statistics, images=len(logits))
    metrics |= shot_accuracies(logits=logits, labels=data.labels, groups=groups)
    record: Record = {"dataset": Path(data.name).name, "n": len(logits)}
    return record | metrics | {"intervals": intervals(statistics, images=len(logits))}


def recompute_batchnorm(model: nn.Module, views: Views, *, count: int, device: torch.device) -> None:
    """Recomputes BatchNorm's statistics of a model with averaged weights, on view 0 of the first `count` images.

    The same on all ranks, since all use the same images. `model` takes pixels in [0, 1].
    """
    ids = ((0, chunk) for chunk in torch.arange(count).split(256))
    update_bn((scaled(images.to(device)) for images in views.batches(ids)), model)


def finish(
    run: Run,
    *,
    student: Classifier,
    teacher: tuple[str, Classifier] | None,
    made: str,
    data: LabelledSet,
    steps: int,
    published: str,
) -> None:
    """Exports the student, draws picture and page, prints the table and a line of published numbers. Main process.

    Args:
        teacher: its name and the model.
        made: for the card: how the student was trained.
        data: the training set; the exported student carries its class names.
        published: "" where nothing was published.
    """
    student.model.eval()
    student = replace(student, classnames=data.classnames)
    facts, folder = run.facts(steps=steps), run.folder.path
    draw_report(path=folder / "report.png", records=run.folder.records(), sheet=[], title=run.title)
    card = ClassifierCard(
        student=student.name,
        made=made,
        teacher=None if teacher is None else teacher[0],
        data=data.name,
        run=replace(facts, picture=folder / "report.png"),
    )
    hub.export_classifier(classifier=student, folder=folder / "model", card=card)
    rows = list(_rows(None if teacher is None else teacher[1], student, facts.metrics))
    print(results_table(rows))
    if published:
        print(f"\n{published}")
    print(f"\nLoad the student:\n\n{classifier_usage(student.name, str(folder / 'model'))}\n")
    print(f"Picture: {folder / 'report.png'}")
    write_report(folder, partial(make_page, run, card, rows, published))
    run.push()


def make_page(run: Run, card: ClassifierCard, rows: list[dict[str, Any]], published: str) -> Page:
    """The page of a run that trains a classifier."""
    facts = {"Student": card.student, "Teacher": card.teacher, "Training data": card.data}
    return Page(
        title=run.title,
        summary=classifier_summary(card),
        records=run.folder.records(),
        rows=rows,
        published=published,
        usage=classifier_usage(card.student, str(run.folder.path / "model")),
        command=command_shown(card),
        facts=run_facts(run, card, facts),
    )


def _rows(teacher: Classifier | None, student: Classifier, records: list[Record]) -> Iterator[dict[str, Any]]:
    for role, classifier in (("teacher", teacher), ("student", student)):
        if classifier is not None:
            yield {
                "model": role,
                "name": classifier.name,
                "parameters": sum(p.numel() for p in classifier.model.parameters()),
                "results": metrics_by_dataset(records, role),
                "intervals": intervals_by_dataset(records, role),
            }
