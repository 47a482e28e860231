"""Subsets of labelled images: long-tailed, balanced, and groups of classes by their number of images.

Axis letters: N = images, C = classes.
"""

import math

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from gkl_vl.data.labelled import LabelledSet
from gkl_vl.errors import UserError


def long_tailed(data: LabelledSet, *, ratio: float, seed: int) -> LabelledSet:
    """Exponential imbalance as in CIFAR-LT: class i of C keeps int(n_max (1/ratio)^(i/(C-1))) images, drawn by seed.

    n_max = images of the most frequent class. A class with fewer images than that formula keeps all of them.

    Source: Cui et al. 2019 (class-balanced loss), Cao et al. 2019 (LDAM), `imbalance_cifar.py`.

    Raises: UserError for a ratio below 1 or not finite, or one that leaves a class without images.
    """
    if not 1 <= ratio < math.inf:
        raise UserError(
            f"imbalance ratio {ratio} must be at least 1: images of the most frequent class over the rarest"
        )
    counts = data.counts()
    most, last = int(counts.max()), max(data.num_classes - 1, 1)
    keep = torch.tensor([int(most * (1 / ratio) ** (label / last)) for label in range(data.num_classes)])
    if keep.min() == 0:
        raise UserError(f"imbalance ratio {ratio} leaves the rarest class of {data.name} empty: use at most {most}")
    order, rank = shuffled_ranks(data.labels, seed)
    return data.subset(order[rank < keep[data.labels[order]]].sort().values)


def balanced_subset(data: LabelledSet, n: int, seed: int) -> LabelledSet:
    """n images drawn by seed; class counts differ by at most one, except for classes with too few images.

    Raises: UserError if n is below 1 or more than the set has.
    """
    if not 1 <= n <= len(data):
        raise UserError(f"{n} images of {data.name}: it has {len(data)}, choose 1 to {len(data)}")
    order, rank = shuffled_ranks(data.labels, seed)
    return data.subset(order[rank.argsort(stable=True)[:n]].sort().values)


def shuffled_ranks(labels: Int[Tensor, " n"], seed: int) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """A random permutation of the images, and for each position the number of earlier images of the same class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    by_class = shuffled.argsort(stable=True)
    counts = torch.bincount(shuffled)
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[shuffled[by_class]]
    return order, rank


def shot_groups(counts: Int[Tensor, " C"]) -> dict[str, Bool[Tensor, " C"]]:
    """Masks of classes by training images: "many" (over 100), "medium" (20 to 100), "few" (under 20); may be empty.

    Source: Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World".
    """
    many, few = counts > 100, counts < 20
    return {"many": many, "medium": ~many & ~few, "few": few}
