"""docs/extending.md is a script that runs: its Python blocks, in their order, are a recipe."""

import json
import re
from pathlib import Path

import pytest
import test_recipes
from helpers import run_script_in_ranks
from small_sets import COLOURS, write_picture

HOUSE = Path(__file__).parents[1]
place = test_recipes.place  # the fixture
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "similarity_kd.py"
    path.write_text("\n\n".join(BLOCK.findall((HOUSE / "docs" / "extending.md").read_text())))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(8):
        colour = list(COLOURS)[number % 3]
        write_picture(tmp_path / "pairs" / f"{number}.jpg", colour, size=8)
        (tmp_path / "pairs" / f"{number}.txt").write_text(f"a {colour} square")
    return tmp_path / "pairs"


def flags_of(place: Path, folder: Path, *more: str) -> list[str]:
    teacher = ["--teacher", f"local-dir:{place}/teacher", "--student", f"{place}/tiny.json"]
    return [*teacher, "--train-data", str(folder), "--steps", "2", "--batch-size", "3", "--workers", "0", *more]


def test_the_page_is_a_recipe_that_trains_on_two_processes(place, folder, script):
    run_script_in_ranks(script, *flags_of(place, folder, "--output-dir", "run"), folder=script.parent)
    record = json.loads((script.parent / "run" / "results.jsonl").read_text().splitlines()[0])
    assert record["step"] == 2 and record["train/similarity"] > 0 and "train/soft_ce" in record
    assert (script.parent / "run" / "model" / "open_clip_model.safetensors").is_file()


def test_its_recipe_is_40_lines_and_its_errors_one(place, folder, script, run_script, monkeypatch):
    monkeypatch.chdir(script.parent)
    blocks = BLOCK.findall((HOUSE / "docs" / "extending.md").read_text())
    assert len([line for line in blocks[-1].splitlines() if line.strip()]) <= 40
    empty = script.parent / "empty"
    empty.mkdir()
    code, _, error = run_script(script, *flags_of(place, empty))
    assert code == 2 and error.count("\n") == 1 and "has no image x.jpg with a caption x.txt" in error
    code, help_text, _ = run_script(script, "--help")
    assert code == 0 and "--similarity-weight" in help_text and "data options" in help_text
