"""Weights of open_clip models by tag or file, with the preprocessing and the activation that belong to them.

An architecture does not determine its preprocessing: the tags of `ViT-L-14` normalise in two ways, and open_clip's
default is wrong for all of SigLIP. What a weights file was trained with is taken, in this order, from the tag in
`TAG=FILE`, from the config that names the model, from the config beside the file, and from the tags of the
architecture where all agree. Where they disagree the tag must be given.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    CLIPTextCfg,
    CLIPVisionCfg,
    convert_to_custom_text_state_dict,
    resize_pos_embed,
)
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor

from gkl_vl.errors import UserError, first_line, notice, refuse_full_disk
from gkl_vl.models.agreement import correction, place_of
from gkl_vl.models.preprocessing import check_preprocess, check_size, from_image_processor
from gkl_vl.models.pretrained import load_image_processor
from gkl_vl.models.weights import check_fit, check_weights_file, read_state_dict, refuse_pickle
from gkl_vl.reading import read_json

FOLDER_CONFIG = "open_clip_config.json"
# In open_clip's order of preference (3.3, factory.py).
WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
WEIGHTS_NAMES += ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")
WEIGHTS_NAMES += ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_TOKENIZER_KEYS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
_UNUSED = ("input_resolution", "context_length", "vocab_size", "text.transformer.embeddings.position_ids")
"""Entries of OpenAI's archives and of old checkpoints that are no parameters."""


@dataclass(frozen=True)
class Settings:
    """What weights were trained with, beyond the architecture."""

    preprocess: PreprocessCfg
    """Its `size` is not used: the model's counts."""
    quick_gelu: bool

    def __str__(self) -> str:
        cfg, activation = self.preprocess, "QuickGELU" if self.quick_gelu else "GELU"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (cfg.mean, cfg.std))
        return f"mean {mean}, std {std}, {cfg.interpolation}, {cfg.resize_mode}, {activation}"


@dataclass(frozen=True)
class Weights:
    """A weights file and its settings."""

    path: Path
    settings: Settings


def settings_of(preprocess: Mapping[str, Any], *, quick_gelu: bool) -> Settings:
    """Settings from open_clip's fields of preprocessing; those that are missing have open_clip's default."""
    cfg = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), dict(preprocess)))
    mean, std = tuple(map(float, cfg.mean)), tuple(map(float, cfg.std))
    return Settings(replace(cfg, size=0, mean=mean, std=std), quick_gelu)


def find_weights(
    pretrained: str, *, name: str, tags_of: str, cfg: Mapping[str, Any], own: Settings | None, allow_pickle: bool
) -> Weights:
    """Resolves `pretrained` of the model `name` to a file and its settings, and says where inferred settings are from.

    Args:
        pretrained: a tag, the path of a file, or TAG=FILE.
        tags_of: the architecture whose tags apply; empty for a model config of the user.
        cfg: the model's config.
        own: the settings of a model config with a preprocess_cfg.

    Raises:
        UserError: an unknown tag, weights that cannot be fetched or read, a file whose settings are not known, a file
            that is known to have other settings than the config or the tag says.
    """
    settings = _tags(tags_of, cfg)
    tag, _, rest = pretrained.partition("=")
    if open_clip.get_pretrained_cfg(tags_of, pretrained):
        path = _download(tags_of, pretrained)
        refuse_pickle(path, allow_pickle=allow_pickle)
        return _of_tag(path, settings[_clean(pretrained)], cfg, pretrained)
    if Path(pretrained).is_file():
        path = Path(pretrained)
        check_weights_file(path)
        refuse_pickle(path, allow_pickle=allow_pickle)
        return _of_file(path, name=name, cfg=cfg, own=own, tags=settings)
    if Path(pretrained).is_dir():
        raise UserError(f"pretrained {pretrained!r} is a folder: name the file in it, or load local-dir:{pretrained}")
    if not rest:
        listed = f" or one of {', '.join(settings)}" if settings else ", as this model has no tags"
        raise UserError(f"unknown tag {pretrained!r} for {name!r}: take a file{listed}")
    if _clean(tag) not in settings:
        raise UserError(f"unknown tag {tag!r} in {pretrained!r}: {name!r} has {', '.join(settings) or 'no tags'}")
    check_weights_file(Path(rest))
    refuse_pickle(rest, allow_pickle=allow_pickle)
    remedy = f"write {rest} without the tag"
    _refuse_other(Path(rest), settings[_clean(tag)], cfg, origin=f"tag {tag}", remedy=remedy)
    return _of_tag(Path(rest), settings[_clean(tag)], cfg, tag)


