"""Captions of a training pair, from a text, a JSON record or a table cell."""

import json
from dataclasses import dataclass
from typing import Any

from gkl_vl.data.images import BrokenSample
from gkl_vl.errors import first_line
from gkl_vl.reading import without_repetition


@dataclass(frozen=True)
class CaptionRule:
    """Where the captions of a pair are."""

    field: str | None = None
    """Member ending, JSON field or column; `a.b` = field b of the struct, or of each struct of the list, in a. None =
    the usual ones of the source."""
    lines: bool = False
    """A text file holds a caption per line; False = it is one caption."""

    def in_members(self, members: dict[str, bytes]) -> tuple[str, ...]:
        """Captions of a shard's sample, or of the files beside an image, by ending: of .txt, else `caption` in .json.

        Raises: BrokenSample for a member that cannot be read, and a value that is neither text nor a list of texts.
        """
        ending = "txt" if self.field is None else self.field.lower()
        if ending in members:
            return self.in_text(members[ending])
        if "json" not in members:
            return ()
        record = parsed(members["json"])
        if not isinstance(record, dict):
            raise BrokenSample(f"its .json is {_kind(record)}, not an object")
        field = "caption" if self.field is None else self.field
        if self.field is not None and field.partition(".")[0] not in record:
            raise BrokenSample(f"no caption: its .json has no {field!r}, only {', '.join(map(repr, record))}")
        return captions_in(record, field)

    def in_text(self, content: bytes) -> tuple[str, ...]:
        """Captions of a text file. Raises: BrokenSample for bytes that are not UTF-8."""
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenSample(f"the caption is not UTF-8 ({first_line(error)})") from error
        return tuple(text.splitlines()) if self.lines else (text,)


def parsed(content: bytes) -> Any:
    """The value of a JSON text. Raises: BrokenSample."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise BrokenSample(f"no JSON ({first_line(error)})") from error


def captions_in(record: dict[str, Any], field: str) -> tuple[str, ...]:
    """The captions in a field of a record: a text, or a list of texts; none if it is absent, null or empty.

    Args:
        field: `a.b` = field b of the struct, or of each struct of the list, in field a. A field named `a.b` comes
            first.

    Raises: BrokenSample for any other value, which names the fields of a struct.
    """
    value = record[field] if field in record else _descend(record, field.split("."))
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if text == {}:
            raise BrokenSample(f"{field!r} is an empty struct where a text is expected")
        if isinstance(text, dict):
            raise BrokenSample(
                f"{field!r} is a struct of {', '.join(text)}: name one with --columns, as {field}.{next(iter(text))}"
            )
        if text is not None and not isinstance(text, str):
            raise BrokenSample(f"{field!r} has {_kind(text)} where a text is expected")
    return tuple(text for text in texts if text is not None)


def _descend(value: Any, names: list[str]) -> Any:
    """The value at a path of field names; a list gives the list of its elements' values, and a missing field None."""
    if not names or value is None:
        return value
    if isinstance(value, list):
        return [_descend(element, names) for element in value]
    if not isinstance(value, dict):
        raise BrokenSample(f"{_kind(value)} where a struct with {names[0]!r} is expected")
    return _descend(value.get(names[0]), names[1:])


def usable_captions(captions: tuple[str, ...]) -> list[str]:
    """The captions that are not empty, stripped. Raises: BrokenSample if there are none, or one is no valid Unicode."""
    stripped = [caption.strip() for caption in captions]
    usable = [caption for caption in stripped if caption]
    if not usable:
        raise BrokenSample("no caption")
    for caption in usable:
        if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise BrokenSample("a caption with half a surrogate pair, which is no Unicode text")
    return usable


_KINDS = {bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a struct"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")
