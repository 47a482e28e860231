"""Transformers' format: of an open_clip CLIP as a `CLIPModel`, if transformers can compute the same function, and of
models that are of transformers themselves.

Axis letters: d = embedding.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModel, CLIPConfig, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from gkl_vl.errors import UserError, notice
from gkl_vl.export.text_cleaning import cleaning, save_tokenizer, with_cleaning
from gkl_vl.models.clip import Clip, cleaning_of
from gkl_vl.models.preprocessing import has_image_processor, to_image_processor
from gkl_vl.models.towers import TransformersTowers

# Fields of open_clip's configs with an equivalent in transformers. All other fields must have their defaults.
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
_VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
_TEXT_KEYS = {
    "context_length", "vocab_size", "hf_tokenizer_name", "width", "heads", "layers", "mlp_ratio",
    "pad_id", "eos_id", "pool_type", "tokenizer_kwargs",
}  # fmt: skip

# open_clip's split into words, of texts in lower case and beside special tokens
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# (regex, replacement) from open_clip's parameter names to transformers', applied in this order. The names outside
# `visual` are the text tower's; `rename_tensors` removes the prefix `text.` of `CustomTextCLIP` first.
_RENAMES = [
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # sic, in transformers
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
]


def fits_transformers(clip: Clip) -> bool:
    """Whether transformers' `CLIPModel` computes the same function.

    True for two plain pre-norm transformers with a class token, a causal text tower pooled at its end-of-text token,
    linear projections without bias, and no logit bias.
    """
    cfg = clip.model_cfg
    if cfg is None or not set(cfg) <= _MODEL_KEYS or not has_image_processor(clip.preprocess):
        return False
    vision, text = CLIPVisionCfg(**cfg["vision_cfg"]), CLIPTextCfg(**cfg["text_cfg"])
    plain = _is_default(vision, CLIPVisionCfg(), except_for=_VISION_KEYS)
    plain = plain and _is_default(text, CLIPTextCfg(), except_for=_TEXT_KEYS)
    # The cleaning is exported with the tokenizer; its other settings have no equivalent.
    kwargs = text.tokenizer_kwargs or {}
    plain = plain and set(kwargs) <= {"clean"}
    # transformers' BPE of CLIP is of lower case.
    plain = plain and not (clip.hf_tokenizer is None and kwargs.get("clean") == "whitespace")
    sizes = [vision.layers, vision.patch_size, vision.image_size]
    return plain and all(isinstance(size, int) for size in sizes) and _eos_id(clip, text) is not None


def write_transformers(*, clip: Clip, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `config.json`, `model.safetensors`, `preprocessor_config.json` and the tokenizer into `folder`.

    `tensors` is open_clip's state dict in the precision to be stored; `fits_transformers(clip)` must be true.
    `CLIPModel.from_pretrained(folder)` then computes the same embeddings, before the L2 normalisation.
    """
    renamed = rename_tensors(tensors)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    _config(clip, dtype=renamed["logit_scale"].dtype).save_pretrained(folder)
    to_image_processor(clip.preprocess).save_pretrained(folder)
    save_tokenizer(exported_tokenizer(clip), folder)


def write_own_format(*, clip: Clip, folder: Path, tensors: dict[str, Tensor]) -> str:
    """Writes the files of `write_transformers` for a model that is of transformers itself.

    `AutoModel.from_pretrained(folder)` then computes the same embeddings, before the L2 normalisation. With a tokenizer
    in Python alone, such as sentencepiece's, a notice says that `AutoTokenizer` does not clean texts as in training.

    Args:
        tensors: the model's state dict in the precision to be stored.

    Returns:
        The model's class, CLIPModel or SiglipModel.

    Raises:
        UserError: preprocessing that no image processor has.
    """
    if not has_image_processor(clip.preprocess):
        raise UserError(
            f"the preprocessing of {clip.name!r} has resize_mode {clip.preprocess.resize_mode!r}, which no image "
            "processor of transformers has: use shortest or squash"
        )
    assert isinstance(clip.towers, TransformersTowers)
    config = copy.deepcopy(clip.towers.model.config)  # written to by `from_config` and `save_pretrained`
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=tensors["logit_scale"].dtype)
    # A scale without axes has one under FSDP.
    shaped = {name: tensors[name].reshape(built.shape) for name, built in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=shaped)
    to_image_processor(clip.preprocess).save_pretrained(folder)
    tokenizer = exported_tokenizer(clip)
    save_tokenizer(tokenizer, folder)
    if not tokenizer.is_fast:
        notice(
            f"the tokenizer of {clip.name!r} has no tokenizer.json, which could clean texts as in training (HTML "
            "entities, curly quotes): load_clip does, AutoTokenizer alone does not"
        )
    return type(model).__name__


