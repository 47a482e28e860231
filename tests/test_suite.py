"""A suite evaluates the sets that can be loaded, lists the others, and averages over the evaluated ones only. If it is
stopped, its results are kept; with --resume it reuses results with the same weights and settings only."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from helpers import run_ranks
from PIL import Image
from small_models import tiny_clip
from small_sets import colour_set

from gkl_vl.errors import UserError
from gkl_vl.evaluation import suite
from gkl_vl.evaluation.benchmark import Subject
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.flags import EvalFlags
from gkl_vl.evaluation.set_collections import Entry
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.evaluation.suite import Suite, load_entries, run_suite
from gkl_vl.evaluation.tables import Skipped, skipped_text, suite_text, tradeoff
from gkl_vl.models.clip import BUNDLED_TEACHER, load_clip
from gkl_vl.report.figures import draw_tradeoff

SCRIPT = Path(__file__).parents[1] / "eval" / "suite.py"


@pytest.fixture
def subject(tmp_path) -> Subject:
    return Subject(model="tiny", pretrained="", embedder=Embedder(clip=tiny_clip(tmp_path)))


@pytest.fixture
def sets(tmp_path):
    """Two classification sets and one retrieval set, as `Suite.sets` lists them."""
    loaded = []
    for name, colours in (("one", ["red", "green", "blue"]), ("vtab/two", ["blue", "red", "green", "red"])):
        dataset = load_benchmark_set(str(colour_set(tmp_path / "sets" / name.replace("/", "-"), colours)))
        loaded.append((name, dataset, [Entry(name)]))
    captions = colour_set(tmp_path / "sets" / "three", ["red", "blue"])
    (captions / "dataset_type.txt").write_text("retrieval")
    entries = [Entry("three", "zeroshot_retrieval", "mean_recall@1")]
    return [*loaded, ("three", load_benchmark_set(str(captions)), entries)]


def suite_of(sets, output: Path, *, resume: bool = False, is_main: bool = True) -> Suite:
    output.mkdir(exist_ok=True)
    return Suite(sets=sets, output=output, recall_k=(1, 2), seed=0, resume=resume, is_main=is_main)


def test_each_result_is_written_as_soon_as_it_is_known(tmp_path, subject, sets):
    lines = run_suite(suite_of(sets, tmp_path / "out"), subject, None)
    first = next(lines)
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "one__tiny_en_zeroshot_classification.json"
    assert same(suite.read_line(file), first)
    rest = list(lines)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[1:] == ["three__tiny_en_zeroshot_retrieval.json", "vtab_two__tiny_en_zeroshot_classification.json"]
    assert [line["dataset"] for line in (first, *rest)] == ["one", "vtab/two", "three"]
    assert rest[1]["metrics"].keys() >= {"image_retrieval_recall@2", "text_retrieval_recall@1"}
    assert first["cost"]["parameters"] > first["cost"]["image_parameters"] > 0 and first["cost"]["ms_per_image"] > 0


def same(one: object, other: object) -> bool:
    """Compares as JSON, because a nan is not equal to itself."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.fixture
def measured(monkeypatch):
    """The (set, task) pairs that were evaluated, not reused."""
    calls = []
    original = suite.evaluate_set

    def evaluate_set(subject, teacher, dataset, tasks, **how):
        calls.extend((how["name"], task) for task in tasks)
        return original(subject, teacher, dataset, tasks, **how)

    monkeypatch.setattr(suite, "evaluate_set", evaluate_set)
    return calls


def test_existing_results_are_not_measured_again(tmp_path, subject, sets, measured):
    stopped = run_suite(suite_of(sets, tmp_path / "out"), subject, None)
    before = [next(stopped), next(stopped)]
    stopped.close()
    assert len(measured) == 2
    resumed = list(run_suite(suite_of(sets, tmp_path / "out", resume=True), subject, None))
    assert measured[2:] == [("three", "zeroshot_retrieval")]
    assert same(resumed[:2], before)
    # without --resume all is measured
    list(run_suite(suite_of(sets, tmp_path / "out"), subject, None))
    assert len(measured) == 6


def test_results_of_other_weights_or_settings_are_measured_again(tmp_path, subject, sets, measured):
    list(run_suite(suite_of(sets, tmp_path / "out"), subject, None))
    del measured[:]
    again = suite_of(sets, tmp_path / "out", resume=True)
    list(run_suite(again, subject, subject))  # with a teacher
    assert len(measured) == 3
    subject.embedder.clip.towers.model.visual.ln_post.bias.data += 1  # under the same Embedder
    list(run_suite(again, subject, subject))
    assert len(measured) == 6
    (tmp_path / "out" / "one__tiny_en_zeroshot_classification.json").write_text('{"cut": ')
    list(run_suite(again, subject, subject))
    assert measured[6:] == [("one", "zeroshot_classification")]


