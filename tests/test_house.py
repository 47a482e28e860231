"""The house stands as its plan says: who imports whom, what the documented tree and the packages hold, that
accelerate reads the launch configs, and that the tests' own tools do what every other test relies on."""

import ast
import os
import re
import shlex
import socket
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from helpers import RankFailed, run_ranks
from torch import distributed

HOUSE = Path(__file__).resolve().parent.parent
LIBRARY = HOUSE / "gkl_vl"


# Who may import whom.

GROUND = (
    "errors",
    "reading",
    "addresses",
    "atomic",
    "distributed",
    "disk_cache",
    "provenance",
    "protocols",
    "cli",
)
LAYERS: dict[str, tuple[str, ...]] = {
    "gkl_vl/report/": ("atomic",),
    "gkl_vl/losses/": ("distributed",),
    "gkl_vl/models/": ("errors", "reading", "disk_cache"),
    "gkl_vl/data/": ("errors", "reading", "addresses"),
    "gkl_vl/export/": (*GROUND, "models"),
    "gkl_vl/evaluation/": (*GROUND, "report", "models", "losses", "data"),
    "gkl_vl/demo/": (*GROUND, "report", "models", "losses", "data", "evaluation"),
    "gkl_vl/export/formats.py": (*GROUND, "models", "data", "evaluation"),
    "gkl_vl/export/__main__.py": (*GROUND, "data", "evaluation"),
    "gkl_vl/robustness/": (*GROUND, "report", "models", "losses", "data", "evaluation"),
    "gkl_vl/teachers/": (*GROUND, "models", "losses", "data", "evaluation"),
    "gkl_vl/objectives/": (*GROUND, "models", "losses", "data", "evaluation", "robustness", "teachers"),
    "gkl_vl/training/": (
        *GROUND,
        *("report", "models", "losses", "data", "export", "evaluation", "robustness", "teachers", "objectives"),
    ),
    # The loop receives callables: it knows no loss, model or data set.
    "gkl_vl/training/engine.py": (
        *("distributed", "errors", "protocols"),
        *("training.checkpoint", "training.gradient_cache"),
    ),
    "gkl_vl/training/gradient_cache.py": ("protocols",),
}
"""Path: what of gkl_vl it may import beside its own package, from the bottom up. The longest path that fits counts."""
ALONE = {"gkl_vl/training/engine.py", "gkl_vl/training/gradient_cache.py"}
"""Where the own package is not free either."""
CONFINED = {"torch.distributed": "gkl_vl/distributed.py", "accelerate": "gkl_vl/training/"}
"""Of the library, the only place that may use it."""
TENSORS_ONLY = ("math", "dataclasses", "typing", "torch", "jaxtyping", "gkl_vl.distributed")
"""All that losses/gkl.py may import."""


def imported(path: str, source: str) -> set[str]:
    """Dotted names of all that a source imports, at any depth; `from a import b` gives `a` and `a.b`."""
    package = path.split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def breaches(path: str, source: str) -> set[str]:
    """What a source (its path in the house, its text) imports against the tables above."""
    names = imported(path, source)
    if not path.startswith("gkl_vl/"):
        return {name for name in names if within(name, "recipes", "eval", *forbidden_siblings(path))}
    ours = {name for name in names if within(name, "gkl_vl")} - {"gkl_vl"}
    found = {name for name in names if within(name, "recipes", "eval")}
    if keys := [key for key in LAYERS if path.startswith(key)]:
        key = max(keys, key=len)
        own = () if key in ALONE else (".".join(path.split("/")[:2]),)
        found |= {name for name in ours if not below(name, [*(f"gkl_vl.{layer}" for layer in LAYERS[key]), *own])}
    elif not path.startswith(("gkl_vl/assets/", "gkl_vl/__init__")):  # the ground
        found |= {name for name in ours if not within(name, *(f"gkl_vl.{layer}" for layer in GROUND))}
    if path == "gkl_vl/losses/gkl.py":
        found |= {name for name in names if not within(name, *TENSORS_ONLY)} - {"gkl_vl"}
    spelt = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    for name, place in CONFINED.items():
        if not path.startswith(place):
            found |= {used for used in names | spelt if within(used, name)}
    return found


