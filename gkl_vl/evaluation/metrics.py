"""Metrics of embeddings and logits with CLIP_benchmark's names and values, bootstrap intervals and paired tests.

A metric is represented as a `Statistic`, a function of the count of each image. With every count 1 it returns the
metric; with the counts of draws with replacement, its bootstrap distribution; with the same draws for two models, a
paired test.

Ties are broken by position, as in argmax, on every device: of equal scores the first ranks higher. A model with equal
scores for all classes is correct for class 0 only.

Axis letters: n = images, m = texts, C = classes, d = embedding, r = draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from gkl_vl.distributed import rank, sum_across_processes, world_size
from gkl_vl.losses.gkl import upcast

Counts = Float[Tensor, "r n"]
"""Count of each image in each draw, float64."""
Statistic = Callable[[Counts], Float[Tensor, " r"]]
Statistics = Mapping[str, Statistic]

ECE_BINS = 15
TILE_NUMBERS = 2**20  # scores at a time in retrieval: about 15 MB with all intermediate tensors
DRAWS_AT_A_TIME = 50


def top_k_accuracy(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], k: int) -> float:
    """Share of rows whose label is among the k largest logits, in [0, 1].

    Raises:
        ValueError: no rows, or k not in 1..C.
    """
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k={k} must lie in 1..{logits.shape[1]}, the number of classes")
    return values({"accuracy": _mean_of(_score_ranks(logits, labels) < k)}, images=len(logits))["accuracy"]


def mean_per_class_recall(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    """Mean over the classes that occur in `labels` of the share of their rows with the right argmax.

    Equals scikit-learn's `balanced_accuracy_score(labels, logits.argmax(1))`, which CLIP_benchmark uses.
    """
    recall = _recall_by_class(_score_ranks(logits, labels) < 1, labels, logits.shape[1])
    return values({"recall": recall}, images=len(logits))["recall"]


def classification_metrics(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """acc1, acc5 (nan with fewer than 5 classes) and mean_per_class_recall, shares in [0, 1].

    Source: CLIP_benchmark 1.6.2, `metrics/zeroshot_classification.py::evaluate`.

    Raises:
        ValueError: no rows.
    """
    return values(classification_statistics(logits=logits, labels=labels), images=len(logits))


def classification_statistics(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> Statistics:
    """The statistics of `classification_metrics`."""
    ranks, classes = _score_ranks(logits, labels), logits.shape[1]
    return {
        "acc1": _mean_of(ranks < 1),
        "acc5": _mean_of(ranks < 5) if classes >= 5 else _undefined,
        "mean_per_class_recall": _recall_by_class(ranks < 1, labels, classes),
    }


def class_accuracies(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> Float[Tensor, " C"]:
    """Share of each class's rows with the right argmax, in [0, 1]; nan for a class without rows."""
    right = (_score_ranks(logits, labels) < 1).double()
    return _sum_by(labels, logits.shape[1], right[None])[0] / torch.bincount(labels, minlength=logits.shape[1])


def shot_accuracies(
    *, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], groups: dict[str, Bool[Tensor, " C"]]
) -> dict[str, float]:
    """`many_acc1`, `medium_acc1`, `few_acc1`: accuracy on the classes of each group; groups without images are omitted.

    Source: Liu et al., CVPR 2019, arXiv 1904.05160.
    """
    right = _score_ranks(logits, labels) < 1
    members = {name: group[labels] for name, group in groups.items()}
    return {f"{name}_acc1": right[member].float().mean().item() for name, member in members.items() if member.any()}


def multilabel_metrics(*, scores: Float[Tensor, "n C"], targets: Num[Tensor, "n C"]) -> dict[str, float]:
    """mean_average_precision, in [0, 1]: the mean over classes of

        AP_c = sum_i t_ic P_c(i) / max(sum_i t_ic, 1),   P_c(i) = share of positives among the images down to i,

    with images in descending order of score. A class without positives counts as 0, as in CLIP_benchmark.

    Args:
        targets: 1 where the image has the class, else 0.

    Source: CLIP_benchmark 1.6.2, `metrics/zeroshot_classification.py::average_precision_per_class`.

    Raises:
        ValueError: no rows.
    """
    return values(multilabel_statistics(scores=scores, targets=targets), images=len(scores))


