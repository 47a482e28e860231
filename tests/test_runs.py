"""A run folder belongs to one run at a time, keeps the checkpoints that it should, goes on after changes that cannot
change the weights and after those only, and a damaged file in it is one line."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_recipes
import test_resume
import torch
from helpers import Script, processes, run_ranks, start_script
from safetensors.torch import load_file
from small_sets import colour_set
from test_engine import run_fit
from test_pairs import good, write_shard

from gkl_vl.atomic import hold_folder, holder_of, release_folder, replacing_folder
from gkl_vl.data.loaders import batches_taken
from gkl_vl.data.pair_stream import Position
from gkl_vl.errors import UserError
from gkl_vl.training import run as run_module
from gkl_vl.training.checkpoint import RunFolder, best_step, new_folder, read_loop_state
from gkl_vl.training.engine import FitConfig
from gkl_vl.training.run import MAY_DIFFER, Run, RunFlags, check_same_flags, input_files, is_same, resolved

HOUSE = Path(__file__).parents[1]
call = test_recipes.call  # the fixture


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunFlags = RunFlags()


# ---- one run at a time


def begin_run(barrier, results, folder: Path, output_dir: Path | None) -> None:
    """Starts a run at the same moment as others, reports its folder or the error, and stays until it is killed."""
    os.chdir(folder)
    run_module.default_folder = lambda resume, recipe: Path("runs/toy-1")  # the same second
    run = Run(Config(run=RunFlags(output_dir=output_dir)), recipe="toy")
    barrier.wait(60)
    try:
        run.begin("a run")
        run.folder.log({"step": 1, "pid": os.getpid()})
        results.put(("began", str(run.folder.path)))
    except UserError as error:
        results.put(("refused", str(error)))
    if os.fork() == 0:  # as a data worker, which the lock must not outlive
        time.sleep(30)
        os._exit(0)
    time.sleep(60)


def race(folder: Path, output_dir: Path | None) -> list[tuple[str, str]]:
    """What became of three runs that started together."""
    barrier, results = processes().Barrier(3), processes().Queue()
    runs = [processes().Process(target=begin_run, args=(barrier, results, folder, output_dir)) for _ in range(3)]
    try:
        for process in runs:
            process.start()
        return sorted(results.get(timeout=90) for _ in runs)
    finally:
        for process in runs:
            process.kill()
            process.join()


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    outcomes = race(tmp_path, None)
    assert outcomes == [("began", "runs/toy-1"), ("began", "runs/toy-1-2"), ("began", "runs/toy-1-3")]
    for _, folder in outcomes:
        (record,) = RunFolder(tmp_path / folder, is_main=False).records()
        assert f"pid {record['pid']} on " in (tmp_path / folder / ".lock").read_text()


def test_one_of_several_runs_takes_a_folder_and_its_death_frees_it(tmp_path):
    outcomes = race(tmp_path, Path("mine"))
    assert [what for what, _ in outcomes] == ["began", "refused", "refused"]
    (record,) = RunFolder(tmp_path / "mine", is_main=False).records()
    for _, message in outcomes[1:]:
        assert f"'mine' is in use by pid {record['pid']} on " in message and "name another folder" in message
    # killed runs hold nothing, though their forked children live on
    RunFolder(tmp_path / "mine", is_main=True).take(resumed=True)
    release_folder(tmp_path / "mine")
    assert not (tmp_path / "mine" / ".lock").exists()


def hold_and_wait(folder: Path, connection) -> None:
    hold_folder(folder)
    connection.send("held")
    connection.recv()


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, with its process id."""
    ours, theirs = processes().Pipe()
    process = processes().Process(target=hold_and_wait, args=(tmp_path / "held", theirs))
    process.start()
    assert ours.recv() == "held"
    yield tmp_path / "held", process.pid
    process.kill()
    process.join()


def start_in(rank, world_size, folder: Path, resume: str | None) -> str:
    try:
        Run(Config(run=RunFlags(output_dir=folder, resume=resume)), recipe="toy")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("resume", [None, "latest"])
def test_all_ranks_refuse_a_folder_in_use_also_to_resume(held, resume):
    folder, pid = held
    if resume:
        step = folder / "checkpoints" / "step_00000001"
        step.mkdir(parents=True)
        (step / "loop.json").write_text("{}")
        record = {"output_dir": str(folder), "seed": 0, "mixed_precision": "no"}
        (folder / "config.json").write_text(json.dumps(record))
    messages = run_ranks(start_in, 2, folder, resume)
    assert messages[0] == messages[1] and f"'{folder}' is in use by pid {pid} on" in messages[0]


