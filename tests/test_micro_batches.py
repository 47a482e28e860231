"""Several batches of one update equal one large batch in loss and gradients."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import run_ranks

from gkl_vl.losses.image_text import image_text_loss
from gkl_vl.protocols import Objective
from gkl_vl.training import gradient_cache
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import FitConfig, fit
from gkl_vl.training.gradient_cache import backward_from_cache, embed_all
from gkl_vl.training.optim import adamw, warmup_cosine

ROWS = 12


class Towers(torch.nn.Module):
    """Two towers, a scale and a bias; with dropout and BatchNorm on request."""

    def __init__(self, *, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8) if norm else torch.nn.Identity(), torch.nn.Dropout(dropout)
        )
        self.text = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(dropout))
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.bias = torch.nn.Parameter(torch.tensor(-1.0))
        self.seen = []

    def forward(self, pixels, tokens):
        image, text = F.normalize(self.image(pixels), dim=1), F.normalize(self.text(tokens), dim=1)
        self.seen.append((image.detach().clone(), torch.is_grad_enabled()))
        return {"image": image, "text": text, "logit_scale": self.log_scale.exp(), "logit_bias": self.bias}


class Distil(Objective):
    def __init__(self, **form):
        self.form = form

    def outputs(self, model, batch):
        return model(batch["pixels"], batch["tokens"])

    def targets(self, batch):
        teacher = {name: F.normalize(batch[name], dim=1) for name in ("teacher_image", "teacher_text")}
        return teacher | {"teacher_logit_scale": torch.tensor(11.0), "text_ids": batch["text_ids"]}

    def loss(self, outputs, targets):
        return image_text_loss(**outputs, **targets, gamma=0.5, **self.form)


def whole_batch(rows=ROWS, seed=1) -> dict:
    draw = torch.Generator().manual_seed(seed)
    widths = {"pixels": 6, "tokens": 4, "teacher_image": 7, "teacher_text": 7}
    batch = {name: torch.randn(rows, width, generator=draw) for name, width in widths.items()}
    return batch | {"text_ids": torch.arange(rows) % (rows - 2), "keys": [f"k{i}" for i in range(rows)]}


def split(batch: dict, sizes: list[int]) -> list[dict]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [{name: x[a : a + n] for name, x in batch.items()} for a, n in zip(starts, sizes, strict=True)]


def gradients(model: Towers, batches: list[dict], **form):
    """Loss and gradients of one update on these batches."""
    accelerator, objective = Accelerator(cpu=True), Distil(**form)
    wrapped = accelerator.prepare(model)
    cached = embed_all(accelerator, wrapped, objective, batches)
    loss, _ = objective.loss(cached.outputs, cached.targets)
    accelerator.backward(loss)
    backward_from_cache(accelerator, wrapped, objective, batches, cached)
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def plain_gradients(model: Towers, batch: dict, **form):
    objective = Distil(**form)
    loss, _ = objective.loss(objective.outputs(model, batch), objective.targets(batch))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(got, want):
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    for name, gradient in want[1].items():
        torch.testing.assert_close(
            got[1][name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("sizes", [[12], [6, 6], [4, 4, 4], [5, 1, 6]])
def test_micro_batches_equal_the_whole_batch(sizes):
    got = gradients(Towers(), split(whole_batch(), sizes))
    assert_same(got, plain_gradients(Towers(), whole_batch()))
    assert got[1]["log_scale"].abs() > 0.1  # added once, not once per micro-batch


def test_dropout_is_the_same_in_both_passes():
    model = Towers(dropout=0.5)
    gradients(model, split(whole_batch(), [4, 4, 4]))
    first, *others = model.seen
    assert [with_grad for _, with_grad in model.seen] == [True, False, False, True, True]
    for (cached, _), (again, _) in zip(others[:2], others[2:], strict=True):
        assert torch.equal(cached, again)
    assert not torch.equal(first[0], others[0][0])
    after = torch.rand(3)
    torch.manual_seed(0)
    model = Towers(dropout=0.5)  # the same number of draws as three forward passes
    for part in split(whole_batch(), [4, 4, 4]):
        Distil().outputs(model, part)
    assert torch.equal(after, torch.rand(3))


def test_a_gradient_with_dropout_is_that_of_the_masks_drawn():
    """Against finite differences of the loss with respect to a weight, each from the same seed."""
    batches = split(whole_batch(), [4, 8])
    model = Towers(dropout=0.5).double()
    batches = [
        {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in b.items()} for b in batches
    ]

    def value(shift):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.image[0].weight[1, 2] += shift
        torch.manual_seed(5)
        return gradients(moved, batches)

    slope = (value(1e-5)[0] - value(-1e-5)[0]) / 2e-5
    assert value(0.0)[1]["image.0.weight"][1, 2].item() == pytest.approx(slope.item(), rel=1e-5)


def test_batchnorm_counts_each_batch_once():
    model, plain = Towers(norm=True), Towers(norm=True)
    parts = split(whole_batch(), [4, 4, 4])
    gradients(model, parts)
    for part in parts:
        Distil().outputs(plain, part)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, msg=name)


CASES = [
    (sizes, form | kind)
    for sizes in ([6], [2, 4], [2, 2, 2])
    for form in ({"tile_size": None}, {"tile_size": 5}, {"tile_size": 5, "ring": True})
    for kind in ({}, {"sigmoid": True}, {"kl_weight": 0.3, "temperature": 2.0})
]


def ranks_and_parts(rank, world_size):
    own = split(whole_batch(), [ROWS // world_size] * world_size)[rank]
    return [gradients(Towers(), split(own, sizes), **form) for sizes, form in CASES]


def test_two_processes_with_micro_batches_equal_one_with_all():
    """Micro-batches and processes at once, in every form of the loss, against the dense form in one process."""
    for (_, form), *ranks in zip(CASES, *run_ranks(ranks_and_parts, 2), strict=True):
        kind = {name: value for name, value in form.items() if name not in ("tile_size", "ring")}
        want = plain_gradients(Towers(), whole_batch(), tile_size=None, **kind)
        for got in ranks:
            assert_same(got, want)


class Parts:
    """The loader of `fit`: batches of four."""

    def __iter__(self):
        for number in range(100):
            yield from split(whole_batch(seed=number), [4, 4, 4])

    def position(self):
        return {}

    def num_skipped(self):
        return 0


def test_fit_takes_accum_steps_batches_per_update(tmp_path):
    model, plain = Towers(), Towers()
    run = RunFolder(tmp_path, is_main=True)
    fit(
        accelerator=Accelerator(cpu=True),
        model=model,
        objective=Distil(),
        make_loader=lambda position: Parts(),
        run=run,
        make_optimizer=partial(adamw, lr=0.1, wd=0.0),
        learning_rate=partial(warmup_cosine, lr=0.1, steps=2, warmup_steps=0),
        config=FitConfig(steps=2, accum_steps=3, log_every_steps=1),
        evaluate=lambda model: [],
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    losses = []
    for number, lr in enumerate((0.1, 0.05)):
        optimizer.param_groups[0]["lr"] = lr
        losses.append(plain_gradients(plain, whole_batch(seed=number))[0].item())
        optimizer.step()
        optimizer.zero_grad()
    assert [record["train/loss"] for record in run.records()] == pytest.approx(losses, rel=1e-5)
    for name, parameter in plain.named_parameters():
        if name != "bias":  # its gradient is rounding error, which Adam scales to a whole step
            torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name, replacement",
    [
        ("_set_random_state", lambda state, device: None),
        ("_random_state", lambda device: (torch.get_rng_state(), None)),
    ],
)
def test_the_comparison_notices_other_dropout(monkeypatch, name, replacement):
    """The first replacement breaks it; the second does the same as the original on a CPU."""
    monkeypatch.setattr(gradient_cache, name, replacement)
    model = Towers(dropout=0.5)
    gradients(model, split(whole_batch(), [6, 6]))
    same = torch.equal(model.seen[1][0], model.seen[2][0])
    assert same == (name == "_random_state") and math.isfinite(model.seen[0][0].sum())
