"""Linear probe: logistic regression on a frozen model's image embeddings, with the regularisation chosen on a held-out
part of the training set, never on the test set.

Embeddings are not standardised, as in the CLIP paper. Everything runs on the device of the features.

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
FEW_SHOT_VALIDATION_SHARE = 0.5  # a fifth of a few shots is too few to compare values of c
MAX_ITERATIONS = 1000
COARSE = (-6, -4, -2, 0, 2, 4, 6)  # log10 of c: the first grid
FINEST = 0.125  # log10 of c: the last step
ROUGHLY = 0.1  # tolerance of the fits that select c: much faster, and rarely another choice
TILE = 8192  # rows in fp64 at a time, so that neither all rows nor all logits exist in fp64 at once
UNTUNED = 1.0  # c without a held-out part


@dataclass(frozen=True)
class LinearClassifier:
    """logits = W x + b."""

    weight: Float[Tensor, "C d"]
    bias: Float[Tensor, " C"]

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Computed in the precision of the weights."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias


@dataclass(frozen=True)
class Probe:
    """A fitted classifier with its regularisation."""

    classifier: LinearClassifier
    c: float
    validation: float
    """Top-1 accuracy, or mean average precision, on the held-out part of the training set at this c; nan if none."""


def fit(
    *,
    features: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"],
    num_classes: int,
    c: float,
    start: LinearClassifier | None = None,
    tolerance: float = 1e-4,
) -> LinearClassifier:
    """Fits an L2-regularised logistic regression:

        argmin_{W, b}  sum_i loss(W x_i + b, t_i) + ||W||^2 / (2 c)

    The loss is the softmax cross entropy for labels, and the sum over classes of the sigmoid cross entropies for [n, C]
    targets of 0 and 1. c is scikit-learn's C (for exactly two classes half of it: scikit-learn has one weight vector,
    this has two); the bias is not regularised. Solved by L-BFGS with strong Wolfe line search, at most 1,000
    iterations, in fp64; the result is in fp32 or the features' wider precision.

    The optimum is unique up to a shift of the softmax's biases, which sum to 0 here, as the weights do. A class that no
    image has (or, with several labels, all have) gets the limit of the optimum: weight 0, bias -inf (or +inf).

    Args:
        start: initial classifier, e.g. the solution for a close c; None = 0.
        tolerance: iteration stops at ||gradient|| <= tolerance ||W|| / c. As the objective is 1/c-strongly convex in W,
            W is then within tolerance ||W|| of the optimum, for any c and n. In practice it is 50 times closer.

    Source: Radford et al., ICML 2021, arXiv 2103.00020, appendix A.3.
    """
    solution = _solve(_prepare(features, targets, num_classes), c, start, tolerance)
    dtype = upcast(features[:0]).dtype
    return LinearClassifier(solution.weight.to(dtype), solution.bias.to(dtype))


def probe(
    *,
    features: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"],
    num_classes: int,
    shots: int | None = None,
    seed: int = 0,
) -> Probe:
    """Fits a probe to a training set, with c chosen in 1e-6 to 1e6 on a held-out part (a fifth; half of the shots).

    The search for c follows the CLIP paper: a coarse grid, then around the best value with half the step, down to an
    eighth of a decade; of equally good values the smallest, which regularises most. The final fit at that c uses the
    whole training set, or all shots. With one shot nothing can be held out: c = 1.

    Args:
        targets: labels, or [n, C] of 0 and 1.
        shots: use this many images of each class, drawn by seed, as the training set; None = all images. Labels only.
        seed: seed of the shots and of the held-out part.

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
    """The best c on the held-out part, and its score."""
    problem = _prepare(features[kept], targets[kept], num_classes)
    solutions: dict[float, LinearClassifier] = {}
    scores: dict[float, float] = {}

    def score(exponents: list[float]) -> None:
        for exponent in exponents:
            if exponent in scores or not COARSE[0] <= exponent <= COARSE[-1]:
                continue
            start = solutions[min(solutions, key=lambda other: abs(other - exponent))] if solutions else None
            solutions[exponent] = _solve(problem, 10.0**exponent, start, ROUGHLY)
            logits, held_targets = solutions[exponent].logits(features[held]).cpu(), targets[held].cpu()
            if held_targets.ndim == 1:
                scores[exponent] = top_k_accuracy(logits=logits, labels=held_targets, k=1)
            else:
                scores[exponent] = multilabel_metrics(scores=logits, targets=held_targets)["mean_average_precision"]
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
    """Indices of `shots` images of each class that occurs, drawn by seed, in the order of the set.

    Raises:
        UserError: a class with fewer images.
    """
    counts = torch.bincount(labels.cpu())
    few = ((counts > 0) & (counts < shots)).nonzero().flatten()
    if len(few):
        first = int(few[0])
        raise UserError(f"{shots} shots: class {first} has {int(counts[first])} images: lower --fewshot_k")
    order, rank = shuffled_ranks(labels, seed)
    return order[rank < shots].sort().values.to(labels.device)