def test_a_folder_is_held_until_it_is_released(held, tmp_path):
    folder, pid = held
    assert holder_of(folder) == f"pid {pid} on {os.uname().nodename}"
    with pytest.raises(UserError, match=f"is in use by pid {pid} on .*: wait for its end or stop it, or name another"):
        hold_folder(folder)
    hold_folder(tmp_path / "own")
    hold_folder(tmp_path / "own")  # this process holds it already
    assert holder_of(tmp_path / "own") is None
    (tmp_path / "own" / ".lock").unlink()
    hold_folder(tmp_path / "own")  # the file was removed: a lock on it is worth nothing
    assert (tmp_path / "own" / ".lock").is_file()
    release_folder(tmp_path / "own")
    release_folder(tmp_path / "own")
    assert list((tmp_path / "own").iterdir()) == []
    assert holder_of(tmp_path / "nothing") is None and not (tmp_path / "nothing").exists()


def test_one_of_several_suites_takes_a_folder(held, run_script, monkeypatch):
    folder, pid = held
    monkeypatch.chdir(folder.parent)
    code, _, error = run_script(HOUSE / "eval" / "suite.py", "--output", "held")
    assert code == 2 and f"'held' is in use by pid {pid} on" in error and len(error.strip().splitlines()) == 1


def test_of_several_writers_of_one_folder_the_last_wins(tmp_path):
    def write(number: int) -> None:
        for _ in range(50):
            with replacing_folder(tmp_path / "model") as scratch:
                (scratch / "a").write_text(str(number))
                (scratch / "b").write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # raises what a writer raised
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == (tmp_path / "model" / "b").read_text()


def test_a_new_folder_is_never_an_old_one(tmp_path):
    assert [new_folder(tmp_path / "a" / "run").name for _ in range(3)] == ["run", "run-2", "run-3"]


# ---- which checkpoints are kept


def evaluated(step: int, acc1: float | None, **more: object) -> dict:
    return {"step": step, "model": "student", "dataset": "toy", "acc1": acc1, "acc5": 1.0} | more


@pytest.mark.parametrize(
    "records, best",
    [
        ([evaluated(1, 0.3), evaluated(2, 0.5), evaluated(3, 0.4)], 2),
        ([evaluated(1, 0.5), evaluated(2, 0.5), evaluated(3, 0.4)], 2),  # the newest of equals
        ([evaluated(1, 0.3), evaluated(2, 0.5), evaluated(4, 0.9)], 2),  # no checkpoint at 4
        ([evaluated(1, 0.3), evaluated(1, 0.9, dataset="second"), evaluated(2, 0.5)], 2),  # the first set counts
        ([evaluated(1, 0.3), evaluated(2, 0.9, model="teacher")], 1),
        ([evaluated(1, 0.9, dataset="another"), evaluated(2, 0.5)], 2),  # not to be compared
        ([evaluated(1, float("nan")), evaluated(2, 0.1)], 2),
        ([evaluated(1, float("nan"))], None),
        ([{"step": 1, "train/loss": 0.3}], None),
        ([], None),
    ],
)
def test_the_best_step_is_that_of_the_students_main_metric(records, best):
    assert best_step(records, [1, 2, 3]) == best


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4, 5, 6]), (1, [2, 6]), (2, [2, 5, 6]), (5, [2, 3, 4, 5, 6])])
def test_the_newest_and_the_best_checkpoint_stay(tmp_path, keep, left):
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5])
    foreign = tmp_path / "checkpoints" / "step_mine"
    foreign.mkdir(parents=True)
    run_fit(
        tmp_path,
        config=FitConfig(steps=6, eval_every_steps=1, checkpoint_every_steps=1),
        evaluate=lambda model: [{"model": "student", "dataset": "toy", "acc1": next(scores)}],
        keep_checkpoints=keep,
    )
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == [*(f"step_{step:08d}" for step in left), "step_mine"]


def fake_run(folder: Path, steps: list[int]) -> RunFolder:
    """A run folder with empty checkpoints."""
    run = RunFolder(folder, is_main=True)
    for step in steps:
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        manifest = {"step": step, "run_id": None, "files": {}}
        (folder / "checkpoints" / f"step_{step:08d}" / "loop.json").write_text(json.dumps(manifest))
        run.log({"step": step})
    return run


