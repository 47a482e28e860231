"""Identity and order of classes.

The rule: two lists of classes are matched by name and never by place. A name is compared as it is written; if that does
not match the lists, with "_" as a space, Unicode composed and numbers without leading zeros; and at last without case.
What cannot be matched is refused. Names that repeat cannot be matched: such lists must be equal, in the same order.

Class folders named by numbers are sorted by number, all others as text. A number is the identity of a class and not a
name that a prompt could use. A set without names has the numbers of its labels as names.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from gkl_vl.errors import UserError


def folder_order(folders: Iterable[str]) -> list[str]:
    """Class folders in the order of their labels: by number if all are numbers, else as text."""
    folders = sorted(folders)
    return sorted(folders, key=int) if are_numbers(folders) else folders


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are numbers, which identify classes but do not name them; False without any."""
    return bool(names) and all(name.isdecimal() for name in names)


def spaced(name: str) -> str:
    """The name with "_" as a space and composed characters (macOS decomposes them in file names); "07" as "7"."""
    text = " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())
    return str(int(text)) if text.isdecimal() else text


def _without_case(name: str) -> str:
    return spaced(name).casefold()


_FORMS: tuple[Callable[[str], str], ...] = (str, spaced, _without_case)
"""How names are compared, the strictest first."""


def keys_of(names: Sequence[str], keys: Iterable[str]) -> list[str | None]:
    """For each name the key that matches it; None if none does, or several do equally well."""
    keys = list(keys)
    tables: list[tuple[Callable[[str], str], dict[str, list[str]]]] = []
    for form in _FORMS:
        table: dict[str, list[str]] = {}
        for key in keys:
            table.setdefault(form(key), []).append(key)
        tables.append((form, table))
    matches = []
    for name in names:
        matching = next((table[form(name)] for form, table in tables if form(name) in table), [])
        matches.append(matching[0] if len(matching) == 1 else None)
    return matches


def places(names: Sequence[str], reference: Sequence[str]) -> list[int] | None:
    """For each name its place in `reference`, which may have more; None if a name is missing or repeats.

    Lists that repeat names but are equal match place by place.
    """
    for form in _FORMS:
        place = {form(name): number for number, name in enumerate(reference)}
        own = [form(name) for name in names]
        if len(place) == len(reference) and len(set(own)) == len(own) and place.keys() >= set(own):
            return [place[name] for name in own]
    equal = any(list(map(form, names)) == list(map(form, reference)) for form in _FORMS)
    return list(range(len(names))) if equal else None


def match_classes(names: Sequence[str], reference: Sequence[str], *, whose: str, others: str) -> list[int]:
    """`places`. Raises: UserError that names the first difference; `whose` and `others` say whose names these are."""
    if (order := places(names, reference)) is not None:
        return order
    for owner, of_owner in ((whose, names), (others, reference)):
        if repeated := [name for name, count in Counter(map(spaced, of_owner)).items() if count > 1]:
            raise UserError(
                f"{owner} has the class {repeated[0]!r} more than once, so its classes cannot be matched by name with "
                f"those of {others if owner == whose else whose}, which differ: give its classes distinct names"
            )
    known = set(map(_without_case, reference))
    missing = [name for name in names if _without_case(name) not in known] or list(names)
    raise UserError(
        f"{whose} has the class {missing[0]!r}, which {others} lacks ({len(missing)} of {len(names)} classes; its "
        f"classes are {listed(reference)}): name data of the same classes, or rename its class folders"
    )


def named_by_list(own: Sequence[str], given: Sequence[str], *, where: str, whose: str) -> list[str]:
    """The names of a list for the classes of a set, by label.

    A list of the same classes in any order is matched by name. For classes that are numbers, number k takes the k-th
    name, from 0. Other lists are taken by label, as in CLIP_benchmark, but only if nothing speaks against that: no
    class of the set occurs at another place, and the classes are not sorted as text where their numbers have another
    order (c1, c10, c2).

    Args:
        own: the classes of the set, by label.
        where, whose: the file, and the set in it, for messages.

    Raises: UserError for another number of names, or an order that is not certain.
    """
    form = f'write {{"{own[0]}": "its name", ...}} in place of the list'
    if len(given) != len(own):
        raise UserError(
            f"{where} has {len(given)} class names for {whose}, which has {len(own)} classes ({listed(own)}): {form}"
        )
    if are_numbers(own) and not are_numbers(given):
        numbers = [int(name) for name in own]
        if sorted(numbers) != list(range(len(own))):
            raise UserError(
                f"{where} has a list for {whose}, whose k-th name is that of class k from 0, and the set's {len(own)} "
                f"classes are {listed(own)}: {form}"
            )
        return [given[number] for number in numbers]
    if (order := places(own, given)) is not None:
        return [given[place] for place in order]
    at = set(map(_without_case, given))
    pairs = [(name, _without_case(name), _without_case(other)) for name, other in zip(own, given, strict=True)]
    moved = [name for name, form_of_own, form_of_other in pairs if form_of_own in at and form_of_own != form_of_other]
    if moved:
        raise UserError(
            f"{where} has the class {moved[0]!r} of {whose} at another place than the set, whose order is "
            f"{listed(own)}, and names other classes too: {form}"
        )
    if list(own) == sorted(own) != sorted(own, key=_natural):
        raise UserError(
            f"{where} has a list for {whose}, whose classes are sorted as text ({listed(own)}) and not by their "
            f"numbers: {form}"
        )
    return list(given)


def named_by_key(own: Sequence[str], given: dict[str, str], *, where: str) -> list[str]:
    """The names of a {class: name} table for the classes of a set, by label; it may have more classes.

    Raises: UserError for a class that it lacks.
    """
    keys = keys_of(own, given)
    if lacking := [name for name, key in zip(own, keys, strict=True) if key is None]:
        raise UserError(
            f"{where} has no name for the class {lacking[0]!r} ({len(lacking)} of {len(own)} are missing; its keys are "
            f"{listed(list(given))}): add them"
        )
    return [given[key] for key in keys if key is not None]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts the numbers in names by value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, as keys: one that occurs more than once gets its label, "missile (label 0)"."""
    keys = list(names)
    while repeated := {name for name, count in Counter(keys).items() if count > 1}:
        keys = [f"{key} (label {label})" if key in repeated else key for label, key in enumerate(keys)]
    return keys


def listed(names: Sequence[str]) -> str:
    """The first of the names, for messages."""
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
