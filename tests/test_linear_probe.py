"""A linear probe equals scikit-learn's logistic regression; its regularisation is chosen on a part of the training set,
drawn by seed, and depends on no other image."""

import math

import pytest
import torch
import torch.nn.functional as F

from gkl_vl.errors import UserError
from gkl_vl.evaluation import linear_probe
from gkl_vl.evaluation.linear_probe import LinearClassifier, few_shot, fit, probe, split


def blobs(n: int, d: int, classes: int, *, noise: float = 0.6, seed: int = 0, dtype=torch.float64):
    """Unit vectors around a centre for each class, and their labels; every class occurs if n >= classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64))
    labels = torch.arange(n) % classes
    features = centres[labels] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=1).to(dtype), labels


def objective(fitted: LinearClassifier, features, targets, c) -> torch.Tensor:
    """The objective in the docstring of `fit`, image by image."""
    total = fitted.weight.double().square().sum() / (2 * c)
    for x, target in zip(features.double(), targets, strict=True):
        logits = fitted.weight.double() @ x + fitted.bias.double()
        if targets.ndim == 1:
            total = total - logits.log_softmax(0)[target]
        else:
            total = total - (target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum()
    return total


@pytest.mark.parametrize("c", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("n", "d", "classes"), [(3, 2, 2), (41, 7, 3), (20, 50, 4)])
def test_no_step_in_any_direction_lowers_the_objective(n, d, classes, c):
    features, labels = blobs(n, d, classes)
    fitted = fit(features=features, targets=labels, num_classes=classes, c=c)
    fitted.weight.requires_grad_()
    fitted.bias.requires_grad_()
    objective(fitted, features, labels, c).backward()
    assert fitted.weight.grad is not None and fitted.bias.grad is not None
    gradient = torch.cat([fitted.weight.grad, fitted.bias.grad[:, None]], dim=1)
    assert gradient.norm() <= 1.01e-4 * fitted.weight.norm() / c  # the tolerance of `fit`, summed in another order


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
def test_the_weights_are_within_the_tolerance_of_the_optimum(c):
    features, labels = blobs(41, 7, 3)
    fitted = fit(features=features, targets=labels, num_classes=3, c=c)
    exact = newton(features, labels, 3, c)
    assert (fitted.weight - exact.weight).norm() <= 1e-4 * exact.weight.norm()
    torch.testing.assert_close(fitted.bias, exact.bias, rtol=1e-3, atol=1e-5)  # the tolerance does not bound the bias


def newton(features, labels, classes: int, c: float) -> LinearClassifier:
    """Damped Newton steps with the full Hessian, until the gradient is 0."""
    d = features.shape[1]

    def value(flat):
        weight, bias = flat[: classes * d].view(classes, d), flat[classes * d :]
        each = F.cross_entropy(features @ weight.T + bias, labels, reduction="sum")
        return each + weight.square().sum() / (2 * c) + bias.sum() ** 2  # selects the shift whose sum is 0

    flat = torch.zeros(classes * (d + 1), dtype=torch.float64)
    for _ in range(100):
        gradient = torch.autograd.functional.jacobian(value, flat)
        hessian = torch.autograd.functional.hessian(value, flat)
        if gradient.norm() < 1e-10:
            break
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while value(flat - size * step) > value(flat) and size > 1e-6:
            size /= 2
        flat = flat - size * step
    assert gradient.norm() < 1e-8
    return LinearClassifier(flat[: classes * d].view(classes, d), flat[classes * d :])


@pytest.mark.parametrize("c", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_it_equals_scikit_learns_regression(classes, c):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(60, 9, classes)
    theirs = linear_model.LogisticRegression(C=2 * c if classes == 2 else c, tol=1e-10, max_iter=10_000)
    theirs.fit(features.numpy(), labels.numpy())
    ours = fit(features=features, targets=labels, num_classes=classes, c=c, tolerance=1e-7)
    expected = torch.from_numpy(theirs.predict_proba(features.numpy()))
    # scikit-learn stops at a relative change of the loss of 1e-14, which is about 1e-7 of the weights
    torch.testing.assert_close(ours.logits(features).softmax(dim=1), expected, rtol=0, atol=2e-6)
    weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    if classes == 2:  # one weight vector, the difference of ours
        parameters = ours.weight[1:] - ours.weight[:1], ours.bias[1:] - ours.bias[:1]
    else:
        parameters = ours.weight, ours.bias
    torch.testing.assert_close(parameters, (weight, bias), rtol=2e-5, atol=2e-5)


def test_multilabel_targets_are_one_regression_per_class():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, _ = blobs(50, 6, 3)
    targets = (features[:, :3] > 0).long()
    ours = fit(features=features, targets=targets, num_classes=3, c=2.0, tolerance=1e-10)
    for number in range(3):
        theirs = linear_model.LogisticRegression(C=2.0, tol=1e-10, max_iter=10_000)
        theirs.fit(features.numpy(), targets[:, number].numpy())
        torch.testing.assert_close(ours.weight[number], torch.from_numpy(theirs.coef_[0]), rtol=1e-3, atol=1e-4)


def test_a_class_without_images_is_never_predicted_and_changes_no_other():
    features, labels = blobs(30, 5, 3)
    alone = fit(features=features, targets=labels, num_classes=3, c=10.0)
    fitted = fit(features=features, targets=labels * 2, num_classes=5, c=10.0)  # classes 0, 2, 4 of 5
    assert torch.equal(fitted.bias[[1, 3]], torch.full((2,), -math.inf)) and not fitted.weight[[1, 3]].any()
    torch.testing.assert_close(fitted.logits(features)[:, ::2], alone.logits(features), rtol=0, atol=1e-3)
    again = fit(features=features, targets=labels * 2, num_classes=5, c=10.0, start=fitted)
    torch.testing.assert_close(again.weight, fitted.weight)


def test_a_label_that_no_image_has_or_all_have_gets_probability_0_or_1():
    features, _ = blobs(30, 5, 3)
    targets = torch.stack([(features[:, 0] > 0).long(), torch.zeros(30).long(), torch.ones(30).long()], dim=1)
    fitted = fit(features=features, targets=targets, num_classes=3, c=10.0)
    assert fitted.logits(features).sigmoid()[:, 1:].unique(dim=0).tolist() == [[0.0, 1.0]]
    alone = fit(features=features, targets=targets[:, :1], num_classes=1, c=10.0)
    torch.testing.assert_close(fitted.logits(features)[:, :1], alone.logits(features), rtol=0, atol=1e-3)


def test_tiles_change_only_the_memory(monkeypatch):
    features, labels = blobs(41, 7, 3)
    whole = fit(features=features, targets=labels, num_classes=3, c=10.0, tolerance=1e-8)
    monkeypatch.setattr(linear_probe, "TILE", 8)
    tiled = fit(features=features, targets=labels, num_classes=3, c=10.0, tolerance=1e-8)
    torch.testing.assert_close(tiled.weight, whole.weight, rtol=1e-6, atol=1e-6)  # twice the tolerance, and rounding


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.3)])
def test_precision(dtype, tolerance):
    # All are solved in fp64: fp32 features and weights are rounded to 7 digits, bf16 features to 3, and each fit is
    # within 1e-4 of the optimum.
    features, labels = blobs(60, 8, 3)
    exact = fit(features=features, targets=labels, num_classes=3, c=1.0)
    fitted = fit(features=features.to(dtype), targets=labels, num_classes=3, c=1.0)
    assert fitted.weight.dtype == torch.float32
    torch.testing.assert_close(fitted.logits(features).double(), exact.logits(features), rtol=0, atol=tolerance)


def test_the_start_does_not_change_the_solution():
    features, labels = blobs(60, 8, 3)
    cold = fit(features=features, targets=labels, num_classes=3, c=10.0, tolerance=1e-10)
    near = fit(features=features, targets=labels, num_classes=3, c=1.0)
    warm = fit(features=features, targets=labels, num_classes=3, c=10.0, start=near, tolerance=1e-10)
    # compares the softmax, because it does not change with a shift of all biases
    torch.testing.assert_close(warm.logits(features).softmax(1), cold.logits(features).softmax(1), rtol=0, atol=1e-5)


def test_every_class_with_two_images_is_in_both_parts_of_the_split():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] + [3] * 5)
    kept, held = split(labels, share=0.2, seed=0)
    assert torch.bincount(labels[held], minlength=4).tolist() == [2, 1, 0, 1]
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(18))
    assert torch.equal(split(labels, share=0.2, seed=0)[1], held)
    assert any(not torch.equal(split(labels, share=0.2, seed=seed)[1], held) for seed in range(1, 5))
    several = torch.zeros(20, 3)
    assert len(split(several, share=0.25, seed=0)[1]) == 5


def test_few_shot_draws_the_given_number_of_each_class_by_seed():
    labels = torch.tensor([0, 1, 2] * 20)[torch.randperm(60)]
    chosen = few_shot(labels, shots=4, seed=1)
    assert torch.bincount(labels[chosen]).tolist() == [4, 4, 4] and len(chosen.unique()) == 12
    assert torch.equal(chosen, few_shot(labels, shots=4, seed=1))
    assert not torch.equal(chosen, few_shot(labels, shots=4, seed=2))
    with pytest.raises(UserError, match="21 shots: class 0 has 20 images: lower --fewshot_k"):
        few_shot(labels, shots=21, seed=0)


def test_images_beyond_the_shots_are_not_used():
    features, labels = blobs(90, 6, 3)
    fitted = probe(features=features, targets=labels, num_classes=3, shots=4, seed=0)
    chosen = few_shot(labels, shots=4, seed=0)
    poisoned = 1e6 * torch.ones_like(features)
    poisoned[chosen] = features[chosen]
    again = probe(features=poisoned, targets=labels, num_classes=3, shots=4, seed=0)
    assert torch.equal(fitted.classifier.weight, again.classifier.weight) and fitted.c == again.c
    assert not torch.equal(fitted.classifier.weight, probe(
        features=features, targets=labels, num_classes=3, shots=4, seed=1
    ).classifier.weight)  # fmt: skip


def test_the_best_c_on_the_held_out_part_is_used_for_all_images():
    features, labels = blobs(200, 20, 4, noise=0.4)
    # The classes differ in small features, which strong regularisation suppresses.
    features[:, 1:] = 0.02 * features[:, 1:]
    fitted = probe(features=features, targets=labels, num_classes=4, seed=3)
    assert fitted.c > 1
    kept, held = split(labels, share=0.2, seed=3)

    def score(c: float) -> float:
        fitted = fit(features=features[kept], targets=labels[kept], num_classes=4, c=c, tolerance=1e-10)
        return (fitted.logits(features[held]).argmax(1) == labels[held]).double().mean().item()

    # c is chosen with fits that stop early: the predictions of one or two of the 40 images may differ
    assert abs(fitted.validation - score(fitted.c)) <= 2 / len(held)
    assert all(score(10.0**exponent) <= fitted.validation + 2 / len(held) for exponent in linear_probe.COARSE)
    whole = fit(features=features, targets=labels, num_classes=4, c=fitted.c)
    torch.testing.assert_close(fitted.classifier.logits(features), whole.logits(features), rtol=0, atol=1e-6)
    assert 1e-6 <= fitted.c <= 1e6


@pytest.mark.parametrize("away", [0.01, 100.0])
def test_each_c_is_scored_with_its_own_classifier_not_with_the_start(away):
    # Separable classes: the gradient is small from the start. With an absolute tolerance the solver would stop at once,
    # and the search would score the same classifier for every c.
    features, labels = blobs(600, 8, 3, noise=0.2)
    exact = fit(features=features, targets=labels, num_classes=3, c=1e4)
    start = fit(features=features, targets=labels, num_classes=3, c=1e4 * away)
    fitted = fit(features=features, targets=labels, num_classes=3, c=1e4, start=start, tolerance=linear_probe.ROUGHLY)
    assert (start.weight - exact.weight).norm() > 0.2 * exact.weight.norm()
    assert (fitted.weight - exact.weight).norm() < 0.1 * exact.weight.norm()


def test_of_equally_good_values_the_most_regularised_is_chosen(monkeypatch):
    monkeypatch.setattr(linear_probe, "top_k_accuracy", lambda logits, labels, k: 0.5)
    features, labels = blobs(20, 3, 2)
    assert probe(features=features, targets=labels, num_classes=2).c == pytest.approx(1e-6)


def test_with_one_shot_c_is_1():
    features, labels = blobs(20, 5, 4)
    fitted = probe(features=features, targets=labels, num_classes=4, shots=1)
    assert fitted.c == 1 and math.isnan(fitted.validation)


def test_separable_classes_are_separated():
    features, labels = blobs(200, 16, 5, noise=0.15)
    fitted = probe(features=features[:100], targets=labels[:100], num_classes=5)
    assert (fitted.classifier.logits(features[100:]).argmax(1) == labels[100:]).double().mean() > 0.98


def test_user_errors_are_one_line():
    features, labels = blobs(12, 4, 3)
    for change, message in (
        (dict(num_classes=2), "the label 2, but there are 2 classes"),
        (dict(features=features * math.nan), "not finite"),
        (dict(targets=torch.zeros(12, dtype=torch.int64)), "12 training images of 1 class"),
        (dict(features=features[:0], targets=labels[:0]), "0 training images of 0 class"),
        (dict(shots=0), "0 shots"),
        (dict(shots=2, targets=torch.zeros(12, 3)), "2 shots"),
        (dict(features=features[:1], targets=torch.zeros(1, 3)), "1 training images"),
    ):
        with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
            probe(**(dict(features=features, targets=labels, num_classes=3) | change))  # type: ignore[arg-type]
