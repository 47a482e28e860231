"""A model whose config, weights, tokenizer and folder contradict each other is refused in one line when it is loaded,
and one of which all say the same is not: dimension, context, vocabulary, logit bias, activation, normalisation, size.
"""

import copy
import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import test_clip_models as models
import torch
import transformers
from safetensors.torch import load_file, save_file

from gkl_vl.assets.build_tokenizer import build
from gkl_vl.errors import UserError
from gkl_vl.models.agreement import check_widths, explain_sizes
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.open_clip_weights import refuse_default
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER, build_open_clip

TINY = models.TINY
HALF = [0.5, 0.5, 0.5]
TIMM = {"timm_model_name": "test_vit", "timm_proj": "linear", "timm_pool": "avg", "image_size": 160}
pytestmark = pytest.mark.usefixtures("one_thread")


def refused(line: str, name: str, pretrained: str | None = None) -> None:
    """The whole line that `load_clip` raises is `line`."""
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        load_clip(name, pretrained, allow_pickle=True)


def embeds(clip: Clip) -> bool:
    """Whether texts that fill the context and an image get embeddings of one length."""
    with torch.no_grad():
        text = clip.towers.eval().encode_text(clip.tokenize(["a cat and a dog " * 50, "Flag: São Tomé 1234"]))
        image = clip.towers.encode_image(torch.zeros(1, 3, clip.image_size, clip.image_size))
    return text.shape[1] == image.shape[1] == clip.embed_dim


def edit(path: Path, section: str, **values) -> None:
    """Sets values in a section such as `model_cfg.text_cfg` of a JSON file; the top has an empty name."""
    content = json.loads(path.read_text())
    part = content
    for key in filter(None, section.split(".")):
        part = part[key]
    part.update(values)
    path.write_text(json.dumps(content))


@pytest.fixture
def open_clip_folder(tmp_path) -> Path:
    return models.tiny_folder(tmp_path / "m")


def config_of(folder: Path) -> Path:
    return folder / "open_clip_config.json"


def weights_of(folder: Path) -> Path:
    return folder / "open_clip_model.safetensors"


def json_config(folder: Path, cfg: dict) -> str:
    (folder / "x.json").write_text(json.dumps(cfg))
    return str(folder / "x.json")


def changed(**text_cfg) -> dict:
    return TINY | {"text_cfg": TINY["text_cfg"] | text_cfg}


# ---- sizes of the embedding and the text tower

PROJECTIONS = "2 of another shape (text_projection has [16, 24], not [16, 20], visual.proj has [32, 24], not [32, 20])"
POSITIONS = "1 of another shape (positional_embedding has [8, 16], not [6, 16])"
TOKENS = "1 of another shape (token_embedding.weight has [49408, 16], not [50000, 16])"


@pytest.mark.parametrize(
    "section, key, value, misfit, right",
    [
        ("", "embed_dim", 20, PROJECTIONS, 24),
        ("text_cfg.", "context_length", 6, POSITIONS, 8),
        ("text_cfg.", "vocab_size", 50000, TOKENS, 49408),
    ],
)
def test_a_folder_whose_config_has_another_size_says_which(open_clip_folder, section, key, value, misfit, right):
    config, name = config_of(open_clip_folder), f"local-dir:{open_clip_folder}"
    edit(config, f"model_cfg.{section}", **{key: value})
    remedy = f"set {section}{key} to {right} in {config}"
    refused(f"weights {str(weights_of(open_clip_folder))!r} do not fit {name!r}: {misfit}: {remedy}", name)
    edit(config, f"model_cfg.{section}", **{key: right})
    assert embeds(load_clip(name))


