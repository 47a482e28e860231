"""An exported pair of ONNX files computes the student's embeddings, with and without this package; int8 is kept only
while it loses little; a failed comparison and files of others leave the folder as it was; a mistake is one line."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import test_clip_models as models
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from small_sets import COLOURS, colour_set, picture
from tokenizers import Tokenizer
from torch import nn

from gkl_vl import cli
from gkl_vl.data import pairs
from gkl_vl.data.sources import Source
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.export import __main__ as command
from gkl_vl.export import formats, load_onnx, onnx_format
from gkl_vl.export.cards import ClipCard, RunFacts
from gkl_vl.export.hub import export_clip
from gkl_vl.export.int8 import check_drop, refuse_chance
from gkl_vl.models import onnx as models_onnx
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.onnx import CONFIG_NAME
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER_NAME
from gkl_vl.models.towers import parameter_counts
from gkl_vl.training import clip_results

HOUSE = Path(__file__).parents[1]
TEXT = {"context_length": 16, "vocab_size": 4096, "hf_tokenizer_name": BUNDLED_TOKENIZER_NAME}
TEXT |= {"width": 32, "heads": 2, "layers": 1}
TIMM = {"timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
CONVOLUTIONAL = {"embed_dim": 24, "vision_cfg": TIMM | {"timm_model_name": "test_resnet"}, "text_cfg": TEXT}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
PLAIN = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}
TEXTS = ["a red square", "Flag: “São Tomé” &amp; Príncipe", "many words " * 20, ""]
FACTS = RunFacts(command="accelerate launch x.py", commit=None, steps=1, seed=0)
CARD = ClipCard(student="tiny", teachers=(), license="mit", datasets=["colours"], run=FACTS)


def make_clip(folder: Path, config: dict) -> Clip:
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    return load_clip(str(folder / "config.json"))


def embeddings(clip: Clip, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return clip.towers.encode_image(pixels), clip.towers.encode_text(clip.tokenize(texts))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*flags: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m gkl_vl.export *flags`, in this process."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.run(command.main, command.Config, [str(flag) for flag in flags])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), error.getvalue()


def refusal(*flags: object) -> str:
    """The line of a command that is refused."""
    code, _, error = run(*flags)
    assert code == 2 and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """As many calibration images as the comparison needs, read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CALIBRATION_IMAGES", 64)
        patch.setattr(pairs, "bundled_pairs", cache(pairs.bundled_pairs))
        yield


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """An evaluation set of plain pictures with labels and captions."""
    return colour_set(tmp_path_factory.mktemp("sets") / "colours", list(COLOURS) * 4)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Clip:
    """A convolutional student that knows three colours."""
    clip = make_clip(tmp_path_factory.mktemp("config"), CONVOLUTIONAL)
    pixels = torch.stack([clip.image_transform()(Image.open(io.BytesIO(picture(colour)))) for colour in COLOURS])
    tokens = clip.tokenize([f"a {colour} square" for colour in COLOURS])
    optimizer = torch.optim.Adam(clip.towers.parameters(), lr=1e-3)
    clip.towers.eval()
    for _ in range(20):
        logits = 20 * clip.towers.encode_image(pixels) @ clip.towers.encode_text(tokens).T
        loss = sum(nn.functional.cross_entropy(side, torch.arange(3)) for side in (logits, logits.T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip.towers.requires_grad_(False)
    return clip


@pytest.fixture(scope="module")
def exported(student: Clip, colours: Path, tmp_path_factory) -> tuple[Path, str]:
    """The student's run folder with onnx and int8, and what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    export_clip(clip=student, folder=folder / "model", card=CARD)
    code, out, error = run(folder, "--formats", "onnx", "int8", "--eval-set", colours, "--max-drop", "5")
    assert (code, error) == (0, ""), error
    return folder, out


@pytest.fixture
def copied(exported, tmp_path: Path) -> Path:
    """A copy of the run folder."""
    shutil.copytree(exported[0], tmp_path / "run")
    return tmp_path / "run"


# ---- what is written


def test_the_files_stand_alone_and_the_card_lists_them(exported):
    folder, out = exported
    names = {"image.onnx", "text.onnx", "image.int8.onnx", "text.int8.onnx", "tokenizer.json", CONFIG_NAME}
    assert set(contents(folder / "model" / "onnx")) == names
    config = json.loads((folder / "model" / "onnx" / CONFIG_NAME).read_text())
    assert config["image"]["preprocess"]["mean"] and config["image"]["steps"][0] == "convert to RGB"
    assert max(config["checked"]["largest_difference"].values()) < 1e-5 and config["checked"]["batches"] == [1, 5, 64]
    assert (config["int8"]["image"]["scheme"], config["int8"]["text"]["scheme"]) == ("static", "dynamic")
    sizes = {name: len(content) for name, content in contents(folder / "model" / "onnx").items()}
    assert all(sizes[f"{side}.int8.onnx"] < 0.6 * sizes[f"{side}.onnx"] for side in ("image", "text"))
    card = (folder / "model" / "README.md").read_text()
    assert "## Formats" in card and "onnx/image.int8.onnx" in card and "acc1" in card.split("## Formats")[1]
    assert "acc1 100.00 % ->" in out and str(folder / "model" / "onnx" / "text.onnx") in out


def test_the_pair_computes_the_students_embeddings(exported, student: Clip):
    folder, _ = exported
    pixels = torch.randn(7, 3, 32, 32)
    expected = embeddings(student, pixels, TEXTS)
    clip = load_onnx(folder)
    assert torch.equal(clip.tokenize(TEXTS), student.tokenize(TEXTS))
    for found, reference in zip(embeddings(clip, pixels, TEXTS), expected, strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=0)
    assert clip.towers.log_scale().item() == pytest.approx(student.towers.log_scale().item())
    assert (clip.embed_dim, clip.preprocess, clip.towers.bias()) == (24, replace(student.preprocess, size=32), None)
    assert parameter_counts(clip.towers) == parameter_counts(student.towers)
    rounded = embeddings(load_onnx(folder / "model", int8=True), pixels, TEXTS)
    for found, reference in zip(rounded, expected, strict=True):
        cosines = (found * reference).sum(dim=1)
        assert cosines.min() > 0.98 and not torch.allclose(found, reference, atol=1e-5)


def snippet() -> str:
    """The Python code of docs/formats.md that runs the pair."""
    return re.findall(r"^```python\n(.*?)^```", (HOUSE / "docs" / "formats.md").read_text(), re.DOTALL | re.MULTILINE)[
        0
    ]


def test_the_documented_code_runs_the_pair_without_this_package(exported, student: Clip, tmp_path: Path):
    folder, _ = exported
    pixels = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95)
    shutil.copytree(folder / "model" / "onnx", tmp_path / "onnx")
    code = f"{snippet()}\nimport sys\nassert not {{'torch', 'transformers', 'gkl_vl'}} & set(sys.modules)\n"
    code += "np.savez('out.npz', image=image, text=text, logits=logits)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "out.npz")
    texts = re.search(r"texts = (\[.*\])", snippet())
    assert texts is not None
    transformed = student.image_transform()(Image.open(tmp_path / "photo.jpg"))[None]
    image, text = embeddings(student, transformed, json.loads(texts[1]))
    np.testing.assert_allclose(theirs["image"], image, atol=1e-5)
    np.testing.assert_allclose(theirs["text"], text, atol=1e-5)
    scale = student.towers.log_scale().exp()
    np.testing.assert_allclose(theirs["logits"], scale * image @ text.T, atol=1e-4)


def test_the_evaluation_scripts_take_a_pair_by_name(exported, colours: Path, tmp_path, monkeypatch, run_script):
    folder, _ = exported
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", colours, "--num_workers", 0, "--teacher", folder]
    code, out, error = run_script(HOUSE / "eval" / "zero_shot.py", "--model", f"onnx:{folder}", *flags)
    assert code == 0, error
    result = json.loads(Path("result.json").read_text())
    assert result["metrics"]["acc1"] == 1 and result["teacher"]["likeness"]["agreement@1"] == 1
    code, _, error = run_script(
        HOUSE / "eval" / "zero_shot.py", "--model", f"onnx:{folder}", "--dataset", colours, "--attack", "apgd"
    )
    assert code == 2 and "has no gradients" in error and error.count("\n") == 1


def test_a_pair_is_known_to_caches_by_its_files(exported, copied: Path):
    keys = [Embedder(clip=load_onnx(exported[0], int8=int8)).fingerprint for int8 in (False, True)]
    assert Embedder(clip=load_onnx(copied)).fingerprint == keys[0] != keys[1]
    config = copied / "model" / "onnx" / CONFIG_NAME
    config.write_text(config.read_text().replace("0.48145466", "0.5"))
    assert Embedder(clip=load_onnx(copied)).fingerprint != keys[0]


def test_a_siglip_of_transformers_keeps_its_bias_and_weights_may_be_beside_the_file(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(onnx_format, "SINGLE_FILE_BYTES", 1000)
    folder = models.siglip_folder(tmp_path / "m")
    clip = load_clip(f"transformers:{folder}")
    with torch.no_grad():
        clip.towers.model.logit_bias.fill_(-9.5)
    export_clip(clip=clip, folder=tmp_path / "e", card=CARD)
    formats.write_formats(tmp_path / "e", ["onnx"])
    written = contents(tmp_path / "e" / "onnx")
    assert len(written["text.onnx"]) < len(written["text.onnx.data"])
    pair, pixels = load_clip(f"onnx:{tmp_path / 'e'}"), torch.randn(2, 3, 32, 32)
    bias = pair.towers.bias()
    assert bias is not None and bias.item() == -9.5
    clip.towers.eval()
    assert torch.equal(pair.tokenize(TEXTS), clip.tokenize(TEXTS))
    for found, reference in zip(embeddings(pair, pixels, TEXTS), embeddings(clip, pixels, TEXTS), strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name, clean", [("clip", "lower"), ("clip", "whitespace"), ("bundled", "whitespace"), ("bundled", "canonicalize")]
)
def test_the_tokenizer_file_has_open_clips_ids_or_is_refused(tmp_path: Path, name: str, clean: str):
    text = {**TEXT, "tokenizer_kwargs": {"clean": clean}}
    if name == "clip":
        text = {key: value for key, value in text.items() if key != "hf_tokenizer_name"} | {"vocab_size": 49408}
    clip = make_clip(tmp_path, PLAIN | {"text_cfg": text})
    special = onnx_format._write_tokenizer(clip, tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.encode_special_tokens = special
    texts = [*TEXTS, *onnx_format._ODD_TEXTS]
    found = [encoding.ids for encoding in plain.encode_batch(texts)]
    if (name, clean) == ("clip", "whitespace"):  # CLIP's BPE with case is open_clip's alone
        converted = replace(clip, tokenize=lambda texts: torch.tensor(found))
        with pytest.raises(UserError, match="no tokenizer file expresses the tokenizer of .*nothing was written"):
            onnx_format._check_tokens(clip, converted, texts)
        return
    assert found == clip.tokenize(texts).tolist()


def test_a_tokenizer_in_python_has_its_own_files(tmp_path: Path):
    folder = models.siglip_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    words = ["<cls>", "<pad>", "<eos>", "<unk>", "a", "red", "square"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(words)
    (folder / "config.json").write_text(json.dumps(config))
    clip = load_clip(f"transformers:{folder}", random_weights=True)
    assert onnx_format._write_tokenizer(clip, tmp_path) is False and not (tmp_path / "tokenizer.json").exists()
    described = onnx_format._config(clip, tmp_path, 20, False)
    assert described["text"]["tokenizer"] == "transformers.AutoTokenizer"
    tokenize, hf_tokenizer = models_onnx._tokenizer(tmp_path, models_onnx._checked(described, "x"))
    texts = ["a “RED” square!", *TEXTS]
    assert hf_tokenizer is not None and torch.equal(tokenize(texts), clip.tokenize(texts))


def test_parallel_convolutions_are_merged(tmp_path: Path):
    vision = TIMM | {"timm_model_name": "mobileone_s0"}
    clip = make_clip(tmp_path, CONVOLUTIONAL | {"vision_cfg": vision})
    clip.towers.eval()
    merged = onnx_format._without_branches(clip)
    modules = [sum(isinstance(module, nn.Conv2d) for module in towers.modules()) for towers in (merged, clip.towers)]
    assert modules[0] < modules[1] / 2
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(merged.encode_image(pixels), clip.towers.encode_image(pixels), atol=1e-5, rtol=0)


# ---- transformers


def test_transformers_format_is_added_and_compared(tmp_path: Path):
    clip = make_clip(tmp_path, PLAIN)
    export_clip(clip=clip, folder=tmp_path / "e", card=CARD, transformers=False)
    code, out, error = run(tmp_path / "e", "--formats", "transformers")
    assert code == 0 and "transformers: " in out, error
    assert "CLIPModel" in (tmp_path / "e" / "README.md").read_text().split("## Formats")[1]
    pixels = torch.randn(2, 3, 32, 32)
    again = load_clip(f"transformers:{tmp_path / 'e'}")
    again.towers.eval(), clip.towers.eval()
    torch.testing.assert_close(embeddings(again, pixels, TEXTS), embeddings(clip, pixels, TEXTS), atol=1e-5, rtol=0)
    assert transformers.CLIPModel.from_pretrained(tmp_path / "e").config.projection_dim == 24
    before = contents(tmp_path / "e")
    assert run(tmp_path / "e", "--formats", "transformers")[0] == 0
    assert contents(tmp_path / "e") == before  # it is there already
    modes = {path.stat().st_mode for path in (tmp_path / "e").iterdir()}
    assert len(modes) == 1


# ---- refusals


def test_a_failed_comparison_leaves_the_earlier_export(copied: Path, student: Clip, monkeypatch):
    """The folder's weights have changed since; a faulty exporter still writes the old ones."""
    before = contents(copied / "model" / "onnx")
    weights = copied / "model" / "open_clip_model.safetensors"
    tensors = load_file(weights)
    tensors["visual.head.proj.weight"] += 0.01
    save_file(tensors, weights)
    old = copied / "old"
    shutil.copytree(copied / "model" / "onnx", old)

    def faulty(clip: Clip, side: str, inputs: torch.Tensor, path: Path) -> int:
        shutil.copy(old / path.name, path)
        return 20

    monkeypatch.setattr(onnx_format, "_write_tower", faulty)
    card = (copied / "model" / "README.md").read_text()
    error = refusal(copied)
    found = re.search(
        r"differ from the model's by up to (\S+) \(batch \d+\), more than 0.0001: nothing was written", error
    )
    assert found and float(found[1]) > 1e-4
    assert contents(copied / "model" / "onnx") == before and (copied / "model" / "README.md").read_text() == card
    assert [path.name for path in (copied / "model").iterdir() if path.name.endswith(".writing")] == []


def record(**metrics: float) -> dict:
    return {"dataset": "x", "n": 100, "intervals": {key: [value - 0.05, 1] for key, value in metrics.items()}} | metrics


def test_a_drop_is_in_points_and_of_the_worst_metric():
    before = [record(acc1=0.5) | {"classes": 10}, record(**{"image_retrieval_recall@1": 0.4})]
    fine = [record(acc1=0.491), record(**{"image_retrieval_recall@1": 0.45})]
    check_drop(before, fine, max_drop=1.0)
    worse = [record(acc1=0.491), record(**{"image_retrieval_recall@1": 0.389})]
    with pytest.raises(
        UserError, match=r"image_retrieval_recall@1 on x from 40.00 % to 38.90 %, by more than .* 1 points"
    ):
        check_drop(before, worse, max_drop=1.0)
    with pytest.raises(UserError, match=r"acc1 on x from 50.00 % to 49.10 %"):
        check_drop(before, fine, max_drop=0.5)
    with pytest.raises(UserError, match="to nan %"):
        check_drop(before[:1], [record(acc1=float("nan"))], max_drop=1.0)
    with pytest.raises(UserError, match=r"cannot be judged on x: .* 14.00 % top-1 and chance is 10.00 %"):
        refuse_chance([record(acc1=0.4) | {"classes": 10}, record(acc1=0.14) | {"classes": 10}])


def test_int8_that_loses_too_much_is_not_kept(copied: Path, colours: Path, monkeypatch):
    old = copied / "old"
    shutil.copytree(copied / "model" / "onnx", old)
    before = contents(copied / "model" / "onnx")

    def copy_tower(clip: Clip, side: str, inputs: torch.Tensor, path: Path) -> int:
        shutil.copy(old / path.name, path)
        return 20

    def spoil(*, folder: Path, pixels: torch.Tensor) -> dict:
        """The images of a model with other weights."""
        model = onnx.load(folder / "image.onnx")
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                tensor.raw_data = np.random.default_rng(0).random(tensor.dims, dtype=np.float32).tobytes()
        onnx.save(model, folder / "image.int8.onnx")
        shutil.copy(folder / "text.onnx", folder / "text.int8.onnx")
        return {"image": "static", "text": "dynamic"}

    monkeypatch.setattr(onnx_format, "_write_tower", copy_tower)
    monkeypatch.setattr(formats, "write_int8", spoil)
    error = refusal(copied, "--formats", "int8", "--eval-set", colours)
    assert re.search(r"int8 lowers acc1 on \S*colours from 100.00 % to \S+ %, by more than --max-drop 1 points", error)
    assert contents(copied / "model" / "onnx") == before


class Bessel(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(pixels.flatten(1)[:, :24])


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path, student: Clip, capfd):
    clip = make_clip(tmp_path, PLAIN)
    clip.towers.model.visual = Bessel()
    with pytest.raises(
        UserError, match="image tower of .* cannot be exported to ONNX: .* operator prims.bessel_j0; nothing"
    ):
        onnx_format._write_tower(clip, "image", torch.zeros(2, 3, 32, 32), tmp_path / "image.onnx")
    assert capfd.readouterr() == ("", "") and not (tmp_path / "image.onnx").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(exported, monkeypatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(exported[0]) == f"error: ONNX needs {package}: pip install 'gkl-vl[onnx]'\n"


def test_quantised_files_of_an_earlier_export_are_left_out_with_a_note(copied: Path, monkeypatch):
    old = copied / "old"
    shutil.copytree(copied / "model" / "onnx", old)
    monkeypatch.setattr(
        onnx_format, "_write_tower", lambda _, side, inputs, path: shutil.copy(old / path.name, path) and 20
    )
    code, out, error = run(copied, "--formats", "onnx")
    assert code == 0 and error.startswith("note: the int8 files in") and error.count("\n") == 1
    assert {path.name for path in (copied / "model" / "onnx").iterdir()} == {
        "image.onnx", "text.onnx", "tokenizer.json", CONFIG_NAME
    }  # fmt: skip
    assert all("int8.onnx" not in text for text in ((copied / "model" / "README.md").read_text(), out))


def test_other_files_are_never_replaced(copied: Path):
    folder = copied / "model" / "onnx"
    (folder / "notes.txt").write_text("mine")
    assert "holds 'notes.txt' of yours: move it away" in refusal(copied)
    (folder / "notes.txt").unlink()
    (folder / CONFIG_NAME).unlink()
    assert f"holds files but no {CONFIG_NAME}: move them away" in refusal(copied)
    shutil.rmtree(folder)
    folder.write_text("mine")
    assert "is a file, and ONNX needs a folder of this name" in refusal(copied)


def test_a_file_where_transformers_needs_one_is_not_replaced(tmp_path: Path):
    export_clip(clip=make_clip(tmp_path, PLAIN), folder=tmp_path / "e", card=CARD, transformers=False)
    (tmp_path / "e" / "config.json").write_text("{}")
    assert "holds 'config.json', but no model of transformers" in refusal(tmp_path / "e", "--formats", "transformers")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"init_logit_bias": -10.0}, "CLIPModel has nothing like its init_logit_bias -10.0"),
        ({"vision_cfg": VIT | {"pool_type": "avg"}}, "CLIPModel has nothing like its pool_type 'avg'"),
        (
            {"vision_cfg": VIT | {"pool_type": "avg"}, "init_logit_bias": -10.0},
            "its tokenizer, its resize_mode or several of its settings have no equivalent in CLIPModel",
        ),
    ],
)
def test_the_setting_that_transformers_lacks_is_named(tmp_path: Path, change: dict, reason: str):
    clip = make_clip(tmp_path, PLAIN | change)
    with pytest.raises(UserError, match=re.escape(f"has no form in transformers: {reason}")):
        formats.check_formats(clip, ["transformers"], [])


