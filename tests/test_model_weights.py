"""Weights that are damaged, wrapped, or of another model load completely or are refused in one line that names the file
and a remedy, by every loader; so are model configs with wrong keys and values."""

import argparse
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import test_clip_models as models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from gkl_vl.errors import UserError
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.models.clip import load_clip
from gkl_vl.models.weights import read_state_dict

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 605157884\n"


def one_line(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text and "\x1b" not in text and not text.rstrip().endswith(":")
    assert "weights_only" not in text  # torch's advice to load without it
    return text


# ---- damaged files, through every loader


def config_file(folder: Path) -> str:
    path = folder / "tiny.json"
    path.write_text(json.dumps(models.TINY))
    return str(path)


def timm_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 3}))
    return folder


def own_folder(folder: Path) -> Path:
    folder.mkdir()
    config = {"library": "gkl-vl", "architecture": "resnet8", "num_classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_by_file(folder: Path, path: Path):
    return load_clip(config_file(folder), str(path), allow_pickle=True)


def read_by_tag(folder: Path, path: Path):
    return load_clip("ViT-S-32", str(path), allow_pickle=True)


def read_by_classifier(folder: Path, path: Path):
    return load_classifier("resnet8", num_classes=3, weights=str(path), allow_pickle=True)


def read_by_local_dir(folder: Path, path: Path):
    home = models.tiny_folder(folder / "m", weights=None)
    path.rename(home / f"open_clip_pytorch_model{'.bin' if path.suffix == '.pt' else path.suffix}")
    return load_clip(f"local-dir:{home}", allow_pickle=True)


def read_by_transformers(folder: Path, path: Path):
    home = models.clip_folder(folder / "m")
    (home / "model.safetensors").unlink()
    path.rename(home / ("pytorch_model.bin" if path.suffix == ".pt" else "model.safetensors"))
    return load_clip(f"transformers:{home}", allow_pickle=True)


def read_by_timm(folder: Path, path: Path):
    home = timm_folder(folder / "m")
    path.rename(home / ("pytorch_model.bin" if path.suffix == ".pt" else "model.safetensors"))
    return load_classifier(f"local-dir:{home}", allow_pickle=True)


def read_by_own_folder(folder: Path, path: Path):
    home = own_folder(folder / "m")
    path.rename(home / ("pytorch_model.bin" if path.suffix == ".pt" else "model.safetensors"))
    return load_classifier(f"local-dir:{home}", allow_pickle=True)


LOADERS = [read_by_file, read_by_tag, read_by_classifier, read_by_local_dir, read_by_transformers, read_by_timm]
LOADERS += [read_by_own_folder]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["lfs", "empty", "cut", "other"])
def test_a_damaged_file_is_one_line(tmp_path, load, suffix, damage):
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.zeros(100)}, path)
    contents = {"lfs": LFS, "empty": b"", "cut": path.read_bytes()[:-90], "other": b"<html>not found</html>" * 9}
    path.write_bytes(contents[damage])
    with pytest.raises(UserError) as caught:
        load(tmp_path, path)
    text = one_line(caught.value)
    assert suffix in text or ".bin" in text
    expected = {"lfs": "Git LFS pointer, not the file: run `git lfs pull`", "empty": "are an empty file: download"}
    assert expected.get(damage, "download it again") in text


# ---- wrapped checkpoints


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "student.module.", "_orig_mod.student."]
)
@pytest.mark.parametrize("key", [None, "state_dict", "model", "state_dict_ema"])
def test_prefixes_and_keys_around_weights_are_removed(tmp_path, prefix, key):
    torch.manual_seed(0)
    state = open_clip.CLIP(**models.TINY).state_dict()
    stored = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    torch.save(stored if key is None else {key: stored, "epoch": 3}, tmp_path / "w.pt")
    loaded = load_clip(config_file(tmp_path), str(tmp_path / "w.pt"), allow_pickle=True).towers.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_the_prefix_of_a_compiled_tower_is_removed(tmp_path):
    save_file({"visual._orig_mod.proj": torch.ones(2), "logit_scale": torch.ones(())}, tmp_path / "w.safetensors")
    assert set(read_state_dict(tmp_path / "w.safetensors", allow_pickle=False)) == {"visual.proj", "logit_scale"}


