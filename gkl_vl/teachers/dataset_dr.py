"""Data sets that MobileCLIP's authors reinforced (DataCompDR, DFNDR) as a store: the embeddings are in the samples.

A sample of a shard, with the names of RayGen, which writes them:

    KEY.jpg, KEY.txt    image, of the size that was embedded, and caption
    KEY.syn.json        {"syn_text": [synthetic captions]}; several lists have a name each
    KEY.paug.json       {"param_aug": parameters}; the released files have the parameters as a text in JSON
    KEY.npz             arrays in float32; or KEY.pth.gz, tensors in bfloat16
        image_emb       [v, e]         of the augmented views of the image
        text_emb        [1 + c, e]     of .txt, then of the synthetic captions; or of .txt alone, and
        syn_text_emb    [c, e]         of the synthetic captions

The parameters are a list of v lists. Each has one entry for each random transform of the configuration, in this order:

    random_resized_crop       [top, left, height, width], in pixels of the image
    random_horizontal_flip    whether it flips
    rand_augment              [[operation, magnitude], ...], an operation by its number in `_OPERATIONS`

null = the transform was skipped. All else is constant, and is in the configuration (docs/teachers.md).
Axis letters: v = views of an image, c = synthetic captions, e = dimensions of all teachers, side by side, s = side of a
view.

Source: Vasu et al., CVPR 2024, arXiv 2311.17049; apple/ml-mobileclip `training/dr/transforms.py` and the patches of
open_clip beside it; apple/ml-mobileclip-dr `raygen/datasetio.py`.
"""

import gzip
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from gkl_vl.data.captions import CaptionRule, parsed, usable_captions
from gkl_vl.data.images import BrokenSample
from gkl_vl.data.prompts import Prompts
from gkl_vl.data.sources import RawPair, Source, with_members
from gkl_vl.errors import UserError, first_line
from gkl_vl.reading import read_json
from gkl_vl.teachers.embeddings import StoredTeacher
from gkl_vl.teachers.online import numbered

MEMBERS = ("txt", "syn.json", "paug.json", "npz", "pth.gz")
"""Endings of the members that are read beside the image."""
SECTION = "docs/teachers.md, MobileCLIP's DR folders"
CHECKED = 20
"""Samples among which one that is not broken is looked for before training."""
UNIT_TOLERANCE = 0.05
"""By which the length of an embedding may differ from 1. bfloat16 changes it by less than 0.01."""

_FIXED = ("to_rgb", "to_tensor", "normalize")
"""Transforms without parameters, which are part of every view here."""
_RANDOM = {
    "random_resized_crop": {"size", "interpolation", "antialias", "scale", "ratio"},
    "random_horizontal_flip": {"p"},
    "rand_augment": {"p", "num_ops", "magnitude", "num_magnitude_bins"},
}
"""Transforms with parameters, in the order in which they are applied, and the settings that they may have."""


# ---- the configuration -------------------------------------------------------------------------------------------


def read_dataset_dr(path: str) -> "DatasetDr":
    """Reads a configuration: MobileCLIP's, with `teacher_dimension` and `teacher_scale` for each teacher added.

    Raises: UserError for a file that is no such configuration, and for views that cannot be replayed.
    """
    content, store = read_json(path), f"--teacher-store {path}"
    needed = ("model_name", "num_samples", "teacher_dimension", "teacher_scale", "reinforce")
    if missing := [name for name in needed if name not in content]:
        raise UserError(f"{store} lacks {', '.join(missing)}: add them as {SECTION}, says")
    try:
        models, tags = content["model_name"].split(","), content.get("pretrained", "").split(",")
        transforms = {name: dict(settings) for name, settings in content["reinforce"]["image_augmentation"].items()}
        dims, scales, views = content["teacher_dimension"], content["teacher_scale"], content["num_samples"]
        tags = tags if any(tags) else [""] * len(models)
        counts = [len(models), len(tags), len(dims), len(scales)]
        sound = all(type(number) is int and number > 0 for number in (views, *dims))
        sound = sound and all(math.isfinite(scale) and scale > 0 for scale in scales)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{store} is damaged ({first_line(error)}): fetch it again") from error
    if not sound:
        raise UserError(f"{store}: num_samples, teacher_dimension and teacher_scale must be numbers above 0")
    if len(set(counts)) > 1:
        raise UserError(
            f"{store} has {counts[0]} of model_name, {counts[1]} of pretrained, {counts[2]} of teacher_dimension and "
            f"{counts[3]} of teacher_scale: give one for each teacher"
        )
    enabled = {name: settings for name, settings in transforms.items() if settings.pop("enable", True)}
    size, interpolation = _crop_of(store, enabled)
    teachers = [
        StoredTeacher(
            name=model if tag in ("", "N/A") else f"{model} ({tag})",
            digest="",  # of the weights nothing is known
            embed_dim=dim,
            logit_scale=float(scale),
            logit_bias=None,
        )
        for model, tag, dim, scale in zip(models, tags, dims, scales, strict=True)
    ]
    return DatasetDr(
        path=path,
        views=views,
        teachers=tuple(teachers),
        transforms=tuple(name for name in _RANDOM if name in enabled),
        interpolation=interpolation,
        recorded_size=size,
        size=size,
    )