def _tags(architecture: str, cfg: Mapping[str, Any]) -> dict[str, Settings]:
    """Settings of all tags of an architecture. A model config with QuickGELU has it for all tags."""
    settings = {}
    for tag in open_clip.list_pretrained_tags_by_model(architecture) if architecture else []:
        values = open_clip.get_pretrained_cfg(architecture, tag)
        quick_gelu = bool(values.get("quick_gelu") or cfg.get("quick_gelu"))
        settings[tag] = settings_of(values, quick_gelu=quick_gelu)
    return settings


def _clean(tag: str) -> str:
    return tag.lower().replace("-", "_")  # as open_clip compares tags


def _download(architecture: str, tag: str) -> Path:
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, tag)))
    except Exception as error:  # any error of the Hub's client has the same remedy
        refuse_full_disk(error)
        raise UserError(
            f"weights {tag!r} of {architecture!r} could not be fetched ({first_line(error)}): "
            f"connect, or write {tag}=PATH with the path of the downloaded file"
        ) from error


def _of_file(
    path: Path, *, name: str, cfg: Mapping[str, Any], own: Settings | None, tags: Mapping[str, Settings]
) -> Weights:
    remedy = f"correct {name}" if name.endswith(".json") else "take the name without -quickgelu"
    if own is not None:
        _refuse_other(path, own, cfg, origin=name, remedy=remedy)
        return Weights(path, own)
    if known := _known(path, cfg):
        if cfg.get("quick_gelu") is not None:
            expected = replace(known.settings, quick_gelu=cfg["quick_gelu"])
            _refuse_other(path, expected, cfg, origin=name, remedy=remedy)
        return _inferred(path, known.settings, known.origin)
    groups: dict[str, list[str]] = {}
    for tag, settings in tags.items():
        groups.setdefault(str(settings), []).append(tag)
    if not groups:
        refuse_default({}, cfg, name)
        return Weights(path, settings_of({}, quick_gelu=bool(cfg.get("quick_gelu"))))
    if len(groups) > 1:
        listed = "; ".join(f"{settings} for {', '.join(tags)}" for settings, tags in groups.items())
        raise UserError(
            f"{path} does not say which preprocessing and activation it was trained with, and the tags of {name!r} "
            f"differ: write TAG={path} with the tag whose settings apply ({listed})"
        )
    return _inferred(path, next(iter(tags.values())), f"as all tags of {name}")


def _of_tag(path: Path, settings: Settings, cfg: Mapping[str, Any], tag: str) -> Weights:
    if settings.quick_gelu and not cfg.get("quick_gelu"):
        notice(f"{path}: QuickGELU (tag {tag})")
    return Weights(path, settings)


def _inferred(path: Path, settings: Settings, origin: str) -> Weights:
    notice(f"{path}: {settings} ({origin})")
    return Weights(path, settings)


@dataclass(frozen=True)
class _Known:
    """Settings that a file has by its checksum or by the config beside it."""

    settings: Settings
    origin: str
    normalises: bool = True
    """Whether mean and std are written there, not open_clip's default."""
    activates: bool = True
    """Whether the activation is."""