@pytest.mark.parametrize("custom_text", [True, False])
def test_a_model_config_of_other_sizes_than_a_file_says_all_of_them(open_clip_folder, tmp_path, custom_text):
    cfg = changed(context_length=12) | {"embed_dim": 20, "custom_text": custom_text}
    name, prefix = json_config(tmp_path, cfg), "text." if custom_text else ""
    with pytest.raises(UserError, match=rf"3 of another shape .*{prefix}positional_embedding has .8, 16.") as caught:
        load_clip(name, str(weights_of(open_clip_folder)))
    assert str(caught.value).endswith(f": set embed_dim to 24, set text_cfg.context_length to 8 in {name}")
    json_config(tmp_path, changed(context_length=8) | {"embed_dim": 24, "custom_text": custom_text})
    assert embeds(load_clip(name, str(weights_of(open_clip_folder))))


def test_a_named_architecture_is_not_to_be_changed(open_clip_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY | {"embed_dim": 20})
    weights = weights_of(open_clip_folder).rename(tmp_path / "w.safetensors")
    line = f"{PROJECTIONS}: set embed_dim to 24 in a JSON model config of its own"
    refused(f"weights {str(weights)!r} do not fit 'tiny': {line}", "tiny", str(weights))


def test_weights_of_another_width_get_no_such_remedy(open_clip_folder):
    edit(config_of(open_clip_folder), "model_cfg.text_cfg", width=20, context_length=6)
    with pytest.raises(UserError, match="positional_embedding has .8, 16., not .6, 20.*: take those of this model$"):
        load_clip(f"local-dir:{open_clip_folder}")


@pytest.mark.parametrize(
    "shapes, expected",
    [
        ({"a": ([16, 24], [16, 20]), "b": ([24], [20])}, {"dim": (24, 20)}),
        ({"a": ([16, 20], [16, 20]), "c": ([3, 4], [3, 4])}, {}),
        ({"a": ([16, 24], [16, 20]), "c": ([24, 3], [20, 4])}, None),  # two axes
        ({"a": ([16, 24], [16, 20]), "c": ([25], [20])}, None),
        ({"a": ([16, 24], [16, 20]), "p": ([22, 5], [20, 5])}, None),  # which one?
        ({"a": ([16, 0], [16, 20])}, None),
        ({"a": ([16, 24], [16, 20]), "c": ([24, 1], [20])}, None),
        ({"c": ([24], [20])}, None),
    ],
)
def test_sizes_that_do_not_explain_all_misfits_are_no_remedy(shapes, expected):
    assert explain_sizes(shapes, {"dim": {"a": 1, "p": 0}}) == expected


@pytest.mark.parametrize(
    "section, key, value, misfit, right",
    [
        ("", "projection_dim", 20, "text_projection.weight has [24, 32], not [20, 32]", 24),
        ("text_config.", "max_position_embeddings", 16, "position_embedding.weight has [12, 32], not [16, 32]", 12),
        ("text_config.", "vocab_size", 5000, "token_embedding.weight has [4096, 32], not [5000, 32]", 4096),
    ],
)
def test_a_transformers_config_of_another_size_says_which(tmp_path, section, key, value, misfit, right):
    config = models.clip_folder(tmp_path / "m") / "config.json"
    edit(config, section, **{key: value})
    with pytest.raises(UserError) as caught:
        load_clip(f"transformers:{config.parent}")
    assert misfit in str(caught.value) and str(caught.value).endswith(f": set {section}{key} to {right} in {config}")
    edit(config, section, **{key: right})
    assert embeds(load_clip(f"transformers:{config.parent}"))


def test_siglips_towers_have_one_dimension(tmp_path):
    folder = models.siglip_folder(tmp_path / "m")
    edit(folder / "config.json", "text_config", projection_size=20)
    state = load_file(folder / "model.safetensors")
    heads = {key: state[key][:20].clone() for key in ("text_model.head.weight", "text_model.head.bias")}
    save_file(state | heads, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        f"text_config.projection_size in {folder / 'config.json'} is 20, vision_config.hidden_size is 32: image and "
        "text need embeddings of one length: take a model that has them",
        f"transformers:{folder}",
    )


