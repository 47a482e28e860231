"""Exports trained models to folders, which `push.py` uploads to the Hub.

A CLIP is written in the format of its library, an open_clip one also in transformers'; a classifier in timm's format
or that of `load_classifier`.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from gkl_vl.atomic import json_text, replacing_folder
from gkl_vl.errors import UserError
from gkl_vl.export.cards import EXAMPLE_NAME, PICTURE_NAME, ClassifierCard, ClipCard, RunFacts
from gkl_vl.export.text_cleaning import save_tokenizer
from gkl_vl.export.transformers_format import (
    exported_tokenizer,
    fits_transformers,
    write_own_format,
    write_transformers,
)
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip, holds_transformers_config
from gkl_vl.models.towers import OpenClipTowers, TransformersTowers

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
TRANSFORMERS_WEIGHTS_NAME = "model.safetensors"
CLASSIFIER_CONFIG_NAME = "config.json"
CLASSIFIER_WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"


def export_clip(
    *, clip: Clip, folder: Path, card: ClipCard, dtype: torch.dtype | None = None, transformers: bool = True
) -> None:
    """Writes `folder` in the Hub format of the model's library.

    That of open_clip is loaded as `local-dir:folder`, after a push also as `hf-hub:org/name`; that of transformers as
    `transformers:folder` and `transformers:org/name`, and by its `AutoModel`, `AutoTokenizer` and `AutoImageProcessor`.
    Writes to a temporary folder and renames it: an existing export is replaced by a complete one or not at all.

    Args:
        clip: an open_clip model with known `model_cfg` or a transformers model; it stays as it is.
        folder: a new or empty folder, or an earlier export.
        card: contents of README.md.
        dtype: precision of the stored weights; None = unchanged, which is fp32 after training.
        transformers: also write an open_clip model in transformers' CLIPModel format if the architecture fits; doubles
            the size.

    Raises:
        UserError: a model of unknown configuration (`as_clip`); `folder` contains other files.
        OSError: no permission, disk full; an existing export is left unchanged.
    """
    towers = clip.towers
    unknown = isinstance(towers, OpenClipTowers) and clip.model_cfg is None
    if unknown or not isinstance(towers, OpenClipTowers | TransformersTowers):
        raise UserError(f"{clip.name!r} has no known configuration, which an export needs: load it with load_clip")
    with _replacing(folder) as scratch:
        tensors = _stored_tensors(towers, dtype)
        both, model_class = False, None
        if isinstance(towers, TransformersTowers):
            model_class = write_own_format(clip=clip, folder=scratch, tensors=tensors)
        else:
            both = _write_open_clip(clip, scratch, tensors, transformers)
        text = card.render(
            transformers=both,
            model_class=model_class,
            image_size=clip.image_size,
            context_length=clip.tokenize([""]).shape[1],
        )
        if card.example is not None:
            card.example.image.save(scratch / EXAMPLE_NAME)
        _write_card(text, card.run, scratch)


def _write_open_clip(clip: Clip, folder: Path, tensors: dict[str, Tensor], transformers: bool) -> bool:
    """Writes open_clip's format, and transformers' if wanted and possible. Returns whether it has written both."""
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    both = transformers and fits_transformers(clip)
    if clip.hf_tokenizer is not None:
        save_tokenizer(exported_tokenizer(clip), folder)
    if both:
        write_transformers(clip=clip, folder=folder, tensors=tensors)
    config = {"model_cfg": clip.model_cfg, "preprocess_cfg": asdict(clip.preprocess)}
    (folder / CONFIG_NAME).write_text(json_text(config, indent=2))
    return both


def export_classifier(*, classifier: Classifier, folder: Path, card: ClassifierCard) -> None:
    """Writes `folder` with model.safetensors, config.json and a card; `load_classifier("local-dir:folder")` loads it.

    A timm model is written in timm's Hub format. Replaces `folder` and raises as `export_clip` does.
    """
    with _replacing(folder) as scratch:
        if classifier.name.startswith("timm:"):
            # safetensors does not store channels_last tensors
            model: Any = classifier.model.to(memory_format=torch.contiguous_format)
            model.pretrained_cfg = model.pretrained_cfg | {"mean": classifier.mean, "std": classifier.std}
            names = None if classifier.classnames is None else {"label_names": list(classifier.classnames)}
            save_for_hf(model, str(scratch), safe_serialization=True, model_config=names)
        else:
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in classifier.model.state_dict().items()}
            save_file(tensors, scratch / CLASSIFIER_WEIGHTS_NAME, metadata={"format": "pt"})
            config = {
                "library": "gkl-vl",
                "architecture": classifier.name,
                "num_classes": classifier.num_classes,
                "mean": classifier.mean,
                "std": classifier.std,
            }
            if classifier.classnames is not None:
                config["label_names"] = list(classifier.classnames)
            (scratch / CLASSIFIER_CONFIG_NAME).write_text(json_text(config, indent=2))
        _write_card(card.render(), card.run, scratch)


def _write_card(text: str, run: RunFacts, folder: Path) -> None:
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    if run.picture is not None:
        shutil.copyfile(run.picture, folder / PICTURE_NAME)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Context manager: yields a temporary folder, which replaces `folder` if the block raises nothing."""
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    with replacing_folder(folder) as scratch:
        yield scratch
        for weights in scratch.glob("*.safetensors"):  # safetensors writes files with mode 600
            weights.chmod((scratch / CARD_NAME).stat().st_mode)


def _check_replaceable(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()) and not holds_model(folder):
            raise UserError(f"{folder} holds files but no exported model: name another folder or empty it")
    elif folder.exists():
        raise UserError(f"{folder} is a file: name a folder for the exported model")


def holds_model(folder: Path) -> bool:
    """Whether the folder contains an exported CLIP or classifier."""
    return (folder / CONFIG_NAME).is_file() or _holds_transformers(folder) or _holds_classifier(folder)


def _holds_transformers(folder: Path) -> bool:
    """Whether the folder contains a CLIP in transformers' format: its config alone may be anybody's."""
    return (folder / TRANSFORMERS_WEIGHTS_NAME).is_file() and holds_transformers_config(folder)


def _holds_classifier(folder: Path) -> bool:
    """Whether the folder contains an exported classifier. Checks config.json's keys, as run folders have one too."""
    if not (folder / CLASSIFIER_WEIGHTS_NAME).is_file() or not (folder / CLASSIFIER_CONFIG_NAME).is_file():
        return False
    try:
        config = json.loads((folder / CLASSIFIER_CONFIG_NAME).read_text())
    except ValueError:
        return False
    return isinstance(config, dict) and {"architecture", "num_classes"} <= config.keys()


def _stored_tensors(towers: OpenClipTowers | TransformersTowers, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """State dict on the CPU with contiguous, separate tensors: safetensors refuses shared and strided ones."""
    state = towers.model.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if dtype is None:
        return tensors
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