def test_arguments_and_metrics_beside_the_weights_are_read(tmp_path):
    """As open_clip's and timm's training checkpoints."""
    stored = {
        "args": argparse.Namespace(lr=1e-3),
        "metric": np.float64(0.5),
        "best": np.float32(0.25),
        "state_dict": {"a": torch.ones(2)},
        "state_dict_ema": {"a": torch.zeros(2)},
    }
    torch.save(stored, tmp_path / "w.pt")
    assert torch.equal(read_state_dict(tmp_path / "w.pt", allow_pickle=True)["a"], torch.ones(2))


def test_of_weights_and_their_average_it_says_which(tmp_path, capsys):
    torch.save({"state_dict_ema": {"a": torch.zeros(2)}, "state_dict": {"a": torch.ones(2)}}, tmp_path / "w.pt")
    assert torch.equal(read_state_dict(tmp_path / "w.pt", allow_pickle=True)["a"], torch.ones(2))
    assert "took 'state_dict'; the file also holds 'state_dict_ema'" in capsys.readouterr().err


class Settings:
    """A type of somebody else's training script."""


def test_a_foreign_type_is_named(tmp_path):
    torch.save({"settings": Settings(), "state_dict": {"a": torch.ones(2)}}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="it holds test_model_weights.Settings, which could run code") as caught:
        read_state_dict(tmp_path / "w.pt", allow_pickle=True)
    one_line(caught.value)


# ---- weights of another model


