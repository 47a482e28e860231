"""open_clip's cleaning of texts as steps of a tokenizer file, so that other libraries compute the same token ids.

open_clip runs Python before its tokenizers: `ftfy.fix_text`, `html.unescape` twice, whitespace, lower case. A tokenizer
file holds replacements only, which express the following: HTML entities, nested to any depth, by the names of HTML 4
and as numbers for these characters, ASCII and punctuation; curly quotes, Latin ligatures, full-width and half-width
forms, Windows-1252 controls, control characters and terminal escapes; NFC; whitespace; case and, for SigLIP,
punctuation.

Not expressed, because it depends on the whole text: ftfy's repair of mojibake (`â€™`), the further names of HTML 5 and
numbers of other characters, ftfy's rule to leave entities for curly quotes curly in a text with a literal `<`.
Nor are special tokens in another case (`<|EndOfText|>`) before a tokenizer that lowers it itself, and in CLIP's BPE
those right after punctuation (`!<end_of_text>`): they are special tokens here, and split by open_clip.

The steps cost 0.4 ms a text. `tokenizer_class` must be generic: transformers rebuilds a `CLIPTokenizer` from its
vocabulary, without these steps.

Source: ftfy 6 (fixes.py, chardata.py), open_clip 3.3 (tokenizer.py).
"""

import copy
import html
import json
import string
from collections import defaultdict
from html.entities import entitydefs, html5
from pathlib import Path
from typing import Any

from ftfy.chardata import CONTROL_CHARS, HTML_ENTITIES, LIGATURES, WIDTH_MAP
from tokenizers import AddedToken, Regex, normalizers

_CASED, _IGNORED = r"[\p{Lu}\p{Ll}\p{Lt}]", r"[\p{M}\p{Lm}\p{Sk}\p{Cf}'.:·’]"
_BEFORE = "|".join(_CASED + _IGNORED * ignored for ignored in range(6))  # a lookbehind has a bounded length
_FINAL_SIGMA = f"(?<={_BEFORE})Σ(?!{_IGNORED}*{_CASED})"  # Unicode's condition Final_Sigma
_GENERIC_CLASS = "PreTrainedTokenizerFast"  # transformers 4's name, which 5 understands
_AMPERSAND = "amp|AMP|#0*38|#[xX]0*26"
_NUMBERED = [*range(0x20, 0x7F), *range(0xA0, 0x100), *range(0x2010, 0x2045), *map(ord, entitydefs.values())]
"""Characters that are recognised as numeric entities: ASCII, Latin-1, punctuation, those with a name in HTML 4."""


def cleaning(clean: str) -> list[normalizers.Normalizer]:
    """The steps of open_clip's cleaning function `clean`: whitespace, lower or canonicalize."""
    steps = [*_entities(), *_characters(), *_entities_without_semicolon()]
    steps += [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if clean == "canonicalize":
        steps.append(normalizers.Replace("_", " "))
        steps.append(normalizers.Replace(Regex(f"[{_class(string.punctuation)}]"), ""))
    if clean in ("canonicalize", "lower"):
        # Python's lower case ends a Greek word with another letter; tokenizers' works on single characters.
        steps.append(normalizers.Replace(Regex(_FINAL_SIGMA), "ς"))
        steps.append(normalizers.Lowercase())
    if clean == "canonicalize":  # removed punctuation leaves spaces
        steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return steps


def with_cleaning(tokenizer: Any, clean: str) -> Any:
    """A copy of a transformers tokenizer that cleans its texts first, unless it does already.

    A tokenizer without a `tokenizers` backend, in Python alone, is returned unchanged.
    """
    if not tokenizer.is_fast:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    backend, steps = tokenizer.backend_tokenizer, cleaning(clean)
    own = _stored(backend.normalizer)
    first = [stored for step in steps for stored in _stored(step)]
    if own[: len(first)] == first:
        return tokenizer
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    # open_clip cleans before special tokens are found in a text: `！` is `!`, which is one in the bundled tokenizer.
    # A token that the steps would change or remove cannot be found among their results.
    tokens = backend.get_added_tokens_decoder().values()
    kept = [token for token in tokens if backend.normalizer.normalize_str(token.content) == token.content]
    backend.add_special_tokens([_found_after_cleaning(token) for token in kept])
    if clean == "canonicalize" and not kept:  # punctuation is removed, so no special token is left in a text
        tokenizer.split_special_tokens = backend.encode_special_tokens = True
        tokenizer.init_kwargs["split_special_tokens"] = True  # which is saved
    return tokenizer


def _found_after_cleaning(token: AddedToken) -> AddedToken:
    sides = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
    return AddedToken(token.content, normalized=True, special=token.special, **sides)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a transformers tokenizer so that `AutoTokenizer` keeps its steps of cleaning."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if tokenizer.is_fast:
        config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": _GENERIC_CLASS}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stored(normalizer: Any) -> list[dict]:
    """The steps of a normalizer as in tokenizer.json."""
    if normalizer is None:
        return []
    return _flat(json.loads(normalizer.__getstate__()))


def _flat(step: dict) -> list[dict]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["normalizers"] for inner in _flat(part)]


