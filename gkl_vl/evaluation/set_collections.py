"""Collections of evaluation sets for one command: CLIP_benchmark's, DataComp's, and the bundled sets.

Sources: CLIP_benchmark 1.6.2, `datasets/builder.py::dataset_collection`; DataComp's `tasklist.yml`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gkl_vl.errors import UserError
from gkl_vl.reading import read_text

BenchmarkTask = Literal["zeroshot_classification", "zeroshot_retrieval", "image_caption_selection"]


@dataclass(frozen=True)
class Entry:
    """One score of a collection: a task on a set."""

    dataset: str
    """CLIP_benchmark's name of the set."""
    task: BenchmarkTask | None = None
    """CLIP_benchmark's name of the task; None for a set named outside a collection: its kind determines the task."""
    main_metric: str | None = None
    """The metric in the collection's average; mean_recall@1 is the mean of both directions. None for a set named
    outside a collection, or one that the average excludes."""
    reason: str | None = None
    """Why it is not evaluated here; None if it is."""


def _classification(names: str, *, metric: str = "acc1") -> list[Entry]:
    return [Entry(name, "zeroshot_classification", metric) for name in names.split()]


def _retrieval(names: str) -> list[Entry]:
    return [Entry(name, "zeroshot_retrieval", "mean_recall@1") for name in names.split()]


def _choice(names: str) -> list[Entry]:
    return [Entry(name, "image_caption_selection", "text_acc") for name in names.split()]


def _unsupported(name: str, metric: str | None, reason: str) -> Entry:
    return Entry(name, "zeroshot_classification", metric, reason)


_VTAB_IN_BOTH = """
    vtab/cifar100 vtab/clevr_count_all vtab/clevr_closest_object_distance vtab/diabetic_retinopathy vtab/dmlab
    vtab/dsprites_label_orientation vtab/dsprites_label_x_position vtab/dtd vtab/eurosat
    vtab/kitti_closest_vehicle_distance vtab/flowers vtab/pets vtab/pcam vtab/resisc45 vtab/smallnorb_label_azimuth
    vtab/smallnorb_label_elevation
"""
_VTAB_PLUS_ALONE = "sun397 cars fgvc_aircraft mnist stl10 gtsrb country211 renderedsst2"
_ROBUSTNESS = "imagenetv2 imagenet_sketch imagenet-a imagenet-r objectnet"
_ATTRIBUTES = "a set of faces by attribute, which the average of DataComp's paper excludes"

COLLECTIONS: dict[str, tuple[Entry, ...]] = {
    "bundled": tuple(
        entry for name in ("emoji", "emoji_unseen") for entry in (*_classification(name), *_retrieval(name))
    ),
    "imagenet_robustness": tuple(_classification(_ROBUSTNESS)),
    "vtab": tuple(_classification(f"vtab/caltech101 {_VTAB_IN_BOTH} sun397 vtab/svhn")),
    "vtab+": (
        *_classification(f"imagenet1k {_ROBUSTNESS} fer2013 voc2007"),
        *_classification("voc2007_multilabel", metric="mean_average_precision"),
        *_classification(f"{_VTAB_PLUS_ALONE} vtab/caltech101 vtab/cifar10 {_VTAB_IN_BOTH} vtab/svhn"),
    ),
    "retrieval": tuple(_retrieval("mscoco_captions flickr8k flickr30k")),
    "sugar_crepe": tuple(
        _choice(
            "sugar_crepe/add_att sugar_crepe/add_obj sugar_crepe/replace_att sugar_crepe/replace_obj "
            "sugar_crepe/replace_rel sugar_crepe/swap_att sugar_crepe/swap_obj"
        )
    ),
    # DataComp's 38 sets and the two that its average excludes. Of its names only retrieval/flickr30k and
    # retrieval/mscoco_2014_5k_test_image_text_retrieval differ from the names here.
    "datacomp": (
        *_classification("vtab/caltech101", metric="mean_per_class_recall"),
        *_classification("cifar10 vtab/cifar100 vtab/clevr_count_all vtab/clevr_closest_object_distance country211"),
        *_classification("vtab/dtd vtab/eurosat"),
        *_classification("fgvc_aircraft", metric="mean_per_class_recall"),
        *_classification("food101 gtsrb imagenet1k imagenet_sketch imagenetv2 imagenet-a imagenet-o imagenet-r"),
        *_classification("vtab/kitti_closest_vehicle_distance mnist objectnet"),
        *_classification("vtab/flowers vtab/pets", metric="mean_per_class_recall"),
        *_classification("voc2007 vtab/pcam renderedsst2 vtab/resisc45 cars stl10 sun397 vtab/svhn"),
        *_retrieval("flickr30k mscoco_captions"),
        Entry(
            "misc/winogavil",
            "image_caption_selection",
            "jaccard_score_10-12",
            "several images match one cue, scored by Jaccard overlap, which is not implemented",
        ),
        _unsupported("wilds/iwildcam", "F1-macro_all", "macro F1 as WILDS defines it, which is not implemented"),
        *_classification("wilds/camelyon17"),
        _unsupported(
            "wilds/fmow", "acc_worst_region", "the accuracy of the worst region needs regions, which are not read"
        ),
        _unsupported(
            "fairness/dollar_street", "acc_top5_wg", "the accuracy of the worst group needs groups, which are not read"
        ),
        _unsupported("fairness/geode", "acc_wg", "the accuracy of the worst group needs groups, which are not read"),
        _unsupported("fairness/fairface", None, _ATTRIBUTES),
        _unsupported("fairness/utkface", None, _ATTRIBUTES),
    ),
}


def expand(names: Sequence[str]) -> list[Entry]:
    """Returns the entries of all `names` in order, without duplicates.

    Args:
        names: each a collection, a text file with one set name per line, or the name of a set.

    Raises: UserError for a text file that does not exist, is empty, or is not text.
    """
    entries = []
    for name in names:
        if name in COLLECTIONS:
            entries += COLLECTIONS[name]
        elif Path(name).is_file() or name.endswith(".txt"):
            entries += [Entry(line) for line in _lines(name)]
        else:
            entries.append(Entry(name))
    return list(dict.fromkeys(entries))


def _lines(path: str) -> list[str]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    if not any(lines):
        raise UserError(f"{path!r} names no data set: write one per line")
    return [line for line in lines if line]
