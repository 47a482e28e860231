"""Who decays, and how the rate goes."""

import math
from functools import partial

import pytest
import torch

from gkl_vl.optim import multi_step, parameter_groups, sgd, warmup_cosine


def test_the_schedule_warms_up_and_falls_to_zero():
    rate = partial(warmup_cosine, lr=2.0, steps=10, warmup_steps=4)
    assert [rate(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0
    assert rate(7) == pytest.approx(1.0)
    assert rate(9) == pytest.approx(1 + math.cos(5 / 6 * math.pi))
    assert rate(10) == pytest.approx(0)


def test_biases_norms_and_the_scale_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    model[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert sorted(p.ndim for p in plain["params"]) == [0, 1, 1, 1, 1]


def test_sgd_decays_everything_that_is_trained():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    (group,) = sgd(model, lr=0.1, wd=0.5).param_groups
    assert [p.shape for p in group["params"]] == [(2, 3)]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.5)


def test_milestones_take_a_tenth_each():
    rates = [multi_step(step, lr=1.0, milestones=(2, 3)) for step in range(5)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.01])
