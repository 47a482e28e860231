"""Model cards: the README.md of an exported CLIP or classifier."""

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from gkl_vl.export.markdown import code, fence, front_matter, name, prose, python_string, replace_section, table
from gkl_vl.models.towers import Side
from gkl_vl.provenance import without_secrets

PICTURE_NAME = "report.png"
EXAMPLE_NAME = "example.png"
_FOLDER = "path/to/this/folder"
"""In the code of a card; `for_hub` replaces it."""
_INTERVALS = (
    "In brackets: 95 % bootstrap intervals over the images of each set{counts}. The spread between training runs is no "
    "part of them."
)


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
    """Records as in results.jsonl: `model` (teacher or student), `dataset`, metrics as fractions of 1, and where they
    are known `n`, the number of images, and `intervals`, {metric: [low, high]}."""
    images: int | None = None
    """Images seen in training, each as often as it was seen, without unlabelled ones of a semi-supervised run; None =
    unknown."""
    hours: float | None = None
    """Hours of training, without evaluation; None = unknown."""
    hardware: str | None = None
    """Processes and their device; None = unknown."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package -> version at the start of the run."""
    picture: Path | None = None
    """The run's report.png, which is copied beside the card."""


@dataclass(frozen=True, kw_only=True)
class WidgetExample:
    """A held-out image, which is stored beside the card and which the Hub's widget offers with these labels."""

    image: Image.Image
    name: str
    """What it shows; one of the labels."""
    labels: Sequence[str]
    credit: str
    """Author and licence of the image, and of others of its set in report.png."""


