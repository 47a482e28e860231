"""CLIP models of open_clip and transformers with one interface: loading, preprocessing, embeddings.

Axis letters: n = rows of this process, d = embedding, h w = pixels, r = side of a square uint8 image, s = side after
resizing.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from open_clip.model import set_model_preprocess_cfg
from open_clip.tokenizer import get_clean_fn
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import Tensor, nn

from gkl_vl.errors import UserError
from gkl_vl.models.agreement import (
    check_formats,
    check_tokenizer,
    check_transformers_config,
    check_vocabulary,
    check_widths,
)
from gkl_vl.models.open_clip_weights import (
    FOLDER_CONFIG,
    WEIGHTS_NAMES,
    Settings,
    find_weights,
    load_weights,
    refuse_default,
    settings_of,
)
from gkl_vl.models.preprocessing import check_preprocess, check_size, from_image_processor, is_square
from gkl_vl.models.pretrained import (
    build_open_clip,
    check_model_config,
    load_config,
    load_image_processor,
    load_tokenizer,
    load_transformers_model,
    random_transformers_model,
    tokenizer_for,
)
from gkl_vl.models.towers import OnnxTowers, OpenClipTowers, PairedTowers, Towers, TransformersTowers
from gkl_vl.models.weights import fetch, read_json_or_none, refuse_pickle
from gkl_vl.reading import read_json

PACKAGE = Path(__file__).parents[1]
BUNDLED_TEACHER = f"local-dir:{PACKAGE / 'assets' / 'teacher'}"
MODEL_CONFIGS = PACKAGE / "model_configs"

_CONFIG_FILES = ("*.json", "*.txt", "*.model")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_PREFIXES = ("transformers", "hf-hub", "local-dir", "onnx", "onnx-int8")
_TRANSFORMERS_TYPES = ("clip", "siglip")  # SigLIP 2 of fixed size is a siglip, NaFlex a siglip2


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its preprocessing and its tokenizer."""

    name: str
    """The argument of `load_clip`."""
    towers: Towers
    preprocess: PreprocessCfg
    """Size, mean, std, interpolation and resize_mode of this model; a teacher's and a student's may differ."""
    tokenize: Callable[[list[str]], Int[Tensor, "n length"]]
    hf_tokenizer: Any | None
    """The transformers tokenizer behind `tokenize`; None for CLIP's BPE, which open_clip implements itself."""
    model_cfg: dict | None
    """open_clip's architecture, as in `open_clip_config.json`; None if unknown (`as_clip`, transformers models)."""

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""
        size = self.preprocess.size
        return size if isinstance(size, int) else size[0]

    @property
    def embed_dim(self) -> int:
        """Length d of an embedding."""
        if self.model_cfg is not None:
            return self.model_cfg["embed_dim"]
        if isinstance(self.towers, OpenClipTowers):
            with torch.inference_mode():
                return self.towers.encode_text(self.tokenize([""]).to(self.towers.log_scale().device)).shape[1]
        if isinstance(self.towers, PairedTowers | OnnxTowers):
            return self.towers.embed_dim
        config = self.towers.model.config
        return config.projection_dim if config.model_type == "clip" else config.vision_config.hidden_size

    def image_transform(self) -> Callable[..., Any]:
        """open_clip's evaluation transform with `preprocess`: PIL image -> normalised pixels."""
        transform: Any = image_transform_v2(self.preprocess, is_train=False)
        return transform

    def scaled_transform(self) -> Callable[..., Any]:
        """`image_transform` without its last step: PIL image -> pixels in [0, 1], multiples of 1/255."""
        transform: Any = image_transform_v2(replace(self.preprocess, mean=(0.0,) * 3, std=(1.0,) * 3), is_train=False)
        return transform

    def prepare(self, images: UInt8[Tensor, "n 3 r r"]) -> Float[Tensor, "n 3 h w"]:
        """Square uint8 views -> input pixels of this model: resized with antialiasing, scaled to [0, 1], normalised.

        Runs on the device of the images. Teacher and student get the same view, each in its own size and with its own
        mean and std. `resize_mode` has no effect: training crops are square.
        """
        return self.normalised(self.scaled(images))

    def scaled(self, images: UInt8[Tensor, "n 3 r r"]) -> Float[Tensor, "n 3 h w"]:
        """Square uint8 views -> pixels in [0, 1] at this model's size, the space of adversarial attacks."""
        mode = "bilinear" if self.preprocess.interpolation == "bilinear" else "bicubic"
        return resize(images, self.image_size, mode=mode)

    def normalised(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Pixels in [0, 1] at this model's size -> input of its image tower."""
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
        # channels_last is the fastest layout of convolutions on CPU and GPU, and makes no difference to a ViT.
        return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def resize(images: UInt8[Tensor, "n 3 r r"], size: int, *, mode: str = "bicubic") -> Float[Tensor, "n 3 s s"]:
    """Square uint8 images -> floats in [0, 1] of side `size`, with antialiasing as in PIL."""
    pixels = images.float() / 255
    if images.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, (size, size), mode=mode, antialias=True, align_corners=False).clamp(0, 1)


