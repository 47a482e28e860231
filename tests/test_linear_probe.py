"""A linear probe is the logistic regression that scikit-learn finds; its regularisation is chosen on a part of the
training set that is drawn by the seed, and no other image has a say."""

import math

import pytest
import torch
import torch.nn.functional as F

from gkl_vl import linear_probe
from gkl_vl.errors import UserError
from gkl_vl.linear_probe import LinearClassifier, few_shot, fit, probe, split


def blobs(n: int, d: int, classes: int, *, noise: float = 0.6, seed: int = 0, dtype=torch.float64):
    """Unit vectors around a centre for each class, and their labels; every class occurs if n allows."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64))
    labels = torch.arange(n) % classes
    features = centres[labels] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=1).to(dtype), labels


def objective(found: LinearClassifier, features, targets, c) -> torch.Tensor:
    """As the docstring has it, image by image."""
    total = found.weight.double().square().sum() / (2 * c)
    for x, target in zip(features.double(), targets, strict=True):
        logits = found.weight.double() @ x + found.bias.double()
        if targets.ndim == 1:
            total = total - logits.log_softmax(0)[target]
        else:
            total = total - (target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum()
    return total


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("n", "d", "classes"), [(4, 2, 2), (41, 7, 3), (20, 50, 4)])
def test_no_step_in_any_direction_lowers_the_objective(n, d, classes, c):
    features, labels = blobs(n, d, classes)
    found = fit(features=features, targets=labels, num_classes=classes, c=c, tolerance=1e-10)
    found.weight.requires_grad_()
    found.bias.requires_grad_()
    objective(found, features, labels, c).backward()
    assert found.weight.grad is not None and found.bias.grad is not None
    # the mean's gradient is solved to 1e-10; where c is large the last steps are lost in the line search
    assert max(found.weight.grad.abs().max(), found.bias.grad.abs().max()) < 1e-6 * n


@pytest.mark.parametrize("c", [1e-2, 1.0, 100.0])
def test_it_is_scikit_learns(c):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(60, 9, 4)
    theirs = linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(features.numpy(), labels.numpy())
    ours = fit(features=features, targets=labels, num_classes=4, c=c, tolerance=1e-10)
    expected = torch.from_numpy(theirs.predict_proba(features.numpy()))
    torch.testing.assert_close(ours.logits(features).softmax(dim=1), expected, rtol=0, atol=2e-5)  # of two solvers
    torch.testing.assert_close(ours.weight, torch.from_numpy(theirs.coef_), rtol=2e-3, atol=2e-4)


def test_several_labels_are_a_regression_for_each_class():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, _ = blobs(50, 6, 3)
    targets = (features[:, :3] > 0).long()
    ours = fit(features=features, targets=targets, num_classes=3, c=2.0, tolerance=1e-10)
    for number in range(3):
        theirs = linear_model.LogisticRegression(C=2.0, tol=1e-10, max_iter=10_000)
        theirs.fit(features.numpy(), targets[:, number].numpy())
        torch.testing.assert_close(ours.weight[number], torch.from_numpy(theirs.coef_[0]), rtol=1e-3, atol=1e-4)


def test_a_class_without_images_is_never_the_answer():
    features, labels = blobs(30, 5, 3)
    labels = labels * 2  # classes 0, 2, 4 of 5
    found = fit(features=features, targets=labels, num_classes=5, c=10.0)
    assert set(found.logits(features).argmax(dim=1).tolist()) <= {0, 2, 4}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
def test_precision(dtype, tolerance):
    # fp32 solves to 1e-7 of the mean; bf16 features are other features, by 3 digits, and are solved in fp32.
    features, labels = blobs(60, 8, 3)
    exact = fit(features=features, targets=labels, num_classes=3, c=1.0)
    found = fit(features=features.to(dtype), targets=labels, num_classes=3, c=1.0)
    assert found.weight.dtype == torch.float32
    torch.testing.assert_close(found.logits(features).double(), exact.logits(features), rtol=0, atol=tolerance)


def test_where_it_begins_changes_the_way_and_not_the_end():
    features, labels = blobs(60, 8, 3)
    cold = fit(features=features, targets=labels, num_classes=3, c=10.0, tolerance=1e-10)
    near = fit(features=features, targets=labels, num_classes=3, c=1.0)
    warm = fit(features=features, targets=labels, num_classes=3, c=10.0, start=near, tolerance=1e-10)
    # the softmax is the same for a shift that all classes share, and the bias is free to take it
    torch.testing.assert_close(warm.logits(features).softmax(1), cold.logits(features).softmax(1), rtol=0, atol=1e-5)


# ---- which images have a say


def test_every_class_is_on_both_sides_of_the_split_where_it_can_be():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] + [3] * 5)
    kept, held = split(labels, share=0.2, seed=0)
    assert torch.bincount(labels[held], minlength=4).tolist() == [2, 1, 0, 1]
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(18))
    assert torch.equal(split(labels, share=0.2, seed=0)[1], held)
    assert any(not torch.equal(split(labels, share=0.2, seed=seed)[1], held) for seed in range(1, 5))
    several = torch.zeros(20, 3)
    assert len(split(several, share=0.25, seed=0)[1]) == 5


def test_shots_are_so_many_of_each_class_drawn_by_the_seed():
    labels = torch.tensor([0, 1, 2] * 20)[torch.randperm(60)]
    chosen = few_shot(labels, shots=4, seed=1)
    assert torch.bincount(labels[chosen]).tolist() == [4, 4, 4] and len(chosen.unique()) == 12
    assert torch.equal(chosen, few_shot(labels, shots=4, seed=1))
    assert not torch.equal(chosen, few_shot(labels, shots=4, seed=2))
    with pytest.raises(UserError, match="21 shots: class 0 has 20 images"):
        few_shot(labels, shots=21, seed=0)


def test_images_beyond_the_shots_have_no_say():
    features, labels = blobs(90, 6, 3)
    found = probe(features=features, targets=labels, num_classes=3, shots=4, seed=0)
    chosen = few_shot(labels, shots=4, seed=0)
    poisoned = 1e6 * torch.ones_like(features)
    poisoned[chosen] = features[chosen]
    again = probe(features=poisoned, targets=labels, num_classes=3, shots=4, seed=0)
    assert torch.equal(found.classifier.weight, again.classifier.weight) and found.c == again.c
    assert not torch.equal(found.classifier.weight, probe(
        features=features, targets=labels, num_classes=3, shots=4, seed=1
    ).classifier.weight)  # fmt: skip


def test_the_best_c_of_the_held_out_part_is_taken_and_fitted_to_all():
    features, labels = blobs(200, 20, 4, noise=0.4)
    features[:, 1:] = 0.02 * features[:, 1:]  # what tells them apart is small: much regularisation loses it
    found = probe(features=features, targets=labels, num_classes=4, seed=3)
    assert found.c > 1
    kept, held = split(labels, share=0.2, seed=3)

    def score(c: float) -> float:
        fitted = fit(features=features[kept], targets=labels[kept], num_classes=4, c=c, tolerance=1e-10)
        return (fitted.logits(features[held]).argmax(1) == labels[held]).double().mean().item()

    # c is chosen by fits that stop early: an image or two of the 40 may fall on the other side
    assert abs(found.validation - score(found.c)) <= 2 / len(held)
    assert all(score(10.0**exponent) <= found.validation + 2 / len(held) for exponent in linear_probe.COARSE)
    whole = fit(features=features, targets=labels, num_classes=4, c=found.c)
    torch.testing.assert_close(found.classifier.logits(features), whole.logits(features), rtol=0, atol=1e-6)
    assert 1e-6 <= found.c <= 1e6


def test_of_equally_good_ones_the_most_regularised_is_taken(monkeypatch):
    monkeypatch.setattr(linear_probe, "top_k_accuracy", lambda logits, labels, k: 0.5)
    features, labels = blobs(20, 3, 2)
    assert probe(features=features, targets=labels, num_classes=2).c == pytest.approx(1e-6)


def test_one_shot_leaves_nothing_to_choose_on():
    features, labels = blobs(20, 5, 4)
    found = probe(features=features, targets=labels, num_classes=4, shots=1)
    assert found.c == 1 and math.isnan(found.validation)


def test_classes_that_lie_apart_are_told_apart():
    features, labels = blobs(200, 16, 5, noise=0.15)
    found = probe(features=features[:100], targets=labels[:100], num_classes=5)
    assert (found.classifier.logits(features[100:]).argmax(1) == labels[100:]).double().mean() > 0.98


def test_mistakes_are_one_line():
    features, labels = blobs(12, 4, 3)
    for change, told in (
        (dict(num_classes=2), "the label 2, but there are 2 classes"),
        (dict(features=features * math.nan), "not finite"),
        (dict(targets=torch.zeros(12, dtype=torch.int64)), "12 training images of 1 class"),
        (dict(features=features[:0], targets=labels[:0]), "0 training images of 0 class"),
        (dict(shots=0), "0 shots"),
        (dict(shots=2, targets=torch.zeros(12, 3)), "2 shots"),
        (dict(features=features[:1], targets=torch.zeros(1, 3)), "1 training images"),
    ):
        with pytest.raises(UserError, match=f"^[^\n]*{told}[^\n]*$"):
            probe(**(dict(features=features, targets=labels, num_classes=3) | change))  # type: ignore[arg-type]
