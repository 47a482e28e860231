"""The documented commands run, and every mistake at a flag ends in one line and exit code 2."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_sets import colour_set
from test_pairs import good, write_shard

from gkl_vl import cli
from gkl_vl.data import pairs
from gkl_vl.data.sources import memory_source
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import evaluate
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.export.cards import ClipCard, RunFacts
from gkl_vl.export.hub import export_clip
from gkl_vl.models.clip import load_clip
from gkl_vl.models.student import Student
from gkl_vl.training.clip import ClipOptimisation, peak_rates
from gkl_vl.training.label_kd import LabelConfig, find_pair
from gkl_vl.training.run import RunFlags, default_folder

HOUSE = Path(__file__).parents[1]
RECIPE = HOUSE / "recipes" / "clip_kd.py"
RECIPES = sorted((HOUSE / "recipes").glob("*.py"))
# As accelerate_configs/cpu.yaml says: two processes on CPUs are torchrun's, and Accelerate has to be told.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def python(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300)


@pytest.fixture
def call(tmp_path, monkeypatch, run_script):
    """call(*flags, recipe=) -> (exit code, stdout, stderr) of a recipe in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, recipe: str = "clip_kd") -> tuple[int, str, str]:
        return run_script(HOUSE / "recipes" / f"{recipe}.py", *flags)

    return call


def module(script: Path):
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"the_script_{script.stem}", script)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where tyro looks for the strings under fields
    spec.loader.exec_module(loaded)
    return loaded


def documented_commands() -> list[str]:
    """`recipes/x.py --flag ...` of each command in a docstring or a README, continuation lines joined."""
    files = [
        *HOUSE.glob("recipes/*.py"),
        *HOUSE.glob("eval/*.py"),
        *HOUSE.glob("docs/*.md"),
        HOUSE / "README.md",
        HOUSE / "recipes" / "README.md",
    ]
    texts = [re.sub(r"\\\n\s*", "", file.read_text()) for file in sorted(files)]
    command = re.compile(r"(?:python|accelerate launch)\b[^\n`|]*?((?:recipes|eval)/\w+\.py[^\n`|]*)")
    return sorted({found.strip() for text in texts for found in command.findall(text)} - {"recipes/clip_kd.py --help"})


