"""A linear probe: logistic regression on a frozen model's image embeddings, the regularisation chosen on a part of the
training set and never on the test set.

Embeddings are taken as they are, not standardised, as in the CLIP paper. Everything runs where the features are.

Axis letters: n = images, d = embedding, C = classes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor
from tqdm import tqdm

from gkl_vl.errors import UserError
from gkl_vl.evaluate import lift, multilabel_metrics, top_k_accuracy
from gkl_vl.gkl import Number

VALIDATION_SHARE = 0.2
FEW_SHOT_VALIDATION_SHARE = 0.5  # of so few, a fifth would say nothing
MAX_ITERATIONS = 1000
COARSE = (-6, -4, -2, 0, 2, 4, 6)  # log10 of c
FINEST = 0.125
ROUGHLY = 1e-5  # tolerance of the fits that c is chosen by: less than half the time, and hardly another choice
UNTUNED = 1.0  # c where there is nothing to choose it on


@dataclass(frozen=True)
class LinearClassifier:
    """logits = weight x + bias."""

    weight: Float[Tensor, "C d"]
    bias: Float[Tensor, " C"]

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """In the precision of the weights."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias


@dataclass(frozen=True)
class Probe:
    """A classifier, and how its regularisation was chosen."""

    classifier: LinearClassifier
    c: Number
    validation: Number
    """Top-1 accuracy, or mean average precision, of the part held out of the training set, at this c; nan for none."""


def fit(
    *,
    features: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"],
    num_classes: int,
    c: Number,
    start: LinearClassifier | None = None,
    tolerance: float = 1e-7,
) -> LinearClassifier:
    """L2-regularised logistic regression:

        argmin_{W, b}  sum_i loss(W x_i + b, t_i) + ||W||^2 / (2 c)

    with the cross entropy of the softmax for labels, and the sum over classes of that of the sigmoid for [n, C] targets
    of 0 and 1. c is scikit-learn's C; the bias is free. By L-BFGS with strong Wolfe line search, at most 1,000
    iterations, in fp32 or the features' wider precision.

    Args:
        start: where to begin, say the solution for a neighbouring c; None = 0.
        tolerance: of the largest derivative of the objective over n, at which it ends.

    Source: Radford et al., ICML 2021, arXiv 2103.00020, appendix A.3.
    """
    features = lift(features)
    n, d = features.shape
    # Weights that are held to 0 are solved for in units in which their penalty is no larger than what it is added to.
    unit = min(math.sqrt(c * n), 1.0)
    weight = features.new_zeros(num_classes, d) if start is None else start.weight / unit
    bias = features.new_zeros(num_classes) if start is None else start.bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    # The mean and not the sum: its gradients are of one size for all n, and so are the tolerances.
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        history_size=10,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = unit * features @ weight.T + bias
        if targets.ndim == 1:
            loss = F.cross_entropy(logits, targets)
        else:
            each = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
            loss = each.sum(dim=1).mean()
        loss = loss + (unit * weight).square().sum() / (2 * c * n)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearClassifier(unit * weight.detach(), bias.detach())


def probe(
    *,
    features: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"],
    num_classes: int,
    shots: int | None = None,
    seed: int = 0,
) -> Probe:
    """The probe of a training set, c chosen from 1e-6 to 1e6 on a part of it (a fifth; half of the shots).

    c is searched as in the CLIP paper: on a coarse grid, then around the best with half the step, down to an eighth of
    a decade; of equally good ones the smallest, which regularises most. The final fit takes the whole training set, or
    all shots, at that c. One shot leaves nothing to choose on: c = 1.

    Args:
        targets: labels, or 0 and 1 by class.
        shots: so many images of each class, drawn by seed, are the whole training set; None = all images. Labels only.
        seed: of the shots and of the part that is held out.

    Raises:
        UserError: labels beyond num_classes, fewer than two classes, features that are not finite, too few images.
    """
    _check(features, targets, num_classes, shots)
    share = VALIDATION_SHARE
    if shots is not None:
        chosen = few_shot(targets, shots=shots, seed=seed)
        features, targets, share = features[chosen], targets[chosen], FEW_SHOT_VALIDATION_SHARE
    kept, held = split(targets, share=share, seed=seed)
    c, validation = UNTUNED, math.nan
    if len(held):
        c, validation = _choose(features, targets, kept, held, num_classes)
    return Probe(fit(features=features, targets=targets, num_classes=num_classes, c=c), c, validation)


