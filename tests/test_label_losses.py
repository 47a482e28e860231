"""The label methods equal their published formulas, in value and gradient, in one process and in several.

The references are the papers' formulas with a loop over rows (for DIST also over columns), in float64.
"""

import itertools
from functools import partial

import pytest
import torch
from helpers import run_ranks
from torch.testing import assert_close

from gkl_vl import distributed
from gkl_vl.losses import gkl, labels
from gkl_vl.losses.gkl import GklSettings, dkl_loss, gkl_loss
from gkl_vl.losses.labels import METHODS, Distillation, dist_loss, distillation_loss, dkd_loss, kd_loss, standardised

# Relative to the largest entry, or to 0.1 where that is smaller: with two classes the gradients of kd-ls and DIST
# within a row are 0 except for rounding. fp64: 1e6 roundings of 1e-16; fp32: 80 of 1.2e-7.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
FLOOR = 0.1
SHAPES = [(1, 2), (1, 41), (2, 3), (5, 2), (41, 3), (7, 41), (3, 100)]


def drawn(n, classes, dtype=torch.float64, seed=0, spread=3.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, prior = spread * torch.randn(3, n, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator)
    prior = torch.softmax(prior, 1)
    return {"student": student.to(dtype), "teacher": teacher.to(dtype), "labels": labels, "prior": prior.to(dtype)}


def value_and_gradient(loss, student):
    student = student.detach().clone().requires_grad_()
    value = loss(student=student)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def farthest(got, want) -> float:
    """The largest difference of values or gradients, relative as for TOLERANCE."""
    return max(
        ((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(FLOOR)).item()
        for a, b in zip(got, want, strict=True)
    )


# ---- the formulas ------------------------------------------------------------------------------------------------


def kl(p, q):
    return (p * (p / q).log()).sum()


def naive_kd(*, student, teacher, labels, temperature):
    rows = [
        kl(torch.softmax(t / temperature, 0), torch.softmax(s / temperature, 0))
        for s, t in zip(student, teacher, strict=True)
    ]
    return temperature**2 * sum(rows) / len(rows)


def naive_z_scores(logits):
    """The released code adds 1e-7 to the deviation."""
    rows = []
    for row in logits:
        mean = row.sum() / len(row)
        deviation = ((row - mean).square().sum() / (len(row) - 1)).sqrt()
        rows.append((row - mean) / (1e-7 + deviation))
    return torch.stack(rows)


def naive_standardised_kd(*, student, teacher, labels, temperature):
    scores = {"student": naive_z_scores(student), "teacher": naive_z_scores(teacher)}
    return naive_kd(**scores, labels=labels, temperature=temperature)


def naive_dkd_parts(s, t, label, temperature):
    """TCKD and NCKD of a row, without T^2."""
    others = [c for c in range(len(s)) if c != label]
    q, p = torch.softmax(s / temperature, 0), torch.softmax(t / temperature, 0)
    binary_q, binary_p = (torch.stack([x[label], x[others].sum()]) for x in (q, p))
    within_q, within_p = (torch.softmax(x[others] / temperature, 0) for x in (s, t))
    return kl(binary_p, binary_q), kl(within_p, within_q)


def naive_dkd(*, student, teacher, labels, target_weight, other_weight, temperature):
    total = 0
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        tckd, nckd = naive_dkd_parts(s, t, label, temperature)
        total = total + target_weight * tckd + other_weight * nckd
    return temperature**2 * total / len(student)


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())


def naive_dist(*, student, teacher, labels, inter_weight, intra_weight, temperature):
    p = torch.stack([torch.softmax(row / temperature, 0) for row in teacher])
    q = torch.stack([torch.softmax(row / temperature, 0) for row in student])
    n, classes = p.shape
    loss = inter_weight * (1 - sum(pearson(q[i], p[i]) for i in range(n)) / n)
    if intra_weight:  # a single row has no correlation within a class
        loss = loss + intra_weight * (1 - sum(pearson(q[:, c], p[:, c]) for c in range(classes)) / classes)
    return temperature**2 * loss


def without_labels(loss):
    return lambda *, labels, **arguments: loss(**arguments)


def standardised_kd(*, student, teacher, temperature):
    return kd_loss(student=standardised(student), teacher=standardised(teacher), temperature=temperature)


DKD = {"target_weight": 0.7, "other_weight": 3.0}
DIST = {"inter_weight": 0.7, "intra_weight": 3.0}
INTER_ONLY = {"inter_weight": 0.7, "intra_weight": 0}
# Name: implementation, the paper's formula, settings.
FORMULAS = {
    "kd": (without_labels(kd_loss), naive_kd, {}),
    "kd-ls": (without_labels(standardised_kd), naive_standardised_kd, {}),
    "dkd": (dkd_loss, naive_dkd, DKD),
    "dkd, target alone": (dkd_loss, naive_dkd, DKD | {"other_weight": 0}),
    "dist": (without_labels(dist_loss), naive_dist, DIST),
    "dist, rows alone": (without_labels(dist_loss), naive_dist, INTER_ONLY),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_losses_equal_their_published_formulas(name, dtype):
    ours, published, options = FORMULAS[name]
    for shape, temperature in itertools.product(SHAPES, (1, 4.0)):
        if name == "dist" and shape[0] == 1:
            continue  # a single row has no correlation within a class
        arguments = drawn(*shape, dtype)
        student, teacher, labels = arguments["student"], arguments["teacher"], arguments["labels"]
        fixed = {"labels": labels, "temperature": temperature} | options
        got = value_and_gradient(partial(ours, teacher=teacher, **fixed), student)
        want = value_and_gradient(partial(published, teacher=teacher.double(), **fixed), student.double())
        assert got[0].dtype == got[1].dtype == dtype
        assert farthest(got, want) < TOLERANCE[dtype], (shape, temperature)


def test_the_z_scores_have_mean_0_and_deviation_1_at_any_scale():
    logits = drawn(5, 41)["student"]
    scores = standardised(logits)
    assert_close(scores, naive_z_scores(logits), rtol=0, atol=1e-12)
    assert_close(scores.square().sum(1), torch.full((5,), 40.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(scores, standardised(7 * logits - 3), rtol=1e-6, atol=1e-6)


def test_kd_is_dkd_with_the_teachers_non_target_probability_as_weight():
    """Zhao et al.'s eq. 5, KD = TCKD + (1 - p_label) NCKD, row by row: each row has its weight."""
    temperature, arguments = 2.0, drawn(9, 6)
    for row in range(9):
        student, teacher, labels = (arguments[name][row : row + 1] for name in ("student", "teacher", "labels"))
        non_target = 1 - torch.softmax(teacher / temperature, 1)[0, labels[0]].item()
        whole = kd_loss(student=student, teacher=teacher, temperature=temperature)
        parts = {"labels": labels, "temperature": temperature, "target_weight": 1.0, "other_weight": non_target}
        assert_close(dkd_loss(student=student, teacher=teacher, **parts), whole, rtol=1e-12, atol=1e-12)
        parts["other_weight"] = 1.0
        assert not torch.isclose(dkd_loss(student=student, teacher=teacher, **parts), whole, rtol=1e-3)


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_the_teacher_gets_no_gradient(name):
    arguments = drawn(5, 7)
    student, teacher = arguments["student"].requires_grad_(), arguments["teacher"].requires_grad_()
    loss, _, options = FORMULAS[name]
    loss(student=student, teacher=teacher, labels=arguments["labels"], temperature=4.0, **options).backward()
    assert teacher.grad is None and student.grad.abs().max() > 1e-3


# ---- every method ------------------------------------------------------------------------------------------------

# All values differ, to detect a setting that is passed to the wrong argument.
SETTINGS = dict(weight=1.7, temperature=3.5, target_weight=0.9, other_weight=4.5)
GKL = dict(soft_ce_weight=0.6, wmse_weight=2.5, gamma=0.3, temperature=3.0, weight_temperature=2.0)


def by_method(method, *, student, teacher, labels, prior, gkl=None, **changed):
    settings = Distillation(method=method, gkl=GklSettings(**(GKL | (gkl or {}))), **(SETTINGS | changed))
    return distillation_loss(student=student, teacher=teacher, labels=labels, prior=prior, settings=settings)


FAMILY = dict(wmse_weight=2.5, soft_ce_weight=0.6, temperature=3.0, weight_temperature=2.0)
BY_HAND = {
    "kd": lambda both, labels, prior: 1.7 * kd_loss(**both, temperature=3.5),
    "kd-ls": lambda both, labels, prior: 1.7 * standardised_kd(**both, temperature=3.5),
    "dkd": lambda both, labels, prior: dkd_loss(
        **both, labels=labels, target_weight=0.9, other_weight=4.5, temperature=3.5
    ),
    "dist": lambda both, labels, prior: 1.7 * dist_loss(**both, inter_weight=0.9, intra_weight=4.5, temperature=3.5),
    "dkl": lambda both, labels, prior: dkl_loss(**both, **FAMILY),
    "ikl": lambda both, labels, prior: gkl_loss(**both, **FAMILY, gamma=1.0, class_prior=prior),
    "gkl": lambda both, labels, prior: gkl_loss(**both, **FAMILY, gamma=0.3, class_prior=prior),
}


def of_table_and_by_hand(method, *, student, prior, teacher, labels):
    rest = {"teacher": teacher, "labels": labels, "prior": prior}
    ours = value_and_gradient(partial(by_method, method, **rest), student)
    by_hand = value_and_gradient(
        lambda student: BY_HAND[method]({"student": student, "teacher": teacher}, labels, prior), student
    )
    return ours, by_hand


@pytest.mark.parametrize("with_prior", [True, False])
def test_every_method_of_the_table_equals_its_formula(with_prior):
    assert list(BY_HAND) == list(METHODS)
    arguments = drawn(5, 7)
    arguments["prior"] = arguments["prior"] if with_prior else None
    results = {method: of_table_and_by_hand(method, **arguments) for method in METHODS}
    for method, (ours, by_hand) in results.items():
        assert all(torch.equal(a, b) for a, b in zip(ours, by_hand, strict=True)), method
    for (ours, _), (others, _) in itertools.combinations(results.values(), 2):
        assert farthest(ours, others) > 1e-3  # DKL and IKL differ in the gradient only


def test_only_ikl_and_gkl_use_the_class_prior():
    arguments = drawn(5, 7)
    without = arguments | {"prior": None}
    affected = {m for m in METHODS if by_method(m, **arguments) != by_method(m, **without)}
    assert affected == {"ikl", "gkl"}


GKLS = {"dkl", "ikl", "gkl"}
OTHERS = set(METHODS) - GKLS
READ = {
    "weight": {"kd", "kd-ls", "dist"},
    "soft_ce_weight": {"dkl", "ikl", "gkl"},
    "wmse_weight": {"dkl", "ikl", "gkl"},
    "gamma": {"gkl"},
    "weight_temperature": {"dkl", "ikl", "gkl"},
    "target_weight": {"dkd", "dist"},
    "other_weight": {"dkd", "dist"},
}


@pytest.mark.parametrize("setting", READ)
def test_every_setting_is_read_by_its_methods_and_no_others(setting):
    arguments = drawn(5, 7) | {"prior": None}
    changed = {"gkl": {setting: 2 * GKL[setting]}} if setting in GKL else {setting: 2 * SETTINGS[setting]}
    assert {m for m in METHODS if by_method(m, **arguments, **changed) != by_method(m, **arguments)} == READ[setting]


def test_gkls_methods_have_a_temperature_apart():
    arguments = drawn(5, 7) | {"prior": None}
    before = {method: by_method(method, **arguments) for method in METHODS}
    for changed, methods in (({"temperature": 7.0}, OTHERS), ({"gkl": {"temperature": 6.0}}, GKLS)):
        assert {m for m in METHODS if by_method(m, **arguments, **changed) != before[m]} == methods


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
@pytest.mark.parametrize("method", METHODS)
def test_a_temperature_that_is_not_positive_is_refused(method, temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        by_method(method, **drawn(5, 7), temperature=temperature, gkl={"temperature": temperature})


@pytest.mark.parametrize("shape", [(1, 7), (5, 8)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_of_another_shape_is_refused_and_not_broadcast(method, shape):
    inputs = drawn(5, 7)
    arguments = (inputs["student"], drawn(*shape)["teacher"], inputs["labels"], None, Distillation(method=method))
    with pytest.raises(ValueError, match=r"teacher must have the student's shape \[5, 7\]"):
        METHODS[method](*arguments)  # not `distillation_loss`, for which the suite's shape checker would raise first


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_float32(method):
    """The loss equals that of the rounded numbers bit for bit; the gradient is rounded once more."""
    for dtype in (torch.bfloat16, torch.float16):
        arguments = drawn(5, 41, dtype) | {"prior": drawn(5, 41, torch.float32)["prior"]}
        student, rest = arguments.pop("student"), arguments
        exact = rest | {"teacher": rest["teacher"].float()}
        value, gradient = value_and_gradient(partial(by_method, method, **rest), student)
        wanted, wanted_gradient = value_and_gradient(partial(by_method, method, **exact), student.float())
        assert value.dtype == torch.float32 and torch.equal(value, wanted)
        assert gradient.dtype == dtype and torch.equal(gradient, wanted_gradient.to(dtype))


def extremes(dtype):
    """Logits of -100 and 100: opposite signs, one class above all others, and constant rows."""
    signs = torch.sign(drawn(4, 7)["student"])
    one = 200 * torch.eye(7, dtype=torch.float64)[:4] - 100
    constant = torch.full((4, 7), 100.0, dtype=torch.float64)
    pairs = [
        (100 * signs, -100 * signs),
        (one, one.roll(1, 0)),
        (one, one),
        (-one, one),
        (one, constant),
        (constant, one),
    ]
    return [(student.to(dtype), teacher.to(dtype)) for student, teacher in pairs]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_extreme_logits_stay_finite(method, dtype):
    largest = 0.0
    for student, teacher in extremes(dtype):
        for temperature in (1, 4):
            rest = {"teacher": teacher, "labels": torch.arange(4), "prior": None, "temperature": temperature}
            value, gradient = value_and_gradient(partial(by_method, method, **rest), student)
            assert value.isfinite() and gradient.isfinite().all()
            largest = max(largest, value.item())
    assert largest > 1


def test_dist_of_a_single_row_is_finite():
    arguments = drawn(1, 7)
    loss = partial(FORMULAS["dist"][0], teacher=arguments["teacher"], labels=None, temperature=1.0, **DIST)
    value, gradient = value_and_gradient(loss, arguments["student"])
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 1e-6


# ---- several processes -------------------------------------------------------------------------------------------

ROWS, CLASSES = 24, 7
CASES = [(method, with_prior) for method in METHODS for with_prior in (True, False)]


def share(rank, world_size, method, with_prior):
    """Value and gradient on the rows of a rank."""
    own = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    rest = {name: tensor[own] for name, tensor in drawn(ROWS, CLASSES).items()}
    student = rest.pop("student")
    rest["prior"] = rest["prior"] if with_prior else None
    return value_and_gradient(partial(by_method, method, **rest), student)


def all_shares(rank, world_size):
    return [share(rank, world_size, *case) for case in CASES]


def joined(shares):
    """Values and gradients averaged over ranks, as DistributedDataParallel does."""
    values, gradients = zip(*shares, strict=True)
    return torch.stack(values).mean(), torch.cat(gradients) / len(shares)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_mean_over_processes_is_the_loss_of_the_joined_batch(world_size):
    by_rank = run_ranks(all_shares, world_size)
    for case, one, *shares in zip(CASES, all_shares(0, 1), *by_rank, strict=True):
        assert farthest(joined(shares), one) < 1e-10, case
        assert not torch.equal(shares[0][1], shares[1][1]), case  # the rows differ


# The comparison can fail. Each breakage: module, function, replacement, and the methods whose result changes. The
# weights of DKL and IKL sum to 1 in every row: their denominator is the number of rows, the same on all ranks.


def ratio_of_own_rank(numerator, denominator):
    return numerator.sum() / denominator.sum()


def rows_of_own_rank(rows):
    return rows


def rows_with_own_gradient(rows):
    """Own rows keep the gradient of this rank's loss; that of the other ranks' losses is lost."""
    parts = list(distributed.gather_rows(rows.detach()).chunk(distributed.world_size()))
    parts[distributed.rank()] = rows
    return torch.cat(parts)


BREAKAGES = [
    (gkl, "ratio_of_sums", ratio_of_own_rank, {"gkl"}),
    (labels, "gather_rows", rows_of_own_rank, {"dist"}),
    (labels, "gather_rows", rows_with_own_gradient, {"dist"}),
]


def broken_shares(rank, world_size):
    shares = []
    for module, name, replacement, _ in BREAKAGES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, replacement)
            shares.append({method: share(rank, world_size, method, False) for method in METHODS})
    return shares


def test_the_comparison_can_fail():
    by_rank = run_ranks(broken_shares, 2)
    for (_, _, replacement, expected), *ranks in zip(BREAKAGES, *by_rank, strict=True):
        distance = {m: farthest(joined([rank[m] for rank in ranks]), share(0, 1, m, False)) for m in METHODS}
        assert {m for m in METHODS if distance[m] > 1e-3} == expected, replacement
        assert {m for m in METHODS if distance[m] > 1e-10} == expected, replacement
