"""Synthesized images are memory-mapped in their file, and a batch has a fixed share of them, drawn by its number."""

import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from gkl_vl.data.augment import cifar_autoaugment
from gkl_vl.data.images import EncodedImage
from gkl_vl.data.labelled import LabelledSet, pixel_image
from gkl_vl.data.loaders import LabelledLoader
from gkl_vl.data.synthesized import Synthesized, WithSynthesized, open_synthesized, synthesized_per_batch
from gkl_vl.data.views import PLAIN, DiskViews, MemoryViews, MixedViews, Views
from gkl_vl.errors import UserError

N, M, SIZE, CLASSES = 24, 200, 8, 7
ORIGINAL, SYNTHESIZED = 250, 150
"""The green channel encodes the kind of an image, red and blue its index and label; every crop shows them."""


def labels_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, CLASSES, count)


def plain_colours(count: int, kind: int) -> np.ndarray:
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 1] = kind
    images[..., 2] = labels_of(count)[:, None, None]
    return images


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Originals:
    """Images by index; can be pickled for other processes."""

    def __call__(self, index: int) -> EncodedImage:
        return pixel_image(f"original {index}", plain_colours(N, ORIGINAL)[index])


def train_set() -> LabelledSet:
    labels = torch.from_numpy(labels_of(N))
    return LabelledSet(name="colours", labels=labels, num_classes=CLASSES, classnames=None, images=Originals())


@pytest.fixture
def synthesized(tmp_path) -> Synthesized:
    return saved(tmp_path, image=plain_colours(M, SYNTHESIZED))


def saved(folder: Path, *, image: np.ndarray, label: np.ndarray | None = None) -> Synthesized:
    path = str(folder / "data.npz")
    np.savez(path, image=image, label=labels_of(len(image)) if label is None else label)
    return open_synthesized(path, num_classes=CLASSES)


# ---- files