def multilabel_statistics(*, scores: Float[Tensor, "n C"], targets: Num[Tensor, "n C"]) -> Statistics:
    """The statistics of `multilabel_metrics`."""
    order = scores.argsort(dim=0, descending=True, stable=True)  # stable: ties by position
    positives = targets.gather(0, order).double()

    def mean_average_precision(counts: Counts) -> Tensor:
        total = counts.new_zeros(len(counts))
        harmonic = F.pad(
            (1 / torch.arange(1.0, counts.sum(dim=1).max().item() + 1, dtype=torch.float64)).cumsum(0), (1, 0)
        )
        for ordered, positive in zip(order.T, positives.T, strict=True):  # class by class: [r, n] at a time
            times = counts[:, ordered]
            seen, hits = times.cumsum(dim=1), (times * positive).cumsum(dim=1)
            # An image with count c occurs c times in the order. The precisions at its copies, after s images of which
            # x are negative, sum to sum_j (s - x + j) / (s + j) = c - x sum_j 1 / (s + j), j = 1..c.
            copies = harmonic[seen.long()] - harmonic[(seen - times).long()]
            precision = times - (seen - hits) * copies
            total += (positive * precision).sum(dim=1) / hits[:, -1].clamp_min(1)
        return total / scores.shape[1]

    return {"mean_average_precision": mean_average_precision}


def retrieval_metrics(
    *,
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "m d"],
    owners: Int[Tensor, " m"],
    recall_k: Sequence[int] = (1, 5, 10),
    tile_numbers: int = TILE_NUMBERS,
) -> dict[str, float]:
    """Recall@K in both directions, shares in [0, 1]. Text j belongs to image owners[j]; images may own many.

        image_retrieval_recall@K = mean over texts  of [owner among the K images with the highest scores]
        text_retrieval_recall@K  = mean over images of [any own text among the K texts with the highest scores]

    An image is a hit if any of its texts is retrieved, as in CLIP papers; this is not the share of its texts. The owner
    is the only positive: an equal caption of another image is a negative, as in CLIP_benchmark, and the tie is broken
    by position. An image without texts is a miss. K of at least the number of candidates is a hit. The score matrix is
    computed in tiles of about `tile_numbers` scores, distributed over the processes; the values do not depend on it.

    Source: CLIP_benchmark 1.6.2, `metrics/zeroshot_retrieval.py`.

    Raises:
        ValueError: no images or no texts, no K or one below 1, an owner that is not a row of `image`.
    """
    statistics = retrieval_statistics(
        image=image, text=text, owners=owners, recall_k=recall_k, tile_numbers=tile_numbers
    )
    return values(statistics, images=len(image))


def retrieval_statistics(
    *,
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "m d"],
    owners: Int[Tensor, " m"],
    recall_k: Sequence[int] = (1, 5, 10),
    tile_numbers: int = TILE_NUMBERS,
) -> Statistics:
    """The statistics of `retrieval_metrics`; the count of a text is its image's."""
    if len(image) == 0 or len(text) == 0:
        raise ValueError(f"recall of {len(image)} images and {len(text)} texts is not defined")
    check_recall_k(recall_k)
    if owners.min() < 0 or owners.max() >= len(image):
        raise ValueError(f"owners lie in {owners.min()}..{owners.max()}, but there are {len(image)} images")
    images = torch.arange(len(image), device=image.device)
    image_ranks = _own_key_ranks(text, image, owners, images, tile_numbers)
    text_ranks = _own_key_ranks(image, text, images, owners, tile_numbers)
    statistics: dict[str, Statistic] = {}
    for k in recall_k:
        statistics[f"image_retrieval_recall@{k}"] = _mean_of(image_ranks < k, owners=owners)
        statistics[f"text_retrieval_recall@{k}"] = _mean_of(text_ranks < k)
    return statistics


def check_recall_k(recall_k: Sequence[int]) -> None:
    """Raises: ValueError for no K, or one below 1."""
    if not recall_k or min(recall_k) < 1:
        raise ValueError(f"recall_k={tuple(recall_k)} must have at least one number, and none below 1")


