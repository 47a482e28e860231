"""Further formats of an exported CLIP in its folder: ONNX, int8, transformers. Each is checked before it is kept."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from gkl_vl.atomic import read_json as read_own_json
from gkl_vl.atomic import replacing_folder, write_json, write_text
from gkl_vl.data.images import BrokenImage, decode
from gkl_vl.data.pairs import open_source
from gkl_vl.data.sources import Source
from gkl_vl.errors import UserError, notice
from gkl_vl.evaluation.benchmark import set_record
from gkl_vl.evaluation.embed import Embedder, require_classes
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.export.cards import FormatFacts, with_formats
from gkl_vl.export.hub import CARD_NAME, CONFIG_NAME, TRANSFORMERS_WEIGHTS_NAME, WEIGHTS_NAME, holds_model
from gkl_vl.export.int8 import CALIBRATION_IMAGES, COMPARED, check_drop, refuse_chance, write_int8
from gkl_vl.export.onnx_format import INPUTS_CHECKED, check, write_onnx
from gkl_vl.export.transformers_format import fits_transformers, write_transformers
from gkl_vl.models import onnx
from gkl_vl.models.clip import Clip, holds_transformers_config, load_clip
from gkl_vl.models.towers import TransformersTowers

Format = Literal["onnx", "int8", "transformers"]
FORMATS: tuple[Format, ...] = ("onnx", "int8", "transformers")
MAX_DROP = 1.0
_TRANSFORMERS_FILES = ("preprocessor_config.json", TRANSFORMERS_WEIGHTS_NAME, "config.json")
"""Files that no other format has, in the order in which they are put in place: the config makes a model of them."""


def write_formats(
    folder: Path,
    formats: Sequence[Format],
    *,
    images: Source | None = None,
    sets: Sequence[BenchmarkSet] = (),
    max_drop: float = MAX_DROP,
) -> None:
    """Writes formats of the exported model in `folder` there, and a section on them into its README.md.

    ONNX goes to onnx/, which is replaced whole; int8 is made from it and stands beside it. Nothing is written unless
    all of the formats pass.

    Args:
        folder: a run folder or an exported CLIP.
        images: real images, of which the first are the inputs of the comparison and of int8's calibration; None =
            those of the bundled emoji, whose captions are the texts in either case.
        sets: with labels or captions, on which int8 is compared with the model.
        max_drop: points that int8 may lose on them.

    Raises:
        UserError: no model, packages that are not installed, a model that has not this format, a failed comparison, a
            larger loss, other files in the way.
    """
    folder = model_folder(folder)
    clip = _loaded(folder)
    check_formats(clip, formats, sets)
    _refuse_foreign(folder, formats)
    pixels, texts = real_inputs(clip, images)
    before = [_record(clip, dataset) for dataset in sets] if "int8" in formats else []
    refuse_chance(before)
    checked = pixels[:INPUTS_CHECKED]
    had_int8 = (folder / onnx.SUBFOLDER / onnx.file_name("image", int8=True)).is_file()
    with ExitStack() as stack:
        if "transformers" in formats and not _is_transformers(folder):
            scratch = stack.enter_context(_adding(folder))
            write_transformers(clip=clip, folder=scratch, tensors=load_file(folder / WEIGHTS_NAME))
            check(clip, load_clip(f"transformers:{scratch}"), checked, texts)
        if {"onnx", "int8"} & set(formats):
            scratch = stack.enter_context(replacing_folder(folder / onnx.SUBFOLDER))
            config = write_onnx(clip=clip, folder=scratch, pixels=checked, texts=texts)
            if "int8" in formats:
                config["int8"] = _quantised(scratch, pixels, sets, before, max_drop)
            config["files"] = sorted(path.name for path in scratch.iterdir())
            write_json(scratch / onnx.CONFIG_NAME, config, indent=2)
    if had_int8 and "onnx" in formats and "int8" not in formats:
        notice(f"the int8 files in {str(folder / onnx.SUBFOLDER)!r} were of the earlier export and are left out")
    if (folder / CARD_NAME).is_file():
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        write_text(folder / CARD_NAME, with_formats(card, facts_of(folder)))


# ---- what can be refused before anything is computed ---------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    """The folder of an exported CLIP: this one, or model/ in it. Raises: UserError."""
    for place in (folder, folder / "model"):
        if (place / CONFIG_NAME).is_file() or _is_transformers(place):
            return place
    kind = "a classifier" if holds_model(folder) or holds_model(folder / "model") else "no exported CLIP"
    raise UserError(f"{str(folder)!r} holds {kind}: name the folder of a run, or its model/")


def check_formats(clip: Clip, formats: Sequence[Format], sets: Sequence[BenchmarkSet]) -> None:
    """Raises: UserError for a format that this model cannot have, packages that are not installed, and for int8
    without sets that can show what it loses."""
    if {"onnx", "int8"} & set(formats):
        onnx.import_onnx("onnx", "onnxscript", "onnxruntime")
    if "transformers" in formats and not isinstance(clip.towers, TransformersTowers) and not fits_transformers(clip):
        raise UserError(f"{clip.name!r} has no form in transformers: {_misfit(clip)}")
    if "int8" not in formats:
        return
    if not sets:
        raise UserError("int8 needs a set that shows what it loses: name one with --eval-set, in a recipe --eval-data")
    for dataset in sets:
        if dataset.kind == "classification":
            require_classes(dataset)
        elif dataset.kind != "retrieval":
            raise UserError(f"{dataset.name} is a {dataset.kind} set, without top-1 or recall: name another for int8")


def _misfit(clip: Clip) -> str:
    """Why transformers' CLIPModel does not compute the same function."""
    cfg = clip.model_cfg or {}
    vision, text = cfg.get("vision_cfg", {}), cfg.get("text_cfg", {})
    if name := vision.get("timm_model_name"):
        return f"its image tower is timm's {name}, and CLIPModel's is a ViT"
    if isinstance(vision.get("layers"), list):
        return "its image tower is a ResNet, and CLIPModel's is a ViT"
    if name := text.get("hf_model_name"):
        return f"its text tower is {name}, and CLIPModel's is CLIP's own"
    settings = [(cfg, key) for key in cfg if key not in ("embed_dim", "vision_cfg", "text_cfg")]
    settings += [(section, key) for section in (vision, text) for key in section]
    for section, key in settings:  # the one without which it would fit
        others = {name: value for name, value in section.items() if name != key}
        parts = {name: others if value is section else value for name, value in cfg.items()}
        if fits_transformers(replace(clip, model_cfg=others if section is cfg else parts)):
            return f"CLIPModel has nothing like its {key} {section[key]!r}"
    return "its tokenizer, its resize_mode or several of its settings have no equivalent in CLIPModel"