def write_savez(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


def write_in_odd_order(path: Path, **arrays: np.ndarray) -> Path:
    """Labels first, then another member, so that images start at an odd byte; written without numpy.savez."""
    np.savez(path / "other.npz", **arrays)
    with zipfile.ZipFile(path / "other.npz") as old, zipfile.ZipFile(path / "data.npz", "w") as new:
        new.writestr("label.npy", old.read("label.npy"))
        new.writestr("readme.txt", b"odd")
        new.writestr("image.npy", old.read("image.npy"))
    return path / "data.npz"


def write_folder(path: Path, **arrays: np.ndarray) -> Path:
    for key, array in arrays.items():
        np.save(path / f"{key}.npy", array)
    return path


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("write", [write_savez, write_in_odd_order, write_folder])
def test_arrays_are_memory_mapped(tmp_path, write, dtype):
    images, labels = noise(9), labels_of(9).astype(dtype)
    data = open_synthesized(str(write(tmp_path, image=images, label=labels)), num_classes=CLASSES)
    assert isinstance(data.images, np.memmap) and isinstance(data.labels, np.memmap)
    assert not data.images.flags.writeable
    assert np.array_equal(data.images, images) and np.array_equal(data.labels, labels) and data.labels.dtype == dtype
    index = torch.tensor([8, 0, 8, 3])
    assert torch.equal(data.pixels(index), torch.from_numpy(images[index].transpose(0, 3, 1, 2)))
    assert data.labels_of(index).tolist() == labels[index].tolist() and data.labels_of(index).dtype == torch.int64
    assert np.array_equal(np.asarray(data.read(4)), images[4]) and len(data) == 9


def test_an_archive_unpacked_with_the_suggested_command_can_be_opened(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, image=noise(5), label=labels_of(5))
    with pytest.raises(UserError, match="is compressed and cannot be memory-mapped") as caught:
        open_synthesized(str(path), num_classes=CLASSES)
    assert f"`python -m zipfile -e {path} FOLDER`" in str(caught.value)
    zipfile.main(["-e", str(path), str(tmp_path / "FOLDER")])
    data = open_synthesized(str(tmp_path / "FOLDER"), num_classes=CLASSES)
    assert np.array_equal(data.images, noise(5))


def test_it_is_pickled_by_its_path(synthesized):
    sent = pickle.dumps(synthesized)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert isinstance(received.images, np.memmap) and np.array_equal(received.images, synthesized.images)
    assert (received.name, received.num_classes) == (synthesized.name, CLASSES)


ARRAYS = {"image": noise(3), "label": np.array([0, 6, 1])}
FAULTS: dict[str, tuple[dict, str]] = {
    "no_label": ({"label": None}, "has no 'label', only image: name the data with"),
    "no_image": ({"image": None, "x": noise(1)}, "has no 'image', only label, x: name the data with"),
    "other_type": (
        {"image": noise(3).astype(np.float32)},
        r"'image' is float32 of \[3, 8, 8, 3\]: save it as uint8 of \[M, h",
    ),
    "other_shape": (
        {"image": noise(3).transpose(0, 3, 1, 2)},
        r"'image' is uint8 of \[3, 3, 8, 8\]: save it as uint8 of \[M, h",
    ),
    "flat": ({"image": noise(3).reshape(3, -1)}, r"'image' is uint8 of \[3, 192\]: save it as uint8 of \[M, h"),
    "soft_labels": ({"label": np.ones(3)}, r"'label' is float64 of \[3\]: save it as integers of \[M\]"),
    "one_hot": ({"label": np.eye(3, dtype=int)}, r"'label' is int64 of \[3, 3\]: save it as integers of \[M\]"),
    "lengths": ({"label": np.array([1, 2])}, "has 3 images and 2 labels"),
    "many_classes": ({"label": np.array([0, 7, 1])}, "labels from 0 to 7, the data's 7 classes are 0 to 6"),
    "no_class": ({"label": np.array([0, -1, 1])}, "labels from -1 to 1, the data's 7 classes are 0 to 6"),
    "empty": ({"image": noise(0)}, r"'image' is not an array that can be memory-mapped \(uint8 of \[0, 8, 8, 3\]\)"),
    "objects": ({"label": np.array(["a", None, 1], dtype=object)}, "'label' is not an array that can be memory-mapped"),
}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_synthesized(str(path), num_classes=CLASSES)
    assert "\n" not in str(caught.value) and repr(str(path)) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("write", [write_savez, write_folder])
@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_arrays_raise_one_line(tmp_path, fault, write):
    changes, message = FAULTS[fault]
    arrays = {key: array for key, array in (ARRAYS | changes).items() if array is not None}
    with pytest.raises(UserError, match=message):
        raise UserError(refused(write(tmp_path, **arrays)))


def test_a_file_that_is_not_an_archive_raises_one_line(tmp_path):
    assert "does not exist: name an .npz, or a folder" in refused(tmp_path / "away.npz")
    assert "has no 'image', only nothing" in refused(tmp_path)
    path = write_savez(tmp_path, **ARRAYS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert "is not an .npz or ends early" in refused(path)
    path.write_bytes(b"XX" + whole[2:])  # the first member's own header
    assert "is not an .npz or ends early" in refused(path)
    path.write_bytes(whole.replace(b"\x93NUMPY", b"\x93NUMPX"))
    assert "'image' is not an array that can be memory-mapped" in refused(path)


def test_a_folder_with_a_truncated_array_raises_one_line(tmp_path):
    path = write_folder(tmp_path, **ARRAYS) / "image.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert "'image' is not an array that can be memory-mapped" in refused(tmp_path)


# ---- views


def mixed(synthesized: Synthesized, *, seed: int = 0) -> MixedViews:
    images = torch.from_numpy(plain_colours(N, ORIGINAL)).permute(0, 3, 1, 2).contiguous()
    return MixedViews(original=MemoryViews(images=images, seed=seed), synthesized=synthesized)


def autoaugmented(synthesized: Synthesized, *, workers: int = 0) -> DiskViews:
    return DiskViews(
        data=WithSynthesized(original=train_set(), synthesized=synthesized),
        augment=cifar_autoaugment(SIZE, cutout=4),
        plain=v2.PILToTensor(),
        seed=3,
        num_workers=workers,
    )


def batches_of(views: Views, *requests: tuple[int, list[int]]) -> list[Tensor]:
    return list(views.batches((view, torch.tensor(index)) for view, index in requests))


def test_views_of_originals_are_the_same_as_without_synthesized_images(synthesized):
    views = mixed(synthesized)
    requests = [(0, [3, 1]), (PLAIN, [1, 1]), (1, [3, 10])]
    for one, other in zip(batches_of(views, *requests), batches_of(views.original, *requests), strict=True):
        assert torch.equal(one, other)
    (some,), (alone,) = batches_of(views, (2, [N + 5, 7, N, 3])), batches_of(views.original, (2, [7, 3]))
    assert torch.equal(some[[1, 3]], alone)


def test_a_synthesized_view_is_a_crop_of_the_padded_image_perhaps_flipped(tmp_path):
    views = mixed(saved(tmp_path, image=noise(300)))
    (made,) = batches_of(views, (3, list(range(N, N + 300))))
    matches = []
    for number, image in enumerate(noise(300)):
        padded = F.pad(torch.from_numpy(image).permute(2, 0, 1), (4, 4, 4, 4))
        for row in range(9):
            for column in range(9):
                crop = padded[:, row : row + SIZE, column : column + SIZE]
                matches += [(number, row, column, 0)] if torch.equal(made[number], crop) else []
                matches += [(number, row, column, 1)] if torch.equal(made[number], crop.flip(2)) else []
    numbers, rows, columns, flips = zip(*matches, strict=True)
    assert numbers == tuple(range(300))
    assert set(rows) == set(columns) == set(range(9))
    assert len(set(zip(rows, columns, flips, strict=True))) > 120  # all three are drawn apart: of 162, 137 on average
    assert 110 < sum(flips) < 190


def test_a_synthesized_view_depends_on_seed_view_and_image_alone(tmp_path):
    data = saved(tmp_path, image=noise(20))
    index = list(range(N, N + 20))
    plain, whole, other_view, some = batches_of(
        mixed(data), (PLAIN, index), (2, index), (1, index), (2, [N + 7, 0, N + 3, N + 7])
    )
    (other_seed,) = batches_of(mixed(data, seed=1), (2, index))
    assert torch.equal(plain, torch.from_numpy(noise(20)).permute(0, 3, 1, 2))
    assert torch.equal(some[[0, 2, 3]], whole[[7, 3, 7]])
    for other in (plain, other_view, other_seed):
        assert (whole != other).flatten(1).any(dim=1).sum() >= 18  # some may be the same by chance


def test_synthesized_images_of_another_size_are_refused(tmp_path):
    data = saved(tmp_path, image=noise(3)[:, :6])
    with pytest.raises(UserError, match="has images of 8x6, the data of 8x8: name synthesized images of that size"):
        mixed(data)


def test_descriptions_of_different_mixed_views_differ(synthesized):
    views = mixed(synthesized)
    described = [v.description() for v in (views, views.original, mixed(synthesized, seed=1))]
    assert len(set(described)) == 3


# ---- batches


def loader(synthesized: Synthesized, **changes) -> LabelledLoader:
    options = {"batch_size": 8, "seed": 0, "rank": 0, "world_size": 1, "num_views": None, "position": None}
    options |= {"views": mixed(synthesized), "synthesized": synthesized, "fraction": 0.7} | changes
    return LabelledLoader(labels=train_set().labels, **options)


def take(batches: LabelledLoader, count: int) -> list[dict]:
    return list(islice(iter(batches), count))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize(
    ("batch_size", "fraction", "count"), [(512, 0.7, 358), (1024, 0.8, 819), (100, 0.29, 29), (8, 0.7, 5), (2, 0.5, 1)]
)
def test_the_share_is_rounded_down(batch_size, fraction, count):
    assert synthesized_per_batch(batch_size, fraction) == count


@pytest.mark.parametrize(("batch_size", "fraction"), [(1, 0.7), (8, 0), (8, 1), (8, 1.5), (8, -0.5), (8, 0.1)])
def test_a_batch_of_one_kind_is_refused(synthesized, batch_size, fraction):
    with pytest.raises(UserError, match=f"a fraction of {fraction} makes .* of a batch of {batch_size} .*: change the"):
        loader(synthesized, batch_size=batch_size, fraction=fraction)


@pytest.mark.parametrize(("fraction", "count"), [(0.7, 5), (0.5, 4), (0.25, 2)])
def test_every_batch_has_its_share_and_labels_match_the_images(synthesized, fraction, count):
    for batch in take(loader(synthesized, fraction=fraction), 20):
        colours = batch["image"].amax(dim=(2, 3))  # a crop is padded with zeros
        originals = 8 - count
        assert colours[:, 1].tolist() == [ORIGINAL] * originals + [SYNTHESIZED] * count
        number = batch["index"] - N * (batch["index"] >= N)
        assert colours[:, 0].tolist() == number.tolist()
        assert colours[:, 2].tolist() == batch["label"].tolist()
        assert batch["label"].dtype == torch.int64 and batch["image"].dtype == torch.uint8
        assert batch["keys"] == [str(i) for i in batch["index"].tolist()]


def test_an_epoch_is_as_long_as_without_and_a_pass_has_no_image_twice(synthesized):
    """24 images, and 8 per batch of which 3 are original: 3 batches per epoch, 8 per pass."""
    batches = take(loader(synthesized), 24)
    assert [batch["epoch"] for batch in batches] == [number // 3 for number in range(24)]
    assert [batch["view"] for batch in batches] == [number // 8 for number in range(24)]
    passes = [torch.cat([b["index"][:3] for b in batches[start : start + 8]]).tolist() for start in (0, 8, 16)]
    assert all(sorted(one) == list(range(N)) for one in passes) and passes[0] != passes[1] != passes[2]
    views = [batch["view"] for batch in take(loader(synthesized, num_views=2), 24)]
    assert views == [0] * 8 + [1] * 8 + [0] * 8


def test_synthesized_images_are_drawn_from_all(synthesized):
    drawn = torch.cat([batch["index"][3:] for batch in take(loader(synthesized), 400)]) - N
    counts = Counter(drawn.tolist())
    assert set(counts) == set(range(M))  # 2,000 draws of 200: 10 of each, 0 at a chance of one in a hundred
    assert max(counts.values()) < 30


def test_ranks_split_one_order(synthesized):
    """Two ranks with batches of 4 have the images that one process has in its batches of 8."""
    alone = take(loader(synthesized, fraction=0.5), 10)
    ranks = [take(loader(synthesized, batch_size=4, fraction=0.5, rank=rank, world_size=2), 10) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for kind in (slice(0, 2), slice(2, 4)):
            both = torch.cat([part["index"][kind] for part in parts])
            assert torch.equal(both, whole["index"][slice(2 * kind.start, 2 * kind.stop)])
    originals = [torch.cat([batch["index"][:2] for batch in batches[:6]]).tolist() for batches in ranks]  # a pass
    assert not set(originals[0]) & set(originals[1]) and len(set(originals[0] + originals[1])) == N


def memory_and_workers(synthesized: Synthesized) -> dict:
    return {"second_views": autoaugmented(synthesized, workers=2)}


def workers_and_memory(synthesized: Synthesized) -> dict:
    return {"views": autoaugmented(synthesized, workers=2), "second_views": mixed(synthesized)}


@pytest.mark.parametrize("make", [lambda synthesized: {}, memory_and_workers, workers_and_memory])
@pytest.mark.parametrize("done", [4, 7, 8])
def test_a_new_loader_continues_from_the_position_of_the_old_one(
    synthesized, make: Callable[[Synthesized], dict], done
):
    """Within an epoch of three batches and a pass of eight, and at their ends."""
    whole = take(loader(synthesized, **make(synthesized)), 12)
    old = loader(synthesized, **make(synthesized))
    take(old, done)
    position = json.loads(json.dumps(old.position()))
    assert position == {"batches": done}
    rest = take(loader(synthesized, position=position, **make(synthesized)), 12 - done)
    assert [same(*pair) for pair in zip(rest, whole[done:], strict=True)] == [True] * (12 - done)


def test_second_views_of_a_mixed_batch_are_of_its_images(synthesized):
    alone = take(loader(synthesized), 6)
    for workers in (0, 2):
        both = take(loader(synthesized, second_views=autoaugmented(synthesized, workers=workers)), 6)
        for one, other in zip(alone, both, strict=True):
            (expected,) = batches_of(autoaugmented(synthesized), (one["view"], one["index"].tolist()))
            assert torch.equal(other.pop("second_image"), expected) and same(one, other)


# ---- memory


def sparse(folder: Path, count: int) -> Path:
    """A file of zeros that takes no space."""
    for key, shape in (("image", (count, SIZE, SIZE, 3)), ("label", (count,))):
        with open(folder / f"{key}.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + int(np.prod(shape)))
    return folder


def memory_peak() -> int:
    """Peak resident memory of this process in bytes, since the last write to clear_refs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this kernel cannot reset a process's peak memory"
)
def test_batches_of_millions_of_images_take_the_memory_of_a_batch(tmp_path, synthesized):
    """8 million images take 1.5 GB; an int64 per label 64 MB, two per crop 128 MB."""
    folder = str(sparse(tmp_path, 8_000_000))
    take(loader(synthesized, second_views=autoaugmented(synthesized)), 10)  # fills torch's caches
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_peak()
    data = open_synthesized(folder, num_classes=CLASSES)
    drawn = torch.cat([batch["index"] for batch in take(loader(data, second_views=autoaugmented(data)), 10)])
    assert memory_peak() - before < 40e6  # the mapped labels are 8e6
    assert drawn.max() > 4_000_000