def below(name: str, allowed: list[str]) -> bool:
    """Whether a name lies within what is allowed, or is a package above it (`from gkl_vl.losses import gkl`)."""
    return within(name, *allowed) or any(within(one, name) for one in allowed)


def forbidden_siblings(path: str) -> set[str]:
    """Recipes never import each other."""
    return {p.stem for p in (HOUSE / "recipes").glob("*.py")} if path.startswith("recipes/") else set()


SOURCES = sorted(
    p for folder in ("gkl_vl", "recipes", "eval", "benchmarks", "tests") for p in (HOUSE / folder).rglob("*.py")
)
BREACHES = [
    ("gkl_vl/losses/gkl.py", "import numpy"),
    ("gkl_vl/losses/gkl.py", "from gkl_vl.models.towers import Towers"),
    ("gkl_vl/losses/gkl.py", "from . import image_text"),
    ("gkl_vl/losses/tiles.py", "from gkl_vl.errors import UserError"),
    ("gkl_vl/data/pairs.py", "from gkl_vl.losses import gkl"),
    ("gkl_vl/models/clip.py", "from gkl_vl.data.files import read_file"),
    ("gkl_vl/evaluation/embed.py", "from gkl_vl.robustness.pgd import pgd"),
    ("gkl_vl/export/hub.py", "def f():\n    from gkl_vl.evaluation import metrics"),
    ("gkl_vl/teachers/store.py", "from gkl_vl.objectives import clip"),
    ("gkl_vl/atomic.py", "from gkl_vl.models.clip import Clip"),
    ("gkl_vl/training/engine.py", "import torch.distributed as dist"),
    ("gkl_vl/training/engine.py", "from torch import distributed"),
    ("gkl_vl/training/engine.py", "import torch\ntorch.distributed.barrier()"),
    ("gkl_vl/training/engine.py", "from gkl_vl.losses.image_text import image_text_loss"),
    ("gkl_vl/training/engine.py", "from .clip import train_clip"),
    ("gkl_vl/training/engine.py", "from gkl_vl import data"),
    ("gkl_vl/data/pairs.py", "def f():\n    from torch.distributed.nn import all_gather"),
    ("gkl_vl/objectives/clip.py", "from accelerate import Accelerator"),
    ("gkl_vl/export/hub.py", "from recipes.clip_kd import Config"),
    ("recipes/cifar.py", "from recipes.clip_kd import Config"),
    ("recipes/cifar.py", "import clip_kd"),
    ("recipes/cifar.py", "from . import clip_kd"),
    ("tests/test_hub.py", "import eval.zero_shot"),
]
ALLOWED = [
    ("gkl_vl/losses/gkl.py", "import math\nfrom gkl_vl.distributed import sum_across_processes"),
    ("gkl_vl/losses/image_text.py", "from gkl_vl.losses import gkl"),
    ("gkl_vl/distributed.py", "from torch import distributed"),
    ("gkl_vl/training/engine.py", "from gkl_vl.training import checkpoint\nimport accelerate"),
    ("recipes/cifar.py", "from gkl_vl.training.engine import fit"),
    ("gkl_vl/export/hub.py", "model.eval()"),
]


def test_imports_go_down_only():
    broken = {(path := p.relative_to(HOUSE).as_posix()): breaches(path, p.read_text()) for p in SOURCES}
    assert {path: names for path, names in broken.items() if names} == {}


def test_a_layer_names_only_layers_above_it_in_the_table():
    known = set(GROUND)
    for key, layers in LAYERS.items():
        assert {layer for layer in layers if layer.split(".")[0] not in known} == set(), key
        known.add(key.split("/")[1])


def test_every_package_of_the_library_is_in_the_table():
    packages = {f"gkl_vl/{p.parent.name}/" for p in LIBRARY.glob("*/__init__.py")} - {"gkl_vl/assets/"}
    assert packages == {key for key in LAYERS if key.endswith("/")}
    modules = {p.stem for p in LIBRARY.glob("*.py")} - {"__init__"}
    assert modules == set(GROUND)


