"""Model cards: the README.md of an exported CLIP or classifier."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from gkl_vl.models.towers import Side


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about a training run, for the model card."""

    command: str
    """Command line of the run."""
    commit: str | None
    """Commit of gkl-vl at the start of the run; None if gkl-vl was installed as a package."""
    steps: int
    """Optimizer updates."""
    seed: int
    metrics: list[dict] = field(default_factory=list)
    """Records as in results.jsonl: `model` (teacher or student), `dataset`, and metrics as fractions of 1."""
    repo_id: str | None = None
    """Hub repository (org/name) of the model; None = a local folder."""


@dataclass(frozen=True, kw_only=True)
class ClipCard:
    """Contents of an exported CLIP's README.md, which states nothing beyond these fields."""

    student: str
    """Architecture of the exported model, e.g. ViT-T-16."""
    teachers: Sequence[str]
    """Argument of `load_clip` for each teacher; none = trained without a teacher."""
    license: str
    """Licence of the weights as a Hub identifier (mit, apache-2.0, cc-by-4.0, other)."""
    datasets: list[str]
    """Training data: Hub ids, paths or names. Only the Hub ids go into the metadata."""
    run: RunFacts
    attack: str | None = None
    """Radius and norm of the attacks in adversarial training, e.g. 4/255 in linf; None = no attacks."""
    one_tower: Side | None = None
    """The only tower that was trained; the other one and the logit scale are the teacher's. None = both were."""
    start: str | None = None
    """Name of the initial weights; None = unknown."""
    averaged: float | None = None
    """Share of the trained weights, the rest is the start's; None = no average."""

    def render(self, *, transformers: bool = False, model_class: str | None = None) -> str:
        """Returns the text of README.md.

        Args:
            transformers: the folder also contains transformers' format, that of CLIPModel.
            model_class: CLIPModel or SiglipModel for a folder in transformers' format alone; None = open_clip's.
        """
        usage = self._usage(transformers) if model_class is None else self._transformers_usage(model_class)
        sections = [
            f"---\n{self._metadata('open_clip' if model_class is None else 'transformers').to_yaml()}\n---",
            f"# {self.run.repo_id.split('/')[1] if self.run.repo_id else self.student}",
            self._summary(),
            f"## Results\n\n{results_markdown(self.run.metrics)}",
            f"## Usage\n\n{usage}",
            f"## Training\n\n```bash\n{self.run.command}\n```\n\n{self._training()}",
            f"## Licence and limitations\n\n{self._limits()}",
        ]
        return "\n\n".join(sections) + "\n"

    def _metadata(self, library: str) -> ModelCardData:
        base_models = [name for name in map(hub_id, self.teachers) if name]
        results = [
            EvalResult(
                task_type="image-text-retrieval" if "retrieval" in key else "zero-shot-image-classification",
                dataset_type=row["dataset"],
                dataset_name=row["dataset"],
                metric_type=key,
                metric_name=key,
                metric_value=round(value, 6),
            )
            for row in self.run.metrics
            if row["model"] == "student"
            for key, value in _scores(row).items()
        ]
        return ModelCardData(
            library_name=library,
            pipeline_tag="zero-shot-image-classification",
            tags=["clip", "knowledge-distillation", "gkl"] if self.teachers else ["clip", "gkl"],
            license=self.license,
            datasets=[name for name in self.datasets if hub_id(name)] or None,
            base_model=base_models[0] if len(base_models) == 1 else base_models or None,
            # The Hub has finetune, adapter, merge and quantized, and no relation for distillation.
            base_model_relation="finetune" if base_models else None,
            model_name=self.run.repo_id or self.student,
            eval_results=results or None,
        )

    def _summary(self) -> str:
        training = f"distilled from {self._teachers()}" if self.teachers else "trained without a teacher"
        purpose = "zero-shot image classification and image-text retrieval"
        attacks = f", against attacks on its images within {self.attack}," if self.attack else ""
        text = f"A CLIP model for {purpose}: `{self.student}`, {training}{attacks} with gkl-vl."
        if self.one_tower is None:
            return text
        other = "text" if self.one_tower == "image" else "image"
        return (
            f"{text}\n\nOnly the {self.one_tower} tower was trained, into the teacher's embedding space. The {other} "
            f"tower and the logit scale are the teacher's own: {self.one_tower} embeddings of this model can be "
            f"compared with {other} embeddings that the teacher computed, and with an index of them."
        )

    def _usage(self, transformers: bool) -> str:
        name = f"hf-hub:{self.run.repo_id}" if self.run.repo_id else "local-dir:path/to/this/folder"
        text = f"""```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("{name}")
tokenizer = open_clip.get_tokenizer("{name}")
```"""
        return f"{text}\n\nWith transformers:\n\n{self._transformers_usage('CLIPModel')}" if transformers else text

    def _transformers_usage(self, model_class: str) -> str:
        processor_class, name = model_class.replace("Model", "Processor"), self.run.repo_id or "path/to/this/folder"
        return f"""```python
from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained("{name}")
processor = {processor_class}.from_pretrained("{name}")
# inputs = processor(text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt")
```"""

    def _teachers(self) -> str:
        return ", ".join(f"`{name}`" for name in self.teachers)

    def _training(self) -> str:
        facts = {
            "Steps": f"{self.run.steps:,}",
            "Seed": str(self.run.seed),
            "Training data": ", ".join(self.datasets),
            "Initial weights": self.start,
            "Average": None if self.averaged is None else f"{self.averaged:g} trained, the rest initial weights",
            "Teacher" if len(self.teachers) < 2 else "Teachers": self._teachers() or "none",
            "Commit of gkl-vl": self.run.commit,
        }
        return "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact)

    def _limits(self) -> str:
        teacher = "teacher" if len(self.teachers) == 1 else "teachers"
        sources = f"The training data and the {teacher} have" if self.teachers else "The training data has"
        origins = f"the training data and of the {teacher}" if self.teachers else "the training data"
        return (
            f"The weights are released under `{self.license}`. {sources} terms of their own: read them "
            "before use.\n\nOnly what the table above shows has been measured: test the model on your own "
            f"images and classes before you rely on it. It can repeat the biases of {origins}."
        )


