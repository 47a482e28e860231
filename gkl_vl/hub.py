"""What was trained as a folder that people load, and its push: a CLIP in open_clip's Hub format and transformers', a
classifier in timm's or with our own loader."""

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from gkl_vl.classifiers import Classifier
from gkl_vl.convert import fits_transformers, write_transformers
from gkl_vl.errors import UserError, first_line
from gkl_vl.towers import Clip

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
CLASSIFIER_CONFIG_NAME = "config.json"
CLASSIFIER_WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the README of an exported model says. It claims nothing that is not in these fields."""

    student: str
    """Architecture of the model in the folder, e.g. ViT-T-16."""
    teacher: str | None
    """What it was distilled from, as `load_clip` was asked for it; None = trained without a teacher."""
    license: str
    """Licence of the weights, as the Hub abbreviates it (mit, apache-2.0, cc-by-4.0, other)."""
    datasets: list[str]
    """Training data: Hub ids, paths or names. Only the Hub ids go into the metadata."""
    command: str
    """The command line that trained it."""
    commit: str | None
    """Commit of gkl-vl that ran the command, when known."""
    steps: int
    """Optimizer steps."""
    seed: int
    """Seed of the run."""
    attack: str | None = None
    """Radius and norm of the attacks that it was trained against, e.g. 4/255 in linf; None = none."""
    metrics: list[dict] = field(default_factory=list)
    """Evaluation lines as in results.jsonl: `model` (teacher or student), `dataset`, metrics as fractions."""
    repo_id: str | None = None
    """org/name on the Hub, when the model is to be pushed."""

    def render(self, *, transformers: bool = False) -> str:
        """The text of README.md. `transformers`: the folder holds that format as well."""
        sections = [
            f"---\n{self._metadata().to_yaml()}\n---",
            f"# {self.repo_id.split('/')[1] if self.repo_id else self.student}",
            self._summary(),
            f"## Results\n\n{results_markdown(self.metrics)}",
            f"## Usage\n\n{self._usage(transformers)}",
            f"## Training\n\n```bash\n{self.command}\n```\n\n{self._training()}",
            f"## Licence and limitations\n\n{self._limits()}",
        ]
        return "\n\n".join(sections) + "\n"

    def _metadata(self) -> ModelCardData:
        base_model = _hub_id(self.teacher) if self.teacher else None
        results = [
            EvalResult(
                task_type="image-text-retrieval" if "retrieval" in key else "zero-shot-image-classification",
                dataset_type=row["dataset"],
                dataset_name=row["dataset"],
                metric_type=key,
                metric_name=key,
                metric_value=round(value, 6),
            )
            for row in self.metrics
            if row["model"] == "student"
            for key, value in _scores(row).items()
        ]
        return ModelCardData(
            library_name="open_clip",
            pipeline_tag="zero-shot-image-classification",
            tags=["clip", "knowledge-distillation", "gkl"] if self.teacher else ["clip", "gkl"],
            license=self.license,
            datasets=[name for name in self.datasets if _hub_id(name)] or None,
            base_model=base_model,
            # The Hub knows finetune, adapter, merge and quantized, and no word for distilled.
            base_model_relation="finetune" if base_model else None,
            model_name=self.repo_id or self.student,
            eval_results=results or None,
        )

    def _summary(self) -> str:
        made = f"distilled from `{self.teacher}`" if self.teacher else "trained without a teacher"
        purpose = "zero-shot image classification and image-text retrieval"
        against = f", against attacks on its images within {self.attack}," if self.attack else ""
        return f"A CLIP model for {purpose}: `{self.student}`, {made}{against} with gkl-vl."

    def _usage(self, transformers: bool) -> str:
        name = f"hf-hub:{self.repo_id}" if self.repo_id else "local-dir:path/to/this/folder"
        text = f"""```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("{name}")
tokenizer = open_clip.get_tokenizer("{name}")
```"""
        if transformers:
            text += f"""

With transformers:

```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("{self.repo_id or "path/to/this/folder"}")
processor = CLIPProcessor.from_pretrained("{self.repo_id or "path/to/this/folder"}")
# inputs = processor(text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt")
```"""
        return text

    def _training(self) -> str:
        facts = {
            "Steps": f"{self.steps:,}",
            "Seed": str(self.seed),
            "Training data": ", ".join(self.datasets),
            "Teacher": f"`{self.teacher}`" if self.teacher else "none",
            "Commit of gkl-vl": self.commit,
        }
        return "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact)

    def _limits(self) -> str:
        sources = "The training data and the teacher have" if self.teacher else "The training data has"
        origins = "the training data and of the teacher" if self.teacher else "the training data"
        return (
            f"The weights are released under `{self.license}`. {sources} terms of their own: read them "
            "before use.\n\nOnly what the table above shows has been measured: test the model on your own "
            f"images and classes before you rely on it. It can repeat the biases of {origins}."
        )


def results_markdown(metrics: list[dict]) -> str:
    """Teacher against student as a Markdown table, a line per data set and metric, in per cent."""
    if not metrics:
        return "No evaluation was run."
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for row in metrics:  # classification and retrieval on one data set may come as two rows
        scores.setdefault((row["model"], row["dataset"]), {}).update(_scores(row))
    lines = ["| data set | metric | teacher | student | kept |", "|---|---|---:|---:|---:|"]
    for dataset in dict.fromkeys(row["dataset"] for row in metrics):
        teacher, student = scores.get(("teacher", dataset), {}), scores.get(("student", dataset), {})
        for key in dict.fromkeys([*student, *teacher]):
            both = key in teacher and key in student and teacher[key] > 0
            cells = [f"{100 * side[key]:.1f} %" if key in side else "" for side in (teacher, student)]
            kept = f"{100 * student[key] / teacher[key]:.0f} %" if both else ""
            lines.append(f"| {dataset} | {key} | {cells[0]} | {cells[1]} | {kept} |")
    return "\n".join(lines)


def export_clip(
    *, clip: Clip, folder: Path, card: ModelCard, dtype: torch.dtype | None = None, transformers: bool = True
) -> None:
    """Write `folder` in open_clip's Hub format: `local-dir:folder` loads it, once pushed `hf-hub:org/name`.

    Written beside the folder and renamed: an existing export is replaced by a complete one or not at all.

    Args:
        clip: an open_clip model; a transformers model has no open_clip configuration.
        folder: absent, empty, or an earlier export.
        card: becomes README.md; its `repo_id` also tells open_clip where the tokenizer will be.
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
        (scratch / CONFIG_NAME).write_text(json.dumps(_open_clip_config(clip, card.repo_id), indent=2) + "\n")
        (scratch / CARD_NAME).write_text(card.render(transformers=as_transformers), encoding="utf-8")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to, beside `folder`, whose place it takes when all went well."""
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        for weights in scratch.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
            weights.chmod((scratch / CARD_NAME).stat().st_mode)
        _replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def _hub_id(name: str) -> str | None:
    """org/repo when `name` is a repository on the Hub, else None."""
    prefix, _, rest = name.partition(":")
    if not rest:
        rest = name
    elif prefix not in ("hf-hub", "transformers"):
        return None
    return rest if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", rest) and not Path(rest).exists() else None


def _scores(row: dict) -> dict[str, float]:
    # acc5 of fewer than five classes is nan, which neither YAML on the Hub nor a reader can use.
    numbers = {key: value for key, value in row.items() if isinstance(value, float) and math.isfinite(value)}
    wanted = re.compile(r"acc|(many|medium|few)_acc1$|.*recall")  # a classifier's groups by shots too
    return {key: value for key, value in numbers.items() if wanted.match(key)}


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
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(config, indent=2) + "\n")
    aside.replace(path)


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


def _replace_folder(scratch: Path, folder: Path) -> None:
    """Two renames, since one cannot replace a full folder; the old one returns if the second fails."""
    if not folder.exists():
        scratch.rename(folder)
        return
    old = Path(f"{scratch}.old")
    folder.rename(old)
    try:
        scratch.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


# ---- classifiers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClassifierCard:
    """What the README of an exported classifier says. It claims nothing that is not in these fields."""

    student: str
    made: str
    """How it was trained, after "an image classifier, "."""
    teacher: str | None
    data: str
    """What it was trained on."""
    command: str
    commit: str | None
    metrics: list[dict]
    """Evaluation lines as in results.jsonl."""
    steps: int
    seed: int
    repo_id: str | None

    def render(self) -> str:
        """The text of README.md."""
        teacher = _hub_id(self.teacher) if self.teacher else None
        metadata = ModelCardData(
            library_name="timm" if self.student.startswith("timm:") else "gkl-vl",
            pipeline_tag="image-classification",
            tags=["knowledge-distillation", "gkl"] if self.teacher else ["gkl"],
            license="other",  # whoever brings the data knows its licence
            base_model=teacher,
            base_model_relation="finetune" if teacher else None,
        )
        facts = {"Steps": f"{self.steps:,}", "Seed": str(self.seed), "Training data": self.data}
        facts |= {"Commit of gkl-vl": self.commit} if self.commit else {}
        sections = [
            f"---\n{metadata.to_yaml()}\n---",
            f"# {self.repo_id.split('/')[1] if self.repo_id else self.student}",
            f"An image classifier: `{self.student}`, {self.made} with gkl-vl.",
            f"## Results\n\n{results_markdown(self.metrics)}",
            f"## Usage\n\n```python\n{classifier_usage(self.student, self.repo_id or 'path/to/this/folder')}\n```",
            f"## Training\n\n```bash\n{self.command}\n```\n\n" + "\n".join(f"- {k}: {v}" for k, v in facts.items()),
            "## Limitations\n\nOnly what the table above shows has been measured: test the model on your own images "
            "before you rely on it. The training data and the teacher have terms of their own: read them before use.",
        ]
        return "\n\n".join(sections) + "\n"


def classifier_usage(name: str, folder: str) -> str:
    """Python that loads an exported classifier from a folder or a repository."""
    where = f"hf-hub:{folder}" if _hub_id(folder) else f"local-dir:{folder}"
    if name.startswith("timm:"):
        return f'import timm\nmodel = timm.create_model("{where}", pretrained=True)'
    return f'from gkl_vl.classifiers import load_classifier\nmodel = load_classifier("{where}").model'


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