def _known(path: Path, cfg: Mapping[str, Any]) -> _Known | None:
    """What the config beside a file that has the name of a model folder's weights says, or what OpenAI's archives have.

    None if there is no config or it is of another architecture than `cfg`.
    """
    if path.suffix == ".pt" and _checksum(path) in openai_checksums():
        return _Known(settings_of({}, quick_gelu=True), "tag openai, by its checksum")
    config, processor = path.with_name(FOLDER_CONFIG), path.with_name("preprocessor_config.json")
    if path.name not in WEIGHTS_NAMES:
        return None
    if config.is_file():
        content = read_json(config)
        theirs = content.get("model_cfg")
        if not isinstance(theirs, dict) or _architecture(theirs) != _architecture(cfg):
            return None
        preprocess = check_preprocess(content.get("preprocess_cfg") or {}, str(config))
        check_size(preprocess, theirs, str(config))
        settings = settings_of(preprocess, quick_gelu=bool(theirs.get("quick_gelu")))
        return _Known(
            settings, str(config), normalises={"mean", "std"} <= set(preprocess), activates="quick_gelu" in theirs
        )
    if processor.is_file() and path.with_name("config.json").is_file():
        content = read_json(path.with_name("config.json"))
        vision = content.get("vision_config")
        size = CLIPVisionCfg(**cfg["vision_cfg"]).image_size
        if not isinstance(vision, dict) or not isinstance(size, int) or vision.get("image_size", 224) != size:
            return None
        fields = load_image_processor(path.parent, str(path.parent))
        preprocess = from_image_processor(fields, image_size=size, source=str(processor))
        act = vision.get("hidden_act", "quick_gelu" if content.get("model_type") == "clip" else "gelu")
        quick_gelu = act == "quick_gelu"
        return _Known(settings_of(asdict(preprocess), quick_gelu=quick_gelu), str(processor))
    return None


def _refuse_other(path: Path, settings: Settings, cfg: Mapping[str, Any], *, origin: str, remedy: str) -> None:
    """Raises: UserError if the settings that `origin` says contradict what is known of the file `path`."""
    try:
        known = _known(path, cfg)
    except UserError:  # a config beside the file that cannot be read tells nothing
        return
    if known is None:
        return
    ours, theirs = settings.preprocess, known.settings.preprocess
    pairs = [*zip(ours.mean, theirs.mean, strict=True), *zip(ours.std, theirs.std, strict=True)]
    same_numbers = not known.normalises or all(abs(a - b) < 1e-3 for a, b in pairs)
    if not same_numbers or (known.activates and settings.quick_gelu != known.settings.quick_gelu):
        raise UserError(f"{path} has {known.settings} ({known.origin}), but {origin} says {settings}: {remedy}")


def refuse_default(preprocess: Mapping[str, Any], cfg: Mapping[str, Any], source: str) -> None:
    """Refuses open_clip's default mean and std for weights of an architecture of which no tag has them.

    Args:
        preprocess: checked, of the model whose config is in `source`; with a mean and a std nothing is compared.

    Raises:
        UserError: as above.
    """
    if {"mean", "std"} <= set(preprocess):
        return
    ours, default = _architecture(cfg), settings_of(preprocess, quick_gelu=False).preprocess
    for architecture in open_clip.list_models():
        theirs: Any = open_clip.get_model_config(architecture)
        tags = _tags(architecture, theirs).values() if _architecture(theirs) == ours else ()
        numbers = {(tag.preprocess.mean, tag.preprocess.std) for tag in tags}
        if numbers and (default.mean, default.std) not in numbers:
            mean, std = [list(values) for values in min(numbers)]
            raise UserError(
                f"{source} has no preprocess_cfg with mean and std, and its architecture, {architecture}, was not "
                f'trained with the default: add those of the training, as "mean": {mean}, "std": {std}'
            )


