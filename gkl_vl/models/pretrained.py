"""Model folders of strangers: all that loads tokenizers, configs, processors and models of transformers, and the check
of an open_clip model config before anything is built from it.

No Python of a folder or a Hub repository is ever run: `trust_remote_code=False` is passed everywhere, and a file that
asks for code of its own is refused, because a stock class in its place could compute something else.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import timm
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.coca_model import MultimodalCfg
from open_clip.hf_configs import arch_dict
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from timm.layers.helpers import to_2tuple
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import logging

from gkl_vl.errors import UserError, first_line, notice
from gkl_vl.models.agreement import TRANSFORMERS_SIZES, explain_sizes
from gkl_vl.models.preprocessing import is_number
from gkl_vl.models.weights import (
    check_plain_floats,
    fetch,
    read_json_or_none,
    refuse_misfits,
    refuse_pickle,
    why_unreadable,
)
from gkl_vl.reading import read_json, refuse_pointer

BUNDLED_TOKENIZER = Path(__file__).parents[1] / "assets" / "tokenizer"
BUNDLED_TOKENIZER_NAME = "gkl-vl/clip-bpe-4096"  # BUNDLED_TOKENIZER's name in the bundled model configs
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TEXT_FILES = ("*.json", "*.txt", "*.model")
_ADAPTER = "adapter_config.json"
# What `tokenizer_kwargs` of a model config may pass on. open_clip hands the rest to transformers' `from_pretrained`,
# where `trust_remote_code`, `code_revision`, `tokenizer_file` and others run code or read other files.
_TOKENIZER_VALUES: dict[str, tuple] = {
    "clean": ("lower", "whitespace", "canonicalize"),
    "strip_sep_token": (True, False),
    "reduction_mask": ("", "simple", "random", "shuffle"),  # open_clip's "syntax" downloads pickled models
    "padding_side": ("left", "right"),
    "truncation_side": ("left", "right"),
    "add_bos_token": (True, False),
    "add_eos_token": (True, False),
}
_SIMPLE_ONLY, _BOTH = {"reduction_mask"}, {"clean"}
_SIZES = ("embed_dim", "image_size", "patch_size", "layers", "width", "head_width", "context_length", "vocab_size")
_TOKENIZER_MODES = (None, "", "clips")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
# Keys of a transformers config that would download code, convert weights, or read other files than those checked.
_REFUSED_KEYS = ("quantization_config", "attn_implementation", "_attn_implementation", "kernel_config")
_REFUSED_KEYS += ("transformers_weights",)


def refuse_code(folder: Path) -> None:
    """Raises: UserError if a JSON file of the folder names Python code of its own (`auto_map`) or an adapter."""
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".index.json") or path.name in ("tokenizer.json", "vocab.json"):  # large, read as data
            continue
        if _names_code(read_json_or_none(path)):
            raise UserError(
                f"{path} asks for Python code of its own (auto_map), which is never run: "
                "use a model with a class of transformers, or remove auto_map if such a class is right"
            )
    if (folder / _ADAPTER).is_file():
        raise UserError(f"{folder / _ADAPTER} is an adapter of another model: merge it and save the whole model")


def _names_code(content: Any) -> bool:
    pending = [content]
    while pending:  # without recursion, for which a file can be nested too deeply
        item = pending.pop()
        if isinstance(item, dict):
            if "auto_map" in item:
                return True
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return False


def _check_text_file(path: Path) -> None:
    """Raises: UserError for an empty file, a Git LFS pointer, or a byte order mark, which transformers cannot read."""
    if not path.stat().st_size:
        raise UserError(f"{str(path)!r} is an empty file: fetch it again")
    refuse_pointer(path)
    with path.open("rb") as file:
        if file.read(3) == b"\xef\xbb\xbf":
            remedy = r"sed -i '1s/^\xEF\xBB\xBF//' FILE"
            raise UserError(f"{str(path)!r} starts with a byte order mark: `{remedy}` removes it")


def _check_json_files(folder: Path, *names: str) -> None:
    for name in names:
        if (folder / name).is_file():
            _check_text_file(folder / name)


# ---- transformers


def load_config(folder: Path, name: str) -> Any:
    """The transformers config in a folder.

    Raises:
        UserError: no config of a known model; own code; settings that would download code or other weights.
    """
    refuse_code(folder)
    content = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    _check_json_files(folder, "config.json")
    for key in _REFUSED_KEYS:
        if content.get(key) not in (None, "eager", "sdpa"):
            raise UserError(f"{key} in {folder / 'config.json'} is not supported: remove it, or take a plain model")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the checks of its fields raise classes of several packages
        raise UserError(
            f"{name!r} holds no config.json of a known transformers model: {_cause(error.__cause__ or error)}"
        ) from error


def load_tokenizer(folder: Path, name: str) -> Any:
    """The transformers tokenizer in a folder. Raises: UserError for own code, a missing or a damaged tokenizer."""
    _check_tokenizer_files(folder, name)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a malformed file
        raise UserError(f"the tokenizer of {name!r} could not be loaded: {_cause(error)}") from error


def _check_tokenizer_files(folder: Path, source: str) -> None:
    """Raises: UserError for a folder without a vocabulary, for which transformers would invent a tokenizer."""
    refuse_code(folder)
    models = sorted(folder.glob("*.model"))
    complete = any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES)
    if not complete and not models:
        raise UserError(f"{folder}, the tokenizer of {source!r}, holds no tokenizer.json or vocabulary: fetch it")
    _check_json_files(folder, *{name for names in _VOCABULARIES for name in names}, *TOKENIZER_FILES)
    for model in models:
        _check_text_file(model)


def _cause(error: BaseException) -> str:
    return first_line(error).rstrip(":. ")


def load_image_processor(folder: Path, name: str) -> dict:
    """All fields of the transformers image processor in a folder, defaults included. Raises: UserError as above."""
    refuse_code(folder)
    _check_json_files(folder, "preprocessor_config.json", "processor_config.json")
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception as error:  # its fields may have any type
        raise UserError(f"the image processor of {name!r} could not be loaded: {_cause(error)}") from error


def load_transformers_model(folder: Path, config: Any, name: str, *, allow_pickle: bool) -> Any:
    """The transformers model of `config` with the weights in its folder, in fp32.

    Raises:
        UserError: weights that are missing, damaged, pickled without `allow_pickle`, or do not fit the config.
    """
    model, file, misfits, stored = _read_model(folder, config, name, allow_pickle=allow_pickle)
    hint = None
    if any(key.startswith("visual.") for key in misfits["unexpected"]):
        hint = "these are open_clip's tensors, write local-dir:path with their open_clip_config.json"
    built = {key: tensor.shape for key, tensor in model.state_dict().items()}
    shapes = {key: (stored[key] if key in stored else shape, shape) for key, shape in built.items()}
    sizes = explain_sizes(shapes, TRANSFORMERS_SIZES)
    if sizes and not misfits["missing"] and not misfits["unexpected"]:
        steps = [f"set {setting} to {theirs}" for setting, (theirs, _) in sizes.items()]
        hint = f"{', '.join(steps)} in {folder / 'config.json'}"
    refuse_misfits(misfits, file, name, hint)
    return model


def random_transformers_model(config: Any, name: str) -> Any:
    """The transformers model of `config` with random weights, as transformers initialises them, in fp32.

    A SigLIP's logit scale and bias are those that its paper starts with, 10 and -10 (arXiv 2303.15343);
    transformers starts at 1 and 0, where every logit is about the same.

    Raises:
        UserError: a config that transformers cannot build.
    """
    try:
        # Without dtype it would have that of the weights beside the config.
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # values that do not go together raise anything
        raise UserError(_cannot_build(name, error)) from error
    if config.model_type == "siglip":
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))
            model.logit_bias.fill_(-10)
    return model


def _cannot_build(name: str, error: Exception) -> str:
    return f"transformers cannot build {name!r} ({type(error).__name__}: {_cause(error)}): correct its config.json"


def _read_model(
    folder: Path, config: Any, name: str, *, allow_pickle: bool
) -> tuple[Any, Path, dict[str, list[str]], dict[str, Sequence[int]]]:
    """The model, its (first) file, the tensors that did not fit, as for `refuse_misfits`, and the shapes in the weights
    of those that have another one in the model."""
    files = _transformers_weights(folder)
    if not files:
        if list(folder.glob("open_clip*")):
            raise UserError(f"{name!r} holds no model.safetensors, but weights of open_clip: write local-dir:{folder}")
        raise UserError(f"{name!r} holds no weights: expected model.safetensors")
    for file in files:
        refuse_pickle(file, allow_pickle=allow_pickle)
        check_plain_floats(file, allow_pickle=allow_pickle)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of misfits, which are refused by the callers
    try:
        model, loading = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype="float32",
            trust_remote_code=False,
            weights_only=True,
            use_safetensors=files[0].suffix == ".safetensors",
            ignore_mismatched_sizes=True,  # refused, by name
            output_loading_info=True,
        )
    except Exception as error:  # a damaged pickle can raise anything
        if files[0].suffix != ".safetensors":
            raise UserError(f"weights {str(files[0])!r} cannot be read: {why_unreadable(files[0], error)}") from error
        raise UserError(_cannot_build(name, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    shapes = [f"{key} has {list(ours)}, not {list(theirs)}" for key, ours, theirs in sorted(loading["mismatched_keys"])]
    unexpected = [key for key in sorted(loading["unexpected_keys"]) if not key.endswith("position_ids")]
    return (
        model,
        files[0],
        {
            "missing": sorted(loading["missing_keys"]),
            "unexpected": unexpected,
            "of another shape": shapes,
        },
        {key: ours for key, ours, _ in loading["mismatched_keys"]},
    )


def _transformers_weights(folder: Path) -> list[Path]:
    """The files that transformers reads: one, or the shards of an index; safetensors before pickles."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{index} has no weight_map of file names: fetch it again")
            names = sorted(set(shards.values()))
            if lost := [shard for shard in names if not (folder / shard).is_file()]:
                raise UserError(f"{folder} lacks {lost[0]}, one of {len(names)} files of {index.name}: fetch it")
            return [folder / shard for shard in names]
    return []


