"""Collections equal the lists that their authors publish; a name is a collection, a file of names, or a set."""

from collections import Counter

import pytest

from gkl_vl.errors import UserError
from gkl_vl.evaluation.set_collections import COLLECTIONS, Entry, expand
from gkl_vl.evaluation.sets import BUNDLED, load_benchmark_set


def names(collection: str) -> list[str]:
    return [entry.dataset for entry in COLLECTIONS[collection]]


def test_the_collections_have_the_published_sizes():
    sizes = {name: len(set(names(name))) for name in COLLECTIONS}
    assert sizes == {
        "bundled": 2, "imagenet_robustness": 5, "vtab": 19, "vtab+": 36, "retrieval": 3, "sugar_crepe": 7,
        "datacomp": 40,
    }  # fmt: skip


def test_clip_benchmarks_lists_in_its_order():
    """For a long list only its ends and the positions where our parts are joined."""
    assert names("retrieval") == ["mscoco_captions", "flickr8k", "flickr30k"]
    assert names("imagenet_robustness") == ["imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet"]
    assert names("vtab")[:2] + names("vtab")[-4:] == [
        "vtab/caltech101",
        "vtab/cifar100",
        "vtab/smallnorb_label_azimuth",
        "vtab/smallnorb_label_elevation",
        "sun397",
        "vtab/svhn",
    ]
    assert names("vtab+")[5:10] == ["objectnet", "fer2013", "voc2007", "voc2007_multilabel", "sun397"]
    assert names("vtab+")[16:20] == ["renderedsst2", "vtab/caltech101", "vtab/cifar10", "vtab/cifar100"]
    assert set(names("vtab")) < set(names("vtab+")) and set(names("imagenet_robustness")) < set(names("vtab+"))


def test_the_bundled_sets_have_two_tasks_each():
    assert set(names("bundled")) == set(BUNDLED)
    for entry in COLLECTIONS["bundled"]:
        assert load_benchmark_set(entry.dataset).kind == "classification"
    assert [(entry.task, entry.main_metric) for entry in COLLECTIONS["bundled"][:2]] == [
        ("zeroshot_classification", "acc1"),
        ("zeroshot_retrieval", "mean_recall@1"),
    ]


def test_datacomps_38_sets_and_their_metrics():
    entries = COLLECTIONS["datacomp"]
    assert Counter(entry.main_metric for entry in entries) == {
        "acc1": 27,
        "mean_per_class_recall": 4,
        "mean_recall@1": 2,
        "jaccard_score_10-12": 1,
        "F1-macro_all": 1,
        "acc_worst_region": 1,
        "acc_top5_wg": 1,
        "acc_wg": 1,
        None: 2,
    }
    by_class = [entry.dataset for entry in entries if entry.main_metric == "mean_per_class_recall"]
    assert by_class == ["vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets"]
    left_out = {entry.dataset: entry.reason for entry in entries if entry.reason}
    assert list(left_out) == [
        "misc/winogavil",
        "wilds/iwildcam",
        "wilds/fmow",
        "fairness/dollar_street",
        "fairness/geode",
        "fairness/fairface",
        "fairness/utkface",
    ]
    assert "average" in left_out["fairness/utkface"]


def test_every_entry_has_a_metric_or_a_reason():
    usual = {
        "zeroshot_classification": "acc1",
        "zeroshot_retrieval": "mean_recall@1",
        "image_caption_selection": "text_acc",
    }
    others = {"mean_per_class_recall": "datacomp", "mean_average_precision": "vtab+"}
    for collection, entries in COLLECTIONS.items():
        assert len(set(entries)) == len(entries)
        for entry in entries:
            assert entry.task is not None
            assert entry.reason or entry.main_metric == usual[entry.task] or others[entry.main_metric] == collection
    assert Entry("voc2007_multilabel", "zeroshot_classification", "mean_average_precision") in COLLECTIONS["vtab+"]


def test_names_are_expanded_in_order_and_once(tmp_path):
    (tmp_path / "mine.txt").write_text("wds/cars\n\n  food101 \n")
    entries = expand(["food101", "retrieval", str(tmp_path / "mine.txt"), "flickr8k", "retrieval"])
    assert [(entry.dataset, entry.task) for entry in entries] == [
        ("food101", None),
        ("mscoco_captions", "zeroshot_retrieval"),
        ("flickr8k", "zeroshot_retrieval"),
        ("flickr30k", "zeroshot_retrieval"),
        ("wds/cars", None),
        ("flickr8k", None),
    ]
    assert expand([]) == []
    assert expand(["vtab", "vtab+"])[:19] == list(COLLECTIONS["vtab"]) and len(expand(["vtab", "vtab+"])) == 36


def test_a_list_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    for name, message in (
        ("none.txt", "none.txt' does not exist"),
        ("empty.txt", "names no data set"),
        ("picture", "line 1 is not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            expand([str(tmp_path / name)])
