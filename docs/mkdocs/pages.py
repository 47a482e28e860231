"""Hooks of mkdocs: pages of the site from files outside docs/, links to them, and formulas as MathML.

Pages are written for GitHub too, where a link leads to a file of the repository. In the site

- recipes/README.md is a page for each of its sections, results/SECTION.md;
- a script of recipes/ or eval/ is the page of its docstring and flags;
- every other file that a page links to is a page: Markdown as it is, the rest as its text;
- a link to anything else is left as it is, and `mkdocs build --strict` fails on it.

Formulas are written as GitHub reads them, in ```math blocks and between dollars, and converted when the site is built:
browsers draw MathML without a script.
"""

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from flag_tables import ROOT, flag_tables
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

RESULTS = "recipes/README.md"
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]*)(#[^)\s]*)?(?=\))")
"""Target and anchor of a link or picture that is no URL."""
FENCE = re.compile(r"^(?P<ticks>`{3,}).*?^(?P=ticks)$", flags=re.DOTALL | re.MULTILINE)
ALONE = re.compile(r"^\[[^\]\n]+\]\((examples/[^)\s]+)\)$", flags=re.MULTILINE)
"""A line that is nothing but a link to an example, which the site shows below it."""
FORMULA = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', flags=re.DOTALL)
LANGUAGES = {".py": "python", ".sbatch": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml", "": "make"}

slug = slugify(case="lower")  # GitHub's
pages: dict[str, str] = {}
"""Path in the repository, of a section of the results with its anchor -> page of the site."""
sources: dict[str, str] = {}
"""Page of the site -> the file in the repository from which its links start."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages that are files outside docs/."""
    pages.clear()
    sources.clear()
    for file in files:
        pages[f"docs/{file.src_uri}"] = file.src_uri
        sources[file.src_uri] = f"docs/{file.src_uri}"
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    waiting = list(texts.items())
    for name, text in result_pages().items():
        files.append(File.generated(config, name, content=text))
        waiting.append((name, text))
    while waiting:
        page, text = waiting.pop()
        for target in links_out_of(page, text):
            name, text = page_of(target)
            pages[target], sources[name] = name, target
            files.append(File.generated(config, name, content=text))
            if target.endswith(".md"):
                waiting.append((name, text))
    return files


def result_pages() -> dict[str, str]:
    """The sections of recipes/README.md by page; the first is its introduction and the list of the others."""
    parts: list[list[str]] = [[]]
    for text, is_code in pieces((ROOT / RESULTS).read_text()):
        for line in [text] if is_code else text.splitlines(keepends=True):
            if line.startswith("## "):
                parts.append([])
            parts[-1].append(line.removeprefix("#") if line.startswith("##") else line)
    found, contents = {}, []
    for part in parts:
        name = "results/index.md" if not found else f"results/{slug(part[0].removeprefix('# ').strip(), '-')}.md"
        found[name], sources[name] = "".join(part), RESULTS
        for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", found[name]), flags=re.MULTILINE):
            pages[f"{RESULTS}#{slug(heading, '-')}"] = name
        if name != "results/index.md":
            contents.append(f"- [{part[0].removeprefix('# ').strip()}](README.md#{Path(name).stem})\n")
    pages[RESULTS] = "results/index.md"
    found["results/index.md"] += "\n" + "".join(contents)
    return found


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and whether each is a block of code, where # is a comment and a link is none."""
    end = 0
    for fence in FENCE.finditer(text):
        yield from ((text[end : fence.start()], False), (fence[0], True))
        end = fence.end()
    yield text[end:], False


def links_out_of(page: str, text: str) -> set[str]:
    """Files of the repository that a page links to and that are no page yet."""
    targets = {resolved(page, target) for target, _ in LINK.findall(FENCE.sub("", text)) if target}
    return {target for target in targets if target not in pages and (ROOT / target).is_file()}


def resolved(page: str, target: str) -> str:
    """The path in the repository of a link's target."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(sources[page]), target))


def page_of(path: str) -> tuple[str, str]:
    """Name and Markdown of the page for a file outside docs/."""
    folder, file = posixpath.split(path)
    if folder in ("recipes", "eval") and file.endswith(".py"):
        docstring = (ROOT / path).read_text().split('"""')[1]
        return (
            f"scripts/{file.removesuffix('.py')}.md",
            f"# {file}\n\n{docstring}\n## Flags\n\n{flag_tables(ROOT / path)}",
        )
    text = (ROOT / path).read_text()
    if file.endswith(".md"):
        return f"repository/{path}", text
    return f"repository/{path}.md", f"---\nsearch:\n  exclude: true\n---\n\n# {file}\n\n`{path}`\n\n{code_block(path)}"


def code_block(path: str) -> str:
    """The text of a file as a block of code."""
    return f"````{LANGUAGES.get(Path(path).suffix, 'text')}\n{(ROOT / path).read_text()}````\n"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead to pages of the site; an example is shown below its link."""
    name = page.file.src_uri

    def in_site(link: re.Match) -> str:
        target, anchor = link[1], link[2] or ""
        path = resolved(name, target) if target else sources[name]
        place = pages.get(f"{path}{anchor}", pages.get(path))
        return link[0] if place is None else posixpath.relpath(place, posixpath.dirname(name) or ".") + anchor

    def with_example(link: re.Match) -> str:
        return f"{link[0]}\n\n{code_block(resolved(name, link[1]))}"

    shown = ALONE.sub(with_example, markdown).replace(" ± ", "\u00a0±\u00a0")  # one number, one line
    return "".join(text if is_code else LINK.sub(in_site, text) for text, is_code in pieces(shown))


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas become MathML."""

    def formula(found: re.Match) -> str:
        tag, display = found[1], "block" if found[1] == "div" else "inline"
        tex = html.unescape(found[2]).strip()[2:-2]  # without \[ \] or \( \)
        return f'<{tag} class="formula">{convert(tex, display=display)}</{tag}>'

    return FORMULA.sub(formula, content)
