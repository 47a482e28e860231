"""Class prompts for zero-shot classification: from a file, bundled, or CLIP's templates for ImageNet and CIFAR.

pets.json   {"classnames": ["Abyssinian", "beagle"], "templates": ["a photo of a {c}, a type of pet."]}
pets.txt    one template per line; the class names are those of the data
"""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip import OPENAI_IMAGENET_TEMPLATES

from gkl_vl.data.classes import keys_of, spaced
from gkl_vl.data.pairs import BUNDLED
from gkl_vl.errors import UserError
from gkl_vl.reading import read_json, read_text

Templates = Sequence[str] | dict[str, list[str]]
"""Texts with {c} for the class name; or {class name: its texts}, CuPL's format."""
IMAGENET_TEMPLATES = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
_CIFAR_PICTURES = ("a photo", "a blurry photo", "a black and white photo", "a low contrast photo")
_CIFAR_PICTURES += ("a high contrast photo", "a bad photo", "a good photo")
CIFAR_TEMPLATES = [
    template
    for article in ("a", "the")
    for template in (
        *(f"{picture} of {article} {{c}}." for picture in _CIFAR_PICTURES),
        *(f"a photo of {article} {size} {{c}}." for size in ("small", "big")),
    )
]
"""CLIP's 18 prompts for CIFAR-10 and CIFAR-100."""
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
"""In CLIP_benchmark's layout, the file of a set with one template per line."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A text for each class and template."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    """With {c} for the class name."""

    def digest(self) -> str:
        """Hash of class names and templates."""
        return hashlib.sha256(json.dumps([self.classnames, self.templates]).encode()).hexdigest()

    def of_template(self, number: int) -> list[str]:
        """The texts of all classes for one template."""
        return [self.templates[number].replace("{c}", name) for name in self.classnames]


def bundled_prompts() -> Prompts:
    """Class names and templates of the bundled emoji, the same as in their evaluation."""
    names, templates = (_read_lines(str(BUNDLED / file)) for file in ("classnames.txt", TEMPLATES_FILE))
    return Prompts(classnames=tuple(names), templates=tuple(templates))


def read_prompts(file: str, *, classnames: tuple[str, ...] | None) -> Prompts:
    """Reads prompts from a file in one of the formats at the top of this module.

    Args:
        file: .json or .txt; a .json may omit "classnames" if the data has class names.
        classnames: those of the data, None if it has none. A file may list a subset, in any order.

    Raises:
        UserError: a missing or malformed file; a template without {c}; a class name that the data lacks, or that
            occurs twice; fewer than two classes.
    """
    if file.endswith(".json"):
        names, templates = _read_json_prompts(file)
    elif file.endswith(".txt"):
        names, templates = None, _read_lines(file)
    else:
        raise UserError(f"--prompts {file!r}: expected a file that ends in .json or .txt")
    if not is_texts(templates):
        raise UserError(f"{file!r} has no templates: write texts with {{c}} for the class name")
    require_places(repr(file), templates)
    if names is None:
        if classnames is None:
            raise UserError(
                f"{file!r} has no class names, and the data has none: write "
                '{"classnames": [...], "templates": [...]} in a .json file'
            )
        names = list(classnames)
    if not is_texts(names):
        raise UserError(f"{file!r}: its classnames are not a list of texts")
    _check_names(file, names, classnames)
    return Prompts(classnames=tuple(names), templates=tuple(templates))


def require_places(where: str, templates: Sequence[str]) -> None:
    """Raises: UserError for a template without {c}; its message starts with `where`."""
    if without := [template for template in templates if "{c}" not in template]:
        raise UserError(f"{where}: the template {without[0]!r} has no place for the class name: write {{c}}")


def is_texts(value: Any) -> bool:
    """Whether the value is a non-empty list of strings."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _read_json_prompts(file: str) -> tuple[Any, Any]:
    """Class names and templates, unchecked."""
    content = read_json(Path(file), dict)
    if unknown := sorted(content.keys() - {"classnames", "templates"}):
        raise UserError(f"{file!r} has the key {unknown[0]!r}: expected classnames and templates")
    return content.get("classnames"), content.get("templates", [])


def _read_lines(file: str) -> list[str]:
    """Lines that are not empty. Raises: UserError as `read_text`."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def _check_names(file: str, names: list[str], known: tuple[str, ...] | None) -> None:
    """Raises: UserError for an empty, repeated or unknown name, or fewer than two."""
    if any(not name.strip() for name in names):
        raise UserError(f"{file!r} has an empty class name: remove it")
    if repeated := [name for name, count in Counter(map(spaced, names)).items() if count > 1]:
        raise UserError(f"{file!r} has the class {repeated[0]!r} twice: remove one")
    if len(names) < 2:
        raise UserError(f"{file!r} has only the class {names[0]!r}: name at least two")
    if known is None:
        return
    if unknown := [name for name, key in zip(names, keys_of(names, known), strict=True) if key is None]:
        nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)[0]
        raise UserError(f"{file!r} has the class {unknown[0]!r}, which the data lacks: did you mean {nearest!r}?")