def test_a_rewound_run_has_no_checkpoints_of_the_time_after_and_says_so(tmp_path, capsys):
    run = fake_run(tmp_path, [1, 2, 3, 999_999_999])
    run.rewind(2)
    assert list(run.saved()) == [1, 2] and [record["step"] for record in run.records()] == [1, 2]
    assert "removed 2 checkpoints after step 2" in capsys.readouterr().out
    assert run.find_checkpoint("latest").name == "step_00000002"
    run.rewind(2)
    assert capsys.readouterr().out == ""


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    run = fake_run(tmp_path, [5, 100_000_000])
    for name in ("step_copy", "step_00000009.bak", "step_00000007"):
        (tmp_path / "checkpoints" / name).mkdir()  # the last has no loop.json
    assert list(run.saved()) == [5, 100_000_000]
    assert run.find_checkpoint("latest").name == "step_100000000"


def test_leftovers_of_a_killed_writer_go_when_the_run_goes_on(tmp_path):
    run = fake_run(tmp_path, [5])
    doomed = [tmp_path / ".results.jsonl.0123abcd.writing", tmp_path / "checkpoints" / "writing_00000006"]
    doomed += [tmp_path / "checkpoints" / ".step_00000001.0123abcd.writing"]
    kept = [tmp_path / "checkpoints" / "writing_notes", tmp_path / "checkpoints" / ".mine.writing"]
    doomed[0].touch()
    for folder in (*doomed[1:], *kept):
        folder.mkdir()
        (folder / "file").touch()
    run.take(resumed=True)
    release_folder(tmp_path)
    assert not any(path.exists() for path in doomed) and all(path.exists() for path in kept)


# ---- what a resumed run may change


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.json").write_text(json.dumps(test_resume.MODEL))
    write_shard(folder / "0.tar", [good(i) for i in range(20)])
    write_shard(folder / "1.tar", [good(i) for i in range(20, 40)])
    colour_set(folder / "sets" / "colours", ["red", "green", "blue", "red"])
    return folder


def flags_of(place: Path, output: str) -> list[str]:
    flags = ["--teacher", "none", "--steps", "4", "--warmup", "2", "--batch-size", "8", "--ema-decay", "0.5"]
    flags += ["--student", f"{place}/tiny.json", "--train-data", f"{place}/{{0..1}}.tar", "--workers", "0"]
    flags += ["--output-dir", f"{place}/{output}", "--eval-data", "wds/colours", "--eval-every-steps", "2"]
    return [*flags, "--dataset-root", f"{place}/sets/{{dataset_cleaned}}", "--checkpoint-every-steps", "2"]


HARMLESS = ["--checkpoint-every-steps", "1", "--eval-every-steps", "1", "--keep-checkpoints", "1", "--workers", "1"]
HARMLESS += ["--train-data", "{0..1}.tar", "--student", "./tiny.json", "--precision", "fp32"]
HARMLESS += ["--dataset-root", "sets/../sets/{dataset_cleaned}", "--debug"]


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_goes_on_with_harmless_changes_ends_bit_for_bit_as_the_whole(place, call, monkeypatch):
    code, _, error = call(*flags_of(place, "run"))
    assert code == 0, error
    whole = load_file(place / "run" / "model" / "open_clip_model.safetensors")
    ema = load_file(place / "run" / "checkpoints" / "step_00000004" / "ema.safetensors")
    monkeypatch.chdir(place)  # the relative paths start elsewhere than those of the first command
    checkpoint = place / "run" / "checkpoints" / "step_00000002"
    code, out, error = call(*flags_of(place, "run"), *HARMLESS, "--resume", checkpoint)
    assert code == 0, error
    assert "removed 1 checkpoints after step 2" in out
    test_resume.assert_bitwise(load_file(place / "run" / "model" / "open_clip_model.safetensors"), whole)
    newest = place / "run" / "checkpoints" / "step_00000004"
    test_resume.assert_bitwise(load_file(newest / "ema.safetensors"), ema)
    measured = [record["step"] for record in RunFolder(place / "run", is_main=False).records() if "model" in record]
    assert measured == [2, 3, 4]


@pytest.mark.usefixtures("one_thread")
def test_other_streams_of_pairs_are_refused_and_harm_nothing(place, call):
    flags = flags_of(place, "streams")
    flags = [*flags[: flags.index("--eval-data")], "--checkpoint-every-steps", "2"]
    code, _, error = call(*flags)
    assert code == 0, error
    before = (place / "streams" / "results.jsonl").read_text()
    checkpoint = place / "streams" / "checkpoints"
    names = sorted(path.name for path in checkpoint.iterdir())
    code, _, error = call(*flags, "--workers", "2", "--resume", checkpoint / names[0])
    assert code == 2 and "--workers 2" in error and "resume with the same --workers" in error, error
    assert (place / "streams" / "results.jsonl").read_text() == before
    assert sorted(path.name for path in checkpoint.iterdir()) == names