def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without one tensor, with one too many and one of another shape."""
    state = {key: tensor for key, tensor in state.items() if key != "ln_final.bias"}
    return state | {"extra.weight": torch.zeros(1), "visual.proj": torch.zeros(3, 4)}


@pytest.mark.parametrize("door", ["file", "local-dir"])
def test_a_mismatch_names_the_tensors(tmp_path, door):
    folder = models.tiny_folder(tmp_path / "m")
    path = folder / "open_clip_model.safetensors"
    save_file(changed(load_file(path)), path)
    with pytest.raises(UserError) as caught:
        load_clip(*((config_file(tmp_path), str(path)) if door == "file" else (f"local-dir:{folder}",)))
    text = one_line(caught.value)
    assert (
        "1 missing (ln_final.bias); 1 unexpected (extra.weight); 1 of another shape (visual.proj has [3, 4], not"
        in text
    )
    assert str(path) in text


def test_a_transformers_folder_of_more_layers_than_its_config_is_refused(tmp_path):
    """transformers would drop the further layers."""
    folder = models.clip_folder(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    further = {
        k.replace("layers.0", "layers.1"): v.clone() for k, v in stored.items() if "vision" in k and "layers.0" in k
    }
    save_file(stored | further, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"16 unexpected \(vision_model.encoder.layers.1.layer_norm1.bias") as caught:
        load_clip(f"transformers:{folder}")
    one_line(caught.value)


def test_position_ids_of_early_versions_are_ignored(tmp_path):
    folder = models.clip_folder(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    ids = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_file(stored | ids, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_clip(f"transformers:{folder}").embed_dim == 24


def test_half_precision_loads_in_single_precision(tmp_path):
    folder = models.clip_folder(tmp_path / "m")
    transformers.CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    clip = load_clip(f"transformers:{folder}")
    assert {parameter.dtype for parameter in clip.towers.parameters()} == {torch.float32}
    clip.towers.encode_image(clip.normalised(torch.zeros(1, 3, 32, 32)))


def test_transformers_weights_get_the_hint_at_transformers(tmp_path):
    folder = models.clip_folder(tmp_path / "m")
    with pytest.raises(UserError, match=f"these are transformers' tensors, write transformers:{folder} with") as caught:
        load_clip(config_file(tmp_path), str(folder / "model.safetensors"))
    one_line(caught.value)


def test_open_clip_weights_get_the_hint_at_local_dir(tmp_path):
    folder = models.clip_folder(tmp_path / "m")
    save_file(open_clip.CLIP(**models.TINY).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="these are open_clip's tensors, write local-dir:path") as caught:
        load_clip(f"transformers:{folder}")
    one_line(caught.value)
    (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=f"but weights of open_clip: write local-dir:{folder}"):
        load_clip(f"transformers:{folder}")


def test_interpolated_positions_are_announced(tmp_path, capsys):
    path = models.tiny_folder(tmp_path / "m") / "open_clip_model.safetensors"
    larger = models.TINY | {"vision_cfg": models.TINY["vision_cfg"] | {"image_size": 64}}
    (tmp_path / "larger.json").write_text(json.dumps(larger))
    load_clip(str(tmp_path / "larger.json"), str(path))
    assert "visual.positional_embedding interpolated from 5 to 17 positions" in capsys.readouterr().err


def test_weights_of_the_other_text_layout_load(tmp_path):
    """A `CustomTextCLIP` has its text tower under `text.`."""
    path = models.tiny_folder(tmp_path / "m") / "open_clip_model.safetensors"
    (tmp_path / "custom.json").write_text(json.dumps(models.TINY | {"custom_text": True}))
    custom, plain = load_clip(str(tmp_path / "custom.json"), str(path)), load_clip(config_file(tmp_path), str(path))
    tokens = plain.tokenize(["a cat"])
    with torch.no_grad():
        torch.testing.assert_close(custom.towers.eval().encode_text(tokens), plain.towers.eval().encode_text(tokens))


# ---- configs


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        (None, "embed_dims", 24, "has an unknown key embed_dims: remove it; known are embed_dim, "),
        ("vision_cfg", "patchsize", 16, "has an unknown key vision_cfg.patchsize: remove it; known are layers, "),
        ("text_cfg", "context", 16, "has an unknown key text_cfg.context: remove it"),
        ("text_cfg", "width", "16", "text_cfg.width in .* is '16': expected int"),
        (
            "vision_cfg",
            "layers",
            [1, 1],
            r"layers in .* is \[1, 1\]: expected \[int, int, int, int\] or int",
        ),
        ("vision_cfg", "patch_dropout", True, "vision_cfg.patch_dropout in .* is True: expected float"),
        (None, "quick_gelu", "yes", "quick_gelu in .* is 'yes': expected bool"),
        (None, "vision_cfg", 3, "is no model config of open_clip: it needs embed_dim, vision_cfg and text_cfg"),
        ("text_cfg", "heads", 0, "open_clip cannot build the model of .*: correct its values"),
        ("text_cfg", "heads", 3, "open_clip cannot build the model of .*: correct its values"),
        ("text_cfg", "norm_kwargs", {"epsilon": 1}, "open_clip cannot build the model of .*epsilon"),
    ],
)
@pytest.mark.parametrize("door", ["json", "local-dir"])
def test_a_wrong_config_names_its_key(tmp_path, door, section, key, value, message):
    cfg = json.loads(json.dumps(models.TINY))
    (cfg[section] if section else cfg)[key] = value
    if door == "json":
        path = tmp_path / "wrong.json"
        path.write_text(json.dumps(cfg))
        name = str(path)
    else:
        path = models.tiny_folder(tmp_path / "m") / "open_clip_config.json"
        path.write_text(json.dumps({"model_cfg": cfg}))
        name = f"local-dir:{path.parent}"
    with pytest.raises(UserError, match=message) as caught:
        load_clip(name)
    assert str(path) in one_line(caught.value)


@pytest.mark.parametrize("content, message", [("[1, 2]", "holds a list where a dict is expected"), ("{", "is no JSON")])
@pytest.mark.parametrize("door", ["json", "local-dir", "transformers", "classifier"])
def test_a_config_that_is_no_object_is_one_line(tmp_path, door, content, message):
    (tmp_path / "open_clip_config.json").write_text(content)
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "model.safetensors").write_bytes(b"1")
    with pytest.raises(UserError, match=f"config.json. {message}") as caught:
        if door == "classifier":
            load_classifier(f"local-dir:{tmp_path}")
        else:
            load_clip(f"{tmp_path}/open_clip_config.json" if door == "json" else f"{door}:{tmp_path}")
    one_line(caught.value)


# ---- SigLIP 2


def test_naflex_is_refused_and_a_fixed_size_loads(tmp_path):
    tower = models.TOWER | {"num_patches": 4, "patch_size": 16}
    text = models.TOWER | {"vocab_size": 4096, "max_position_embeddings": 12, "projection_size": 32}
    config = transformers.Siglip2Config(text_config=text, vision_config=tower)
    transformers.Siglip2Model(config).save_pretrained(tmp_path / "naflex")
    with pytest.raises(UserError, match="is a NaFlex SigLIP 2, whose images have no fixed size: take one of") as caught:
        load_clip(f"transformers:{tmp_path / 'naflex'}")
    one_line(caught.value)
    assert load_clip(f"transformers:{models.siglip_folder(tmp_path / 'fixed')}").embed_dim == 32  # SigLIP 1's classes
