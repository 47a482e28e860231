"""`gkl_vl.losses.gkl` computes the released GKL formula, value and gradients, at every setting, in O(nC).

The reference is the formula of jiequancui/DKL (DKLv2/KD-dkl/mdistiller/distillers/GKL_KD.py,
`dkl_loss`): all pairs of classes, [n, C, C].
"""

import inspect
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import Script, run_apart
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gkl_vl.losses import gkl

PUBLIC = [gkl.gkl_loss, gkl.ikl_loss, gkl.dkl_loss, gkl.kl_loss]
GAMMAS = [0.0, 0.05, 0.3, 1.0]
SHAPES = [(1, 2), (2, 2), (5, 3), (1, 41), (41, 41), (2, 101), (41, 101), (1, 1000), (2, 1000)]

# Tolerance of the loss, and of the gradients relative to their largest entry (single entries are differences
# that may cancel). The expected values are the reference in float64 on the same inputs.
TOLERANCE = {
    torch.float64: 1e-10,  # 1e6 roundings of 1e-16 would be within it
    torch.float32: 1e-5,  # 80 roundings of 1.2e-7: row sums are pairwise, so 1000 classes stay far below
}


def released(*, student, teacher, wmse_weight, soft_ce_weight, gamma, temperature, weight_temperature, class_prior):
    """The released formula over all pairs; weights without gradient (its KD teacher runs under no_grad)."""
    teacher_pairs = teacher[:, :, None] - teacher[:, None, :]
    student_pairs = student[:, :, None] - student[:, None, :]
    with torch.no_grad():
        base = torch.softmax(teacher / weight_temperature, 1) if class_prior is None else class_prior
        weight_pairs = base.pow(gamma)[:, :, None] @ base.pow(gamma)[:, None, :]
    wmse = 0.25 * ((teacher_pairs - student_pairs).pow(2) * weight_pairs).sum() / weight_pairs.sum()
    target = torch.softmax(teacher / temperature, 1).detach()
    soft_ce = -(target * torch.log_softmax(student / temperature, 1)).sum(1).mean()
    return wmse_weight * wmse + soft_ce_weight * soft_ce


def random_logits(n, classes, dtype=torch.float64, seed=0):
    """Logits of a student and a teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def random_prior(n, classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.softmax(2 * torch.randn(n, classes, generator=generator, dtype=torch.float64), 1).to(dtype)


def loss_and_gradients(loss, student, teacher):
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = loss(student=student, teacher=teacher)
    gradients = torch.autograd.grad(value, [student, teacher], allow_unused=True, materialize_grads=True)
    return value.detach(), *gradients


def assert_same(actual, expected, tolerance):
    """Compares loss, student gradient and teacher gradient, each to `tolerance` of its largest entry."""
    for a, b in zip(actual, expected, strict=True):
        b = b.to(torch.float64)
        assert_close(a.to(torch.float64), b, rtol=0, atol=tolerance * b.abs().max().item())


SETTINGS = dict(wmse_weight=1.5, soft_ce_weight=0.7, temperature=4.0, weight_temperature=2.0)


def assert_equals_released(student, teacher, *, class_prior=None, gamma=1.0, **options):
    """Compares with the reference in float64, to the tolerance of the student's dtype."""
    options = SETTINGS | options | {"gamma": gamma}
    prior64 = None if class_prior is None else class_prior.double()
    expected = loss_and_gradients(partial(released, class_prior=prior64, **options), student.double(), teacher.double())
    actual = loss_and_gradients(partial(gkl.gkl_loss, class_prior=class_prior, **options), student, teacher)
    assert_same(actual, expected, TOLERANCE[student.dtype])


# Equal to the released formula


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_prior", [False, True], ids=["teacher_weights", "class_prior"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gkl_is_the_released_formula(shape, gamma, with_prior, dtype):
    n, classes = shape
    student, teacher = random_logits(n, classes, dtype)
    prior = random_prior(n, classes, dtype) if with_prior else None
    assert_equals_released(student, teacher, class_prior=prior, gamma=gamma)
    assert gkl.gkl_loss(student=student, teacher=teacher).dtype == dtype


