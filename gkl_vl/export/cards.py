"""Model cards: the README.md of an exported student."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The run that trained a model, for its card."""

    command: str
    """Command line."""
    commit: str | None
    """Commit of gkl-vl at its start; None where it was installed."""
    steps: int
    """Optimizer updates."""
    seed: int
    metrics: list[dict] = field(default_factory=list)
    """Records as in results.jsonl: `model` (teacher or student), `dataset`, metrics as fractions."""
    repo_id: str | None = None
    """org/name on the Hub, where the model is pushed."""


@dataclass(frozen=True, kw_only=True)
class ClipCard:
    """What the README of an exported model says. It claims nothing that is not in these fields."""

    student: str
    """Architecture of the model in the folder, e.g. ViT-T-16."""
    teacher: str | None
    """What it was distilled from, as `load_clip` was asked for it; None = trained without a teacher."""
    license: str
    """Licence of the weights, as the Hub abbreviates it (mit, apache-2.0, cc-by-4.0, other)."""
    datasets: list[str]
    """Training data: Hub ids, paths or names. Only the Hub ids go into the metadata."""
    run: RunFacts
    attack: str | None = None
    """Radius and norm of the attacks that it was trained against, e.g. 4/255 in linf; None = none."""

    def render(self, *, transformers: bool = False) -> str:
        """The text of README.md. `transformers`: the folder holds that format as well."""
        sections = [
            f"---\n{self._metadata().to_yaml()}\n---",
            f"# {self.run.repo_id.split('/')[1] if self.run.repo_id else self.student}",
            self._summary(),
            f"## Results\n\n{results_markdown(self.run.metrics)}",
            f"## Usage\n\n{self._usage(transformers)}",
            f"## Training\n\n```bash\n{self.run.command}\n```\n\n{self._training()}",
            f"## Licence and limitations\n\n{self._limits()}",
        ]
        return "\n\n".join(sections) + "\n"

    def _metadata(self) -> ModelCardData:
        base_model = hub_id(self.teacher) if self.teacher else None
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
            library_name="open_clip",
            pipeline_tag="zero-shot-image-classification",
            tags=["clip", "knowledge-distillation", "gkl"] if self.teacher else ["clip", "gkl"],
            license=self.license,
            datasets=[name for name in self.datasets if hub_id(name)] or None,
            base_model=base_model,
            # The Hub knows finetune, adapter, merge and quantized, and no word for distilled.
            base_model_relation="finetune" if base_model else None,
            model_name=self.run.repo_id or self.student,
            eval_results=results or None,
        )

    def _summary(self) -> str:
        made = f"distilled from `{self.teacher}`" if self.teacher else "trained without a teacher"
        purpose = "zero-shot image classification and image-text retrieval"
        against = f", against attacks on its images within {self.attack}," if self.attack else ""
        return f"A CLIP model for {purpose}: `{self.student}`, {made}{against} with gkl-vl."

    def _usage(self, transformers: bool) -> str:
        name = f"hf-hub:{self.run.repo_id}" if self.run.repo_id else "local-dir:path/to/this/folder"
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

model = CLIPModel.from_pretrained("{self.run.repo_id or "path/to/this/folder"}")
processor = CLIPProcessor.from_pretrained("{self.run.repo_id or "path/to/this/folder"}")
# inputs = processor(text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt")
```"""
        return text

    def _training(self) -> str:
        facts = {
            "Steps": f"{self.run.steps:,}",
            "Seed": str(self.run.seed),
            "Training data": ", ".join(self.datasets),
            "Teacher": f"`{self.teacher}`" if self.teacher else "none",
            "Commit of gkl-vl": self.run.commit,
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


def hub_id(name: str) -> str | None:
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


@dataclass(frozen=True, kw_only=True)
class ClassifierCard:
    """What the README of an exported classifier says. It claims nothing that is not in these fields."""

    student: str
    made: str
    """How it was trained, after "an image classifier, "."""
    teacher: str | None
    data: str
    """What it was trained on."""
    run: RunFacts

    def render(self) -> str:
        """The text of README.md."""
        teacher = hub_id(self.teacher) if self.teacher else None
        metadata = ModelCardData(
            library_name="timm" if self.student.startswith("timm:") else "gkl-vl",
            pipeline_tag="image-classification",
            tags=["knowledge-distillation", "gkl"] if self.teacher else ["gkl"],
            license="other",  # whoever brings the data knows its licence
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
    """Python that loads an exported classifier from a folder or a repository."""
    where = f"hf-hub:{folder}" if hub_id(folder) else f"local-dir:{folder}"
    if name.startswith("timm:"):
        return f'import timm\nmodel = timm.create_model("{where}", pretrained=True)'
    return f'from gkl_vl.models.classifiers import load_classifier\nmodel = load_classifier("{where}").model'
