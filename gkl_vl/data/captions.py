"""Captions of a training pair, from a text, a JSON record or a table cell."""

import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any

from gkl_vl.data.images import BrokenSample
from gkl_vl.errors import first_line
from gkl_vl.reading import without_repetition


@dataclass(frozen=True)
class Captions:
    """The captions of a pair, of all columns."""

    texts: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    """Number of the column that each is from."""


@dataclass(frozen=True)
class CaptionRule:
    """Where the captions of a pair are."""

    fields: tuple[str, ...] = ()
    """Columns, member endings or JSON fields; `a.b` = field b of the struct, or of each struct of the list, in a, or
    of the member .a where that ends in json. None = the usual one of the source."""
    lines: bool = False
    """A text file holds a caption per line; False = it is one caption."""

    def endings(self) -> set[str]:
        """Endings of the members that may hold captions."""
        if not self.fields:
            return {"txt", "json"}
        parts = [field.lower().split(".") for field in self.fields]
        return {"json"} | {".".join(names[:count]) for names in parts for count in range(1, len(names) + 1)}

    def in_members(self, members: dict[str, bytes]) -> Captions:
        """Captions of a shard's sample, or of the files beside an image, by ending: of .txt, else `caption` in .json.

        Raises: BrokenSample for a member that cannot be read, and a value that is neither text nor a list of texts.
        """
        return joined([self._in_members(members, field) for field in self.fields or (None,)])

    def _in_members(self, members: dict[str, bytes], field: str | None) -> tuple[str, ...]:
        ending = "txt" if field is None else field.lower()
        if ending in members and ending.endswith("json"):
            raise BrokenSample(f"its .{ending} is JSON: name a field of it with --columns, as {ending}.FIELD")
        if ending in members:
            return self.in_text(members[ending])
        below = next((name for name in members if name.endswith("json") and ending.startswith(f"{name}.")), "json")
        if below not in members:
            return ()
        record = parsed(members[below])
        if not isinstance(record, dict):
            raise BrokenSample(f"its .{below} is {_kind(record)}, not an object")
        name = "caption" if field is None else field
        if ending.startswith(f"{below}."):
            name = name[len(below) + 1 :]
        # Of several columns some may be absent.
        if len(self.fields) == 1 and name not in record and name.partition(".")[0] not in record:
            raise BrokenSample(f"no caption: its .{below} has no {name!r}, only {', '.join(map(repr, record))}")
        return captions_in(record, name)

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


def joined(by_column: Sequence[tuple[str, ...]]) -> Captions:
    """The captions of several columns."""
    return Captions(
        tuple(text for texts in by_column for text in texts),
        tuple(number for number, texts in enumerate(by_column) for _ in texts),
    )


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


def draw_captions(rng: random.Random, columns: Sequence[int], weights: Sequence[float] | None, count: int) -> list[int]:
    """Numbers of `count` captions of a pair: different ones where a column has as many, else some twice.

    Of several columns each has a number of draws that is its share of the weights times `count`, rounded up or down at
    random (systematic sampling): with equal weights, two draws of two columns are one of each. Columns in which the
    pair has no caption have no share.

    Args:
        columns: of each usable caption.
        weights: of each column; None = equal.
    """
    present = sorted(set(columns))
    numbers = {c: [number for number, column in enumerate(columns) if column == c] for c in present}
    for of_column in numbers.values():
        rng.shuffle(of_column)
    edges = list(accumulate(1.0 if weights is None else weights[column] for column in present))
    endless, start = {column: cycle(of_column) for column, of_column in numbers.items()}, rng.random()
    drawn = []
    for draw in range(count):
        index = bisect_right(edges, (start + draw) / count * edges[-1])
        drawn.append(next(endless[present[min(index, len(present) - 1)]]))  # a point may be rounded to the last edge
    return drawn


_KINDS = {bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a struct"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")