@dataclass(frozen=True, kw_only=True)
class FormatFacts:
    """A further format of the exported weights: its files, how it was checked, and its accuracy."""

    name: str
    """E.g. ONNX int8."""
    files: Mapping[str, int]
    """Path in the folder -> bytes."""
    note: str = ""
    """How it was checked and how it is loaded, in a sentence or two."""
    before: Sequence[Mapping[str, Any]] = ()
    """Records as in `RunFacts.metrics` of the exported weights, without `model`."""
    after: Sequence[Mapping[str, Any]] = ()
    """The same of this format."""


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
    example: WidgetExample | None = None
    """None = no widget example."""
    formats: Sequence[FormatFacts] = ()
    """Formats beside those of open_clip and transformers."""

    def render(
        self,
        *,
        transformers: bool = False,
        model_class: str | None = None,
        image_size: int | None = None,
        context_length: int | None = None,
    ) -> str:
        """Returns the text of README.md.

        Args:
            transformers: the folder also contains transformers' format, that of CLIPModel.
            model_class: CLIPModel or SiglipModel for a folder in transformers' format alone; None = open_clip's.
            image_size: side of the input images in pixels; None = unknown.
            context_length: longest text in tokens; None = unknown.
        """
        metadata = self._metadata("open_clip" if model_class is None else "transformers")
        training = _training(self.run, self._facts(), images="Images seen")
        sections = [
            front_matter(metadata.to_dict()),
            f"# {name(self.student)}",
            self._summary(),
            *_picture(self.run, self.example),
            f"## Results\n\n{results_markdown(self.run.metrics)}",
            f"## Usage\n\n{self._usage(transformers, model_class)}",
            *([f"## Formats\n\n{formats_markdown(self.formats)}"] if self.formats else []),
            f"## Training\n\n{training}",
            f"## Licence and limitations\n\n{self._licence()}\n\n{self._limits(image_size, context_length)}",
        ]
        return "\n\n".join(sections) + "\n"

    def _metadata(self, library: str) -> ModelCardData:
        base_models = [found for found in map(hub_id, self.teachers) if found]
        widget = None if self.example is None else [_widget(self.example)]
        results = _eval_results(
            self.run.metrics,
            lambda key: "image-text-retrieval" if "retrieval" in key else "zero-shot-image-classification",
        )
        return ModelCardData(
            library_name=library,
            pipeline_tag="zero-shot-image-classification",
            tags=["clip", "knowledge-distillation", "gkl"] if self.teachers else ["clip", "gkl"],
            license=self.license,
            datasets=[found for found in map(hub_id, self.datasets) if found] or None,
            base_model=base_models[0] if len(base_models) == 1 else base_models or None,
            # The Hub has finetune, adapter, merge and quantized, and no relation for distillation.
            base_model_relation="finetune" if base_models else None,
            widget=widget,
            model_name=self.student if results else None,
            eval_results=results,
        )

    def _summary(self) -> str:
        training = f"distilled from {self._teachers()}" if self.teachers else "trained without a teacher"
        purpose = "zero-shot image classification and image-text retrieval"
        attacks = f", against attacks on its images within {prose(self.attack)}," if self.attack else ""
        text = f"A CLIP model for {purpose}: {code(self.student)}, {training}{attacks} with gkl-vl."
        if self.one_tower is None:
            return text
        other = "text" if self.one_tower == "image" else "image"
        return (
            f"{text}\n\nOnly the {self.one_tower} tower was trained, into the teacher's embedding space. The {other} "
            f"tower and the logit scale are the teacher's own: {self.one_tower} embeddings of this model can be "
            f"compared with {other} embeddings that the teacher computed, and with an index of them."
        )

    def _usage(self, transformers: bool, model_class: str | None) -> str:
        ways = []
        if model_class is None:
            loaded = python_string(f"local-dir:{_FOLDER}")
            ways.append(
                "With open_clip:\n\n"
                + fence(
                    "import open_clip\n\n"
                    f"model, _, preprocess = open_clip.create_model_and_transforms({loaded})\n"
                    f"tokenizer = open_clip.get_tokenizer({loaded})",
                    "python",
                )
            )
        if model_class is not None or transformers:
            ways.append(self._transformers_usage("CLIPModel" if model_class is None else model_class))
        prefix = "local-dir" if model_class is None else "transformers"
        command = f"python eval/zero_shot.py --model {prefix}:{_FOLDER} --dataset wds/cifar10"
        ways.append(f"Evaluation with gkl-vl, in a checkout of it:\n\n{fence(command, 'bash')}")
        return "\n\n".join(ways)

    def _transformers_usage(self, model_class: str) -> str:
        processor = model_class.replace("Model", "Processor")
        text = f"""from transformers import {model_class}, {processor}

model = {model_class}.from_pretrained("{_FOLDER}")
processor = {processor}.from_pretrained("{_FOLDER}")
# inputs = processor(text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt")"""
        return f"With transformers:\n\n{fence(text, 'python')}"

    def _teachers(self) -> str:
        return ", ".join(map(code, self.teachers))

    def _facts(self) -> dict[str, str | None]:
        return {
            "Training data": ", ".join(name(without_secrets(dataset)) for dataset in self.datasets),
            "Initial weights": None if self.start is None else prose(self.start),
            "Average": None if self.averaged is None else f"{self.averaged:g} trained, the rest initial weights",
            "Teacher" if len(self.teachers) < 2 else "Teachers": self._teachers() or "none",
        }

    def _sources(self) -> str:
        teachers = f" and the {'teacher' if len(self.teachers) == 1 else 'teachers'}" if self.teachers else ""
        return f"the training data{teachers}"

    def _licence(self) -> str:
        sources = self._sources()
        if self.license == "other":
            return (
                f"No licence has been chosen for these weights: {sources} have terms of their own, read them before "
                "use. Whoever publishes the model sets `license` in the metadata above."
            )
        return (
            f"The weights are released under {code(self.license)}. {sources.capitalize()} have terms of their own: "
            "read them before use."
        )

    def _limits(self, image_size: int | None, context_length: int | None) -> str:
        sizes = [] if image_size is None else [f"Images are resized to {image_size} x {image_size} pixels"]
        sizes += [] if context_length is None else [f"texts are cut after {context_length} tokens"]
        return _bullets(
            [
                "Only what the table of results shows has been measured, on one training run: test the model on your "
                "own images and classes before you rely on it.",
                *([f"{', '.join(sizes)}.".capitalize()] if sizes else []),
                "It was trained against attacks, and how well it withstands others has not been measured here."
                if self.attack
                else "It was not trained against attacks on its images.",
                f"It can repeat the biases of {self._sources()}.",
            ]
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
        results = _eval_results(self.run.metrics, lambda key: "image-classification")
        metadata = ModelCardData(
            library_name="timm" if self.student.startswith("timm:") else "gkl-vl",
            pipeline_tag="image-classification",
            tags=["knowledge-distillation", "gkl"] if self.teacher else ["gkl"],
            license="other",  # the licence of the data is not known here
            datasets=[found] if (found := hub_id(self.data)) else None,
            base_model=teacher,
            base_model_relation="finetune" if teacher else None,
            model_name=self.student if results else None,
            eval_results=results,
        )
        usage = fence(classifier_usage(self.student, _FOLDER), "python")
        limits = [
            "Only what the table of results shows has been measured, on one training run: test the model on your own "
            "images before you rely on it.",
            "It knows the classes of its training data alone, and gives one of them for any image.",
        ]
        facts = {"Training data": name(without_secrets(self.data))}
        sources = "The training data and the teacher have" if self.teacher else "The training data has"
        sections = [
            front_matter(metadata.to_dict()),
            f"# {name(self.student)}",
            f"An image classifier: {code(self.student)}, {prose(self.made)} with gkl-vl.",
            *_picture(self.run, None),
            f"## Results\n\n{results_markdown(self.run.metrics)}",
            f"## Usage\n\n{usage}",
            f"## Training\n\n{_training(self.run, facts, images='Labelled images seen')}",
            f"## Licence and limitations\n\nNo licence has been chosen for these weights: {sources.lower()} terms of "
            f"their own, read them before use.\n\n{_bullets(limits)}",
        ]
        return "\n\n".join(sections) + "\n"


def classifier_usage(architecture: str, folder: str) -> str:
    """Python code that loads an exported classifier from a folder or a Hub repository."""
    source = python_string(f"hf-hub:{folder}" if hub_id(folder) else f"local-dir:{folder}")
    if architecture.startswith("timm:"):
        return f"import timm\nmodel = timm.create_model({source}, pretrained=True)"
    return f"from gkl_vl.models.classifiers import load_classifier\nmodel = load_classifier({source}).model"


def results_markdown(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of teachers and student in per cent, with one line per data set and metric; what a student kept
    is given for a single teacher."""
    if not metrics:
        return "No evaluation was run."
    others = dict.fromkeys(row["model"] for row in metrics if row["model"] not in ("teacher", "student"))
    roles = ["teacher", *others, "student"]
    by_role = {role: _by_dataset(row for row in metrics if row["model"] == role) for role in roles}
    rows = [["data set", "metric", *roles, "kept"]]
    for dataset in dict.fromkeys(row["dataset"] for row in metrics):
        sides = [by_role[role].get(dataset, {}) for role in roles]
        teacher, student = sides[0], sides[-1]
        for key in dict.fromkeys(key for side in reversed(sides) for key in side):
            comparable = not others and key in teacher and key in student and teacher[key].value > 0
            kept = f"{100 * student[key].value / teacher[key].value:.0f} %" if comparable else ""
            rows.append([code(dataset), code(key), *(str(side.get(key, "")) for side in sides), kept])
    counts = {row["dataset"]: row["n"] for row in metrics if "n" in row}
    shown = ", ".join(f"{code(dataset)} {count:,}" for dataset, count in counts.items())
    if not any(row.get("intervals") for row in metrics):
        return table(rows, left=2)
    return f"{table(rows, left=2)}\n\n{_INTERVALS.format(counts=f' ({shown})' if shown else '')}"


def formats_markdown(formats: Sequence[FormatFacts]) -> str:
    """Files and sizes of each format, how it was checked, and its accuracy beside that of the exported weights."""
    files = [["format", "files", "MB"]]
    accuracy = [["format", "data set", "metric", "exported", "this format", "difference"]]
    for item in formats:
        paths = ", ".join(map(code, item.files))
        files.append([name(item.name), paths, f"{sum(item.files.values()) / 1e6:,.1f}"])
        before, after = _by_dataset(item.before), _by_dataset(item.after)
        for dataset, scores in before.items():
            for key, score in scores.items():
                converted = after.get(dataset, {}).get(key)
                if converted is not None:
                    change = f"{100 * (converted.value - score.value):+.1f}"
                    accuracy.append([name(item.name), code(dataset), code(key), str(score), str(converted), change])
    notes = [f"{name(item.name)}: {prose(item.note)}" for item in formats if item.note]
    parts = [table(files, left=2), _bullets(notes), table(accuracy, left=3) if len(accuracy) > 1 else ""]
    return "\n\n".join(filter(None, parts))


def with_formats(card: str, formats: Sequence[FormatFacts]) -> str:
    """The text of a card, with these formats in place of those that it had."""
    return replace_section(card, "Formats", f"## Formats\n\n{formats_markdown(formats)}", before="Training")


def for_hub(card: str, repo_id: str, revision: str | None) -> str:
    """The text of a card with the name of a Hub repository in its code, in place of that of a folder.

    A branch is downloaded first: open_clip and this package load the main one of a name.
    """
    if _FOLDER not in card:
        return card
    folder = repo_id.rpartition("/")[2]
    if revision is None:
        return card.replace(f"local-dir:{_FOLDER}", f"hf-hub:{repo_id}").replace(_FOLDER, repo_id)
    command = shlex.join(["hf", "download", repo_id, "--revision", revision, "--local-dir", folder])
    first = f"This model is on a branch, which is downloaded first:\n\n{fence(command, 'bash')}\n\n"
    return card.replace("## Usage\n\n", f"## Usage\n\n{first}", 1).replace(_FOLDER, folder)


def hub_id(source: str) -> str | None:
    """Returns org/repo if `source` has the form of a Hub repository, else None."""
    prefix, _, rest = source.partition(":")
    if not rest:
        rest = source
    elif prefix not in ("hf-hub", "transformers"):
        return None
    return rest if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", rest) and not Path(rest).exists() else None


# ---- metrics


@dataclass(frozen=True)
class _Score:
    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        bounds = "" if self.interval is None else f" ({100 * self.interval[0]:.1f}–{100 * self.interval[1]:.1f})"
        return f"{100 * self.value:.1f} %{bounds}"


def _by_dataset(rows: Any) -> dict[str, dict[str, _Score]]:
    """{data set: {metric: score}}; classification and retrieval on one data set can be two rows."""
    scores: dict[str, dict[str, _Score]] = {}
    for row in rows:
        scores.setdefault(row["dataset"], {}).update(_scores(row))
    return scores


def _scores(row: Mapping[str, Any]) -> dict[str, _Score]:
    # acc5 is nan for fewer than five classes; the Hub's YAML metadata does not allow nan.
    numbers = {key: value for key, value in row.items() if isinstance(value, float) and math.isfinite(value)}
    shown = re.compile(r"acc|(many|medium|few)_acc1$|.*recall")  # many, medium, few: classes by their number of images
    return {key: _Score(value, _interval(row, key)) for key, value in numbers.items() if shown.match(key)}


def _interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    bounds = row.get("intervals", {}).get(key)
    return (bounds[0], bounds[1]) if bounds is not None and all(map(math.isfinite, bounds)) else None


def _eval_results(metrics: Sequence[Mapping[str, Any]], task_of: Callable[[str], str]) -> list[EvalResult] | None:
    """The student's metrics for the metadata. The Hub's format has no field for an interval: it is an argument."""
    results = []
    for row in metrics:
        for key, score in _scores(row).items() if row["model"] == "student" else ():
            arguments: dict[str, Any] = {"images": row["n"]} if "n" in row else {}
            if score.interval is not None:
                arguments["confidence_interval_95"] = [round(bound, 6) for bound in score.interval]
            results.append(
                EvalResult(
                    task_type=task_of(key),
                    dataset_type=row["dataset"],
                    dataset_name=row["dataset"],
                    metric_type=key,
                    metric_name=key,
                    metric_value=round(score.value, 6),
                    metric_args=arguments or None,
                )
            )
    return results or None


# ---- sections


def _picture(run: RunFacts, example: WidgetExample | None) -> list[str]:
    """The picture of the run, and where the drawings in it and in the example are from."""
    shown = f"![Curves of the training run and results on held-out images]({PICTURE_NAME})"
    return [shown] * (run.picture is not None) + ([] if example is None else [prose(example.credit)])


def _widget(example: WidgetExample) -> dict[str, str]:
    """The metadata of the Hub's widget, which separates labels by commas."""
    labels = dict.fromkeys(" ".join(label.replace(",", " ").split()) for label in example.labels)
    return {"src": EXAMPLE_NAME, "candidate_labels": ", ".join(labels), "example_title": example.name}


def _training(run: RunFacts, facts: Mapping[str, str | None], *, images: str) -> str:
    """The command of a run, and facts about it. `images`: what the number of images is called."""
    shown = {
        "Steps": f"{run.steps:,}",
        images: None if run.images is None else f"{run.images:,}",
        "Seed": str(run.seed),
        "Hours": None if run.hours is None else f"{_hours(run.hours)}, without evaluation",
        "Hardware": None if run.hardware is None else prose(run.hardware),
        **facts,
        "Commit of gkl-vl": None if run.commit is None else name(run.commit),
        "Versions": ", ".join(code(f"{package} {version}") for package, version in run.versions.items()),
    }
    lines = _bullets([f"{key}: {fact}" for key, fact in shown.items() if fact])
    return f"{fence(without_secrets(run.command), 'bash')}\n\n{lines}"


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "less than 0.01"
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
