"""The image-text loss does not depend on world size, tile size or precision, which change the cost only.

In every form, loss and gradients equal those of the dense form in float64 in one process on the joined batch, which
test_image_text.py compares with the formula.
"""

import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from gkl_vl import distributed
from gkl_vl.losses import image_text, tiles
from gkl_vl.losses.image_text import image_text_loss, mimicry_loss

pytestmark = pytest.mark.usefixtures("one_thread")
EVERYTHING = {"contrastive_weight": 0.7, "soft_ce_weight": 1.3, "wmse_weight": 0.11, "kl_weight": 0.4}
TEMPERATURES = {"temperature": 2.0, "weight_temperature": 3.0}
# Relative to the largest entry. fp64: a few hundred roundings of 1e-16. fp32: logits of up to 13 have an error of
# 13 * 6e-8, which an exponential preserves. bf16: the oracle gets the same rounded inputs, so the loss is as exact as
# in fp32; the gradient of a bf16 embedding is bf16, half a unit in the last place of 8 bits.
LOSS_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-3}

ROWS = 24  # divisible by 4 ranks; the last tile of size 7 is incomplete
IDS = [0, 1, 2, 3, 1, 4, 5, 0, *range(6, 20), 2, 19]  # equal captions on one rank, and on two
FORMS = [{"tile_size": None}, *({"tile_size": size, "ring": ring} for size in (1, 7, 64) for ring in (False, True))]
SOFTMAX = {}
SIGMOID = {"sigmoid": True, "kl_weight": 0}
KINDS = [SOFTMAX, SIGMOID, SIGMOID | {"teacher_sigmoid": True}]
TWO_TEACHERS = {"teacher_weights": (3, 1)}
OF_TWO_TEACHERS = [TWO_TEACHERS, SIGMOID | TWO_TEACHERS | {"teacher_sigmoid": (True, False)}]
THREE_CAPTIONS = [{"captions": 3}, SIGMOID | {"captions": 3}, OF_TWO_TEACHERS[1] | {"captions": 3}]
CASES = [
    case
    for case in itertools.product(LOSS_TOLERANCE, FORMS, (0, 0.5, 1), (True, False), KINDS)
    # tiles of 1 are slow, round as tiles of 7 do, and meet other settings in test_odd_sizes_tiles_and_missing_terms
    if case[1]["tile_size"] != 1 or (case[0], *case[2:]) == (torch.float64, 0.5, True, SOFTMAX)
]
LARGER_TILES = [form for form in FORMS if form["tile_size"] != 1]
CASES += itertools.product([torch.float64], LARGER_TILES, [0.5], [True], OF_TWO_TEACHERS + THREE_CAPTIONS)


def embeddings(dtype, rows=ROWS, captions=None) -> dict[str, torch.Tensor]:
    """Student's and teacher's embeddings, of different dimensions, rounded to the precision of the case."""
    if captions is not None:
        images, texts = embeddings(dtype, rows), embeddings(dtype, rows * captions)
        return {name: x.view(rows, captions, -1) if "text" in name else images[name] for name, x in texts.items()}
    draw = torch.Generator().manual_seed(1)
    widths = {"image": 5, "text": 5, "teacher_image": 7, "teacher_text": 7, "second_image": 4, "second_text": 4}
    drawn = {k: torch.randn(rows, width, generator=draw, dtype=torch.float64) for k, width in widths.items()}
    return {name: F.normalize(tensor).to(dtype) for name, tensor in drawn.items()}


def ids_of(captions) -> torch.Tensor:
    """Caption ids of all pairs; with several captions an image, [ROWS, captions], of which some are equal."""
    ids = torch.tensor(IDS)
    return ids if captions is None else torch.stack([(ids + 5 * k) % 29 for k in range(captions)], dim=1)


