"""Classes of two lists are matched by name, never by place: names files, training and test splits, probes, models and
data, prompts. A difference is handled or refused in a line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from PIL import Image
from small_sets import colour_set
from torch import nn

from gkl_vl.data.classes import (
    folder_order,
    keys_of,
    match_classes,
    named_by_key,
    named_by_list,
    places,
    unique_names,
)
from gkl_vl.data.labelled import LabelledSet, open_labelled, pixel_image
from gkl_vl.data.pairs import open_images
from gkl_vl.data.prompts import read_prompts
from gkl_vl.errors import UserError
from gkl_vl.evaluation import sets, sources
from gkl_vl.evaluation.benchmark import evaluate, measure, measure_probe, metrics_of
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.models.classifiers import Classifier, load_classifier
from gkl_vl.models.clip import Clip
from gkl_vl.models.towers import OpenClipTowers
from gkl_vl.robustness.targets import Target, in_model_order
from gkl_vl.training.classifiers import in_order_of, in_training_order

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lion"]
"""Names of the classes 0 to 11, whose images have the grey value 20 * class."""
TEXT_ORDER = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]


def write_folders(root: Path, folders: dict[str, int], *, split: str = "test") -> Path:
    """SPLIT/FOLDER/{a,b}.png for folders by class number."""
    for folder, number in folders.items():
        (root / split / folder).mkdir(parents=True)
        for file in ("a.png", "b.png"):
            Image.new("RGB", (8, 8), (20 * number,) * 3).save(root / split / folder / file)
    return root


def numbered(names=range(12)) -> dict[str, int]:
    return {str(number): number for number in names}


def named(words: list[str]) -> dict[str, int]:
    return {word: WORDS.index(word) for word in words}


class Greys(nn.Module):
    """Embeds an image as the class of its grey value, and a text as the class of its first known word."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, pixels, normalize):
        return F.one_hot((pixels.mean(dim=(1, 2, 3)) * 255 / 20).round().long(), 13).float()

    def encode_text(self, tokens, normalize):
        return F.one_hot(tokens[:, 0], 13).float()


def clip() -> Clip:
    def tokenize(texts: list[str]) -> torch.Tensor:
        found = [next((i for i, word in enumerate(WORDS) if word in text.lower().split()), 12) for text in texts]
        return torch.tensor(found)[:, None]

    return Clip(
        name="greys",
        towers=OpenClipTowers(Greys()),
        preprocess=PreprocessCfg(size=8, mean=(0, 0, 0), std=(1, 1, 1)),
        tokenize=tokenize,
        hf_tokenizer=None,
        model_cfg={"embed_dim": 13},
    )


def acc1(root: Path, names: object | None = None) -> float:
    file = None
    if names is not None:
        file = str(root / "names.json")
        Path(file).write_text(json.dumps({"pets": names}))
    dataset = load_benchmark_set("pets", root=str(root), classname_file=file)
    return metrics_of(measure(Embedder(clip=clip()), replace(dataset, templates=["{c} ."])))["acc1"]


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- names files -------------------------------------------------------------------------------------------------


def test_a_list_of_names_is_indexed_by_the_number_of_the_folder(tmp_path):
    root = write_folders(tmp_path, numbered())
    assert [path.name for path in sorted((root / "test").iterdir())] == TEXT_ORDER
    assert acc1(root, WORDS) == 1  # 4 of 12 if label 2 were the folder "10"


def test_folders_that_are_numbers_have_no_names_for_prompts(tmp_path):
    root = write_folders(tmp_path, numbered())
    line = refusal(lambda: acc1(root))
    assert "classes of pets are numbers ('0', '1', '2', '3', ...)" in line and "--custom_classname_file" in line
    assert acc1(root, {str(number): word for number, word in enumerate(WORDS)}) == 1  # the form that it asks for


@pytest.mark.parametrize("folders", [range(1, 13), [*range(11), 12], [7]])
def test_folders_other_than_0_to_the_last_need_names_by_folder(tmp_path, folders):
    root = write_folders(tmp_path, {str(folder): number for number, folder in enumerate(folders)})
    words = WORDS[: len(folders)]
    assert f'write {{"{folders[0]}": "its name", ...}}' in refusal(lambda: acc1(root, words))
    assert acc1(root, {str(folder): word for folder, word in zip(folders, words, strict=True)}) == 1


def test_a_missing_folder_shifts_no_name(tmp_path):
    root = write_folders(tmp_path, numbered(n for n in range(12) if n != 5))
    assert "has 12 class names for 'pets', which has 11 classes" in refusal(lambda: acc1(root, WORDS))
    assert acc1(root, {f"{number:02}": word for number, word in enumerate(WORDS)}) == 1


