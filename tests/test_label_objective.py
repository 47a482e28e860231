"""The objective of label distillation: warm-up, class prior over epochs, saved state, and the teacher's images.

In most tests the teacher's logits are part of the batch, so that a loop over the images computes the expected prior.
"""

import copy
import dataclasses

import pytest
import torch
from helpers import run_ranks
from torch import nn
from torch.testing import assert_close

from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.labels import METHODS, Distillation, distillation_loss
from gkl_vl.models.classifiers import Classifier
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.labels import LabelKd
from gkl_vl.teachers.online import online_label_teacher

CLASSES = 5  # the last one has no images
TEMPERATURE = 2.0  # of the prior
ROWS = 8  # of a batch of all processes
EPOCHS = [0, 0, 1, 1, 2, 2]  # of the batches, in their order
SETTINGS = Distillation(
    method="gkl",
    ce_weight=0.5,
    gkl=GklSettings(wmse_weight=2.5, gamma=0.7, temperature=3.0, weight_temperature=TEMPERATURE),
    warmup_epochs=4,
)
STUDENT_NORMALISATION = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
TEACHER_NORMALISATION = {"mean": (0.6, 0.5, 0.4), "std": (0.2, 0.3, 0.1)}


def tiny_classifier(normalisation=STUDENT_NORMALISATION) -> Classifier:
    """For 4 x 4 pixels. BatchNorm and dropout make training and evaluation mode differ."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, CLASSES))
    return Classifier(name="tiny", model=model, num_classes=CLASSES, **normalisation)


def batches() -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randint(0, 256, (ROWS, 3, 4, 4), generator=draw, dtype=torch.uint8),
            "label": torch.randint(CLASSES - 1, (ROWS,), generator=draw),
            "logits": 3 * torch.randn(ROWS, CLASSES, generator=draw),
            "epoch": epoch,
        }
        for epoch in EPOCHS
    ]


def rows_of_rank(batch: dict, rank: int, world_size: int) -> dict:
    rows = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    return {name: value[rows] if torch.is_tensor(value) else value for name, value in batch.items()}


def label_kd(settings=SETTINGS, teacher=lambda batch: batch["logits"], with_prior=True) -> LabelKd:
    prior = EpochPrior(CLASSES, TEMPERATURE) if with_prior else None
    return LabelKd(student=tiny_classifier(), teacher=teacher, settings=settings, prior=prior)


def loss_of(objective: LabelKd, batch: dict):
    model = objective.student.model.eval()
    return objective.loss(objective.outputs(model, batch), objective.targets(batch))


# ---- the loss ----------------------------------------------------------------------------------------------------


def naive_cross_entropy(logits, labels):
    rows = [-(row[label] - row.exp().sum().log()) for row, label in zip(logits, labels.tolist(), strict=True)]
    return sum(rows) / len(rows)


def prepared(images, normalisation):
    mean, std = (torch.tensor(normalisation[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images / 255.0 - mean) / std


def student_logits(batch):
    return tiny_classifier().model.eval()(prepared(batch["image"], STUDENT_NORMALISATION))


def terms(batch, settings, prior):
    """Cross entropy and distillation."""
    logits = student_logits(batch)
    parts = {"student": logits, "teacher": batch["logits"], "labels": batch["label"], "prior": prior}
    return naive_cross_entropy(logits, batch["label"]), distillation_loss(**parts, settings=settings)


WARMUP = [(20, 0, 0.05), (20, 9, 0.5), (20, 18, 0.95), (20, 19, 1), (20, 20, 1), (20, 200, 1), (1, 0, 1), (0, 0, 1)]


@pytest.mark.parametrize("warmup, epoch, share", [*WARMUP, (0, 7, 1)])
def test_the_warm_up_weighs_the_distillation_and_not_the_cross_entropy(warmup, epoch, share):
    settings = dataclasses.replace(SETTINGS, warmup_epochs=warmup)
    batch = batches()[0] | {"epoch": epoch}
    loss, scalars = loss_of(label_kd(settings), batch)
    ce, distillation = terms(batch, settings, torch.full((ROWS, CLASSES), 1 / CLASSES))
    assert distillation > 1
    assert_close(loss, 0.5 * ce + share * distillation, rtol=1e-5, atol=0)
    assert_close(scalars["ce"], ce.detach(), rtol=1e-5, atol=0)
    assert_close(scalars["distillation"], distillation.detach(), rtol=1e-5, atol=0)  # without the factor


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_its_inputs(method):
    settings = dataclasses.replace(SETTINGS, method=method)
    batch, prior = batches()[0], torch.full((ROWS, CLASSES), 1 / CLASSES)
    for with_prior in (True, False):
        loss, _ = loss_of(label_kd(settings, with_prior=with_prior), batch)
        ce, distillation = terms(batch, settings, prior if with_prior else None)
        assert_close(loss, 0.5 * ce + 0.25 * distillation, rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_both_terms():
    objective, batch = label_kd(), batches()[0]
    logits = student_logits(batch).detach().requires_grad_()
    loss, scalars = objective.loss({"logits": logits}, objective.targets(batch))
    ce, distillation = naive_cross_entropy(logits, batch["label"]), scalars["distillation"]
    assert not any(scalar.requires_grad for scalar in scalars.values()) and distillation > 1
    parts = {"student": logits, "teacher": batch["logits"], "labels": batch["label"]}
    whole = 0.5 * ce + 0.25 * distillation_loss(
        **parts, prior=torch.full((ROWS, CLASSES), 1 / CLASSES), settings=SETTINGS
    )
    (got,), (want,) = torch.autograd.grad(loss, logits), torch.autograd.grad(whole, logits)
    assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_accuracy_and_agreement_are_counted():
    objective, batch = label_kd(), batches()[0]
    best = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    batch |= {"label": best.roll(3), "logits": torch.eye(CLASSES)[torch.tensor([0, 1, 2, 3, 4, 0, 2, 1])]}
    batch["label"][0] = 0
    _, scalars = objective.loss({"logits": torch.eye(CLASSES)[best]}, objective.targets(batch))
    assert scalars["batch_acc1"] == (batch["label"] == best).float().mean() > 0
    assert scalars["agreement@1"] == 6 / 8


def test_without_a_teacher_the_loss_is_the_cross_entropy():
    objective, batch = label_kd(Distillation(method="ce", ce_weight=0.5), teacher=None, with_prior=False), batches()[0]
    targets = objective.targets(batch)
    assert set(targets) == {"labels"} and torch.equal(targets["labels"], batch["label"])
    loss, scalars = loss_of(objective, batch)
    assert_close(loss, 0.5 * naive_cross_entropy(student_logits(batch), batch["label"]), rtol=1e-5, atol=0)
    assert set(scalars) == {"ce", "batch_acc1"}
    assert objective.state() == {}
    objective.load_state({})


# ---- the class prior ---------------------------------------------------------------------------------------------


def naive_prior(epoch: int) -> torch.Tensor:
    """The prior used in an epoch: the teacher's mean softmax over the epoch before, by label."""
    prior = torch.full((CLASSES, CLASSES), 1 / CLASSES)
    before = [batch for batch in batches() if batch["epoch"] == epoch - 1]
    for label in range(CLASSES):
        rows = [
            torch.softmax(logits.double() / TEMPERATURE, 0)
            for batch in before
            for logits, its_label in zip(batch["logits"], batch["label"].tolist(), strict=True)
            if its_label == label
        ]
        if rows:
            prior[label] = (sum(rows) / len(rows)).float()
    return prior


