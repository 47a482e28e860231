"""Contradictions within a model: its config against its weights, its tokenizer and the other files of its folder.

Only what the files themselves tell is compared; each contradiction is one line that names the value and the remedy.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor

from gkl_vl.errors import UserError
from gkl_vl.models.preprocessing import is_number
from gkl_vl.models.weights import read_json_or_none

# Setting: the tensors that tell it, and on which axis.
_OPEN_CLIP_SIZES = {
    "embed_dim": {
        "text_projection": 1,
        "text.text_projection": 1,
        "text_projection.weight": 0,
        "text.text_projection.weight": 0,
        "text.proj.weight": 0,
        "text.proj.2.weight": 0,
        "visual.proj": 1,
        "visual.attnpool.c_proj.weight": 0,
        "visual.head.proj.weight": 0,
        "visual.head.mlp.fc2.weight": 0,
    },
    "text_cfg.vocab_size": {"token_embedding.weight": 0, "text.token_embedding.weight": 0},
    "text_cfg.context_length": {"positional_embedding": 0, "text.positional_embedding": 0},
}
TRANSFORMERS_SIZES = {
    "projection_dim": {"text_projection.weight": 0, "visual_projection.weight": 0},
    "text_config.projection_size": {"text_model.head.weight": 0},
    "text_config.vocab_size": {"text_model.embeddings.token_embedding.weight": 0},
    "text_config.max_position_embeddings": {"text_model.embeddings.position_embedding.weight": 0},
}
_BIAS = "logit_bias"


# ---- weights


def explain_sizes(
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]], places: Mapping[str, Mapping[str, int]]
) -> dict[str, tuple[int, int]] | None:
    """The settings whose sizes differ between weights and model, each with the size in both.

    Args:
        shapes: of every tensor of both, in the weights and in the model.
        places: setting -> the tensors that tell it and their axis.

    Returns None if these settings do not explain every difference.
    """
    explained = {}
    for setting, axes in places.items():
        sizes = {tuple(shape[axis] for shape in shapes[key]) for key, axis in axes.items() if _same_rank(shapes, key)}
        if len(sizes) > 1:
            return None
        if sizes and (pair := sizes.pop())[0] not in (0, pair[1]):
            explained[setting] = pair
    for key, (stored, built) in shapes.items():
        if tuple(stored) == tuple(built):
            continue
        differing = [pair for pair in zip(stored, built, strict=False) if pair[0] != pair[1]]
        if not _same_rank(shapes, key) or len(differing) != 1 or differing[0] not in explained.values():
            return None
    return explained


def _same_rank(shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]], key: str) -> bool:
    return key in shapes and len(shapes[key][0]) == len(shapes[key][1])


def correction(
    cfg: Mapping[str, Any], state: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, file: str | None
) -> str | None:
    """How an open_clip config must change for the weights `stored` to fit, which the state dict `state` of its model
    does not; None if sizes of the embedding and the text tower, and the logit bias, are not all that differs.

    Args:
        file: that holds the config, None for a named architecture.
    """
    shapes = {key: (tensor.shape, state[key].shape) for key, tensor in stored.items() if key in state}
    sizes = explain_sizes(shapes, _OPEN_CLIP_SIZES)
    missing = {key for key in state if key not in stored and not key.endswith("num_batches_tracked")}
    if sizes is None or (missing | (set(stored) - set(state))) - {_BIAS}:
        return None
    text = CLIPTextCfg(**cfg["text_cfg"])
    configured = {"embed_dim": cfg["embed_dim"], "text_cfg.vocab_size": text.vocab_size}
    configured |= {"text_cfg.context_length": text.context_length}  # one less than the positions with `embed_cls`
    steps = [f"set {setting} to {configured[setting] + theirs - ours}" for setting, (theirs, ours) in sizes.items()]
    if _BIAS in missing:
        steps.append("remove init_logit_bias")
    elif _BIAS in stored and _BIAS not in state:
        steps.append("set init_logit_bias to -10 (the weights replace it)")
    return f"{', '.join(steps)} in {place_of(file)}" if steps else None


def place_of(config_file: str | None) -> str:
    """Where a user can change a model config; None stands for that of a named architecture."""
    return "a JSON model config of its own" if config_file is None else config_file


def check_widths(model: Any, cfg: Mapping[str, Any], source: str) -> None:
    """Raises: UserError if a tower of an open_clip model that has no projection has another width than embed_dim."""
    text, vision, dim = CLIPTextCfg(**cfg["text_cfg"]), CLIPVisionCfg(**cfg["vision_cfg"]), cfg["embed_dim"]
    widths = {}
    if text.proj_type == "none" and not text.hf_model_name:
        widths["text_cfg.proj_type"] = {text.width}
    if vision.timm_model_name and vision.timm_proj == "none" and vision.timm_pool not in ("abs_attn", "rot_attn"):
        trunk = model.visual.trunk
        widths["vision_cfg.timm_proj"] = {trunk.num_features, getattr(trunk, "head_hidden_size", trunk.num_features)}
    for key, width in widths.items():
        if dim not in width:
            raise UserError(
                f"embed_dim in {source} is {dim}, but its tower without projection ({key} 'none') has a width of "
                f"{max(width)}: set embed_dim to {max(width)}, or {key} to 'linear'"
            )


def check_transformers_config(config: Any, file: Path) -> None:
    """Checks that both towers of a transformers `clip` or `siglip` config have one embedding and one activation.

    A SigLIP's image embedding has the width of its tower. A tower of a CLIP config without hidden_act has QuickGELU.

    Raises:
        UserError: other dimensions, QuickGELU in one tower only.
    """
    text, vision = config.text_config, config.vision_config
    if config.model_type == "siglip" and text.projection_size != vision.hidden_size:
        raise UserError(
            f"text_config.projection_size in {file} is {text.projection_size}, vision_config.hidden_size is "
            f"{vision.hidden_size}: image and text need embeddings of one length: take a model that has them"
        )
    if config.model_type == "clip" and (text.hidden_act == "quick_gelu") != (vision.hidden_act == "quick_gelu"):
        raise UserError(
            f"text_config.hidden_act in {file} is {text.hidden_act!r}, vision_config.hidden_act is "
            f"{vision.hidden_act!r} (quick_gelu where there is none): give both the one of the training"
        )


# ---- tokenizers


def check_tokenizer(
    tokenizer: Any, model: Any, cfg: Mapping[str, Any], *, folder: Path | None, source: str, trained: bool
) -> None:
    """Compares an open_clip tokenizer with the text tower and with the tokenizer in the model's folder.

    Args:
        folder: of the model, None if it has none.
        source: the model config, for messages.
        trained: whether the model has weights: one without may have more embeddings than tokens.

    Raises:
        UserError: another end-of-text token, tokens without embeddings, far fewer tokens than embeddings, the files of
            another tokenizer in a folder whose config names none.
    """
    text_cfg = CLIPTextCfg(**cfg["text_cfg"])
    rows = model.text.config.vocab_size if text_cfg.hf_model_name else text_cfg.vocab_size
    is_hf = isinstance(tokenizer, HFTokenizer)
    eos_id = tokenizer.tokenizer.eos_token_id if is_hf else tokenizer.eot_token_id
    if text_cfg.pool_type == "eos" and text_cfg.eos_id != eos_id:
        raise UserError(f"text_cfg.eos_id in {source} is {text_cfg.eos_id}, its tokenizer's is {eos_id}: correct it")
    if is_hf:
        check_vocabulary(tokenizer.tokenizer, rows, source, trained=trained)
        return
    if tokenizer.vocab_size > rows or (trained and 2 * tokenizer.vocab_size < rows):
        raise UserError(
            f"text_cfg.vocab_size in {source} is {rows}, CLIP's tokenizer has {tokenizer.vocab_size} tokens: "
            "correct it, or name the model's tokenizer as hf_tokenizer_name"
        )
    beside = _vocabulary(folder / "tokenizer.json") if folder is not None else {}
    common = sum(number == tokenizer.encoder.get(token) for token, number in beside.items())
    if beside and 2 * common < tokenizer.vocab_size:  # an export has other names for its special tokens
        raise UserError(
            f"{source} has no text_cfg.hf_tokenizer_name, which stands for CLIP's tokenizer, but tokenizer.json beside "
            f"it is another one, of {len(beside)} tokens: set hf_tokenizer_name, or remove tokenizer.json"
        )


def check_vocabulary(tokenizer: Any, rows: int, source: str, *, trained: bool) -> None:
    """Compares a transformers tokenizer with a text tower.

    T5's `<extra_id_0>` and further special tokens may lie beyond the embeddings, as in SigLIP: no text has them. Up to
    half of the embeddings of trained weights may be spare: sizes are rounded up.

    Args:
        rows: token embeddings of the text tower.

    Raises:
        UserError: a token that has no embedding, no padding token, far fewer tokens than embeddings of trained weights.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {source!r} has no padding token: set pad_token in its tokenizer_config.json")
    unused = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if token not in unused and not token.startswith("<extra_id_")
    }
    ends = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token)
    used |= {token: tokenizer.convert_tokens_to_ids(token) for token in ends if token is not None}
    token, highest = max(used.items(), key=lambda item: item[1])
    if highest >= rows or (trained and 2 * (highest + 1) < rows):
        raise UserError(
            f"the tokenizer of {source!r} gives ids up to {highest} ({token!r}), but the text tower has {rows} token "
            "embeddings: take the tokenizer that it was trained with"
        )


