"""Results equal pyautoattack's sample by sample and the exact radii of a linear model; they do not depend on processes,
kills and reruns; doubtful numbers have a warning; user errors are one line."""

import json
import logging
import os
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyautoattack
import pytest
import torch
from helpers import RankFailed, run_ranks
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from gkl_vl.data.labelled import LabelledSet, open_labelled
from gkl_vl.errors import UserError
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.robustness import autoattack
from gkl_vl.robustness import measure as measure_module
from gkl_vl.robustness.autoattack import Attack, _margin, distinct_warnings, survives_pgd, survivors
from gkl_vl.robustness.masking import check_masking, growing_epsilons, masking_warnings
from gkl_vl.robustness.measure import measure
from gkl_vl.robustness.results import result_record, results_table, wilson_interval
from gkl_vl.robustness.targets import Examples, Target, load_examples, load_target

SIZE = 6  # pixels a side
NAMES = ["autoattack", "pgd20", "pgd100", "cw", "apgd-ce", "square"]


pytestmark = pytest.mark.usefixtures("one_thread")


def shorten(monkeypatch, part: type, **iterations: int) -> None:
    """Gives a part of AutoAttack fewer iterations. Set at each call, because the versions set them too."""
    original = part.perturb

    def perturb(self, *args, **options):
        vars(self).update(iterations)
        return original(self, *args, **options)

    monkeypatch.setattr(part, "perturb", perturb)


@pytest.fixture
def short_square(monkeypatch):
    shorten(monkeypatch, pyautoattack.autoattack.SquareAttack, n_queries=50)


@pytest.fixture
def short(monkeypatch, short_square):
    shorten(monkeypatch, pyautoattack.autoattack.APGDAttack, n_iter=10)
    shorten(monkeypatch, pyautoattack.autoattack.APGDAttack_targeted, n_iter=10)
    shorten(monkeypatch, pyautoattack.autoattack.FABAttack_PT, n_iter=10)


def patterns(classes: int) -> Tensor:
    return torch.randn(classes, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(1))