class ImageTower(nn.Module):
    """A CLIP's image tower that takes pixels in [0, 1] and normalises them itself, as attacks expect.

    It shares its parameters with the clip, so attacks run on the model in training.
    """

    def __init__(self, clip: Clip):
        super().__init__()
        self.towers = clip.towers
        self.clip = clip

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        return self.towers.encode_image(self.clip.normalised(pixels))


def list_students() -> list[str]:
    """Names of the bundled model configs."""
    return sorted(path.stem for path in MODEL_CONFIGS.glob("*.json"))


def load_clip(
    name: str, pretrained: str | None = None, *, allow_pickle: bool = False, random_weights: bool = False
) -> Clip:
    """Loads a CLIP by name.

    Args:
        name: an open_clip name (`ViT-B-32`) or a bundled config (`ViT-T-16`, see `list_students`), `hf-hub:org/repo`
            or `local-dir:path` in open_clip's format, `transformers:org/repo` or `transformers:path` for transformers'
            CLIPModel and SiglipModel, a run folder (its exported student, in either format), a JSON model config, bare
            or with the preprocessing as in open_clip_config.json, `onnx:path` or `onnx-int8:path` for exported ONNX
            files, which have no gradients (`models/onnx.py`), or `bundled`, the bundled teacher.
        pretrained: open_clip's tag (`openai`), the path of a checkpoint, or TAG=PATH, a checkpoint trained as that
            tag; None = random weights. Only for open_clip names and model configs: all others come with weights.
            Preprocessing and QuickGELU are those of the weights, see `open_clip_weights.py`.
        allow_pickle: read weights stored as a pickle (.bin, .pt), still with `weights_only=True`.
        random_weights: build a model that comes with weights from its config alone, with its tokenizer and its
            preprocessing; its weights are neither needed nor read nor downloaded. They are initialised as open_clip
            does, of `transformers:` as transformers does, but for SigLIP's scale and bias, which start at 10 and -10.
            Open_clip names and model configs have random weights anyway, except for the text tower of a config with
            `hf_model_name`, which is pretrained unless `random_weights`.

    Raises:
        UserError: unknown name or tag, `random_weights` with `pretrained`, folder without weights, weights that are
            damaged or do not fit, a file whose preprocessing is not known, pickled weights without `allow_pickle`, a
            folder that asks to run its code, a config that its weights, tokenizer or folder contradict
            (`agreement.py`).
    """
    if name == "bundled":
        return load_clip(BUNDLED_TEACHER, pretrained, allow_pickle=allow_pickle, random_weights=random_weights)
    if pretrained and random_weights:
        raise UserError(f"pretrained {pretrained!r} does not go with random weights for {name!r}: leave one out")
    prefix, _, rest = name.partition(":")
    if prefix not in _PREFIXES and Path(name).is_dir():
        prefix, rest = _format_of_run(name), str(Path(name) / "model")
    if prefix in ("onnx", "onnx-int8"):
        from gkl_vl.models.onnx import load_onnx  # which imports this module

        _refuse_pretrained(name, pretrained)
        if random_weights:
            raise UserError(f"{name!r} is a converted model, which cannot have random weights: leave them out")
        return load_onnx(rest, int8=prefix == "onnx-int8", name=name)
    if prefix == "transformers":
        _refuse_pretrained(name, pretrained)
        return _load_transformers(name, rest, allow_pickle=allow_pickle, random_weights=random_weights)
    if prefix in ("hf-hub", "local-dir"):
        _refuse_pretrained(name, pretrained)
        return _load_open_clip_folder(name, prefix, rest, allow_pickle=allow_pickle, random_weights=random_weights)
    return _load_open_clip(name, pretrained, allow_pickle=allow_pickle, random_weights=random_weights)


