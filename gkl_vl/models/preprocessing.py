"""Image preprocessing as open_clip's `PreprocessCfg`: from its JSON, from and to transformers' image processors.

open_clip's evaluation transform resizes the shorter side and crops the centre (`shortest`), resizes to the square
whatever the shape (`squash`), or resizes the longer side and pads (`longest`); then it scales to [0, 1] and normalises.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from open_clip.model import CLIPVisionCfg
from open_clip.transform import PreprocessCfg
from timm.layers.helpers import to_2tuple
from transformers import CLIPImageProcessor

from gkl_vl.errors import UserError

_PIL_NUMBERS = {"bilinear": 2, "bicubic": 3}  # PIL's enum, which transformers stores
_INTERPOLATIONS = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}
_CHOICES = {"mode": ("RGB",), "interpolation": ("bicubic", "bilinear", "random")}
_CHOICES |= {"resize_mode": ("shortest", "longest", "squash")}
# Fields of an image processor that are read here, and those that change no pixel of an RGB image.
_READ = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "size", "crop_size", "resample"}
_READ |= {"rescale_factor", "image_mean", "image_std"}
# Processors that do no more than these fields say; transformers 4 also had them with "Fast", 5 has them with "Pil".
_STOCK = ("CLIP", "Siglip", "ViT", "DeiT", "Bit", "Blip", "ChineseCLIP")
_TYPES = {None, *(f"{name}ImageProcessor{variant}" for name in _STOCK for variant in ("", "Fast", "Pil"))}
_NEUTRAL = {"do_convert_rgb", "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class"}
_NEUTRAL |= {"data_format", "input_data_format", "return_tensors", "default_to_square", "use_fast", "device"}
_NEUTRAL |= {"disable_grouping", "backend", "model_input_names"}


def check_preprocess(cfg: Any, source: str) -> dict:
    """Checks an open_clip `preprocess_cfg` and returns its fields; those that are null have open_clip's default.

    Raises:
        UserError: unknown keys or values, naming `source`, the file.
    """
    if not isinstance(cfg, dict):
        raise UserError(f"preprocess_cfg in {source} is {cfg!r}: expected an object with mean, std, interpolation")
    known = PreprocessCfg.__dataclass_fields__
    checked = {key: value for key, value in cfg.items() if value is not None}
    for key, value in checked.items():
        place = f"preprocess_cfg.{key} in {source}"
        if key not in known:
            raise UserError(f"{place} is unknown: remove it; known are {', '.join(known)}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UserError(f"{place} is {value!r}: write one of {', '.join(_CHOICES[key])}")
        if key in ("mean", "std"):
            checked[key] = three_numbers(value, place, positive=key == "std")
            if key == "mean":
                _refuse_levels(checked[key], place)
        elif key in ("size", "fill_color") and not _is_size(value):
            raise UserError(f"{place} is {value!r}: expected a number of pixels or levels")
    return checked


def check_size(preprocess: Mapping[str, Any], cfg: Mapping[str, Any], source: str) -> None:
    """Raises: UserError if a `preprocess_cfg` has another size than the images of its model config."""
    ours, theirs = preprocess.get("size"), CLIPVisionCfg(**cfg["vision_cfg"]).image_size
    if ours is not None and tuple(to_2tuple(ours)) != tuple(to_2tuple(theirs)):
        raise UserError(
            f"preprocess_cfg.size in {source} is {ours}, vision_cfg.image_size is {theirs}: give both the size of "
            "the training"
        )


def from_image_processor(fields: dict, *, image_size: int, source: str) -> PreprocessCfg:
    """Reads all fields of a transformers image processor, its `to_dict()`.

    Args:
        image_size: side of the model's input.
        source: the file, for messages.

    Raises:
        UserError: steps that open_clip's transform does not have, another size than the model's.
    """
    if (stock := fields.get("image_processor_type")) not in _TYPES:
        raise UserError(f"{source} is a {stock}, whose steps are not known: take one of {', '.join(_STOCK)}")
    for key, value in fields.items():
        if key in _READ and key.startswith("do_") and not isinstance(value, bool | None):
            raise UserError(f"{key} in {source} is {value!r}: write true or false")
        if key not in _READ | _NEUTRAL and value not in (None, False):
            raise UserError(f"{key} {value!r} in {source} is not supported: only resize, crop, normalise")
    if fields.get("do_resize") is not True:
        raise UserError(f"{source} does not resize (do_resize {fields.get('do_resize')}): set do_resize to true")
    resample = fields.get("resample")
    if not isinstance(resample, int) or isinstance(resample, bool):
        raise UserError(f"resample in {source} is {resample!r}: write 2 (bilinear) or 3 (bicubic)")
    interpolation = _INTERPOLATIONS.get(resample, str(resample))
    if interpolation not in _PIL_NUMBERS:
        raise UserError(
            f"{source} resizes with {interpolation} (resample {resample:d}): only bilinear (2) and bicubic (3) work"
        )
    # Without rescaling the normalisation is on levels from 0 to 255, here it is on [0, 1].
    factor: Any = fields.get("rescale_factor") if fields.get("do_rescale") else 1
    if not is_number(factor) or factor <= 0:
        raise UserError(f"rescale_factor in {source} is {factor!r}: expected a positive number, such as 1/255")
    scale = 255 * float(factor)
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    mean, std = (0.0,) * 3, (1.0,) * 3
    if fields.get("do_normalize"):
        mean = three_numbers(fields.get("image_mean"), f"image_mean in {source}", positive=False)
        std = three_numbers(fields.get("image_std"), f"image_std in {source}", positive=True)
    mean = tuple(value / scale for value in mean)
    _refuse_levels(mean, f"image_mean in {source}")
    return PreprocessCfg(
        size=image_size,
        mean=mean,
        std=tuple(value / scale for value in std),
        interpolation=interpolation,
        resize_mode=_resize_mode(fields, image_size, source),
    )


def to_image_processor(preprocess: PreprocessCfg) -> CLIPImageProcessor:
    """The transformers image processor with the same steps; `has_image_processor(preprocess)` must be true."""
    size = preprocess.size if isinstance(preprocess.size, int) else preprocess.size[0]
    squash = preprocess.resize_mode == "squash"
    return CLIPImageProcessor(
        size={"height": size, "width": size} if squash else {"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_center_crop=not squash,
        resample=_PIL_NUMBERS["bilinear" if preprocess.interpolation == "bilinear" else "bicubic"],
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
    )


def has_image_processor(preprocess: PreprocessCfg) -> bool:
    """Whether transformers' `CLIPImageProcessor` has the same steps: a square input, not padded."""
    return preprocess.resize_mode != "longest" and is_square(preprocess.size)