def test_each_flag_that_may_differ_says_why():
    assert all(MAY_DIFFER.values())


BEFORE = {
    "lr": 0.1,
    "seed": 0,
    "steps": 8,
    "batch_size": 8,
    "train_data": "a.tar",
    "columns": ["image", "text"],
    "contrastive_weight": 1.0,
    "ema_decay": 0.5,
    "mixed_precision": "no",
    "student": "ViT-T-16",
    "accum_steps": 1,
    "workers": 2,
    "keep_checkpoints": 3,
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0.2),
        ("seed", 1),
        ("steps", 9),
        ("batch_size", 4),
        ("train_data", "b.tar"),
        ("columns", ["image", "title"]),
        ("columns", None),
        ("contrastive_weight", 0.5),
        ("ema_decay", 0.6),
        ("mixed_precision", "bf16"),
        ("student", "ViT-S-16"),
        ("accum_steps", 2),
    ],
)
def test_a_change_that_matters_is_refused_by_name(name, value):
    flag = name.replace("_", "-")
    with pytest.raises(UserError) as error:
        check_same_flags(BEFORE | {name: value, "workers": 0, "keep_checkpoints": 9}, BEFORE)
    now, before = (" ".join(v) if isinstance(v, list) else v for v in (value, BEFORE[name]))  # as they are typed
    assert f"but --{flag} {now} (was {before}): use the same flags" in str(error.value)


def test_a_file_with_other_contents_is_refused_by_its_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p.csv", "tiny.json", "w.bin"):
        (tmp_path / name).write_text("a")
    flags = {"train_data": "p.csv", "student": "./tiny.json", "teacher_pretrained": "tag=w.bin", "steps": 4, "lr": None}
    before = flags | {"inputs": input_files(flags)}
    assert sorted(before["inputs"]) == ["student", "teacher_pretrained", "train_data"]
    check_same_flags(before | {"train_data": f"{tmp_path}/p.csv"}, before)
    for flag, file in (("train_data", "p.csv"), ("student", "tiny.json"), ("teacher_pretrained", "w.bin")):
        (tmp_path / file).write_text("b")  # of the same size
        with pytest.raises(
            UserError, match=f"but --{flag.replace('_', '-')} .*{file} has other contents than at its start"
        ):
            check_same_flags(flags | {"inputs": input_files(flags)}, before)
        (tmp_path / file).write_text("a")


DAMAGED = [(2, [None]), (2, [5]), (2, "x"), (2, [{}, {}]), (-1, [{}]), (99, [{}]), (True, [{}])]


@pytest.mark.parametrize("step, positions", DAMAGED)
def test_a_damaged_position_is_refused(tmp_path, step, positions):
    checkpoint = tmp_path / "step_00000002"
    checkpoint.mkdir()
    (checkpoint / "loop.json").write_text(json.dumps({"step": step, "positions": positions}))
    with pytest.raises(UserError, match="is damaged|was written by 2 processes"):
        read_loop_state(checkpoint, rank=0, world_size=1)
    with pytest.raises(UserError, match="position .* is damaged"):
        batches_taken({})
    for stored in ({"batches": 1}, {"batches": 1, "places": [[0, 1]]}, {"batches": 1, "places": 7}):
        with pytest.raises(UserError, match="position .* is damaged"):
            Position.of(stored)