def _own_key_ranks(
    queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor, tile_numbers: int
) -> Int[Tensor, " queries"]:
    """For each query, the number of keys ranked above its best own key (a key with its id); all if it has none."""
    ranks = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    tile = max(tile_numbers // len(keys), 1)
    for start in range(rank() * tile, len(queries), world_size() * tile):
        rows = slice(start, start + tile)
        scores = upcast(queries[rows]) @ upcast(keys).T
        own = key_ids == query_ids[rows, None]
        best = scores.masked_fill(~own, -torch.inf).argmax(dim=1)
        ranks[rows] = torch.where(own.any(dim=1), _score_ranks(scores, best), len(keys))
    return sum_across_processes(ranks)  # all ranks


def choice_metrics(
    *, image: Float[Tensor, "n d"], text: Float[Tensor, "m d"], owners: Int[Tensor, " m"]
) -> dict[str, float]:
    """text_acc: share of images whose first own text scores higher than its other own texts, in [0, 1].

    SugarCrepe's accuracy (arXiv 2306.14610): an image, its caption, and a caption with a word changed. Of equal scores
    the first, correct one ranks higher, as in CLIP_benchmark. With one image per question CLIP_benchmark's other two
    metrics are image_acc = 1 and acc = text_acc.

    Source: CLIP_benchmark 1.6.2, `metrics/image_caption_selection.py`.

    Raises:
        ValueError: no images.
    """
    return values(choice_statistics(image=image, text=text, owners=owners), images=len(image))


def choice_statistics(
    *, image: Float[Tensor, "n d"], text: Float[Tensor, "m d"], owners: Int[Tensor, " m"]
) -> Statistics:
    """The statistics of `choice_metrics`."""
    scores = (upcast(image)[owners] * upcast(text)).sum(dim=1)
    ordered = owners.argsort(stable=True)  # grouped by image, in their order
    of_image = scores[ordered].split(torch.bincount(owners, minlength=len(image)).tolist())
    right = torch.tensor([int(own.argmax()) == 0 for own in of_image])
    return {"image_acc": _mean_of(torch.ones_like(right)), "text_acc": _mean_of(right), "acc": _mean_of(right)}


def calibration_statistics(*, logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> Statistics:
    """ece: the expected calibration error of the top-1 class, in [0, 1]:

        sum_b |B_b| / n  |acc(B_b) - conf(B_b)|,   B_b = images with a confidence in ((b - 1) / 15, b / 15]

    Args:
        logits: multiplied by the model's logit scale, so that their softmax gives the model's probabilities.

    Source: Guo et al., ICML 2017, arXiv 1706.04599, equation 3.
    """
    confidence = logits.double().softmax(dim=1).amax(dim=1)
    gap = (_score_ranks(logits, labels) < 1).double() - confidence
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1

    def ece(counts: Counts) -> Tensor:
        return _sum_by(bins, ECE_BINS, counts * gap).abs().sum(dim=1) / counts.sum(dim=1)

    return {"ece": ece}


def likeness_statistics(*, student: Float[Tensor, "n C"], teacher: Float[Tensor, "n C"]) -> Statistics:
    """Similarity of two models' zero-shot distributions, independent of the labels:

        agreement@1    share of images with the same top-1 class
        top5_overlap   share of the teacher's top-5 classes that are in the student's top 5; nan for up to 5 classes,
                       where it would be 1 for any two models
        kl             mean of KL(p_teacher || p_student), p = softmax of the scaled logits; in nats

    Args:
        student, teacher: logits, multiplied by each model's logit scale.
    """
    log_student, log_teacher = (logits.double().log_softmax(dim=1) for logits in (student, teacher))
    # Where the teacher's probability is 0 (-inf from a linear probe for a class without images) the term is 0.
    kl = torch.where(log_teacher > -torch.inf, log_teacher.exp() * (log_teacher - log_student), 0.0).sum(dim=1)
    return {
        "agreement@1": _mean_of(student.argmax(dim=1) == teacher.argmax(dim=1)),
        "top5_overlap": _top5_overlap(student, teacher) if student.shape[1] > 5 else _undefined,
        "kl": _mean_of(kl),
    }


def _top5_overlap(student: Float[Tensor, "n C"], teacher: Float[Tensor, "n C"]) -> Statistic:
    shared = student.topk(5, dim=1).indices[:, :, None] == teacher.topk(5, dim=1).indices[:, None, :]
    return _mean_of(shared.any(dim=2).double().mean(dim=1))


def _score_ranks(scores: Num[Tensor, "n C"], target: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Rank (from 0) of column target[i] in row i: the number of higher scores, and of equal ones in earlier columns."""
    score = scores.gather(1, target[:, None])
    columns = torch.arange(scores.shape[1], device=scores.device)
    return (scores > score).sum(dim=1) + ((scores == score) & (columns < target[:, None])).sum(dim=1)


def _mean_of(of_each: Num[Tensor, " rows"] | Bool[Tensor, " rows"], owners: Int[Tensor, " rows"] | None = None):
    """Statistic: the mean over rows, each with the count of its image; by default row i is image i."""
    of_each = of_each.double().cpu()
    owners = None if owners is None else owners.cpu()

    def mean(counts: Counts) -> Tensor:
        times = counts if owners is None else counts[:, owners]
        return times @ of_each / times.sum(dim=1)

    return mean


def _recall_by_class(right: Bool[Tensor, " n"], labels: Int[Tensor, " n"], classes: int) -> Statistic:
    def recall(counts: Counts) -> Tensor:
        total, hits = (_sum_by(labels, classes, times) for times in (counts, counts * right))
        return (hits / total).nan_to_num(0).sum(dim=1) / (total > 0).sum(dim=1)

    return recall


def _sum_by(groups: Int[Tensor, " n"], count: int, numbers: Float[Tensor, "r n"]) -> Float[Tensor, "r count"]:
    return numbers.new_zeros(len(numbers), count).index_add_(1, groups, numbers)


def _undefined(counts: Counts) -> Tensor:
    return counts.new_full((len(counts),), torch.nan)


def values(statistics: Statistics, *, images: int) -> dict[str, float]:
    """The values of the metrics, every image with count 1.

    Raises:
        ValueError: no images.
    """
    if images == 0:
        raise ValueError("metrics of 0 images are not defined")
    once = torch.ones(1, images, dtype=torch.float64)
    return {name: statistic(once).item() for name, statistic in statistics.items()}


def intervals(
    statistics: Statistics, *, images: int, draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals over images; a caption is drawn with its image.

    The interval of mean_per_class_recall is too narrow if classes have one or two images: a class that is not drawn is
    not in the mean of that draw. The interval of ece is biased upwards: resampling enlarges the gaps that it sums.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    drawn = _distributions(statistics, images, draws, seed)
    return {name: _percentiles(of_draws) for name, of_draws in drawn.items()}


@dataclass(frozen=True)
class Difference:
    """Difference of a metric between two models on the same images."""

    value: float
    """First minus second."""
    low: float
    high: float
    """95 % bootstrap interval, with the same draws for both models."""
    p: float
    """Two-sided p value: twice the share of draws whose difference is 0 or has the other sign, >= 2 / (draws + 1)."""


def paired_differences(
    one: Statistics, other: Statistics, *, images: int, draws: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """For every metric of both, the difference `one` - `other` with a paired bootstrap interval and p value.

    Source: Efron and Tibshirani, 1993, chapters 13 and 16.
    """

    def difference(name: str) -> Statistic:
        return lambda counts: one[name](counts) - other[name](counts)

    differences = {name: difference(name) for name in one if name in other}
    drawn = _distributions(differences, images, draws, seed)
    results = {}
    for name, value in values(differences, images=images).items():
        crossed = min(int((drawn[name] <= 0).sum()), int((drawn[name] >= 0).sum()))
        results[name] = Difference(value, *_percentiles(drawn[name]), p=min(2 * (crossed + 1) / (draws + 1), 1.0))
    return results


def _distributions(statistics: Statistics, images: int, draws: int, seed: int) -> dict[str, Float[Tensor, " draws"]]:
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for start in range(0, draws, DRAWS_AT_A_TIME):
        size = min(DRAWS_AT_A_TIME, draws - start)
        chosen = torch.randint(images, (size, images), generator=generator)
        counts = torch.zeros(size, images, dtype=torch.float64)
        counts.scatter_add_(1, chosen, torch.ones_like(counts))
        for name, statistic in statistics.items():
            parts[name].append(statistic(counts))
    return {name: torch.cat(of_draws) for name, of_draws in parts.items()}


def _percentiles(of_draws: Float[Tensor, " draws"]) -> tuple[float, float]:
    low, high = of_draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
