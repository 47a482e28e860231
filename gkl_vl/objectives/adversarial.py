"""Adversarial training: the attack's schedule, the loss that it maximises, and the loss that is minimised.

Sources: Zhang et al., ICML 2019, arXiv 1901.08573 (TRADES); Cui et al., arXiv 2305.13948 (IKL) and 2503.08038 (GKL);
jiequancui/DKL, `DKLv2/Adv-training-dkl/train_dkl_cifar100.py` and `train_dkl_cifar10.py`.

Axis letters: n = images of this process, C = classes.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gkl_vl.losses.gkl import GklSettings, gkl_loss, kl_loss, upcast
from gkl_vl.losses.image_text import global_value, scalars_of_all_ranks
from gkl_vl.models.classifiers import scaled
from gkl_vl.models.modes import evaluating
from gkl_vl.objectives.common import EpochPrior, accuracy
from gkl_vl.protocols import Batch, Objective
from gkl_vl.robustness.pgd import Norm, pgd, weights_perturbed

Method = Literal["natural", "trades", "ikl", "gkl"]
Budget = Literal["low", "high", "ladder", "trades"]
Logits = Float[Tensor, "n C"]


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    """A method and its settings; each method uses its own. Defaults are GKL's on CIFAR-100."""

    method: Method = "gkl"
    """natural = the labels' cross entropy alone, no attack."""
    epochs: int = 200
    norm: Norm = "linf"
    epsilon: float = 8 / 255
    """Radius of the attack in the last epoch, in pixel values of [0, 1]."""
    budget: Budget = "high"
    """See `strength`."""
    kl_weight: float = 6.0
    """TRADES: weight of the KL divergence (paper: 1 / lambda, code: beta)."""
    gkl: GklSettings = GklSettings(soft_ce_weight=4, wmse_weight=20, gamma=0.4)
    """Settings of GKL, and of IKL, whose gamma is 1. The released code has only the weight temperature."""
    attack_wmse_weight: float = 1.0
    """wMSE weight in the loss that the attack maximises; its soft CE weight and gamma are 1."""
    class_prior: bool = True
    """GKL, IKL: weigh classes by the model's mean softmax over the label's class in the epoch before."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy."""
    second_view_weight: float = 0.5
    """Weight of the second view's distance between attacked and natural logits."""
    awp_gamma: float = 0.005
    """Norm of the weight perturbation relative to that of the weights; 0 = none."""
    awp_epoch: int = 10
    """First epoch, counted from 1, with weight perturbation."""


class Strength(NamedTuple):
    """Arguments of `robustness.pgd.pgd`."""

    epsilon: float
    step_size: float
    steps: int


def strength(settings: AdversarialTraining, *, epoch: int) -> Strength:
    """The attack of an epoch, counted from 0. E = `settings.epochs`, e = epoch + 1.

        low     2 steps of eps, with eps growing: epsilon e / E
        high    5 steps of eps / 2, eps growing
        ladder  2 steps of eps to e = E / 4, 3 of 2/3 eps to E / 2, 4 of eps / 2 to 3/4 E, then 5; eps growing
        trades  10 steps of epsilon / 4, epsilon from the start

    `high` is what the released scripts do: they intend `ladder`, but write it as consecutive `if`s without `else`, so
    that the last branch always wins.
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
    """The weighted distance between attacked and natural logits that is minimised; it has gradients for both.

    The mean over processes is the loss of the joined batch, as for `gkl_loss`. All ranks.
    """
    if settings.method == "trades":
        return settings.kl_weight * kl_loss(student=attacked, teacher=natural)
    gkl = replace(settings.gkl, gamma=1.0) if settings.method == "ikl" else settings.gkl
    return gkl_loss(student=attacked, teacher=natural, class_prior=prior, **vars(gkl))


def attack_loss(
    *, attacked: Logits, natural: Logits, prior: Logits | None, settings: AdversarialTraining
) -> Float[Tensor, ""]:
    """The distance that the attack maximises: KL for TRADES, else IKL with soft CE weight 1. All ranks."""
    if settings.method == "trades":
        return kl_loss(student=attacked, teacher=natural)
    return gkl_loss(
        student=attacked,
        teacher=natural,
        wmse_weight=settings.attack_wmse_weight,
        weight_temperature=settings.gkl.weight_temperature,
        class_prior=prior,
    )


class MultiBatch(nn.Module):
    """Applies a model to several batches in one call.

    DistributedDataParallel allows one forward call per step, and BatchNorm needs the statistics of each batch apart.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batches: list[Tensor]) -> list[Tensor]:
        return [self.model(batch) for batch in batches]


