"""Adversarial training: the schedule of attacks, the whole step against the released procedure, several processes."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import run_ranks
from torch import Tensor

from gkl_vl.losses.gkl import GklSettings, gkl_loss, kl_loss
from gkl_vl.models.classifiers import OnPixels
from gkl_vl.objectives import adversarial
from gkl_vl.objectives.adversarial import (
    Adversarial,
    AdversarialTraining,
    MultiBatch,
    attack_loss,
    robust_loss,
    strength,
)
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.robustness import pgd
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import sgd

N, C = 6, 4
pytestmark = pytest.mark.usefixtures("one_thread")
GKL = GklSettings(soft_ce_weight=4, wmse_weight=20, gamma=0.4, weight_temperature=2.0)
SETTINGS = AdversarialTraining(epochs=4, gkl=GKL, awp_epoch=2, label_smoothing=0.1)
EIGHT = 8 / 255


# ---- the schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, epoch, expected",
    [
        ("low", 0, (EIGHT / 200, EIGHT / 200, 2)),
        ("low", 199, (EIGHT, EIGHT, 2)),
        ("high", 0, (EIGHT / 200, EIGHT / 400, 5)),
        ("high", 199, (EIGHT, EIGHT / 2, 5)),
        ("ladder", 49, (EIGHT / 4, EIGHT / 4, 2)),
        ("ladder", 50, (51 / 200 * EIGHT, 2 / 3 * 51 / 200 * EIGHT, 3)),
        ("ladder", 99, (EIGHT / 2, EIGHT / 3, 3)),
        ("ladder", 100, (101 / 200 * EIGHT, 101 / 400 * EIGHT, 4)),
        ("ladder", 149, (0.75 * EIGHT, 0.375 * EIGHT, 4)),
        ("ladder", 150, (151 / 200 * EIGHT, 151 / 400 * EIGHT, 5)),
        ("trades", 0, (EIGHT, EIGHT / 4, 10)),
    ],
)
def test_the_attack_grows_as_published(budget, epoch, expected):
    attack = strength(AdversarialTraining(budget=budget), epoch=epoch)
    assert attack.steps == expected[2] and attack[:2] == pytest.approx(expected[:2], rel=1e-12)


def test_high_equals_the_released_sequence_of_ifs():
    for epoch in range(1, 201):
        for until, steps, share in ((50, 2, 1), (100, 3, 2 / 3), (150, 4, 1 / 2), (200, 5, 1 / 2)):
            if epoch <= until:  # no else, as released
                expected = (steps, share)
        attack = strength(AdversarialTraining(budget="high"), epoch=epoch - 1)
        assert (attack.steps, pytest.approx(attack.step_size / attack.epsilon)) == expected


@pytest.mark.parametrize("method", ["trades", "ikl", "gkl"])
def test_each_method_has_its_losses(method):
    settings = replace(SETTINGS, method=method, attack_wmse_weight=0.5)
    attacked, natural = torch.randn(2, N, C, generator=torch.Generator().manual_seed(0))
    prior = torch.softmax(torch.randn(N, C, generator=torch.Generator().manual_seed(1)), dim=1)
    pair = {"student": attacked, "teacher": natural}
    if method == "trades":
        expected, attack_objective = 6 * kl_loss(**pair), kl_loss(**pair)
    else:
        gamma = 1.0 if method == "ikl" else 0.4
        expected = gkl_loss(**pair, wmse_weight=20, soft_ce_weight=4, gamma=gamma, class_prior=prior)
        attack_objective = gkl_loss(**pair, wmse_weight=0.5, class_prior=prior)
    torch.testing.assert_close(
        robust_loss(attacked=attacked, natural=natural, prior=prior, settings=settings), expected
    )
    torch.testing.assert_close(
        attack_loss(attacked=attacked, natural=natural, prior=prior, settings=settings), attack_objective
    )


# ---- the whole step ----------------------------------------------------------------------------------------------


def net(norm: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5) if norm else torch.nn.Identity(), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(5 * 36, C))


def batches(second: bool) -> list[dict]:
    """Two batches in each of three epochs."""
    draw, batches = torch.Generator().manual_seed(3), []
    for number in range(6):
        image, other = torch.randint(0, 256, (2, N, 3, 8, 8), generator=draw, dtype=torch.uint8)
        batch = {"image": image, "label": torch.randint(0, C, (N,), generator=draw), "epoch": number // 2}
        batches.append(batch | {"keys": [str(i) for i in range(N)]} | ({"second_image": other} if second else {}))
    return batches


class Loader:
    def __init__(self, batches: list[dict]):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def position(self):
        return {}

    def num_skipped(self):
        return 0


def trained(folder: Path, settings: AdversarialTraining, second: bool, from_step: int = 2) -> tuple:
    """Trains with the engine; returns the model and its moving average."""
    model = MultiBatch(OnPixels(net(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).double())
    prior = EpochPrior(C, settings.gkl.weight_temperature) if settings.method in ("ikl", "gkl") else None
    torch.manual_seed(5)  # for the noise of the attacks
    result = fit(
        accelerator=Accelerator(cpu=True),
        model=model,
        objective=Adversarial(model=model, settings=settings, prior=prior),
        make_optimizer=lambda module: sgd(module, lr=0.1, wd=5e-4),
        learning_rate=lambda step: 0.1,
        make_loader=lambda position: Loader(batches(second)),
        run=RunFolder(folder / "run", is_main=True),
        config=FitConfig(steps=6, average_from_step=from_step),
        evaluate=lambda model: [],
        average=moving_average(model, 0.9),
    )
    return model.model.model, result.model.model


def released_dkl(student, teacher, prior, *, alpha, beta, gamma):
    delta_n = teacher[:, :, None] - teacher[:, None, :]
    delta_a = student[:, :, None] - student[:, None, :]
    with torch.no_grad():
        pairs = prior.pow(gamma)[:, :, None] @ prior.pow(gamma)[:, None, :]
    mse = 0.25 * ((delta_n - delta_a) ** 2 * pairs).sum() / pairs.sum()
    sce = -(F.softmax(teacher, dim=1).detach() * F.log_softmax(student, dim=1)).sum(1).mean()
    return beta * mse + alpha * sce


def transcribed(settings: AdversarialTraining, second: bool) -> tuple:
    """The loop of the released script, with its proxy model and its perturbation of the weights."""
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    inner = net().double()
    gamma = 1.0 if settings.method == "ikl" else settings.gkl.gamma
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(5)
    weight, sums, before, average = torch.ones(C, C) / C, torch.zeros(C, C).double(), 0, None
    smoothing = settings.label_smoothing

    def model(x, net=inner):
        return net((x - mean) / std)

    def distance(attacked, natural, rows, alpha, beta):
        return released_dkl(attacked, natural, rows, alpha=alpha, beta=beta, gamma=gamma)

    for number, batch in enumerate(batches(second)):
        if batch["epoch"] != before:
            total = sums.sum(dim=1, keepdim=True)
            weight, sums, before = torch.where(total > 0, sums / total, 1 / C).float(), sums * 0, batch["epoch"]
        epoch, target = batch["epoch"] + 1, batch["label"]
        x = batch["image"].double() / 255
        if second:
            x, target = torch.cat([x, batch["second_image"].double() / 255]), target.repeat(2)
        epsilon = settings.epsilon * epoch / settings.epochs
        rows = weight[target]
        inner.eval()
        adv = x + 0.001 * torch.randn(x.shape, dtype=x.dtype)
        adv = torch.min(torch.max(adv, x - epsilon), x + epsilon).clamp(
            0, 1
        )  # unlike there, within the ball from the start
        for _ in range(5):
            adv.requires_grad_()
            with torch.enable_grad():
                loss = released_dkl(model(adv), model(x), rows, alpha=1, beta=settings.attack_wmse_weight, gamma=1)
            (grad,) = torch.autograd.grad(loss, [adv])
            adv = adv.detach() + epsilon / 2 * grad.sign()
            adv = torch.min(torch.max(adv, x - epsilon), x + epsilon).clamp(0, 1)
        inner.train()
        difference = {}
        if epoch >= settings.awp_epoch:
            proxy = copy.deepcopy(inner)
            ascent = torch.optim.SGD(proxy.parameters(), lr=0.01)
            natural, attacked = model(x, proxy), model(adv, proxy)
            loss = F.cross_entropy(natural, target, label_smoothing=smoothing)
            loss = -(loss + distance(attacked, natural, rows, settings.gkl.soft_ce_weight, settings.gkl.wmse_weight))
            loss.backward()
            ascent.step()
            for (name, old), new in zip(inner.state_dict().items(), proxy.state_dict().values(), strict=True):
                if old.ndim > 1 and "weight" in name:
                    difference[name] = old.norm() / ((new - old).norm() + 1e-20) * (new - old)
            with torch.no_grad():
                for name, parameter in inner.named_parameters():
                    parameter.add_(settings.awp_gamma * difference[name] if name in difference else 0)
        attacked, natural = model(adv), model(x)
        with torch.no_grad():
            onehot = F.one_hot(target[:N], C).double()
            sums += onehot.t() @ F.softmax(natural[:N] / settings.gkl.weight_temperature, dim=1)
        both = (settings.gkl.soft_ce_weight, settings.gkl.wmse_weight)
        robust = distance(attacked[:N], natural[:N], rows[:N], *both)
        if second:
            robust = robust + settings.second_view_weight * distance(attacked[N:], natural[N:], rows[N:], *both)
        loss = F.cross_entropy(natural, target, label_smoothing=smoothing) + robust
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in inner.named_parameters():
                parameter.add_(-settings.awp_gamma * difference[name] if name in difference else 0)
        if number >= 2:
            now = {k: v.clone() for k, v in inner.state_dict().items()}
            average = now if average is None else {k: 0.1 * v + 0.9 * average[k] for k, v in now.items()}
    return inner, average


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """Pixels in float64: in float32 a gradient near 0 rounds to either sign, and the attack takes another path."""
    monkeypatch.setattr("gkl_vl.objectives.adversarial.scaled", lambda images: images.double() / 255)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("method", ["ikl", "gkl"])
def test_the_whole_step_equals_the_released_procedure(tmp_path, method, second):
    settings = replace(SETTINGS, method=method)
    model, average = trained(tmp_path, settings, second)
    expected, expected_average = transcribed(settings, second)
    start = net().state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
        if value.is_floating_point():
            torch.testing.assert_close(average.state_dict()[name], expected_average[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, start[name])


def test_every_setting_changes_the_step(tmp_path):
    """Otherwise the comparison with the released procedure could pass with a setting ignored."""
    base, _ = trained(tmp_path / "base", SETTINGS, True)
    for number, change in enumerate(
        [
            {"awp_gamma": 0},
            {"gkl": replace(GKL, gamma=1.0)},
            {"class_prior": False, "gkl": replace(GKL, weight_temperature=1.0)},
            {"attack_wmse_weight": 0},
            {"second_view_weight": 1.0},
            {"label_smoothing": 0.0},
            {"budget": "low"},
            {"method": "trades"},
            {"method": "natural"},
        ]
    ):
        other, _ = trained(tmp_path / str(number), replace(SETTINGS, **change), True)
        assert not torch.allclose(base[0].weight, other[0].weight, atol=1e-5), change


def test_natural_training_makes_no_attack(tmp_path, monkeypatch):
    monkeypatch.setattr("gkl_vl.objectives.adversarial.pgd", None)
    monkeypatch.setattr("gkl_vl.objectives.adversarial.weights_perturbed", None)
    model, _ = trained(tmp_path, replace(SETTINGS, method="natural", label_smoothing=0.0), False)
    expected = net().double()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    for batch in batches(False):
        optimizer.zero_grad()
        F.cross_entropy(expected((batch["image"].double() / 255 - mean) / std), batch["label"]).backward()
        optimizer.step()
    torch.testing.assert_close(model[0].weight, expected[0].weight, rtol=1e-5, atol=1e-6)


def test_before_the_average_begins_the_model_itself_is_returned(tmp_path):
    model, average = trained(tmp_path / "never", SETTINGS, False, from_step=6)
    assert average is model
    model, average = trained(tmp_path / "last", SETTINGS, False, from_step=5)
    assert average is not model and torch.equal(average[0].weight, model[0].weight)


# ---- several processes -------------------------------------------------------------------------------------------


def waves(images: Tensor, *_) -> Tensor:
    """A start of the attack that depends on the image, not on the process."""
    return 0.001 * torch.sin(1000 * images)


def of_rank(rank: int, world_size: int, method: str) -> tuple:
    """Loss, mean gradient and the prior after three batches of two epochs, perturbed weights in the last."""
    pgd._noise = waves
    adversarial.scaled = lambda images: images.double() / 255
    settings = replace(SETTINGS, method=method)
    model = MultiBatch(OnPixels(net(norm=False).double(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).double())
    objective = Adversarial(model=model, settings=settings, prior=EpochPrior(C, 2.0) if method != "trades" else None)
    rows = slice(rank * N // world_size, (rank + 1) * N // world_size)
    for batch in batches(True)[:3]:
        own = {name: value if name == "epoch" else value[rows] for name, value in batch.items()}
        model.zero_grad()
        part = objective.prepare(own)
        with objective.around_update([part]):
            loss, _ = objective.loss(objective.outputs(model, part), objective.targets(part))
            loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    state = {name: tensor.clone() for name, tensor in objective.state().items()}
    return loss.item(), gradient, state


@pytest.mark.parametrize("method", ["trades", "gkl"])
def test_processes_with_different_data_give_the_joined_batch(method):
    ((loss, gradient, state),) = run_ranks(of_rank, 1, method)
    for world_size in (2, 3):
        results = run_ranks(of_rank, world_size, method)
        assert [result[0] for result in results] == pytest.approx([loss] * world_size, rel=1e-5)
        torch.testing.assert_close(sum(result[1] for result in results) / world_size, gradient, rtol=1e-4, atol=1e-6)
        if method == "gkl":
            assert all(result[2]["epoch"] == 1 for result in results)
            torch.testing.assert_close(results[0][2]["prior"], state["prior"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                sum(result[2]["sums"] for result in results), state["sums"], rtol=1e-5, atol=1e-6
            )