def _refuse_foreign(folder: Path, formats: Sequence[Format]) -> None:
    """Raises: UserError for files in the way that this module has not written."""
    place = folder / onnx.SUBFOLDER
    if {"onnx", "int8"} & set(formats) and place.exists():
        if not place.is_dir():
            raise UserError(f"{str(place)!r} is a file, and ONNX needs a folder of this name: move it away")
        found = sorted(path.name for path in place.iterdir())
        if found and onnx.CONFIG_NAME not in found:
            raise UserError(f"{str(place)!r} holds files but no {onnx.CONFIG_NAME}: move them away")
        ours = read_own_json(place / onnx.CONFIG_NAME, remedy="move it away").get("files", []) if found else []
        if foreign := [name for name in found if name not in ours]:
            raise UserError(f"{str(place)!r}, which is replaced whole, holds {foreign[0]!r} of yours: move it away")
    if "transformers" in formats and not _is_transformers(folder):
        found = [name for name in _TRANSFORMERS_FILES if (folder / name).exists()]
        if found:
            raise UserError(f"{str(folder)!r} holds {found[0]!r}, but no model of transformers: move it away")


def _is_transformers(folder: Path) -> bool:
    return (folder / TRANSFORMERS_WEIGHTS_NAME).is_file() and holds_transformers_config(folder)


# ---- the formats ---------------------------------------------------------------------------------------------------


def _loaded(folder: Path) -> Clip:
    """The exported model as it is on the disk, in evaluation mode."""
    clip = load_clip(f"{'local-dir' if (folder / CONFIG_NAME).is_file() else 'transformers'}:{folder}")
    clip.towers.requires_grad_(False).eval()
    return clip


def real_inputs(clip: Clip, images: Source | None) -> tuple[Float[Tensor, "n 3 s s"], list[str]]:
    """Up to `CALIBRATION_IMAGES` images as inputs of the image tower, and `INPUTS_CHECKED` captions.

    Raises: UserError for fewer than `INPUTS_CHECKED` images.
    """
    drawings = open_source(None)
    source = drawings if images is None else images
    transform, pixels = clip.image_transform(), []
    for pair in source.epoch(0, 0, 0, 1):
        try:
            pixels.append(transform(decode(pair.image)))
        except BrokenImage:
            continue
        if len(pixels) == CALIBRATION_IMAGES:
            break
    if len(pixels) < INPUTS_CHECKED:
        raise UserError(f"{source.name!r} holds {len(pixels)} images that can be read: {INPUTS_CHECKED} are needed")
    captions = [pair.captions[0] for pair in islice(drawings.epoch(0, 0, 0, 1), INPUTS_CHECKED)]
    return torch.stack(pixels), captions