@dataclass(frozen=True, kw_only=True)
class ClassifierCard:
    """Contents of an exported classifier's README.md, which states nothing beyond these fields."""

    student: str
    """Architecture of the exported model, e.g. resnet8x4."""
    made: str
    """How it was trained; follows "An image classifier: `student`, " in the card."""
    teacher: str | None
    """Name of the teacher; None = trained without a teacher."""
    data: str
    """Training data."""
    run: RunFacts

    def render(self) -> str:
        """Returns the text of README.md."""
        teacher = hub_id(self.teacher) if self.teacher else None
        metadata = ModelCardData(
            library_name="timm" if self.student.startswith("timm:") else "gkl-vl",
            pipeline_tag="image-classification",
            tags=["knowledge-distillation", "gkl"] if self.teacher else ["gkl"],
            license="other",  # the licence of the data is not known here
            base_model=teacher,
            base_model_relation="finetune" if teacher else None,
        )
        facts = {"Steps": f"{self.run.steps:,}", "Seed": str(self.run.seed), "Training data": self.data}
        facts |= {"Commit of gkl-vl": self.run.commit} if self.run.commit else {}
        sections = [
            f"---\n{metadata.to_yaml()}\n---",
            f"# {self.run.repo_id.split('/')[1] if self.run.repo_id else self.student}",
            f"An image classifier: `{self.student}`, {self.made} with gkl-vl.",
            f"## Results\n\n{results_markdown(self.run.metrics)}",
            f"## Usage\n\n```python\n{classifier_usage(self.student, self.run.repo_id or 'path/to/this/folder')}\n```",
            f"## Training\n\n```bash\n{self.run.command}\n```\n\n" + "\n".join(f"- {k}: {v}" for k, v in facts.items()),
            "## Limitations\n\nOnly what the table above shows has been measured: test the model on your own images "
            "before you rely on it. The training data and the teacher have terms of their own: read them before use.",
        ]
        return "\n\n".join(sections) + "\n"


def classifier_usage(name: str, folder: str) -> str:
    """Python code that loads an exported classifier from a folder or a Hub repository."""
    source = f"hf-hub:{folder}" if hub_id(folder) else f"local-dir:{folder}"
    if name.startswith("timm:"):
        return f'import timm\nmodel = timm.create_model("{source}", pretrained=True)'
    return f'from gkl_vl.models.classifiers import load_classifier\nmodel = load_classifier("{source}").model'


def results_markdown(metrics: list[dict]) -> str:
    """Markdown table of teachers and student in per cent, with one line per data set and metric; what a student kept
    is given for a single teacher."""
    if not metrics:
        return "No evaluation was run."
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for row in metrics:  # classification and retrieval on one data set can be two rows
        scores.setdefault((row["model"], row["dataset"]), {}).update(_scores(row))
    others = dict.fromkeys(row["model"] for row in metrics if row["model"] not in ("teacher", "student"))
    roles = ["teacher", *others, "student"]
    lines = [f"| data set | metric | {' | '.join(roles)} | kept |", "|---|---|" + "---:|" * (len(roles) + 1)]
    for dataset in dict.fromkeys(row["dataset"] for row in metrics):
        sides = [scores.get((role, dataset), {}) for role in roles]
        teacher, student = sides[0], sides[-1]
        for key in dict.fromkeys(key for side in reversed(sides) for key in side):
            comparable = not others and key in teacher and key in student and teacher[key] > 0
            cells = [f"{100 * side[key]:.1f} %" if key in side else "" for side in sides]
            kept = f"{100 * student[key] / teacher[key]:.0f} %" if comparable else ""
            lines.append(f"| {dataset} | {key} | {' | '.join(cells)} | {kept} |")
    return "\n".join(lines)


def hub_id(name: str) -> str | None:
    """Returns org/repo if `name` has the form of a Hub repository, else None."""
    prefix, _, rest = name.partition(":")
    if not rest:
        rest = name
    elif prefix not in ("hf-hub", "transformers"):
        return None
    return rest if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", rest) and not Path(rest).exists() else None


def _scores(row: dict) -> dict[str, float]:
    # acc5 is nan for fewer than five classes; the Hub's YAML metadata does not allow nan.
    numbers = {key: value for key, value in row.items() if isinstance(value, float) and math.isfinite(value)}
    shown = re.compile(r"acc|(many|medium|few)_acc1$|.*recall")  # many, medium, few: classes by their number of images
    return {key: value for key, value in numbers.items() if shown.match(key)}