@pytest.mark.parametrize(
    "setting",
    [{"wmse_weight": 0.0}, {"soft_ce_weight": 0.0}, {"temperature": 0.5}, {"weight_temperature": 0.5}],
    ids=lambda setting: next(iter(setting)),
)
def test_every_parameter_matches_the_released_one(setting):
    student, teacher = random_logits(5, 7)
    assert_equals_released(student, teacher, gamma=0.3, **setting)
    default = gkl.gkl_loss(student=student, teacher=teacher, gamma=0.3)
    assert gkl.gkl_loss(student=student, teacher=teacher, gamma=0.3, **setting) != default


@given(
    n=st.integers(1, 9),
    classes=st.integers(1, 13),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.01, 10),
    gamma=st.floats(0, 2),
    temperature=st.floats(0.2, 10),
    weight_temperature=st.floats(0.2, 10),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_gkl_is_the_released_formula_at_any_setting(n, classes, seed, spread, gamma, temperature, weight_temperature):
    student, teacher = random_logits(n, classes, seed=seed)
    assert_equals_released(
        spread * student,
        spread * teacher,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=weight_temperature,
        wmse_weight=1.0,
        soft_ce_weight=0.0 if classes == 1 else 1.0,  # one class: every entry is 0, also in the reference
    )


def test_defaults_are_1_and_integers_are_accepted():
    student, teacher = random_logits(5, 7)
    ones = dict(wmse_weight=1, soft_ce_weight=1, gamma=1, temperature=1, weight_temperature=1, class_prior=None)
    loss = gkl.gkl_loss(student=student, teacher=teacher, **ones)
    assert_close(loss, released(student=student, teacher=teacher, **ones))
    assert loss == gkl.gkl_loss(student=student, teacher=teacher)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda a, b: (a / b).mean(), id="a_mean_over_rows"),
        pytest.param(lambda a, b: 2 * a.sum() / b.sum(), id="a_factor_of_two"),
        pytest.param(lambda a, b: (a.sum() / b.sum()).detach(), id="a_missing_gradient"),
    ],
)
def test_the_comparison_detects_errors(monkeypatch, wrong):
    monkeypatch.setattr(gkl, "ratio_of_sums", wrong)
    with pytest.raises(AssertionError, match="not close"):
        assert_equals_released(*random_logits(5, 7), gamma=0.3)


# Gradients


def test_gradients_pass_gradcheck_twice():
    student, teacher = (x.requires_grad_() for x in random_logits(3, 5))
    prior = random_prior(3, 5)

    def wmse(student, teacher):
        return gkl.gkl_loss(student=student, teacher=teacher, soft_ce_weight=0.0, gamma=0.3, class_prior=prior)

    assert torch.autograd.gradcheck(wmse, (student, teacher))
    assert torch.autograd.gradgradcheck(wmse, (student, teacher))
    assert torch.autograd.gradcheck(lambda s: gkl.gkl_loss(student=s, teacher=teacher, gamma=0.3), (student,))
    assert torch.autograd.gradcheck(lambda s, t: gkl.kl_loss(student=s, teacher=t, temperature=2.0), (student, teacher))


@pytest.mark.parametrize("loss", PUBLIC, ids=lambda loss: loss.__name__)
def test_the_loss_need_not_be_the_last_operation(loss):
    student, teacher = random_logits(5, 7)
    _, *alone = loss_and_gradients(loss, student, teacher)
    _, *scaled = loss_and_gradients(lambda **logits: -2.5 * loss(**logits), student, teacher)
    for a, b in zip(alone, scaled, strict=True):
        assert_close(-2.5 * a, b)


