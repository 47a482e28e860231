"""Label distillation: GKL and the methods that it is compared with, in one table.

All means are over the joined batch of all processes, as in `gkl.py`.
Axis letters: n = rows of this process, N = rows of all processes, C = classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gkl_vl.distributed import gather_rows
from gkl_vl.losses.gkl import GklSettings, check_logits, check_positive, dkl_loss, gkl_loss, kl_loss, upcast


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A method and its settings; each method uses its own. Defaults are GKL's for resnet56 -> resnet20."""

    method: str = "gkl"
    """A name of `METHODS`, or `ce`: labels alone."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the labels."""
    weight: float = 1.0
    """Weight of the distillation term of KD and DIST."""
    temperature: float = 4.0
    """Temperature of KD, KD on standardised logits, DKD and DIST."""
    gkl: GklSettings = GklSettings(wmse_weight=4, gamma=0.2, temperature=4, weight_temperature=4)
    """Settings of GKL, and of IKL and DKL, whose gamma is 1."""
    class_prior: bool = True
    """GKL, IKL: weigh classes by the teacher's mean softmax over the label's class in the epoch before."""
    warmup_epochs: int = 20
    """Epochs over which the distillation term grows linearly; 0 = no warm-up."""
    target_weight: float = 1.0
    """Weight of DKD's target-class term (paper: alpha), and of DIST's inter-class term (paper: beta)."""
    other_weight: float = 2.0
    """Weight of DKD's non-target term (paper: beta), and of DIST's intra-class term (paper: gamma)."""


def distillation_loss(
    *,
    student: Float[Tensor, "n C"],
    teacher: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    prior: Float[Tensor, "n C"] | None,
    settings: Distillation,
) -> Float[Tensor, ""]:
    """The distillation term of the method, without cross entropy and warm-up. All ranks."""
    return METHODS[settings.method](student, teacher, labels, prior, settings)


# ---- losses ------------------------------------------------------------------------------------------------------


@no_type_check
def kd_loss(
    *, student: Float[Tensor, "n C"], teacher: Float[Tensor, "n C"], temperature: float = 4.0
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(t / T) || softmax(s / T)) in nats, mean over rows. Source: Hinton et al., arXiv 1503.02531."""
    return temperature**2 * kl_loss(student=student, teacher=teacher, temperature=temperature)


@no_type_check
def dkd_loss(
    *,
    student: Float[Tensor, "n C"],
    teacher: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    target_weight: float = 1.0,
    other_weight: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """Decoupled KD: KD split into target-class and non-target terms, mean over rows.

        T^2 (target_weight KL(b_t || b_s) + other_weight KL(q_t || q_s))

    b = (p_label, 1 - p_label), q = p without the label's class, normalised, p = softmax(logits / T). Nats.
    Errors as in `gkl_loss`. Source: Zhao et al., CVPR 2022, arXiv 2203.08679, eq. 7.
    """
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    target = F.one_hot(labels, student.shape[1]).bool()
    (s_binary, s_log_q), (t_binary, t_log_q) = (
        _split_at_label(upcast(logits) / temperature, target, labels) for logits in (student, teacher.detach())
    )
    binary = kl_loss(student=s_binary, teacher=t_binary)
    q = t_log_q.exp().masked_fill(target, 0.0)
    other = (q * (t_log_q - s_log_q)).sum(dim=1).mean()
    return temperature**2 * (target_weight * binary + other_weight * other)


def _split_at_label(
    logits: Float[Tensor, "n C"], target: Bool[Tensor, "n C"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n C"]]:
    """Logits of the label's class and of all others together; log q, with 0 in place of the label's class."""
    others = logits.masked_fill(target, -torch.inf)
    rest = others.logsumexp(dim=1, keepdim=True)
    # -inf - rest would give NaN gradients
    return torch.cat([logits.gather(1, labels[:, None]), rest], dim=1), (others - rest).masked_fill(target, 0.0)


@no_type_check
def dist_loss(
    *,
    student: Float[Tensor, "n C"],
    teacher: Float[Tensor, "n C"],
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """DIST: one minus Pearson's correlation of student and teacher, over classes and over rows.

        T^2 (inter_weight (1 - mean_i r(p_s[i, :], p_t[i, :])) + intra_weight (1 - mean_c r(p_s[:, c], p_t[:, c])))

    r is Pearson's correlation, p = softmax(logits / T). Columns have the rows of all processes.
    Source: Huang et al., NeurIPS 2022, arXiv 2205.10536, eqs. 7 and 8.
    """
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    p_student, p_teacher = (
        gather_rows(torch.softmax(upcast(logits) / temperature, dim=1)) for logits in (student, teacher.detach())
    )
    inter = 1 - _correlation(p_student, p_teacher).mean()
    intra = 1 - _correlation(p_student.T, p_teacher.T).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def _correlation(x: Float[Tensor, "a b"], y: Float[Tensor, "a b"]) -> Float[Tensor, " a"]:
    return F.cosine_similarity(x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True), dim=1, eps=1e-8)


def standardised(logits: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """The z-score of each row. Source: Sun et al., CVPR 2024, arXiv 2403.01427 (with C - 1, as released)."""
    logits = upcast(logits)
    return (logits - logits.mean(dim=1, keepdim=True)) / (1e-7 + logits.std(dim=1, keepdim=True))


# ---- methods -----------------------------------------------------------------------------------------------------


def _kd(student, teacher, labels, prior, s):
    return s.weight * kd_loss(student=student, teacher=teacher, temperature=s.temperature)


def _standardised_kd(student, teacher, labels, prior, s):
    return _kd(standardised(student), standardised(teacher), labels, prior, s)


def _dkd(student, teacher, labels, prior, s):
    return dkd_loss(
        student=student,
        teacher=teacher,
        labels=labels,
        target_weight=s.target_weight,
        other_weight=s.other_weight,
        temperature=s.temperature,
    )


def _dist(student, teacher, labels, prior, s):
    weights = {"inter_weight": s.target_weight, "intra_weight": s.other_weight}
    return s.weight * dist_loss(student=student, teacher=teacher, temperature=s.temperature, **weights)


def _dkl(student, teacher, labels, prior, s):
    settings = {name: value for name, value in vars(s.gkl).items() if name != "gamma"}
    return dkl_loss(student=student, teacher=teacher, **settings)


def _ikl(student, teacher, labels, prior, s):
    return gkl_loss(student=student, teacher=teacher, class_prior=prior, **vars(replace(s.gkl, gamma=1.0)))


def _gkl(student, teacher, labels, prior, s):
    return gkl_loss(student=student, teacher=teacher, class_prior=prior, **vars(s.gkl))


METHODS: dict[str, Callable[..., Tensor]] = {
    "kd": _kd,
    "kd-ls": _standardised_kd,
    "dkd": _dkd,
    "dist": _dist,
    "dkl": _dkl,
    "ikl": _ikl,
    "gkl": _gkl,
}
"""(student, teacher, labels, prior, settings) -> loss."""
