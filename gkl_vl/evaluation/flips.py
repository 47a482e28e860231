"""On which images of a set a student and its teacher differ: those that the student lost, and those that it won.

Axis letters: n = images, C = classes.
"""

from collections.abc import Sequence

from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from gkl_vl.data.images import BrokenImage
from gkl_vl.evaluation.benchmark import Outcome, measure
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.metrics import paired_differences
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.report.page import FlippedImage, Flips


def first_classification(sets: Sequence[BenchmarkSet]) -> BenchmarkSet | None:
    """The first set with one label per image, class names and prompts; None if there is none."""
    return next((one for one in sets if one.kind == "classification" and one.classnames and one.templates), None)


def top1_flips(
    student: Embedder, teacher: Embedder, dataset: BenchmarkSet, *, teacher_name: str, shown: int = 12
) -> Flips:
    """Compares the top-1 predictions of two models on a set with class names.

    Each model embeds the set once, or takes its embeddings from its cache. All processes take part, unless the
    embedders are `alone`.

    Args:
        shown: largest number of lost images, and of won ones, that are decoded for display, evenly spaced through the
            set.

    Raises: UserError as `measure`.
    """
    (own,), (reference,) = measure(student, dataset), measure(teacher, dataset)
    student_right, teacher_right = _is_right(own), _is_right(reference)
    lost, won = ~student_right & teacher_right, student_right & ~teacher_right
    difference = paired_differences(
        {"acc1": own.metrics["acc1"]}, {"acc1": reference.metrics["acc1"]}, images=own.images
    )["acc1"]
    rows = [_spread(mask.nonzero().flatten().tolist(), shown) for mask in (lost, won)]
    images = _images_at(dataset, [row for of_case in rows for row in of_case], any_broken=own.broken > 0)
    lost_images, won_images = (
        [_flipped(row, images[row], own, reference, dataset) for row in of_case] for of_case in rows
    )
    return Flips(
        dataset=dataset.name,
        teacher=teacher_name,
        both=int((student_right & teacher_right).sum()),
        lost=int(lost.sum()),
        won=int(won.sum()),
        neither=int((~student_right & ~teacher_right).sum()),
        difference=(difference.value, difference.low, difference.high),
        lost_images=lost_images,
        won_images=won_images,
    )


def _is_right(outcome: Outcome) -> Bool[Tensor, " n"]:
    logits, labels = _classified(outcome)
    return logits.argmax(dim=1) == labels


def _classified(outcome: Outcome) -> tuple[Tensor, Tensor]:
    assert outcome.logits is not None and outcome.labels is not None  # of a classification
    return outcome.logits, outcome.labels


def _spread(rows: list[int], count: int) -> list[int]:
    """At most `count` of the rows, evenly spaced."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _images_at(dataset: BenchmarkSet, rows: list[int], *, any_broken: bool) -> dict[int, Image.Image]:
    """The images of these rows. Rows count the images that can be decoded, so where some cannot, all are tried."""
    images: dict[int, Image.Image] = {}
    wanted, row = set(rows), 0
    for record in dataset.records():
        if len(images) == len(wanted):
            break
        if any_broken or row in wanted:
            try:
                image = record.decode()
            except BrokenImage:
                continue
            if row in wanted:
                images[row] = image
        row += 1
    return images


def _flipped(row: int, image: Image.Image, student: Outcome, teacher: Outcome, dataset: BenchmarkSet) -> FlippedImage:
    names = dataset.classnames
    assert names is not None  # by `measure`
    best = []
    for outcome in (student, teacher):
        logits, _ = _classified(outcome)
        probability, label = logits[row].double().softmax(dim=0).max(dim=0)
        best.append((names[int(label)], float(probability)))
    _, labels = _classified(student)
    return FlippedImage(image=image, name=names[int(labels[row])], student=best[0], teacher=best[1])
