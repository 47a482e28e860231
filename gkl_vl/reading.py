"""Reading texts and JSON that users wrote or fetched: one line for what cannot be read, with the place and a remedy."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from gkl_vl.errors import UserError, first_line

_POINTER = b"version https://git-lfs.github.com/spec/"


def read_text(path: str | Path) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Raises: UserError for a file that is missing or cannot be read, and for one that is not UTF-8, with the line.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{str(path)!r} does not exist") from error
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}): check the path") from error
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{str(path)!r} is UTF-16: convert it with `iconv -f utf-16 -t utf-8 OLD > NEW`")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{str(path)!r} line {line} is not UTF-8 (byte 0x{content[error.start]:02x}): convert it, from Latin-1 "
            "with `iconv -f latin1 -t utf-8 OLD > NEW`"
        ) from error


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file without surrounding spaces, and without empty lines at its end.

    Raises: UserError as `read_text`, and for an empty line between others.
    """
    lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if "" in lines:
        raise UserError(f"{str(path)!r} line {lines.index('') + 1} is empty: remove it")
    return lines


def read_json(path: str | Path, expected: type = dict) -> Any:
    """Reads a JSON file whose content is of the type `expected`.

    Raises: UserError for a file that is missing, is not JSON, has an object with a key twice, or has content of another
        type.
    """
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is no JSON ({first_line(error)}): correct it or fetch it again") from error
    if not isinstance(content, expected):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__} where a {expected.__name__} is expected")
    return content


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`, as json keeps the last value of a repeated key. Raises: ValueError."""
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated!r} occurs twice in one object")
    return content


def refuse_pointer(path: str | Path) -> None:
    """Raises: UserError for a Git LFS pointer, the text file that a clone without git-lfs leaves."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{str(path)!r} is a Git LFS pointer, not the file: run `git lfs pull` in its folder, or download the "
                "file itself"
            )