def _vocabulary(path: Path) -> dict[str, Any]:
    """Tokens of a tokenizer.json with their ids; empty if it is missing or its own reader would refuse it."""
    content = read_json_or_none(path)
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        pairs = (entry for entry in vocabulary if isinstance(entry, list) and entry)
        return {str(token): number for number, (token, *_) in enumerate(pairs)}
    return vocabulary if isinstance(vocabulary, dict) else {}


# ---- both formats in one folder


def check_formats(config: Path) -> None:
    """Compares an open_clip_config.json with the config.json and preprocessor_config.json of transformers beside it.

    Only the activation of two plain towers and the normalisation are compared; files that are missing or cannot be read
    tell nothing.

    Raises:
        UserError: another activation, another mean or std.
    """
    ours = read_json_or_none(config)
    if not isinstance(ours, dict):
        return
    _check_activation(ours.get("model_cfg"), config)
    path = config.with_name("preprocessor_config.json")
    theirs = _processor_numbers(read_json_or_none(path))
    preprocess = ours.get("preprocess_cfg")
    known = _preprocess_numbers(preprocess if isinstance(preprocess, dict) else {})
    if theirs is None or known is None or all(abs(a - b) < 1e-3 for a, b in zip(known, theirs, strict=True)):
        return
    given = isinstance(preprocess, dict) and None not in (preprocess.get("mean"), preprocess.get("std"))
    raise UserError(
        f"{config} has {_spelt(known)}{'' if given else ' (the default, as preprocess_cfg lacks one)'}, {path.name} "
        f"beside it {_spelt(theirs)}: correct the wrong one, of a Hub repository in a local copy"
    )