@pytest.mark.parametrize(
    "names",
    [
        ["lion", "Ant", "dog"],  # the same classes in another order
        {"dog": "dog", "ant": "ant", "lion": "lion"},
        {"ANT": "ant", "dog": "dog", "lion": "lion", "newt": "newt"},  # more than the set has
        ["ant", "hound dog", "lion"],  # one renamed, the others in place
    ],
)
def test_names_of_the_same_classes_are_matched_by_name(tmp_path, names):
    assert acc1(write_folders(tmp_path, named(["ant", "dog", "lion"])), names) == 1


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (["cat", "dog", "fox"], ["cat", "fox", "hen"], "'fox' of 'pets' at another place than the set"),
        (["cat", "dog"], ["cat"], "has 1 class names for 'pets', which has 2 classes ('cat', 'dog')"),
        (["c1", "c10", "c2"], ["x", "y", "z"], "sorted as text ('c1', 'c10', 'c2') and not by their numbers"),
        (["0", "2"], ["x", "y"], "k-th name is that of class k from 0"),
        (["a", "b", "c"], ["b", "b", "a"], "'a' of 'pets' at another place"),
    ],
)
def test_a_list_whose_order_is_not_certain_is_refused(own, given, message):
    line = refusal(lambda: named_by_list(own, given, where="'f.json'", whose="'pets'"))
    assert message in line and f'write {{"{own[0]}": "its name", ...}} in place of the list' in line


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (["n01440764", "n01443537"], ["tench", "goldfish"]),  # WordNet ids, as CLIP_benchmark
        (["missile", "cat", "missile", "dog"], ["missile", "cat", "missile", "dog"]),
        (["c1", "c2", "c10"], ["x", "y", "z"]),  # a table that numbers them itself
        (["001.crow", "002.jay"], ["x", "y"]),
        (["ja", "nein"], ["yes", "no"]),
    ],
)
def test_a_list_of_other_names_is_taken_by_label(own, given):
    assert named_by_list(own, given, where="f", whose="s") == given


def test_a_table_that_sorted_numbers_as_text_takes_names_by_number():
    assert named_by_list(TEXT_ORDER, WORDS, where="f", whose="s") == [WORDS[int(number)] for number in TEXT_ORDER]


def test_names_by_key_must_be_complete():
    line = refusal(lambda: named_by_key(["polar bear", "x"], {"polar_bear": "a"}, where="'f.json', 'pets',"))
    assert "'f.json', 'pets', has no name for the class 'x' (1 of 2 are missing" in line
    assert keys_of(["a b", "C", "é"], ["a_b", "c", "e\u0301"]) == ["a_b", "c", "e\u0301"]
    assert keys_of(["cat"], ["Cat", "CAT"]) == [None]


@pytest.mark.parametrize("keys", [["n01440764", "n01443537"], ["tench", "goldfish"]])
def test_names_of_imagenet_go_by_wordnet_ids_or_by_name(tmp_path, keys, monkeypatch):
    classes = {"n01440764": "tench", "n01443537": "goldfish"}
    for module in (sets, sources):
        monkeypatch.setattr(module, "imagenet_classes", lambda name: classes)
    for number, wordnet_id in enumerate(classes):
        write_folders(tmp_path, {wordnet_id: number})
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"imagenet1k": {keys[1]: "bee", keys[0]: "ant", "n09": "other"}}))
    dataset = load_benchmark_set("imagenet1k", root=str(tmp_path), classname_file=str(file))
    assert dataset.classnames == ["ant", "bee"]


def test_shards_without_names_take_names_by_label(tmp_path):
    root = colour_set(tmp_path / "set", ["red", "blue"])
    (root / "classnames.txt").unlink()
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"x": {"2": "blue", "0": "red", "1": "green"}}))
    assert load_benchmark_set("x", root=str(root), classname_file=str(file)).classnames == ["red", "green", "blue"]


# ---- splits ------------------------------------------------------------------------------------------------------


def labels_by_folder(data: LabelledSet) -> dict[str, int]:
    return {Path(data.images(i).where).parent.name: int(label) for i, label in enumerate(data.labels)}


def test_folders_of_numbers_are_sorted_by_number(tmp_path):
    data = open_labelled(str(write_folders(tmp_path, numbered())), "test")
    assert labels_by_folder(data) == numbered() and data.classnames == tuple(map(str, range(12)))
    assert folder_order(["b10", "b9"]) == ["b10", "b9"]