def linear(classes: int = 10, *, scale: float = 1.0) -> nn.Sequential:
    """A linear model whose weights are the patterns of the classes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, classes))
    with torch.no_grad():
        model[1].weight.copy_(scale * patterns(classes))
        model[1].bias.copy_(-0.5 * scale * patterns(classes).sum(1))  # grey gives equal logits
    return model.eval()


def examples(n: int = 12, classes: int = 10, *, contrast: float = 0.08) -> Examples:
    """Grey images plus the pattern of their class at random strength, far from black and white."""
    draw = torch.Generator().manual_seed(2)
    labels = torch.arange(n) % classes
    strength = contrast * torch.rand(n, 1, generator=draw)
    noise = 0.04 * torch.randn(n, 3 * SIZE * SIZE, generator=draw)
    pixels = (0.5 + strength * patterns(classes)[labels] + noise).clamp(0.25, 0.75)
    images = (255 * pixels).round().byte().view(n, 3, SIZE, SIZE)
    return Examples(name="made:test", images=images, labels=labels, num_classes=classes, draw=f"all {n}")


def target(model: nn.Module) -> Target:
    return Target(architecture="made", model=model)


def exact_radii(model: nn.Module, data: Examples, norm: str) -> Tensor:
    """The smallest epsilon that fools a linear model on each image; below 0 where it is misclassified.

    (z_y - z_j) / |w_y - w_j| in the dual norm, for the nearest class j.
    """
    weight, x = model[1].weight.double(), data.images.double().flatten(1) / 255
    logits = x @ weight.T + model[1].bias.double()
    distances = []
    for z, y in zip(logits, data.labels, strict=True):
        length = (weight[y] - weight).norm(p=1 if norm == "linf" else 2, dim=1)
        distances.append(min((z[y] - z[j]) / length[j] for j in range(len(z)) if j != y))
    return torch.stack(distances)


def middle(distances: Tensor) -> float:
    """An epsilon that about half of the images survive, in the middle of the widest gap between radii."""
    ordered = distances[distances > 0].sort().values
    gaps = (ordered[1:] - ordered[:-1])[len(ordered) // 3 : -(len(ordered) // 3)]
    best = int(gaps.argmax()) + len(ordered) // 3
    return ((ordered[best] + ordered[best + 1]) / 2).item()


# ---- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hits, n, low, high",
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_the_interval_is_wilsons(hits, n, low, high):
    assert wilson_interval(hits=hits, n=n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("n", [1, 7, 10_000])
def test_the_interval_at_none_and_at_all(n):
    z = 1.959963984540054
    assert wilson_interval(hits=0, n=n) == (0.0, pytest.approx(z * z / (n + z * z)))
    assert wilson_interval(hits=n, n=n) == (pytest.approx(n / (n + z * z)), 1.0)


@pytest.mark.parametrize("hits, n", [(0, 0), (3, 2), (-1, 2)])
def test_invalid_counts_are_refused(hits, n):
    with pytest.raises(ValueError, match="hits"):
        wilson_interval(hits=hits, n=n)


# ---- one batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_gives_the_exact_radii_of_a_linear_model(norm, short_square):
    model, data = linear(), examples(24)
    radii = exact_radii(model, data, norm)
    epsilon = middle(radii)
    assert (radii - epsilon).abs().min() > 2e-4  # no image is near the border
    flags = survivors(
        Attack(name="autoattack", norm=norm, epsilon=epsilon), model=model, images=data.images, labels=data.labels
    )
    assert list(flags) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert torch.equal(flags["clean"], radii > 0)
    assert torch.equal(flags["square"], radii > epsilon)
    assert 3 < flags["square"].sum() < flags["clean"].sum() - 3
    for before, after in zip(list(flags.values()), list(flags.values())[1:], strict=False):
        assert not (after & ~before).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd20", "pgd100", "cw", "apgd-ce", "square"])
def test_the_other_attacks_are_upper_bounds_and_close(name, norm, short_square):
    model, data = linear(), examples(24)
    radii = exact_radii(model, data, norm)
    epsilon = middle(radii)
    flags = survivors(
        Attack(name=name, norm=norm, epsilon=epsilon), model=model, images=data.images, labels=data.labels
    )
    survives = radii > epsilon
    assert list(flags) == ["clean", name] and torch.equal(flags["clean"], radii > 0)
    assert not (survives & ~flags[name]).any()
    most = {"cw": 2, "square": 24}.get(name, 5)  # the cross entropy leads to the likeliest class, not to the nearest
    assert (flags[name] & ~survives).sum() <= most


def check_against_pyautoattack(folder: Path, *, n: int, batch_size: int, norm: str, version: str) -> None:
    data = examples(n)
    radii = exact_radii(linear(), data, norm)
    epsilon = 1.01 * radii[radii > 0].median().item()
    data = replace(data, labels=(data.labels + (torch.arange(n) == 1)) % 10)  # one is misclassified before the attack
    model = nn.Sequential(*linear(), nn.Tanh()).eval()  # not linear
    attack = Attack(name="autoattack", norm=norm, epsilon=epsilon, version=version, seed=3)
    ours = measure(attack=attack, target=target(model), examples=data, batch_size=batch_size, state_dir=folder)
    expected = []
    for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
        adversary = pyautoattack.AutoAttack(
            model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=3, version=version
        )
        _, predicted = adversary.run_standard_evaluation(images / 255, labels, batch_size=batch_size)
        expected.append(predicted == labels)
    assert torch.equal(list(ours.flags.values())[-1], torch.cat(expected))
    assert (
        0 < torch.cat(expected).sum() < ours.flags["clean"].sum() < n
    )  # some survive, some do not, one is misclassified


def test_the_numbers_are_pyautoattacks_to_the_sample(tmp_path):
    check_against_pyautoattack(tmp_path / "s", n=4, batch_size=4, norm="linf", version="standard")


@pytest.mark.parametrize("version, norm", [("standard", "linf"), ("standard", "l2"), ("plus", "linf"), ("rand", "l2")])
def test_the_numbers_are_pyautoattacks_in_batches_for_every_version(tmp_path, short, version, norm):
    check_against_pyautoattack(tmp_path / "s", n=7, batch_size=4, norm=norm, version=version)


@pytest.mark.parametrize("seed", [0, 3])
def test_every_part_uses_the_attacks_seed(monkeypatch, short, seed):
    seeds = []
    monkeypatch.setattr(torch.random, "manual_seed", seeds.append)  # what pyautoattack calls
    data = examples(4)
    attack = Attack(name="autoattack", norm="linf", epsilon=1e-4, seed=seed)
    survivors(attack, model=linear(), images=data.images, labels=data.labels)
    assert seeds == [seed] * 4  # not the time of day


def test_a_misclassified_image_does_not_survive(monkeypatch):
    model, data = linear(), examples()
    clean = model(data.images / 255).argmax(1) == data.labels
    assert 0 < clean.sum() < len(clean)
    # an attack after which all images are classified correctly
    monkeypatch.setattr(autoattack, "pgd", lambda model, images, **_: images)
    monkeypatch.setattr(autoattack, "is_correct", lambda model, pixels, labels: model(pixels).argmax(1) == labels)
    flags = survives_pgd(
        model=model, images=data.images, labels=data.labels, epsilon=0.1, steps=1, step_size=0.1, batch_size=5
    )
    assert torch.equal(flags, clean)


@pytest.mark.parametrize("name", NAMES)
def test_the_accuracy_of_an_undefended_model_is_0(name):
    model, data = linear(), examples(8)
    flags = survivors(Attack(name=name, norm="linf", epsilon=0.3), model=model, images=data.images, labels=data.labels)
    assert flags["clean"].sum() > 4 and list(flags.values())[-1].sum() == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_batch_of_one_and_a_batch_with_one_left(norm, short):
    model, data = linear(), examples(24)
    strongest = exact_radii(model, data, norm).argmax()
    epsilon = exact_radii(model, data, norm).sort().values[-2:].mean().item()
    attack = Attack(name="autoattack", norm=norm, epsilon=epsilon)
    alone = survivors(
        attack, model=model, images=data.images[strongest, None], labels=data.labels[strongest].reshape(1)
    )
    among = survivors(attack, model=model, images=data.images[:], labels=data.labels)
    assert alone["square"].tolist() == [True]
    assert among["square"].nonzero().flatten().tolist() == [strongest]


def test_with_few_classes_the_targets_are_all_others(tmp_path, short):
    data = examples(5, classes=4)
    attack = Attack(name="autoattack", norm="linf", epsilon=0.01)
    outcome = measure(attack=attack, target=target(linear(4)), examples=data, state_dir=tmp_path / "s")
    survives = exact_radii(linear(4), data, "linf") > 0.01
    assert torch.equal(outcome.flags["square"], survives) and outcome.warnings == []
    record = result_record(outcome, model="m", pretrained="", examples=data, masking={}, warnings=[])
    assert record["target_classes"] == 3 and "aim at 3 classes" in results_table(record)


def test_with_too_few_classes_the_error_names_another_attack(tmp_path, short):
    data, three = examples(5, classes=3), target(linear(3))
    attack = Attack(name="autoattack", norm="linf", epsilon=0.01)
    with pytest.raises(UserError, match="ranks 4 logits and the model has 3: use --attack pgd100"):
        measure(attack=attack, target=three, examples=data, state_dir=tmp_path / "s")
    rand = replace(attack, version="rand")
    assert measure(attack=rand, target=three, examples=data, state_dir=tmp_path / "r").flags["apgd-dlr"].sum() >= 0


# ---- PGD during training -----------------------------------------------------------------------------------------


def test_pgd_changes_nothing_and_depends_only_on_its_seed():
    data = examples()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 10))
    model.train()[1].eval()  # a frozen part in a model in training
    model(data.images / 255).sum().backward()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    labels = model.eval()(data.images / 255).argmax(1)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode

    def flags(seed: int, n: int = 12) -> list[bool]:
        return survives_pgd(
            model=model,
            images=data.images[:n],
            labels=labels[:n],
            epsilon=0.1,
            steps=1,
            step_size=0.0,  # the result depends on the start only
            batch_size=5,
            seed=seed,
        ).tolist()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = flags(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert flags(0) == first
    with torch.inference_mode():
        assert flags(0) == first
    with torch.no_grad():
        assert flags(0) == first
    assert any(flags(seed) != first for seed in range(1, 20))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pgd_of_no_images_and_with_a_batch_size_of_0():
    data = examples()
    options = {"model": linear(), "epsilon": 0.1, "steps": 1, "step_size": 0.1}
    assert survives_pgd(images=data.images[:0], labels=data.labels[:0], **options).tolist() == []
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        survives_pgd(images=data.images, labels=data.labels, batch_size=0, **options)


@pytest.mark.parametrize("name", ["autoattack", "pgd20"])
def test_an_attack_does_not_move_the_global_random_state(name):
    model, data, attack = linear(), examples(3), Attack(name=name, norm="linf", epsilon=0.05)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = survivors(attack, model=model, images=data.images, labels=data.labels)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = survivors(attack, model=model, images=data.images, labels=data.labels)
    assert all(torch.equal(again[part], first[part]) for part in first)


def test_the_margin_attack_maximises_the_margin():
    logits = torch.tensor([[3.0, 1, 2], [0, 5, 4]], requires_grad=True)
    loss = _margin(torch.tensor([0, 2]))(logits)
    assert loss.item() == (2 - 3) + (5 - 4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[-1, 0, 1], [0, 1, -1]]


# ---- batches, processes, kills -----------------------------------------------------------------------------------


SHORT = Attack(name="apgd-ce", norm="linf", epsilon=0.012, seed=1)


def measure_short(
    folder: Path, *, model: nn.Module | None = None, data: Examples | None = None, batch_size: int = 4, **other
):
    data = data or examples(14)
    attack = replace(SHORT, **other)
    return measure(
        attack=attack, target=target(model or linear()), examples=data, batch_size=batch_size, state_dir=folder
    )


def flags_on_ranks(rank, world_size, folder, name):
    outcome = measure_short(Path(folder), name=name)
    return {part: flags.tolist() for part, flags in outcome.flags.items()}, outcome.seconds


def test_two_processes_and_one_agree_to_the_sample(tmp_path):
    name = "apgd-ce"
    one = measure_short(tmp_path / "one", name=name)
    assert 0 < one.flags[name].sum() < one.flags["clean"].sum()
    two = run_ranks(flags_on_ranks, 2, str(tmp_path / "two"), name)
    assert two[0] == two[1]  # both have the complete outcome
    assert two[0][0] == {part: flags.tolist() for part, flags in one.flags.items()}
    batches = [json.loads((tmp_path / "two" / f"batch_0000{k}.json").read_text()) for k in range(4)]
    assert [batch["indices"] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]


class Dies(nn.Module):
    """A linear model that kills its process in a given forward pass."""

    calls_left = [10**9]  # of the class: an attribute of the model would be a setting of it

    def __init__(self):
        super().__init__()
        self.model = linear()

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls_left[0] -= 1
        if self.calls_left[0] == 0:
            os._exit(9)
        return self.model(pixels)


def killed(rank, world_size, folder):
    if rank == 0:
        Dies.calls_left[0] = 150
    measure_short(Path(folder), model=Dies())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_resumes(tmp_path, world_size):
    whole = measure_short(tmp_path / "whole", model=Dies())
    with pytest.raises(RankFailed, match="exited without a result"):
        run_ranks(killed, world_size, str(tmp_path / "killed"))
    finished = {file.name: file.read_text() for file in (tmp_path / "killed").glob("batch_*.json")}
    assert 0 < len(finished) < 4
    again = measure_short(tmp_path / "killed", model=Dies())
    assert {part: flags.tolist() for part, flags in again.flags.items()} == {
        part: flags.tolist() for part, flags in whole.flags.items()
    }
    for name, text in finished.items():  # not attacked again
        assert (tmp_path / "killed" / name).read_text() == text
    assert not list((tmp_path / "killed").glob("*.writing*"))


def test_a_finished_run_is_not_attacked_again(tmp_path, monkeypatch):
    first = measure_short(tmp_path / "s")
    monkeypatch.setattr(measure_module, "survivors", lambda *_, **__: pytest.fail("attacked again"))
    again = measure_short(tmp_path / "s")
    assert again.accuracies() == first.accuracies() and again.seconds == first.seconds


def test_without_a_state_folder_the_same_evaluation_uses_the_same_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = measure_short(None)
    assert measure_short(None).seconds == first.seconds and measure_short(None, seed=2).state_dir != first.state_dir
    assert first.state_dir.parent == Path("runs")


OTHERS = {
    "epsilon": {"epsilon": 0.013},
    "norm": {"norm": "l2"},
    "seed": {"seed": 2},
    "name": {"name": "square"},
    "batch_size": {"batch_size": 7},
    "images": {"data": examples(13)},
    "data_sha256": {"data": examples(14, contrast=0.07)},
    "model_sha256": {"model": linear(scale=2.0)},
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_state_of_another_evaluation_is_refused(tmp_path, key):
    measure_short(tmp_path / "s")
    with pytest.raises(UserError, match=rf"belongs to another evaluation: .*{key} .*\(was ") as refused:
        measure_short(tmp_path / "s", **OTHERS[key])
    assert "\n" not in str(refused.value)


def test_a_state_of_other_labels_or_another_version_is_refused(tmp_path):
    data = examples(4)
    attack = Attack(name="autoattack", norm="linf", epsilon=0.3)
    measure(attack=attack, target=target(linear()), examples=data, state_dir=tmp_path / "s")
    with pytest.raises(UserError, match=r"version rand \(was standard\)"):
        measure(
            attack=replace(attack, version="rand"),
            target=target(linear()),
            examples=data,
            state_dir=tmp_path / "s",
        )
    other = replace(data, labels=data.labels.flip(0))
    with pytest.raises(UserError, match="data_sha256"):
        measure(attack=attack, target=target(linear()), examples=other, state_dir=tmp_path / "s")


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not the state of an attack"):
        measure_short(tmp_path)
    with pytest.raises(UserError, match="is not the state of an attack"):
        measure_short(tmp_path / "thesis.tex")


# ---- masked gradients and other warnings -------------------------------------------------------------------------


class Rounded(nn.Module):
    """Rounds logits to halves, so that gradients are 0."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return (2 * self.model(pixels)).round() / 2