def test_mistakes_are_one_line(exported, tmp_path: Path, colours: Path):
    folder = exported[0]
    assert "holds no exported CLIP: name the folder of a run" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "resnet8x4", "num_classes": 10}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "holds a classifier" in refusal(tmp_path)
    assert "invalid choice 'tflite'" in refusal(folder, "--formats", "tflite")
    assert "has no form in transformers: its image tower is timm's test_resnet" in refusal(
        folder, "--formats", "transformers"
    )
    assert "--max-drop 2.0 has no effect without int8" in refusal(folder, "--max-drop", 2)
    assert "--max-drop -1.0 must be at least 0" in refusal(folder, "--formats", "int8", "--max-drop", -1)
    few = colour_set(tmp_path / "few", ["red", "blue"])
    assert "holds 2 images that can be read: 64 are needed" in refusal(folder, "--images", few / "test")
    (few / "classnames.txt").unlink()
    assert "has no classnames.txt" in refusal(folder, "--formats", "int8", "--eval-set", few)
    (few / "dataset_type.txt").write_text("multilabel")
    assert "is a multilabel set, without top-1 or recall" in refusal(folder, "--formats", "int8", "--eval-set", few)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda folder: (folder / "text.onnx").write_bytes(b"onnx"),
            r"text.onnx' cannot be read \(.*: export it again",
        ),
        (lambda folder: (folder / "text.onnx").unlink(), "holds no text.onnx: export it again"),
        (
            lambda folder: (folder / "text.onnx").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0"
            ),
            "is a Git LFS pointer",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json' cannot be read"),
        (lambda folder: shutil.rmtree(folder), r"holds no ONNX files \(onnx/onnx_config.json\): write them with"),
        (lambda folder: edit(folder, "embed_dim", 25), r"image.onnx' has .*\[24\].* where onnx_config.json says"),
        (lambda folder: edit(folder, "logit_scale", -1), "logit_scale in .* is -1: export the model again"),
        (lambda folder: edit(folder, "text", None), "context_length in .* is None"),
        (lambda folder: (folder / CONFIG_NAME).write_text("["), "is no JSON"),
    ],
)
def test_a_damaged_pair_is_refused(copied: Path, damage, message: str):
    damage(copied / "model" / "onnx")
    with pytest.raises(UserError, match=message) as caught:
        load_clip(f"onnx:{copied}")
    assert "\n" not in str(caught.value)


