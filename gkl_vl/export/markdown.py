"""Texts of others (names, paths, commands) in Markdown and YAML, where no character of them is markup.

Renderers of model cards differ: some make links of `www.x.org` and of an address in plain text, and some read a
backslash before a pipe in another way. So a text is either shown in code, or consists of plain words.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_WORD = re.compile(r"\(?[^\W_]+(?:[-'][^\W_]+)*[,.;:%)]*")
"""A word without a character that any Markdown renderer reads as markup."""
_JOINERS = "\u200c\u200d"
"""Invisible, but part of words in some scripts and of emoji."""


def code(text: str) -> str:
    """`text` as a code span on one line, with a box for each control, bidirectional or unassigned character."""
    line = _visible(" ".join(text.split()))
    ticks = "`" * (_longest_run(line) + 1)
    padding = " " if not line or line[0] == "`" or line[-1] == "`" else ""
    return f"{ticks}{padding}{line}{padding}{ticks}"


def name(text: str) -> str:
    """`text` as it is where it consists of plain words, else as a code span."""
    return " ".join(text.split()) if text.split() and all(map(_WORD.fullmatch, text.split())) else code(text)


def prose(text: str) -> str:
    """A sentence with a code span around each word that is not plain. Its own backticks are dropped."""
    words = text.replace("`", " ").split()
    return " ".join(word if _WORD.fullmatch(word) else code(word) for word in words)


def fence(text: str, language: str) -> str:
    """A code block, which no line of `text` ends."""
    lines = "\n".join(_visible(line) for line in text.split("\n"))
    ticks = "`" * max(_longest_run(lines) + 1, 3)
    return f"{ticks}{language}\n{lines}\n{ticks}"


def python_string(text: str) -> str:
    """`text` as a literal in double quotes."""
    return json.dumps(_visible(text), ensure_ascii=False)


def table(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A table of Markdown cells, the first row its header; all columns but the first `left` are aligned right."""
    rule = ["---"] * left + ["---:"] * (len(rows[0]) - left)
    # A pipe ends a cell in code spans too, and renderers do not agree on how it is escaped behind a backslash.
    cells = [[cell.replace("|", "¦") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def front_matter(data: Mapping[str, Any]) -> str:
    """The YAML block at the start of a card, from which YAML reads `data` again.

    Texts that are not printable ASCII are escaped, so that no value has a line of its own.
    """
    text = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=10**9)
    return f"---\n{text}---"


def replace_section(card: str, title: str, section: str, *, before: str) -> str:
    """`card` with this section of level 2 in place of one with the same title, or in front of the section `before`.

    Headings in code blocks do not count.
    """
    starts: dict[str, int] = {}
    position, ticks = 0, ""
    for line in card.splitlines(keepends=True):
        run = re.match(r"`{3,}", line)
        if run and not ticks:
            ticks = run[0]
        elif run and line.strip() == ticks:
            ticks = ""
        elif not ticks and line.startswith("## "):
            starts.setdefault(line[3:].strip(), position)
        position += len(line)
    start = starts.get(title, starts.get(before, len(card)))
    later = [at for at in starts.values() if at > start]
    end = start if title not in starts else min(later, default=len(card))
    return f"{card[:start]}{section.rstrip()}\n\n{card[end:]}"


class _Dumper(yaml.SafeDumper):
    """Writes texts in double quotes, with escapes, but for those that start with a letter and have no line breaks.

    YAML 1.2, which the Hub reads, has numbers (1e3, 0o7) that PyYAML's 1.1 would write as plain texts.
    """


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    text = text.encode("utf-8", "replace").decode()  # lone surrogates, of file names, are no Unicode
    plain = text.isprintable() and text[:1].isalpha()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() or c in _JOINERS else "\N{REPLACEMENT CHARACTER}" for c in text)


def _longest_run(text: str) -> int:
    """Length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