def split(
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"], *, share: float, seed: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " k"]]:
    """Indices of the images to fit on and of the held-out images, a `share` of all; drawn by seed.

    Holds out share x count images of each class, rounded down, but at least one if the class has two or more. With
    several labels per image, share x n.
    """
    labels = targets if targets.ndim == 1 else torch.zeros(len(targets), dtype=torch.int64)
    counts = torch.bincount(labels.cpu())
    quota = torch.where(counts > 1, (share * counts).long().clamp_min(1), 0)
    order, rank = shuffled_ranks(labels, seed)
    held = rank < quota[labels.cpu()[order]]
    return order[~held].sort().values.to(targets.device), order[held].sort().values.to(targets.device)


def _check(features: Tensor, targets: Tensor, num_classes: int, shots: int | None) -> None:
    if not features.isfinite().all():
        raise UserError("the training features are not finite: check the weights of the model")
    if shots is not None and (shots < 1 or targets.ndim > 1):
        raise UserError(f"{shots} shots: expected an integer from 1 and a set with one label per image, or -1 for all")
    if targets.ndim == 1:
        if len(targets) and int(targets.max()) >= num_classes:
            raise UserError(f"the training set has the label {int(targets.max())}, but there are {num_classes} classes")
        if len(targets.unique()) < 2:
            raise UserError(
                f"{len(targets)} training images of {len(targets.unique())} class: a probe needs two classes"
            )
    elif len(targets) < 2:
        raise UserError(f"{len(targets)} training images: a probe needs two")


@dataclass(frozen=True)
class _Problem:
    """A training set and its statistics, from which `_solve` computes its coordinates."""

    features: Float[Tensor, "n d"]
    targets: Int[Tensor, " n"] | Num[Tensor, "n C"]
    log_odds: Float[Tensor, " C"]
    """The best bias at W = 0."""
    curvature: Float[Tensor, " C"]
    """q of `_solve`; 0 for a class that no image has or all have: its optimal bias is its infinite log-odds."""
    mean: Float[Tensor, " d"]
    variances: Float[Tensor, " d"]
    axes: Float[Tensor, "d d"]
    """Principal axes, in columns."""

    @property
    def finite(self) -> Bool[Tensor, " C"]:
        """Classes with a finite optimum."""
        return self.curvature > 0

    def without_shift(self, values: Float[Tensor, "C k"]) -> Float[Tensor, "C k"]:
        """S of `_solve`, for values that are 0 in the classes without a finite optimum."""
        if self.targets.ndim == 2:
            return values
        return values - self.finite[:, None] * values.sum(dim=0) / self.finite.sum().clamp_min(1)


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
    """Minimises the mean loss over images, with l2 = 1 / (c n), in preconditioned coordinates t with the same optimum:

        W = S(t[:, 1:] r) A^T,    b = log-odds of the classes + S(t[:, 0] r_0) - W mean
        r_kj = (q_k v_j + l2)^-1/2,    r_0k = q_k^-1/2,    q_k = p_k (1 - p_k)

    A, v, mean: the features' principal axes, variances and mean; p_k: the share of class k; S subtracts the mean over
    classes (softmax only, where a common shift does not change the loss, and the penalty is smallest without one). At
    t = 0 the Hessian is about the identity. Embeddings lie in a narrow cone with a few axes of large variance; without
    preconditioning L-BFGS takes several times as many steps.
    """
    l2 = 1 / (c * len(problem.features))
    finite, mean, axes = problem.finite[:, None], problem.mean, problem.axes
    curvature = problem.curvature[:, None]
    unit = torch.cat([curvature, curvature * problem.variances + l2], dim=1).rsqrt().where(finite, 0.0)
    point = torch.zeros_like(unit)
    if start is not None:
        weight = start.weight.to(mean)
        offset = start.bias.to(mean) + weight @ mean - problem.log_odds
        point = (torch.cat([offset[:, None], weight @ axes], dim=1) / unit).where(finite, 0.0)

    def classifier() -> LinearClassifier:
        scaled = problem.without_shift(point * unit)
        weight = scaled[:, 1:] @ axes.T
        return LinearClassifier(weight, problem.log_odds + scaled[:, 0] - weight @ mean)

    def objective() -> Tensor:
        current = classifier()
        loss, by_weight, by_bias = _mean_loss(problem, current)
        by_weight = by_weight + l2 * current.weight - by_bias.outer(mean)
        gradient = problem.without_shift(torch.cat([by_bias[:, None], by_weight @ axes], dim=1))
        if gradient.norm() <= tolerance * l2 * current.weight.norm():
            gradient = torch.zeros_like(gradient)  # stops L-BFGS, whose own criterion is absolute and ignores c
        point.grad = gradient * unit
        return loss + l2 / 2 * current.weight.square().sum()

    torch.optim.LBFGS(
        [point],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=0,
        tolerance_change=1e-17,  # below the rounding error of the loss
        history_size=20,
        line_search_fn="strong_wolfe",
    ).step(objective)  # pyright: ignore[reportArgumentType]  # it converts the result to a float
    return classifier()


def _mean_loss(
    problem: _Problem, at: LinearClassifier
) -> tuple[Float[Tensor, ""], Float[Tensor, "C d"], Float[Tensor, " C"]]:
    """The mean loss without the penalty, and its gradients by weight and bias, computed tile by tile."""
    loss, by_weight, by_bias = at.bias.new_zeros(()), torch.zeros_like(at.weight), torch.zeros_like(at.bias)
    for tile, targets in zip(problem.features.split(TILE), problem.targets.split(TILE), strict=True):
        rows = tile.double()
        logits = at.logits(rows)
        if targets.ndim == 1:
            log_probabilities = logits.log_softmax(dim=1)
            loss -= log_probabilities.gather(1, targets[:, None]).sum()
            residual = log_probabilities.exp().scatter_add_(1, targets[:, None], -at.bias.new_ones(len(targets), 1))
        else:
            # softplus, because torch's binary cross entropy is nan for an infinite logit
            loss += F.softplus(logits * (1 - 2 * targets)).sum()
            residual = logits.sigmoid() - targets
        by_weight += residual.T @ rows
        by_bias += residual.sum(dim=0)
    n = len(problem.features)
    return loss / n, by_weight / n, by_bias / n
