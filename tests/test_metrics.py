"""The metrics equal CLIP_benchmark's in name and value, on small matrices by hand and against its formulas transcribed;
ties are broken by position; intervals and tests equal those of a naive bootstrap, image by image."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from gkl_vl.evaluation.metrics import (
    calibration_statistics,
    choice_metrics,
    class_accuracies,
    classification_metrics,
    classification_statistics,
    intervals,
    likeness_statistics,
    mean_per_class_recall,
    multilabel_metrics,
    multilabel_statistics,
    paired_differences,
    retrieval_metrics,
    retrieval_statistics,
    top_k_accuracy,
    values,
)

# CLIP_benchmark 1.6.2, transcribed: metrics/zeroshot_classification.py and metrics/zeroshot_retrieval.py


def clip_benchmark_accuracy(output, target, topk):
    pred = output.topk(max(topk), 1, True, True)[1].t()
    correct = pred.eq(target.view(1, -1).expand_as(pred))
    return [float(correct[:k].reshape(-1).float().sum()) / len(target) for k in topk]


def balanced_accuracy(target, pred):
    """scikit-learn's: mean recall of the classes that occur."""
    recalls = [(pred[target == c] == c).double().mean() for c in target.unique()]
    return torch.stack(recalls).mean().item()


def clip_benchmark_retrieval(images, texts, texts_image_index, recall_k_list):
    scores = texts @ images.t()
    positive_pairs = torch.zeros_like(scores, dtype=torch.bool)
    positive_pairs[torch.arange(len(scores)), texts_image_index] = True
    metrics = {}
    for k in recall_k_list:
        for name, s, p in (("image", scores, positive_pairs), ("text", scores.T, positive_pairs.T)):
            one_hot = F.one_hot(torch.topk(s, k, dim=1)[1], num_classes=s.shape[1])
            hits = (one_hot * p.reshape(len(s), 1, -1)).sum(dim=(1, 2))
            recall = hits / p.sum(dim=1)
            metrics[f"{name}_retrieval_recall@{k}"] = (recall > 0).float().mean().item()
    return metrics


def clip_benchmark_average_precision(scores, targets):
    ap = torch.zeros(scores.size(1))
    rg = torch.arange(1, scores.size(0) + 1).float()
    for k in range(scores.size(1)):
        _, sortind = torch.sort(scores[:, k], 0, True)
        truth = targets[:, k][sortind]
        precision = truth.float().cumsum(0).div(rg)
        ap[k] = precision[truth.bool()].sum() / max(float(truth.sum()), 1)
    return ap.mean().item()


def test_top_k_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 3, 2, 1], [0, 1, 2, 3]])
    labels = torch.tensor([0, 2, 0])
    assert [top_k_accuracy(logits=logits, labels=labels, k=k) for k in (1, 2, 3, 4)] == [
        1 / 3,
        2 / 3,
        2 / 3,
        1,
    ]


def test_mean_per_class_recall_by_hand():
    logits = torch.eye(4)[torch.tensor([0, 0, 1, 2, 2])]  # the predictions
    labels = torch.tensor([0, 1, 1, 1, 2])  # class 3 does not occur and does not count
    assert mean_per_class_recall(logits=logits, labels=labels) == pytest.approx((1 + 1 / 3 + 1) / 3)


@pytest.mark.parametrize("classes", [2, 4, 5, 23])
def test_classification_is_clip_benchmarks(classes):
    logits, labels = torch.randn(60, classes), torch.randint(0, classes, (60,))
    metrics = classification_metrics(logits=logits, labels=labels)
    if classes >= 5:
        assert (metrics["acc1"], metrics["acc5"]) == pytest.approx(clip_benchmark_accuracy(logits, labels, (1, 5)))
    else:
        assert metrics["acc1"] == pytest.approx(clip_benchmark_accuracy(logits, labels, (1,))[0])
        assert np.isnan(metrics["acc5"])
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy(labels, logits.argmax(1)))


