"""GKL on cross logits equals its formula in value and gradient, in every chunking, over ranks and micro-batches; the
bank of columns is the same on all ranks and after a resume."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import run_ranks
from torch.testing import assert_close

from gkl_vl.distributed import gather_rows
from gkl_vl.losses import cross_logits
from gkl_vl.losses.cross_logits import cross_logits_loss
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.models.clip import load_clip
from gkl_vl.objectives.clip import ClipKd, ClipKdWeights
from gkl_vl.teachers.bank import Bank
from gkl_vl.training.gradient_cache import backward_from_cache, embed_all

# Against the fp64 reference, as in test_image_text.py; bf16 inputs are rounded for both sides.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}
SETTINGS = {"soft_ce_weight": 1.3, "wmse_weight": 0.7, "gamma": 0.5, "temperature": 2.0, "weight_temperature": 3.0}
E = 5


def rows(count, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, E, generator=draw, dtype=torch.float64), dim=1).to(dtype)


def batch(n, columns, dtype=torch.float64):
    """Both directions, with banks of different sizes."""
    names = ("image", "teacher_image", "text", "teacher_text")
    own = {name: rows(n, seed, dtype) for seed, name in enumerate(names)}
    return own | {"text_bank": rows(columns, 8, dtype), "image_bank": rows(columns + 2, 9, dtype)}


def formula(*, student, teacher, bank, scale, bias=None, prior=None, sigmoid=False, settings=None):
    """One direction of the docstring, with wMSE over all pairs of columns as in the released code."""
    weights = GklSettings(**(SETTINGS if settings is None else settings))
    s, t = scale * student @ bank.T, scale * teacher @ bank.T
    if sigmoid:
        s, t = s + bias, t + bias
        p, log_p, log_not_p = torch.sigmoid(t / weights.temperature), F.logsigmoid(s / 2), F.logsigmoid(-s / 2)
        soft_ce = -(p * log_p + (1 - p) * log_not_p).sum(1).mean()
    else:
        target = F.softmax(t / weights.temperature, 1)
        soft_ce = -(target * F.log_softmax(s / weights.temperature, 1)).sum(1).mean()
    w = (F.softmax(t / weights.weight_temperature, 1) if prior is None else prior) ** weights.gamma
    w = w / w.sum(1, keepdim=True)
    difference = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
    wmse = 0.25 * (w[:, :, None] * w[:, None, :] * difference**2).sum((1, 2)).mean()
    return weights.soft_ce_weight * soft_ce + weights.wmse_weight * wmse, soft_ce, wmse


def reference(given, scale, **options):
    """The mean of the two directions, in float64."""
    of = {name: tensor.double() for name, tensor in given.items()}
    first = formula(
        student=of["image"], teacher=of["teacher_image"], bank=of["text_bank"], scale=scale.double(), **options
    )
    options = {name: value for name, value in options.items() if name != "prior"}
    second = formula(
        student=of["text"], teacher=of["teacher_text"], bank=of["image_bank"], scale=scale.double(), **options
    )
    return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


def with_gradient(loss, given):
    leaves = {name: given[name].detach().clone().requires_grad_() for name in ("image", "text")}
    value, *others = loss(given | leaves)
    value.backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items()}, others


@pytest.fixture(params=[(2**23, 2**18), (30, 12), (1, 1)])
def chunks(request, monkeypatch):
    """One block, blocks within chunks, and single rows."""
    for name, entries in zip(("CHUNK_ENTRIES", "CPU_BLOCK_ENTRIES"), request.param, strict=True):
        monkeypatch.setattr(cross_logits, name, entries)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gamma", [0, 0.5, 1])
@pytest.mark.parametrize("n, columns", [(1, 1), (7, 3), (4, 11)])
def test_the_loss_equals_its_formula_in_value_and_gradient(n, columns, gamma, dtype):
    given, scale = batch(n, columns, dtype), torch.tensor(17.0)
    settings = SETTINGS | {"gamma": gamma}
    want, gradients, (soft_ce, wmse) = with_gradient(lambda g: reference(g, scale, settings=settings), given)
    got, own, (scalars,) = with_gradient(lambda g: cross_logits_loss(**g, teacher_logit_scale=scale, **settings), given)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=1e-12)
    for name, gradient in gradients.items():
        # of bf16 leaves the gradient is rounded to their 8 bits
        tolerance = 1e-2 if dtype == torch.bfloat16 else TOLERANCE[dtype]
        assert_close(own[name].double(), gradient.double(), rtol=tolerance, atol=tolerance * gradient.abs().max())
    assert_close(scalars["cross_soft_ce"].double(), soft_ce, rtol=1e-5, atol=1e-6)
    assert_close(scalars["cross_wmse"].double(), wmse, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("off", ["soft_ce_weight", "wmse_weight", None])
@pytest.mark.parametrize("gamma", [0, 0.7])
def test_a_siglip_teachers_soft_ce_is_binary(off, gamma):
    given, scale, bias = batch(4, 7), torch.tensor(17.0), torch.tensor(-6.0)
    settings = SETTINGS | {"gamma": gamma} | ({} if off is None else {off: 0.0})
    options = {"sigmoid": True, "settings": settings, "bias": bias.double()}
    want, gradients, _ = with_gradient(lambda g: reference(g, scale, **options), given)
    got, own, (scalars,) = with_gradient(
        lambda g: cross_logits_loss(**g, teacher_logit_scale=scale, teacher_logit_bias=bias, sigmoid=True, **settings),
        given,
    )
    assert_close(got, want, rtol=1e-10, atol=0)
    assert all(torch.allclose(own[name], gradients[name], rtol=1e-9, atol=1e-12) for name in own)
    named = {"soft_ce_weight": "cross_soft_ce", "wmse_weight": "cross_wmse"}
    assert set(scalars) == {term for weight, term in named.items() if weight != off}
    softmax = [
        cross_logits_loss(**given, teacher_logit_scale=scale, teacher_logit_bias=b, **SETTINGS)[0] for b in (None, bias)
    ]
    assert torch.equal(*softmax)  # to which a softmax teacher's bias does not matter


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("gamma", [0, 0.5, 1])
def test_a_class_prior_is_the_base_of_the_weights_of_images(gamma):
    given, scale = batch(5, 6), torch.tensor(17.0)
    prior = torch.softmax(3 * rows(5, 20)[:, :1] * torch.arange(6), 1)
    prior[2] = torch.eye(6)[1].double()  # classes without any probability
    settings = SETTINGS | {"gamma": gamma}
    want, gradients, _ = with_gradient(lambda g: reference(g, scale, prior=prior, settings=settings), given)
    got, own, _ = with_gradient(
        lambda g: cross_logits_loss(**g, teacher_logit_scale=scale, class_prior=prior, **settings), given
    )
    assert_close(got, want, rtol=1e-10, atol=0)
    assert all(torch.allclose(own[name], gradients[name], rtol=1e-9, atol=1e-12) for name in own)


def test_images_alone_are_one_direction_and_the_teacher_has_no_gradient():
    given, scale = batch(4, 7), torch.tensor(17.0, requires_grad=True)
    one = {name: given[name].requires_grad_() for name in ("image", "teacher_image", "text_bank")}
    loss, _ = cross_logits_loss(**one, teacher_logit_scale=scale, **SETTINGS)
    want, *_ = formula(student=one["image"], teacher=one["teacher_image"], bank=one["text_bank"], scale=scale)
    assert_close(loss, want, rtol=1e-10, atol=0)
    loss.backward()
    assert one["image"].grad.abs().max() > 0
    assert scale.grad is None and all(one[name].grad is None for name in ("teacher_image", "text_bank"))


def test_the_teacher_itself_is_the_minimum_and_wmse_is_a_kl_at_another_temperature():
    """The gradient vanishes at the teacher, and near it wMSE is T^2 KL at T = 1 / gamma."""
    given, scale = batch(6, 9), torch.tensor(17.0)
    teacher = given | {"image": given["teacher_image"], "text": given["teacher_text"]}
    _, gradients, (scalars,) = with_gradient(
        lambda g: cross_logits_loss(**g, teacher_logit_scale=scale, **SETTINGS), teacher
    )
    assert scalars["cross_wmse"] == 0 and all(g.abs().max() < 1e-12 for g in gradients.values())
    near = {name: F.normalize(given[f"teacher_{name}"] + 1e-4 * given[name], dim=1) for name in ("image", "text")}
    wmse, _ = cross_logits_loss(**(given | near), teacher_logit_scale=scale, soft_ce_weight=0.0, gamma=0.5)
    at_2 = {"teacher_logit_scale": scale, "soft_ce_weight": 1.0, "wmse_weight": 0.0, "temperature": 2.0}
    kl = cross_logits_loss(**(given | near), **at_2)[0] - cross_logits_loss(**teacher, **at_2)[0]
    assert_close(wmse, 4 * kl, rtol=1e-3, atol=0)


def test_sharp_logits_near_the_teacher_keep_their_digits():
    given, scale = batch(6, 40, torch.float32), torch.tensor(100.0)
    for name in ("image", "text"):
        given[name] = F.normalize(given[f"teacher_{name}"] + 1e-3 * given[name], dim=1)
    settings = SETTINGS | {"soft_ce_weight": 0.0}
    want, gradients, _ = with_gradient(lambda g: reference(g, scale, settings=settings), given)
    got, own, _ = with_gradient(lambda g: cross_logits_loss(**g, teacher_logit_scale=scale, **settings), given)
    assert_close(got.double(), want, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert (own[name] - gradient).abs().max() < 1e-4 * gradient.abs().max()


def test_a_callers_autocast_changes_nothing_and_a_second_derivative_is_refused():
    given, scale = batch(4, 7, torch.float32), torch.tensor(17.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = cross_logits_loss(**given, teacher_logit_scale=scale, **SETTINGS)
    assert torch.equal(inside, cross_logits_loss(**given, teacher_logit_scale=scale, **SETTINGS)[0])
    leaf = given["image"].requires_grad_()
    loss, _ = cross_logits_loss(**given, teacher_logit_scale=scale, **SETTINGS)
    with pytest.raises(RuntimeError, match="cross_logits_loss has no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gamma": -1.0}, "gamma must be a finite number >= 0, got -1"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0"),
        ({"text_bank": torch.zeros(0, E)}, r"text_bank must be \[K, 5\] with K at least 1, got \[0, 5\]"),
        ({"image_bank": torch.zeros(3, 4)}, r"image_bank must be \[K, 5\] with K at least 1, got \[3, 4\]"),
        ({"teacher_text": rows(3, 0)}, r"teacher_text must have the shape of text \[4, 5\], got \[3, 5\]: map"),
        ({"text": None}, "text, teacher_text and image_bank go together, and text is missing"),
        ({"class_prior": torch.ones(4, 3)}, r"class_prior must be \[4, 7\] like the logits, got \[4, 3\]"),
        ({"image": torch.zeros(0, E)}, r"image must be embeddings \[n, e\], n and e at least 1, got \[0, 5\]"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    given = batch(4, 7) | {"teacher_logit_scale": torch.tensor(17.0)} | change
    with pytest.raises(ValueError, match=message):
        cross_logits_loss(**given)


# ---- the bank ----------------------------------------------------------------------------------------------------


def filled(bank, count, n=3):
    """The columns at each of so many updates of n rows; row k of update u is (u, k)."""
    seen = []
    for update in range(count):
        marks = torch.stack([torch.full((n,), float(update)), torch.arange(float(n))], dim=1)
        text, image = bank.columns(marks, 100 + marks)
        assert torch.equal(image, text + 100)
        seen.append({tuple(row) for row in text.tolist()})
        assert len(seen[-1]) == len(text)
        bank.advance()
    return seen


@pytest.mark.parametrize("size", [0, 2, 3, 7, 100])
def test_columns_are_the_batch_and_the_rows_before_it(size):
    in_order = [(float(u), float(k)) for u in range(6) for k in range(3)]
    for update, columns in enumerate(filled(Bank(size), 6)):
        newest = in_order[max(0, 3 * update + 3 - max(size, 3)) : 3 * update + 3]
        assert columns == set(newest)


def test_a_batch_counts_once_until_the_bank_advances():
    bank = Bank(4)
    for mark in (1.0, 2.0):
        text, _ = bank.columns(torch.full((2, E), mark), torch.zeros(2, E))
        assert text.tolist() == [[mark] * E] * 2
    bank.advance()
    assert len(bank.columns(torch.full((2, E), 3.0), torch.zeros(2, E))[0]) == 4


def test_a_bank_that_was_saved_goes_on_exactly():
    whole, resumed = Bank(7), Bank(7)
    filled(whole, 4)
    resumed.load_state(copy.deepcopy(whole.state()))
    for _ in range(3):
        marks = torch.rand(3, 2)
        assert all(
            torch.equal(a, b) for a, b in zip(whole.columns(marks, marks), resumed.columns(marks, marks), strict=True)
        )
        whole.advance()
        resumed.advance()


# ---- several processes and micro-batches -------------------------------------------------------------------------

WEIGHTS = ClipKdWeights(
    contrastive_weight=0.5,
    mimicry_weight=0.0,
    gkl=GklSettings(soft_ce_weight=0.0, wmse_weight=0.0),
    cross=GklSettings(**SETTINGS),
)
ROWS, UPDATES = 12, 4


class Towers(torch.nn.Module):
    """Both sides with a map into the teacher's space."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(6, E), torch.nn.Linear(4, E)

    def forward(self, pixels, tokens):
        image, text = F.normalize(self.image(pixels), dim=-1), F.normalize(self.text(tokens), dim=-1)
        scale = torch.tensor(9.0)
        return {"image": image, "text": text, "logit_scale": scale, "mapped_image": image, "mapped_text": text}


