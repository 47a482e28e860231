"""Zero-shot classification of one image with typed labels.

Axis letters: C = labels, d = embedding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from gkl_vl.data.classes import spaced
from gkl_vl.demo.models import DemoModel, embed_images, timed
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import zero_shot_classifier

TEMPLATE = "a photo of a {c}."
MAX_LABELS = 1000


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Typed labels."""

    names: tuple[str, ...]
    """Distinct, in the order in which they were typed."""
    repeated: tuple[str, ...]
    """Labels that were typed more than once."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model returns for an image."""

    probabilities: tuple[tuple[str, float], ...]
    """(label, probability in [0, 1]), most probable first."""
    image_ms: float
    """Preprocessing and image tower."""
    ms_per_text: float
    """Tokenizer and text tower, divided by the number of labels."""


def parse_labels(text: str) -> Labels:
    """Splits a text at commas and line ends. Labels that differ in case, spaces or "_" alone are the same.

    Raises: UserError for fewer than two labels or more than `MAX_LABELS`.
    """
    typed = [label for part in re.split(r"[,\n]", text) if (label := " ".join(part.split()))]
    names: dict[str, str] = {}
    repeated: dict[str, str] = {}
    for label in typed:
        key = spaced(label).casefold()
        if key in names:
            repeated[key] = names[key]
        names.setdefault(key, label)
    if not names:
        raise UserError("Type the labels to choose from, one a line or separated by commas.")
    if len(names) == 1:
        raise UserError(f"The only label is {typed[0]!r}: type at least two, as probabilities are shares among labels.")
    if len(names) > MAX_LABELS:
        raise UserError(f"{len(names):,} labels are too many: type at most {MAX_LABELS:,}.")
    return Labels(names=tuple(names.values()), repeated=tuple(repeated.values()))


def classify(model: DemoModel, *, image: Image.Image, labels: Sequence[str], template: str) -> Prediction:
    """Probabilities of the labels for a decoded image.

        softmax_c(s <e(image), e(prompt_c)>),  s = the model's logit scale

    SigLIP's bias is the same for all labels and cancels.

    Args:
        template: the prompt, with {c} for the label.

    Raises: UserError for a template without {c}.
    """
    if "{c}" not in template:
        raise UserError(f"The prompt {template!r} has no place for the label: write {{c}} where it goes.")
    row, image_ms = timed(lambda: embed_images(model, [image])[0])
    embedder = model.embedder
    classifier, text_ms = timed(lambda: zero_shot_classifier(embedder, classnames=labels, templates=[template]))
    scale = embedder.clip.towers.log_scale().detach().exp().cpu()
    probabilities = (scale * classifier @ row).softmax(dim=0)
    order: list[int] = probabilities.argsort(descending=True, stable=True).tolist()
    return Prediction(
        probabilities=tuple((labels[c], float(probabilities[c])) for c in order),
        image_ms=image_ms,
        ms_per_text=text_ms / len(labels),
    )