def _crop_of(store: str, enabled: dict[str, dict[str, Any]]) -> tuple[int, InterpolationMode]:
    """Side and interpolation of the views. Raises: UserError for transforms that cannot be replayed."""
    known = {name: set() for name in _FIXED} | _RANDOM
    if unknown := [name for name in enabled if name not in known]:
        raise UserError(
            f"{store}: views with {', '.join(unknown)} cannot be replayed, only those with {', '.join(known)}"
        )
    for name, settings in enabled.items():
        if name in _RANDOM and (unknown := sorted(settings.keys() - _RANDOM[name])):
            raise UserError(f"{store}: views with {', '.join(unknown)} in {name} cannot be replayed")
    if "size" not in enabled.get("random_resized_crop", {}):
        raise UserError(f"{store}: views without random_resized_crop and its size cannot be replayed")
    crop = enabled["random_resized_crop"]
    sides = crop["size"] if isinstance(crop["size"], list) else [crop["size"]]
    if len(sides) not in (1, 2) or any(type(side) is not int or side < 1 or side != sides[0] for side in sides):
        raise UserError(f"{store}: views of the size {crop['size']!r} cannot be replayed, only square ones")
    try:
        return sides[0], InterpolationMode(crop.get("interpolation", "bilinear"))
    except ValueError as error:
        raise UserError(f"{store}: views resized by {crop['interpolation']!r} cannot be replayed") from error