class Kd(ClipKd):
    def outputs(self, model, batch):
        return model(batch["pixels"], batch["tokens"])


def teacher(batch):
    return {name: batch[name] for name in ("teacher_image", "teacher_text")} | {
        "teacher_logit_scale": torch.tensor(11.0)
    }


def kd_with(bank):
    return Kd(student=load_clip("emoji-student"), teacher=teacher, weights=WEIGHTS, bank=bank)


def make_batches():
    """Two captions per image."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"pixels": (6,), "tokens": (2, 4), "teacher_image": (E,), "teacher_text": (2, E)}
    made = []
    for _ in range(UPDATES):
        of = {name: torch.randn(ROWS, *shape, generator=draw) for name, shape in shapes.items()}
        of |= {name: F.normalize(of[name], dim=-1) for name in ("teacher_image", "teacher_text")}
        made.append(of | {"text_ids": torch.arange(2 * ROWS).view(ROWS, 2), "keys": list(range(ROWS))})
    return made


def updates(rank, world_size, *, accum_steps=1, resume_after=None):
    """Loss, scalars, gradient and bank of every update with this rank's rows, in `accum_steps` batches."""
    accelerator, model, results = Accelerator(cpu=True), Towers(), []
    kd = kd_with(Bank(20))
    wrapped = accelerator.prepare(model)
    step = ROWS // world_size // accum_steps
    for number, whole in enumerate(make_batches()):
        if number == resume_after:
            saved = kd.state()
            assert bool(saved) == (rank == 0)  # one copy in the checkpoint
            kd = replace(kd, bank=Bank(20))
            kd.load_state(saved)
        first = rank * ROWS // world_size
        starts = range(first, first + ROWS // world_size, step)
        parts = [{name: x[start : start + step] for name, x in whole.items()} for start in starts]
        with kd.around_update(parts):
            cached = embed_all(accelerator, wrapped, kd, parts)
            loss, scalars = kd.loss(cached.outputs, cached.targets)
            accelerator.backward(loss)
            backward_from_cache(accelerator, wrapped, kd, parts, cached)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        wrapped.zero_grad()
        numbers = {name: value.item() for name, value in scalars.items()}
        results.append({"loss": loss.detach(), "gradient": gradient, "scalars": numbers, "bank": kd.bank._rows.clone()})
    return results


def resumed(rank, world_size):
    return updates(rank, world_size, resume_after=2)


@pytest.fixture(scope="module")
def alone():
    return updates(0, 1)


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert_close(one["loss"], other["loss"], rtol=1e-5, atol=0)
        assert_close(one["gradient"], other["gradient"], rtol=1e-5, atol=1e-6)
        assert one["scalars"] == pytest.approx(other["scalars"], rel=1e-5)
        assert {"cross_soft_ce", "cross_wmse"} <= set(one["scalars"])
        assert torch.equal(one["bank"], other["bank"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_equal_one_on_the_joined_batch_also_after_a_resume(world_size, alone):
    for ranks in run_ranks(resumed, world_size):
        assert_same(ranks, alone)  # DistributedDataParallel has averaged the gradients


@pytest.mark.parametrize("accum_steps", [2, 3])
def test_micro_batches_equal_the_whole_batch(accum_steps, alone):
    assert_same(updates(0, 1, accum_steps=accum_steps), alone)


def test_the_whole_run_depends_on_the_bank(alone):
    without = kd_with(Bank(0))
    losses = []
    for whole in make_batches():
        losses.append(without.loss(without.outputs(Towers(), whole), without.targets(whole))[0].item())
        without.bank.advance()
    assert losses[0] == pytest.approx(alone[0]["loss"].item(), rel=1e-6)
    assert abs(losses[-1] - alone[-1]["loss"].item()) > 0.01


def columns_of_a_rank(rank, world_size):
    """The in-batch columns of each rank, through the public loss."""
    own = {name: x[rank * 6 : rank * 6 + 6] for name, x in make_batches()[0].items() if name.startswith("teacher")}
    image = F.normalize(own["teacher_image"] + 0.3, dim=1).requires_grad_()
    loss, scalars = cross_logits_loss(
        image=image,
        teacher_image=own["teacher_image"],
        text_bank=gather_rows(own["teacher_text"][:, 0]),
        teacher_logit_scale=torch.tensor(11.0),
        **SETTINGS,
    )
    loss.backward()
    return loss.item(), {name: value.item() for name, value in scalars.items()}, image.grad


def test_every_rank_has_the_global_value_and_world_size_times_its_rows_gradient():
    whole = make_batches()[0]
    image = F.normalize(whole["teacher_image"] + 0.3, dim=1).requires_grad_()
    loss, scalars = cross_logits_loss(
        image=image,
        teacher_image=whole["teacher_image"],
        text_bank=whole["teacher_text"][:, 0],
        teacher_logit_scale=torch.tensor(11.0),
        **SETTINGS,
    )
    loss.backward()
    ranks = run_ranks(columns_of_a_rank, 2)
    for value, of_rank, _ in ranks:
        assert value == pytest.approx(loss.item(), rel=1e-5)
        assert of_rank == pytest.approx({name: scalar.item() for name, scalar in scalars.items()}, rel=1e-5)
    assert_close(torch.cat([gradient for *_, gradient in ranks]), 2 * image.grad, rtol=1e-5, atol=1e-7)
