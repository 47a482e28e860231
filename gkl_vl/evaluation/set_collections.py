"""Collections of evaluation sets, to be measured by one command: CLIP_benchmark's, DataComp's, and the bundled sets.

Sources: CLIP_benchmark 1.6.2, `datasets/builder.py::dataset_collection`; DataComp's `tasklist.yml`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gkl_vl.errors import UserError

BenchmarkTask = Literal["zeroshot_classification", "zeroshot_retrieval", "image_caption_selection"]


@dataclass(frozen=True)
class Entry:
    """One number of a collection."""

    dataset: str
    """CLIP_benchmark's name."""
    task: BenchmarkTask | None = None
    """CLIP_benchmark's word; None where a set was named alone, and what it holds decides."""
    main_metric: str | None = None
    """The metric that counts in the collection's average, mean_recall@1 being the mean of both directions'; None
    for a set named alone, or left out."""
    reason: str | None = None
    """Why it is not measured here."""


def _classified(names: str, *, metric: str = "acc1") -> list[Entry]:
    return [Entry(name, "zeroshot_classification", metric) for name in names.split()]


def _retrieved(names: str) -> list[Entry]:
    return [Entry(name, "zeroshot_retrieval", "mean_recall@1") for name in names.split()]


def _chosen(names: str) -> list[Entry]:
    return [Entry(name, "image_caption_selection", "text_acc") for name in names.split()]


def _left_out(name: str, metric: str | None, reason: str) -> Entry:
    return Entry(name, "zeroshot_classification", metric, reason)


_VTAB_IN_BOTH = """
    vtab/cifar100 vtab/clevr_count_all vtab/clevr_closest_object_distance vtab/diabetic_retinopathy vtab/dmlab
    vtab/dsprites_label_orientation vtab/dsprites_label_x_position vtab/dtd vtab/eurosat
    vtab/kitti_closest_vehicle_distance vtab/flowers vtab/pets vtab/pcam vtab/resisc45 vtab/smallnorb_label_azimuth
    vtab/smallnorb_label_elevation
"""
_VTAB_PLUS_ALONE = "sun397 cars fgvc_aircraft mnist stl10 gtsrb country211 renderedsst2"
_ROBUSTNESS = "imagenetv2 imagenet_sketch imagenet-a imagenet-r objectnet"
_ATTRIBUTES = "a face set by attribute, which the average of DataComp's paper leaves out"

COLLECTIONS: dict[str, tuple[Entry, ...]] = {
    "bundled": tuple(entry for name in ("emoji", "emoji_unseen") for entry in (*_classified(name), *_retrieved(name))),
    "imagenet_robustness": tuple(_classified(_ROBUSTNESS)),
    "vtab": tuple(_classified(f"vtab/caltech101 {_VTAB_IN_BOTH} sun397 vtab/svhn")),
    "vtab+": (
        *_classified(f"imagenet1k {_ROBUSTNESS} fer2013 voc2007"),
        *_classified("voc2007_multilabel", metric="mean_average_precision"),
        *_classified(f"{_VTAB_PLUS_ALONE} vtab/caltech101 vtab/cifar10 {_VTAB_IN_BOTH} vtab/svhn"),
    ),
    "retrieval": tuple(_retrieved("mscoco_captions flickr8k flickr30k")),
    "sugar_crepe": tuple(
        _chosen(
            "sugar_crepe/add_att sugar_crepe/add_obj sugar_crepe/replace_att sugar_crepe/replace_obj "
            "sugar_crepe/replace_rel sugar_crepe/swap_att sugar_crepe/swap_obj"
        )
    ),
    # Its 38 sets and the two that its average leaves out. Of its own names only retrieval/flickr30k and
    # retrieval/mscoco_2014_5k_test_image_text_retrieval differ from those here.
    "datacomp": (
        *_classified("vtab/caltech101", metric="mean_per_class_recall"),
        *_classified("cifar10 vtab/cifar100 vtab/clevr_count_all vtab/clevr_closest_object_distance country211"),
        *_classified("vtab/dtd vtab/eurosat"),
        *_classified("fgvc_aircraft", metric="mean_per_class_recall"),
        *_classified("food101 gtsrb imagenet1k imagenet_sketch imagenetv2 imagenet-a imagenet-o imagenet-r"),
        *_classified("vtab/kitti_closest_vehicle_distance mnist objectnet"),
        *_classified("vtab/flowers vtab/pets", metric="mean_per_class_recall"),
        *_classified("voc2007 vtab/pcam renderedsst2 vtab/resisc45 cars stl10 sun397 vtab/svhn"),
        *_retrieved("flickr30k mscoco_captions"),
        Entry(
            "misc/winogavil",
            "image_caption_selection",
            "jaccard_score_10-12",
            "several images answer one cue, scored by Jaccard overlap, which is not measured here",
        ),
        _left_out("wilds/iwildcam", "F1-macro_all", "macro F1 as WILDS defines it, which is not measured here"),
        *_classified("wilds/camelyon17"),
        _left_out(
            "wilds/fmow", "acc_worst_region", "its worst region's accuracy needs regions, which are not read here"
        ),
        _left_out(
            "fairness/dollar_street", "acc_top5_wg", "its worst group's accuracy needs groups, which are not read here"
        ),
        _left_out("fairness/geode", "acc_wg", "its worst group's accuracy needs groups, which are not read here"),
        _left_out("fairness/fairface", None, _ATTRIBUTES),
        _left_out("fairness/utkface", None, _ATTRIBUTES),
    ),
}


def expand(names: Sequence[str]) -> list[Entry]:
    """The entries that `names` stand for, in their order, none of them twice.

    Args:
        names: each a collection, a text file with a set's name a line, or a set's name.

    Raises: UserError for a text file that is not there, holds no names, or is no text.
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
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path!r} is no text file here: write a data set's name a line") from error
    if not any(lines):
        raise UserError(f"{path!r} names no data set: write one a line")
    return [line for line in lines if line]
