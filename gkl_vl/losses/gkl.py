"""The GKL family of divergences between student and teacher logits: KL, DKL, IKL, GKL, and the class prior.

Axis letters: n = rows of this process, C = classes (or candidates). All are pure functions of tensors; only
`ClassPrior` has state.

Sources
    DKL and IKL: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024, arXiv 2305.13948.
    GKL:         Cui et al., "Generalized Kullback-Leibler Divergence Loss", TPAMI 2026, arXiv 2503.08038.
    Code:        jiequancui/DKL, `DKLv2/KD-dkl/mdistiller/distillers/GKL_KD.py` (distillation) and
                 `DKLv2/Adv-training-dkl/train_dkl_cifar100.py` (adversarial training, class prior).

Names. In the paper alpha is the weight of wMSE and beta that of the soft cross entropy; the authors' code swaps them:
`BETA` multiplies wMSE, `ALPHA` the soft cross entropy. Hence `wmse_weight` and `soft_ce_weight` here.

Not to be confused with `optax.losses.generalized_kl_divergence`, the Bregman divergence of unnormalised
measures.

Cost. The definition compares all pairs of classes, an [n, C, C] tensor. Centring makes that O(nC), exactly
(see `wmse_rows`). The NeurIPS appendix has it as Algorithm 2 for weights that sum to 1, and CSD (arXiv
2509.25837) derives the same weighted centring for language models.
"""

import math
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gkl_vl.distributed import sum_across_processes, world_size


@dataclass(frozen=True, kw_only=True)
class GklSettings:
    """Weights and temperatures of GKL, as arguments of `gkl_loss`."""

    soft_ce_weight: float = 1.0
    """Weight of the soft cross entropy (paper: beta)."""
    wmse_weight: float = 1.0
    """Weight of the weighted MSE of logit differences (paper: alpha)."""
    gamma: float = 1.0
    """Exponent of the wMSE's class weights: 0 = uniform weights, 1 = the teacher's softmax (IKL)."""
    temperature: float = 1.0
    """Temperature of the soft cross entropy."""
    weight_temperature: float = 1.0
    """Temperature of the softmax for the wMSE's weights or for the class prior."""

    @property
    def counts(self) -> bool:
        """Whether one of the halves has a weight."""
        return bool(self.soft_ce_weight or self.wmse_weight)


# The public losses check shapes with messages of their own. `no_type_check` exempts them from the test suite's shape
# checker, which would raise first; the functions that they call are checked.


@no_type_check
def gkl_loss(
    *,
    student: Float[Tensor, "n C"],
    teacher: Float[Tensor, "n C"],
    wmse_weight: float = 1.0,
    soft_ce_weight: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Float[Tensor, "n C"] | None = None,
) -> Float[Tensor, ""]:
    """Generalized KL divergence, a scalar: `wmse_weight * wMSE + soft_ce_weight * softCE`.

        wMSE   = 1/4 sum_b sum_jk w_bj w_bk ((t_bj - t_bk) - (s_bj - s_bk))^2 / sum_b (sum_j w_bj)^2
        w      = SG(softmax(t / weight_temperature))^gamma, or class_prior^gamma
        softCE = 1/n sum_b sum_j - SG(softmax(t_b / temperature))_j log_softmax(s_b / temperature)_j

    SG is stop-gradient. wMSE has gradients with respect to both `student` and `teacher` (detach a teacher that is
    not to be trained, or run it under no_grad); in adversarial training `student` are the logits of the attacked
    image and `teacher` those of the natural one. Differences are of raw logits, without temperature, and soft
    CE has no factor temperature^2: both as in the released code. wMSE is in squared logits, soft CE in nats.

    Args:
        student, teacher: logits [n, C]. Half precision is computed in float32, float64 in float64.
        wmse_weight: paper alpha, code BETA.
        soft_ce_weight: paper beta, code ALPHA.
        gamma: 1 = the weights of IKL, 0 = uniform weights; published settings use 0 to 0.6.
        temperature: of the soft cross entropy, code T.
        weight_temperature: of the per-sample weights, code T2; ignored when `class_prior` is given.
        class_prior: probabilities [n, C], the prior's row of each sample's label (`ClassPrior.rows`), without
            gradient; None = the teacher's softmax.

    With several processes, all of them must call it with the same number of rows: the mean of their values is the loss
    of the joined batch, and the mean of their gradients, as by DistributedDataParallel, is its gradient.

    Raises:
        ValueError: shapes that are not [n, C] or differ, gamma < 0, a temperature <= 0.

    Source: arXiv 2503.08038; `dkl_loss` in `GKL_KD.py` (see the top of this file).
    """
    settings = GklSettings(
        soft_ce_weight=soft_ce_weight,
        wmse_weight=wmse_weight,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=weight_temperature,
    )
    wmse, soft_ce = gkl_halves(student=student, teacher=teacher, settings=settings, class_prior=class_prior)
    return wmse_weight * wmse + soft_ce_weight * soft_ce