# ---- a sample ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DatasetDr:
    """The embeddings in the samples of a source, and its views, replayed from their parameters. Picklable."""

    path: str
    """Of the configuration."""
    views: int
    """Views of each image."""
    teachers: Sequence[StoredTeacher]
    transforms: tuple[str, ...]
    """The random ones, as their parameters are stored."""
    interpolation: InterpolationMode
    """Of the crop."""
    recorded_size: int
    """Side of the views that were embedded."""
    size: int
    """Side of the views that are replayed."""

    def at_size(self, size: int) -> "DatasetDr":
        """With views of this side."""
        return replace(self, size=size)

    def with_embeddings(self, source: Source) -> Source:
        """The source, with the members of its samples that `of_pair` reads. Raises: UserError as `with_members`."""
        return with_members(source, MEMBERS)

    def check(self, source: Source) -> None:
        """Raises: UserError for a source that is not of shards or has no captions, and for one whose first whole sample
        is of another configuration or is split otherwise between the teachers."""
        if not source.captioned:
            raise self._no_classes()
        for pair in islice(self.with_embeddings(source).pairs.read(0), CHECKED):
            try:
                outputs = self.of_pair(pair, 0, [0])
            except BrokenSample:  # training counts it
                continue
            images = [outputs[numbered("teacher_image", number)] for number in range(len(self.teachers))]
            lengths = [image.norm().item() for image in images]
            if max(abs(length - 1) for length in lengths) > UNIT_TOLERANCE:
                raise UserError(
                    f"--teacher-store {self.path}: split by teacher_dimension, the embeddings of {pair.key!r} have "
                    f"lengths of {', '.join(f'{length:.2f}' for length in lengths)}, and all of a teacher's have 1: "
                    "correct it"
                )
            return

    def classes(self, prompts: Prompts) -> list[Float[Tensor, "C _e"]]:
        """Raises: UserError, since there are none."""
        raise self._no_classes()

    def _no_classes(self) -> UserError:
        return UserError(
            f"--teacher-store {self.path} has embeddings of captions and none of class prompts: train with "
            "recipes/clip_kd.py"
        )

    def of_pair(self, pair: RawPair, view: int, captions: Sequence[int]) -> dict[str, Tensor]:
        """Of a view and of usable captions by number: {"image": [3, s, s], "teacher_image": [dim]}, with captions
        "teacher_text" [len(captions), dim]; further teachers by `online.numbered`.

        Raises: BrokenSample for a sample without the members, or with damaged ones; UserError for one of another
            configuration, and for a caption without embedding.
        """
        if pair.problem:
            raise BrokenSample(pair.problem)
        parameters = self._parameters(pair)
        arrays = _arrays(pair)
        dims = [teacher.embed_dim for teacher in self.teachers]
        images = _array(arrays, "image_emb")
        if images.shape != (self.views, sum(dims)) or len(parameters) != self.views:
            raise UserError(
                f"--teacher-store {self.path} says {self.views} views and {' + '.join(map(str, dims))} dimensions, and "
                f"{pair.key!r} has {len(parameters)} views and embeddings of the shape {list(images.shape)}: correct "
                "num_samples and teacher_dimension"
            )
        rows = {"teacher_image": images[view]}
        if captions:
            rows["teacher_text"] = self._texts(pair, arrays, captions)
        if not all(part.isfinite().all() for part in rows.values()):
            raise BrokenSample("embeddings that are not finite")
        outputs = {"image": self._replayed(_decoded(pair.image), parameters[view])}
        for name, part in rows.items():
            for number, of_teacher in enumerate(part.split(dims, dim=-1)):
                outputs[numbered(name, number)] = of_teacher
        return outputs

    def _texts(self, pair: RawPair, arrays: dict[str, Tensor], captions: Sequence[int]) -> Float[Tensor, "_captions e"]:
        """Embeddings of usable captions by number."""
        known, usable = _by_text(pair, arrays), usable_captions(pair.captions)
        chosen = [usable[number] for number in captions]
        if missing := [text for text in chosen if text not in known]:
            raise UserError(
                f"--teacher-store {self.path}: {pair.key!r} has no embedding of its caption {missing[0]!r}: read the "
                "captions that were embedded, with --columns jpg txt syn.json.syn_text"
            )
        rows = torch.stack([known[text] for text in chosen])
        if rows.shape[1] != arrays["image_emb"].shape[1]:
            raise BrokenSample(f"text embeddings of {rows.shape[1]} dimensions")
        return rows

    # ---- views

    def _parameters(self, pair: RawPair) -> list[Any]:
        """The parameters of each view, not checked."""
        if "paug.json" not in pair.members:
            raise BrokenSample("no .paug.json: pack it into the sample of its image")
        record = parsed(pair.members["paug.json"])
        parameters = record.get("param_aug") if isinstance(record, dict) else None
        try:
            parameters = json.loads(parameters) if isinstance(parameters, str) else parameters
        except (ValueError, RecursionError) as error:
            raise BrokenSample(f"its .paug.json is damaged ({first_line(error)})") from error
        if not isinstance(parameters, list):
            raise BrokenSample("its .paug.json is damaged: it has no list of parameters")
        return parameters

    def _replayed(self, image: Any, parameters: Any) -> UInt8[Tensor, "3 s s"]:
        """The view with these parameters, at `size`."""
        if not isinstance(parameters, list) or len(parameters) != len(self.transforms):
            raise UserError(
                f"--teacher-store {self.path} has the random transforms {', '.join(self.transforms)}, and a view was "
                f"stored with the parameters {json.dumps(parameters)[:100]}: name the configuration of its data"
            )
        for transform, values in zip(self.transforms, parameters, strict=True):
            if transform == "random_resized_crop":
                box = _box(values, image)
                image = F.resized_crop(image, *box, size=[self.size] * 2, interpolation=self.interpolation)
            elif values is None:
                continue
            elif transform == "random_horizontal_flip":
                image = F.horizontal_flip(image) if _flips(values) else image
            else:
                for operation, magnitude in self._operations(values):
                    image = operation(image, magnitude, self.size / self.recorded_size)
        return F.pil_to_tensor(image)

    def _operations(self, values: Any) -> list[tuple["Operation", float]]:
        """The operations of rand_augment and their magnitudes."""
        try:
            steps = [(index, float(magnitude)) for index, magnitude in values]
            sound = all(type(index) is int and math.isfinite(magnitude) for index, magnitude in steps)
        except (TypeError, ValueError) as error:
            raise BrokenSample(f"its .paug.json is damaged ({first_line(error)})") from error
        if not sound:
            raise BrokenSample("its .paug.json is damaged: an operation or a magnitude is no number")
        if unknown := [index for index, _ in steps if not 0 <= index < len(_OPERATIONS)]:
            raise UserError(
                f"--teacher-store {self.path}: views with operation {unknown[0]} of rand_augment cannot be replayed, "
                f"it has the operations 0 to {len(_OPERATIONS) - 1}"
            )
        return [(_OPERATIONS[index], magnitude) for index, magnitude in steps]


def _decoded(content: Any) -> Image.Image:
    """The image as it was embedded: not turned by its EXIF orientation, with transparency left out."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return opened.convert("RGB") if opened.mode == "RGB" else opened.convert("RGBA").convert("RGB")
    except Exception as error:  # PIL raises nearly any exception type on broken files, all with the same meaning
        raise BrokenSample(f"image: {error}") from error


def _box(values: Any, image: Image.Image) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop. Raises: BrokenSample for a box that is not within the image."""
    if not isinstance(values, list) or len(values) != 4 or any(type(value) is not int for value in values):
        raise BrokenSample("its .paug.json is damaged: a crop is no box")
    top, left, height, width = values
    if min(top, left) < 0 or min(height, width) < 1 or top + height > image.height or left + width > image.width:
        raise BrokenSample(
            f"a crop of {width}x{height} at ({left}, {top}) in an image of {image.width}x{image.height}: it needs the "
            "image at its original size"
        )
    return top, left, height, width