def _choose(features: Tensor, targets: Tensor, kept: Tensor, held: Tensor, num_classes: int) -> tuple[Number, Number]:
    """The best c on the held-out part, and its score there."""
    scores: dict[Number, Number] = {}
    start: LinearClassifier | None = None

    def score(exponents: list[Number]) -> None:
        nonlocal start
        for exponent in exponents:
            if exponent in scores or not COARSE[0] <= exponent <= COARSE[-1]:
                continue
            start = fit(
                features=features[kept], targets=targets[kept], num_classes=num_classes, c=10.0**exponent, start=start,
                tolerance=ROUGHLY,
            )  # fmt: skip
            logits, wanted = start.logits(features[held]).cpu(), targets[held].cpu()
            if wanted.ndim == 1:
                scores[exponent] = top_k_accuracy(logits=logits, labels=wanted, k=1)
            else:
                scores[exponent] = multilabel_metrics(scores=logits, targets=wanted)["mean_average_precision"]
            bar.update()

    def best() -> Number:
        return min(scores, key=lambda exponent: (-scores[exponent], exponent))

    with tqdm(desc="regularisation", unit="fit", leave=False, disable=None) as bar:
        score(list(COARSE))
        step = (COARSE[1] - COARSE[0]) / 2
        while step >= FINEST:
            score([best() - step, best() + step])
            step /= 2
    return 10.0 ** best(), scores[best()]


def few_shot(labels: Int[Tensor, " n"], *, shots: int, seed: int) -> Int[Tensor, " m"]:
    """Numbers of `shots` images of each class that occurs, drawn by seed, in the order of the set.

    Raises:
        UserError: a class that has fewer.
    """
    counts = torch.bincount(labels.cpu())
    few = ((counts > 0) & (counts < shots)).nonzero().flatten()
    if len(few):
        first = int(few[0])
        raise UserError(f"{shots} shots: class {first} has {int(counts[first])} images, so ask for fewer shots")
    order, rank = _drawn(labels, seed)
    return order[rank < shots].sort().values.to(labels.device)


def split(
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"], *, share: Number, seed: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " k"]]:
    """Numbers of the images to fit on, and of `share` of them that are held out; drawn by seed.

    Of each class share x count are held out, rounded down, one at least where it has two or more. Of images with
    several labels, share x n.
    """
    labels = targets if targets.ndim == 1 else torch.zeros(len(targets), dtype=torch.int64)
    counts = torch.bincount(labels.cpu())
    quota = torch.where(counts > 1, (share * counts).long().clamp_min(1), 0)
    order, rank = _drawn(labels, seed)
    held = rank < quota[labels.cpu()[order]]
    return order[~held].sort().values.to(targets.device), order[held].sort().values.to(targets.device)


def _drawn(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The images in random order, and of each one how many of its class come before it there."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    by_class = shuffled.argsort(stable=True)
    counts = torch.bincount(shuffled)
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[shuffled[by_class]]
    return order, rank


def _check(features: Tensor, targets: Tensor, num_classes: int, shots: int | None) -> None:
    if not features.isfinite().all():
        raise UserError("the training features are not finite: is the model's image tower broken?")
    if shots is not None and (shots < 1 or targets.ndim > 1):
        raise UserError(f"{shots} shots: a whole number from 1, of a set with one label an image")
    if targets.ndim == 1:
        if len(targets) and int(targets.max()) >= num_classes:
            raise UserError(f"the training set has the label {int(targets.max())}, but there are {num_classes} classes")
        if len(targets.unique()) < 2:
            raise UserError(
                f"{len(targets)} training images of {len(targets.unique())} class: a probe needs two classes"
            )
    elif len(targets) < 2:
        raise UserError(f"{len(targets)} training images: a probe needs two")
