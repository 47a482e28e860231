"""Model folders and checkpoints that are incomplete or hold other values than the model's load completely or are
refused in one line: tokenizers, text towers, numbers, names, endings."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_clip_models as models
import torch
import transformers
from safetensors.torch import load_file, save_file

from gkl_vl.errors import UserError
from gkl_vl.models.clip import load_clip
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER, check_model_config
from gkl_vl.models.weights import read_state_dict

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 605157884\n"


def refused(message: str, name: str, pretrained: str | None = None) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_clip(name, pretrained, allow_pickle=True)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config(folder: Path, **text_cfg) -> str:
    """A model config with the bundled tokenizer, unless `text_cfg` names another."""
    text = models.TINY["text_cfg"] | {"vocab_size": 4096, "hf_tokenizer_name": str(BUNDLED_TOKENIZER)} | text_cfg
    (folder / "x.json").write_text(json.dumps(models.TINY | {"text_cfg": text}))
    return str(folder / "x.json")


# ---- tokenizers


def damage_tokenizer(folder: Path, how: str) -> None:
    file = folder / "tokenizer.json"
    if how == "missing":
        file.unlink()
    elif how == "no padding":
        edit(folder / "tokenizer_config.json", pad_token=None, tokenizer_class="PreTrainedTokenizerFast")
    elif how == "byte order mark":
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    else:
        file.write_bytes({"pointer": LFS, "empty": b"", "malformed": b'{"model": 3}', "deep": b"[" * 9999}[how])


@pytest.mark.parametrize("door", ["transformers", "open_clip"])
@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "holds no tokenizer.json or vocabulary: fetch it"),
        ("pointer", "tokenizer.json' is a Git LFS pointer"),
        ("empty", "tokenizer.json' is an empty file: fetch it again"),
        ("byte order mark", "tokenizer.json' starts with a byte order mark: `sed"),
        ("malformed", "the tokenizer of .* could not be loaded"),
        ("deep", "the tokenizer of .* could not be loaded"),
        ("no padding", "has no padding token: set pad_token in its tokenizer_config.json"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(tmp_path, door, how, message):
    if door == "transformers":
        folder = models.clip_folder(tmp_path / "m")
        name = f"transformers:{folder}"
    else:
        folder = Path(shutil.copytree(BUNDLED_TOKENIZER, tmp_path / "t"))
        name = config(tmp_path, hf_tokenizer_name=str(folder))
    damage_tokenizer(folder, how)
    refused(message, name)


def test_every_token_has_an_embedding(tmp_path):
    refused(
        r"gives ids up to 4095 \(.*\), but the text tower has 4000 token embeddings", config(tmp_path, vocab_size=4000)
    )
    refused("vocab_size in .* is 4096, CLIP's tokenizer has 49408", config(tmp_path, hf_tokenizer_name=""))
    folder = models.clip_folder(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["aardvark"])
    tokenizer.save_pretrained(folder)
    refused(r"gives ids up to \d+ \('aardvark'\)", f"transformers:{folder}")


# ---- text towers


def text_tower(folder: Path, change) -> str:
    torch.manual_seed(0)
    size: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tower = transformers.RobertaConfig(vocab_size=4096, pad_token_id=1, max_position_embeddings=20, **size)
    transformers.RobertaForMaskedLM(tower).save_pretrained(folder / "t")
    state = load_file(folder / "t" / "model.safetensors")
    change(state)
    save_file(state, folder / "t" / "model.safetensors", metadata={"format": "pt"})
    text = {"hf_model_name": str(folder / "t"), "hf_tokenizer_name": str(BUNDLED_TOKENIZER), "context_length": 8}
    (folder / "x.json").write_text(json.dumps(models.TINY | {"text_cfg": text}))
    return str(folder / "x.json")


QUERY = "roberta.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop(QUERY), "1 missing .encoder.layer.0.attention.self.query.weight"),
        (lambda state: state.update({QUERY.replace("0", "1"): torch.ones(2)}), "1 unexpected .*layer.1"),
        (lambda state: state.update({QUERY: torch.ones(3, 3)}), "1 of another shape .*query.weight has .3, 3."),
        (lambda state: state.update({QUERY: torch.full((16, 16), torch.nan)}), "values that are not finite"),
    ],
)
def test_a_text_tower_whose_weights_do_not_fit_is_refused(tmp_path, change, message):
    refused(message, text_tower(tmp_path, change))


def test_a_text_tower_loads_its_weights_without_the_head(tmp_path, capsys):
    clip = load_clip(text_tower(tmp_path, lambda state: None))
    stored = load_file(tmp_path / "t" / "model.safetensors")
    loaded = clip.towers.model.text.transformer.state_dict()
    assert torch.equal(loaded[QUERY.removeprefix("roberta.")], stored[QUERY])
    assert "tensors outside the text tower left out, such as lm_head." in capsys.readouterr().err


# ---- configs


def test_other_weights_of_a_config_are_refused(tmp_path):
    folder = models.clip_folder(tmp_path / "m")
    torch.save({}, folder / "other.bin")
    edit(folder / "config.json", transformers_weights="other.bin")
    refused("transformers_weights in .*config.json is not supported: remove it", f"transformers:{folder}")


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda text: "\ufeff" + text, "config.json' starts with a byte order mark"),
        (lambda text: '{"a":' * 9999, "config.json' is no JSON"),
        (
            lambda text: text.replace('_attention_heads": 2', '_attention_heads": 3'),
            "is not a multiple",
        ),
        (lambda text: text.replace('"hidden_size": 32', '"hidden_size": "x"'), "holds no config.json of a known"),
    ],
)
def test_a_config_that_transformers_cannot_read_is_one_line(tmp_path, content, message):
    path = models.clip_folder(tmp_path / "m") / "config.json"
    path.write_text(content(path.read_text()))
    refused(message, f"transformers:{path.parent}")


def test_a_missing_shard_is_named(tmp_path):
    folder = models.clip_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    refused("lacks b.safetensors, one of 2 files of model.safetensors.index.json: fetch it", f"transformers:{folder}")


# ---- numbers


@pytest.mark.parametrize("door", ["transformers", "local-dir"])
@pytest.mark.parametrize(
    "values, message",
    [
        (lambda t: t.to(torch.int64), "is of torch.int64, expected floats: take the weights before conversion"),
        (lambda t: t > 0, "is of torch.bool, expected floats"),
        (lambda t: t.to(torch.complex64), "is of torch.complex64, expected floats"),
        (lambda t: t * torch.inf, "values that are not finite: take an earlier checkpoint"),
    ],
)
def test_other_numbers_are_refused(tmp_path, door, values, message):
    folder = (models.clip_folder if door == "transformers" else models.tiny_folder)(tmp_path / "m")
    path = folder / ("model.safetensors" if door == "transformers" else "open_clip_model.safetensors")
    state = load_file(path)
    key = next(key for key in state if key.endswith("bias"))
    save_file(state | {key: values(torch.ones_like(state[key]))}, path, metadata={"format": "pt"})
    refused(f"tensor {key} of .*{message}", f"{door}:{folder}")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of deprecated and slow tensors
@pytest.mark.parametrize("layout", ["sparse", "quantised", "without values"])
def test_a_sparse_or_quantised_tensor_is_refused(tmp_path, layout):
    folder = models.tiny_folder(tmp_path / "m", weights=None)
    state = models.open_clip.CLIP(**models.TINY).state_dict()
    proj = state["text_projection"]
    odd = proj.to_sparse() if layout == "sparse" else proj.to("meta")
    if layout == "quantised":
        odd = torch.quantize_per_tensor(proj, 0.1, 0, torch.qint8)
    torch.save(state | {"text_projection": odd}, folder / "open_clip_pytorch_model.bin")
    refused(f"text_projection of .* is .*{layout}.*: save it as a dense tensor", f"local-dir:{folder}")


# ---- names and endings


def test_two_names_that_become_one_are_refused(tmp_path):
    save_file({"a._orig_mod.b": torch.ones(1), "a.b": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="hold a.b twice, with and without '_orig_mod.': remove one"):
        read_state_dict(tmp_path / "w.safetensors", allow_pickle=False)


@pytest.mark.parametrize(
    "wrapped, message",
    [
        (
            lambda state: {f"module.{key}": value for key, value in state.items()},
            "have the prefix 'module.': save them",
        ),
        (lambda state: {"state_dict": state}, "hold no plain state dict: save the state dict alone"),
    ],
)
def test_wrapped_weights_of_transformers_say_so(tmp_path, wrapped, message):
    folder = models.clip_folder(tmp_path / "m")
    torch.save(wrapped(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(message, f"transformers:{folder}")


@pytest.mark.parametrize("allow_pickle", [True, False])
@pytest.mark.parametrize(
    "save, name, message",
    [
        (torch.save, "w.safetensors", "are a pickle, not safetensors: rename the file to end in .bin"),
        (save_file, "w.bin", "are safetensors: rename the file to end in .safetensors"),
        (save_file, "w", "are safetensors: rename the file to end in .safetensors"),
    ],
)
def test_a_wrong_ending_is_named(tmp_path, save, name, message, allow_pickle):
    save({"a": torch.ones(3)}, tmp_path / name)
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / name, allow_pickle=allow_pickle)


class Module:
    def __reduce__(self):
        import os

        return os.getcwd, ()


def test_a_blocked_module_is_one_line_without_torchs_advice(tmp_path):
    torch.save({"a": Module()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="it holds posix.getcwd, which could run code: save the state dict alone"):
        read_state_dict(tmp_path / "w.pt", allow_pickle=True)


@pytest.mark.parametrize("number", [np.float32(1), np.float16(1), np.int64(1), np.int32(1), np.bool_(True)])
def test_numpys_scalars_beside_weights_are_read(tmp_path, number):
    torch.save({"best": number, "model": {"a": torch.ones(2)}}, tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "w.pt", allow_pickle=True).keys() == {"a"}


# ---- values of configs and processors


@pytest.mark.parametrize(
    "section, values, message",
    [
        (None, {"embed_dim": 0}, "embed_dim in .* is 0: expected at least 1"),
        (None, {"init_logit_scale": float("nan")}, "init_logit_scale in .* is nan: expected a finite number"),
        ("vision_cfg", {"image_size": -32}, "vision_cfg.image_size in .* is -32: expected at least 1"),
        ("vision_cfg", {"layers": 0}, "vision_cfg.layers in .* is 0: expected at least 1"),
        ("vision_cfg", {"patch_size": 64}, "vision_cfg.patch_size in .* is above image_size: correct one"),
        ("vision_cfg", {"patch_size": None}, "open_clip cannot build the model of"),
        ("text_cfg", {"width": 0}, "text_cfg.width in .* is 0: expected at least 1"),
        ("text_cfg", {"mlp_ratio": float("inf")}, "text_cfg.mlp_ratio in .* is inf: expected a finite number"),
    ],
)
def test_a_size_below_one_or_no_number_is_refused(tmp_path, section, values, message):
    cfg = json.loads(json.dumps(models.TINY))
    (cfg[section] if section else cfg).update(values)
    (tmp_path / "x.json").write_text(json.dumps(cfg))
    refused(message, str(tmp_path / "x.json"))


def test_every_config_of_open_clip_passes():
    for name in models.open_clip.list_models():
        check_model_config(models.open_clip.get_model_config(name), name)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_processor_type": "LevitImageProcessor"}, "is a LevitImageProcessor"),
        ({"do_normalize": "false"}, "do_normalize in .* is 'false': write true or false"),
        ({"resample": None}, "resample in .* is None: write 2 .bilinear. or 3 .bicubic."),
        ({"resample": "bicubic"}, "is 'bicubic': write 2|could not be loaded"),
        ({"resample": [3]}, "write 2|could not be loaded"),
        ({"resample": 2.7}, "is 2.7: write 2|could not be loaded"),
        ({"rescale_factor": 0}, "rescale_factor in .* is 0: expected a positive number"),
        ({"rescale_factor": "1"}, "rescale_factor in .* is '1'"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean in .*: expected three numbers"),
        ({"image_std": [0.5, float("inf"), 0.5]}, "image_std in .*: expected three positive numbers"),
    ],
)
def test_a_processor_with_other_values_is_refused(tmp_path, values, message):
    folder = models.clip_folder(tmp_path / "m")
    edit(folder / "preprocessor_config.json", **values)
    refused(message, f"transformers:{folder}")


@pytest.mark.parametrize("name", ["CLIPImageProcessorFast", "ViTImageProcessor", "SiglipImageProcessorPil"])
def test_processors_of_the_same_steps_are_read(tmp_path, name):
    folder = models.clip_folder(tmp_path / "m")
    edit(folder / "preprocessor_config.json", image_processor_type=name)
    assert load_clip(f"transformers:{folder}").image_size == 32


@pytest.mark.parametrize("eos", [None, 7])
def test_the_token_that_pools_a_text_is_the_tokenizers(tmp_path, eos):
    folder = models.clip_folder(tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["eos_token_id"] = eos
    (folder / "config.json").write_text(json.dumps(content))
    refused(f"text_config.eos_token_id in .* is {eos}, its tokenizer's is 409.: correct it", f"transformers:{folder}")


@pytest.mark.parametrize("eos", [None, 2, 7])
def test_open_clips_token_that_pools_a_text_is_the_tokenizers(tmp_path, eos):
    refused(f"text_cfg.eos_id in .* is {eos}, its tokenizer's is 4095", config(tmp_path, pool_type="eos", eos_id=eos))
    assert load_clip(config(tmp_path, pool_type="eos", eos_id=4095)).embed_dim == 24


@pytest.mark.parametrize("positions", [1, 4, 6])
def test_position_embeddings_of_no_square_are_refused(tmp_path, positions):
    folder = models.tiny_folder(tmp_path / "m")
    path = folder / "open_clip_model.safetensors"
    save_file(load_file(path) | {"visual.positional_embedding": torch.zeros(positions, 32)}, path)
    refused(rf"1 of another shape .visual.positional_embedding has .{positions}, 32.", f"local-dir:{folder}")


def test_a_folder_as_pretrained_says_how_to_load_it(tmp_path):
    refused("is a folder: name the file in it, or load local-dir:", "ViT-B-32", str(tmp_path))


def test_text_positions_without_rows_are_refused(tmp_path):
    folder = models.tiny_folder(tmp_path / "m")
    path = folder / "open_clip_model.safetensors"
    save_file(load_file(path) | {"positional_embedding": torch.zeros(0, 16)}, path)
    refused(r"1 of another shape .positional_embedding has .0, 16.", f"local-dir:{folder}")


def test_a_damaged_npz_is_refused_without_numpys_advice(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"hello" * 20)
    refused("w.npz' cannot be read: the file is cut off or damaged: download it again", "ViT-S-32", f"{tmp_path}/w.npz")