def _flips(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BrokenSample("its .paug.json is damaged: a flip is neither true nor false")
    return value


def _arrays(pair: RawPair) -> dict[str, Tensor]:
    """The embeddings in float32, by name. Of both files that in float32 is read."""
    members = pair.members
    if "npz" not in members and "pth.gz" not in members:
        raise BrokenSample("no .npz and no .pth.gz: pack its embeddings into the sample of its image")
    try:
        if "npz" in members:
            with np.load(io.BytesIO(members["npz"]), allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]).float() for name in file.files}
        content = io.BytesIO(gzip.decompress(members["pth.gz"]))
        tensors = torch.load(content, map_location="cpu", weights_only=True)
        return {name: rows.float() for name, rows in tensors.items()}
    except Exception as error:  # as with images
        raise BrokenSample(f"its embeddings cannot be read ({first_line(error)})") from error


def _array(arrays: dict[str, Tensor], name: str) -> Tensor:
    if name not in arrays:
        raise BrokenSample(f"no {name} among its embeddings, only {', '.join(arrays)}")
    return arrays[name]


def _by_text(pair: RawPair, arrays: dict[str, Tensor]) -> dict[str, Float[Tensor, " e"]]:
    """The embedding of each caption that has one, by the caption without spaces around it."""
    if "txt" not in pair.members:
        raise BrokenSample("no .txt: pack it into the sample of its image")
    real, text_emb = list(CaptionRule().in_text(pair.members["txt"])), _array(arrays, "text_emb")
    synthetic = parsed(pair.members["syn.json"]) if "syn.json" in pair.members else {}
    if not isinstance(synthetic, dict) or not all(map(_is_texts, synthetic.values())):
        raise BrokenSample("its .syn.json is damaged: it holds other values than lists of texts")
    if len(text_emb) > len(real):
        embedded = [(real + [text for texts in synthetic.values() for text in texts], text_emb)]
    else:
        embedded = [(real, text_emb)]
        embedded += [(texts, arrays[f"{name}_emb"]) for name, texts in synthetic.items() if f"{name}_emb" in arrays]
    for texts, rows in embedded:
        if rows.ndim != 2 or len(rows) != len(texts):
            raise BrokenSample(f"embeddings of the shape {list(rows.shape)} for {len(texts)} captions")
    return {text.strip(): row for texts, rows in embedded for text, row in zip(texts, rows, strict=True)}


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


# ---- the operations of RandAugment -------------------------------------------------------------------------------

Operation = Callable[[Any, float, float], Any]
"""(PIL image, magnitude, side of the view / side of the view that was embedded) -> PIL image."""


def _affine(image: Any, *, shift: Sequence[float] = (0, 0), shear: Sequence[float] = (0, 0)) -> Any:
    """`shift` in pixels; `shear` as tangents, from the upper left corner."""
    return F.affine(
        image,
        angle=0,
        translate=[round(pixels) for pixels in shift],
        scale=1,
        shear=[math.degrees(math.atan(tangent)) for tangent in shear],
        interpolation=InterpolationMode.NEAREST,
        center=[0, 0],
    )


# torchvision's operations with its defaults, nearest neighbours and black corners. A shift is stored in whole pixels of
# the view that was embedded, and is the same share of a view of another size.
_OPERATIONS: tuple[Operation, ...] = (
    lambda image, magnitude, scale: image,
    lambda image, magnitude, scale: _affine(image, shear=(magnitude, 0)),
    lambda image, magnitude, scale: _affine(image, shear=(0, magnitude)),
    lambda image, magnitude, scale: _affine(image, shift=(int(magnitude) * scale, 0)),
    lambda image, magnitude, scale: _affine(image, shift=(0, int(magnitude) * scale)),
    lambda image, magnitude, scale: F.rotate(image, magnitude, interpolation=InterpolationMode.NEAREST),
    lambda image, magnitude, scale: F.adjust_brightness(image, 1 + magnitude),
    lambda image, magnitude, scale: F.adjust_saturation(image, 1 + magnitude),
    lambda image, magnitude, scale: F.adjust_contrast(image, 1 + magnitude),
    lambda image, magnitude, scale: F.adjust_sharpness(image, 1 + magnitude),
    lambda image, magnitude, scale: F.posterize(image, int(magnitude)),
    lambda image, magnitude, scale: F.solarize(image, magnitude),
    lambda image, magnitude, scale: F.autocontrast(image),
    lambda image, magnitude, scale: F.equalize(image),
)
