"""A linear probe: logistic regression on a frozen model's image embeddings, the regularisation chosen on a part of the
training set and never on the test set.

Embeddings are taken as they are, not standardised, as in the CLIP paper. Everything runs where the features are.

Axis letters: n = images, d = embedding, C = classes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from tqdm import tqdm

from gkl_vl.data.subsets import shuffled_ranks
from gkl_vl.errors import UserError
from gkl_vl.evaluation.metrics import multilabel_metrics, top_k_accuracy
from gkl_vl.losses.gkl import upcast

VALIDATION_SHARE = 0.2
FEW_SHOT_VALIDATION_SHARE = 0.5  # of so few, a fifth would say nothing
MAX_ITERATIONS = 1000
COARSE = (-6, -4, -2, 0, 2, 4, 6)  # log10 of c
FINEST = 0.125
ROUGHLY = 0.1  # tolerance of the fits that c is chosen by: a fraction of the time, and hardly another choice
TILE = 8192  # rows at a time in fp64: neither they nor their logits exist at once
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
    c: float
    validation: float
    """Top-1 accuracy, or mean average precision, of the part held out of the training set, at this c; nan for none."""


def fit(
    *,
    features: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"],
    num_classes: int,
    c: float,
    start: LinearClassifier | None = None,
    tolerance: float = 1e-4,
) -> LinearClassifier:
    """L2-regularised logistic regression:

        argmin_{W, b}  sum_i loss(W x_i + b, t_i) + ||W||^2 / (2 c)

    with the cross entropy of the softmax for labels, and the sum over classes of that of the sigmoid for [n, C] targets
    of 0 and 1. c is scikit-learn's C (of exactly two classes half of it: there is one weight vector there, and two
    here); the bias is free. By L-BFGS with strong Wolfe line search, at most 1,000 iterations, in fp64; the result is
    in fp32 or the features' wider precision.

    The optimum is unique but for a shift of the softmax's biases, which sum to 0 here, as the weights do. A class that
    no image has (or, with several labels, all have) gets the limit of the optimum: weight 0, bias -inf (or +inf).

    Args:
        start: where to begin, say the solution for a neighbouring c; None = 0.
        tolerance: it ends where ||gradient|| <= tolerance ||W|| / c. The objective being 1/c-strongly convex in W, that
            W is within tolerance ||W|| of the optimum, whatever c and n. In practice it is 50 times nearer.

    Source: Radford et al., ICML 2021, arXiv 2103.00020, appendix A.3.
    """
    found = _solve(_prepare(features, targets, num_classes), c, start, tolerance)
    dtype = upcast(features[:0]).dtype
    return LinearClassifier(found.weight.to(dtype), found.bias.to(dtype))


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


def _choose(features: Tensor, targets: Tensor, kept: Tensor, held: Tensor, num_classes: int) -> tuple[float, float]:
    """The best c on the held-out part, and its score there."""
    problem = _prepare(features[kept], targets[kept], num_classes)
    found: dict[float, LinearClassifier] = {}
    scores: dict[float, float] = {}

    def score(exponents: list[float]) -> None:
        for exponent in exponents:
            if exponent in scores or not COARSE[0] <= exponent <= COARSE[-1]:
                continue
            start = found[min(found, key=lambda other: abs(other - exponent))] if found else None
            found[exponent] = _solve(problem, 10.0**exponent, start, ROUGHLY)
            logits, wanted = found[exponent].logits(features[held]).cpu(), targets[held].cpu()
            if wanted.ndim == 1:
                scores[exponent] = top_k_accuracy(logits=logits, labels=wanted, k=1)
            else:
                scores[exponent] = multilabel_metrics(scores=logits, targets=wanted)["mean_average_precision"]
            bar.update()

    def best() -> float:
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
    order, rank = shuffled_ranks(labels, seed)
    return order[rank < shots].sort().values.to(labels.device)


def split(
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"], *, share: float, seed: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " k"]]:
    """Numbers of the images to fit on, and of `share` of them that are held out; drawn by seed.

    Of each class share x count are held out, rounded down, one at least where it has two or more. Of images with
    several labels, share x n.
    """
    labels = targets if targets.ndim == 1 else torch.zeros(len(targets), dtype=torch.int64)
    counts = torch.bincount(labels.cpu())
    quota = torch.where(counts > 1, (share * counts).long().clamp_min(1), 0)
    order, rank = shuffled_ranks(labels, seed)
    held = rank < quota[labels.cpu()[order]]
    return order[~held].sort().values.to(targets.device), order[held].sort().values.to(targets.device)


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


# ---- the solver ------------------------------------------------------------------------------------------------
#
# It works on the mean over images, with l2 = 1 / (c n), in coordinates t where the problem is nearly round, which
# changes the way and not the goal:
#
#     W = S(t[:, 1:] r) A^T,    b = log-odds of the classes + S(t[:, 0] r_0) - W mean
#     r_kj = (q_k v_j + l2)^-1/2,    r_0k = q_k^-1/2,    q_k = p_k (1 - p_k)
#
# A, v, mean: the features' principal axes, variances and mean; p_k: the share of class k; S takes away the mean over
# classes (softmax only, where a common shift changes no loss and the penalty wants none). At t = 0 the Hessian is about
# the identity. Embeddings are a narrow cone with a few strong axes, and take several times the steps without it.


@dataclass(frozen=True)
class _Problem:
    features: Float[Tensor, "n d"]
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"]
    log_odds: Float[Tensor, " C"]
    """The best bias at W = 0."""
    curvature: Float[Tensor, " C"]
    """q; 0 for a class that no image has or all have, whose optimum is in the log-odds, at infinity."""
    mean: Float[Tensor, " d"]
    variances: Float[Tensor, " d"]
    axes: Float[Tensor, "d d"]
    """In columns."""

    @property
    def learns(self) -> Bool[Tensor, " C"]:
        return self.curvature > 0

    def without_shift(self, values: Float[Tensor, "C k"]) -> Float[Tensor, "C k"]:
        """S, of values that are 0 for a class that learns nothing."""
        if self.targets.ndim == 2:
            return values
        return values - self.learns[:, None] * values.sum(dim=0) / self.learns.sum().clamp_min(1)


def _prepare(
    features: Float[Tensor, "n d"], targets: Int[Tensor, " n"] | Num[Tensor, "n C"], num_classes: int
) -> _Problem:
    features, targets = features.detach(), targets.to(features.device)
    if targets.ndim == 1:
        targets = targets.long()
        shares = torch.bincount(targets, minlength=num_classes).double() / len(targets)
        log_odds = shares.log() - shares[shares > 0].log().mean()
    else:
        shares = targets.double().mean(dim=0)
        log_odds = shares.logit()
    mean = torch.stack([tile.double().sum(dim=0) for tile in features.split(TILE)]).sum(dim=0) / len(features)
    covariance = mean.new_zeros(len(mean), len(mean))
    for tile in features.split(TILE):
        centred = tile.double() - mean
        covariance += centred.T @ centred / len(features)
    variances, axes = torch.linalg.eigh(covariance)
    return _Problem(features, targets, log_odds, shares * (1 - shares), mean, variances.clamp(min=0), axes)


def _solve(problem: _Problem, c: float, start: LinearClassifier | None, tolerance: float) -> LinearClassifier:
    l2 = 1 / (c * len(problem.features))
    learns, mean, axes = problem.learns[:, None], problem.mean, problem.axes
    curvature = problem.curvature[:, None]
    unit = torch.cat([curvature, curvature * problem.variances + l2], dim=1).rsqrt().where(learns, 0.0)
    place = torch.zeros_like(unit)
    if start is not None:
        weight = start.weight.to(mean)
        offset = start.bias.to(mean) + weight @ mean - problem.log_odds
        place = (torch.cat([offset[:, None], weight @ axes], dim=1) / unit).where(learns, 0.0)

    def classifier() -> LinearClassifier:
        way = problem.without_shift(place * unit)
        weight = way[:, 1:] @ axes.T
        return LinearClassifier(weight, problem.log_odds + way[:, 0] - weight @ mean)

    def objective() -> Tensor:
        here = classifier()
        loss, by_weight, by_bias = _mean_loss(problem, here)
        by_weight = by_weight + l2 * here.weight - by_bias.outer(mean)
        gradient = problem.without_shift(torch.cat([by_bias[:, None], by_weight @ axes], dim=1))
        if gradient.norm() <= tolerance * l2 * here.weight.norm():
            gradient = torch.zeros_like(gradient)  # which ends L-BFGS: its own test is absolute, and knows no c
        place.grad = gradient * unit
        return loss + l2 / 2 * here.weight.square().sum()

    torch.optim.LBFGS(
        [place],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=0,
        tolerance_change=1e-17,  # the loss does not fall any more: this is its rounding
        history_size=20,
        line_search_fn="strong_wolfe",
    ).step(objective)  # pyright: ignore[reportArgumentType]  # it makes a float of what it gets
    return classifier()


def _mean_loss(
    problem: _Problem, at: LinearClassifier
) -> tuple[Float[Tensor, ""], Float[Tensor, "C d"], Float[Tensor, " C"]]:
    """Without the penalty, and its gradients by weight and bias, written out to go tile by tile."""
    loss, by_weight, by_bias = at.bias.new_zeros(()), torch.zeros_like(at.weight), torch.zeros_like(at.bias)
    for tile, wanted in zip(problem.features.split(TILE), problem.targets.split(TILE), strict=True):
        rows = tile.double()
        logits = at.logits(rows)
        if wanted.ndim == 1:
            log_probabilities = logits.log_softmax(dim=1)
            loss -= log_probabilities.gather(1, wanted[:, None]).sum()
            residual = log_probabilities.exp().scatter_add_(1, wanted[:, None], -at.bias.new_ones(len(wanted), 1))
        else:
            # softplus, and not torch's binary cross entropy, for which an infinite logit is nan
            loss += F.softplus(logits * (1 - 2 * wanted)).sum()
            residual = logits.sigmoid() - wanted
        by_weight += residual.T @ rows
        by_bias += residual.sum(dim=0)
    n = len(problem.features)
    return loss / n, by_weight / n, by_bias / n