def loss_and_gradients(
    tensors, *, ids, tile_size, gamma, ring=False, scale=9.0, teacher_scale=13.0, bias=-3.0, captions=None, **weights
):
    """(loss, gradients of "image", "text", "scale", "bias"), with an operation after the loss."""
    assert tensors["text"].ndim == (2 if captions is None else 3)
    precision = torch.float64 if tensors["image"].dtype == torch.float64 else torch.float32
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("image", "text")}
    leaves |= {"scale": torch.tensor(scale, dtype=precision, requires_grad=True)}
    leaves |= {"bias": torch.tensor(bias, dtype=precision, requires_grad=True)}
    teacher = {
        "teacher_image": tensors["teacher_image"],
        "teacher_text": tensors["teacher_text"],
        "teacher_logit_scale": torch.tensor(teacher_scale, dtype=precision),
        "teacher_logit_bias": torch.tensor(5.0, dtype=precision),
    }
    if "teacher_weights" in weights:
        second = [tensors["second_image"], tensors["second_text"], torch.tensor(7.0, dtype=precision), None]
        teacher = {name: [first, other] for (name, first), other in zip(teacher.items(), second, strict=True)}
    loss, _ = image_text_loss(
        image=leaves["image"],
        text=leaves["text"],
        logit_scale=leaves["scale"],
        logit_bias=leaves["bias"],
        **teacher,
        text_ids=ids,
        tile_size=tile_size,
        ring=ring,
        gamma=gamma,
        **(EVERYTHING | TEMPERATURES | weights),
    )
    (3 * loss).backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@cache
def oracle(dtype, gamma, with_ids, *kind):
    """`kind` as pairs of a name and a value; the same for all forms and numbers of processes."""
    captions = dict(kind).get("captions")
    tensors = {name: tensor.double() for name, tensor in embeddings(dtype, captions=captions).items()}
    ids = ids_of(captions) if with_ids else None
    return loss_and_gradients(tensors, ids=ids, tile_size=None, gamma=gamma, **dict(kind))


def rank_result(rank, world_size, dtype, form, gamma, with_ids, kind):
    own = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    captions = kind.get("captions")
    tensors = {name: tensor[own] for name, tensor in embeddings(dtype, captions=captions).items()}
    ids = ids_of(captions)[own] if with_ids else None
    return loss_and_gradients(tensors, ids=ids, gamma=gamma, **form, **kind)


def cases_of(world_size: int) -> list:
    """On several ranks one gamma will do for lower precisions: what they add is rounding."""
    return [case for case in CASES if world_size == 1 or case[0] == torch.float64 or case[2] == 0.5]


def rank_results(rank, world_size):
    return [rank_result(rank, world_size, *case) for case in cases_of(world_size)]


def joined(ranks):
    """The gradients averaged over ranks, as by DistributedDataParallel."""
    averaged = {name: torch.stack([g[name] for _, g in ranks]).mean(0) for name in ("scale", "bias")}
    return averaged | {name: torch.cat([g[name] for _, g in ranks]).double() / len(ranks) for name in ("image", "text")}


def max_error(actual: dict, expected: dict) -> float:
    """The largest difference, relative to the largest entry, or to 1 if that is smaller: the bias's exact gradient is
    0, the computed one rounding noise."""
    return max(((actual[k] - expected[k]).abs().max() / expected[k].abs().max().clamp_min(1)).item() for k in expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_form_gives_the_same_loss(world_size):
    by_rank = [rank_results(0, 1)] if world_size == 1 else run_ranks(rank_results, world_size)
    for case, *ranks in zip(cases_of(world_size), *by_rank, strict=True):
        dtype, _, gamma, with_ids, kind = case
        loss, gradients = oracle(dtype, gamma, with_ids, *kind.items())
        for value, _ in ranks:
            assert value.item() == pytest.approx(loss.item(), rel=LOSS_TOLERANCE[dtype]), case
        assert max_error(joined(ranks), gradients) < GRADIENT_TOLERANCE[dtype], case


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 41),
    tile=st.integers(1, 50),
    gamma=st.sampled_from([0, 0.05, 1]),
    num_ids=st.integers(1, 41),
    off=st.sampled_from([None, "contrastive_weight", "soft_ce_weight", "wmse_weight", "kl_weight"]),
    kind=st.sampled_from(KINDS + OF_TWO_TEACHERS),
    captions=st.sampled_from([None, 1, 2]),
)
def test_odd_sizes_tiles_and_missing_terms(rows, tile, gamma, num_ids, off, kind, captions):
    tensors = embeddings(torch.float64, rows, captions)
    ids = torch.arange(rows if captions is None else rows * captions) % num_ids
    options = {"ids": ids if captions is None else ids.view(rows, captions), "gamma": gamma, "captions": captions}
    options |= kind | ({off: 0} if off else {})
    loss, gradients = loss_and_gradients(tensors, tile_size=tile, **options)
    exact, exact_gradients = loss_and_gradients(tensors, tile_size=None, **options)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-10)
    assert max_error(gradients, exact_gradients) < 1e-10


