"""What was trained as a folder that people load, and its push: a CLIP in open_clip's Hub format and transformers', a
classifier in timm's or with our own loader."""

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

from gkl_vl.atomic import replacing_folder, write_text
from gkl_vl.errors import UserError, first_line
from gkl_vl.export.cards import ClassifierCard, ClipCard
from gkl_vl.export.transformers_format import fits_transformers, write_transformers
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
CLASSIFIER_CONFIG_NAME = "config.json"
CLASSIFIER_WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"


def export_clip(
    *, clip: Clip, folder: Path, card: ClipCard, dtype: torch.dtype | None = None, transformers: bool = True
) -> None:
    """Write `folder` in open_clip's Hub format: `local-dir:folder` loads it, once pushed `hf-hub:org/name`.

    Written beside the folder and renamed: an existing export is replaced by a complete one or not at all.

    Args:
        clip: an open_clip model; a transformers model has no open_clip configuration.
        folder: absent, empty, or an earlier export.
        card: becomes README.md; its `run.repo_id` also tells open_clip where the tokenizer will be.
        dtype: precision of the stored weights; None = as they are, fp32 after training.
        transformers: also write transformers' CLIPModel format where the architecture fits; doubles the size.

    Raises:
        UserError: not an open_clip model; `folder` holds something else.
        OSError: no permission, disk full; an existing export is untouched.
    """
    if clip.model_cfg is None:
        raise UserError(f"{clip.name!r} is a transformers model: take an open_clip one as student, only those export")
    with _replacing(folder) as scratch:
        tensors = _stored_tensors(clip, dtype)
        save_file(tensors, scratch / WEIGHTS_NAME, metadata={"format": "pt"})
        as_transformers = transformers and fits_transformers(clip)
        if clip.hf_tokenizer is not None:
            clip.hf_tokenizer.save_pretrained(scratch)
        if as_transformers:
            write_transformers(clip=clip, folder=scratch, tensors=tensors)
        (scratch / CONFIG_NAME).write_text(json.dumps(_open_clip_config(clip, card.run.repo_id), indent=2) + "\n")
        (scratch / CARD_NAME).write_text(card.render(transformers=as_transformers), encoding="utf-8")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to, beside `folder`, whose place it takes when all went well."""
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    with replacing_folder(folder) as scratch:
        yield scratch
        for weights in scratch.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
            weights.chmod((scratch / CARD_NAME).stat().st_mode)


def check_repo_id(repo_id: str, *, token: str | None = None) -> None:
    """Refuse before a run what would make its push fail after it: a malformed name, no token, offline mode.

    Raises:
        UserError: with the remedy.
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
    """Upload the files of an exported folder, all of them and nothing else; creates the repository.

    Honours HF_ENDPOINT and HF_TOKEN. Where the folder carries a tokenizer, its configuration is first pointed
    at `repo_id`, since open_clip looks a Hub model's tokenizer up by name. Files that only the
    repository has stay there.

    Returns:
        The address of the repository.

    Raises:
        UserError: malformed name, no token, offline, refused; the folder stays and can be pushed again.
    """
    check_repo_id(repo_id, token=token)
    if not _holds_model(folder):
        raise UserError(f"{folder} holds no {CONFIG_NAME} and no classifier: push the model/ folder of a run")
    if (folder / CONFIG_NAME).is_file():
        _point_tokenizer_at(folder, repo_id)
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model with gkl-vl")
    # The client's HTTP library changed between its versions (requests, httpx, httpx2), so what a lost
    # connection raises has no common base class; the remedy is the same for all.
    except Exception as error:
        raise UserError(_push_remedy(error, folder, repo_id)) from error
    return str(url)


def _push_remedy(error: Exception, folder: Path, repo_id: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        remedy = "the token is not valid, make a new one and set HF_TOKEN"
    elif status in (403, 404):
        remedy = f"the token may not write to {repo_id}, use one with write access or another name"
    else:
        remedy = "check the connection and HF_ENDPOINT"
    return f"pushing to {repo_id!r} failed ({first_line(error)}): {remedy}, then push {folder} again"


def _stored_tensors(clip: Clip, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict with memory of its own for each tensor: safetensors refuses shared and strided ones."""
    state = clip.towers.model.state_dict()
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


def _point_tokenizer_at(folder: Path, repo_id: str) -> None:
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    text_cfg = config["model_cfg"]["text_cfg"]
    # Without the key the tokenizer is CLIP's own, whatever files lie there for transformers.
    if text_cfg.get("hf_tokenizer_name") in (None, "", repo_id):
        return
    text_cfg["hf_tokenizer_name"] = repo_id
    write_text(path, json.dumps(config, indent=2) + "\n")


def _holds_model(folder: Path) -> bool:
    """Whether the folder is an export of ours: a CLIP's, or a classifier's."""
    return (folder / CONFIG_NAME).is_file() or _holds_classifier(folder)


def _holds_classifier(folder: Path) -> bool:
    """A config.json alone says nothing: a run folder has one, and many a project."""
    if not (folder / CLASSIFIER_WEIGHTS_NAME).is_file() or not (folder / CLASSIFIER_CONFIG_NAME).is_file():
        return False
    try:
        config = json.loads((folder / CLASSIFIER_CONFIG_NAME).read_text())
    except ValueError:
        return False
    return isinstance(config, dict) and {"architecture", "num_classes"} <= config.keys()


def _check_replaceable(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()) and not _holds_model(folder):
            raise UserError(f"{folder} holds files but no exported model: name another folder or empty it")
    elif folder.exists():
        raise UserError(f"{folder} is a file: name a folder for the exported model")


def export_classifier(*, classifier: Classifier, folder: Path, card: ClassifierCard) -> None:
    """Write `folder` with model.safetensors, config.json and a card; `load_classifier("local-dir:folder")` loads it.

    A timm model's folder has timm's Hub format. Written beside the folder and renamed, errors as in `export_clip`.
    """
    with _replacing(folder) as scratch:
        if classifier.name.startswith("timm:"):
            # safetensors takes no channels_last
            model: Any = classifier.model.to(memory_format=torch.contiguous_format)
            model.pretrained_cfg = model.pretrained_cfg | {"mean": classifier.mean, "std": classifier.std}
            save_for_hf(model, str(scratch), safe_serialization=True)
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
            (scratch / CLASSIFIER_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        (scratch / CARD_NAME).write_text(card.render(), encoding="utf-8")