def test_the_average_covers_the_main_metrics_of_the_evaluated_sets(tmp_path, subject, sets):
    lines = list(run_suite(suite_of(sets, tmp_path / "out"), subject, None))
    entries = {name: of_set for name, _, of_set in sets}
    table = suite_text(lines, entries).splitlines()
    scores = [lines[0]["metrics"]["acc1"], lines[1]["metrics"]["acc1"]]
    recalls = lines[2]["metrics"]
    scores.append((recalls["image_retrieval_recall@1"] + recalls["text_retrieval_recall@1"]) / 2)
    assert table[-1].split() == ["average", "of", "3", f"{100 * sum(scores) / 3:.2f}", "%"]
    assert "mean_recall@1" in table[3] and f"{100 * scores[2]:.2f} %" in table[3]
    other = {name: [Entry(name, "zeroshot_classification", "mean_per_class_recall")] for name in ("one", "vtab/two")}
    assert "mean_per_class_recall" in suite_text(lines, entries | other).splitlines()[1]


def test_a_teacher_adds_columns(tmp_path, subject, sets):
    lines = list(run_suite(suite_of(sets, tmp_path / "out"), subject, subject))
    head, first, *_, last = suite_text(lines, {}).splitlines()
    assert head.split()[-5:] == ["teacher", "kept", "as", "teacher", "ECE"]
    assert "100 %" in first and last.split()[-2:] == ["100", "%"]


def test_sets_that_cannot_be_loaded_are_skipped_with_their_reason(tmp_path, monkeypatch):
    colour_set(tmp_path / "one", ["red"])
    entries = (
        Entry("one", "zeroshot_classification", "acc1"),
        Entry("gone", "zeroshot_classification", "acc1"),
        Entry("odd", "zeroshot_classification", "acc1", "needs an unknown format"),
    )
    monkeypatch.setattr(suite, "expand", lambda names: [e for e in entries if e.dataset in names or "all" in names])
    flags = EvalFlags(dataset_root=str(tmp_path / "{dataset}"))
    loaded, skipped = load_entries(["all"], flags)
    assert [name for name, _, _ in loaded] == ["one"]
    assert skipped[1] == Skipped("odd", "needs an unknown format") and skipped[0].dataset == "gone"
    assert "gone" in skipped[0].reason
    with pytest.raises(UserError, match="gone"):  # named directly, a missing set is an error
        load_entries(["one", "gone"], flags)
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(UserError, match="none of the 3 sets of all"):
        load_entries(["all"], flags)


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def test_a_reason_shared_by_several_sets_is_printed_once():
    skipped = [Skipped(name, f"{name}: wds_{name.replace('/', '-')} is far") for name in ("a", "vtab/b")]
    text = skipped_text([*skipped, Skipped("c", "c is odd")])
    assert text.splitlines() == ["skipped a, vtab/b: NAME: wds_NAME is far", "skipped c: c is odd"]


# ---- the script