def _quantised(
    folder: Path, pixels: Tensor, sets: Sequence[BenchmarkSet], before: list[dict[str, Any]], max_drop: float
) -> dict[str, Any]:
    """Writes int8 beside the pair in `folder`; returns its part of onnx_config.json, with the metrics of both."""
    schemes = write_int8(folder=folder, pixels=pixels)
    pair = onnx.load_onnx(folder, int8=True, name="the int8 form")
    after = [_record(pair, dataset) for dataset in sets]
    check_drop(before, after, max_drop=max_drop)
    files = {side: {"file": onnx.file_name(side, int8=True), "scheme": schemes[side]} for side in onnx.SIDES}
    return files | {"calibration_images": len(pixels), "max_drop": max_drop, "before": before, "after": after}


def _record(clip: Clip, dataset: BenchmarkSet) -> dict[str, Any]:
    record = set_record(Embedder(clip=clip, alone=True, progress=True), dataset)
    kept = {key: record[key] for key in COMPARED if key in record}
    bounds = {key: list(record["intervals"][key]) for key in kept}
    classes = {} if dataset.classnames is None else {"classes": len(dataset.classnames)}
    return {"dataset": dataset.name, "n": record["n"], **classes, **kept, "intervals": bounds}


@contextmanager
def _adding(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files are moved into `folder` when the block ends without an exception."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".writing") as name:
        scratch = Path(name)
        yield scratch
        mode = (folder / CONFIG_NAME).stat().st_mode
        last = [file for file in _TRANSFORMERS_FILES if (scratch / file).is_file()]
        for file in [*(path.name for path in scratch.iterdir() if path.name not in last), *last]:
            (scratch / file).chmod(mode)  # safetensors writes files with mode 600
            os.replace(scratch / file, folder / file)


# ---- the card ------------------------------------------------------------------------------------------------------


def facts_of(folder: Path) -> list[FormatFacts]:
    """What a model card says about the formats in an exported folder."""
    found = []
    place = folder / onnx.SUBFOLDER
    if (place / onnx.CONFIG_NAME).is_file():
        config = read_own_json(place / onnx.CONFIG_NAME, remedy="export the model again")
        differences = config["checked"]["largest_difference"]
        note = (
            f"compared with the exported weights on {config['checked']['inputs']} images and captions: its embeddings "
            f"differ by at most {max(differences.values()):.1g}. onnx_config.json beside it says how images and texts "
            "become inputs."
        )
        found.append(FormatFacts(name="ONNX", files=_sizes(folder, int8=False), note=note))
        if int8 := config.get("int8"):
            schemes = ", ".join(f"{side} {int8[side]['scheme']}" for side in onnx.SIDES)
            found.append(
                FormatFacts(
                    name="ONNX int8",
                    files=_sizes(folder, int8=True),
                    note=f"quantised by onnxruntime ({schemes}).",
                    before=int8["before"],
                    after=int8["after"],
                )
            )
    if (folder / CONFIG_NAME).is_file() and _is_transformers(folder):
        files = {name: (folder / name).stat().st_size for name in ("config.json", TRANSFORMERS_WEIGHTS_NAME)}
        note = "CLIPModel, AutoTokenizer and AutoImageProcessor load it."
        found.append(FormatFacts(name="transformers", files=files, note=note))
    return found


def summary(folder: Path) -> str:
    """The formats in an exported folder as text: how they were checked, files, and what int8 loses."""
    lines = []
    for fact in facts_of(folder):
        lines.append(f"{fact.name}: {fact.note}")
        lines += [f"    {folder / name}  {size / 1e6:.1f} MB" for name, size in fact.files.items()]
        for before, after in zip(fact.before, fact.after, strict=True):
            numbers = [f"{key} {100 * before[key]:.2f} % -> {100 * after[key]:.2f} %" for key in before["intervals"]]
            lines.append(f"    {before['dataset']}  {', '.join(numbers)}")
    return "\n".join(lines)


def _sizes(folder: Path, *, int8: bool) -> dict[str, int]:
    """Path in the folder -> bytes, of one pair."""
    place = folder / onnx.SUBFOLDER
    files = [path for side in onnx.SIDES for path in onnx.stored_files(place, side, int8=int8)]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