def priors_used(rank, world_size):
    """(rows of the prior, loss, gradient of the student) of this rank's rows of each batch."""
    objective, results = label_kd(), []
    model = objective.student.model.eval()
    for batch in (rows_of_rank(batch, rank, world_size) for batch in batches()):
        targets = objective.targets(batch)
        loss, _ = objective.loss(objective.outputs(model, batch), targets)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((targets["prior"], loss.detach(), torch.cat([g.flatten() for g in gradients])))
    return results


def test_the_prior_is_uniform_in_the_first_epoch_then_that_of_the_epoch_before():
    for batch, (rows, _, _) in zip(batches(), priors_used(0, 1), strict=True):
        if batch["epoch"] == 0:
            assert torch.equal(rows, torch.full((ROWS, CLASSES), 1 / CLASSES))
        assert_close(rows, naive_prior(batch["epoch"])[batch["label"]], rtol=1e-6, atol=0)
    first, second = naive_prior(1), naive_prior(2)
    present = torch.cat([batch["label"] for batch in batches()[:4]]).unique()
    assert (first - second)[present].abs().max() > 0.01 and (first - 1 / CLASSES)[present].abs().max() > 0.01


def test_several_processes_share_a_prior_and_a_loss():
    alone, by_rank = priors_used(0, 1), run_ranks(priors_used, 2)
    for batch, (_, loss, gradient), *ranks in zip(batches(), alone, *by_rank, strict=True):
        for rank, (rows, value, _) in enumerate(ranks):
            labels = rows_of_rank(batch, rank, 2)["label"]
            assert_close(rows, naive_prior(batch["epoch"])[labels], rtol=1e-6, atol=0)
            assert_close(value, loss, rtol=1e-5, atol=0)
        assert torch.equal(ranks[0][1], ranks[1][1]) and not torch.allclose(ranks[0][2], ranks[1][2])
        averaged = (ranks[0][2] + ranks[1][2]) / 2  # as DistributedDataParallel does
        assert (averaged - gradient).abs().max() < 1e-5 * gradient.abs().max()