CARD = ClipCard(
    student="tiny",
    teachers=(),
    license="mit",
    datasets=[],
    run=RunFacts(command="none", commit=None, steps=0, seed=0),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher of another size of embedding, and a shard."""
    folder = tmp_path_factory.mktemp("recipes")
    write_shard(folder / "pairs.tar", [good(i) for i in range(24)])
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    }
    text = {"context_length": 24, "vocab_size": 4096, "hf_tokenizer_name": "gkl-vl/clip-bpe-4096"}
    config["text_cfg"] = text | {"width": 16, "heads": 2, "layers": 1}
    (folder / "pairs.csv").write_text("filepath,title\nnone.png,a cat\n")
    (folder / "tiny.json").write_text(json.dumps(config))
    export_clip(clip=load_clip(str(folder / "tiny.json")), folder=folder / "teacher", card=CARD)
    return folder


@pytest.fixture(scope="module")
def run(place) -> Path:
    """Two steps with every term on, by two processes."""
    flags = ["--teacher", f"local-dir:{place}/teacher", "--train-data", place / "pairs.tar", "--steps", "2"]
    flags += ["--batch_size", "4", "--mimicry_weight", "10", "--gamma", "0.5", "--workers", "0", "--output-dir", "run"]
    flags += ["--wmse-weight", "0.5", "--cross-soft-ce-weight", "2", "--cross-wmse-weight", "6", "--bank-size", "12"]
    flags += ["--captions-per-image", "2", "--text-lr", "5e-4"]
    flags += ["--train-data", f"{place}/pairs.tar::{place}/pairs.tar"]
    colour_set(place / "sets" / "colours", ["red", "green", "blue", "red"])
    captions = colour_set(place / "sets" / "vtab-captions", ["red", "green", "blue", "red"])
    (captions / "dataset_type.txt").write_text("retrieval")
    flags += ["--eval-data", "wds/colours", "vtab/captions", "--dataset-root", f"{place}/sets/{{dataset_cleaned}}"]
    flags += ["--eval-every-steps", "1"]
    done = python("-m", "torch.distributed.run", "--nproc_per_node", "2", RECIPE, *flags, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "create_model_and_transforms" in done.stdout and "student emoji-student" in done.stdout
    return place / "run"


def test_two_processes_write_one_run(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "results.jsonl", "checkpoints", "model", "report.png", "report.html"}
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if "model" not in record]
    assert record["step"] == 2
    terms = {"loss", "contrastive", "soft_ce", "wmse", "mimicry", "agreement@1", "grad_norm", "lr", "skipped"}
    terms |= {"cross_soft_ce", "cross_wmse"}
    assert {f"train/{name}" for name in terms} <= set(record)
    loop = json.loads((run / "checkpoints" / "step_00000002" / "loop.json").read_text())
    assert len(loop["positions"]) == 2
    config = json.loads((run / "config.json").read_text())
    assert config["gamma"] == 0.5 and config["command"].startswith("accelerate launch")


@pytest.mark.usefixtures("one_thread")
def test_while_training_a_student_is_measured_on_the_sets_that_were_named(run):
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    measured = [(r["step"], r["model"], r["dataset"]) for r in records if "model" in r]
    both = ("colours", "vtab/captions")
    expected = [(1, "student", name) for name in both] + [(2, "student", name) for name in both]
    assert measured == expected + [(2, "teacher", name) for name in both]
    last = {r["dataset"]: r for r in records if r.get("model") == "student" and r["step"] == 2}
    assert last["colours"].keys() >= {"acc1", "acc5", "mean_per_class_recall"}
    assert last["vtab/captions"].keys() >= {"image_retrieval_recall@1", "text_retrieval_recall@10"}
    # and the same numbers come of the exported folder, in one process
    sets = str(run.parent / "sets" / "{dataset_cleaned}")
    for line in evaluate(str(run), both, dataset_root=sets, batch_size=256, draws=2):
        for name, value in line["metrics"].items():
            assert last[line["dataset"]][name] == value or value != value, name


def test_the_exported_student_needs_nothing_of_this_project(run):
    script = """
import sys, open_clip, torch
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:model")
tokens = open_clip.get_tokenizer("local-dir:model")(["a cat"])
assert model.encode_text(tokens).shape == (1, 256) and not any(name.startswith("gkl_vl") for name in sys.modules)
"""
    done = python("-c", script, cwd=run)
    assert done.returncode == 0, done.stderr


def test_plain_accelerate_launch_runs_on_the_bundled_data(place):
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", RECIPE]
    flags = ["--teacher", "none", "--steps", "2", "--batch-size", "8", "--workers", "0", "--output-dir", "bundled"]
    done = python(*launch, *flags, cwd=place)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (place / "bundled" / "results.jsonl").read_text().splitlines()]
    evaluated = {record["dataset"]: record for record in records if "model" in record}
    assert set(evaluated) == {"emoji", "emoji_unseen"}
    assert {"acc1", "acc5", "mean_per_class_recall", "image_retrieval_recall@1"} <= set(evaluated["emoji"])
    assert "emoji  acc1" in done.stdout and "report.png" in done.stdout


GROUPS = ["model", "data", "loss", "optimisation", "run", "evaluation"]


def flags_of_groups(config: type) -> list[tuple[str, str | None]]:
    """(flag, its help) of a config class and of all its groups, from their sources: tyro reads them there."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    statements, found = body.body, []
    groups = {field.name: field.default for field in fields(config) if is_dataclass(field.default)}
    for statement, following in zip(statements, [*statements[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and statement.target.id in groups:
            found += flags_of_groups(type(groups[statement.target.id]))
        elif isinstance(statement, ast.AnnAssign):
            help_text = following.value.value if isinstance(following, ast.Expr) else None
            found.append((statement.target.id, help_text))
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_flags_come_in_groups_and_each_is_explained_in_a_line(recipe):
    config = vars(module(recipe)).get("Config", LabelConfig)
    groups = {"store", "model", "data", "run"} if recipe.stem == "store_teacher" else set(GROUPS)
    assert groups <= {field.name for field in fields(config)}
    flags = flags_of_groups(config)
    assert len({name for name, _ in flags}) == len(flags) <= 70
    assert [name for name, text in flags if not text or "\n" in text] == []


def test_help_shows_the_groups(call):
    code, out, _ = call("--help")
    assert code == 0
    titles = re.findall(r"(\w+) options", out)
    assert titles == ["model", "student", *GROUPS[1:]]
    for name, _ in flags_of_groups(module(RECIPE).Config):
        assert f"--{name.replace('_', '-')}" in out


def test_the_documentation_has_commands_of_every_script():
    scripts = {command.split()[0] for command in documented_commands()}
    assert scripts == {
        str(p.relative_to(HOUSE)) for folder in ("recipes", "eval") for p in HOUSE.glob(f"{folder}/*.py")
    }
    assert any("--train-data" in command and "--precision bf16" in command for command in documented_commands())


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_is_understood(command):
    script, *flags = shlex.split(command, comments=True)
    loaded = vars(module(HOUSE / script))
    config = cli.parse(loaded.get("Config", LabelConfig), flags)
    if isinstance(config, LabelConfig):
        find_pair(loaded["RECIPE"], config)  # a name of its table


def test_the_default_command_distils_the_bundled_teacher(tmp_path, monkeypatch, capsys):
    """Two steps of the default flags, with 32 drawings to store in place of all, and sets of 4 images."""
    monkeypatch.chdir(tmp_path)
    recipe = module(RECIPE)
    few = pairs.bundled_pairs()[:32]
    monkeypatch.setattr("gkl_vl.training.clip_teacher.bundled_pairs", lambda: few)
    monkeypatch.setattr("gkl_vl.training.clip.open_source", lambda *args, **kwargs: memory_source("few", few))
    colours = load_benchmark_set(str(colour_set(tmp_path / "colours", ["red", "green", "blue", "red"])))
    monkeypatch.setattr(
        "gkl_vl.training.clip.load_benchmark_sets",
        lambda names, **place: [replace(colours, name=name) for name in names],
    )
    texts, forward = [], Student.forward
    monkeypatch.setattr(
        Student, "forward", lambda self, image, text: (texts.append(text), forward(self, image, text))[1]
    )
    recipe.main(recipe.Config(optimisation=ClipOptimisation(steps=2, batch_size=8), run=RunFlags(workers=0)))
    (folder,) = (tmp_path / "runs").iterdir()
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert "train/cross_wmse" in records[0] and not {"train/mimicry", "train/wmse"} & records[0].keys()
    assert records[-1]["step"] == 2 and [seen.shape[1] for seen in texts] == [2, 2]
    evaluated = {(record["model"], record["dataset"]) for record in records if "model" in record}
    models = ("student", "teacher", "student, texts of teacher")
    assert evaluated == {(m, d) for m in models for d in ("emoji", "emoji_unseen")}
    out = capsys.readouterr().out
    assert "teacher bundled" in out and "The student's images with the teacher's texts:\nemoji  acc1 " in out
    assert "texts of teacher" not in (folder / "model" / "README.md").read_text()  # of the student alone
    assert (folder / "report.png").stat().st_size > 10_000
    page = (folder / "report.html").read_text()
    assert out.rstrip().endswith(f"Report: {folder.relative_to(tmp_path) / 'report.html'}")
    assert "<h2><bdi>Student against teacher: emoji</bdi></h2>" in page and "images with the teacher's texts" in page
    assert 12 <= page.count("data:image/png") <= 12 + 4  # the sheet, and those of the four on which one model is right


@pytest.mark.parametrize(
    "lr, text_lr, rates",
    [(None, None, (3, 2)), (None, 0, (3, 0)), (5, None, (5, 5)), (5, 7, (5, 7)), (0, None, (0, 0))],
)
def test_a_rate_is_for_both_towers_unless_the_texts_have_their_own(lr, text_lr, rates):
    assert peak_rates(ClipOptimisation(lr=lr, text_lr=text_lr), (3, 2)) == rates


def test_a_rate_of_0_is_0_and_not_the_default(place, call):
    """A rate of 0 for one tower freezes it and not the other."""
    flags = ["--teacher", "none", "--train-data", f"{place}/pairs.tar", "--steps", "1", "--batch-size", "4"]
    code, _, error = call(*flags, "--workers", "0", "--lr", "0", "--output-dir", "run")
    assert code == 0, error
    record = json.loads(Path("run/results.jsonl").read_text().splitlines()[0])
    assert record["train/lr"] == 0 and json.loads(Path("run/config.json").read_text())["lr"] == 0
    code, _, error = call(*flags, "--workers", "0", "--text-lr", "0", "--output-dir", "frozen")
    assert code == 0, error
    weights = [load_file(f"{name}/model/open_clip_model.safetensors") for name in ("run", "frozen")]
    changed = {key for key, value in weights[0].items() if value.ndim >= 2 and not value.equal(weights[1][key])}
    assert changed == {key for key, value in weights[0].items() if value.ndim >= 2 and key.startswith("visual.")}


def test_another_number_of_processes_cannot_resume(run, place, call):
    flags = json.loads((run / "config.json").read_text())["command"]
    flags = shlex.split(flags)[3:]
    code, _, told = call(*flags, "--output-dir", run, "--resume", "latest")
    assert code == 2 and "was written by 2 processes, now there are 1: resume with the same number" in told


def test_a_wrong_teacher_is_one_line_and_code_2(call, place):
    for flags, message in [
        (["--teacher", "ViT-B-32", "--teacher-pretrained", "no-such-tag"], "no-such-tag"),
        (["--teacher", "ViT-Q"], "unknown model 'ViT-Q'"),
        (["--teacher", f"local-dir:{place}"], str(place)),
    ]:
        code, _, told = call(*flags, "--steps", "1", "--workers", "0")
        assert code == 2 and message in told and len(told.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bath-size", "4"], "--batch-size"),
        (["--student", "ViT-Q"], "unknown model 'ViT-Q'"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--accum-steps", "0"], "--accum-steps 0 must be at least 1"),
        (["--steps", "3", "--epochs", "2"], "--steps 3 and --epochs 2 exclude each other"),
        (["--epochs", "2", "--train-data", "{place}/pairs.tar"], "--epochs needs the size of"),
        (["--train-data", "{place}/pairs.tar"], "--train-data needs --steps or --epochs"),
        (["--train-data", "{place}/missing.tar", "--steps", "1"], "does not exist"),
        (["--contrastive-weight", "0"], "nothing to train on: set --contrastive-weight"),
        (["--push-to-hub", "nobody"], "has no owner: write org/name"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(place, call, flags, message):
    flags = [flag.format(place=place) for flag in flags]
    code, _, told = call("--teacher", "none", *flags, "--workers", "0")
    assert code == 2 and message in told and len(told.strip().splitlines()) == 1
    assert not Path("runs").exists()  # what never started leaves no folder


def test_resume_latest_takes_the_newest_run_that_has_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no runs/clip_kd-. folder here has a checkpoint"):
        default_folder("latest", "clip_kd")
    for name in ("clip_kd-1/checkpoints/step_00000002", "clip_kd-2/checkpoints/step_00000001", "clip_kd-3/checkpoints"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "loop.json").touch()
    (tmp_path / "runs" / "cifar_kd-9" / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert default_folder("latest", "clip_kd") == Path("runs/clip_kd-2")


def test_debug_shows_where(call):
    code, _, told = call("--teacher", "none", "--student", "ViT-Q", "--debug")
    assert code == 2 and "Traceback" in told