@pytest.mark.parametrize(("path", "source"), BREACHES)
def test_a_source_that_breaks_the_table_is_noticed(path, source):
    assert breaches(path, source)


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_a_source_that_keeps_it_passes(path, source):
    assert not breaches(path, source)


# The tree in docs/layout.md.


def tree_of(readme: str) -> list[str]:
    """Paths named in the code block that holds a line starting with `gkl_vl/`; folders end with a slash."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    block = next((b for b in blocks if re.search(r"^gkl_vl/", b, flags=re.MULTILINE)), "")
    paths: list[str] = []
    above: list[tuple[int, str]] = []  # folders we are in: their indentation and path
    comment_column = 10**9
    for line in filter(str.strip, block.splitlines()):
        indentation = len(line) - len(line.lstrip())
        if indentation >= comment_column:  # a comment that goes on
            continue
        while above and above[-1][0] >= indentation:
            above.pop()
        name, _, comment = line.strip().partition(" ")
        path = (above[-1][1] if above else "") + name
        comment_column = line.index(comment.strip()) if comment.strip() else 10**9
        if name.endswith("/"):
            above.append((indentation, path))
        paths.append(path)
    return paths


def test_every_name_in_the_documented_tree_exists():
    tree = documented_tree()
    assert [p for p in tree if not (HOUSE / p).exists() or p.endswith("/") != (HOUSE / p).is_dir()] == []


def test_every_module_of_the_library_is_in_the_documented_tree():
    tree = documented_tree()
    modules = [p.relative_to(HOUSE) for p in LIBRARY.rglob("*.py") if p.name != "__init__.py"]
    folders = {m.parent for m in modules if f"{m.parent.as_posix()}/" in tree} - {Path("gkl_vl")}
    assert [m for m in modules if m.as_posix() not in tree and m.parent not in folders] == []


def documented_tree() -> list[str]:
    tree = tree_of((HOUSE / "docs" / "layout.md").read_text())
    assert tree
    return tree


def test_a_tree_is_read_with_its_folders_and_long_comments():
    readme = """
```sh
make demo
```
```
gkl_vl/               the way of the data
    gkl.py            the losses,
                      pure functions
    data/             pairs
        pairs.py      web shards
    towers.py
recipes/              one file per result
```
"""
    assert tree_of(readme) == [
        "gkl_vl/",
        "gkl_vl/gkl.py",
        "gkl_vl/data/",
        "gkl_vl/data/pairs.py",
        "gkl_vl/towers.py",
        "recipes/",
    ]


# Links between pages.

PAGES = sorted([*HOUSE.glob("*.md"), *HOUSE.glob("docs/*.md"), HOUSE / "recipes" / "README.md"])


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(HOUSE).as_posix())
def test_every_link_to_a_file_or_a_heading_leads_there(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = []
    for link in [link for link in links if "://" not in link]:
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_lists_every_page():
    index = (HOUSE / "docs" / "README.md").read_text()
    assert [p.name for p in (HOUSE / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index] == []


# The packages and the tree of files.


def files_of_the_library() -> set[str]:
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", "gkl_vl")
    return {name for name in listed if (HOUSE / name).is_file()}


def git(*arguments: str) -> list[str]:
    if not (HOUSE / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "-C", str(HOUSE), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_wheel_holds_the_library_with_its_assets_and_nothing_else(tmp_path):
    (wheel,) = WheelBuilder(str(HOUSE)).build(directory=str(tmp_path), versions=["standard"])
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files_of_the_library()
    for folder in ("gkl_vl/assets/emoji/", "gkl_vl/model_configs/"):
        assert any(name.startswith(folder) for name in names), folder


def test_the_sdist_holds_the_library_the_recipes_and_the_tests(tmp_path):
    (sdist,) = SdistBuilder(str(HOUSE)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert files_of_the_library() <= names
    assert {"README.md", "LICENSE", "Makefile", "pyproject.toml", "tests/helpers.py"} <= names
    assert any(name.startswith("recipes/") for name in names)


def test_the_version_is_the_newest_in_the_changelog():
    version = re.search(r'^version = "(.+)"$', (HOUSE / "pyproject.toml").read_text(), flags=re.MULTILINE)
    headings = re.findall(r"^## \[?v?(\d[^\]\s]*)", (HOUSE / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert version and headings[:1] == [version.group(1)]


MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:home|root|Users|work)/[\w.]")


def test_no_file_names_a_path_of_one_machine():
    found = {}
    for name in git("ls-files", "--cached", "--others", "--exclude-standard"):
        content = (HOUSE / name).read_bytes() if (HOUSE / name).is_file() else b""
        if b"\0" not in content and (hits := MACHINE_PATH.findall(content.decode(errors="replace"))):
            found[name] = hits
    assert found == {}


def test_a_path_of_one_machine_is_noticed():
    assert MACHINE_PATH.search("see " + "/home" + "/someone/runs")
    assert not MACHINE_PATH.search("https://host.org/home/page and framework/root/x")


# The launch configs.

CONFIGS = sorted((HOUSE / "accelerate_configs").glob("*.yaml"))


def launch_arguments(config: Path):
    """What accelerate makes of the command in a config's first line, with numbers for its placeholders."""
    command = config.read_text().splitlines()[0].removeprefix("# ")
    words = shlex.split(command.replace("RANK", "1").replace("HOST", "127.0.0.1"))
    words = words[words.index("accelerate") :]
    assert words[:2] == ["accelerate", "launch"]
    return launch_command_parser().parse_args(words[2:])


