"""The evaluation scripts accept CLIP_benchmark's flags and write its JSON; every user error ends in one line and exit
code 2. The tests run them as programs and never import them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_script_in_ranks
from safetensors.torch import save_file
from small_sets import colour_set

from gkl_vl.models import clip
from gkl_vl.models.clip import load_clip
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER, BUNDLED_TOKENIZER_NAME

pytestmark = pytest.mark.usefixtures("one_thread")
EVAL = Path(__file__).parents[1] / "eval"
SCRIPTS = ["zero_shot", "retrieval"]
TASKS = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
METRICS = {
    "zero_shot": {"acc1", "acc5", "mean_per_class_recall"},
    "retrieval": {f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A small CLIP with random weights as a folder in open_clip's format."""
    folder = tmp_path_factory.mktemp("random_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 4096,
            "hf_tokenizer_name": BUNDLED_TOKENIZER_NAME,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    (folder / "eval-script.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = load_clip(str(folder / "eval-script.json"))
    save_file(clip.towers.model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    for file in BUNDLED_TOKENIZER.glob("*.json"):
        shutil.copy(file, folder)
    return f"local-dir:{folder}"


@pytest.fixture
def colours(tmp_path) -> Path:
    return colour_set(tmp_path / "sets" / "colours", ["red", "green", "blue", "red"])


@pytest.fixture
def call(tmp_path, monkeypatch, run_script):
    """call(script, *flags) -> (exit code, stdout, stderr), with an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *flags: str) -> tuple[int, str, str]:
        return run_script(EVAL / f"{script}.py", "--num_workers", "0", *flags)

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_result_has_clip_benchmarks_keys(call, model, colours, script):
    root = str(colours.parent / "{dataset}")
    code, out, err = call(script, "--model", model, "--dataset", "wds/colours", "--dataset_root", root)
    assert (code, err) == (0, "")
    result = json.loads(Path("result.json").read_text())
    metrics = result["metrics"]
    expected = {
        "dataset": "wds/colours",
        "model": model,
        "pretrained": "",
        "task": TASKS[script],
        "language": "en",
    }
    assert expected.items() <= result.items()
    assert set(metrics) == METRICS[script]
    assert result["n"] == 4 and result["intervals"].keys() == METRICS[script] | set(result["extra"])
    assert "wds/colours, 4 images" in out and "result.json" in out


def test_several_sets_give_a_line_and_a_row_each(call, model, colours):
    shutil.copytree(colours, colours.parent / "again")
    flags = ["--dataset", "colours", "again", "--dataset-root", str(colours.parent / "{dataset}")]
    code, out, _ = call("retrieval", "--model", model, *flags, "--recall_k", "1", "2", "--batch-size", "3")
    assert code == 0
    lines = [json.loads(line) for line in Path("result.json").read_text().splitlines()]
    assert [line["dataset"] for line in lines] == ["colours", "again"]
    assert lines[0]["metrics"] == lines[1]["metrics"] and len(lines[0]["metrics"]) == 4
    heads = [line for line in out.splitlines() if "95 % interval" in line]
    assert [line.split(",")[0] for line in heads] == ["colours", "again"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_teacher_is_compared_with(call, model, colours, script):
    flags = ["--model", model, "--teacher", model, "--dataset", str(colours)]
    code, out, err = call(script, *flags)
    assert (code, err) == (0, "")
    teacher = json.loads(Path("result.json").read_text())["teacher"]
    assert teacher["model"] == model and teacher["kept"].keys() >= METRICS[script]
    assert "teacher" in out and "kept" in out
    assert ("agreement with the teacher: top-1 100.00 %" in out) == (script == "zero_shot")


def test_embeddings_are_cached_unless_no_cache(call, model, colours, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--model", model, "--dataset", str(colours)]
    assert call("zero_shot", *flags, "--no-cache")[0] == 0 and not (tmp_path / "cache").exists()
    assert call("zero_shot", *flags)[0] == 0
    assert len(list((tmp_path / "cache" / "gkl_vl" / "embeddings").iterdir())) == 2  # images, and prompts
    assert call("retrieval", *flags)[0] == 0
    assert len(list((tmp_path / "cache" / "gkl_vl" / "embeddings").iterdir())) == 3  # captions; the images are cached
    first, second, _ = map(json.loads, Path("result.json").read_text().splitlines())
    assert first["metrics"]["acc1"] == second["metrics"]["acc1"]


def test_a_template_gives_a_file_per_set(call, model, colours):
    template = "out/{dataset}_{pretrained}_{model}_{language}_{task}.json"
    code, _, _ = call("zero_shot", "--model", model, "--dataset", str(colours), "--output", template)
    assert code == 0
    (file,) = Path("out").iterdir()
    assert file.name.endswith("_en_zeroshot_classification.json") and "colours" in file.name
    assert json.loads(file.read_text())["task"] == "zeroshot_classification"


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_flags_it_is_the_bundled_teacher_on_the_bundled_sets(call, model, monkeypatch, script):
    monkeypatch.setattr(clip, "BUNDLED_TEACHER", model)
    code, out, err = call(script)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in Path("result.json").read_text().splitlines()]
    assert [(line["dataset"], line["model"]) for line in lines] == [("emoji", "bundled"), ("emoji_unseen", "bundled")]


def test_the_documented_file_runs_as_a_program(tmp_path, model, colours):
    command = [sys.executable, str(EVAL / "zero_shot.py"), "--model", model, "--dataset", str(colours)]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar where there is no terminal
    assert "acc1" in done.stdout and (tmp_path / "result.json").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_print_once_and_write_the_same_result(call, tmp_path, model, colours, script):
    flags = ["--model", model, "--dataset", str(colours), "--batch_size", "3", "--num_workers", "0", "--no-cache"]
    assert call(script, *flags)[0] == 0
    out = run_script_in_ranks(EVAL / f"{script}.py", *flags, folder=tmp_path)
    assert out.count("4 images    ") == 1
    one, two = Path("result.json").read_text().splitlines()
    assert one == two


def probe_sets(folder: Path) -> Path:
    """A set with a test split and a larger training split."""
    colours = colour_set(folder / "colours", ["red", "green", "blue", "red"])
    train = colour_set(folder / "other", ["red", "green", "blue"] * 4)
    shutil.move(train / "test", colours / "train")
    return colours


def test_a_linear_probe_is_fitted_to_the_training_split(call, model, tmp_path):
    colours = str(probe_sets(tmp_path / "sets"))
    code, out, err = call("linear_probe", "--model", model, "--teacher", model, "--dataset", colours)
    assert (code, err) == (0, "")
    line = json.loads(Path("result.json").read_text())
    assert line["task"] == "linear_probe" and line["n"] == 4
    assert line["metrics"].keys() == {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall"}
    assert line["metrics"]["lp_acc1"] == 1  # three colours are separable with any weights
    assert line["probe"]["fewshot_k"] == -1 and line["probe"]["validation"] == 1
    assert line["teacher"]["kept"]["lp_acc1"] == 1 and "lp_acc1 against the teacher's" in out
    assert call("linear_probe", "--model", model, "--dataset", colours, "--fewshot_k", "2")[0] == 0
    assert json.loads(Path("result.json").read_text().splitlines()[1])["probe"]["fewshot_k"] == 2


def test_a_probe_that_cannot_be_fitted_ends_in_one_line(call, model, tmp_path):
    colours = probe_sets(tmp_path / "sets")
    flags = ["--model", model, "--dataset", str(colours)]
    assert "5 shots: class 0 has 4 images" in complaint(call, "linear_probe", *flags, "--fewshot_k", "5")
    assert "validation/nshards.txt" in complaint(call, "linear_probe", *flags, "--train_split", "validation")
    (colours / "dataset_type.txt").write_text("retrieval")
    assert "no labels to fit a probe to" in complaint(call, "linear_probe", *flags)


def complaint(call, script: str, *flags: str) -> str:
    code, out, err = call(script, *flags)
    assert code == 2 and out == "" and err.count("\n") == 1 and not Path("result.json").exists()
    return err


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_does_not_exist_ends_in_one_line(call, model, colours, script):
    good = ["--model", model, "--dataset", str(colours)]
    assert "wds_no-such" in complaint(call, script, "--model", model, "--dataset", "no/such")
    assert "no-such-model" in complaint(call, script, *good, "--model", "no-such-model", "--pretrained", "x")
    assert "has random weights" in complaint(call, script, *good, "--model", "ViT-B-32")
    assert "val/nshards.txt" in complaint(call, script, *good, "--split", "val")
    assert "--batch-size" in complaint(call, script, *good, "--batch_sise", "3")
    assert "known are" in complaint(call, script, *good, "--output", "{sets}.json")
    (colours / "test" / "1.tar").unlink()
    assert "1.tar is missing" in complaint(call, script, *good)


def test_a_bad_set_ends_in_one_line(call, model, colours):
    good = ["--model", model, "--dataset", str(colours)]
    (colours / "classnames.txt").write_text("red\ngreen\n")
    assert "label 2: 2 class names" in complaint(call, "zero_shot", *good)
    (colours / "classnames.txt").unlink()
    assert "no classnames.txt" in complaint(call, "zero_shot", *good)
    (colours / "dataset_type.txt").write_text("retrieval")
    assert "use eval/retrieval.py" in complaint(call, "zero_shot", *good)
    assert "--recall-k 0 must be at least 1" in complaint(call, "retrieval", *good, "--recall_k", "0")
    shard = colours / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:512])
    assert "ends early" in complaint(call, "retrieval", *good)


def test_results_of_the_sets_before_a_bad_one_are_kept(call, model, colours):
    shutil.copytree(colours, colours.parent / "bad")
    (colours.parent / "bad" / "classnames.txt").unlink()
    flags = ["--dataset", "colours", "bad", "--dataset_root", str(colours.parent / "{dataset}")]
    code, _, err = call("zero_shot", "--model", model, *flags)
    assert code == 2 and "bad has no classnames.txt" in err
    assert json.loads(Path("result.json").read_text())["dataset"] == "colours"


def test_pickled_weights_are_read_only_when_allowed(call, model, colours, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model.removeprefix("local-dir:"), folder)
    state = load_clip(model).towers.model.state_dict()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()
    flags = ["--model", f"local-dir:{folder}", "--dataset", str(colours)]
    assert "--allow-pickle" in complaint(call, "zero_shot", *flags)
    assert call("zero_shot", *flags, "--allow-pickle")[0] == 0


def test_debug_shows_the_traceback(call, model, colours):
    (colours / "classnames.txt").unlink()
    code, _, err = call("zero_shot", "--model", model, "--dataset", str(colours), "--debug")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")