@no_type_check
def gkl_halves(
    *,
    student: Float[Tensor, "n C"],
    teacher: Float[Tensor, "n C"],
    settings: GklSettings,
    class_prior: Float[Tensor, "n C"] | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """wMSE and softCE of `gkl_loss`, without their weights; arguments, processes and errors as in `gkl_loss`."""
    check_logits(student, teacher)
    check_positive("temperature", settings.temperature)
    check_positive("weight_temperature", settings.weight_temperature)
    check_gamma(settings.gamma)
    _check_class_prior(class_prior, student)
    student, teacher = upcast(student), upcast(teacher)
    weight = smooth_weight(
        teacher=teacher,
        gamma=settings.gamma,
        weight_temperature=settings.weight_temperature,
        class_prior=class_prior,
    )
    wmse = ratio_of_sums(*wmse_rows(student=student, teacher=teacher, weight=weight))
    return wmse, soft_cross_entropy_rows(student=student, teacher=teacher, temperature=settings.temperature).mean()


@no_type_check
def ikl_loss(
    *,
    student: Float[Tensor, "n C"],
    teacher: Float[Tensor, "n C"],
    wmse_weight: float = 1.0,
    soft_ce_weight: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Float[Tensor, "n C"] | None = None,
) -> Float[Tensor, ""]:
    """Improved KL divergence: `gkl_loss` with gamma = 1; the other arguments and the errors are the same.

    It differs from DKL in two points: wMSE has a gradient with respect to the student as well, so that it also trains
    with a frozen teacher, and its weights may be the class prior. Source: arXiv 2305.13948, section 3.
    """
    return gkl_loss(
        student=student,
        teacher=teacher,
        wmse_weight=wmse_weight,
        soft_ce_weight=soft_ce_weight,
        gamma=1.0,
        temperature=temperature,
        weight_temperature=weight_temperature,
        class_prior=class_prior,
    )


@no_type_check
def dkl_loss(
    *,
    student: Float[Tensor, "n C"],
    teacher: Float[Tensor, "n C"],
    wmse_weight: float = 1.0,
    soft_ce_weight: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Decoupled KL divergence: KL(teacher || student) as two terms with separate weights.

        wmse_weight * wMSE(SG(s), t; w = SG(softmax(t / weight_temperature)))
            + soft_ce_weight * softCE(SG(softmax(t / temperature)), s)

    wMSE has a gradient with respect to the teacher only, soft CE with respect to the student only. With all defaults
    both gradients equal those of `kl_loss` (arXiv 2305.13948, Theorem 1); the values differ. At another temperature T
    they are equal with temperature = weight_temperature = T and wmse_weight = 1 / T^2. With a frozen teacher only soft
    CE has a gradient.

    Arguments and errors as in `gkl_loss`.
    """
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    check_positive("weight_temperature", weight_temperature)
    student, teacher = upcast(student), upcast(teacher)
    weight = smooth_weight(teacher=teacher, gamma=1.0, weight_temperature=weight_temperature)
    wmse = ratio_of_sums(*wmse_rows(student=student.detach(), teacher=teacher, weight=weight))
    soft_ce = soft_cross_entropy_rows(student=student, teacher=teacher, temperature=temperature).mean()
    return wmse_weight * wmse + soft_ce_weight * soft_ce


@no_type_check
def kl_loss(
    *, student: Float[Tensor, "n C"], teacher: Float[Tensor, "n C"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """KL(softmax(t / temperature) || softmax(s / temperature)) in nats, mean over rows.

    No factor temperature^2. Gradients with respect to both sides (detach a teacher that is not to be trained).
    Logits [n, C]; half precision is computed in float32. Errors as in `gkl_loss`.
    """
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    return kl_rows(student=upcast(student), teacher=upcast(teacher), temperature=temperature).mean()


# Building blocks: one number per row, from float32 or float64. The caller takes the mean: with rows on several
# processes it is a ratio of two sums, which are summed over processes first and divided once.


def smooth_weight(
    *,
    teacher: Float[Tensor, "n C"],
    gamma: float,
    weight_temperature: float,
    class_prior: Float[Tensor, "n C"] | None = None,
) -> Float[Tensor, "n C"]:
    """Weights of the classes in each row, `base^gamma`, without gradient.

    base = softmax(teacher / weight_temperature), or `class_prior`. With gamma = 0 all weights are 1, also where the
    prior is 0 (a read-only expanded view of one number, without a softmax).
    """
    if gamma == 0:
        return teacher.new_ones(()).expand_as(teacher)
    if class_prior is not None:
        return class_prior.detach().to(teacher.dtype).pow(gamma)
    # softmax(.)^gamma = exp(gamma * log_softmax(.)), also exact for classes that softmax would round to 0
    return torch.exp(gamma * torch.log_softmax(teacher.detach() / weight_temperature, dim=1))


def mean_logits(
    *, teachers: list[Float[Tensor, "n C"]], weights: list[float] | tuple[float, ...]
) -> Float[Tensor, "n C"]:
    """sum_k weights_k teachers_k; the weights have sum 1."""
    if len(teachers) == 1:
        return teachers[0]
    return torch.stack([weight * teacher for weight, teacher in zip(weights, teachers, strict=True)]).sum(dim=0)


def wmse_rows(
    *, student: Float[Tensor, "n C"], teacher: Float[Tensor, "n C"], weight: Float[Tensor, "n C"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Numerator and denominator of wMSE for each row: wMSE = numerator.sum() / denominator.sum().

        numerator_b   = 1/2 W_b sum_j w_bj (d_bj - mu_b)^2,   d = t - s, W_b = sum_j w_bj,
                        mu_b = sum_j w_bj d_bj / W_b
        denominator_b = W_b^2

    In squared logits. Gradients with respect to `student` and `teacher`; `weight` (>= 0) must have none.
    """
    # 1/4 sum_jk w_j w_k (d_j - d_k)^2 = 1/2 W sum_j w_j (d_j - mu)^2. Centred before squaring: sum w d^2 - W mu^2
    # loses all digits of float32 when student and teacher differ by an offset. mu is not detached although its
    # gradient is 0 in exact arithmetic: it cancels the rounding error of mu, and second derivatives need it.
    total = weight.sum(dim=1)
    # a row of zero weights contributes 0, not NaN
    safe_total = total.clamp_min(torch.finfo(total.dtype).tiny)
    difference = teacher - student
    centred = difference - ((weight * difference).sum(dim=1) / safe_total).unsqueeze(1)
    return 0.5 * total * (weight * centred.square()).sum(dim=1), total.square()


def soft_cross_entropy_rows(
    *, student: Float[Tensor, "n C"], teacher: Float[Tensor, "n C"], temperature: float
) -> Float[Tensor, " n"]:
    """- sum_j SG(softmax(t / temperature))_j log_softmax(s / temperature)_j of each row, in nats."""
    target = torch.softmax(teacher.detach() / temperature, dim=1)
    return -(target * torch.log_softmax(student / temperature, dim=1)).sum(dim=1)


def kl_rows(*, student: Float[Tensor, "n C"], teacher: Float[Tensor, "n C"], temperature: float) -> Float[Tensor, " n"]:
    """KL(softmax(t / temperature) || softmax(s / temperature)) of each row, in nats; with gradients for both."""
    log_target = torch.log_softmax(teacher / temperature, dim=1)
    return (log_target.exp() * (log_target - torch.log_softmax(student / temperature, dim=1))).sum(dim=1)


class ClassPrior:
    """The teacher's mean prediction for each class: `prior[c]` = mean of softmax(logits / T) over samples of class c.

    The class-wise global information ("GI") of IKL and GKL. `prior` [C, C] starts uniform, 1/C; every step
    calls `rows(labels)` for the loss and `update(logits, labels)` with the teacher's logits (the natural logits
    in adversarial training); `end_epoch()` makes the means of this epoch the prior of the next. The tensors are
    moved to the device of the labels and logits. Sums are float64: float32 would lose the small probabilities
    of a class with millions of samples.

    The row of a class without samples in the epoch is uniform; the released code divides 0 by 0.
    Source: arXiv 2305.13948, section 3; jiequancui/DKL, `DKLv2/KD-dkl/mdistiller/engine/trainer.py`.

    Args:
        num_classes: C.
        temperature: T2 of the released distillation code, T of the adversarial one.
    """

    def __init__(self, num_classes: int, temperature: float) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        check_positive("temperature", temperature)
        self.num_classes = num_classes
        self.temperature = temperature
        self.prior = torch.full((num_classes, num_classes), 1 / num_classes)
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64)

    @no_type_check
    def update(self, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> None:
        """Adds softmax(logits / temperature) of each sample to the sums of its label. Without gradient."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits must be [n, {self.num_classes}], got {list(logits.shape)}")
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels must be [{logits.shape[0]}] like the logits, got {list(labels.shape)}")
        self._move_to(logits.device)
        probabilities = torch.softmax(upcast(logits.detach()) / self.temperature, dim=1)
        self.sums.index_add_(0, labels.to(logits.device), probabilities.to(self.sums.dtype))

    def rows(self, labels: Int[Tensor, " n"]) -> Float[Tensor, "n C"]:
        """The prior of each sample's label [n, C], for the `class_prior` argument of the losses."""
        self._move_to(labels.device)
        return self.prior[labels]

    def end_epoch(self) -> None:
        """Sums over processes, normalises the rows to the new prior, and resets the sums. All ranks must call it."""
        sums = sum_across_processes(self.sums)  # all ranks
        counts = sums.sum(dim=1, keepdim=True)  # each sample's softmax adds 1
        self.prior = torch.where(counts > 0, sums / counts, 1 / self.num_classes).to(self.prior.dtype)
        self.sums = torch.zeros_like(self.sums)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state: the current prior and the sums of this process."""
        return {"prior": self.prior.clone(), "sums": self.sums.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a copy of the state. Raises: ValueError if num_classes differs."""
        for name in ("prior", "sums"):
            if state[name].shape != self.prior.shape:
                expected, got = list(self.prior.shape), list(state[name].shape)
                raise ValueError(f"{name} in the saved state must be {expected}, got {got}")
        self.prior = state["prior"].to(self.prior, copy=True)
        self.sums = state["sums"].to(self.sums, copy=True)

    def _move_to(self, device: torch.device) -> None:
        self.prior, self.sums = self.prior.to(device), self.sums.to(device)


def upcast(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Converts half precision to float32; returns float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ratio_of_sums(numerator: Float[Tensor, " n"], denominator: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """This process's share of sum(numerator) / sum(denominator) over the rows of all processes, times their number.

    The mean of the ratios of single processes differs: 1.3278 instead of 1.2359 on 8 rows over 4 ranks. `denominator`
    must have no gradient.
    """
    total = sum_across_processes(denominator.sum())  # all ranks
    return world_size() * numerator.sum() / total.clamp_min(torch.finfo(total.dtype).tiny)


# Checks of shapes and Python numbers, not of tensor values, which would synchronise with the GPU.


def check_logits(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.numel() == 0:
        raise ValueError(f"student must be logits [n, C], n and C at least 1, got {list(student.shape)}")
    if teacher.shape != student.shape:
        shapes = f"{list(student.shape)}, got {list(teacher.shape)}"
        raise ValueError(f"teacher must have the student's shape {shapes}")


def _check_class_prior(class_prior: Tensor | None, student: Tensor) -> None:
    if class_prior is not None and class_prior.shape != student.shape:
        raise ValueError(
            f"class_prior must have the student's shape {list(student.shape)} (one row per sample, see "
            f"ClassPrior.rows), got {list(class_prior.shape)}"
        )


def check_gamma(gamma: float) -> None:
    if not 0 <= gamma < math.inf:  # false for NaN as well
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