MASKED = {"rounded": lambda: Rounded(linear()), "saturated": lambda: linear(scale=1e4)}


@pytest.mark.parametrize("model", MASKED)
def test_masked_gradients_give_warnings(tmp_path, model):
    data = examples(30, contrast=0.16)
    attack = Attack(name="autoattack", norm="linf", epsilon=0.04)
    accuracies, lines = check_masking(
        attack=attack, target=target(MASKED[model]()), examples=data, images=16, state_dir=tmp_path / "s"
    )
    assert accuracies["square"] < accuracies["apgd-ce"] - 0.1
    text = " ".join(lines)
    assert re.search(r"masked gradients\? accuracy [\d.]+ % under Square, which uses no gradients, below ", text)
    assert "it must be 0" in text


def test_ordinary_gradients_give_no_warning(tmp_path):
    data = examples(30, contrast=0.16)
    attack = Attack(name="autoattack", norm="linf", epsilon=0.04)
    accuracies, lines = check_masking(
        attack=attack, target=target(linear()), examples=data, images=16, state_dir=tmp_path / "s"
    )
    assert lines == []
    assert accuracies["apgd-ce"] <= accuracies["square"] and accuracies["pgd100 at 0.5"] == 0
    assert list(accuracies) == [
        "apgd-ce",
        "square",
        *(f"pgd100 at {e}" for e in ("0.04", "0.08", "0.16", "0.32", "0.5")),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-masking"]  # --state-dir itself is left to the attack


def test_each_sign_has_its_line():
    usual = {"pgd": 0.41, "apgd": 0.40, "square": 0.5, "growing": {0.03: 0.41, 0.06: 0.1, 0.5: 0.0}}
    assert masking_warnings(**usual) == []
    for line, values in {
        "accuracy 30.00 % under plain PGD, below 40.00 % under APGD: APGD is stuck": {"pgd": 0.30},
        "accuracy 37.00 % under Square, which uses no gradients, below 40.00 % under APGD": {"square": 0.37},
        "accuracy 20.00 % under PGD at epsilon 0.06, above 10.00 % at 0.03": {
            "growing": {0.03: 0.1, 0.06: 0.2, 0.5: 0}
        },
        "accuracy 9.00 % under PGD at epsilon 0.5, where every image can be made plain grey": {
            "growing": {0.03: 0.4, 0.5: 0.09}
        },
    }.items():
        (warning,) = masking_warnings(**(usual | values))
        assert warning.startswith(f"masked gradients? {line}")


def test_small_differences_give_no_warning():
    assert masking_warnings(pgd=0.39, apgd=0.40, square=0.385, growing={0.03: 0.39, 0.06: 0.4, 0.5: 0.01}) == []


def test_epsilon_grows_until_every_image_can_be_grey():
    assert growing_epsilons(8 / 255, norm="linf", numbers=3072) == (*(8 * k / 255 for k in (1, 2, 4, 8)), 0.5)
    assert growing_epsilons(0.5, norm="l2", numbers=48)[-2:] == (2.0, pytest.approx(0.5 * 48**0.5))
    assert growing_epsilons(0.6, norm="linf", numbers=48) == (0.6,)


def test_warnings_of_pyautoattack_are_reported_once(tmp_path, caplog):
    data, attack = examples(9), Attack(name="autoattack", norm="linf", epsilon=0.3)
    logger = logging.getLogger("auto-attack")
    before = list(logger.handlers), logger.level, logger.propagate
    model = nn.Sequential(linear(), nn.Softmax(dim=1)).eval()
    outcome = measure(attack=attack, target=target(model), examples=data, batch_size=3, state_dir=tmp_path / "s")
    (line,) = [line for line in outcome.warnings if "probability distribution" in line]
    assert line.startswith("AutoAttack, 3 of 3 batches: ")
    assert (list(logger.handlers), logger.level, logger.propagate) == before and caplog.records == []
    again = measure(attack=attack, target=target(model), examples=data, batch_size=3, state_dir=tmp_path / "s")
    assert again.warnings == outcome.warnings  # of a finished run too
    record = result_record(again, model="m", pretrained="", examples=data, masking={}, warnings=["mine"])
    assert record["warnings"] == [*outcome.warnings, "mine"] and "warning: mine" in results_table(record)


def test_numbers_in_warnings_do_not_multiply_them():
    warnings = [["there are 3 points with zero gradient!"], [], ["there are 12 points with zero gradient!"]]
    assert distinct_warnings(warnings) == ["AutoAttack, 2 of 3 batches: there are 3 points with zero gradient!"]


def test_square_adding_to_the_gradient_attacks_gives_a_warning():
    def flags(count: int) -> Tensor:
        return torch.arange(1000) < count

    attack = Attack(name="autoattack", norm="linf", epsilon=0.1)
    parts = {"clean": flags(900), "apgd-ce": flags(500), "apgd-t": flags(480), "fab-t": flags(480)}
    assert measure_module._square_warning(attack, parts | {"square": flags(478)}) == []
    (line,) = measure_module._square_warning(attack, parts | {"square": flags(470)})
    assert "fools the model on 1.00 % more images" in line


# ---- results -----------------------------------------------------------------------------------------------------


def test_the_record_holds_accuracies_and_settings(tmp_path):
    outcome = measure_short(tmp_path / "s")
    data = examples(14)
    record = result_record(outcome, model="runs/a", pretrained="", examples=data, masking={}, warnings=[])
    record = json.loads(json.dumps(record))
    clean, robust = int(outcome.flags["clean"].sum()), int(outcome.flags["apgd-ce"].sum())
    assert (record["clean_acc1"], record["robust_acc1"], record["n"]) == (clean / 14, robust / 14, 14)
    assert record["clean_acc1_interval"] == list(wilson_interval(hits=clean, n=14))
    assert record["robust_acc1_interval"] == list(wilson_interval(hits=robust, n=14))
    assert (record["model"], record["dataset"], record["draw"]) == ("runs/a", "made:test", "all 14")
    assert (record["attack"], record["norm"], record["epsilon"], record["seed"]) == ("apgd-ce", "linf", 0.012, 1)
    assert record["pyautoattack"] == pyautoattack.__version__ and record["version"] is None


@pytest.mark.parametrize("name", NAMES)
def test_attacks_other_than_autoattack_are_marked_as_upper_bounds(tmp_path, name):
    outcome = measure_short(tmp_path / "s", data=examples(3), name=name, epsilon=0.3)
    record = result_record(outcome, model="m", pretrained="", examples=examples(3), masking={}, warnings=[])
    is_autoattack = name == "autoattack"
    assert (record["note"] is None) == is_autoattack
    assert ("not AutoAttack: an upper bound" in results_table(record)) == (not is_autoattack)
    assert record["version"] == ("standard" if is_autoattack else None)
    if name in ("pgd20", "pgd100", "cw"):
        assert record["settings"].startswith(f"PGD-{ {'pgd20': 20, 'pgd100': 100, 'cw': 30}[name] } on the ")
        assert "steps of epsilon/4" in record["settings"] and record["pyautoattack"] is None


# ---- models, data and user errors --------------------------------------------------------------------------------


def write_images(folder: Path, *, classes: int = 4, each: int = 3, side: int = 8) -> LabelledSet:
    draw = np.random.default_rng(0)
    for label in range(classes):
        (folder / "test" / f"class{label}").mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "test" / f"class{label}" / f"{number}.png")
    return open_labelled(str(folder), "test")