# ---- open_clip


def check_model_config(cfg: Any, source: str) -> dict:
    """Checks an open_clip model config of any origin before open_clip sees it, and returns it.

    Names that it may refer to: a timm architecture, and Hub repositories or folders of tokenizers and text towers,
    which `tokenizer_for` and `local_text_tower` load without their code.

    Args:
        source: the file, for messages.

    Raises:
        UserError: unknown keys, values of a wrong type, tokenizer settings beyond the allow-list.
    """
    if not isinstance(cfg, dict) or not all(isinstance(cfg.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise UserError(f"{source} is no model config of open_clip: it needs embed_dim, vision_cfg and text_cfg")
    sections = [("", cfg, _top_level(cfg)), ("vision_cfg.", cfg["vision_cfg"], _types_of(CLIPVisionCfg))]
    sections.append(("text_cfg.", cfg["text_cfg"], _types_of(CLIPTextCfg)))
    if "multimodal_cfg" in cfg:
        sections.append(("multimodal_cfg.", cfg["multimodal_cfg"], _types_of(MultimodalCfg)))
    for prefix, section, types in sections:
        for key, value in section.items():
            if key not in types:
                raise UserError(f"{source} has an unknown key {prefix}{key}: remove it; known are {', '.join(types)}")
            if value is not None and not _is_a(value, types[key]):  # null: not set, as in configs of open_clip
                raise UserError(f"{prefix}{key} in {source} is {value!r}: expected {_spelt(types[key])}")
            _check_range(key, value, f"{prefix}{key} in {source}")
    if "embed_dim" not in cfg:
        raise UserError(f"{source} has no embed_dim, the length of an embedding: add it")
    vision: Any = CLIPVisionCfg(**cfg["vision_cfg"])
    plain = not vision.timm_model_name and isinstance(vision.layers, int)  # the others have no patches of this size
    if plain and vision.patch_size and vision.image_size and vision.patch_size > min(to_2tuple(vision.image_size)):
        raise UserError(f"vision_cfg.patch_size in {source} is above image_size: correct one")
    _check_names(cfg, source)
    return cfg


def _check_range(key: str, value: Any, place: str) -> None:
    values = value if isinstance(value, list | tuple) else [value]
    if key in _SIZES and any(number is not None and number < 1 for number in values):
        raise UserError(f"{place} is {value!r}: expected at least 1")
    if isinstance(value, float) and not is_number(value):
        raise UserError(f"{place} is {value!r}: expected a finite number")


def _check_names(cfg: dict, source: str) -> None:
    architecture = cfg["vision_cfg"].get("timm_model_name")
    if architecture and not timm.is_model(architecture):  # timm also takes hf-hub: and local-dir:, with their configs
        raise UserError(f"vision_cfg.timm_model_name {architecture!r} in {source} is unknown to timm: correct it")
    text_cfg = cfg["text_cfg"]
    if text_cfg.get("tokenizer_mode") not in _TOKENIZER_MODES:
        raise UserError(f"text_cfg.tokenizer_mode {text_cfg['tokenizer_mode']!r} in {source} is unknown: write 'clips'")
    for key, value in (text_cfg.get("tokenizer_kwargs") or {}).items():
        place = f"text_cfg.tokenizer_kwargs.{key} in {source}"
        if key not in _TOKENIZER_VALUES:
            raise UserError(f"{place} is not allowed: remove it; allowed are {', '.join(_TOKENIZER_VALUES)}")
        if (type(value), value) not in [(type(allowed), allowed) for allowed in _TOKENIZER_VALUES[key]]:
            raise UserError(f"{place} is {value!r}: write one of {', '.join(map(repr, _TOKENIZER_VALUES[key]))}")
        if key not in _BOTH and (key in _SIMPLE_ONLY) == bool(text_cfg.get("hf_tokenizer_name")):
            raise UserError(f"{place} does not go with this tokenizer: remove it")


def _top_level(cfg: dict) -> dict[str, Any]:
    """Allowed keys of a model config, with their types."""
    model_class = CoCa if "multimodal_cfg" in cfg else CustomTextCLIP
    known = set(signature(model_class).parameters) - {"cast_dtype", "output_dict"}
    types = {"embed_dim": int, "quick_gelu": bool, "nonscalar_logit_scale": bool, "custom_text": bool, "pad_id": int}
    types |= {"init_logit_scale": float, "init_logit_bias": float | None}
    types |= {"vision_cfg": dict, "text_cfg": dict, "multimodal_cfg": dict}
    return {key: types[key] for key in types if key in known | {"custom_text"}}


def _types_of(config: type) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config)}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has an annotated type: a list counts as a tuple, an integer as a float."""
    if kind is Any:
        return True
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(value, option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _spelt(kind: Any) -> str:
    names = [_spelt(k) for k in get_args(kind) if k is not NoneType] if get_args(kind) else [kind.__name__]
    return f"[{', '.join(names)}]" if get_origin(kind) is tuple else " or ".join(names)


def build_open_clip(cfg: Mapping[str, Any], source: str, *, pretrained_text: bool, allow_pickle: bool) -> Any:
    """The open_clip model of a checked config with random weights.

    Args:
        pretrained_text: load the pretrained weights of a transformers text tower (`hf_model_name`); false if weights
            of the whole model follow.

    Raises:
        UserError: a config that open_clip cannot build.
    """
    arguments = copy.deepcopy(dict(cfg))
    vision_cfg, text_cfg = arguments["vision_cfg"], arguments["text_cfg"]
    custom_text = arguments.pop("custom_text", False) or bool(text_cfg.get("hf_model_name"))
    if vision_cfg.get("timm_model_name"):
        vision_cfg["timm_model_pretrained"] = False
    folder = None
    if text_cfg.get("hf_model_name"):
        folder = _text_tower(text_cfg, source, weights=pretrained_text, allow_pickle=allow_pickle)
        text_cfg |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    model_class: Any = CLIP
    if custom_text or "multimodal_cfg" in cfg:
        model_class = CoCa if "multimodal_cfg" in cfg else CustomTextCLIP
    try:
        model = model_class(**arguments)
    except Exception as error:  # values that do not go together raise anything
        cause = f"{type(error).__name__}: {_cause(error)}"
        raise UserError(f"open_clip cannot build the model of {source} ({cause}): correct its values") from error
    if folder is not None and pretrained_text:
        _load_text_tower(model.text.transformer, folder, allow_pickle=allow_pickle)
    return model


def _load_text_tower(tower: Any, folder: Path, *, allow_pickle: bool) -> None:
    """Loads a transformers text tower's weights, as open_clip does, which would also accept others.

    The heads of a language model, outside the tower, are left out with a notice.
    """
    config = load_config(folder, str(folder))
    loaded, file, misfits, _ = _read_model(folder, config, str(folder), allow_pickle=allow_pickle)
    prefix = "encoder." if config.is_encoder_decoder else ""
    expected = tower.state_dict()
    parts = {name for name, _ in loaded.named_children()} | {loaded.base_model_prefix}
    heads = [key for key in misfits["unexpected"] if key.split(".")[0] not in parts]
    misfits["missing"] = [key for key in misfits["missing"] if key.removeprefix(prefix) in expected]
    misfits["unexpected"] = [key for key in misfits["unexpected"] if key not in heads]
    refuse_misfits(misfits, file, str(folder))
    if heads:
        notice(f"{file}: {len(heads)} tensors outside the text tower left out, such as {heads[0]}")
    state = loaded.encoder.state_dict() if prefix else loaded.state_dict()
    tower.load_state_dict({key: state[key] for key in expected})


def _text_tower(text_cfg: Mapping[str, Any], source: str, *, weights: bool, allow_pickle: bool) -> Path:
    """The local folder of a transformers text tower, checked, for open_clip to load."""
    name = text_cfg["hf_model_name"]
    files = ("config.json", *(("*.safetensors", "*.safetensors.index.json") if weights else ()))
    pickles = ("*.bin", "*.bin.index.json") if weights else ()
    folder = Path(name) if Path(name).is_dir() else fetch(name, files=files, pickles=pickles, allow_pickle=allow_pickle)
    config = load_config(folder, name)
    if config.model_type not in arch_dict:
        raise UserError(
            f"text_cfg.hf_model_name {name!r} in {source} is a {config.model_type!r} model: open_clip supports "
            f"{', '.join(arch_dict)}"
        )
    length, longest = _context_length(text_cfg), _positions(config)
    if longest is not None and length > longest:
        raise UserError(
            f"text_cfg.context_length in {source} is {length}, but hf_model_name {name!r} takes up to {longest} "
            f"tokens: set it to {longest}"
        )
    return folder


def _positions(config: Any) -> int | None:
    """The longest text of a transformers text tower in tokens; None if its positions have no learnt embeddings."""
    if config.model_type in ("roberta", "xlm-roberta"):  # which count positions from behind the padding id
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings if config.model_type == "bert" else None


def _context_length(text_cfg: Mapping[str, Any]) -> int:
    return text_cfg.get("context_length", CLIPTextCfg.context_length)


def tokenizer_for(cfg: Mapping[str, Any], *, folder: Path | None, source: str) -> Any:
    """The open_clip tokenizer of a checked model config.

    Args:
        folder: the model's folder, whose own tokenizer is taken if it holds one.

    Raises:
        UserError: a tokenizer that needs its own code, is damaged or cannot be fetched.
    """
    text_cfg = cfg["text_cfg"]
    length = _context_length(text_cfg)
    settings = dict(text_cfg.get("tokenizer_kwargs") or {})
    name = text_cfg.get("hf_tokenizer_name")
    if folder is not None:
        refuse_code(folder)
    if not name:
        return SimpleTokenizer(context_length=length, **settings)
    if folder is not None and any((folder / file).is_file() for file in TOKENIZER_FILES):
        place = folder
    elif name == BUNDLED_TOKENIZER_NAME:
        place = BUNDLED_TOKENIZER
    else:
        place = Path(name) if Path(name).is_dir() else fetch(name, files=_TEXT_FILES, pickles=(), allow_pickle=False)
    _check_tokenizer_files(place, name)
    mode = text_cfg.get("tokenizer_mode")
    try:
        return HFTokenizer(str(place), context_length=length, tokenizer_mode=mode, trust_remote_code=False, **settings)
    except Exception as error:  # tokenizers raises plain Exception for a malformed file
        raise UserError(f"the tokenizer of {source} could not be loaded: {_cause(error)}") from error
