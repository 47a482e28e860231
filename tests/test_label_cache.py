"""Stored logits equal the online teacher's on the same views, and are read from disk only for the same arguments."""

import dataclasses
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from gkl_vl.data.augment import imagenet_augmentation, imagenet_center
from gkl_vl.data.images import EncodedImage
from gkl_vl.data.labelled import LabelledSet, pixel_image
from gkl_vl.data.loaders import LabelledLoader
from gkl_vl.data.views import PLAIN, DiskViews, MemoryViews, Views
from gkl_vl.evaluation.embed import predict
from gkl_vl.models.classifiers import Classifier
from gkl_vl.teachers.online import online_label_teacher
from gkl_vl.teachers.store import store_logits, stored_label_teacher

N, SIDE, CLASSES, VIEWS = 14, 8, 12, 2
LABELS = torch.arange(N) % CLASSES
CPU = torch.device("cpu")
FP16 = {"rtol": 2**-11 * 1.01, "atol": 1e-5}  # half a unit in the last place; batches of other sizes


def linear(seed: int = 0) -> Classifier:
    """A teacher whose logits differ by a few units, like those of a trained one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES)).requires_grad_(False).eval()
    model[1].weight.mul_(4)
    return Classifier(name="linear", model=model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), num_classes=CLASSES)


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (N, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def memory(seed: int = 0) -> MemoryViews:
    return MemoryViews(images=images(), seed=seed)


@dataclasses.dataclass(frozen=True)
class Pictures:
    pixels: Tensor

    def __call__(self, index: int) -> EncodedImage:
        return pixel_image(f"picture {index}", self.pixels[index].permute(1, 2, 0).numpy())


def disk(size: int = SIDE) -> DiskViews:
    data = LabelledSet(name="some", labels=LABELS, num_classes=CLASSES, classnames=None, images=Pictures(images()))
    augment, plain = imagenet_augmentation(size), imagenet_center(SIDE)
    return DiskViews(data=data, augment=augment, plain=plain, seed=0, num_workers=0)


def store(folder, **changes):
    options = {"classifier": linear(), "views": memory(), "labels": LABELS, "contents": "some images"}
    options |= {"num_views": VIEWS, "top_k": None, "device": CPU, "folder": folder}
    return store_logits(**(options | changes))


def batches_of(views: Views) -> list[dict]:
    """Two epochs, which have each image in both views."""
    loader = LabelledLoader(
        views=views,
        labels=LABELS,
        batch_size=7,
        seed=0,
        rank=0,
        world_size=1,
        num_views=VIEWS,
        position=None,
    )
    return list(islice(loader, VIEWS * N // 7))


@pytest.mark.parametrize("make", [memory, disk], ids=["memory", "disk"])
def test_all_logits_equal_the_online_teachers(make, tmp_path):
    stored = store(tmp_path, views=make())
    assert stored.values.shape == (VIEWS, N, CLASSES) and stored.values.dtype == torch.float16
    lookup, online = stored_label_teacher(stored, CLASSES), online_label_teacher(linear())
    seen = set()
    for batch in batches_of(make()):
        torch.testing.assert_close(lookup(batch), online(batch), **FP16)
        seen |= {(batch["view"], key) for key in batch["keys"]}
    assert len(seen) == VIEWS * N
    assert (stored.values[0] - stored.values[1]).abs().amax(
        dim=1
    ).median() > 0.1  # else those of another view would pass


@pytest.mark.parametrize("top_k", [1, 3, CLASSES - 1])
def test_the_largest_logits_are_exact_and_the_others_have_the_same_total_probability(top_k, tmp_path):
    stored = store(tmp_path, top_k=top_k)
    assert stored.values.shape == stored.classes.shape == (VIEWS, N, top_k) and stored.rest.shape == (VIEWS, N)
    lookup, online = stored_label_teacher(stored, CLASSES), online_label_teacher(linear())
    for batch in batches_of(memory()):
        logits, whole = lookup(batch), online(batch)
        kept = whole.topk(top_k).indices
        torch.testing.assert_close(logits.gather(1, kept), whole.gather(1, kept), **FP16)
        probabilities = [x.softmax(1).gather(1, kept) for x in (logits, whole)]
        torch.testing.assert_close(*probabilities, atol=1e-3, rtol=0)
        # The log-sum-exp too: a softmax does not change with a constant added to all logits.
        torch.testing.assert_close(logits.logsumexp(1), whole.logsumexp(1), atol=5e-3, rtol=0)
        others = torch.ones_like(whole, dtype=torch.bool).scatter(1, kept, False)
        totals = [x.softmax(1).where(others, 0).sum(1) for x in (logits, whole)]
        torch.testing.assert_close(*totals, atol=1e-3, rtol=0)
        assert all(len(row[other].unique()) == 1 for row, other in zip(logits, others, strict=True))
        assert logits.argmax(1).tolist() == whole.argmax(1).tolist()


@pytest.mark.parametrize("top_k", [CLASSES, 99])
def test_top_k_of_all_classes_or_more_stores_all_logits(top_k, tmp_path):
    assert torch.equal(store(tmp_path, top_k=top_k).values, store(tmp_path).values)


def test_the_same_arguments_are_read_from_disk(tmp_path):
    teacher, calls = linear(), []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    first = store(tmp_path, classifier=teacher, top_k=4)
    assert len(calls) == VIEWS
    again = store(tmp_path, classifier=teacher, top_k=4)
    assert len(calls) == VIEWS and len(list(tmp_path.iterdir())) == 1
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))


def test_other_arguments_have_another_file(tmp_path):
    cases = [
        {},
        {"classifier": linear(seed=1)},
        {"classifier": dataclasses.replace(linear(), mean=(0.5, 0.4, 0.2))},
        {"classifier": dataclasses.replace(linear(), std=(0.2, 0.3, 0.5))},
        {"views": memory(seed=1)},
        {"views": disk()},
        {"views": dataclasses.replace(disk(), augment=imagenet_augmentation(SIDE).transforms[0])},
        {"num_views": VIEWS + 1},
        {"top_k": 3},
        {"top_k": 4},
        {"contents": "other images"},
        {"labels": LABELS.flip(0)},
        {"labels": LABELS[:-1]},
    ]
    for count, changes in enumerate(cases, 1):
        store(tmp_path, **changes)
        assert len(list(tmp_path.iterdir())) == count, changes
    for changes in cases:
        store(tmp_path, **changes)
    assert len(list(tmp_path.iterdir())) == len(cases)


def test_the_stored_teacher_has_the_logits_of_the_views_that_the_student_gets(tmp_path):
    """The loader and the store number the views alike: the logits of the other view differ."""
    stored = store(tmp_path)
    lookup = stored_label_teacher(stored, CLASSES)
    for batch in batches_of(memory()):
        logits = lookup(batch)
        assert torch.equal(logits, stored.values[batch["view"], batch["index"]].float())
        assert not torch.allclose(logits, stored.values[1 - batch["view"], batch["index"]].float(), atol=0.1)


def test_storing_does_not_advance_the_generator(tmp_path):
    teacher = linear()
    before = torch.get_rng_state()
    store(tmp_path, classifier=teacher, views=disk())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("batch_size", [5, 7, 100])
def test_predictions_are_in_the_order_of_the_set(batch_size):
    teacher = linear()
    logits = predict(classifier=teacher, views=memory(), view=PLAIN, count=N - 1, device=CPU, batch_size=batch_size)
    torch.testing.assert_close(logits, teacher.model(teacher.prepare(images()[: N - 1])))