def _format_of_run(name: str) -> str:
    """The prefix of the format of a run folder's exported student: local-dir or transformers."""
    exported = Path(name) / "model"
    if (exported / FOLDER_CONFIG).is_file():
        return "local-dir"
    if holds_transformers_config(exported):
        return "transformers"
    raise UserError(
        f"model {name!r} is a folder but not a finished run: write local-dir:{name} (open_clip's format) or "
        f"transformers:{name}"
    )


def holds_transformers_config(folder: Path) -> bool:
    """Whether the folder's config.json is that of a transformers CLIPModel or SiglipModel."""
    config = read_json_or_none(folder / "config.json")
    return isinstance(config, dict) and config.get("model_type") in _TRANSFORMERS_TYPES


def comes_with_weights(name: str) -> bool:
    """Whether `load_clip` finds weights for this name without `pretrained`."""
    return ":" in name or name == "bundled" or Path(name).is_dir()


def as_clip(model: nn.Module, tokenizer: Any, *, name: str = "model") -> Clip:
    """Wraps an open_clip model (`CLIP` or `CustomTextCLIP`) and its tokenizer, as open_clip's factory returns them.

    Size, mean and std are those of the model (`open_clip.get_model_preprocess_cfg`). Its configuration is unknown, so
    it can be evaluated and used as a teacher, but not exported.
    """
    return _wrap_open_clip(name, model, tokenizer, model_cfg=None)


def _refuse_pretrained(name: str, pretrained: str | None) -> None:
    if pretrained:
        raise UserError(
            f"pretrained {pretrained!r} does not go with {name!r}, which carries its own weights: leave it out"
        )


def _load_open_clip(name: str, pretrained: str | None, *, allow_pickle: bool, random_weights: bool) -> Clip:
    cfg, own, source, tags_of = _named_config(name)
    model_cfg = copy.deepcopy(cfg)
    weights = None
    if pretrained:
        weights = find_weights(pretrained, name=name, tags_of=tags_of, cfg=cfg, own=own, allow_pickle=allow_pickle)
        if weights.settings.quick_gelu != bool(cfg.get("quick_gelu")):
            model_cfg["quick_gelu"] = weights.settings.quick_gelu
    settings = weights.settings if weights else own
    pretrained_text = weights is None and not random_weights
    model = build_open_clip(model_cfg, source, pretrained_text=pretrained_text, allow_pickle=allow_pickle)
    check_widths(model, model_cfg, source)
    _set_preprocess(model, asdict(settings.preprocess) if settings else {}, source)
    if weights:
        file = source if name.endswith(".json") else None
        load_weights(model, weights.path, name=name, cfg=model_cfg, config_file=file, allow_pickle=allow_pickle)
    tokenizer = _tokenizer(model, model_cfg, None, source, trained=weights is not None)
    return _wrap_open_clip(name, model, tokenizer, model_cfg)