@pytest.fixture
def call(tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> tuple[int, str, str]:
        return run_script(SCRIPT, "--num_workers", "0", *flags)

    return call


def test_a_command_leaves_table_json_csv_and_picture(call, tmp_path):
    for name in ("one", "two"):
        colour_set(tmp_path / "sets" / name, ["red", "green", "blue"])
    (tmp_path / "list.txt").write_text("one\ntwo\n")
    flags = ["--collection", "list.txt", "--dataset_root", "sets/{dataset}", "--teacher", "bundled"]
    code, out, err = call(*flags)
    assert (code, err) == (0, "")
    assert "average of 2" in out and "2 results in results" in out
    with Path("results/benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    line = json.loads(Path("results/one__bundled_en_zeroshot_classification.json").read_text())
    assert [row["dataset"] for row in rows] == ["one", "two"]
    assert float(rows[0]["acc1"]) == line["metrics"]["acc1"] and rows[0]["model_fullname"] == "bundled "
    assert size_of(Path("results/suite.png")) == (1200, 500)
    # Existing results are not overwritten without --resume, which adds another model.
    code, out, err = call(*flags)
    assert code == 2 and err.count("\n") == 1 and "add --resume" in err
    model = BUNDLED_TEACHER
    code, out, err = call(*flags, "--resume", "--model", "bundled", model)
    assert (code, err) == (0, "") and "4 results in results" in out


def test_user_errors_end_in_one_line(call, tmp_path):
    colour_set(tmp_path / "one", ["red", "green", "blue"])
    one = ["--collection", str(tmp_path / "one")]
    for flags, message in (
        (["--collection", "imagenet1q"], "imagenet1k"),
        ([*one, "--model", "RN50"], "has random weights"),
        ([*one, "--model", "RN50", "RN50", "--pretrained", "openai"], "1 --pretrained for 2 --model"),
        ([*one, "--teacher", "nothing"], "has random weights"),
    ):
        code, out, err = call(*flags)
        assert code == 2 and err.count("\n") == 1 and message in err, err


def two_processes(rank: int, world_size: int, folder: str, output: str) -> str:
    dataset = load_benchmark_set(folder)
    subject = Subject(model="m", pretrained="", embedder=Embedder(clip=load_clip(BUNDLED_TEACHER), batch_size=2))
    tasks = [Entry("x", "zeroshot_classification"), Entry("x", "zeroshot_retrieval")]
    run = suite_of([("x", dataset, tasks)], Path(output), is_main=rank == 0)
    lines = list(run_suite(run, subject, subject))
    for line in lines:
        del line["cost"], line["teacher"]["cost"]  # milliseconds
        del line["commit"]  # a commit may come between
    return json.dumps(lines)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_the_results_of_one(tmp_path):
    folder = str(colour_set(tmp_path / "set", ["red", "green", "blue", "red", "green"]))
    alone = two_processes(0, 1, folder, str(tmp_path / "alone"))
    assert run_ranks(two_processes, 2, folder, str(tmp_path / "two")) == [alone, alone]
    assert len(list((tmp_path / "two").iterdir())) == 2


# ---- the plot


def line_of(model: str, dataset: str, acc1: float) -> dict:
    cost = {"parameters": 1_000_000, "image_parameters": 1, "ms_per_image": 1.5}
    task = "zeroshot_classification"
    return {"model": model, "pretrained": "", "dataset": dataset, "task": task, "metrics": {"acc1": acc1}} | {
        "extra": {},
        "cost": cost,
    }


def test_models_are_compared_on_the_results_that_all_have():
    lines = [line_of("a", "x", 0.5), line_of("a", "y", 0.9), line_of("b", "x", 0.25), line_of("b", "z", 1.0)]
    points = tradeoff(lines, {})
    assert [(point["name"], point["score"], point["results"]) for point in points] == [("a", 50, 1), ("b", 25, 1)]
    assert tradeoff([line_of("a", "x", 1.0), line_of("b", "y", 1.0)], {}) == [] == tradeoff([], {})


def test_a_teacher_is_a_separate_point():
    line = line_of("a", "x", 0.5)
    teacher = {k: line_of("big", "x", 0.75)[k] for k in ("model", "metrics", "extra", "cost")}
    names = [(point["name"], point["score"]) for point in tradeoff([line | {"teacher": teacher}], {})]
    assert names == [("a", 50), ("big", 75)]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_plot_takes_any_number_of_models(tmp_path, count):
    points = [
        {
            "name": f"model_{i}$",
            "score": 10.0 * i,
            "results": 3,
            "parameters": 10 ** (i + 1),
            "ms_per_image": 0.1 * i + 0.1,
        }
        for i in range(count)
    ]
    draw_tradeoff(path=tmp_path / "suite.png", points=points)
    assert [path.name for path in tmp_path.iterdir()] == ["suite.png"]
    assert size_of(tmp_path / "suite.png") == (1200, 500)


# ---- a local Hub


class FakeHub(BaseHTTPRequestHandler):
    """Serves the data sets ORG/REPO/... below `server.root` under the Hub's URLs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path).split("?")[0].strip("/").split("/")
        if path[:2] == ["api", "datasets"]:
            repo = self.server.root / path[2] / path[3]  # type: ignore[attr-defined]
            files = sorted(file for file in repo.rglob("*") if file.is_file())
            names = [str(file.relative_to(repo)) for file in files]
            info: Any = {"id": "/".join(path[2:4]), "sha": "a" * 40, "siblings": [{"rfilename": n} for n in names]}
            if path[4] == "tree":
                info = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "b" * 40}
                    for name, file in zip(names, files, strict=True)
                ]
            self.answer(json.dumps(info).encode() if files else None)
        elif path[0] == "datasets":  # datasets/ORG/REPO/resolve/REVISION/FILE
            file = self.server.root.joinpath(path[1], path[2], *path[5:])  # type: ignore[attr-defined]
            self.answer(file.read_bytes() if file.is_file() else None)
        else:
            self.answer(None)

    def answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET" and body is not None:
            self.wfile.write(body)


@pytest.fixture
def address(tmp_path):
    """Address of a Hub with two of the three sets of `retrieval`."""
    for name, colours in (("flickr8k", ["red", "green", "blue"]), ("mscoco_captions", ["blue", "red"])):
        root = colour_set(tmp_path / "hub" / "clip-benchmark" / f"wds_{name}", colours)
        (root / "dataset_type.txt").write_text("retrieval")
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.root = tmp_path / "hub"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_collection_is_loaded_from_the_hub_and_missing_sets_are_listed(tmp_path, address):
    # HF_ENDPOINT is read when huggingface_hub is imported, hence a new process
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(SCRIPT), "--collection", "retrieval", "--num_workers", "0"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "average of 2" in done.stdout
    (skipped,) = [line for line in done.stdout.splitlines() if line.startswith("skipped")]
    assert skipped.startswith("skipped flickr30k: ") and "the Hub has no clip-benchmark/wds_flickr30k" in skipped
    evaluated = {json.loads(path.read_text())["dataset"] for path in (tmp_path / "results").glob("*.json")}
    assert evaluated == {"flickr8k", "mscoco_captions"}