def edit(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | {key: value}))


def test_int8_has_its_own_name_and_must_be_there(copied: Path):
    assert load_clip(f"onnx-int8:{copied}").name == f"onnx-int8:{copied}"
    (copied / "model" / "onnx" / "image.int8.onnx").unlink()
    with pytest.raises(
        UserError, match=r"holds no image.int8.onnx: python -m gkl_vl.export FOLDER --formats onnx int8"
    ):
        load_clip(f"onnx-int8:{copied}")
    with pytest.raises(UserError, match="cannot have random weights"):
        load_clip(f"onnx:{copied}", random_weights=True)


def test_a_hub_repository_is_fetched_without_its_other_weights(exported, tmp_path: Path, monkeypatch):
    asked = []

    def fetch(repo: str, *, files: tuple[str, ...], pickles: tuple[str, ...], allow_pickle: bool) -> Path:
        asked.append((repo, files, pickles, allow_pickle))
        return exported[0] / "model"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models_onnx, "fetch", fetch)
    assert load_clip("onnx:org/student").embed_dim == 24
    assert asked == [("org/student", ("onnx/*",), (), False)]


# ---- recipes


def test_a_recipe_adds_formats_at_its_end(tmp_path: Path, colours: Path, monkeypatch, run_script):
    calls = []

    def refuse(folder: Path, formats: tuple[str, ...], *, images: Source, sets: list[BenchmarkSet]) -> None:
        assert (folder / "open_clip_model.safetensors").is_file()
        calls.append((folder, formats, images.name, [dataset.name for dataset in sets]))
        raise UserError("int8 lowers acc1")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clip_results, "write_formats", refuse)
    make_clip(tmp_path, PLAIN)
    shards = f"{colours}/test/{{0..1}}.tar"
    flags = ["--teacher", "none", "--student", "config.json", "--train-data", shards, "--steps", 1, "--batch-size", 4]
    flags += ["--workers", 0, "--output-dir", "run", "--eval-data", colours, "--export", "onnx", "int8"]
    code, out, error = run_script(HOUSE / "recipes" / "clip_kd.py", *flags)
    assert calls == [(Path("run/model"), ("onnx", "int8"), shards, [str(colours)])]
    assert code == 2 and error.endswith("'run/model' is complete but for --export onnx int8: int8 lowers acc1\n")
    assert "Load the student" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--export", "int8", "--eval-data"], "int8 needs a set that shows what it loses"),
        (["--export", "transformers"], "'emoji-student' has no form in transformers: its image tower is timm's"),
    ],
)
def test_a_recipe_refuses_formats_before_its_first_step(tmp_path, monkeypatch, run_script, flags, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_script(HOUSE / "recipes" / "clip_kd.py", "--teacher", "none", *flags)
    assert code == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_pair_is_no_student(exported, tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    flags = ["--teacher", "none", "--student", f"onnx:{exported[0]}"]
    code, _, error = run_script(HOUSE / "recipes" / "clip_kd.py", *flags)
    assert code == 2 and "is a pair of ONNX files, which cannot be trained" in error and error.count("\n") == 1