def naive_rank(row: list, target: int) -> int:
    """Position of a column when the row is sorted by descending score, equal scores by column."""
    return sorted(range(len(row)), key=lambda column: (-row[column], column)).index(target)


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_of_equal_scores_the_first_ranks_higher(classes):
    logits, labels = torch.randint(0, 3, (50, classes)).float(), torch.randint(0, classes, (50,))
    ranks = [naive_rank(row, label) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    for k in range(1, classes + 1):
        assert top_k_accuracy(logits=logits, labels=labels, k=k) == sum(rank < k for rank in ranks) / 50
    # as in argmax, so that acc1 and mean_per_class_recall use the same prediction
    assert top_k_accuracy(logits=logits, labels=labels, k=1) == (logits.argmax(1) == labels).double().mean()


def test_a_model_with_equal_scores_for_all_classes_predicts_the_first():
    metrics = classification_metrics(logits=torch.zeros(6, 5), labels=torch.tensor([0, 0, 1, 2, 3, 4]))
    assert metrics == {"acc1": 2 / 6, "acc5": 1.0, "mean_per_class_recall": 1 / 5}


def test_accuracy_by_class_by_hand():
    logits = torch.eye(4)[torch.tensor([0, 0, 1, 2, 2])]
    accuracies = class_accuracies(logits=logits, labels=torch.tensor([0, 1, 1, 1, 2])).tolist()
    assert accuracies[:3] == [1, pytest.approx(1 / 3), 1] and math.isnan(accuracies[3])  # class 3 has no images


def test_average_precision_by_hand():
    # Class 0: images by descending score 2, 0, 1, positives 2 and 1: precision 1/1 and 2/3. Class 1: none, counts as 0.
    scores = torch.tensor([[0.5, 0.1], [0.1, 0.2], [0.9, 0.3]])
    targets = torch.tensor([[0, 0], [1, 0], [1, 0]])
    metrics = multilabel_metrics(scores=scores, targets=targets)
    assert metrics == {"mean_average_precision": pytest.approx((1 + 2 / 3) / 2 / 2)}


@pytest.mark.parametrize(("n", "classes"), [(1, 1), (2, 3), (41, 7)])
def test_average_precision_is_clip_benchmarks(n, classes):
    scores, targets = torch.randn(n, classes), torch.randint(0, 2, (n, classes))
    precision = multilabel_metrics(scores=scores, targets=targets)["mean_average_precision"]
    assert precision == pytest.approx(clip_benchmark_average_precision(scores, targets), abs=1e-6)


def test_a_choice_is_right_when_the_first_text_scores_highest():
    # Image 0 prefers its first text, image 1 its second; for image 2 both score the same, and the first ranks higher.
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.2, 0.9], [0, 0.8, 0.6], [0, 0, 1], [0, 0, 1.0]])
    metrics = choice_metrics(image=image, text=text, owners=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert metrics == {"image_acc": 1, "text_acc": pytest.approx(2 / 3), "acc": pytest.approx(2 / 3)}
    shuffled = torch.tensor([2, 0, 4, 1, 3, 5])  # an image's texts need not be neighbours, only in their order
    owners = torch.tensor([0, 0, 1, 1, 2, 2])[shuffled]
    assert choice_metrics(image=image, text=text[shuffled], owners=owners) == metrics


def test_retrieval_by_hand():
    # Two images; texts 0 and 1 belong to image 0, text 2 to image 1. Scores:
    #            image 0  image 1
    #   text 0     1.0      0.0     retrieves its image
    #   text 1     0.0      1.0     retrieves the other first
    #   text 2     0.6      0.8     retrieves its image
    # Image 0 retrieves text 0, one of its two: a hit. Image 1 retrieves text 1, not its own: a miss; a hit at K = 2.
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]])
    metrics = retrieval_metrics(image=image, text=text, owners=torch.tensor([0, 0, 1]), recall_k=(1, 2))
    assert metrics == {
        "image_retrieval_recall@1": 2 / 3,
        "image_retrieval_recall@2": 1,
        "text_retrieval_recall@1": 1 / 2,
        "text_retrieval_recall@2": 1,
    }


@pytest.mark.parametrize("tile_numbers", [1, 200, 2**20])
def test_retrieval_is_clip_benchmarks_whatever_the_tile(tile_numbers):
    image, text = F.normalize(torch.randn(20, 8), dim=-1), F.normalize(torch.randn(61, 8), dim=-1)
    owners = torch.cat([torch.arange(20), torch.randint(0, 20, (41,))])
    metrics = retrieval_metrics(image=image, text=text, owners=owners, tile_numbers=tile_numbers)
    assert metrics == pytest.approx(clip_benchmark_retrieval(image, text, owners, (1, 5, 10)))


def naive_retrieval(image, text, owners, k) -> dict[str, float]:
    scores = (text @ image.T).tolist()
    images = [naive_rank(row, owner) < k for row, owner in zip(scores, owners.tolist(), strict=True)]
    texts = []
    for number in range(len(image)):
        column = [row[number] for row in scores]
        own = [j for j, owner in enumerate(owners.tolist()) if owner == number]
        texts.append(any(naive_rank(column, j) < k for j in own))
    return {
        f"image_retrieval_recall@{k}": sum(images) / len(images),
        f"text_retrieval_recall@{k}": sum(texts) / len(texts),
    }