def test_there_is_a_config_for_each_kind_of_machine():
    assert [c.stem for c in CONFIGS] == ["cpu", "fsdp", "multi_gpu", "multi_node", "single_gpu"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_a_config_begins_with_the_command_that_uses_it(config):
    arguments = launch_arguments(config)
    assert HOUSE / arguments.config_file == config
    assert (HOUSE / arguments.training_script).is_file()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_accelerate_reads_a_config_and_knows_all_its_keys(config):
    settings = load_config_from_file(str(config))  # raises on an unknown key at the top
    flags = vars(launch_arguments(config))
    assert set(settings.fsdp_config) <= set(flags)
    assert settings.num_processes > 0 or flags["num_processes"] > 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_a_config_describes_hardware_only(config):
    settings = yaml.safe_load(config.read_text())
    science = ("mixed_precision", "dynamo_backend", "gradient_accumulation_steps", "gradient_clipping")
    assert [key for key in settings if key in science] == []


# The tests' own tools.


def sum_of_ranks(rank: int, world_size: int, offset: float) -> tuple[torch.Tensor, str]:
    total = torch.tensor(rank + offset)
    distributed.all_reduce(total)
    return total, os.environ["RANK"]


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the second one")
    distributed.barrier()


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    distributed.barrier()


def hang_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_run_ranks_runs_each_rank_in_one_group(world_size):
    results = run_ranks(sum_of_ranks, world_size, 0.5)
    assert [rank for _, rank in results] == [str(rank) for rank in range(world_size)]
    assert [total.item() for total, _ in results] == [sum(r + 0.5 for r in range(world_size))] * world_size


def test_run_ranks_shows_the_traceback_of_the_rank_that_raised():
    with pytest.raises(RankFailed, match="rank 1 of 2 raised(.|\n)*fail_on_rank_1(.|\n)*ValueError: the second one"):
        run_ranks(fail_on_rank_1, 2)


def test_run_ranks_notices_a_rank_that_died():
    with pytest.raises(RankFailed, match="rank 1 of 2 exited without a result"):
        run_ranks(die_on_rank_1, 2)


def test_run_ranks_notices_a_rank_that_hangs():
    with pytest.raises(RankFailed, match=r"ranks \[1\] did not finish within 6 s"):
        run_ranks(hang_on_rank_1, 2, timeout_seconds=6)


@pytest.mark.parametrize("host", ["huggingface.co", "192.0.2.1"])
def test_a_test_cannot_reach_the_network(host):
    with pytest.raises(OSError, match="a test tried to reach the network"):
        socket.create_connection((host, 443), timeout=1)


def test_a_test_can_reach_its_own_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