def test_soft_cross_entropy_and_prior_give_the_teacher_no_gradient():
    student, teacher = (x.requires_grad_() for x in random_logits(5, 7))
    prior = random_prior(5, 7).requires_grad_()
    loss = gkl.gkl_loss(student=student, teacher=teacher, wmse_weight=0.0, class_prior=prior)
    _, to_teacher, to_prior = torch.autograd.grad(loss, [student, teacher, prior], allow_unused=True)
    assert to_prior is None
    assert not to_teacher.any()


# Statements of the papers


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkl_has_the_gradients_of_kl(temperature):
    """arXiv 2305.13948, Theorem 1, and its form at a temperature."""
    student, teacher = random_logits(5, 7)
    dkl = partial(gkl.dkl_loss, temperature=temperature, weight_temperature=temperature, wmse_weight=temperature**-2)

    def torch_kl(*, student, teacher):
        logs = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
        return F.kl_div(*logs, reduction="batchmean", log_target=True)

    expected = loss_and_gradients(torch_kl, student, teacher)
    assert_same(loss_and_gradients(dkl, student, teacher)[1:], expected[1:], 1e-12)
    kl = partial(gkl.kl_loss, temperature=temperature)
    assert_same(loss_and_gradients(kl, student, teacher), expected, 1e-12)


def test_ikl_is_gkl_at_gamma_one_and_dkl_with_a_wmse_gradient_for_the_student():
    student, teacher = random_logits(5, 7)
    options = SETTINGS | {"class_prior": random_prior(5, 7)}
    ikl, at_one = (partial(f, **options) for f in (gkl.ikl_loss, partial(gkl.gkl_loss, gamma=1.0)))
    assert_same(loss_and_gradients(ikl, student, teacher), loss_and_gradients(at_one, student, teacher), 0)
    ikl = loss_and_gradients(partial(gkl.ikl_loss, **SETTINGS), student, teacher)
    dkl = loss_and_gradients(partial(gkl.dkl_loss, **SETTINGS), student, teacher)
    assert_close(ikl[0], dkl[0])
    assert_close(ikl[2], dkl[2])
    # wMSE is a function of t - s: its gradients for teacher and student are opposite
    assert_close(ikl[1], dkl[1] - dkl[2])


def test_dkl_with_a_frozen_teacher_has_the_gradient_of_soft_cross_entropy_only():
    student, teacher = random_logits(5, 7)
    soft_ce = loss_and_gradients(partial(gkl.gkl_loss, wmse_weight=0.0), student, teacher)[1]
    assert_close(loss_and_gradients(gkl.dkl_loss, student, teacher)[1], soft_ce)
    assert (loss_and_gradients(gkl.ikl_loss, student, teacher)[1] - soft_ce).abs().max() > 0.01


def test_gamma_zero_is_the_plain_variance_of_the_difference():
    student, teacher = random_logits(5, 7)
    wmse = gkl.gkl_loss(student=student, teacher=teacher, gamma=0.0, soft_ce_weight=0.0)
    assert_close(wmse, 0.5 * (teacher - student).var(dim=1, unbiased=False).mean())


def test_equal_logits_give_the_teachers_entropy():
    teacher = random_logits(5, 7)[1]
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    assert_close(gkl.gkl_loss(student=teacher + 3, teacher=teacher), entropy)
    assert_close(gkl.kl_loss(student=teacher + 3, teacher=teacher), torch.zeros_like(entropy))


def test_the_loss_is_the_ratio_of_row_sums_of_two_halves_and_not_the_mean_of_their_losses():
    student, teacher = random_logits(8, 7)
    weight = gkl.smooth_weight(teacher=teacher, gamma=0.3, weight_temperature=1.0)
    halves = [
        gkl.wmse_rows(student=student[half], teacher=teacher[half], weight=weight[half])
        for half in (slice(0, 3), slice(3, 8))
    ]
    full = gkl.gkl_loss(student=student, teacher=teacher, gamma=0.3, soft_ce_weight=0.0)
    assert_close(sum(a.sum() for a, _ in halves) / sum(b.sum() for _, b in halves), full)
    assert (sum(a.sum() / b.sum() for a, b in halves) / 2 - full).abs() > 1e-3 * full