@pytest.mark.parametrize("tile_numbers", [1, 50, 2**20])
def test_equal_scores_and_images_without_texts_count_as_in_a_loop(tile_numbers):
    # Integers give exact scores, so ties are exact; captions 0 and 1 are equal and belong to two images.
    image, text = torch.randint(-1, 2, (13, 4)).float(), torch.randint(-1, 2, (29, 4)).float()
    text[1] = text[0]
    owners = torch.cat([torch.tensor([0, 1]), torch.randint(0, 11, (27,))])  # images 11 and 12 have none
    for k in (1, 2, 5, 10):
        metrics = retrieval_metrics(image=image, text=text, owners=owners, recall_k=(k,), tile_numbers=tile_numbers)
        assert metrics == pytest.approx(naive_retrieval(image, text, owners, k))


def test_of_equal_captions_of_two_images_both_retrieve_the_first():
    image, text = torch.eye(2), torch.tensor([[1.0, 1], [1, 1]])
    metrics = retrieval_metrics(image=image, text=text, owners=torch.tensor([0, 1]), recall_k=(1, 2))
    assert metrics["text_retrieval_recall@1"] == 0.5 and metrics["text_retrieval_recall@2"] == 1


def retrieved(rank: int, world_size: int) -> dict[str, float]:
    torch.manual_seed(3)
    image, text = torch.randint(-1, 2, (23, 4)).float(), torch.randint(-1, 2, (57, 4)).float()
    owners = torch.randint(0, 23, (57,))
    return retrieval_metrics(image=image, text=text, owners=owners, tile_numbers=100)


def test_processes_share_the_tiles_and_return_the_same():
    assert run_ranks(retrieved, 3) == 3 * [retrieved(0, 1)]


def test_k_beyond_the_number_of_candidates_is_a_hit():
    image, text = torch.eye(3), -torch.eye(3)
    metrics = retrieval_metrics(image=image, text=text, owners=torch.arange(3), recall_k=(1, 10))
    assert metrics["image_retrieval_recall@10"] == metrics["text_retrieval_recall@10"] == 1
    assert metrics["image_retrieval_recall@1"] == 0


def test_the_whole_score_matrix_never_exists():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    image, text = torch.randn(300, 4), torch.randn(900, 4)
    with Watch():
        retrieval_metrics(image=image, text=text, owners=torch.arange(900) % 300, tile_numbers=9000)
    assert largest <= 9000


