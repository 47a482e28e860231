"""The pages of the documentation: the site is built strictly and loads nothing of others; every command in a `sh` block
is understood by the program that it names; those that run on the bundled data run, at two steps.

One command of each script runs by default, all of them with LONG=1. Commands of recipes and of evaluation scripts are
parsed in test_recipes.py, wherever they are written; here are all others.
"""

import argparse
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from helpers import run_script_in_ranks
from small_sets import write_shard
from test_recipes import documented_commands, module

from gkl_vl import cli
from gkl_vl.data import pairs, prompts
from gkl_vl.evaluation import embed, sets
from gkl_vl.training import clip_results

HOUSE = Path(__file__).parents[1]
PAGES = [
    *sorted(HOUSE.glob("docs/*.md")),
    *(HOUSE / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")),
]
LONG = os.environ.get("LONG") == "1"
SH_BLOCK = re.compile(r"^```sh\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    """Its path in the repository."""
    return page.relative_to(HOUSE).as_posix()


def commands_of(page: Path) -> list[str]:
    """The commands of a page's `sh` blocks, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", "".join(SH_BLOCK.findall(page.read_text())))
    return [line for line in text.splitlines() if shlex.split(line, comments=True)]


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as CI does."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_loads_nothing_of_others(site):
    loaded = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*stylesheet[^>]*href=\"https?://")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40 and [page for page in pages if loaded.search(page.read_text())] == []


def test_formulas_are_mathml(site):
    page = (site / "loss.html").read_text()
    formulas = re.findall(r"<math.*?</math>", page, flags=re.DOTALL)
    assert len(formulas) > 20 and "<mfrac>" in page
    assert not any("\\" in formula for formula in formulas) and "arithmatex" not in page


def test_links_to_the_repository_lead_to_pages_of_the_site(site):
    page = (site / "cross_logits.html").read_text()
    assert 'href="repository/gkl_vl/losses/cross_logits.py.html"' in page and 'href="results/cross-logits.html"' in page
    assert ">cross_logits_loss<" in (site / "repository/gkl_vl/losses/cross_logits.py.html").read_text()
    assert "cross GKL" in (site / "results" / "cross-logits.html").read_text()


def test_the_page_of_a_script_has_all_its_flags(site):
    for script in ("recipes/clip_finetune.py", "recipes/cifar_kd.py", "eval/zero_shot.py"):
        page = (site / "scripts" / f"{Path(script).stem}.html").read_text()
        loaded = vars(module(HOUSE / script))
        config = cli.parse(loaded.get("Config", loaded.get("LabelConfig")), ["--pair", "x"] if "kd" in script else [])
        flags = {f"<code>--{name.replace('_', '-')}</code>" for name in cli.flat(config)}
        assert {flag for flag in flags if flag not in page} == set(), script


def test_the_slurm_script_is_shown_on_its_page(site):
    assert "SLURM_NODEID" in (site / "cluster.html").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_long_page_has_a_picture_or_a_table(page):
    """Within any 150 lines."""
    lines = page.read_text().splitlines()
    seen = [number for number, line in enumerate(lines) if line.startswith(("![", "|--", "| --"))]
    gaps = [after - before for before, after in zip([0, *seen], [*seen, len(lines)], strict=True)]
    assert page.name == "layout.md" or max(gaps) <= 150


# ---- every command is understood

CALLS = sorted({command for page in PAGES for command in commands_of(page)})
PARSED = documented_commands()
OTHERS = ("pip", "git", "cd", "hf", "clip_benchmark")
"""Programs that are not this project's."""


class Understood(Exception):
    """A program has parsed its flags."""


def and_stop(function: Callable) -> Callable:
    """The function, which raises once it has returned."""

    def stopping(*args, **kwargs):
        function(*args, **kwargs)
        raise Understood

    return stopping


def parses(program: str, flags: list[str], *, is_module: bool = False) -> None:
    """Runs a program up to the point where its flags are parsed."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Understood), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a module that is imported already
        patch.setattr(argparse.ArgumentParser, "parse_args", and_stop(argparse.ArgumentParser.parse_args))
        patch.setattr(cli, "run", lambda main, config: and_stop(cli.parse)(config, None))
        patch.setattr(sys, "argv", [program, *flags])
        if is_module:
            runpy.run_module(program, run_name="__main__")
        else:
            patch.syspath_prepend((HOUSE / program).parent)  # of modules beside it
            runpy.run_path(str(HOUSE / program), run_name="__main__")


def without_variables(words: list[str]) -> list[str]:
    """Without the `NAME=value` in front of a command."""
    return words if "=" not in words[0] else without_variables(words[1:])


@pytest.mark.parametrize("command", CALLS)
def test_a_command_is_understood(command):
    program, *words = without_variables(shlex.split(command, comments=True))
    if program == "accelerate":
        launch = launch_command_parser().parse_args(words[1:])
        assert launch.config_file is None or (HOUSE / launch.config_file).is_file()
        words = [launch.training_script, *launch.training_script_args]
    if program in ("accelerate", "python", "torchrun"):
        if words[0] == "-m":
            return parses(words[1], words[2:], is_module=True)
        if not words[0].startswith(("recipes/", "eval/")):
            return parses(words[0], words[1:])
        assert command[command.index(words[0]) :].strip() in PARSED
    elif program == "sbatch":
        script = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
        assert (HOUSE / words[script]).is_file()
        parses(words[script + 1], words[script + 2 :])
    elif program == "make":
        assert words[0] in re.findall(r"^(\w+):", (HOUSE / "Makefile").read_text(), flags=re.MULTILINE)
    else:
        assert program in OTHERS


def test_the_optional_packages_that_pages_name_exist():
    extras = (HOUSE / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = re.findall(r"^(\w+) = ", extras, flags=re.MULTILINE)
    texts = [page.read_text() for page in PAGES]
    named = {
        name for text in texts for names in re.findall(r"(?:\.|gkl-vl)\[([a-z,]+)\]", text) for name in names.split(",")
    }
    assert "attack" in named and named <= set(known)


# ---- those on bundled data run

ON_BUNDLED = re.compile(r"recipes/(clip_\w+|store_teacher)\.py|eval/(zero_shot|retrieval|suite)\.py")
ELSEWHERE = ("--train-data", "--dataset", "--collection", "hf-hub:", "/data/")
"""Words of commands that need other data."""
SMALL = {
    "recipes": ["--steps", "2", "--batch-size", "8", "--workers", "0"],
    "store": ["--workers", "0"],
    "eval": ["--num_workers", "0"],
}
NAMES = 8


def few_drawings(source: Path, folder: Path, names: list[str]) -> None:
    """Writes the drawings of these classes of a bundled set into the folder, in the same layout."""
    every = (source / "classnames.txt").read_text().splitlines()
    for split in ("train", "test"):
        members = [(m.name, tar.extractfile(m).read()) for tar in shards(source / split) for m in tar.getmembers()]
        by_key: dict[str, dict[str, bytes]] = {}
        for name, content in members:
            key, _, ending = name.partition(".")
            by_key.setdefault(key, {})[ending] = content
        kept = {}
        for key, sample in by_key.items():
            label = every[int(sample["cls"])] if "cls" in sample else sample["txt"].decode().splitlines()[0]
            if label in names:
                kept[key] = sample | ({"cls": str(names.index(label)).encode()} if "cls" in sample else {})
        if not kept:
            continue
        (folder / split).mkdir(parents=True)
        write_shard(folder / split / "0.tar", list(kept.items()))
        (folder / split / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    for file in ("dataset_type.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(source / file, folder / file)


def shards(folder: Path) -> list[tarfile.TarFile]:
    return [tarfile.open(fileobj=io.BytesIO(path.read_bytes())) for path in sorted(folder.glob("*.tar"))]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The bundled sets cut down to a few drawings, and no measurements of speed."""
    folder = tmp_path_factory.mktemp("assets")
    for name in ("emoji", "emoji_unseen"):
        every = (sets.ASSETS / name / "classnames.txt").read_text().splitlines()
        few_drawings(sets.ASSETS / name, folder / name, every[:: len(every) // NAMES][:NAMES])
    with pytest.MonkeyPatch.context() as patch:
        for reader in (pairs, prompts):
            patch.setattr(reader, "BUNDLED", folder / "emoji")
        patch.setattr(sets, "ASSETS", folder)
        for caller in (embed, clip_results):
            patch.setattr(caller, "milliseconds_per_image", lambda **model: 1.0)
        yield


def on_bundled_data(command: str) -> list[str]:
    """Script and flags of a command that needs no data but the bundled, at two steps; nothing for others."""
    words = without_variables(shlex.split(command, comments=True))
    if words[:2] == ["make", "demo"]:
        words = ["recipes/clip_kd.py"]
    at = next((number for number, word in enumerate(words) if ON_BUNDLED.fullmatch(word)), None)
    if at is None or any(word.startswith(ELSEWHERE) for word in words):
        return []
    script, *flags = words[at:]
    for name in ("--steps", "--batch-size", "--warmup"):
        if name in flags:
            del flags[flags.index(name) : flags.index(name) + 2]
    return [script, *flags, *SMALL["store" if "store" in script else script.split("/")[0]]]


def run_commands(commands: list[list[str]], folder: Path, run_script, monkeypatch) -> None:
    """Runs scripts one after the other in a folder that looks like the checkout; runs/NAME is the first run."""
    for name in ("benchmarks", "accelerate_configs"):
        (folder / name).symlink_to(HOUSE / name)
    monkeypatch.chdir(folder)
    for script, *flags in commands:
        code, _, error = run_script(HOUSE / script, *flags)
        assert code == 0, f"{script} {shlex.join(flags)}\n{error}"
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        runs = sorted(folder.glob("runs/*"))
        if runs and not Path("runs/NAME").exists():
            Path("runs/NAME").symlink_to(runs[0])


BUNDLED = {page: [run for command in commands_of(page) if (run := on_bundled_data(command))] for page in PAGES}


@pytest.mark.usefixtures("few", "one_thread")
def test_a_command_of_each_script_runs_on_bundled_data(tmp_path, run_script, monkeypatch):
    first = {run[0]: run for runs in reversed(BUNDLED.values()) for run in reversed(runs)}
    order = sorted(first.values(), key=lambda run: (run[0] != "recipes/clip_kd.py", run[0].startswith("eval")))
    assert len(order) > 7
    run_commands(order, tmp_path, run_script, monkeypatch)


@pytest.mark.skipif(not LONG, reason="LONG=1 runs all commands")
@pytest.mark.usefixtures("few", "one_thread")
@pytest.mark.parametrize("page", [page for page in PAGES if BUNDLED[page]], ids=name_of)
def test_all_commands_of_a_page_run_on_bundled_data(page, tmp_path, run_script, monkeypatch):
    first = [["recipes/clip_kd.py", *SMALL["recipes"]]] if "runs/NAME" in str(BUNDLED[page]) else []
    run_commands([*first, *BUNDLED[page]], tmp_path, run_script, monkeypatch)


# ---- SLURM

SRUN = """#!/bin/bash
# Starts the command once on each of two nodes, as `srun` does with one task on a node.
shift  # --kill-on-bad-exit=1
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
RECORD = """#!/bin/bash
printf '%s\\n' "$@" > "launch-$SLURM_NODEID.txt"
"""
SLURM = {
    "SLURM_JOB_NAME": "two-nodes", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1", "ACCELERATE_USE_CPU": "true",
}  # fmt: skip
FLAGS = ["recipes/clip_kd.py", "--teacher", "none", "--eval-data", *SMALL["recipes"]]


@pytest.fixture
def submit(tmp_path):
    """submit(programs) runs the batch script in a folder that looks like the checkout, with these programs in front."""
    programs = {"srun": SRUN, "scontrol": "#!/bin/bash\necho 127.0.0.1\n"}
    (tmp_path / "bin").mkdir()
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(HOUSE / name)

    def submit(**more: str) -> None:
        for name, text in (programs | more).items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        command = ["bash", HOUSE / "docs" / "examples" / "recipe.sbatch", *FLAGS]
        environment = os.environ | SLURM | {"PATH": path}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    return submit


def test_the_batch_script_starts_a_recipe_on_two_nodes_and_resumes_it(submit, tmp_path):
    """Accelerate understands what each node's launcher is given, and the recipe runs with it, as two processes."""
    submit(accelerate=RECORD)
    launches = [(tmp_path / f"launch-{node}.txt").read_text().splitlines() for node in (0, 1)]
    read = [launch_command_parser().parse_args(words[1:]) for words in launches]
    assert [launch.machine_rank for launch in read] == [0, 1]
    for launch in read:
        assert (launch.num_machines, launch.num_processes) == (2, 2)
        assert (launch.main_process_ip, launch.main_process_port) == ("127.0.0.1", 24711)
        assert (launch.training_script, *launch.training_script_args) == (*FLAGS, "--output-dir", "runs/two-nodes")
    script, *flags = [read[0].training_script, *read[0].training_script_args]
    run_script_in_ranks(HOUSE / script, *flags, folder=tmp_path)
    assert (tmp_path / "runs" / "two-nodes" / "checkpoints" / "step_00000002").is_dir()
    submit(accelerate=RECORD)
    assert (tmp_path / "launch-1.txt").read_text().splitlines()[-2:] == ["--resume", "latest"]


@pytest.mark.skipif(not LONG, reason="LONG=1 starts Accelerate's launchers, which takes half a minute")
def test_the_batch_script_runs_with_accelerates_launchers(submit, tmp_path):
    submit()
    assert (tmp_path / "runs" / "two-nodes" / "model" / "open_clip_model.safetensors").is_file()