def _architecture(cfg: Mapping[str, Any]) -> dict:
    """What determines the parameters of a model config, defaults included."""
    try:
        vision, text = asdict(CLIPVisionCfg(**cfg["vision_cfg"])), asdict(CLIPTextCfg(**cfg["text_cfg"]))
    except (KeyError, TypeError):
        return {}
    ignored = (*_TOKENIZER_KEYS, "timm_model_pretrained", "hf_model_pretrained", "patch_dropout", "timm_drop_path")
    return {"embed_dim": cfg.get("embed_dim")} | {
        f"{tower}.{key}": list(value) if isinstance(value, tuple) else value
        for tower, values in (("vision", vision), ("text", text))
        for key, value in values.items()
        if key not in ignored
    }


# ---- reading


def openai_checksums() -> set[str]:
    """SHA-256 of the TorchScript archives that OpenAI published, from their addresses in open_clip."""
    urls = [open_clip.get_pretrained_url(model, "openai") for model in open_clip.list_openai_models()]
    return {url.split("/")[-2] for url in urls if "openaipublic" in url}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()


def _read(path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The state dict of a file. A TorchScript archive runs when it is read, so only OpenAI's are, by their checksum."""
    if path.suffix == ".pt" and allow_pickle and _checksum(path) in openai_checksums():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated; OpenAI has no other format
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    return read_state_dict(path, allow_pickle=allow_pickle)


@torch.no_grad()
def load_weights(
    model: Any, path: Path, *, name: str, cfg: Mapping[str, Any], config_file: str | None, allow_pickle: bool
) -> None:
    """Loads an open_clip checkpoint into an open_clip model, as open_clip 3.3's `load_checkpoint`.

    The image tower's position embeddings of another grid are interpolated, with a notice. Unlike there, those of the
    text tower are not, and a missing logit bias is not set to 0.

    Args:
        cfg: of the model.
        config_file: that holds it, None for a named architecture.

    Raises:
        UserError: a file that cannot be read, tensors that do not fit.
    """
    if path.suffix == ".npz":
        _load_big_vision(model, path, name, config_file)
        return
    stored = convert_state_dict(model, _read(path, allow_pickle=allow_pickle))
    state = model.state_dict()
    if "positional_embedding" in stored and "positional_embedding" not in state:
        stored = convert_to_custom_text_state_dict(stored)
    stored = {key: tensor for key, tensor in stored.items() if key in state or key not in _UNUSED}
    for key in ("logit_scale", "logit_bias"):
        if key in stored and key in state and stored[key].numel() == 1:
            stored[key] = stored[key].reshape(state[key].shape)
    _resize_positions(model, stored, state, path)
    hint = _hint(stored, path)
    if hint is None:
        hint = correction(cfg, state, stored, file=config_file)
    check_fit(state, stored, path=path, name=name, hint=hint)
    model.load_state_dict(stored, strict=False)


def _resize_positions(model: Any, stored: dict[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    key = "visual.positional_embedding"
    if key not in stored or key not in state or stored[key].ndim != 2:
        return
    before, after = stored[key].shape, state[key].shape
    if not stored[key].is_floating_point() or not before[0] or not _is_grid(before[0] - 1):
        return  # refused by its caller
    if before[0] != after[0] and before[1] == after[1]:
        resize_pos_embed(stored, model)
        notice(f"{path}: {key} interpolated from {before[0]} to {after[0]} positions")


def _is_grid(patches: int) -> bool:
    return patches > 0 and math.isqrt(patches) ** 2 == patches


def _hint(stored: Mapping[str, Tensor], path: Path) -> str | None:
    if any(key.startswith(("vision_model.", "text_model.")) for key in stored):
        return f"these are transformers' tensors, write transformers:{path.parent} with their config.json"
    return None


def _load_big_vision(model: Any, path: Path, name: str, config_file: str | None) -> None:
    if model.logit_bias is None:
        raise UserError(
            f"weights {str(path)!r} are SigLIP's, whose logit_bias {name!r} lacks: set init_logit_bias to -10 (the "
            f"weights replace it) in {place_of(config_file)}"
        )
    try:
        open_clip.load_checkpoint(model, str(path))
    except Exception as error:  # a damaged archive or another architecture can raise anything
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"weights {str(path)!r} do not fit {name!r} ({cause}): only SigLIP's .npz are read") from error