def _named_config(name: str) -> tuple[dict, Settings | None, str, str]:
    """Config of a named architecture or a JSON file, its own settings if any, its source, and whose tags apply."""
    if name.endswith(".json"):
        content = read_json(Path(name))
        if "model_cfg" not in content:
            return check_model_config(content, name), None, name, ""
        cfg = check_model_config(content["model_cfg"], name)
        preprocess = check_preprocess(content.get("preprocess_cfg") or {}, name)
        check_size(preprocess, cfg, name)
        return cfg, settings_of(preprocess, quick_gelu=bool(cfg.get("quick_gelu"))), name, ""
    bundled = MODEL_CONFIGS / f"{name}.json"
    if name in list_students():
        return check_model_config(read_json(bundled), str(bundled)), None, name, ""
    architecture = name.replace("/", "-")
    cfg = open_clip.get_model_config(architecture)
    if cfg is None:
        raise UserError(
            f"unknown model {name!r}: take one of {', '.join(list_students())}, a name of open_clip.list_models(), "
            "hf-hub:org/repo, local-dir:path, transformers:org/repo or a .json model config"
        )
    return check_model_config(cfg, name), None, name, architecture


def _fetch_model(repo: str, *, allow_pickle: bool, random_weights: bool) -> Path:
    """The local folder of a Hub repository, without its weights for random ones."""
    if random_weights:
        return fetch(repo, files=_CONFIG_FILES, pickles=(), allow_pickle=False)
    return fetch(repo, files=(*_CONFIG_FILES, "*.safetensors"), pickles=_PICKLES, allow_pickle=allow_pickle)


def _load_open_clip_folder(name: str, prefix: str, rest: str, *, allow_pickle: bool, random_weights: bool) -> Clip:
    folder = (
        Path(rest)
        if prefix == "local-dir"
        else _fetch_model(rest, allow_pickle=allow_pickle, random_weights=random_weights)
    )
    if not folder.is_dir():
        raise UserError(f"folder {rest!r} of {name!r} does not exist")
    config_path = folder / FOLDER_CONFIG
    if not config_path.is_file():
        is_transformers = (folder / "config.json").is_file()
        remedy = f"try transformers:{rest}" if is_transformers else "name a folder in open_clip's Hub format"
        raise UserError(f"{rest!r} holds no open_clip_config.json: {remedy}")
    weights = None if random_weights else _weights_file(folder)
    if weights is not None:
        refuse_pickle(weights, allow_pickle=allow_pickle)
    elif not random_weights:  # open_clip would silently use random weights
        raise UserError(f"{rest!r} holds no weights: expected open_clip_model.safetensors")
    source, content = str(config_path), read_json(config_path)
    model_cfg = check_model_config(content.get("model_cfg"), source)
    preprocess = check_preprocess(content.get("preprocess_cfg") or {}, source)
    check_size(preprocess, model_cfg, source)
    check_formats(config_path)
    if weights is not None:
        refuse_default(preprocess, model_cfg, source)
    model = build_open_clip(model_cfg, source, pretrained_text=False, allow_pickle=allow_pickle)
    check_widths(model, model_cfg, source)
    _set_preprocess(model, preprocess, source)
    if weights is not None:
        load_weights(model, weights, name=name, cfg=model_cfg, config_file=source, allow_pickle=allow_pickle)
    # Also of random weights: an export of them is loaded as trained ones.
    tokenizer = _tokenizer(model, model_cfg, folder, source, trained=True)
    return _wrap_open_clip(name, model, tokenizer, model_cfg)


def _tokenizer(model: Any, model_cfg: dict, folder: Path | None, source: str, *, trained: bool) -> Any:
    """The model's tokenizer, of which every token has an embedding."""
    tokenizer = tokenizer_for(model_cfg, folder=folder, source=source)
    check_tokenizer(tokenizer, model, model_cfg, folder=folder, source=source, trained=trained)
    return tokenizer


def _set_preprocess(model: Any, preprocess: dict, source: str) -> None:
    """Attaches preprocessing to an open_clip model as open_clip's factory does: the size is the model's."""
    size = model.visual.image_size
    if not is_square(size):
        raise UserError(f"{source} takes images of {size[0]} x {size[1]} pixels: only square models are supported")
    set_model_preprocess_cfg(model, merge_preprocess_dict(PreprocessCfg(), preprocess) | {"size": size})