def _check_activation(model_cfg: Any, config: Path) -> None:
    path = config.with_name("config.json")
    theirs = read_json_or_none(path)
    if not isinstance(theirs, dict) or theirs.get("model_type") != "clip" or not _is_plain(model_cfg):
        return
    quick_gelu = bool(model_cfg.get("quick_gelu"))
    for tower in ("text_config", "vision_config"):
        section = theirs.get(tower)
        act = section.get("hidden_act", "quick_gelu") if isinstance(section, dict) else None
        if act is not None and (act == "quick_gelu") != quick_gelu:
            raise UserError(
                f"model_cfg.quick_gelu in {config} is {str(quick_gelu).lower()}, {tower}.hidden_act in {path.name} "
                f"beside it is {act!r}: correct the wrong one, of a Hub repository in a local copy"
            )


def _is_plain(model_cfg: Any) -> bool:
    """Whether quick_gelu decides the activation of both towers: those of timm and transformers have their own."""
    towers = [model_cfg.get(key) for key in ("vision_cfg", "text_cfg")] if isinstance(model_cfg, dict) else [None]
    others = ("timm_model_name", "hf_model_name")
    return all(isinstance(cfg, dict) and not any(cfg.get(key) for key in others) for cfg in towers)


def _processor_numbers(fields: Any) -> list[float] | None:
    """Mean and std of a transformers image processor on pixels in [0, 1]; None where it does not tell them."""
    if not isinstance(fields, dict) or fields.get("do_rescale", True) is not True:
        return None
    factor = fields.get("rescale_factor", 1 / 255)
    if not is_number(factor) or abs(255 * factor - 1) > 1e-3:
        return None
    if fields.get("do_normalize", True) is not True:
        return [0.0] * 3 + [1.0] * 3
    return _six(fields.get("image_mean"), fields.get("image_std"))


def _preprocess_numbers(fields: dict) -> list[float] | None:
    default = PreprocessCfg()
    mean, std = fields.get("mean"), fields.get("std")
    return _six(default.mean if mean is None else mean, default.std if std is None else std)


def _six(mean: Any, std: Any) -> list[float] | None:
    numbers = []
    for values in (mean, std):
        values = [values] * 3 if is_number(values) else values
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(is_number(v) for v in values):
            return None
        numbers += values
    return numbers


def _spelt(numbers: Sequence[float]) -> str:
    mean, std = (" ".join(f"{value:.4g}" for value in part) for part in (numbers[:3], numbers[3:]))
    return f"mean {mean}, std {std}"
