"""Images that keep their label are drawn or read, and batches combine two sets of any lengths."""

import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from gkl_vl.data.augment import randaugment_cutout
from gkl_vl.data.label_splits import draw_labelled, labelled_lines, read_labelled
from gkl_vl.data.labelled import LabelledSet, pixel_image
from gkl_vl.data.loaders import Passes, SemiSupervisedLoader
from gkl_vl.data.views import DiskViews, MemoryImages, MemoryViews
from gkl_vl.errors import UserError

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 0, 2])


def labelled_set(labels=LABELS) -> LabelledSet:
    return LabelledSet(
        name="pets",
        labels=labels,
        num_classes=3,
        classnames=None,
        images=lambda i: pixel_image(f"{i}", np.full((2, 2, 3), i, dtype=np.uint8)),
    )


# ---- which images keep their label


def test_every_class_keeps_the_same_number_drawn_by_seed():
    data = labelled_set()
    drawn = {seed: draw_labelled(data, num_labels=6, seed=seed).tolist() for seed in range(20)}
    for index in drawn.values():
        assert index == sorted(set(index)) and Counter(LABELS[index].tolist()) == {0: 2, 1: 2, 2: 2}
    assert len({tuple(index) for index in drawn.values()}) > 10
    assert set().union(*map(set, drawn.values())) == set(range(len(LABELS)))


def test_the_draw_is_the_same_on_every_platform():
    """The draw uses hashes and no generator, so these numbers must never change."""
    assert draw_labelled(labelled_set(), num_labels=6, seed=0).tolist() == [1, 3, 4, 6, 8, 11]
    many = labelled_set(torch.arange(3000) % 3)
    assert draw_labelled(many, num_labels=3, seed=7).tolist() == [684, 1316, 2524]


def test_more_labels_of_one_seed_include_the_fewer():
    data = labelled_set()
    assert set(draw_labelled(data, num_labels=3, seed=1).tolist()) < set(
        draw_labelled(data, num_labels=6, seed=1).tolist()
    )


@pytest.mark.parametrize(
    "num_labels, message",
    [
        (2, "--num-labels 2 is fewer than the 3 classes of pets: at least one of each"),
        (7, "--num-labels 7 is not divisible by the 3 classes of pets: use 6 or 9"),
        (12, "--num-labels 12 is 4 a class, pets has 3 of class 1: take fewer"),
    ],
)
def test_an_impossible_number_of_labels_is_refused(num_labels, message):
    with pytest.raises(UserError, match=re.escape(message)):
        draw_labelled(labelled_set(), num_labels=num_labels, seed=0)