@pytest.mark.parametrize("key, width", [("text_cfg.proj_type", 16), ("vision_cfg.timm_proj", 64)])
def test_a_tower_without_projection_has_the_embeddings_width(tmp_path, key, width):
    cfg = changed(proj_type="none") if width == 16 else TINY | {"vision_cfg": TIMM | {"timm_proj": "none"}}
    name = json_config(tmp_path, cfg)
    refused(
        f"embed_dim in {name} is 24, but its tower without projection ({key} 'none') has a width of {width}: "
        f"set embed_dim to {width}, or {key} to 'linear'",
        name,
    )
    json_config(tmp_path, cfg | {"embed_dim": width})
    assert embeds(load_clip(name))


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-SO400M-16-SigLIP-i18n-256"])
def test_open_clips_towers_without_projection_pass(name):
    cfg = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = build_open_clip(cfg, name, pretrained_text=False, allow_pickle=False)
    check_widths(model, cfg, name)


@pytest.mark.parametrize("config", [transformers.RobertaConfig, transformers.BertConfig])
def test_a_text_tower_of_transformers_holds_the_context(tmp_path, config):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tower = config(vocab_size=4096, pad_token_id=1, max_position_embeddings=20, **size)
    transformers.AutoModel.from_config(tower).save_pretrained(tmp_path / "t")
    longest = 18 if config is transformers.RobertaConfig else 20
    text = {"hf_model_name": str(tmp_path / "t"), "hf_tokenizer_name": str(BUNDLED_TOKENIZER)}
    name = json_config(tmp_path, TINY | {"text_cfg": text | {"context_length": longest + 1}})
    refused(
        f"text_cfg.context_length in {name} is {longest + 1}, but hf_model_name {str(tmp_path / 't')!r} takes up to "
        f"{longest} tokens: set it to {longest}",
        name,
    )
    json_config(tmp_path, TINY | {"text_cfg": text | {"context_length": longest}})
    assert embeds(load_clip(name))


@pytest.mark.parametrize("length", [5, 10**30])
def test_a_tokenizers_own_length_is_not_used(tmp_path, length):
    """Tokenizers of correct models have any: texts are padded and cut to the model's context."""
    folder = models.clip_folder(tmp_path / "m")
    edit(folder / "tokenizer_config.json", "", model_max_length=length)
    assert load_clip(f"transformers:{folder}").tokenize(["a cat " * 40]).shape == (1, 12)


# ---- tokenizers


def test_far_fewer_tokens_than_embeddings_is_another_tokenizer(open_clip_folder, tmp_path):
    cfg = changed(hf_tokenizer_name=str(BUNDLED_TOKENIZER))
    name = json_config(tmp_path, cfg)
    line = "gives ids up to 4095 ('<|endoftext|>'), but the text tower has 49408 token embeddings: take the tokenizer "
    refused(f"the tokenizer of {name!r} {line}that it was trained with", name, str(weights_of(open_clip_folder)))
    assert embeds(load_clip(name))  # without weights it only wastes memory


@pytest.mark.parametrize("rows, fits", [(4096, True), (8192, True), (8193, False), (4095, False)])
def test_rows_rounded_up_are_no_other_tokenizer(tmp_path, rows, fits):
    cfg = changed(hf_tokenizer_name=str(BUNDLED_TOKENIZER), vocab_size=rows)
    save_file(open_clip.CLIP(**copy.deepcopy(cfg)).state_dict(), tmp_path / "w.safetensors")
    name = json_config(tmp_path, cfg)
    if fits:
        assert embeds(load_clip(name, str(tmp_path / "w.safetensors")))
    else:
        with pytest.raises(UserError, match=f"but the text tower has {rows} token embeddings: take the tokenizer that"):
            load_clip(name, str(tmp_path / "w.safetensors"))