def is_square(size: int | Sequence[int]) -> bool:
    return isinstance(size, int) or len(set(size)) == 1


def _resize_mode(fields: dict, image_size: int, source: str) -> str:
    size, crops = _sides(fields.get("size"), square=False), bool(fields.get("do_center_crop"))
    square = {"height": image_size, "width": image_size}
    crop = _sides(fields.get("crop_size"), square=True)
    if crops and crop != square:
        raise UserError(f"{source} crops to {crop}, the model takes {image_size} x {image_size} pixels: correct one")
    if size == square:
        return "squash"
    if size == {"shortest_edge": image_size} and crops:
        return "shortest"
    then = f"then crops to {image_size} x {image_size}" if crops else "without a crop"
    raise UserError(
        f"{source} resizes to {size} {then}: only shortest_edge {image_size} with a centre crop, or height and width "
        f"{image_size}, are supported for this model of {image_size} x {image_size} pixels"
    )


def _sides(size: Any, *, square: bool) -> dict[str, Any]:
    """A size as transformers stores it, without its empty fields; a bare number is the shorter side or the square."""
    if isinstance(size, int):
        return {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, list | tuple) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def three_numbers(values: Any, place: str, *, positive: bool) -> tuple[float, float, float]:
    """Mean or std of the channels, of which one number stands for three. Raises: UserError that names `place`."""
    values = (values,) * 3 if is_number(values) else values
    numbers = values if isinstance(values, list | tuple) else []
    fine = len(numbers) == 3 and all(is_number(v) for v in numbers)
    if not fine or (positive and min(numbers) <= 0):
        raise UserError(f"{place} is {values!r}: expected three {'positive ' if positive else ''}numbers")
    red, green, blue = (float(v) for v in numbers)
    return red, green, blue


def _refuse_levels(mean: Sequence[float], place: str) -> None:
    """Raises: UserError for the mean of levels up to 255 where that of pixels in [0, 1] belongs."""
    if max(mean) > 1:
        raise UserError(f"{place} is {list(mean)} on pixels in [0, 1]: divide mean and std by 255")


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number, of a size that a mean or a factor can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_size(value: Any) -> bool:
    numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