def test_a_class_without_images_stays_uniform():
    objective = label_kd()
    for batch in batches():
        objective.targets(batch)
    unseen = batches()[-1] | {"label": torch.full((ROWS,), CLASSES - 1)}
    uniform = torch.full((ROWS, CLASSES), 1 / CLASSES)
    assert torch.equal(objective.targets(unseen)["prior"], uniform)
    seen = batches()[-1]
    assert (objective.targets(seen)["prior"] - uniform).abs().max() > 0.01


def test_without_a_prior_there_are_no_rows_and_no_state():
    objective = label_kd(with_prior=False)
    for batch in batches():
        assert set(objective.targets(batch)) == {"labels", "teacher", "share"}
    assert objective.state() == {}


def targets_of(objective, batches):
    return [objective.targets(batch) for batch in batches]


@pytest.mark.parametrize("cut", range(len(EPOCHS) + 1))
def test_a_loaded_state_continues_exactly(cut):
    """Inside an epoch, and between the last batch of one and the first of the next."""
    whole, resumed = label_kd(), label_kd()
    targets_of(whole, batches()[:cut])
    state = whole.state()
    saved = copy.deepcopy(state)
    expected = targets_of(whole, batches()[cut:])
    assert all(torch.equal(state[name], saved[name]) for name in saved)  # a copy: later batches do not change it
    resumed.load_state(state)
    for got, want in zip(targets_of(resumed, batches()[cut:]), expected, strict=True):
        assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)
    assert all(torch.equal(resumed.state()[name], tensor) for name, tensor in whole.state().items())


def test_a_state_that_is_not_loaded_changes_the_prior():
    whole, without_state = label_kd(), label_kd()
    targets_of(whole, batches()[:3])
    without_state.prior._epoch = whole.prior._epoch
    rest = batches()[3:]
    wanted, got = (torch.cat([t["prior"] for t in targets_of(it, rest)]) for it in (whole, without_state))
    assert (wanted - got)[:ROWS].abs().max() > 0.01 and (wanted - got)[ROWS:].abs().max() > 0.01


# ---- the teacher -------------------------------------------------------------------------------------------------


def test_the_teacher_is_in_evaluation_mode_and_has_its_normalisation():
    classifier, batch = tiny_classifier(TEACHER_NORMALISATION), batches()[0]
    classifier.model.eval()
    before = copy.deepcopy(classifier.model.state_dict())
    logits = online_label_teacher(classifier)(batch)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    exact = tiny_classifier(TEACHER_NORMALISATION).model.eval()
    assert_close(logits, exact(prepared(batch["image"], TEACHER_NORMALISATION)).detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits, exact(prepared(batch["image"], STUDENT_NORMALISATION)), atol=0.01)
    assert not torch.allclose(logits, exact.train()(prepared(batch["image"], TEACHER_NORMALISATION)), atol=0.01)
    after = classifier.model.state_dict()
    assert not classifier.model.training and all(torch.equal(before[name], after[name]) for name in before)


def test_the_objective_trains_the_student_only():
    teacher = tiny_classifier(TEACHER_NORMALISATION)
    teacher.model.eval()
    objective, batch = label_kd(teacher=online_label_teacher(teacher)), batches()[0]
    loss, _ = loss_of(objective, batch)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.student.model.parameters())
    assert torch.equal(objective.targets(batch)["teacher"], online_label_teacher(teacher)(batch))