def rename_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts open_clip's state dict of a plain CLIP to transformers' parameter names.

    Splits the joint q, k, v projections and transposes the output projections: `x @ P` in open_clip, `nn.Linear` in
    transformers.
    """
    renamed = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("text.") if key.startswith("text.") else key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = part.clone()
        elif name in ("visual_projection.weight", "text_projection.weight"):
            renamed[name] = tensor.T.contiguous()
        else:
            renamed[name] = tensor.reshape(()) if name == "logit_scale" else tensor
    return renamed


def _is_default(cfg: Any, default: Any, *, except_for: set[str]) -> bool:
    values, defaults = asdict(cfg), asdict(default)
    # Absent and empty mean the same to open_clip (`act_kwargs: {}`, `timm_model_name: ""`).
    return all((values[key] or None) == (defaults[key] or None) for key in defaults if key not in except_for)


def _eos_id(clip: Clip, text: CLIPTextCfg) -> int | None:
    """Id of the token at which the text is pooled; None if transformers would pool another token."""
    if clip.hf_tokenizer is None:
        eos = highest = open_clip.SimpleTokenizer().eot_token_id
    else:
        eos, highest = clip.hf_tokenizer.eos_token_id, max(clip.hf_tokenizer.get_vocab().values())
    pooled_at = {"argmax": highest, "eos": text.eos_id}.get(text.pool_type)
    # transformers takes an eos id of 2 for an old config and pools the highest token id.
    return eos if eos == pooled_at and eos != 2 else None


def _config(clip: Clip, dtype: torch.dtype) -> CLIPConfig:
    cfg = clip.model_cfg
    assert cfg is not None
    vision, text = CLIPVisionCfg(**cfg["vision_cfg"]), CLIPTextCfg(**cfg["text_cfg"])
    assert isinstance(vision.layers, int)
    tokenizer: Any = clip.hf_tokenizer or _clip_bpe()
    shared = {
        "projection_dim": cfg["embed_dim"],
        "hidden_act": "quick_gelu" if cfg.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,  # torch's default, which open_clip uses
    }
    text_config = CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=int(text.width * text.mlp_ratio),
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=int(vision.width * vision.mlp_ratio),
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.width // vision.head_width,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        **shared,
    )
    return CLIPConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=cfg["embed_dim"],
        architectures=["CLIPModel"],
        dtype=dtype,
    )


def exported_tokenizer(clip: Clip) -> Any:
    """The model's tokenizer, or CLIP's BPE, for transformers: with open_clip's cleaning and the context length.

    A tokenizer in Python alone, without a `tokenizers` backend, has no cleaning.
    """
    if isinstance(clip.towers, TransformersTowers):
        config = clip.towers.model.config
        tokenizer = _cleaned(clip.hf_tokenizer, cleaning_of(config))
        if config.model_type == "siglip":  # trained with padding as text: a mask would change the embeddings
            _set_saved(tokenizer, "model_input_names", ["input_ids"])
        tokenizer.model_max_length = config.text_config.max_position_embeddings
        return tokenizer
    assert clip.model_cfg is not None
    text_cfg = clip.model_cfg["text_cfg"]
    kwargs = text_cfg.get("tokenizer_kwargs") or {}
    if clip.hf_tokenizer is not None:
        tokenizer = _cleaned(clip.hf_tokenizer, kwargs.get("clean", "whitespace"))
    else:
        tokenizer = _cleaned(_clip_bpe(), kwargs.get("clean", "lower"))
    tokenizer.model_max_length = CLIPTextCfg(**text_cfg).context_length
    return tokenizer


def _cleaned(tokenizer: Any, clean: str) -> Any:
    """A copy of a transformers tokenizer for saving, `with_cleaning`, which finds no token that the cleaning removes.

    Added tokens are found in a text before all steps, for example Gemma's `<b>` and its double line break.
    """
    cleaned = with_cleaning(tokenizer, clean) if tokenizer.is_fast else copy.deepcopy(tokenizer)
    for attribute in ("padding_side", "truncation_side"):  # of a class, which is not stored
        _set_saved(cleaned, attribute, getattr(tokenizer, attribute))
    if not tokenizer.is_fast:
        return cleaned
    steps = normalizers.Sequence(cleaning(clean))
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    content = json.loads(cleaned.backend_tokenizer.to_str())
    added = content["added_tokens"]
    lasting = {token["content"] for token in added if steps.normalize_str(token["content"]) == token["content"]}
    # Special tokens would be added again when the tokenizer is loaded. `with_cleaning` makes all that last special.
    content["added_tokens"] = [
        token | {"special": token["content"] in special} for token in added if token["content"] in special | lasting
    ]
    content |= {"padding": None, "truncation": None}  # of the last call
    cleaned._tokenizer = Tokenizer.from_str(json.dumps(content))
    if clean == "canonicalize" and not special & lasting:
        _set_saved(cleaned, "split_special_tokens", True)
    return cleaned


def _set_saved(tokenizer: Any, attribute: str, value: bool | str | Sequence[str]) -> None:
    """Sets an attribute that `save_pretrained` stores, which does so for arguments of the constructor."""
    setattr(tokenizer, attribute, value)
    tokenizer.init_kwargs[attribute] = value


def _clip_bpe() -> CLIPTokenizer:
    """CLIP's BPE with open_clip's names of the special tokens, which a text may contain, not OpenAI's."""
    bpe = open_clip.SimpleTokenizer()
    start, end = "<start_of_text>", "<end_of_text>"
    merges: Any = list(bpe.bpe_ranks)  # pairs, as tokenizers requires; transformers' annotation is list of str
    tokenizer = CLIPTokenizer(
        vocab=dict(bpe.encoder), merges=merges, bos_token=start, eos_token=end, pad_token=end, unk_token=end
    )
    # transformers' own split keeps OpenAI's names of the special tokens whole.
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    split: Any = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer
