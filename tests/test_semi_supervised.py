"""Pseudo-labels and consistency: every term against a loop over images, FlexMatch's thresholds against its counts,
Mean Teacher's teacher against its closed form; what has a gradient; one process and two."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks
from torch import nn
from torch.testing import assert_close

from gkl_vl.losses.consistency import ClassThresholds, SemiSupervised, consistency_loss, pseudo_label_scalars, rampup
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.models.classifiers import Classifier
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.semi_supervised import SemiSupervisedTraining
from gkl_vl.training.engine import moving_average

CLASSES, N, MU, POOL = 3, 4, 3, 20
TERMS = ("hard", "kl", "mse", "ikl", "gkl")
SETTINGS = SemiSupervised(
    threshold=0.5,
    unlabelled_weight=0.7,
    gkl=GklSettings(temperature=0.5, soft_ce_weight=1.5, wmse_weight=0.3, gamma=0.4, weight_temperature=2),
)


# ---- the consistency term ----------------------------------------------------------------------------------------


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def naive_rows(strong, weak, prior, s: SemiSupervised) -> tuple[list[float], list[float], list[float]]:
    """Term, wMSE's numerator and its denominator of each image, from the definitions over pairs of classes."""
    terms, numerators, denominators = [], [], []
    for b, (x, w) in enumerate(zip(strong.tolist(), weak.tolist(), strict=True)):
        p, target = softmax(x), softmax(w, s.gkl.temperature)
        cross_entropy = -sum(t * math.log(q) for t, q in zip(target, p, strict=True))
        if s.consistency == "hard":
            terms.append(-math.log(p[w.index(max(w))]))
        elif s.consistency == "kl":
            terms.append(cross_entropy + sum(t * math.log(t) for t in target))
        elif s.consistency == "mse":
            terms.append(sum((a - q) ** 2 for a, q in zip(softmax(w), p, strict=True)) / len(w))
        else:
            terms.append(s.gkl.soft_ce_weight * cross_entropy)
        gamma = 1.0 if s.consistency == "ikl" else s.gkl.gamma
        base = softmax(w, s.gkl.weight_temperature) if prior is None else prior[b].tolist()
        v = [q**gamma for q in base]
        d = [a - c for a, c in zip(w, x, strict=True)]
        classes = range(len(w))
        numerators.append(sum(v[j] * v[k] * (d[j] - d[k]) ** 2 for j in classes for k in classes) / 4)
        denominators.append(sum(v) ** 2)
    return terms, numerators, denominators


def naive(strong, weak, mask, prior, s: SemiSupervised) -> float:
    terms, numerators, denominators = naive_rows(strong, weak, prior, s)
    counts = mask.tolist()
    value = sum(term for term, m in zip(terms, counts, strict=True) if m) / len(terms)
    if s.consistency in ("ikl", "gkl"):
        value += s.gkl.wmse_weight * sum(x for x, m in zip(numerators, counts, strict=True) if m) / sum(denominators)
    return value


def logits(rows: int, classes: int, dtype: torch.dtype, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    strong, weak = (2 * torch.randn(rows, classes, generator=draw, dtype=dtype) for _ in range(2))
    mask = torch.rand(rows, generator=draw) < 0.6
    prior = torch.randn(rows, classes, generator=draw, dtype=dtype).softmax(dim=1)
    return strong.requires_grad_(), weak.requires_grad_(), mask, prior


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("rows, classes", [(7, 5), (1, 2), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_term_equals_a_loop_over_the_images(term, rows, classes, dtype):
    strong, weak, mask, prior = logits(rows, classes, dtype)
    settings = dataclasses.replace(SETTINGS, consistency=term)
    for used_prior in (None, prior):
        loss = consistency_loss(strong=strong, weak=weak, mask=mask, prior=used_prior, settings=settings)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        expected = naive(strong, weak, mask, used_prior, settings)
        assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("term", TERMS)
def test_the_gradient_equals_the_loops_and_the_weak_view_has_none(term):
    strong, weak, mask, prior = logits(4, 3, torch.float64, seed=3)
    settings = dataclasses.replace(SETTINGS, consistency=term)
    consistency_loss(strong=strong, weak=weak, mask=mask, prior=prior, settings=settings).backward()
    assert weak.grad is None
    step, expected = 1e-6, torch.zeros_like(strong)
    for b in range(4):
        for j in range(3):
            shift = torch.zeros_like(strong)
            shift[b, j] = step
            above, below = (naive(strong + sign * shift, weak, mask, prior, settings) for sign in (1, -1))
            expected[b, j] = (above - below) / (2 * step)
    assert_close(strong.grad, expected, rtol=1e-6, atol=1e-9)
    assert strong.grad[~mask].abs().max() == 0 and strong.grad[mask].abs().max() > 0


def test_ikl_equals_the_released_one():
    """`consistency_loss(name="ikl")` of jiequancui/DKL: code's alpha is the soft CE's weight, beta the wMSE's."""
    strong, weak, mask, _ = logits(6, 4, torch.float64)
    settings = dataclasses.replace(SETTINGS, consistency="ikl")
    pairs = [x[:, :, None] - x[:, None, :] for x in (weak, strong)]
    probability = F.softmax(weak / settings.gkl.weight_temperature, dim=1)
    products = probability[:, :, None] @ probability[:, None, :]
    mse = 0.25 * ((pairs[0] - pairs[1]).pow(2) * products).sum(dim=(1, 2))
    sce = -(F.softmax(weak / settings.gkl.temperature, dim=1) * F.log_softmax(strong, dim=1)).sum(dim=1)
    released = ((settings.gkl.wmse_weight * mse + settings.gkl.soft_ce_weight * sce) * mask).mean()
    assert_close(consistency_loss(strong=strong, weak=weak, mask=mask, prior=None, settings=settings), released)


def test_an_empty_mask_gives_no_loss():
    strong, weak, mask, prior = logits(3, 4, torch.float32)
    for term in TERMS:
        settings = dataclasses.replace(SETTINGS, consistency=term)
        none = torch.zeros_like(mask)
        loss = consistency_loss(strong=strong, weak=weak, mask=none, prior=prior, settings=settings)
        (gradient,) = torch.autograd.grad(loss, strong)
        assert loss == 0 and gradient.abs().max() == 0


def test_the_weight_grows_over_its_steps():
    settings = dataclasses.replace(SETTINGS, rampup_steps=4)
    assert [rampup(settings, step=step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert rampup(SETTINGS, step=0) == 1


def test_the_log_has_the_mask_rate_and_the_accuracy_of_pseudo_labels():
    weak = torch.tensor([[2.0, 1], [1, 2], [2, 1], [1, 2]])
    hidden = torch.tensor([0, 0, 1, -1])
    scalars = pseudo_label_scalars(weak=weak, mask=torch.tensor([True, True, False, True]), hidden=hidden)
    assert scalars["mask_rate"] == 0.75 and scalars["pseudo_label_acc1"] == 0.5  # the last has no hidden label
    assert pseudo_label_scalars(weak=weak, mask=torch.zeros(4).bool(), hidden=hidden)["pseudo_label_acc1"] == 0


# ---- FlexMatch ---------------------------------------------------------------------------------------------------


def naive_thresholds(last: list[int], classes: int, threshold: float) -> list[float]:
    """USB's hook: -1 for images without a confident pseudo-label so far, whose number is part of the maximum."""
    counts = {label: last.count(label) for label in {-1, *range(classes)}}
    if counts[-1] == len(last):
        return [0.0] * classes
    learnt = [counts[label] / max(counts.values()) for label in range(classes)]
    return [threshold * b / (2 - b) for b in learnt]


def test_flexmatch_lowers_the_thresholds_of_classes_with_few_confident_images():
    thresholds = ClassThresholds(num_images=POOL, num_classes=CLASSES, threshold=0.8)
    last, draw = [-1] * POOL, torch.Generator().manual_seed(0)
    for _ in range(12):
        expected = naive_thresholds(last, CLASSES, 0.8)
        assert_close(thresholds.of(torch.arange(CLASSES)), torch.tensor(expected))
        index = torch.randperm(POOL, generator=draw)[:6]
        labels = (torch.rand(6, generator=draw) ** 2 * CLASSES).long()
        confidence = torch.rand(6, generator=draw)
        thresholds.update(index=index, labels=labels, confidence=confidence)
        for i, label, p in zip(index.tolist(), labels.tolist(), confidence.tolist(), strict=True):
            last[i] = label if p >= torch.tensor(0.8) else last[i]
    assert len({round(t, 6) for t in expected}) == CLASSES and max(expected) > 0


# ---- the objective -----------------------------------------------------------------------------------------------


def classifier(*, norm: bool = False) -> Classifier:
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(3, 4, 3),
        *([nn.BatchNorm2d(4)] if norm else []),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    ]
    return Classifier(
        name="tiny", model=nn.Sequential(*layers), mean=(0.4, 0.5, 0.6), std=(0.1, 0.1, 0.2), num_classes=CLASSES
    )


def batches(count: int = 6) -> list[dict]:
    draw = torch.Generator().manual_seed(1)

    def images(n):
        return torch.randint(0, 256, (n, 3, 4, 4), generator=draw, dtype=torch.uint8)

    return [
        {
            "image": images(N),
            "label": torch.randint(CLASSES, (N,), generator=draw),
            "weak": images(N * MU),
            "strong": images(N * MU),
            "unlabelled_index": torch.randperm(POOL, generator=draw)[: N * MU],
            "hidden_label": torch.randint(-1, CLASSES, (N * MU,), generator=draw),
            "epoch": number // 2,
            "step": number,
            "keys": [str(i) for i in range(N)],
        }
        for number in range(count)
    ]


def objective(settings: SemiSupervised = SETTINGS, *, norm: bool = False, decay: float = 0.0) -> SemiSupervisedTraining:
    student = classifier(norm=norm)
    flex = settings.method == "flexmatch"
    return SemiSupervisedTraining(
        student=student,
        average=moving_average(student.model, decay),
        settings=settings,
        thresholds=ClassThresholds(num_images=POOL, num_classes=CLASSES, threshold=0.5) if flex else None,
        prior=EpochPrior(CLASSES, 1) if settings.class_prior else None,
    )


def update(training: SemiSupervisedTraining, batch: dict):
    """A step of the engine without the optimizer: loss and scalars; the gradients are in the model."""
    model = training.student.model
    batch = training.prepare(batch)
    model.train()
    outputs = training.outputs(model, batch)
    leaves = {name: x.detach().requires_grad_() for name, x in outputs.items()}
    loss, scalars = training.loss(leaves, training.targets(batch))
    loss.backward()
    model.zero_grad()
    torch.autograd.backward(list(outputs.values()), [leaves[name].grad for name in outputs])
    return loss.detach(), scalars


@pytest.mark.parametrize("term", TERMS)
def test_the_loss_is_the_cross_entropy_plus_the_consistency(term):
    settings = dataclasses.replace(SETTINGS, consistency=term, rampup_steps=8)
    training, batch = objective(settings), batches()[3]
    labelled, weak, strong = (
        training.student.model(training.student.prepare(batch[name])) for name in ("image", "weak", "strong")
    )
    confident = [max(softmax(row)) >= 0.5 for row in weak.tolist()]
    assert 0 < sum(confident) < N * MU
    value = naive(strong, weak, torch.tensor(confident), None, settings)
    loss, scalars = update(training, batch)
    expected = F.cross_entropy(labelled, batch["label"]) + 3 / 8 * 0.7 * value
    assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert scalars["mask_rate"].item() == pytest.approx(sum(confident) / (N * MU))
    assert scalars["consistency"].item() == pytest.approx(value, rel=1e-5)
    whole = F.cross_entropy(labelled, batch["label"]) + 3 / 8 * 0.7 * consistency_loss(
        strong=strong, weak=weak, mask=torch.tensor(confident), prior=None, settings=settings
    )
    gradients = torch.autograd.grad(whole, list(training.student.model.parameters()))
    for parameter, gradient in zip(training.student.model.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_weak_branch_and_the_average_have_no_gradient_and_hidden_labels_no_effect():
    settings = dataclasses.replace(SETTINGS, method="mean-teacher", consistency="gkl", class_prior=True)
    training, batch = objective(settings, norm=True, decay=0.9), batches()[0]
    before = copy.deepcopy(training.average.state_dict())
    prepared = training.prepare(batch)
    assert not prepared["weak"].requires_grad and not prepared["prior"].requires_grad
    loss, _ = update(training, batch)
    assert all(parameter.grad is None for parameter in training.average.parameters())
    for name, tensor in training.average.state_dict().items():  # nor do its statistics of BatchNorm change
        assert torch.equal(tensor, before[name]), name
    other, _ = update(objective(settings, norm=True, decay=0.9), batch | {"hidden_label": torch.zeros(N * MU).long()})
    assert torch.equal(loss, other)


def test_mean_teachers_teacher_equals_the_average_in_closed_form():
    """After k updates: w_1 d^(k-1) + (1 - d) sum_i w_i d^(k-i), of weights and of BatchNorm's statistics."""
    decay, settings = 0.8, dataclasses.replace(SETTINGS, method="mean-teacher", consistency="mse", threshold=0)
    training = objective(settings, norm=True, decay=decay)
    model, states = training.student.model, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches():
        if states:
            k = len(states)
            powers = [decay ** (k - 1), *((1 - decay) * decay ** (k - i) for i in range(2, k + 1))]
            teacher = classifier(norm=True).model.eval()
            teacher.load_state_dict(
                {
                    name: sum(p * state[name] for p, state in zip(powers, states, strict=True))
                    if tensor.is_floating_point()
                    else tensor
                    for name, tensor in states[-1].items()
                }
            )
            with torch.no_grad():
                expected = teacher(training.student.prepare(batch["weak"]))
            assert_close(training.prepare(batch)["weak"], expected, rtol=1e-4, atol=1e-5)
        update(training, batch)
        optimizer.step()
        training.average.update_parameters(model)
        states.append(copy.deepcopy(model.state_dict()))


def test_fixmatch_predicts_weak_views_in_training_mode_also_after_an_evaluation():
    training, batch = objective(norm=True), batches()[0]
    reference = copy.deepcopy(training.student.model).train()
    with torch.no_grad():
        expected = reference(training.student.prepare(batch["weak"]))
    training.student.model.eval()
    assert_close(training.prepare(batch)["weak"], expected)


def test_supervised_training_uses_labelled_images_alone():
    training = objective(dataclasses.replace(SETTINGS, method="supervised"))
    batch = {name: x for name, x in batches()[0].items() if name in ("image", "label", "keys", "step")}
    logits = training.student.model(training.student.prepare(batch["image"]))
    loss, scalars = update(training, batch)
    assert_close(loss, F.cross_entropy(logits, batch["label"]).detach())
    assert set(scalars) == {"ce", "batch_acc1"}


def test_the_prior_is_the_mean_softmax_of_confident_images_in_the_pass_before():
    settings = dataclasses.replace(SETTINGS, class_prior=True)
    training, sums = objective(settings), torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    given = batches(4)
    for batch in given[:2]:  # the first pass
        prepared = training.prepare(batch)
        assert_close(prepared["prior"], torch.full((N * MU, CLASSES), 1 / CLASSES))
        for row in prepared["weak"].double().softmax(dim=1):
            if row.max() >= 0.5:
                sums[row.argmax()] += row
    assert 0 < sums.sum() < 2 * N * MU
    expected = torch.stack([row / row.sum() if row.sum() else torch.full((CLASSES,), 1 / CLASSES) for row in sums])
    prepared = training.prepare(given[2])
    assert_close(prepared["prior"], expected.float()[prepared["weak"].argmax(dim=1)])


METHODS = [("fixmatch", "gkl"), ("flexmatch", "hard"), ("mean-teacher", "ikl")]


def trained(settings: SemiSupervised, rank: int, world_size: int, given: list[dict]) -> tuple:
    """Losses, last scalars, weights and state after an update on each batch."""
    training = objective(settings, decay=0.7 if settings.method == "mean-teacher" else 0.0)
    model, losses, scalars = training.student.model, [], {}
    for batch in given:
        own = {}
        for name, value in batch.items():
            rows = N * MU if name in ("weak", "strong", "unlabelled_index", "hidden_label") else N
            part = slice(rank * rows // world_size, (rank + 1) * rows // world_size)
            own[name] = value if isinstance(value, int) else value[part]
        loss, scalars = update(training, own)
        for parameter in model.parameters():
            if world_size > 1:
                torch.distributed.all_reduce(parameter.grad)
            parameter.data -= 0.5 * parameter.grad / world_size
        if training.average is not None:
            training.average.update_parameters(model)
        losses.append(loss)
    state = {name: tensor.clone() for name, tensor in training.state().items()}
    return losses, scalars, [p.detach() for p in model.parameters()], state


def of_rank(rank: int, world_size: int, settings: SemiSupervised, given: list[dict]) -> tuple:
    return trained(settings, rank, world_size, given)


@pytest.mark.parametrize("method, term", METHODS)
def test_two_processes_equal_one_on_the_joined_data(method, term):
    """Losses, scalars, weights, thresholds, and the prior after a pass."""
    settings = dataclasses.replace(SETTINGS, method=method, consistency=term, class_prior=term != "hard")
    given = batches(5)
    losses, scalars, weights, state = trained(settings, 0, 1, given)
    for result in run_ranks(of_rank, 2, settings, given):
        assert_close(result[0], losses, rtol=1e-5, atol=1e-6)
        assert_close(result[1], scalars, rtol=1e-5, atol=1e-6)
        # Five updates at rate 0.5 from sums in another order. Gradients that are not averaged give 0.7 and more.
        assert_close(result[2], weights, rtol=1e-5, atol=1e-5)
        for name in ("last_pseudo_label", "prior"):
            if name in state:
                assert_close(result[3][name], state[name])


@pytest.mark.parametrize("method, term", METHODS)
def test_a_loaded_state_continues_exactly(method, term):
    settings = dataclasses.replace(SETTINGS, method=method, consistency=term, class_prior=True)
    first, second = objective(settings), objective(settings)
    given = batches(4)
    for batch in given[:3]:
        first.prepare(batch)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for name in ("mask", "prior"):
        assert torch.equal(first.prepare(given[3])[name], second.prepare(given[3])[name])
