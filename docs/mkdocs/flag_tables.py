"""The flags of a script as a table in Markdown, read from its source and from those of the groups that it composes.

Nothing is imported, so that the site is built without torch.
"""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Place(NamedTuple):
    """A class or a constant, and the file that defines it."""

    file: Path
    node: ast.ClassDef | ast.Assign | ast.AnnAssign


class Group(NamedTuple):
    """Flags of a config class, or of one of its groups."""

    title: str
    """The first sentence of the group's docstring; nothing for the flags of the script itself."""
    rows: list[tuple[str, str, str]]
    """Flag, default and help of each."""


def flag_tables(script: Path) -> str:
    """Markdown: a heading and a table for each group of flags. Scripts without a class Config use the LabelConfig."""
    place = find(script, "Config") or find(script, "LabelConfig")
    if place is None:
        return ""
    texts = []
    for group in groups(place, {}):
        rows = [f"| `{flag}` | {default} | {escaped(text)} |\n" for flag, default, text in group.rows]
        title = f"### {group.title}\n\n" if group.title else ""
        texts.append(f"{title}| flag | default | |\n|---|---|---|\n{''.join(rows)}\n")
    return "".join(texts)


def groups(place: Place, given: dict[str, ast.expr]) -> list[Group]:
    """The class's own flags, then those of its groups. `given`: defaults in place of its own."""
    own: list[tuple[str, str, str]] = []
    others: list[Group] = []
    assert isinstance(place.node, ast.ClassDef)
    body = place.node.body
    for field, following in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        value = given.get(field.target.id, field.value)
        if (part := group_of(place.file, value)) is not None:
            inner, defaults = part
            first, *rest = groups(inner, defaults)
            if is_merged(field.annotation):
                own += first.rows
            else:
                others.append(first)
            others += rest
        elif isinstance(following, ast.Expr):
            flag = f"--{field.target.id.replace('_', '-')}"
            text = choices(place.file, field.annotation) + literal(following)
            own.append((flag, shown(place.file, value), text))
        elif field.target.id == "debug":
            own.append(("--debug", "off", "Print the traceback of an error."))
    title = (ast.get_docstring(place.node) or "").split(".")[0]
    if place.node.name.endswith("Config"):
        title = ""
    return [Group(title, own), *others] if own or not others else others


def group_of(file: Path, value: ast.expr | None) -> tuple[Place, dict[str, ast.expr]] | None:
    """The class of a group and the defaults that a field gives it, of `X(a=1)` or `field(default_factory=X)`."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name)):
        return None
    keywords = {word.arg: word.value for word in value.keywords if word.arg}
    name = value.func.id
    if name == "field":
        factory, keywords = keywords["default_factory"], {}
        name = factory.id if isinstance(factory, ast.Name) else ""
    place = find(file, name)
    return None if place is None or not isinstance(place.node, ast.ClassDef) else (place, keywords)


def is_merged(annotation: ast.expr) -> bool:
    """Whether a field is Annotated[X, ...], whose flags are shown among those of the class."""
    return isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated"


def choices(file: Path, annotation: ast.expr) -> str:
    """ "a, b. " for Literal["a", "b"], by itself, by name or beside None."""
    for node in ast.walk(annotation):
        place = find(file, node.id) if isinstance(node, ast.Name) else None
        if place is not None and isinstance(place.node, ast.Assign):
            return choices(place.file, place.node.value)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            names = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return f"{', '.join(f'`{literal(name)}`' for name in names)}. "
    return ""


def shown(file: Path, value: ast.expr | None) -> str:
    """A default as one writes it behind the flag; constants by their value."""
    if value is None:
        return "required"
    if isinstance(value, ast.Name) and (place := find(file, value.id)) is not None:
        if isinstance(place.node, ast.Assign | ast.AnnAssign) and place.node.value is not None:
            return shown(place.file, place.node.value)
    if isinstance(value, ast.Tuple):
        return " ".join(shown(file, item) for item in value.elts) or "none"
    if isinstance(value, ast.Constant):
        named = {None: "None", True: "on", False: "off"}
        is_named = value.value is None or isinstance(value.value, bool)
        return named[value.value] if is_named else f"`{value.value}`"
    return f"`{ast.unparse(value)}`"


def literal(node: ast.AST) -> str:
    """The text of a string in the source, or the source itself."""
    value = node.value if isinstance(node, ast.Expr) else node
    return str(value.value) if isinstance(value, ast.Constant) else ast.unparse(value)


def escaped(text: str) -> str:
    """For a cell of a table."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


def find(file: Path, name: str) -> Place | None:
    """The class or constant of this name in a file, or in the file of the project from which it is imported."""
    for node in parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Place(file, node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return Place(file, node)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return Place(file, node)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gkl_vl"):
            original = next((a.name for a in node.names if (a.asname or a.name) == name), None)
            source = ROOT / f"{node.module.replace('.', '/')}.py"
            if original is not None and source.is_file():
                return find(source, original)
    return None


@cache
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text())
