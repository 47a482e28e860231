"""Class prompts are read from a file as written, and a malformed file raises one line that names it."""

import json

import datasets
import pytest
from small_sets import write_picture

from gkl_vl.data.pairs import open_images
from gkl_vl.data.prompts import Prompts, bundled_prompts, read_prompts
from gkl_vl.errors import UserError

KNOWN = ("beagle", "golden retriever", "pug")
TEMPLATES = ["a photo of a {c}.", "{c}, {c}!"]


@pytest.fixture
def write(tmp_path):
    """write(content, ending) -> path of a file with that content; JSON unless it is a str."""

    def write(content, ending="json") -> str:
        path = tmp_path / f"pets.{ending}"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_a_json_file_names_classes_in_its_own_order(write):
    file = write({"classnames": ["pug", "golden_retriever"], "templates": TEMPLATES})
    for known in (None, KNOWN):
        prompts = read_prompts(file, classnames=known)
        assert prompts == Prompts(classnames=("pug", "golden_retriever"), templates=tuple(TEMPLATES))
    assert prompts.of_template(1) == ["pug, pug!", "golden_retriever, golden_retriever!"]


@pytest.mark.parametrize("content, ending", [({"templates": TEMPLATES}, "json"), ("\n".join(["", *TEMPLATES]), "txt")])
def test_without_class_names_those_of_the_data_are_used(write, content, ending):
    prompts = read_prompts(write(content, ending), classnames=KNOWN)
    assert prompts.classnames == KNOWN and prompts.templates == tuple(TEMPLATES)
    with pytest.raises(UserError, match="has no class names, and the data has none: write"):
        read_prompts(write(content, ending), classnames=None)


def test_the_bundled_prompts_are_the_same_as_in_the_evaluation():
    prompts = bundled_prompts()
    assert len(prompts.classnames) == 1658 and prompts.templates == ("{c}", "an emoji of {c}")
    assert open_images(None).classnames == prompts.classnames


PAIR = ["a", "b"]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"classnames": PAIR, "templates": ["{c}", "a photo"]},
            "the template 'a photo' has no place for the class name",
        ),
        ({"classnames": ["pug", "beagel"], "templates": ["{c}"]}, "'beagel', which the data lacks: did you mean 'beag"),
        ({"classnames": ["pug", "pug"], "templates": ["{c}"]}, "has the class 'pug' twice"),
        ({"classnames": ["pug"], "templates": ["{c}"]}, "has only the class 'pug'"),
        ({"classnames": ["pug", " "], "templates": ["{c}"]}, "has an empty class name"),
        ({"classnames": [], "templates": ["{c}"]}, "its classnames are not a list of texts"),
        ({"classnames": "pug", "templates": ["{c}"]}, "its classnames are not a list of texts"),
        ({"classnames": ["pug", 3], "templates": ["{c}"]}, "its classnames are not a list of texts"),
        ({"classnames": PAIR, "templates": []}, "has no templates: write texts with {c}"),
        ({"classnames": PAIR, "templates": "{c}"}, "has no templates: write texts with {c}"),
        ({"classnames": PAIR}, "has no templates: write texts with {c}"),
        ({"class_names": PAIR, "templates": ["{c}"]}, "has the key 'class_names': expected classnames and templates"),
        (["{c}"], "holds a list where a dict is expected"),
        ("{not json", "is no JSON"),
    ],
)
def test_a_malformed_json_file_raises_one_line(write, content, message):
    file = write(content)
    with pytest.raises(UserError) as caught:
        read_prompts(file, classnames=KNOWN)
    line = str(caught.value)
    assert message in line and file in line and "\n" not in line


def test_a_malformed_text_file_raises_one_line(write, tmp_path):
    for content, message in [("a photo\n", "'a photo' has no place"), ("\n\n", "has no templates")]:
        with pytest.raises(UserError, match=message):
            read_prompts(write(content, "txt"), classnames=KNOWN)
    (tmp_path / "latin.txt").write_bytes("{c} à la carte".encode("latin-1"))
    for name, message in [
        ("latin.txt", "is not UTF-8"),
        ("none.txt", "none.txt' does not exist"),
        ("none.json", "none.json' does not exist"),
        ("pets.yaml", "expected a file that ends in .json or .txt"),
    ]:
        with pytest.raises(UserError, match=message):
            read_prompts(str(tmp_path / name), classnames=KNOWN)


# ---- class names of the data


def test_folders_are_classes_if_all_images_are_in_them(tmp_path):
    for path in ("golden_retriever/1.png", "pug/2.jpg", "pug/3.webp", "pug/notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("txt"):
            (tmp_path / path).write_text("no image")
        else:
            write_picture(tmp_path / path, "red")
    source = open_images(str(tmp_path))
    assert source.classnames == ("golden retriever", "pug") and source.num_pairs == 3
    assert [pair.key for pair in source.epoch(0, 0, 0, 1)] != []
    write_picture(tmp_path / "pug" / "2024" / "4.png", "red")
    assert open_images(str(tmp_path)).classnames is None
    assert open_images(str(tmp_path / "pug" / "2024")).classnames is None  # images in a single folder
    (tmp_path / "flat").mkdir()
    write_picture(tmp_path / "flat" / "images" / "5.png", "red")
    assert open_images(str(tmp_path / "flat")).classnames is None  # one folder is not a set of classes


def test_a_tables_class_label_names_classes(tmp_path):
    features = {"img": datasets.Image(), "coarse_label": datasets.ClassLabel(names=["x", "y"])}
    features["fine_label"] = datasets.ClassLabel(names=["golden_retriever", "pug"])
    write_picture(tmp_path / "a.png", "red")
    rows = {"img": [str(tmp_path / "a.png")] * 2, "coarse_label": [0, 1], "fine_label": [1, 0]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "train.parquet")
    assert open_images(str(tmp_path / "train.parquet")).classnames == ("golden retriever", "pug")
    assert open_images(str(tmp_path)).num_pairs == 2  # a folder with parquet is a table
    table.select_columns(["img"]).to_parquet(tmp_path / "bare.parquet")
    assert open_images(str(tmp_path / "bare.parquet")).classnames is None
