"""The house stands as its plan says: who imports whom, what the README's tree and the packages hold, that
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


# Who may know whom. A rule takes a source (its path in the house, its text) and gives the names breaking it.


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


def gkl_knows_tensors_only(path: str, source: str) -> set[str]:
    if path != "gkl_vl/gkl.py":
        return set()
    allowed = ("math", "collections", "dataclasses", "typing", "torch", "jaxtyping", "gkl_vl.gather")
    return {n for n in imported(path, source) if not within(n, *allowed)} - {"gkl_vl"}


def only_gather_knows_processes(path: str, source: str) -> set[str]:
    if not path.startswith("gkl_vl/") or path == "gkl_vl/gather.py":
        return set()
    spelt = {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
    return {n for n in imported(path, source) | spelt if within(n, "torch.distributed")}


def the_engine_receives_callables(path: str, source: str) -> set[str]:
    if path != "gkl_vl/engine.py":
        return set()
    ours = {n for n in imported(path, source) if within(n, "gkl_vl")} - {"gkl_vl"}
    return {n for n in ours if not within(n, "gkl_vl.gather", "gkl_vl.checkpoint", "gkl_vl.errors")}


WITH_ACCELERATE = ["gkl_vl/checkpoint.py", "gkl_vl/engine.py", "gkl_vl/label_training.py", "gkl_vl/launch.py"]


def accelerate_lives_at_the_loop(path: str, source: str) -> set[str]:
    if not path.startswith("gkl_vl/") or path in WITH_ACCELERATE:
        return set()
    return {n for n in imported(path, source) if within(n, "accelerate")}


def recipes_stand_alone(path: str, source: str) -> set[str]:
    if not path.startswith("recipes/"):
        return set()
    siblings = {p.stem for p in (HOUSE / "recipes").glob("*.py")} | {"clip_kd"}
    return {n for n in imported(path, source) if within(n, "recipes", *siblings)}


def nothing_stands_on_recipes_or_eval(path: str, source: str) -> set[str]:
    if not path.startswith(("gkl_vl/", "tests/")):
        return set()
    return {n for n in imported(path, source) if within(n, "recipes", "eval")}


RULES = {
    gkl_knows_tensors_only: [
        ("gkl_vl/gkl.py", "import numpy"),
        ("gkl_vl/gkl.py", "from gkl_vl.towers import Towers"),
        ("gkl_vl/gkl.py", "from . import engine"),
    ],
    only_gather_knows_processes: [
        ("gkl_vl/engine.py", "import torch.distributed as dist"),
        ("gkl_vl/engine.py", "from torch import distributed"),
        ("gkl_vl/data/pairs.py", "def f():\n    from torch.distributed.nn import all_gather"),
        ("gkl_vl/engine.py", "import torch\ntorch.distributed.barrier()"),
    ],
    the_engine_receives_callables: [
        ("gkl_vl/engine.py", "from gkl_vl.image_text import image_text_loss"),
        ("gkl_vl/engine.py", "from .towers import load_clip"),
        ("gkl_vl/engine.py", "from gkl_vl import data"),
    ],
    accelerate_lives_at_the_loop: [("gkl_vl/objectives.py", "from accelerate import Accelerator")],
    recipes_stand_alone: [
        ("recipes/cifar.py", "from recipes.clip_kd import Config"),
        ("recipes/cifar.py", "import clip_kd"),
        ("recipes/cifar.py", "from . import clip_kd"),
    ],
    nothing_stands_on_recipes_or_eval: [
        ("gkl_vl/hub.py", "from recipes.clip_kd import Config"),
        ("tests/test_hub.py", "import eval.zero_shot"),
    ],
}
SOURCES = sorted(p for folder in ("gkl_vl", "recipes", "eval", "tests") for p in (HOUSE / folder).rglob("*.py"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    broken = {(path := p.relative_to(HOUSE).as_posix()): rule(path, p.read_text()) for p in SOURCES}
    assert {path: names for path, names in broken.items() if names} == {}


@pytest.mark.parametrize(("rule", "made_up"), [(rule, case) for rule, cases in RULES.items() for case in cases])
def test_the_rule_notices_a_source_that_breaks_it(rule, made_up):
    assert rule(*made_up)


def test_the_rules_let_through_what_they_allow():
    assert not gkl_knows_tensors_only("gkl_vl/gkl.py", "import math\nfrom gkl_vl.gather import sum_over_processes")
    assert not only_gather_knows_processes("gkl_vl/gather.py", "from torch import distributed")
    assert not the_engine_receives_callables("gkl_vl/engine.py", "from gkl_vl import checkpoint\nimport accelerate")
    assert not accelerate_lives_at_the_loop("gkl_vl/checkpoint.py", "import accelerate")
    assert not recipes_stand_alone("recipes/cifar.py", "from gkl_vl.engine import fit")
    assert not nothing_stands_on_recipes_or_eval("gkl_vl/hub.py", "model.eval()")


# The README's tree.


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


def test_every_name_in_the_readme_tree_exists():
    tree = readme_tree()
    assert [p for p in tree if not (HOUSE / p).exists() or p.endswith("/") != (HOUSE / p).is_dir()] == []


def test_every_module_of_the_library_is_in_the_readme_tree():
    tree = readme_tree()
    modules = [p.relative_to(HOUSE) for p in LIBRARY.rglob("*.py") if p.name != "__init__.py"]
    folders = {m.parent for m in modules if f"{m.parent.as_posix()}/" in tree} - {Path("gkl_vl")}
    assert [m for m in modules if m.as_posix() not in tree and m.parent not in folders] == []


def readme_tree() -> list[str]:
    tree = tree_of((HOUSE / "README.md").read_text())
    if not tree:
        pytest.skip("the README has no tree yet")
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
    with pytest.raises(RankFailed, match="rank 1 of 2 died without a word"):
        run_ranks(die_on_rank_1, 2)


def test_run_ranks_notices_a_rank_that_hangs():
    with pytest.raises(RankFailed, match=r"ranks \[1\] did not finish within 2 s"):
        run_ranks(hang_on_rank_1, 2, timeout_seconds=2)


@pytest.mark.parametrize("host", ["huggingface.co", "192.0.2.1"])
def test_a_test_cannot_reach_the_network(host):
    with pytest.raises(OSError, match="a test wanted the network"):
        socket.create_connection((host, 443), timeout=1)


def test_a_test_can_reach_its_own_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
