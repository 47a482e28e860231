"""What the recipes that train classifiers share: settings, evaluation, export."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gkl_vl import report
from gkl_vl.data.labelled import LabelledSet
from gkl_vl.data.views import PLAIN, Views
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import predict
from gkl_vl.evaluation.metrics import classification_metrics, shot_accuracies
from gkl_vl.export import hub
from gkl_vl.export.cards import ClassifierCard, classifier_usage
from gkl_vl.models.classifiers import Classifier, scaled
from gkl_vl.training.checkpoint import RunFolder

Settings = TypeVar("Settings", bound=Any)
"""A dataclass."""


def overridden(defaults: Settings, config: Any, *, but: tuple[str, ...] = ()) -> Settings:
    """What both have by the same name, and `config` does not leave at None, is taken from `config`; not `but`'s."""
    said = {name: value for name, value in vars(config).items() if value is not None and name not in but}
    return replace(defaults, **{name: said[name] for name in said.keys() & {f.name for f in fields(defaults)}})


def require_same_classes(train: LabelledSet, test: LabelledSet) -> None:
    """Raises: UserError for an evaluation set with classes that training does not have."""
    if test.num_classes > train.num_classes:
        raise UserError(
            f"{test.name} has {test.num_classes} classes, {train.name} only {train.num_classes}: "
            "name sets that belong together"
        )


def evaluate_on(
    data: LabelledSet, views: Views, groups: dict[str, Tensor], device: torch.device, classifier: Classifier
) -> dict[str, Any]:
    """A record of the classifier on the evaluation set."""
    classifier.model.eval()
    logits = predict(classifier=classifier, views=views, view=PLAIN, count=len(data), device=device)
    metrics = classification_metrics(logits=logits, labels=data.labels)
    return (
        {"dataset": Path(data.name).name} | metrics | shot_accuracies(logits=logits, labels=data.labels, groups=groups)
    )


def recompute_batchnorm(model: nn.Module, views: Views, *, count: int, device: torch.device) -> None:
    """BatchNorm's statistics of a model whose weights were averaged: over view 0 of `count` images, natural ones.

    The same on all ranks, since all see the same images. `model` takes pixels in [0, 1].
    """
    ids = ((0, chunk) for chunk in torch.arange(count).split(256))
    update_bn((scaled(images.to(device)) for images in views.batches(ids)), model)


def conclude(
    *,
    run: RunFolder,
    student: Classifier,
    teacher: Classifier | None,
    card: ClassifierCard,
    title: str,
    published: str,
) -> None:
    """Export the student, draw the report, print the table and a line about what is published. Main process."""
    student.model.eval()
    hub.export_classifier(classifier=student, folder=run.path / "model", card=card)
    report.draw_report(path=run.path / "report.png", records=run.records(), sheet=[], title=title)
    print(report.results_table(list(_rows(teacher, student, card.metrics))))
    if published:
        print(f"\n{published}")
    print(f"\nLoad the student:\n\n{classifier_usage(student.name, str(run.path / 'model'))}\n")
    print(f"Picture: {run.path / 'report.png'}")
    if card.repo_id:
        print(f"Pushed: {hub.push_to_hub(folder=run.path / 'model', repo_id=card.repo_id)}")


def _rows(teacher: Classifier | None, student: Classifier, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for role, classifier in (("teacher", teacher), ("student", student)):
        if classifier is not None:
            results = {
                r["dataset"]: {k: v for k, v in r.items() if isinstance(v, float)}
                for r in records
                if r["model"] == role
            }
            yield {
                "model": role,
                "name": classifier.name,
                "parameters": count_parameters(classifier.model),
                "results": results,
            }


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
