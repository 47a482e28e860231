"""Adversarial training: how strong the attack of an epoch is, what it raises, and what is trained on.

Sources: Zhang et al., ICML 2019, arXiv 1901.08573 (TRADES); Cui et al., arXiv 2305.13948 (IKL) and 2503.08038 (GKL);
jiequancui/DKL, `DKLv2/Adv-training-dkl/train_dkl_cifar100.py` and `train_dkl_cifar10.py`.

Axis letters: n = my images, C = classes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from gkl_vl.attacks import Norm
from gkl_vl.gkl import Number, gkl_loss, kl_loss

Method = Literal["natural", "trades", "ikl", "gkl"]
Budget = Literal["low", "high", "ladder", "trades"]
Logits = Float[Tensor, "n C"]


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    """A method and its settings; each method reads those that it has. Defaults are GKL's on CIFAR-100."""

    method: Method = "gkl"
    """natural = the labels' cross entropy alone, no attack."""
    epochs: int = 200
    norm: Norm = "linf"
    epsilon: Number = 8 / 255
    """Of the last epoch; in pixels of [0, 1]."""
    budget: Budget = "high"
    """See `strength`."""
    kl_weight: Number = 6.0
    """TRADES (paper: 1 / lambda, code: beta)."""
    soft_ce_weight: Number = 4.0
    wmse_weight: Number = 20.0
    gamma: Number = 0.4
    """Of GKL; IKL's is 1."""
    attack_wmse_weight: Number = 1.0
    """Of the loss that the attack raises, whose soft CE has weight 1 and whose gamma is 1."""
    class_prior: bool = True
    """GKL, IKL: weigh classes by what the model thought of the label's class in the epoch before."""
    prior_temperature: Number = 1.0
    """Of the softmax that the prior, or without one the weights, come from."""
    label_smoothing: Number = 0.0
    """Of the labels' cross entropy."""
    second_view_weight: Number = 0.5
    """Of the second view's distance between attacked and natural logits."""
    awp_gamma: Number = 0.005
    """Length of the weights' perturbation, relative to theirs; 0 = none."""
    awp_epoch: int = 10
    """The first epoch, counted from 1, whose weights are perturbed."""


class Strength(NamedTuple):
    """Of an attack: `attacks.pgd`'s arguments."""

    epsilon: float
    step_size: float
    steps: int


def strength(settings: AdversarialTraining, *, epoch: int) -> Strength:
    """The attack of an epoch, counted from 0. E = `settings.epochs`, e = epoch + 1.

        low     2 steps of eps, with eps growing: epsilon e / E
        high    5 steps of eps / 2, eps growing
        ladder  2 steps of eps to e = E / 4, 3 of 2/3 eps to E / 2, 4 of eps / 2 to 3/4 E, then 5; eps growing
        trades  10 steps of epsilon / 4, epsilon from the start

    `high` is what the released scripts do: they mean `ladder`, but write it as a row of `if`s without `else`, so that
    the last one always has its way.
    """
    if settings.budget == "trades":
        return Strength(float(settings.epsilon), settings.epsilon / 4, 10)
    epoch += 1
    epsilon = settings.epsilon * epoch / settings.epochs
    if settings.budget == "low":
        return Strength(epsilon, epsilon, 2)
    quarter = 4 * epoch / settings.epochs
    if settings.budget == "high" or quarter > 3:
        return Strength(epsilon, epsilon / 2, 5)
    if quarter > 2:
        return Strength(epsilon, epsilon / 2, 4)
    return Strength(epsilon, 2 * epsilon / 3, 3) if quarter > 1 else Strength(epsilon, epsilon, 2)


def robust_loss(
    *, attacked: Logits, natural: Logits, prior: Logits | None, settings: AdversarialTraining
) -> Float[Tensor, ""]:
    """The distance between an image's two logits that is trained down, weighted; gradient reaches both.

    Across processes as `gkl_loss` is: the mean of what they get is the loss of the joined batch. All ranks.
    """
    if settings.method == "trades":
        return settings.kl_weight * kl_loss(student=attacked, teacher=natural)
    return gkl_loss(
        student=attacked,
        teacher=natural,
        wmse_weight=settings.wmse_weight,
        soft_ce_weight=settings.soft_ce_weight,
        gamma=1.0 if settings.method == "ikl" else settings.gamma,
        weight_temperature=settings.prior_temperature,
        class_prior=prior,
    )


def raised_loss(
    *, attacked: Logits, natural: Logits, prior: Logits | None, settings: AdversarialTraining
) -> Float[Tensor, ""]:
    """The distance that the attack raises: KL for TRADES, else IKL at weights of 1. All ranks."""
    if settings.method == "trades":
        return kl_loss(student=attacked, teacher=natural)
    return gkl_loss(
        student=attacked,
        teacher=natural,
        wmse_weight=settings.attack_wmse_weight,
        weight_temperature=settings.prior_temperature,
        class_prior=prior,
    )


# ---- CLIP --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageAttack:
    """What is done to a CLIP student's images in training: `steps` steps of `step_size`, from TRADES's start.

    The attack raises GKL between the student's image-text logits of the attacked images and the teacher's of the clean
    ones, at the weights here, without a teacher the contrastive loss; text is left alone.
    """

    norm: Norm
    epsilon: Number
    """In pixels of [0, 1], at the size that the student takes; for l2 the length of an image's difference."""
    steps: int = 3
    step_size: Number
    soft_ce_weight: Number = 1.0
    wmse_weight: Number = 0.0
    """As in IKL's attack on CIFAR-10."""


USUAL_CLIP_EPSILON: dict[Norm, str] = {"linf": "4/255", "l2": "0.5"}
"""As in the work on robust CLIPs (Schlarmann et al., ICML 2024), and RobustBench's for CIFAR-10."""


def image_attack(norm: Norm, epsilon: Number) -> ImageAttack:
    """Of this radius: 3 steps of 2/3 epsilon, as `strength`'s ladder has it in the second quarter of training."""
    return ImageAttack(norm=norm, epsilon=epsilon, step_size=2 * epsilon / 3)