def test_weights_of_far_more_rows_than_clips_tokenizer_need_another(tmp_path):
    cfg = changed(vocab_size=100_000)
    save_file(open_clip.CLIP(**copy.deepcopy(cfg)).state_dict(), tmp_path / "w.safetensors")
    name = json_config(tmp_path, cfg)
    line = f"text_cfg.vocab_size in {name} is 100000, CLIP's tokenizer has 49408 tokens: correct it, or name the "
    refused(f"{line}model's tokenizer as hf_tokenizer_name", name, str(tmp_path / "w.safetensors"))
    assert embeds(load_clip(name))


def test_a_tokenizer_in_a_folder_whose_config_names_none_is_clips(open_clip_folder):
    name, config = f"local-dir:{open_clip_folder}", config_of(open_clip_folder)
    build().save_pretrained(open_clip_folder)
    refused(
        f"{config} has no text_cfg.hf_tokenizer_name, which stands for CLIP's tokenizer, but tokenizer.json beside it "
        "is another one, of 4096 tokens: set hf_tokenizer_name, or remove tokenizer.json",
        name,
    )
    tokenizer = open_clip_folder / "tokenizer.json"
    unigram = {"model": {"vocab": [["<unk>", 0.0], ["cat", -1.0]]}, "added_tokens": []}
    tokenizer.write_text(json.dumps(unigram))
    with pytest.raises(UserError, match="beside it is another one, of 2 tokens"):
        load_clip(name)
    encoder = open_clip.SimpleTokenizer().encoder
    exported = {token: number for token, number in encoder.items() if number < 49406} | {"<a>": 49406, "<b>": 49407}
    for same in (encoder, exported, {}, 3):
        tokenizer.write_text(json.dumps({"model": {"vocab": same}}))
        assert load_clip(name).embed_dim == 24


# ---- logit bias


def test_a_logit_bias_that_the_config_lacks_is_named(open_clip_folder):
    name, config, weights = f"local-dir:{open_clip_folder}", config_of(open_clip_folder), weights_of(open_clip_folder)
    save_file(load_file(weights) | {"logit_bias": torch.tensor(-7.0)}, weights)
    remedy = f"set init_logit_bias to -10 (the weights replace it) in {config}"
    refused(f"weights {str(weights)!r} do not fit {name!r}: 1 unexpected (logit_bias): {remedy}", name)
    edit(config, "model_cfg", init_logit_bias=-10)
    assert load_clip(name).towers.bias().item() == -7


@pytest.mark.parametrize("door", ["local-dir", "json"])
def test_a_logit_bias_that_the_weights_lack_is_not_zero(open_clip_folder, tmp_path, door):
    config, weights = config_of(open_clip_folder), weights_of(open_clip_folder)
    edit(config, "model_cfg", init_logit_bias=-10)
    config = config.rename(tmp_path / "x.json") if door == "json" else config
    name, pretrained = (str(config), str(weights)) if door == "json" else (f"local-dir:{open_clip_folder}", None)
    line = f"1 missing (logit_bias): remove init_logit_bias in {config}"
    refused(f"weights {str(weights)!r} do not fit {name!r}: {line}", name, pretrained)
    edit(config, "model_cfg", init_logit_bias=None)
    assert load_clip(name, pretrained).towers.bias() is None


def test_a_siglip_of_transformers_without_its_bias_is_refused(tmp_path):
    path = models.siglip_folder(tmp_path / "m") / "model.safetensors"
    name, state = f"transformers:{path.parent}", load_file(path)
    assert load_clip(name).towers.bias() is not None
    save_file({key: tensor for key, tensor in state.items() if key != "logit_bias"}, path, metadata={"format": "pt"})
    refused(f"weights {str(path)!r} do not fit {name!r}: 1 missing (logit_bias): take those of this model", name)


