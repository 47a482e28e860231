"""Semi-supervised learning: consistency losses between strong and weak views, and FlexMatch's thresholds.

A model (FixMatch, FlexMatch) or the moving average of its weights (Mean Teacher) predicts a weakly augmented view of an
unlabelled image; where its confidence reaches a threshold, the model is trained to the same prediction for a strongly
augmented view, by one of five consistency losses.

Sources: Sohn et al., NeurIPS 2020, arXiv 2001.07685 (FixMatch); Zhang et al., NeurIPS 2021, arXiv 2110.08263
(FlexMatch); Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780 (Mean Teacher); Wang et al., NeurIPS 2022, arXiv
2208.07204, microsoft/Semi-supervised-learning (USB, whose settings these are); Cui et al., arXiv 2305.13948,
jiequancui/DKL, `DKLv1/Semi-supervised-learning-dkl` (IKL in both).

Axis letters: u = unlabelled images of this process's batch, U = of all processes, C = classes, N = unlabelled images of
the set.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gkl_vl.distributed import gather_rows
from gkl_vl.losses.gkl import GklSettings, kl_rows, ratio_of_sums, smooth_weight, soft_cross_entropy_rows, wmse_rows

Method = Literal["supervised", "fixmatch", "flexmatch", "mean-teacher"]
Consistency = Literal["hard", "kl", "mse", "ikl", "gkl"]


@dataclass(frozen=True, kw_only=True)
class SemiSupervised:
    """A method, its consistency term and their settings. Defaults are USB's and DKL's."""

    method: Method = "fixmatch"
    """supervised = labelled images alone."""
    consistency: Consistency = "gkl"
    """See `consistency_loss`."""
    threshold: float = 0.95
    """Smallest probability of the likeliest class with which a pseudo-label is used (paper: tau)."""
    unlabelled_weight: float = 1.0
    """Weight of the consistency term (paper: lambda_u)."""
    rampup_steps: int = 0
    """Updates over which the weight grows linearly from 0; 0 = no ramp-up."""
    gkl: GklSettings = GklSettings(wmse_weight=0.1, gamma=0.5)
    """Settings of `gkl` and `ikl` (gamma 1). `temperature` divides the weak view's logits, also for `kl`."""
    class_prior: bool = False
    """GKL, IKL: weigh classes by the mean softmax over the pseudo-label's class in the pass before."""


def consistency_loss(
    *,
    strong: Float[Tensor, "u C"],
    weak: Float[Tensor, "u C"],
    mask: Bool[Tensor, " u"],
    prior: Float[Tensor, "u C"] | None,
    settings: SemiSupervised,
) -> Float[Tensor, ""]:
    """Distance between strong and weak views' predictions, 1/U sum_b m_b l_b over all images.

        hard   l = - log softmax(s)_argmax(w)                            FixMatch
        kl     l = KL(softmax(w / temperature) || softmax(s))            its soft form
        mse    l = 1/C sum_j (softmax(w)_j - softmax(s)_j)^2             Mean Teacher
        gkl    soft_ce_weight * soft CE + wmse_weight * wMSE             with gamma; `ikl` is gamma = 1

    s, w = strong, weak; soft CE has the target of `kl`. GKL's halves are those of `gkl.gkl_loss`, numerators masked:
    wMSE = 1/4 sum_b m_b sum_jk v_bj v_bk (d_bj - d_bk)^2 / sum_b (sum_j v_bj)^2, d = w - s, v = the classes' weights.
    Images outside the mask are in every denominator, as in FixMatch: few confident images give a small loss.

    Args:
        strong: logits of the student, in float32 or float64.
        weak: logits of the teacher; they get no gradient.
        mask: m, the images whose pseudo-label is used.
        prior: class prior of each pseudo-label, for `ikl` and `gkl`; None = the weak view's own softmax.

    All ranks, each with the same number of rows; the mean over ranks is the loss of the joined batch.
    """
    m, weak = mask.to(strong.dtype), weak.detach()
    if settings.consistency == "hard":
        return (m * F.cross_entropy(strong, weak.argmax(dim=1), reduction="none")).mean()
    if settings.consistency == "mse":
        return (m * (weak.softmax(dim=1) - strong.softmax(dim=1)).square().mean(dim=1)).mean()
    target = weak / settings.gkl.temperature
    if settings.consistency == "kl":
        return (m * kl_rows(student=strong, teacher=target, temperature=1)).mean()
    weight = smooth_weight(
        teacher=weak,
        gamma=1 if settings.consistency == "ikl" else settings.gkl.gamma,
        weight_temperature=settings.gkl.weight_temperature,
        class_prior=prior,
    )
    numerator, denominator = wmse_rows(student=strong, teacher=weak, weight=weight)
    wmse = ratio_of_sums(m * numerator, denominator)  # all ranks
    soft_ce = (m * soft_cross_entropy_rows(student=strong, teacher=target, temperature=1)).mean()
    return settings.gkl.wmse_weight * wmse + settings.gkl.soft_ce_weight * soft_ce


def rampup(settings: SemiSupervised, *, step: int) -> float:
    """Factor of the unlabelled weight after `step` updates, in [0, 1]."""
    return min(step / settings.rampup_steps, 1.0) if settings.rampup_steps else 1.0


def pseudo_label_scalars(
    *, weak: Float[Tensor, "u C"], mask: Bool[Tensor, " u"], hidden: Int[Tensor, " u"]
) -> dict[str, Float[Tensor, ""]]:
    """`mask_rate`, the share of images in the mask, and `pseudo_label_acc1`, the share of correct ones among those.

    The second is over images with a known label (hidden >= 0), and 0 if the mask has none of them. The mean over ranks
    is the value for all images. All ranks.
    """
    known = mask & (hidden >= 0)
    correct = known & (weak.argmax(dim=1) == hidden)
    return {"mask_rate": mask.float().mean(), "pseudo_label_acc1": ratio_of_sums(correct.float(), known.float())}


class ClassThresholds:
    """FlexMatch's thresholds: lower for classes with fewer confident pseudo-labels so far.

        threshold_c = threshold * b_c / (2 - b_c),   b_c = n_c / max(n_1, ..., n_C, n_none)

    n_c = images whose last confident pseudo-label was c, n_none = images that never had one: while these are the
    majority, all thresholds are low (the paper's warm-up). Equal on all ranks.

    Args:
        num_images: N.
        num_classes: C.
        threshold: of a fully learnt class, and of a confident pseudo-label.

    Source: arXiv 2110.08263, eqs. 5 to 10; USB's `FlexMatchThresholdingHook`.
    """

    def __init__(self, *, num_images: int, num_classes: int, threshold: float):
        self.num_classes, self.threshold = num_classes, threshold
        self.last = torch.full((num_images,), num_classes)  # last confident pseudo-label of each image; C = none

    def of(self, labels: Int[Tensor, " u"]) -> Float[Tensor, " u"]:
        """The threshold of each pseudo-label."""
        counts = torch.bincount(self.last, minlength=self.num_classes + 1)
        learnt = (counts[:-1] / counts.max()).to(labels.device)
        return (self.threshold * learnt / (2 - learnt))[labels]

    def update(self, *, index: Int[Tensor, " u"], labels: Int[Tensor, " u"], confidence: Float[Tensor, " u"]) -> None:
        """Stores the confident ones among these pseudo-labels. All ranks."""
        rows = torch.stack([index, labels, (confidence >= self.threshold).long()], dim=1)
        index, labels, confident = gather_rows(rows).cpu().unbind(dim=1)  # all ranks
        self.last[index[confident == 1]] = labels[confident == 1]