def test_half_precision_is_upcast_before_scores_are_compared():
    # bf16 scores have 8 bits: most of these close scores would tie.
    image = (1 + 0.1 * torch.randn(200, 16)).bfloat16()
    text, owners = (image.float() + 0.02 * torch.randn(200, 16)).bfloat16(), torch.arange(200)
    half = retrieval_metrics(image=image, text=text, owners=owners)
    assert half == retrieval_metrics(image=image.float(), text=text.float(), owners=owners)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_accuracy(logits=torch.zeros(2, 3), labels=torch.zeros(2).long(), k=4), "k=4"),
        (lambda: top_k_accuracy(logits=torch.zeros(0, 3), labels=torch.zeros(0).long(), k=1), "0 images"),
        (lambda: classification_metrics(logits=torch.zeros(0, 3), labels=torch.zeros(0).long()), "0 images"),
        (
            lambda: retrieval_metrics(image=torch.eye(2), text=torch.eye(2), owners=torch.tensor([0, 2])),
            "0..2",
        ),
        (
            lambda: retrieval_metrics(image=torch.eye(2), text=torch.eye(2)[:0], owners=torch.arange(0)),
            "0 texts",
        ),
        (
            lambda: retrieval_metrics(image=torch.eye(2), text=torch.eye(2), owners=torch.arange(2), recall_k=(0,)),
            "recall_k=(0,)",
        ),
    ],
)
def test_undefined_metrics_are_refused(call, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        call()
    assert message in str(caught.value)


def bootstrap_draws(n: int, draws: int, seed: int) -> list[torch.Tensor]:
    """The indices of the images of each draw."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for start in range(0, draws, 50):
        drawn += list(torch.randint(n, (min(50, draws - start), n), generator=generator))
    return drawn


def percentiles(numbers: list[float]) -> tuple[float, float]:
    return tuple(np.quantile(np.array(numbers), [0.025, 0.975]))


def test_intervals_equal_those_of_the_drawn_images():
    logits, labels = torch.randn(31, 6), torch.randint(0, 6, (31,))
    computed = intervals(classification_statistics(logits=logits, labels=labels), images=31, draws=120, seed=7)
    naive = [classification_metrics(logits=logits[i], labels=labels[i]) for i in bootstrap_draws(31, 120, 7)]
    for name, interval in computed.items():
        assert interval == pytest.approx(percentiles([metrics[name] for metrics in naive])), name
        assert interval[0] < interval[1]


def test_intervals_of_average_precision_calibration_and_likeness_equal_naive_ones():
    scores, targets = torch.randn(17, 3), torch.randint(0, 2, (17, 3))
    logits, other, labels = 3 * torch.randn(17, 7), 3 * torch.randn(17, 7), torch.randint(0, 7, (17,))
    for make in (
        lambda i: multilabel_statistics(scores=scores[i], targets=targets[i]),
        lambda i: calibration_statistics(logits=logits[i], labels=labels[i]),
        lambda i: likeness_statistics(student=logits[i], teacher=other[i]),
    ):
        computed = intervals(make(torch.arange(17)), images=17, draws=60, seed=1)
        naive = [values(make(i), images=17) for i in bootstrap_draws(17, 60, 1)]
        for name, interval in computed.items():
            assert interval == pytest.approx(percentiles([metrics[name] for metrics in naive])), name


def test_a_caption_is_drawn_with_its_image():
    image, text = torch.randn(12, 4), torch.randn(40, 4)
    owners = torch.cat([torch.arange(12), torch.randint(0, 12, (28,))])
    statistics = retrieval_statistics(image=image, text=text, owners=owners, recall_k=(3,))
    interval = intervals(statistics, images=12, draws=80, seed=2)["image_retrieval_recall@3"]
    hits = (text @ image.T).topk(3).indices.eq(owners[:, None]).any(dim=1).double()
    naive = []
    for chosen in bootstrap_draws(12, 80, 2):
        captions = torch.cat([(owners == number).nonzero()[:, 0] for number in chosen])
        naive.append(hits[captions].mean().item())
    assert interval == pytest.approx(percentiles(naive))


def test_the_paired_test_detects_a_difference_within_overlapping_intervals():
    # B is correct wherever A is, and on 5 more images: no draw has the other sign, although the intervals overlap.
    labels = torch.zeros(200, dtype=torch.int64)
    a = torch.tensor([[1.0, 0.0]] * 100 + [[0.0, 1.0]] * 100)
    b = torch.tensor([[1.0, 0.0]] * 105 + [[0.0, 1.0]] * 95)
    first, second = (classification_statistics(logits=logits, labels=labels) for logits in (b, a))
    difference = paired_differences(first, second, images=200, draws=999, seed=0)["acc1"]
    assert difference.value == pytest.approx(0.025) and 0 < difference.low < difference.value < difference.high
    assert difference.p < 0.05
    low, high = intervals(first, images=200)["acc1"][0], intervals(second, images=200)["acc1"][1]
    assert low < high
    same = paired_differences(first, first, images=200, draws=99)["acc1"]
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert paired_differences(second, first, images=200, draws=999, seed=0)["acc1"].value == -difference.value


def test_calibration_by_hand():
    # Two images with confidence 0.9 (bin 14), one of them correct; two with 0.51 (bin 8), both correct.
    sure, unsure = math.log(9), math.log(0.51 / 0.49)
    logits = torch.tensor([[sure, 0], [sure, 0], [unsure, 0], [unsure, 0]])
    metrics = values(calibration_statistics(logits=logits, labels=torch.tensor([0, 1, 0, 0])), images=4)
    assert metrics["ece"] == pytest.approx((2 * abs(0.5 - 0.9) + 2 * abs(1 - 0.51)) / 4, abs=1e-6)


def test_likeness_by_hand():
    student, teacher = torch.tensor([[2.0, 1, 0], [0, 0, 1]]), torch.tensor([[3.0, 0, 0], [1, 0, 0]])
    metrics = values(likeness_statistics(student=student, teacher=teacher), images=2)
    assert metrics["agreement@1"] == 0.5 and math.isnan(metrics["top5_overlap"])  # all classes are in any top five
    p, q = teacher.softmax(1), student.softmax(1)
    assert metrics["kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    impossible = torch.tensor([[1.0, 0, -torch.inf]])  # a class with probability 0
    assert values(likeness_statistics(student=impossible, teacher=impossible), images=1)["kl"] == 0
    student = torch.arange(10.0)[None]
    overlap = values(likeness_statistics(student=student, teacher=student.roll(2, dims=1)), images=1)["top5_overlap"]
    assert overlap == 3 / 5  # 5..9 against 7..9, 0, 1 moved by two: 5, 6, 7 of the shifted ones stay