def test_a_test_split_without_a_class_keeps_the_labels_of_training(tmp_path):
    write_folders(tmp_path, named(["ant", "bee", "cat", "dog"]), split="train")
    write_folders(tmp_path, named(["ant", "cat", "dog"]))
    train, test = (open_labelled(str(tmp_path), split) for split in ("train", "test"))
    assert labels_by_folder(test) == {"ant": 0, "cat": 1, "dog": 2}
    matched = in_training_order(test, train)
    assert labels_by_folder(matched) == {"ant": 0, "cat": 2, "dog": 3}
    assert (matched.num_classes, matched.classnames) == (4, train.classnames)
    line = refusal(lambda: in_training_order(train, test))
    assert f"{tmp_path}:train has the class 'bee', which {tmp_path}:test lacks (1 of 4 classes" in line


def data_set(labels: list[int], classnames: list[str] | None, num_classes: int | None = None) -> LabelledSet:
    return LabelledSet(
        name="set",
        labels=torch.tensor(labels),
        num_classes=num_classes or len(classnames or ()),
        classnames=None if classnames is None else tuple(classnames),
        images=lambda index: pixel_image("image", torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()),
    )


@pytest.mark.parametrize(
    ("test", "train", "expected"),
    [
        (data_set([0, 1, 2], ["b_c", "A", "d"]), data_set([0], ["a", "B c", "x", "D"]), [1, 0, 3]),
        (data_set([0, 1], ["3", "11"]), data_set([0], None, 12), [3, 11]),  # a list's labels are numbers
        (data_set([3, 11], None, 12), data_set([0], TEXT_ORDER), [5, 3]),
        (data_set([0, 1], None, 2), data_set([0], ["a", "b", "c"]), [0, 1]),
        (data_set([0, 1], ["a", "b"]), data_set([0], None, 2), [0, 1]),
        (data_set([0, 2], ["m", "c", "m"]), data_set([0], ["m", "c", "m"]), [0, 2]),
    ],
)
def test_labels_become_those_of_the_training_set(test, train, expected):
    matched = in_training_order(test, train)
    assert matched.labels.tolist() == expected and matched.num_classes == train.num_classes


@pytest.mark.parametrize(
    ("test", "train", "message"),
    [
        (data_set([0], ["a", "b"]), data_set([0], ["a", "c"]), "has the class 'b', which"),
        (data_set([0], ["a", "b"]), data_set([0], None, 3), "has 2 classes and set 3, without names"),
        (data_set([0], None, 3), data_set([0], ["a", "b"]), "has 3 classes and set 2, without names"),
        (data_set([0], ["m", "c", "m"]), data_set([0], ["m", "m", "c"]), "has the class 'm' more than once"),
        (data_set([0], ["3", "12"]), data_set([0], None, 12), "has the class '12', which"),
    ],
)
def test_classes_that_do_not_match_are_refused(test, train, message):
    assert message in refusal(lambda: in_training_order(test, train))


def test_a_probe_matches_the_classes_of_its_splits(tmp_path):
    write_folders(tmp_path, named(["ant", "bee", "cat", "dog"]), split="train")
    write_folders(tmp_path, named(["bee", "dog"]))
    train, test = (load_benchmark_set("pets", root=str(tmp_path), split=split) for split in ("train", "test"))
    outcome, _ = measure_probe(Embedder(clip=clip()), train, test)
    metrics = metrics_of([outcome])
    assert metrics["lp_acc1"] == 1 and outcome.labels is not None and outcome.labels.tolist() == [1, 1, 3, 3]
    assert outcome.empty_classes == 2
    line = refusal(lambda: measure_probe(Embedder(clip=clip()), test, train))
    assert "pets has the class 'ant', which the other split (pets) lacks (2 of 4 classes" in line


def test_a_probe_needs_no_names(tmp_path):
    write_folders(tmp_path, numbered(range(3)), split="train")
    write_folders(tmp_path, numbered([2]))
    train, test = (load_benchmark_set("pets", root=str(tmp_path), split=split) for split in ("train", "test"))
    outcome, _ = measure_probe(Embedder(clip=clip()), train, test)
    assert metrics_of([outcome])["lp_acc1"] == 1


# ---- models ------------------------------------------------------------------------------------------------------


def model(classnames: list[str] | None) -> Classifier:
    classifier = load_classifier("resnet8", num_classes=3 if classnames is None else len(classnames))
    return replace(classifier, classnames=None if classnames is None else tuple(classnames))


def test_data_take_the_order_of_the_model_that_is_trained_or_taught_by():
    train, test = data_set([0, 1, 2], ["a", "b", "c"]), data_set([2], ["a", "b", "c"])
    reordered = in_order_of({"--teacher": model(["c", "a", "b"]), "--student": model(None)}, train, test)
    assert [data.labels.tolist() for data in reordered] == [[1, 2, 0], [0]]
    assert in_order_of({"--teacher": None, "--student": model(None)}, train, test) == (train, test)