@pytest.mark.parametrize("tile_size", [None, 16])
@pytest.mark.parametrize("gamma", [0, 0.5, 1])
@pytest.mark.parametrize("bias", [0.0, -50.0])
@pytest.mark.parametrize("lean", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sharp_logits_keep_their_digits_in_fp32(tile_size, gamma, bias, lean, kind):
    """Scale 100, and an offset of 50 between student and teacher: a bias, or a direction that embeddings share."""
    tensors = embeddings(torch.float32, 100)
    tensors |= {name: F.normalize(tensors[name] + lean * 5**-0.5) for name in ("image", "text")}
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    options = {"ids": None, "gamma": gamma, "scale": 100.0, "teacher_scale": 100.0, "bias": bias} | kind
    loss, gradients = loss_and_gradients(tensors, tile_size=tile_size, **options)
    exact_loss, exact_gradients = loss_and_gradients(exact, tile_size=None, **options)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    # An exponential preserves the absolute rounding error of its logit, 100 * 6e-8.
    assert max_error({k: v.double() for k, v in gradients.items()}, exact_gradients) < 1e-5


def test_scalars_for_the_log_are_the_same():
    draw = embeddings(torch.float64)
    student = {name: draw[name] for name in ("image", "text")} | {"logit_scale": torch.tensor(9.0)}
    teacher = {name: draw[name] for name in ("teacher_image", "teacher_text")}
    teacher |= {"teacher_logit_scale": torch.tensor(13.0)}
    second = {"teacher_image": draw["second_image"], "teacher_text": draw["second_text"]}
    second |= {"teacher_logit_scale": torch.tensor(7.0)}
    cases = [student, student | teacher, student | {name: [teacher[name], second[name]] for name in teacher}]
    several = {name: x for name, x in embeddings(torch.float64, captions=2).items() if "second" not in name}
    cases.append(student | teacher | several)
    for case in cases:
        ids = ids_of(2 if case["text"].ndim == 3 else None)
        (_, dense), (_, tiled) = (image_text_loss(**case, text_ids=ids, tile_size=t) for t in (None, 5))
        assert list(dense) == list(tiled)
        for name, value in dense.items():
            assert tiled[name].item() == pytest.approx(value.item(), rel=1e-6), name


def test_auto_is_dense_for_small_batches_and_tiled_for_large_ones(monkeypatch):
    tile_sizes = []
    monkeypatch.setattr(
        image_text, "_tiled_loss", lambda *arguments: tile_sizes.append(arguments[-2]) or (torch.zeros(()), {})
    )
    image = F.normalize(torch.randn(513, 3))
    for rows in (512, 513):
        image_text_loss(image=image[:rows], text=image[:rows], logit_scale=torch.tensor(9.0))
    assert tile_sizes == [image_text.CPU_TILE]


def test_auto_takes_larger_batches_dense_and_larger_tiles_on_a_gpu():
    sizes = [
        image_text._tile_size("auto", pairs=rows**2, ring=ring, device=torch.device("cuda"))
        for rows, ring in ((2048, False), (2049, False), (8, True))
    ]
    assert sizes == [None, image_text.GPU_TILE, image_text.GPU_TILE]


def test_a_tile_size_below_1_and_a_second_derivative_are_refused():
    image = torch.eye(3).requires_grad_()
    for form, message in (
        ({"tile_size": 0}, "tile_size must be at least 1, 'auto' or None, got 0"),
        ({"tile_size": None, "ring": True}, "ring=True needs tiles"),
    ):
        with pytest.raises(ValueError, match=message):
            image_text_loss(image=image, text=image, logit_scale=torch.tensor(9.0), **form)
    loss, _ = image_text_loss(image=image, text=image, logit_scale=torch.tensor(9.0), tile_size=2)
    with pytest.raises(RuntimeError, match="no second derivative: pass tile_size=None"):
        torch.autograd.grad(loss, image, create_graph=True)


# ---- in training: each rank has other rows, and DistributedDataParallel averages the gradients


class Encoder(torch.nn.Module):
    """Two linear towers, a scale and a bias, all of which DistributedDataParallel averages."""

    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(6, 5), torch.nn.Linear(4, 5)
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.bias = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, pixels, tokens):
        image, text = F.normalize(self.image(pixels), dim=1), F.normalize(self.text(tokens), dim=1)
        return {"image": image, "text": text, "logit_scale": self.log_scale.exp(), "logit_bias": self.bias}