def test_siglips_npz_needs_a_bias(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    name, weights = json_config(tmp_path, TINY), str(tmp_path / "w.npz")
    remedy = f"set init_logit_bias to -10 (the weights replace it) in {name}"
    refused(f"weights {weights!r} are SigLIP's, whose logit_bias {name!r} lacks: {remedy}", name, weights)
    json_config(tmp_path, TINY | {"init_logit_bias": -10})
    with pytest.raises(UserError, match="only SigLIP's .npz are read"):  # its own arrays are looked at next
        load_clip(name, weights)


# ---- both formats in one folder


def add_transformers(folder: Path, *, act: str | None = "gelu", **processor) -> None:
    """The configs of transformers' format of `tiny_folder`; no `act` is the default, QuickGELU."""
    towers = {"hidden_act": act} if act is not None else {}
    content = {"model_type": "clip", "text_config": towers, "vision_config": towers | {"image_size": 32}}
    (folder / "config.json").write_text(json.dumps(content))
    sizes = {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2}
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    transformers.CLIPImageProcessor(**(sizes | numbers | processor)).save_pretrained(folder)


REMEDY = "correct the wrong one, of a Hub repository in a local copy"


@pytest.mark.parametrize(
    "act, shown, quick_gelu",
    [("quick_gelu", "quick_gelu", False), (None, "quick_gelu", False), ("gelu", "gelu", True)],
)
def test_both_formats_have_one_activation(open_clip_folder, act, shown, quick_gelu):
    config, name = config_of(open_clip_folder), f"local-dir:{open_clip_folder}"
    add_transformers(open_clip_folder, act=act)
    edit(config, "model_cfg", quick_gelu=quick_gelu)
    theirs = f"text_config.hidden_act in config.json beside it is {shown!r}"
    refused(f"model_cfg.quick_gelu in {config} is {str(quick_gelu).lower()}, {theirs}: {REMEDY}", name)
    edit(config, "model_cfg", quick_gelu=not quick_gelu)
    assert embeds(load_clip(name))


@pytest.mark.parametrize(
    "content",
    [
        {"architecture": "vit_base_patch16_siglip_224"},  # timm's, of the image tower
        {"model_type": "siglip", "text_config": {"hidden_act": "quick_gelu"}},
        {"model_type": "clip", "text_config": None},
    ],
)
def test_a_config_beside_that_tells_no_activation_is_not_compared(open_clip_folder, content):
    (open_clip_folder / "config.json").write_text(json.dumps(content))
    assert embeds(load_clip(f"local-dir:{open_clip_folder}"))


def test_timms_tower_has_its_own_activation(open_clip_folder, tmp_path):
    cfg = TINY | {"vision_cfg": TIMM}
    save_file(load_clip(json_config(tmp_path, cfg)).towers.model.state_dict(), weights_of(open_clip_folder))
    edit(config_of(open_clip_folder), "", model_cfg=cfg)
    add_transformers(open_clip_folder, act="quick_gelu")
    assert load_clip(f"local-dir:{open_clip_folder}").image_size == 160


OURS, THEIRS = "mean 0.1 0.2 0.3, std 0.5 0.6 0.7", "mean 0.5 0.5 0.5, std 0.5 0.6 0.7"
DEFAULT = "mean 0.4815 0.4578 0.4082, std 0.2686 0.2613 0.2758 (the default, as preprocess_cfg lacks one)"


@pytest.mark.parametrize("door", ["local-dir", "transformers"])
def test_both_formats_have_one_normalisation(tmp_path, door):
    folder = models.clip_folder(tmp_path / "m") if door == "transformers" else models.tiny_folder(tmp_path / "m")
    name, config = f"{door}:{folder}", config_of(folder)
    if door == "transformers":
        preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
        config.write_text(json.dumps({"model_cfg": TINY | {"quick_gelu": True}, "preprocess_cfg": preprocess}))
        edit(folder / "preprocessor_config.json", "", image_mean=HALF, image_std=[0.5, 0.6, 0.7])
    else:
        add_transformers(folder, image_mean=HALF)
    refused(f"{config} has {OURS}, preprocessor_config.json beside it {THEIRS}: {REMEDY}", name)
    edit(config, "", preprocess_cfg=None)
    refused(f"{config} has {DEFAULT}, preprocessor_config.json beside it {THEIRS}: {REMEDY}", name)
    edit(config, "", preprocess_cfg={"mean": HALF, "std": [0.5, 0.6, 0.7]})
    assert embeds(load_clip(name))


@pytest.mark.parametrize(
    "fields, compared",
    [
        ({"image_mean": [0.1004, 0.2, 0.3]}, False),
        ({"image_mean": 0.5}, True),
        ({"do_normalize": False}, True),
        ({"image_mean": HALF, "do_rescale": False}, False),
        ({"image_mean": HALF, "rescale_factor": 1.0}, False),
        ({"image_mean": "half"}, False),
    ],
)
def test_only_a_processors_plain_numbers_are_compared(open_clip_folder, fields, compared):
    add_transformers(open_clip_folder)
    edit(open_clip_folder / "preprocessor_config.json", "", **fields)
    if compared:
        with pytest.raises(UserError, match=f"has {OURS}, preprocessor_config.json beside it mean 0"):
            load_clip(f"local-dir:{open_clip_folder}")
    else:
        assert embeds(load_clip(f"local-dir:{open_clip_folder}"))


# ---- activation


@pytest.mark.parametrize("text, vision", [("gelu", "quick_gelu"), ("quick_gelu", "gelu")])
def test_both_towers_of_transformers_have_one_activation(tmp_path, text, vision):
    folder = models.clip_folder(tmp_path / "m")
    config = folder / "config.json"
    edit(config, "text_config", hidden_act=text)
    edit(config, "vision_config", hidden_act=vision)
    line = f"text_config.hidden_act in {config} is {text!r}, vision_config.hidden_act is {vision!r} (quick_gelu where "
    refused(f"{line}there is none): give both the one of the training", f"transformers:{folder}")
    edit(config, "text_config", hidden_act=vision)
    assert embeds(load_clip(f"transformers:{folder}"))


QUICK, PLAIN = (f"{OURS}, bilinear, squash, {act}" for act in ("QuickGELU", "GELU"))
HALVES = "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bicubic, shortest, GELU"


def test_a_named_activation_is_that_of_the_config_beside(open_clip_folder, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", TINY | {"quick_gelu": True})
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    weights, config = weights_of(open_clip_folder), config_of(open_clip_folder)
    edit(config, "model_cfg", quick_gelu=False)
    line = f"{weights} has {PLAIN} ({config}), but tiny-quickgelu says {QUICK}: take the name without -quickgelu"
    refused(line, "tiny-quickgelu", str(weights))
    assert not load_clip("tiny", str(weights)).model_cfg.get("quick_gelu")
    edit(config, "model_cfg", quick_gelu=True)
    assert load_clip("tiny-quickgelu", str(weights)).model_cfg["quick_gelu"] is True


def test_a_model_config_does_not_contradict_the_config_beside(open_clip_folder, tmp_path):
    weights, config = weights_of(open_clip_folder), config_of(open_clip_folder)
    edit(config, "model_cfg", quick_gelu=True)
    name = json_config(tmp_path, TINY | {"quick_gelu": False})
    line = f"{weights} has {QUICK} ({config}), but {name} says "
    refused(f"{line}{PLAIN}: correct {name}", name, str(weights))
    own = {"model_cfg": TINY | {"quick_gelu": True}, "preprocess_cfg": {"mean": HALF, "std": HALF}}
    json_config(tmp_path, own)
    refused(f"{line}{HALVES.replace('GELU', 'QuickGELU')}: correct {name}", name, str(weights))
    own["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    json_config(tmp_path, own)
    assert load_clip(name, str(weights)).model_cfg["quick_gelu"] is True
    config.write_text("{")  # it tells nothing
    assert embeds(load_clip(name, str(weights)))


def test_a_tag_does_not_contradict_the_config_beside(open_clip_folder, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    tags = {"half": {"mean": HALF, "std": HALF}, "quick": {"quick_gelu": True, "mean": HALF, "std": HALF}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    weights, config = weights_of(open_clip_folder), config_of(open_clip_folder)
    remedy = f"write {weights} without the tag"
    refused(f"{weights} has {PLAIN} ({config}), but tag half says {HALVES}: {remedy}", "tiny", f"half={weights}")
    assert load_clip("tiny", str(weights)).preprocess.mean == (0.1, 0.2, 0.3)
    edit(config, "", preprocess_cfg={})  # open_clip's default is no statement
    assert load_clip("tiny", f"half={weights}").preprocess.mean == tuple(HALF)
    assert load_clip("tiny", f"quick={weights}").model_cfg["quick_gelu"] is True  # nor is a missing quick_gelu
    edit(config, "model_cfg", quick_gelu=False)
    with pytest.raises(UserError, match=f"says {HALVES.replace('GELU', 'QuickGELU')}: {remedy}"):
        load_clip("tiny", f"quick={weights}")


# ---- mean, std and size


def test_the_default_does_not_replace_what_an_architecture_was_trained_with():
    """The tags of SigLIP all normalise by a half; those of ViT-B-32 with the default, most of them."""
    siglip = open_clip.get_model_config("ViT-B-16-SigLIP")
    line = "x.json has no preprocess_cfg with mean and std, and its architecture, ViT-B-16-SigLIP, was not trained "
    line += 'with the default: add those of the training, as "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]'
    for preprocess in ({}, {"mean": tuple(HALF)}):
        with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
            refuse_default(preprocess, siglip, "x.json")
    refuse_default({"mean": tuple(HALF), "std": tuple(HALF)}, siglip, "x.json")
    for name in ("ViT-B-32", "ViT-L-14", "RN50", "ViT-H-14-378", "ViT-S-32"):
        refuse_default({}, open_clip.get_model_config(name), "x.json")
    refuse_default({}, TINY, "x.json")


@pytest.fixture
def half_only(monkeypatch) -> None:
    """Registers `TINY` as an architecture whose one tag normalises by a half."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"half": {"mean": HALF, "std": HALF}})


@pytest.mark.parametrize("door", ["local-dir", "json"])
def test_a_config_without_normalisation_is_refused_where_it_is_known(open_clip_folder, tmp_path, half_only, door):
    config, name, pretrained = config_of(open_clip_folder), f"local-dir:{open_clip_folder}", None
    edit(config, "", preprocess_cfg=None)
    if door == "json":
        pretrained = str(weights_of(open_clip_folder).rename(tmp_path / "w.safetensors"))
        name = json_config(tmp_path, TINY)
        assert embeds(load_clip(name))  # without weights the default is as good as any
        config = Path(name)
    with pytest.raises(UserError, match=f"^{re.escape(str(config))} has no preprocess_cfg with mean and std, and its"):
        load_clip(name, pretrained)
    config.write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {"mean": HALF, "std": HALF}}))
    assert load_clip(name, pretrained).preprocess.mean == tuple(HALF)


@pytest.mark.parametrize("door, size", [("local-dir", [32, 64]), ("local-dir", 64), ("json", 64), ("beside", 64)])
def test_both_sizes_of_a_config_agree(open_clip_folder, tmp_path, door, size):
    config = config_of(open_clip_folder)
    pretrained = None if door == "local-dir" else str(weights_of(open_clip_folder))
    names = {"local-dir": f"local-dir:{open_clip_folder}", "json": str(config), "beside": json_config(tmp_path, TINY)}
    name = names[door]
    edit(config, "preprocess_cfg", size=size)
    line = f"preprocess_cfg.size in {config} is {size}, vision_cfg.image_size is 32: give both the size of the training"
    refused(line, name, pretrained)
    for same in (None, [32, 32]):
        edit(config, "preprocess_cfg", size=same)
        assert load_clip(name, pretrained).image_size == 32