def test_a_path_is_what_it_leads_to(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "data" / "0.tar").touch()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    monkeypatch.chdir(tmp_path / "one")
    one, absolute = tmp_path / "one", f"{tmp_path}/one/data"
    for text in (
        "data",
        "data/0.tar",
        "data/{0..9}.tar",
        "data/*.tar",
        "local-dir:data",
        "data:train",
        "tag=data/0.tar",
    ):
        same = text.replace("data", absolute, 1)
        assert is_same(text, same, tmp_path) and is_same(same, text, one)
        assert is_same(text, same.replace("/one/", "/link/"), tmp_path)
        assert not is_same(text, text, tmp_path / "two")  # the same words, another place
        assert not is_same(text, same.replace("/one/", "/two/"), one)
    assert is_same(f"data/0.tar::{absolute}/0.tar", f"{absolute}/0.tar::data/0.tar", one)
    assert is_same(["data", "x"], [absolute, "x"], one) and not is_same(["data"], [absolute, "x"], one)
    assert is_same("data", "data", tmp_path / "gone")  # the project was moved
    assert resolved("org/name", one) is None and resolved("8/255", one) is None and resolved("x" * 5000, one) is None
    assert is_same("org/name:train", "org/name:train", one) and not is_same("org/name", "org/other", one)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fake_run(tmp_path / "a", [1])
    run = fake_run(tmp_path / "b", [1])
    checkpoint = tmp_path / "a" / "checkpoints" / "step_00000001"
    with pytest.raises(UserError, match="is not a checkpoint of .*: leave out --output-dir"):
        run.find_checkpoint(str(checkpoint))
    assert run.find_checkpoint(str(tmp_path / "b" / "checkpoints" / "step_00000001")).is_dir()


# ---- damaged files


@pytest.mark.parametrize(
    "file, content, read, message",
    [
        (
            "config.json",
            '{"lr": 1',
            RunFolder.config,
            "config.json' is damaged .*: restore it from a copy, or start in",
        ),
        ("config.json", "[1]", RunFolder.config, "config.json' is damaged .a JSON list in place of an object.*"),
        ("config.json", "\xff", RunFolder.config, "config.json' is damaged"),
        ("results.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', RunFolder.records, "results.jsonl' line 2 is damaged .*"),
        ("results.jsonl", '{"step": 1}\n7\n', RunFolder.records, "line 2 is damaged .a JSON int .*: remove that line"),
        ("results.jsonl", '{"x": 1}\n', RunFolder.records, "record 1 has no number of a step: remove that line"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, file, content, read, message):
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read(RunFolder(tmp_path, is_main=True))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 3}', '{"step": "3", "positions": [1]}'])
def test_a_damaged_position_is_named_with_a_remedy(tmp_path, content):
    (tmp_path / "loop.json").write_text(content)
    with pytest.raises(UserError, match="loop.json' is damaged .*: resume from another checkpoints/step_. folder"):
        read_loop_state(tmp_path, rank=0, world_size=1)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_a_checkpoint_cut_short_is_one_error_and_harms_nothing(tmp_path, name):
    config = FitConfig(steps=4, checkpoint_every_steps=2, log_every_steps=1)
    run_fit(tmp_path, config=config)
    file = tmp_path / "checkpoints" / "step_00000002" / name
    file.write_bytes(file.read_bytes()[:40])
    before = (tmp_path / "results.jsonl").read_text()
    with pytest.raises(UserError, match="step_00000002' cannot be loaded .*: resume from another checkpoints/step_"):
        run_fit(tmp_path, config=config, checkpoint=file.parent)
    assert (tmp_path / "results.jsonl").read_text() == before
    assert list(RunFolder(tmp_path, is_main=False).saved()) == [2, 4]


# ---- the end of a run that is told to stop


def processes_of(pid: int) -> list[int]:
    """A process and all below it that are alive; Linux only."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if state != "Z":
            alive.append((int(stat.parent.name), int(parent)))
    found = [pid for known, _ in alive if known == pid]
    for one in found:
        found += [child for child, parent in alive if parent == one]
    return found


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are listed as Linux does")
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_leaves_no_process_and_whole_checkpoints(place, tmp_path, number, code):
    flags = flags_of(place, f"stopped-{code}")
    flags = [*flags[: flags.index("--eval-data")], "--steps", "100000", "--workers", "2"]
    script = Script(test_resume.RECIPE, [*flags, "--checkpoint-every-steps", "5"], tmp_path)
    run, report = RunFolder(place / f"stopped-{code}", is_main=False), tmp_path / "report.json"
    process = start_script(script, report)
    assert wait_for(lambda: len(run.saved()) > 1 or not process.is_alive(), 120)
    assert process.is_alive(), report.read_text()
    below = processes_of(process.pid)[1:]
    assert len(below) >= 2  # two workers
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == code
    assert report.exists() == (number == signal.SIGTERM)
    assert not report.exists() or "note: stopped as requested, with a checkpoint" in json.loads(report.read_text())[2]
    assert wait_for(lambda: not any(processes_of(pid) for pid in below), 5)
    newest = run.find_checkpoint("latest")
    assert read_loop_state(newest, rank=0, world_size=1)[0] == max(run.saved())
    assert load_file(newest / "model.safetensors") and torch.load(newest / "optimizer.bin", weights_only=True)
    assert holder_of(run.path) is None