def _entities() -> list[normalizers.Normalizer]:
    """Entities with a semicolon. Nested ampersands come first: `&amp;amp;lt;` -> `&lt;` -> `<`."""
    spellings: dict[str, list[str]] = defaultdict(list)
    wanted = set(map(chr, _NUMBERED))
    for entity, character in HTML_ENTITIES.items():  # ftfy's table: HTML 5's names and Latin letters in capitals
        if character in wanted:
            spellings[character].append(entity.strip("&;"))
    spellings["'"].append("apos")
    numbers = {number: chr(number) for number in _NUMBERED} | {9: " ", 10: " ", 13: " "}
    numbers |= {number: html.unescape(f"&#{number};") for number in range(0x80, 0xA0)}  # read as Windows-1252
    for number, character in numbers.items():
        spellings[character] += [f"#0*{number}", f"#[xX]0*(?i:{number:x})"]
    collapse = normalizers.Replace(Regex(f"&(?:(?:{_AMPERSAND});)+(?=[0-9A-Za-z#]{{1,25}};)"), "&")
    ampersand = spellings.pop("&")
    steps = [normalizers.Replace(Regex(f"&(?:{'|'.join(names)});"), char) for char, names in spellings.items()]
    return [collapse, *steps, normalizers.Replace(Regex(f"&(?:{'|'.join(ampersand)});"), "&")]


def _entities_without_semicolon() -> list[normalizers.Normalizer]:
    """HTML's old names, which Python's `html.unescape` also reads without a semicolon (`&copy 2020`)."""
    old = sorted((name for name in html5 if not name.endswith(";")), key=len, reverse=True)
    steps = [normalizers.Replace(f"&{name}", html5[name]) for name in old]
    quotes = [normalizers.Replace(Regex(f"&#0*{ord(char)}(?![0-9;])"), char) for char in "'\"&"]
    return [*steps, *quotes]


def _characters() -> list[normalizers.Normalizer]:
    """ftfy's replacements of single characters, and its removals."""
    table = {chr(number): html.unescape(f"&#{number};") for number in range(0x80, 0xA0)}  # C1 controls
    table |= {chr(number): text for number, text in {**LIGATURES, **WIDTH_MAP}.items()}
    sources: dict[str, list[str]] = defaultdict(list)
    for character, text in table.items():
        if character != text:
            sources[text].append(character)
    sources['"'] += list("\u201c\u201d\u201e\u201f")
    sources["'"] += list("\u02bc\u2018\u2019\u201a\u201b")
    steps = [normalizers.Replace(Regex(f"[{_class(''.join(found))}]"), text) for text, found in sources.items()]
    removed = "".join(map(chr, CONTROL_CHARS))
    escapes = normalizers.Replace(Regex(r"\x1b\[[0-9;]*[a-zA-Z]"), "")
    return [*steps, escapes, normalizers.Replace(Regex(f"[{_class(removed)}]"), "")]


def _class(characters: str) -> str:
    """Characters as the inside of a regular expression's class."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in characters)
