"""A view depends only on seed, view and image, and a batch only on its number: in any process, and after a resume."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks
from PIL import Image
from torch import Tensor

from gkl_vl.data.augment import (
    Cutout,
    cifar_autoaugment,
    cifar_cutout,
    describe,
    imagenet_augmentation,
    imagenet_center,
    randaugment_cutout,
)
from gkl_vl.data.images import EncodedImage
from gkl_vl.data.labelled import LabelledSet, open_labelled, pixel_image
from gkl_vl.data.loaders import LabelledLoader
from gkl_vl.data.views import PLAIN, DiskViews, MemoryViews, Views
from gkl_vl.errors import UserError

N, HEIGHT, WIDTH = 11, 6, 5
LABELS = torch.arange(N) % 3


def noise(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Noise:
    """Images by index; can be pickled for other processes."""

    def __call__(self, index: int) -> EncodedImage:
        return pixel_image(f"noise {index}", noise(index))


def memory(*, count: int = N, seed: int = 0) -> MemoryViews:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
    return MemoryViews(images=images, seed=seed)


def disk(*, seed: int = 0, workers: int = 0, data: LabelledSet | None = None) -> DiskViews:
    data = data or LabelledSet(name="noise", labels=LABELS, num_classes=3, classnames=None, images=Noise())
    augment, plain = imagenet_augmentation(8), imagenet_center(8)
    return DiskViews(data=data, augment=augment, plain=plain, seed=seed, num_workers=workers)


KINDS = {"memory": memory, "disk": disk}
both_kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def batches_of(views: Views, *requests: tuple[int, list[int]]) -> list[Tensor]:
    return list(views.batches((view, torch.tensor(index)) for view, index in requests))


# ---- views


def test_a_view_in_memory_is_a_crop_of_the_padded_image_perhaps_flipped():
    """Noise matches one corner and one of the two directions only, so comparing with all of them gives the draws."""
    views = memory(count=300)
    (made,) = batches_of(views, (3, list(range(300))))
    matches = []
    for number, image in enumerate(views.images):
        padded = F.pad(image, (4, 4, 4, 4))
        for row in range(9):
            for column in range(9):
                crop = padded[:, row : row + HEIGHT, column : column + WIDTH]
                matches += [(number, row, column, 0)] if torch.equal(made[number], crop) else []
                matches += [(number, row, column, 1)] if torch.equal(made[number], crop.flip(2)) else []
    numbers, rows, columns, flips = zip(*matches, strict=True)
    assert numbers == tuple(range(300))
    assert set(rows) == set(columns) == set(range(9))
    assert len(set(zip(rows, columns, strict=True))) > 60  # rows and columns are drawn apart: of 81, 79 on average
    assert 110 < sum(flips) < 190


def test_plain_views_are_the_images_themselves():
    views, index = memory(), [4, 0, 4]
    (made,) = batches_of(views, (PLAIN, index))
    assert torch.equal(made, views.images[index])
    (made,) = batches_of(disk(), (PLAIN, index))
    center = imagenet_center(8)
    assert torch.equal(made, torch.stack([center(Image.fromarray(noise(i))) for i in index]))


@both_kinds
def test_a_view_is_the_same_in_every_batch(make):
    (whole,) = batches_of(make(), (2, list(range(N))))
    plain, pair, other, alone, shuffled = batches_of(
        make(), (PLAIN, [7]), (2, [3, 7]), (1, [3, 7]), (2, [7]), (2, [7, 10, 3, 7])
    )
    assert torch.equal(pair, whole[[3, 7]]) and torch.equal(alone, whole[[7]])
    assert torch.equal(shuffled, whole[[7, 10, 3, 7]])
    assert not torch.equal(other, pair) and not torch.equal(plain, alone)


@both_kinds
def test_views_and_seeds_differ(make):
    index = list(range(N))
    first, second = batches_of(make(), (0, index), (1, index))
    (other,) = batches_of(make(seed=1), (0, index))
    for one, another in ((first, second), (first, other), (second, other)):
        assert (one != another).flatten(1).any(dim=1).sum() >= N - 1  # two of 162 crops may be the same by chance


@both_kinds
def test_views_do_not_change_the_generator(make):
    before = torch.get_rng_state()
    batches_of(make(), (0, [1, 2]), (PLAIN, [3]))
    assert torch.equal(before, torch.get_rng_state())


def test_descriptions_of_different_views_differ():
    views = DiskViews(
        data=disk().data, augment=imagenet_augmentation(9), plain=imagenet_center(8), seed=0, num_workers=0
    )
    described = [v.description() for v in (memory(), memory(seed=1), disk(), disk(seed=1), views)]
    assert len(set(described)) == 5
    assert disk(workers=2).description() == disk().description()


REQUESTS = [(0, [3, 1]), (PLAIN, [1, 1]), (1, [3, 10]), (0, [0, 10])]


def views_of_rank(rank: int, world_size: int) -> list[Tensor]:
    return batches_of(disk(), *REQUESTS)


def test_views_from_disk_are_the_same_in_every_process():
    own = batches_of(disk(), *REQUESTS)
    from_workers = batches_of(disk(workers=2), *REQUESTS)
    (from_rank,) = run_ranks(views_of_rank, 1)
    assert len(own) == len(from_workers) == len(from_rank) == len(REQUESTS)
    for one, other, third in zip(own, from_workers, from_rank, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line(tmp_path, workers):
    for index in range(4):
        path = tmp_path / "train" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(index)).save(path)
    path.write_bytes(path.read_bytes()[:40])
    data = open_labelled(str(tmp_path), "train")
    views = disk(data=data, workers=workers).batches(iter([(0, torch.tensor([0, 1])), (0, torch.tensor([2, 3, 0]))]))
    assert next(views).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match=r"class1/3\.png cannot be decoded .*: fetch it again or remove it$") as caught:
        next(views)
    assert "\n" not in str(caught.value)


# ---- AutoAugment and Cutout


def autoaugmented(*, seed: int = 0, workers: int = 0, size: int = 10, cutout: int = 4) -> DiskViews:
    augment, plain = cifar_autoaugment(size, cutout=cutout), imagenet_center(size)
    return DiskViews(data=disk().data, augment=augment, plain=plain, seed=seed, num_workers=workers)


def test_a_cutout_is_a_square_around_any_pixel_clipped_at_the_border():
    h, w, size = 7, 6, 4
    image = torch.arange(1, 3 * h * w + 1, dtype=torch.uint8).reshape(3, h, w)
    centres = {}
    for row in range(h):
        for column in range(w):
            made = image.clone()
            for y in range(row - 2, row + 2):
                for x in range(column - 2, column + 2):
                    if 0 <= y < h and 0 <= x < w:
                        made[:, y, x] = 0
            centres[made.numpy().tobytes()] = (row, column)
    cutout = Cutout(size)
    drawn = [centres[cutout(image).numpy().tobytes()] for _ in range(1500)]
    assert set(drawn) == {(row, column) for row in range(h) for column in range(w)}
    assert max(drawn.count(place) for place in set(drawn)) < 80  # of 36 on average, 6 either way
    assert image.min() == 1  # the input is unchanged


def test_a_cutout_of_an_odd_width_is_that_wide():
    made = [Cutout(3)(torch.ones(3, 9, 9, dtype=torch.uint8)) for _ in range(100)]
    assert max(int((image == 0).sum()) for image in made) == 3 * 3 * 3
    assert min(int((image == 0).sum()) for image in made) == 3 * 2 * 2


def test_autoaugmented_views_depend_on_seed_view_and_image_alone():
    whole, other_view = batches_of(autoaugmented(), (2, list(range(N))), (1, list(range(N))))
    again, pair = batches_of(autoaugmented(workers=2), (2, [9, 0]), (2, [4, 4]))
    (other_seed,) = batches_of(autoaugmented(seed=1), (2, list(range(N))))
    assert whole.shape == (N, 3, 10, 10) and whole.dtype == torch.uint8
    assert torch.equal(again, whole[[9, 0]]) and torch.equal(pair, whole[[4, 4]])
    for other in (other_view, other_seed):
        assert (whole != other).flatten(1).any(dim=1).all()


def test_the_cutout_is_applied_last_and_can_be_omitted():
    """The draws before it are the same, so the only difference is a square of zeros."""
    (cut,), (whole,) = (batches_of(autoaugmented(cutout=cutout), (0, list(range(N)))) for cutout in (4, 0))
    changed = cut != whole
    assert (cut[changed] == 0).all()
    assert 0 < changed.flatten(1).sum(dim=1).max() <= 3 * 16
    assert autoaugmented(cutout=4).description() != autoaugmented(cutout=5).description()


def test_a_cutout_view_is_cropped_and_loses_half_its_width():
    """In a view of a white image, zeros are the padding, at most 4 of 10 at a border, and a square of 5."""
    augment, white = cifar_cutout(10), Image.new("RGB", (10, 10), (255, 255, 255))
    black = [int((augment(white) == 0).sum()) // 3 for _ in range(200)]
    assert 9 <= min(black) <= 25 < max(black) <= 100 - 6 * 6 + 25


# ---- batches


def loader(views: Views, *, labels: Tensor = LABELS, rank: int = 0, **changes) -> LabelledLoader:
    options = {"batch_size": 3, "seed": 0, "world_size": 1, "num_views": None, "position": None} | changes
    return LabelledLoader(views=views, labels=labels, rank=rank, **options)


def take(batches: Iterator[dict], count: int) -> list[dict]:
    return list(islice(batches, count))


def indices(batches: list[dict]) -> list[int]:
    return torch.cat([batch["index"] for batch in batches]).tolist()


def same(one: dict, other: dict) -> bool:
    tensors = ("image", "label", "index")
    return all(torch.equal(one[k], other[k]) if k in tensors else one[k] == other[k] for k in one.keys() | other.keys())


def test_an_epoch_has_every_image_once_except_those_dropped():
    batches = take(iter(loader(memory())), 12)
    epochs = [indices(batches[start : start + 3]) for start in range(0, 12, 3)]
    assert [batch["epoch"] for batch in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(len(set(epoch)) == 9 for epoch in epochs)  # of 11: two are dropped
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert set().union(*epochs) == set(range(N))  # other images are dropped each time
    assert indices(take(iter(loader(memory(), seed=1)), 3)) != epochs[0]


def test_ranks_split_an_epoch():
    for epoch in range(3):
        position = {"batches": 2 * epoch}
        shares = [
            indices(take(iter(loader(memory(), batch_size=2, rank=rank, world_size=2, position=position)), 2))
            for rank in range(2)
        ]
        alone = indices(take(iter(loader(memory(), batch_size=4, position=position)), 2))
        assert len(shares[0]) == len(shares[1]) == 4
        assert len(set(shares[0] + shares[1])) == 8 and set(shares[0] + shares[1]) == set(alone)


@pytest.mark.parametrize("num_views", [None, 2])
@pytest.mark.parametrize("make", [memory, disk, lambda: disk(workers=2)], ids=[*KINDS, "disk_with_workers"])
def test_the_entries_of_a_batch_match(make, num_views):
    """Also if workers have requested later batches."""
    for batch in take(iter(loader(make(), num_views=num_views)), 10):
        assert batch.keys() == {"image", "label", "index", "view", "epoch", "keys"}
        assert batch["view"] == (batch["epoch"] if num_views is None else batch["epoch"] % 2)
        (expected,) = batches_of(memory() if make is memory else disk(), (batch["view"], batch["index"].tolist()))
        assert torch.equal(batch["image"], expected) and batch["image"].dtype == torch.uint8
        assert torch.equal(batch["label"], LABELS[batch["index"]])
        assert batch["keys"] == [str(int(i)) for i in batch["index"]]


def test_epochs_cycle_through_the_stored_views():
    batches = take(iter(loader(memory(), num_views=2)), 15)
    assert [batch["view"] for batch in batches] == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert indices(batches[:3]) != indices(batches[6:9])  # the views repeat, the order does not


@pytest.mark.parametrize("done", [1, 3, 4])
@pytest.mark.parametrize("make", [memory, lambda: disk(workers=2)], ids=["memory", "disk_with_workers"])
def test_a_new_loader_continues_from_the_position_of_the_old_one(make, done):
    """Within an epoch of three batches, at its end, after it; the workers have requested later batches."""
    whole = take(iter(loader(make())), 8)
    old = loader(make())
    assert all(same(*pair) for pair in zip(take(iter(old), done), whole, strict=False))
    position = json.loads(json.dumps(old.position()))
    assert position == {"batches": done}
    new = loader(make(), position=position)
    rest = take(iter(new), 8 - done)
    assert [same(*pair) for pair in zip(rest, whole[done:], strict=True)] == [True] * (8 - done)
    assert new.position() == {"batches": 8} and new.num_skipped() == 0


def test_a_set_that_fills_no_batch_of_all_ranks_is_refused():
    with pytest.raises(UserError, match="^11 images do not fill a batch of 6 on 2 processes: lower --batch-size$"):
        loader(memory(), batch_size=6, world_size=2)
    assert loader(memory(), labels=torch.zeros(12, dtype=torch.long), batch_size=6, world_size=2).batches_per_epoch == 1


DIGESTS = {
    "cdcce6a1c63e451e": {},
    "be29b7d520a1e02a": {"num_views": 2, "batch_size": 2, "world_size": 2, "rank": 1, "position": {"batches": 3}},
}


@pytest.mark.parametrize("digest", DIGESTS)
def test_batches_are_the_same_as_before_second_views_existed(digest):
    """Fixed digests, so that a run started with an earlier version resumes with the same images."""
    made = hashlib.sha256()
    for batch in take(iter(loader(memory(), **DIGESTS[digest])), 7):
        for key in ("image", "label", "index"):
            made.update(batch[key].contiguous().numpy().tobytes())
        made.update(repr((batch["view"], batch["epoch"], batch["keys"])).encode())
    assert made.hexdigest()[:16] == digest


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [memory, lambda: disk(workers=2)], ids=["memory", "disk_with_workers"])
def test_second_views_are_of_the_same_images_and_do_not_change_the_first(make, workers):
    alone = take(iter(loader(make())), 8)
    both = take(iter(loader(make(), second_views=autoaugmented(seed=5, workers=workers))), 8)
    for one, other in zip(alone, both, strict=True):
        second = other.pop("second_image")
        assert same(one, other)
        (expected,) = batches_of(autoaugmented(seed=5), (one["view"], one["index"].tolist()))
        assert torch.equal(second, expected)


@pytest.mark.parametrize("done", [2, 3, 4])
def test_second_views_resume(done):
    def made(position: dict | None) -> LabelledLoader:
        return loader(memory(), second_views=autoaugmented(workers=2), num_views=2, position=position)

    whole, old = take(iter(made(None)), 7), made(None)
    take(iter(old), done)
    rest = take(iter(made(json.loads(json.dumps(old.position())))), 7 - done)
    for one, other in zip(rest, whole[done:], strict=True):
        assert torch.equal(one.pop("second_image"), other.pop("second_image")) and same(one, other)


# ---- weak and strong views of semi-supervised learning


def test_padding_can_be_a_reflection_and_images_flipped_vertically():
    views = dataclasses.replace(memory(count=300), padding=2, reflect=True, upside_down=True)
    (made,) = batches_of(views, (3, list(range(300))))
    matches = Counter()
    for number, image in enumerate(views.images):
        mirrored = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        for row in range(5):
            for column in range(5):
                crop = torch.from_numpy(mirrored[:, row : row + HEIGHT, column : column + WIDTH])
                for flips in ((), (1,), (2,), (1, 2)):
                    if torch.equal(crop.flip(flips), made[number]):
                        matches[flips, number] += 1
    assert len({number for _, number in matches}) == 300
    assert all(60 < sum(1 for flips, _ in matches if flips == kind) for kind in ((), (1,), (2,), (1, 2)))
    assert views.description() != memory(count=300).description()
    plain = dataclasses.replace(views, reflect=False, upside_down=False, padding=4)
    (before,), (after,) = batches_of(plain, (3, [0, 5])), batches_of(memory(count=300), (3, [0, 5]))
    assert torch.equal(before, after)


def test_a_strong_view_is_operations_of_random_strength_and_a_grey_square():
    augment = randaugment_cutout(16, upside_down=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    torch.manual_seed(0)
    made = torch.stack([augment(image) for _ in range(200)])
    assert made.shape == (200, 3, 16, 16) and made.dtype == torch.uint8
    assert len({view.numpy().tobytes() for view in made}) > 190
    grey = (made == torch.tensor([125, 123, 114], dtype=torch.uint8)[:, None, None]).all(dim=1).flatten(1).sum(1)
    assert grey.max() <= 64 and (grey == 0).any() and (grey > 32).any()  # up to half of 16 wide, 0 included
    assert "upside" not in describe(augment) and "RandomVerticalFlip" in describe(
        randaugment_cutout(16, upside_down=True)
    )


def test_a_cutout_has_the_given_colour():
    image = Cutout(9, fill=(1, 2, 3))(torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert torch.equal(image, torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 4, 4))