def test_models_of_other_orders_or_classes_are_refused():
    train = data_set([0, 1, 2], ["a", "b", "c"])
    models = {"--teacher": model(["c", "a", "b"]), "--student": model(["a", "b", "c"])}
    assert "--student resnet8 has the classes of --teacher resnet8 in another order" in refusal(
        lambda: in_order_of(models, train, train)
    )
    assert "set has the class 'c', which --teacher resnet8 lacks" in refusal(
        lambda: in_order_of({"--teacher": model(["a", "b", "x"])}, train, train)
    )


def test_an_attack_takes_the_order_of_the_models_logits():
    target = Target(architecture="net", model=nn.Identity(), classnames=("c", "a", "b", "d"))
    data = in_model_order(data_set([0, 1, 2], ["a", "b", "c"]), target)
    assert data.labels.tolist() == [1, 2, 0] and data.num_classes == 4
    assert "set has the class 'x', which the model net lacks" in refusal(
        lambda: in_model_order(data_set([0], ["x"]), target)
    )


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_by_class_are_matched_by_name(tmp_path):
    root = write_folders(tmp_path, named(["ant", "bee"]))
    dataset = load_benchmark_set("pets", root=str(root))
    templates = {"Bee": ["a bee"], "ANT": ["an ant"], "zebu": ["a zebu"]}
    assert metrics_of(measure(Embedder(clip=clip()), replace(dataset, templates=templates)))["acc1"] == 1
    line = refusal(lambda: measure(Embedder(clip=clip()), replace(dataset, templates={"bee": ["a bee"]})))
    assert "no entry for the class 'ant' (1 of 2 classes; they have 'bee'): add one" in line


def test_folders_of_numbers_name_no_class_of_prompts(tmp_path):
    root = write_folders(tmp_path, numbered(range(3)))
    source = open_images(str(root / "test"))
    assert source.classnames is None
    (tmp_path / "p.txt").write_text("a {c}\n")
    assert "the data has none" in refusal(lambda: read_prompts(str(tmp_path / "p.txt"), classnames=None))


def test_class_names_of_prompts_are_matched_without_case_and_underscores(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"classnames": ["Polar_Bear", "cat"], "templates": ["a {c}"]}))
    assert read_prompts(str(file), classnames=("polar bear", "cat", "dog")).classnames == ("Polar_Bear", "cat")
    line = refusal(lambda: read_prompts(str(file), classnames=("polar bear", "cats")))
    assert "has the class 'cat', which the data lacks: did you mean 'cats'?" in line
    file.write_text(json.dumps({"classnames": ["cat", "a_b", "a b"], "templates": ["a {c}"]}))
    assert "has the class 'a b' twice" in refusal(lambda: read_prompts(str(file), classnames=None))


# ---- names as keys -----------------------------------------------------------------------------------------------


def test_classes_of_one_name_have_keys_of_their_own(tmp_path):
    folders = {f"n0000000{i}": i for i in range(4)}
    names = {folder: name for folder, name in zip(folders, ["fox", "cat", "fox", "dog"], strict=True)}
    root = write_folders(tmp_path, folders)
    (root / "names.json").write_text(json.dumps({"pets": names}))
    dataset = load_benchmark_set("pets", root=str(root), classname_file=str(root / "names.json"))
    (line,) = evaluate(clip(), [replace(dataset, templates=["{c} ."])], teacher=clip(), draws=5)
    per_class = line["teacher"]["per_class"]
    assert list(per_class) == ["fox (label 0)", "cat", "fox (label 2)", "dog"]
    assert sum(row["n"] for row in per_class.values()) == line["n"] == 8


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "b", "a"], ["a (label 0)", "b", "a (label 2)"]),
        (["a", "a", "a (label 0)"], ["a (label 0) (label 0)", "a (label 1)", "a (label 0) (label 2)"]),
    ],
)
def test_unique_names_lose_none(names, expected):
    assert unique_names(names) == expected and len(set(expected)) == len(names)


def test_places_prefers_the_strictest_comparison():
    assert places(["a_b", "a b"], ["a b", "a_b"]) == [1, 0]
    assert places(["7", "007"], ["007", "7"]) == [1, 0]
    assert places(["A"], ["a", "b"]) == [0] and places(["a"], ["b"]) is None
    assert "more than once" in refusal(lambda: match_classes(["a"], ["b", "b"], whose="one", others="two"))
