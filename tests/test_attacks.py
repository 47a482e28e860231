"""Attacks stay in their ball to the last bit, raise their loss, and leave the model unchanged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from gkl_vl.errors import UserError
from gkl_vl.robustness.pgd import pgd, radius, weights_perturbed

NORMS = ["linf", "l2"]


def net() -> torch.nn.Sequential:
    """With BatchNorm and dropout, in training mode."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(0.5)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4 * 9, 5))


def batch(n=6, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, 5, 5, generator=draw)
    images[0, 0], images[0, 1] = 0, 1  # at the border of the cube
    return images, torch.arange(n) % 5


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def largest_distance(attacked, images, norm) -> float:
    """The largest distance of an image, computed in float64 from the stored values."""
    difference = (attacked.double() - images.double()).flatten(1)
    return (difference.abs().amax() if norm == "linf" else difference.norm(dim=1).max()).item()


@settings(max_examples=40, deadline=None)
@given(
    epsilon=st.floats(0, 0.6),
    step=st.floats(0, 1),
    steps=st.integers(0, 3),
    norm=st.sampled_from(NORMS),
    start=st.sampled_from(["gaussian", "uniform", "none"]),
)
def test_attacked_images_stay_in_the_ball_and_in_the_cube_to_the_last_bit(epsilon, step, steps, norm, start):
    images, labels = batch()
    options = {"epsilon": epsilon, "step_size": step, "steps": steps, "norm": norm, "start": start}
    attacked = pgd(net(), images, loss=lambda y: F.cross_entropy(y, labels), generator=generator(), **options)
    # epsilon as float32, the precision that a caller can compare in
    assert largest_distance(attacked, images, norm) <= (torch.tensor(epsilon).item() if norm == "linf" else epsilon)
    assert 0 <= attacked.min() and attacked.max() <= 1
    assert not attacked.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_is_the_loop_of_the_papers(norm):
    model, (images, labels) = net().eval(), batch()
    noise = 0.001 * torch.randn(images.shape, generator=generator())
    x = (images + noise).clamp(0, 1)
    for _ in range(3):
        x.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
        moved = []
        for image, current, gradient in zip(images, x.detach(), g, strict=True):
            if norm == "linf":
                current = current + 0.02 * gradient.sign()
                delta = (current - image).clamp(-0.05, 0.05)
            else:
                delta = current + 0.02 * gradient / gradient.norm() - image
                delta = delta * min(1, 0.05 / delta.norm().item())
            moved.append((image + delta).clamp(0, 1))
        x = torch.stack(moved)
    options = {"epsilon": 0.05, "step_size": 0.02, "steps": 3, "norm": norm, "generator": generator()}
    attacked = pgd(net(), images, loss=lambda y: F.cross_entropy(y, labels), **options)
    torch.testing.assert_close(attacked, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_rises(norm):
    model, (images, labels) = net(), batch()
    attacked = pgd(
        model, images, loss=lambda y: F.cross_entropy(y, labels), epsilon=0.1, step_size=0.03, steps=5, norm=norm
    )
    model.eval()
    before, after = (F.cross_entropy(model(x), labels).item() for x in (images, attacked))
    assert after > before + 0.01


def test_the_model_is_unchanged():
    model, (images, labels) = net(), batch()
    model[1].eval()  # a frozen BatchNorm within a model in training
    model(images).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    seen = []
    pgd(
        model,
        images,
        loss=lambda y: seen.append(model[3].training) or F.cross_entropy(y, labels),
        epsilon=0.1,
        step_size=0.1,
        steps=2,
    )
    assert seen == [False, False]  # runs in evaluation mode
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_mode_is_restored_after_an_error():
    model, (images, _) = net(), batch()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pgd(model, images[..., :4], loss=lambda y: y.sum(), epsilon=0.1, step_size=0.1, steps=1)
    assert model.training


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_of_zero_moves_nothing_and_gives_no_nan(norm):
    images, _ = batch()
    options = {"epsilon": 0.1, "step_size": 0.1, "steps": 2, "norm": norm, "start": "none"}
    attacked = pgd(net(), images, loss=lambda y: 0 * y.sum(), **options)
    assert torch.equal(attacked, images)


@pytest.mark.parametrize(
    "images, options, message",
    [
        (torch.full((1, 3, 5, 5), 1.5), {}, r"images must lie in \[0, 1\], got 1.5 to 1.5"),
        (torch.zeros(1, 3, 5, 5), {"epsilon": -1}, "epsilon must be at least 0, got -1"),
        (torch.zeros(1, 3, 5, 5), {"steps": -1}, "steps must be at least 0, got -1"),
    ],
)
def test_invalid_arguments_are_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        pgd(net(), images, loss=lambda y: y.sum(), **({"epsilon": 0.1, "step_size": 0.1, "steps": 1} | options))


# ---- weights -----------------------------------------------------------------------------------------------------


def test_weights_move_by_a_share_of_their_norm_and_are_restored_to_the_bit():
    model, (images, labels) = net(), batch()
    model.eval()

    def loss():
        return F.cross_entropy(model(images), labels)

    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss(), list(model.parameters())), strict=True)
    )
    before, low = copy.deepcopy(model.state_dict()), loss().item()
    with weights_perturbed(model, loss=loss, gamma=0.01):
        for name, moved in model.named_parameters():
            w, g = before[name], gradients[name]
            expected = w + 0.01 * w.norm() * g / g.norm() if w.ndim >= 2 else w
            torch.testing.assert_close(moved.detach(), expected)
        high = loss()
        high.backward()
    assert high.item() > low
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # the gradient is taken at the moved weights
    assert not torch.allclose(model[0].weight.grad, gradients["0.weight"])


def test_batchnorm_statistics_are_restored():
    model, (images, labels) = net(), batch()
    before = copy.deepcopy(dict(model.named_buffers()))
    with weights_perturbed(model, loss=lambda: F.cross_entropy(model(images), labels), gamma=0.1):
        pass
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_weights_are_restored_after_an_error():
    model, (images, labels) = net(), batch()
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(ZeroDivisionError),
        weights_perturbed(model, loss=lambda: F.cross_entropy(model(images), labels), gamma=0.1),
    ):
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "running" not in name)


def moved_weights(rank, world_size):
    model, (images, labels) = net().eval(), batch()
    own = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    with weights_perturbed(model, loss=lambda: F.cross_entropy(model(images[own]), labels[own]), gamma=0.1):
        return [p.detach().clone() for p in model.parameters()]


def test_two_processes_move_the_weights_as_one():
    one = moved_weights(0, 1)
    for weights in run_ranks(moved_weights, 2):
        for got, want in zip(weights, one, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_is_a_fraction_or_a_number(norm):
    values = [radius(text, norm) for text in ("8/255", "0.5", "1e-2", " 4 / 255 ")]
    assert values == [8 / 255, 0.5, 0.01, 4 / 255]
    for text in ("eight", "8/0", "8/255/1", "", "/255", "nan", "inf", "0", "-1/255"):
        with pytest.raises(UserError, match="write 8/255 or 0.03"):
            radius(text, norm)


def test_a_radius_in_linf_is_at_most_1():
    with pytest.raises(UserError, match="an epsilon of 8 is no radius in linf"):
        radius("8", "linf")
    assert radius("8", "l2") == 8
