"""Text of users as HTML: class names, captions, paths and commands can hold anything."""

import html
import re

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_UNPRINTABLE = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_BIDI}\ud800-\udfff\ufffe\uffff]")
"""Control characters but tab and line end, marks that reorder the text around them, and what UTF-8 cannot hold."""


def escaped(text: str) -> str:
    """`text` for an element or a quoted attribute, with a replacement character for each unprintable one."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True)


def isolated(text: str) -> str:
    """`escaped` in an element whose direction of writing does not affect the text around it."""
    return f"<bdi>{escaped(text)}</bdi>"


def prose(text: str) -> str:
    """`escaped`, with code elements in place of backticks."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escaped(text))