def test_a_part_is_drawn_evenly_and_deterministically(tmp_path):
    data = write_images(tmp_path)
    part = load_examples(data, images=8)
    assert part.labels.bincount().tolist() == [2, 2, 2, 2] and part.num_classes == 4
    assert part.draw == "8 of 12, evenly by class, seed 0"
    assert torch.equal(load_examples(data, images=8).images, part.images)
    whole = load_examples(data)
    assert whole.draw == "all 12" and torch.equal(whole.labels, data.labels) and whole.images.shape == (12, 3, 8, 8)
    assert load_examples(data, images=4, image_size=14).images.shape == (4, 3, 14, 14)
    for n in (0, 13):
        with pytest.raises(UserError, match="it has 12"):
            load_examples(data, images=n)
    with pytest.raises(UserError, match="--image-size 0"):
        load_examples(data, image_size=0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run folder with an exported resnet8 for 4 classes."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    (folder / "model").mkdir(parents=True)
    torch.manual_seed(0)
    config = {"library": "gkl-vl", "architecture": "resnet8", "num_classes": 4}
    config |= {"mean": [0.1, 0.2, 0.3], "std": [0.6, 0.5, 0.4]}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    save_file(load_classifier("resnet8", num_classes=4).model.state_dict(), folder / "model" / "model.safetensors")
    return folder


def test_a_run_its_folder_and_its_weights_are_the_same_model(run_folder):
    pixels = torch.rand(2, 3, 8, 8)
    plain = load_classifier(f"local-dir:{run_folder / 'model'}")
    with torch.no_grad():
        expected = plain.on_pixels().eval()(pixels)
    for name in (str(run_folder), str(run_folder / "model"), f"local-dir:{run_folder / 'model'}"):
        loaded = load_target(name, num_classes=4, norm="linf")
        assert loaded.architecture == "resnet8" and not loaded.model.training
        assert not any(p.requires_grad for p in loaded.model.parameters())
        assert torch.equal(loaded.model(pixels), expected)
    weights = str(run_folder / "model" / "model.safetensors")
    assert load_target("resnet8", num_classes=4, norm="linf", weights=weights).architecture == "resnet8"


def test_random_weights_are_refused():
    for name in ("resnet8", "timm:resnet18"):
        with pytest.raises(UserError, match="has random weights: give a checkpoint as --weights"):
            load_target(name, num_classes=4, norm="linf")


def test_a_model_for_other_classes_is_refused(tmp_path, run_folder):
    loaded = load_target(str(run_folder), num_classes=10, norm="linf")
    with pytest.raises(UserError, match=r"\[2, 4\] for 2 images and made:test has 10 classes"):
        measure(attack=SHORT, target=loaded, examples=examples(), state_dir=tmp_path / "s")


@pytest.mark.parametrize(
    "other, message",
    [
        ({"epsilon": 0}, "--epsilon 0 must be above 0 and at most 1"),
        ({"epsilon": -0.1}, "--epsilon -0.1 must be above 0"),
        ({"epsilon": 8}, "--epsilon 8 must be above 0 and at most 1, .* write 8/255, not 8"),
        ({"epsilon": float("nan")}, "--epsilon nan must be above 0"),
        ({"epsilon": 11, "norm": "l2"}, r"at most 10.3923, the l2 distance of black and white"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        (
            {"version": "plus"},
            "--version plus is a version of AutoAttack and does not apply to --attack apgd-ce: leave",
        ),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(27, 10))}, "does not accept images of 6x6 .*--image-size"),
        ({"model": nn.Sequential(linear(), nn.Threshold(1e9, float("nan")))}, "logits that are not finite"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_folder(tmp_path, other, message):
    with pytest.raises(UserError, match=message) as refused:
        measure_short(tmp_path / "s", **other)
    assert "\n" not in str(refused.value) and not (tmp_path / "s").exists()


def test_without_pyautoattack_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(UserError, match=r"pip install 'gkl-vl\[attack\]'"):
        measure_short(tmp_path / "s")
    assert measure_short(tmp_path / "s", name="pgd20").flags["pgd20"].sum() > 0  # needs none


def test_without_robustbench_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(UserError, match=r"pip install 'gkl-vl\[robustbench\]', then pip install --no-deps robustbench"):
        load_target("robustbench:Carmon2019Unlabeled", num_classes=10, norm="linf")


@pytest.fixture
def robustbench(monkeypatch) -> list:
    """A stand-in for robustbench with `load_model`; the list of its calls."""
    calls = []

    def load_model(model_name, *, dataset, threat_model):
        calls.append((model_name, dataset, threat_model))
        if model_name != "Known2026":
            raise KeyError(model_name)
        return linear().train()

    package, utils = types.ModuleType("robustbench"), types.ModuleType("robustbench.utils")
    utils.load_model, package.utils = load_model, utils
    for name, module in (("robustbench", package), ("robustbench.utils", utils)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("autoattack", "autoattack.state"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return calls


def test_a_model_of_robustbench_is_loaded_by_threat_model_and_dataset(robustbench):
    loaded = load_target("robustbench:Known2026", num_classes=10, norm="l2")
    assert robustbench == [("Known2026", "cifar10", "L2")]
    assert loaded.architecture == "robustbench:Known2026" and not loaded.model.training
    from autoattack import AutoAttack  # what robustbench 1.1 imports
    from autoattack.state import EvaluationState

    assert AutoAttack is pyautoattack.AutoAttack and EvaluationState.__module__ == "pyautoattack.state"


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("Unknown", {}, "RobustBench's 'Unknown' for cifar10 and Linf could not be loaded .*check the name"),
        ("Known2026", {"num_classes": 7}, "10, 100 or 1000 classes, the data has 7"),
        ("Known2026", {"weights": "a.pt"}, "--weights a.pt cannot be used with"),
    ],
)
def test_errors_with_robustbench_are_one_line(robustbench, name, options, message):
    with pytest.raises(UserError, match=message):
        load_target(f"robustbench:{name}", **({"num_classes": 10, "norm": "linf"} | options))
