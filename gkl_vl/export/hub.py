"""Exports trained models to folders and pushes these to the Hub.

A CLIP is written in the format of its library, an open_clip one also in transformers'; a classifier in timm's format
or that of `load_classifier`.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from gkl_vl.atomic import json_text, replacing_folder, write_json
from gkl_vl.errors import UserError, first_line
from gkl_vl.export.cards import ClassifierCard, ClipCard
from gkl_vl.export.text_cleaning import save_tokenizer
from gkl_vl.export.transformers_format import (
    exported_tokenizer,
    fits_transformers,
    write_own_format,
    write_transformers,
)
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip, holds_transformers_config
from gkl_vl.models.towers import OpenClipTowers, PairedTowers, TransformersTowers

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
        card: contents of README.md; its `run.repo_id` is also stored as the tokenizer's repository for open_clip.
        dtype: precision of the stored weights; None = unchanged, which is fp32 after training.
        transformers: also write an open_clip model in transformers' CLIPModel format if the architecture fits; doubles
            the size.

    Raises:
        UserError: a model of unknown configuration (`as_clip`); `folder` contains other files.
        OSError: no permission, disk full; an existing export is left unchanged.
    """
    towers = clip.towers
    if isinstance(towers, PairedTowers) or (isinstance(towers, OpenClipTowers) and clip.model_cfg is None):
        raise UserError(f"{clip.name!r} has no known configuration, which an export needs: load it with load_clip")
    with _replacing(folder) as scratch:
        tensors = _stored_tensors(towers, dtype)
        if isinstance(towers, TransformersTowers):
            text = card.render(model_class=write_own_format(clip=clip, folder=scratch, tensors=tensors))
        else:
            text = card.render(transformers=_write_open_clip(clip, scratch, tensors, card.run.repo_id, transformers))
        (scratch / CARD_NAME).write_text(text, encoding="utf-8")


def _write_open_clip(
    clip: Clip, folder: Path, tensors: dict[str, Tensor], repo_id: str | None, transformers: bool
) -> bool:
    """Writes open_clip's format, and transformers' if wanted and possible. Returns whether it has written both."""
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    both = transformers and fits_transformers(clip)
    if clip.hf_tokenizer is not None:
        save_tokenizer(exported_tokenizer(clip), folder)
    if both:
        write_transformers(clip=clip, folder=folder, tensors=tensors)
    (folder / CONFIG_NAME).write_text(json_text(_open_clip_config(clip, repo_id), indent=2))
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
        (scratch / CARD_NAME).write_text(card.render(), encoding="utf-8")


def check_repo_id(repo_id: str, *, token: str | None = None) -> None:
    """Checks before a run that its model can be pushed at the end.

    Raises:
        UserError: malformed name, no token, offline mode.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repository name {repo_id!r} is malformed: {first_line(error)}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"repository name {repo_id!r} has no owner: write org/name")
    if (token or get_token()) is None:
        raise UserError(f"no Hub token to push {repo_id!r} with: run `hf auth login` or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"HF_HUB_OFFLINE is set, so {repo_id!r} cannot be pushed: unset it, or push later")


def push_to_hub(*, folder: Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Uploads all files of an exported folder and nothing else; creates the repository if it does not exist.

    Uses HF_ENDPOINT and HF_TOKEN. If the folder contains a tokenizer, `repo_id` is first written to its config as the
    tokenizer's name, by which open_clip loads a Hub model's tokenizer. Other files in the repository are kept.

    Returns:
        URL of the repository.

    Raises:
        UserError: malformed name, no token, offline, refused by the Hub. The folder is kept and can be pushed again.
    """
    check_repo_id(repo_id, token=token)
    if not _holds_model(folder):
        raise UserError(
            f"{folder} holds no {CONFIG_NAME}, no CLIP of transformers, no classifier: push the model/ folder of a run"
        )
    if (folder / CONFIG_NAME).is_file():
        _set_tokenizer_name(folder, repo_id)
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model with gkl-vl")
    # The client's HTTP library depends on its version (requests, httpx, httpx2), and the errors of a lost connection
    # have no common base class. All have the same remedy.
    except Exception as error:
        raise UserError(_push_remedy(error, folder, repo_id)) from error
    return str(url)


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
        if any(folder.iterdir()) and not _holds_model(folder):
            raise UserError(f"{folder} holds files but no exported model: name another folder or empty it")
    elif folder.exists():
        raise UserError(f"{folder} is a file: name a folder for the exported model")


def _holds_model(folder: Path) -> bool:
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


def _open_clip_config(clip: Clip, repo_id: str | None) -> dict:
    model_cfg = copy.deepcopy(clip.model_cfg)
    assert model_cfg is not None
    if clip.hf_tokenizer is not None and repo_id is not None:
        model_cfg["text_cfg"]["hf_tokenizer_name"] = repo_id
    return {"model_cfg": model_cfg, "preprocess_cfg": asdict(clip.preprocess)}


def _set_tokenizer_name(folder: Path, repo_id: str) -> None:
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    text_cfg = config["model_cfg"]["text_cfg"]
    # Without the key open_clip uses CLIP's BPE, and any tokenizer files in the folder are for transformers.
    if text_cfg.get("hf_tokenizer_name") in (None, "", repo_id):
        return
    text_cfg["hf_tokenizer_name"] = repo_id
    write_json(path, config, indent=2)


def _push_remedy(error: Exception, folder: Path, repo_id: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        remedy = "the token is not valid, create a new one and set HF_TOKEN"
    elif status in (403, 404):
        remedy = f"the token may not write to {repo_id}, use one with write access or another name"
    else:
        remedy = "check the connection and HF_ENDPOINT"
    return f"pushing to {repo_id!r} failed ({first_line(error)}): {remedy}, then push {folder} again"