def test_files_of_a_run_and_of_usb_are_read(tmp_path):
    data = labelled_set()
    index = draw_labelled(data, num_labels=3, seed=0)
    ours = tmp_path / "labelled.txt"
    ours.write_text(labelled_lines(index, LABELS))
    assert ours.read_text().splitlines()[0] == f"{index[0]} {LABELS[index[0]]}"
    assert torch.equal(read_labelled(str(ours), data), index)
    ours.write_text("".join(f"{i}\n" for i in index.tolist()))
    assert torch.equal(read_labelled(str(ours), data), index)
    shuffled = index[[2, 0, 1]]  # USB sorts by class
    np.save(tmp_path / "lb_labels3_1.0_seed0_idx.npy", shuffled.numpy())
    assert torch.equal(read_labelled(str(tmp_path / "lb_labels3_1.0_seed0_idx.npy"), data), shuffled)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "names no image"),
        ("0 2\n12 0\n", "names image 12, pets has 0 to 11: it is of another data set"),
        ("0 2\n1 3\n", "has the label 3, the 3 classes of pets end at 2: it is of another data set"),
        ("0 2\n1 1\n", "has the label 1 for image 1, pets has 0: it is of another data set"),
        ("0\n1\n0\n", "names image 0 more than once"),
        ("0\n1\n", "has no image of class 1 of pets: every class needs one"),
        ("0 2\n\n", "line 2 is '': expected NUMBER or NUMBER LABEL"),
        ("0 2\n1 one\n", "line 2 is '1 one': expected NUMBER or NUMBER LABEL"),
        ("-1\n", "line 1 is '-1': expected NUMBER or NUMBER LABEL"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, content, message):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_labelled(str(tmp_path / "list.txt"), labelled_set())


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([0, 1, 40]), "names image 40, pets has 0 to 11: it is of another data set"),
        (np.array([0, 1, 2, 4]), "names 2 images of class 0 of pets and 1 of class 1: it is of another data set or of"),
        (np.array([0, -1, 2]), "names image -1, pets has 0 to 11: it is of another data set"),
        (np.zeros((2, 2), dtype=int), "holds int64 of shape [2, 2]: expected 1-D integers"),
        (np.array([0.0, 1.0]), "holds float64 of shape [2]: expected 1-D integers"),
        (np.array([{}]), "cannot be read as .npy"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path, array, message):
    np.save(tmp_path / "idx.npy", array)
    with pytest.raises(UserError, match=re.escape(message)):
        read_labelled(str(tmp_path / "idx.npy"), labelled_set())


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_labelled(str(tmp_path / "idx.npy"), labelled_set())
    (tmp_path / "idx.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="cannot be read as .npy"):
        read_labelled(str(tmp_path / "idx.npy"), labelled_set())


# ---- passes


@pytest.mark.parametrize("size, length", [(5, 2), (5, 5), (3, 8), (1, 4), (7, 3)])
def test_the_sequence_of_passes_does_not_depend_on_the_length_of_the_cuts(size, length):
    whole = [(number, int(i)) for number, part in Passes(size, seed=0, name="x").cut(0, 40) for i in part]
    assert [number for number, _ in whole] == [place // size for place in range(40)]
    for number in range(40 // size):
        assert sorted(i for n, i in whole if n == number) == list(range(size))
    passes, pieces = Passes(size, seed=0, name="x"), []
    for start in range(0, 40 - length, length):
        pieces += [(number, int(i)) for number, part in passes.cut(start, length) for i in part]
    assert pieces == whole[: len(pieces)]


def test_passes_differ_by_seed_and_name():
    orders = {
        tuple(Passes(30, seed=seed, name=name).cut(0, 30)[0][1].tolist()) for seed in (0, 1) for name in ("x", "y")
    }
    assert len(orders) == 4


# ---- batches

M, POOL = 3, 11  # images with label, and without
HIDDEN = torch.arange(POOL) % 4 - 1


def images(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=draw, dtype=torch.uint8)


def loader(*, batch_size=2, mu=3, rank=0, world_size=1, position=None, workers=0, seed=0) -> SemiSupervisedLoader:
    pool = images(POOL)
    weak = MemoryViews(images=pool, seed=seed, padding=1, reflect=True)
    strong = DiskViews(
        data=MemoryImages(pool),
        augment=randaugment_cutout(8, upside_down=False),
        plain=lambda image: torch.zeros(0),
        seed=seed,
        num_workers=workers,
    )
    return SemiSupervisedLoader(
        labelled=MemoryViews(images=images(M), seed=seed, padding=1),
        labels=torch.tensor([0, 1, 2]),
        weak=weak,
        strong=strong,
        hidden_labels=HIDDEN,
        batch_size=batch_size,
        mu=mu,
        seed=seed,
        rank=rank,
        world_size=world_size,
        position=position,
    )


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        for name, value in one.items()
    )


def test_a_batch_has_mu_images_without_label_for_each_with_one():
    batch = next(iter(loader()))
    assert batch["image"].shape == (2, 3, 8, 8) and batch["weak"].shape == batch["strong"].shape == (6, 3, 8, 8)
    assert all(batch[name].dtype == torch.uint8 for name in ("image", "weak", "strong"))
    assert torch.equal(batch["hidden_label"], HIDDEN[batch["unlabelled_index"]])
    assert torch.equal(batch["label"], torch.tensor([int(key) for key in batch["keys"]]))
    assert not torch.equal(batch["weak"], batch["strong"])


def test_each_set_has_its_own_passes():
    """3 labels and 11 images, 2 and 6 per batch: neither length divides the other, nor a batch."""
    batches = list(islice(loader(), 22))
    labelled = Counter(key for batch in batches for key in batch["keys"])
    unlabelled = Counter(int(i) for batch in batches for i in batch["unlabelled_index"])
    assert max(labelled.values()) - min(labelled.values()) <= 1 and len(labelled) == M
    assert set(unlabelled.values()) == {12} and len(unlabelled) == POOL
    assert [batch["epoch"] for batch in batches] == [number * 6 // POOL for number in range(22)]
    assert [batch["step"] for batch in batches] == list(range(22))


def test_an_image_is_another_view_each_time():
    batches = list(islice(loader(batch_size=5, mu=1), 11))
    for name, index in (("weak", "unlabelled_index"), ("strong", "unlabelled_index"), ("image", None)):
        numbers = [i for b in batches for i in (b[index].tolist() if index else map(int, b["keys"]))]
        views = [view.numpy().tobytes() for batch in batches for view in batch[name]]
        of_first = {view for i, view in zip(numbers, views, strict=True) if i == numbers[0]}
        assert len(of_first) >= 3, name


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_split_the_batch_of_one_process(world_size):
    whole = list(islice(loader(batch_size=6, mu=2), 5))
    parts = [
        list(islice(loader(batch_size=6 // world_size, mu=2, rank=r, world_size=world_size), 5))
        for r in range(world_size)
    ]
    for number, batch in enumerate(whole):
        for name in ("image", "label", "weak", "strong", "unlabelled_index"):
            assert torch.equal(torch.cat([part[number][name] for part in parts]), batch[name]), name
        assert {part[number]["epoch"] for part in parts} == {batch["epoch"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_from_a_position(workers):
    """Worker processes are ahead of the yielded batches, which a position does not count."""
    whole = list(islice(loader(), 9))
    first = loader(workers=workers)
    taken = list(islice(first, 4))
    later = loader(workers=workers, position=first.position())
    assert all(map(same, [*taken, *islice(later, 5)], whole))


def test_without_mu_no_unlabelled_image_is_requested():
    class Never:
        def batches(self, ids):
            raise AssertionError("requested")

        def description(self) -> str:
            return ""

    labelled_only = loader(mu=0)
    labelled_only.weak = labelled_only.strong = Never()
    batch = next(iter(labelled_only))
    assert set(batch) == {"image", "label", "keys", "step"}


def test_images_in_memory_can_be_read_one_by_one():
    pool = images(4)
    image = MemoryImages(pool).read(2)
    assert isinstance(image, Image.Image) and np.array_equal(np.asarray(image), pool[2].permute(1, 2, 0).numpy())