# Numerical stability

LOSSES = {
    "gkl": partial(gkl.gkl_loss, gamma=0.3),
    "gkl, gamma 0": partial(gkl.gkl_loss, gamma=0.0),
    "gkl, prior": lambda **logits: gkl.gkl_loss(
        class_prior=random_prior(*logits["student"].shape), gamma=0.3, **logits
    ),
    "ikl": gkl.ikl_loss,
    "dkl": gkl.dkl_loss,
    "kl": gkl.kl_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_per_row_changes_nothing(name):
    # Multiples of 1/64 below 32, shifted by multiples of 1/2 up to 4096: the shifted float32 numbers are
    # exact, so that only the rounding of the loss remains.
    student, teacher = ((64 * x).round().clamp(-2000, 2000) / 64 for x in random_logits(5, 41))
    offset = torch.tensor([[0.0], [100.0], [-4096.0], [0.5], [1000.0]], dtype=torch.float64)
    plain = loss_and_gradients(LOSSES[name], student, teacher)
    for dtype, tolerance in TOLERANCE.items():
        shifted = (student + offset).to(dtype), (teacher - 2 * offset).to(dtype)
        assert_same(loss_and_gradients(LOSSES[name], *shifted), plain, tolerance)


def test_a_formula_without_centring_is_inaccurate():
    """At the offsets of the test above, in float32: that test can fail."""
    student, teacher = (x.float() for x in random_logits(5, 41))
    weight = torch.softmax(teacher, 1)
    difference = teacher - student + 4096
    uncentred = 0.5 * ((weight * difference.square()).sum(1) - (weight * difference).sum(1).square()).mean()
    wmse = gkl.gkl_loss(student=student, teacher=teacher + 4096, soft_ce_weight=0.0)
    assert (uncentred / wmse - 1).abs() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_huge_logits_stay_finite(name, dtype):
    signs = torch.tensor([[1, -1, 0, 1], [-1, 1, 1, -1], [1, 1, 1, 1], [0, 0, 0, 0]])
    student, teacher = (1e4 * signs).to(dtype), (1e4 * signs.roll(1, dims=1)).to(dtype)
    for number in loss_and_gradients(LOSSES[name], student, teacher):
        assert number.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher = random_logits(5, 41, dtype)
    half = loss_and_gradients(LOSSES[name], student, teacher)
    full = loss_and_gradients(LOSSES[name], student.float(), teacher.float())
    assert half[0].dtype == torch.float32 and half[1].dtype == dtype
    assert torch.equal(half[0], full[0])
    assert torch.equal(half[1], full[1].to(dtype)) and torch.equal(half[2], full[2].to(dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    student, teacher = random_logits(5, 41, torch.float32)
    plain = loss_and_gradients(LOSSES[name], student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(loss_and_gradients(LOSSES[name], student, teacher), plain, 0)


def test_zeros_in_the_prior_are_harmless():
    student, teacher = random_logits(3, 4, torch.float32)
    prior = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    for gamma in GAMMAS:
        numbers = loss_and_gradients(partial(gkl.gkl_loss, class_prior=prior, gamma=gamma), student, teacher)
        assert all(number.isfinite().all() for number in numbers)
    wmse_of_zeros = partial(gkl.gkl_loss, class_prior=0 * prior, soft_ce_weight=0.0)
    assert not any(number.any() for number in loss_and_gradients(wmse_of_zeros, student, teacher))
    assert_equals_released(student, teacher, class_prior=prior, gamma=0.0)  # 0^0 = 1, as in torch.pow
    assert_equals_released(student, teacher, class_prior=prior, gamma=0.3)


def test_weights_keep_classes_that_softmax_rounds_to_zero():
    teacher = torch.tensor([[0.0, -200.0]])
    assert torch.softmax(teacher, 1)[0, 1] == 0
    weight = gkl.smooth_weight(teacher=teacher, gamma=0.05, weight_temperature=1.0)
    assert_close(weight.log(), torch.tensor([[0.0, -10.0]]))


# Cost


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, including backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_is_larger_than_the_logits(name):
    with LargestTensor() as largest:
        loss_and_gradients(LOSSES[name], *random_logits(3, 17))
    assert largest.numel == 2 * 3 * 17  # random_logits draws both in one tensor


def test_the_largest_tensor_of_the_released_formula_is_recorded():
    with LargestTensor() as largest:
        loss_and_gradients(partial(released, gamma=0.3, class_prior=None, **SETTINGS), *random_logits(3, 17))
    assert largest.numel == 3 * 17 * 17


def test_gamma_zero_stores_one_number():
    weight = gkl.smooth_weight(teacher=torch.zeros(3, 17), gamma=0.0, weight_temperature=1.0)
    assert weight.shape == (3, 17) and weight.untyped_storage().nbytes() == weight.itemsize


@pytest.mark.parametrize("name", LOSSES)
def test_no_value_is_read_from_the_device(name):
    """On the meta device tensors have no values: .item(), bool() or a data-dependent shape would raise."""
    student = torch.empty(3, 5, device="meta", requires_grad=True)
    with torch.device("meta"):
        LOSSES["gkl" if name == "gkl, prior" else name](student=student, teacher=torch.empty(3, 5)).backward()
        gkl.gkl_loss(student=student, teacher=torch.empty(3, 5), class_prior=torch.empty(3, 5)).backward()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads memory from /proc")
def test_the_benchmark_runs(tmp_path):
    flags = ["--n", "4", "--classes", "9", "--repeats", "1"]
    script = Script(Path(__file__).parents[1] / "benchmarks" / "loss.py", flags, tmp_path)
    code, out, _ = run_apart(Script.run, script)
    assert code == 0 and "ratio" in out.splitlines()[-1]


# Invalid arguments


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"student": torch.zeros(2, 3, 1)}, r"student .*\[2, 3, 1\]"),
        ({"student": torch.zeros(3), "teacher": torch.zeros(3)}, r"student .*\[3\]"),
        ({"student": torch.zeros(0, 3), "teacher": torch.zeros(0, 3)}, r"student .*\[0, 3\]"),
        ({"teacher": torch.zeros(2, 4)}, r"teacher .*\[2, 3\], got \[2, 4\]"),
        ({"teacher": torch.zeros(3, 2)}, r"teacher .*\[2, 3\], got \[3, 2\]"),
        ({"class_prior": torch.zeros(3, 3)}, r"class_prior .*\[2, 3\].*got \[3, 3\]"),
        ({"gamma": -0.5}, r"gamma .*got -0.5"),
        ({"gamma": float("nan")}, r"gamma .*got nan"),
        ({"temperature": 0.0}, r"^temperature .*got 0.0"),
        ({"temperature": -1.0}, r"^temperature .*got -1.0"),
        ({"weight_temperature": 0}, r"weight_temperature .*got 0"),
        ({"weight_temperature": float("inf")}, r"weight_temperature .*got inf"),
    ],
    ids=str,
)
def test_errors_name_the_argument_and_the_value(wrong, message):
    functions = [f for f in PUBLIC if wrong.keys() <= inspect.signature(f).parameters.keys()]
    assert functions
    for function in functions:
        with pytest.raises(ValueError, match=message):
            function(**({"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 3)} | wrong))


@pytest.mark.parametrize("loss", PUBLIC, ids=lambda loss: loss.__name__)
def test_tensors_cannot_be_swapped_by_position(loss):
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(loss).parameters.values())