@dataclass(kw_only=True)
class Adversarial(Objective):
    """Cross entropy of natural images plus the distance between attacked and natural logits.

    If batches have a second view, both views are attacked and passed through the model as one batch, as in the released
    code.
    """

    model: MultiBatch
    """The trained model, not wrapped by Accelerate; it takes pixels in [0, 1]."""
    settings: AdversarialTraining
    prior: EpochPrior | None
    """The model's mean softmax over the natural images of each class."""

    def prepare(self, batch: Batch) -> Batch:
        """Adds `views`, the inputs of the model: attacked and natural images, or natural ones alone. All ranks."""
        images = [batch[name] for name in ("image", "second_image") if name in batch]
        natural = torch.cat([scaled(view) for view in images])
        labels = batch["label"].repeat(len(images))
        if self.settings.method == "natural":
            return batch | {"labels": labels, "views": [natural]}
        prior = None if self.prior is None else self.prior.rows(labels, epoch=batch["epoch"])
        attacked = self._attacked(natural, prior, batch["epoch"])
        return batch | {"labels": labels, "views": [attacked, natural]} | ({} if prior is None else {"prior": prior})

    def _attacked(self, images: Tensor, prior: Tensor | None, epoch: int) -> Tensor:
        settings, model = self.settings, self.model.model
        with evaluating(model), torch.no_grad():
            natural = upcast(model(images))

        def objective(logits: Tensor) -> Tensor:
            loss = attack_loss(attacked=upcast(logits), natural=natural, prior=prior, settings=settings)
            return len(images) * loss  # the sum: float16 would round the gradients of the mean to 0

        epsilon, step_size, steps = strength(settings, epoch=epoch)
        return pgd(model, images, loss=objective, epsilon=epsilon, step_size=step_size, steps=steps, norm=settings.norm)

    def around_update(self, batches: list[Batch]) -> AbstractContextManager[None]:
        """Adversarial weight perturbation from `awp_epoch` on; its loss weighs both views equally."""
        settings, (batch,) = self.settings, batches
        if settings.method == "natural" or not settings.awp_gamma or batch["epoch"] + 1 < settings.awp_epoch:
            return nullcontext()

        def loss() -> Tensor:
            attacked, natural = (upcast(logits) for logits in self.model(batch["views"]))
            ce = F.cross_entropy(natural, batch["labels"], label_smoothing=settings.label_smoothing)
            prior = batch.get("prior")
            return ce + robust_loss(attacked=attacked, natural=natural, prior=prior, settings=settings)

        return weights_perturbed(self.model, loss=loss, gamma=settings.awp_gamma)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`attacked` (if any) and `natural` logits of each view: a row per sample."""
        n = len(batch["label"])
        logits = [upcast(both).split(n) for both in model(batch["views"])]
        names = ("attacked", "natural")[-len(logits) :]
        by_name = zip(names, logits, strict=True)
        return {f"{name}_{view}": rows for name, views in by_name for view, rows in enumerate(views)}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Labels, and the prior of each label, which both views share."""
        labels = batch["label"]
        return {"labels": labels} | ({"prior": batch["prior"][: len(labels)]} if "prior" in batch else {})

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """CE(natural) + distance; a second view's is weighted. Equal on all ranks. Called once per update."""
        settings, labels = self.settings, targets["labels"]
        natural = [outputs[name] for name in ("natural_0", "natural_1") if name in outputs]
        smoothing = settings.label_smoothing
        ce = torch.stack([F.cross_entropy(view, labels, label_smoothing=smoothing) for view in natural]).mean()
        scalars = {"ce": ce.detach(), "batch_acc1": accuracy(natural[0], labels)}
        if settings.method == "natural":
            return global_value(ce), scalars_of_all_ranks(scalars)
        if self.prior is not None:
            self.prior.update(natural[0].detach(), labels)
        robust = torch.zeros_like(ce)
        for view, weight in zip(range(len(natural)), (1.0, settings.second_view_weight), strict=False):
            attacked = outputs[f"attacked_{view}"]
            prior = targets.get("prior")
            term = robust_loss(attacked=attacked, natural=natural[view], prior=prior, settings=settings)
            robust = robust + weight * term
        scalars |= {"robust": robust.detach(), "batch_robust_acc1": accuracy(outputs["attacked_0"], labels)}
        return global_value(ce + robust), scalars_of_all_ranks(scalars)

    def state(self) -> dict[str, Tensor]:
        return {} if self.prior is None else self.prior.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.prior is not None:
            self.prior.load_state(state)