def _weights_file(folder: Path) -> Path | None:
    """The file that open_clip loads: one of `WEIGHTS_NAMES`, else any safetensors, else any pickle."""
    named = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
    others = [path for suffix in ("safetensors", "bin", "pth") for path in sorted(folder.glob(f"*.{suffix}"))]
    return next(iter([*named, *others]), None)


def _load_transformers(name: str, source: str, *, allow_pickle: bool, random_weights: bool) -> Clip:
    folder = (
        Path(source)
        if Path(source).is_dir()
        else _fetch_model(source, allow_pickle=allow_pickle, random_weights=random_weights)
    )
    config = load_config(folder, name)
    _check_towers(config, folder / "config.json", name)
    check_formats(folder / FOLDER_CONFIG)
    if random_weights:
        model = random_transformers_model(config, name)
    else:
        model = load_transformers_model(folder, config, name, allow_pickle=allow_pickle)
    tokenizer = load_tokenizer(folder, name)
    check_vocabulary(tokenizer, config.text_config.vocab_size, name, trained=True)
    # CLIP pools a text at this token; 2 is an old config's and means the highest token id.
    eos = config.text_config.eos_token_id
    if config.model_type == "clip" and eos not in (2, tokenizer.eos_token_id):
        raise UserError(
            f"text_config.eos_token_id in {folder / 'config.json'} is {eos}, its tokenizer's is "
            f"{tokenizer.eos_token_id}: correct it"
        )
    processor, size = load_image_processor(folder, name), config.vision_config.image_size
    preprocess = from_image_processor(processor, image_size=size, source=f"the image processor of {name!r}")
    tokenize = PaddedTokens(tokenizer, get_clean_fn(cleaning_of(config)), config.text_config.max_position_embeddings)
    return Clip(name, TransformersTowers(model), preprocess, tokenize, tokenizer, model_cfg=None)


def cleaning_of(config: Any) -> str:
    """open_clip's name of the cleaning of texts before the tokenizer of a transformers model.

    CLIP was trained on text cleaned by ftfy and without HTML entities; SigLIP 1 and 2, in open_clip and in big_vision's
    zero-shot evaluation, also without case and punctuation.
    """
    return "canonicalize" if config.model_type == "siglip" else "whitespace"


def _check_towers(config: Any, file: Path, name: str) -> None:
    """Raises: UserError for a transformers config of another kind of model than two towers with one embedding."""
    if config.model_type == "siglip2":
        raise UserError(
            f"{name!r} is a NaFlex SigLIP 2, whose images have no fixed size: take one of fixed size, "
            "such as transformers:google/siglip2-base-patch16-224"
        )
    if config.model_type not in _TRANSFORMERS_TYPES:
        raise UserError(
            f"{name!r} is a {config.model_type!r} model: only clip, siglip and SigLIP 2 of fixed size are supported"
        )
    check_transformers_config(config, file)
    if config.model_type == "siglip" and not config.vision_config.vision_use_head:
        raise UserError(
            f"vision_config.vision_use_head in {file} is false, and this head makes the image embeddings: take a "
            "model that has it"
        )
    size = config.vision_config.image_size
    if not isinstance(size, int):
        raise UserError(f"image_size in {file} is {size!r}: only square models are supported")


@dataclass(frozen=True)
class PaddedTokens:
    """Cleans texts, then pads or cuts their tokens to one length. A class, so that worker processes can be sent it."""

    tokenizer: Any
    clean: Callable[[str], str]
    length: int

    def __call__(self, texts: list[str]) -> Int[Tensor, "n length"]:
        cleaned = [self.clean(text) for text in texts]
        settings = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return self.tokenizer(cleaned, **settings).input_ids


def _wrap_open_clip(name: str, model: nn.Module, tokenizer: Any, model_cfg: dict | None) -> Clip:
    preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    is_hf = isinstance(tokenizer, open_clip.tokenizer.HFTokenizer)
    return Clip(
        name=name,
        towers=OpenClipTowers(model),
        preprocess=preprocess,
        tokenize=tokenizer,
        hf_tokenizer=tokenizer.tokenizer if is_hf else None,
        model_cfg=model_cfg,
    )
