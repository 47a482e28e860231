"""Pairs in text files: CSV, TSV and JSON lines, with image paths and captions.

A row that does not fit the header is an error with its line number, or a broken pair; no row is guessed or joined.
"""

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gkl_vl.data.captions import CaptionRule, Captions, captions_in, joined, parsed
from gkl_vl.data.images import BrokenSample
from gkl_vl.data.tables import need_columns
from gkl_vl.errors import UserError, first_line
from gkl_vl.reading import read_text

DELIMITERS = ("\t", ",", ";", "|")
ENDINGS = (".csv", ".tsv", ".jsonl")


Row = tuple[str, Captions, str]
"""Path of the image as written, captions, and what is wrong with the row ("" = nothing)."""


def read_csv(path: str, image_column: str, caption_columns: Sequence[str], *, quoted: bool | None = None) -> list[Row]:
    """Reads a CSV or TSV file with a header.

    Args:
        caption_columns: none = captions are not read.
        quoted: whether a cell may be in double quotes, as in RFC 4180, which allows delimiters, line ends and doubled
            quotes in it. Else a quote is a letter. None = yes for .csv, no for .tsv unless its header is quoted.

    The delimiter is the one of `DELIMITERS` with which the header has the columns.

    Raises: UserError, with the line number, for a file that is not UTF-8, a row with more cells than the header, and a
        quote that is not closed or closes rows later.
    """
    text = read_text(path)
    sure = quoted is not None
    if quoted is None:
        quoted = not path.lower().endswith(".tsv") or text.lstrip().startswith('"')
    delimiter, header = _header(path, text, [image_column, *caption_columns], quoted)
    image, *captions = (header.index(column) for column in (image_column, *caption_columns))
    rows: list[Row] = []
    for line, cells in _rows(path, text, delimiter, quoted, sure, image):
        if len(cells) > len(header):
            raise UserError(
                f"{path!r} line {line} has {len(cells)} cells for the {len(header)} columns {', '.join(header)}: put a "
                f"cell that holds {delimiter!r} in double quotes" + ("" if quoted else " and give --quoted")
            )
        if not sure and not quoted and any(_looks_quoted(cell) for cell in cells):
            raise UserError(
                f"{path!r} line {line} has a cell in double quotes: give --quoted if they enclose it, or --no-quoted "
                "if they are letters"
            )
        if len(cells) < len(header):
            lost = f"line {line} has {len(cells)} of {len(header)} cells"
            rows.append((cells[image] if image < len(cells) else f"line {line}", Captions(), lost))
        else:
            rows.append((cells[image], joined([(cells[caption],) for caption in captions]), ""))
    return rows


def read_jsonl(path: str, image_field: str, rule: CaptionRule | None) -> list[Row]:
    """Reads a file with a JSON object per line. Lines that cannot be read are broken pairs.

    Args:
        rule: None = captions are not read.
    """
    rows: list[Row] = []
    fields = () if rule is None else rule.fields or ("caption",)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parsed(line.encode())
            if not isinstance(record, dict) or not isinstance(record.get(image_field), str):
                raise BrokenSample(f"no object with a text {image_field!r}")
            rows.append((record[image_field], joined([captions_in(record, field) for field in fields]), ""))
        except BrokenSample as error:
            rows.append((f"line {number}", Captions(), f"line {number}: {error}"))
    return rows


def _header(path: str, text: str, needed: list[str], quoted: bool) -> tuple[str, list[str]]:
    """The delimiter and the names of the columns."""
    first = re.split(r"\r\n|\r|\n", text.lstrip("\r\n"), maxsplit=1)[:1]
    headers = {}
    for delimiter in DELIMITERS:
        cells = next(csv.reader(first, delimiter=delimiter, quoting=_quoting(quoted), skipinitialspace=quoted), [])
        headers[delimiter] = [cell.strip() for cell in cells]
    fitting = [delimiter for delimiter in DELIMITERS if set(needed) <= set(headers[delimiter])]
    delimiter = fitting[0] if fitting else max(DELIMITERS, key=lambda each: len(headers[each]))
    header = headers[delimiter]
    need_columns(path, header, *needed)
    return delimiter, header


def _rows(
    path: str, text: str, delimiter: str, quoted: bool, sure: bool, image: int
) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of a row's first line, and its cells, without the header and empty lines."""
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is shorter than some captions
    # newline="": the reader decides whether a line end is in a cell
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=_quoting(quoted),
        skipinitialspace=quoted,
        strict=True,
    )
    rows: Iterator[list[str]] = iter(reader)
    first, header = 1, True
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path!r} line {first} has a quote that does not enclose a cell ({first_line(error)}): double the "
                "quotes inside a cell, or give --no-quoted where quotes are letters"
            ) from error
        if cells:  # none on an empty line
            if not header and not sure and _holds_rows(cells, delimiter, image):
                raise UserError(
                    f"{path!r} line {first} has a cell of several lines that look like rows, as after a quote that is "
                    "not closed: double the quotes inside a cell, give --quoted if it is one cell, or --no-quoted "
                    "where quotes are letters"
                )
            if not header:
                yield first, cells
            header = False
        first = reader.line_num + 1


def _holds_rows(cells: list[str], delimiter: str, image: int) -> bool:
    """Whether a line of a cell of several lines looks like a row.

    That is, it has a tab, or in the image's place a path like that of this row: with the same ending or, where that has
    none, without spaces.
    """
    own = Path(cells[image]) if image < len(cells) else Path()
    for cell in cells:
        lines = cell.splitlines()
        for line in lines if len(lines) > 1 else []:
            parts = line.split(delimiter)
            path = parts[image].strip().strip('"') if image < len(parts) and len(parts) > 1 else ""
            if "\t" in line or (path and Path(path).suffix == own.suffix and (own.suffix or " " not in path)):
                return True
    return False


def _looks_quoted(cell: str) -> bool:
    """Whether a cell is as a writer of quoted cells leaves one that holds a quote."""
    return len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in cell[1:-1]


def _quoting(quoted: bool) -> Any:
    return csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