def train_step(rank, world_size, dtype, with_ids, form):
    """Loss, averaged gradients and scalars, from this rank's part of the same pairs."""
    torch.manual_seed(0)
    encoder = Encoder().to(dtype)
    model = DistributedDataParallel(encoder) if world_size > 1 else encoder
    draw = torch.Generator().manual_seed(1)
    own = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    pixels, tokens, teacher_image, teacher_text = (
        torch.randn(ROWS, width, generator=draw, dtype=torch.float64).to(dtype)[own] for width in (6, 4, 7, 7)
    )
    teacher_image, teacher_text = F.normalize(teacher_image), F.normalize(teacher_text)
    output = model(pixels, tokens)
    loss, scalars = image_text_loss(
        **output,
        teacher_image=teacher_image,
        teacher_text=teacher_text,
        teacher_logit_scale=torch.tensor(11.0, dtype=dtype),
        text_ids=torch.tensor(IDS)[own] if with_ids else None,
        gamma=0.5,
        **form,
        **EVERYTHING,
        **TEMPERATURES,
    )
    loss = loss + 3 * mimicry_loss(
        image=output["image"],
        text=output["text"],
        teacher_image=teacher_image[:, :5],
        teacher_text=teacher_text[:, :5],
    )
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return {"loss": loss.detach()} | gradients, {name: value.item() for name, value in scalars.items()}


DENSE, TILED, RING = FORMS[0], {"tile_size": 5}, {"tile_size": 5, "ring": True}
STEPS = list(itertools.product((torch.float64, torch.float32), (True, False), (DENSE, TILED, RING)))


def train_steps(rank, world_size):
    return [train_step(rank, world_size, *step) for step in STEPS]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_train_as_one(world_size):
    by_rank = run_ranks(train_steps, world_size)
    for step, (one, scalars_of_one), *ranks in zip(STEPS, train_steps(0, 1), *by_rank, strict=True):
        for result, scalars in ranks:
            assert max_error(result, one) < LOSS_TOLERANCE[step[0]], step
            assert scalars == pytest.approx(scalars_of_one, rel=1e-5), step  # logged in fp32
            assert scalars == ranks[0][1], step
            assert all(torch.equal(result[name], ranks[0][0][name]) for name in result), step


# ---- the tests above detect errors


def ratio_of_own_rank(numerator, denominator):
    return numerator.sum() / denominator.sum()


def always_rank_0():
    return 0


def unchanged(x):
    return x


def gather_without_gradient(rows):
    return distributed.gather_rows(rows.detach())


def gather_with_own_gradient(rows):
    """open_clip's default: the gradient lacks the parts of the losses of other ranks."""
    parts = list(distributed.gather_rows(rows.detach()).chunk(distributed.world_size()))
    parts[distributed.rank()] = rows
    return torch.cat(parts)


def own_value(share):
    return share


# name: (module, function to replace, replacement, form, with captions' ids, whether the loss changes as well, not its
# gradient alone)
BREAKAGES = {
    "mean of ratios": (image_text, "ratio_of_sums", ratio_of_own_rank, DENSE, True, True),
    "wrong offset of the positives": (image_text, "rank", always_rank_0, DENSE, False, True),
    "gather without gradient": (image_text, "gather_rows", gather_without_gradient, DENSE, True, False),
    "gather with own gradient": (image_text, "gather_rows", gather_with_own_gradient, DENSE, True, False),
    "own value": (image_text, "global_value", own_value, DENSE, True, True),
    "tiled, wrong offset of own texts": (tiles, "rank", always_rank_0, TILED, True, True),
    "tiled, sums of own rank": (tiles, "sum_across_processes", unchanged, TILED, True, True),
    "ring, nothing is passed on": (tiles, "pass_on_ring", unchanged, RING, True, True),
    "ring, ratio of own rank": (tiles, "sum_across_processes", unchanged, RING, True, True),
    "tiled, gather without gradient": (image_text, "gather_rows", gather_without_gradient, TILED, True, False),
}


def broken_train_step(rank, world_size, breakage):
    module, name, replacement, form, with_ids, _ = BREAKAGES[breakage]
    assert callable(vars(module)[name])
    setattr(module, name, replacement)
    return train_step(rank, world_size, torch.float64, with_ids, form)[0]


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_function_is_detected(breakage):
    _, _, _, form, with_ids, changes_the_loss = BREAKAGES[breakage]
    one, _ = train_step(0, 1, torch.float64, with_ids, form)
    broken = run_ranks(broken_train_step, 2, breakage)
    assert max(max_error(result, one) for result in broken) > 1e-3
    assert any(abs(result["loss"] - one["loss"]) > 1e-4 for result in broken) == changes_the_loss
