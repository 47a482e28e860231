"""Zero-shot evaluation beside CLIP_benchmark's: every metric, time and peak memory, in one run on the CPU.

    pip install "clip-benchmark>=1.6.2" requests "numpy<2.4"      # all in the dev extra
    python benchmarks/evaluation.py --data CIFAR10                # half an hour on two cores
    python benchmarks/evaluation.py --data CIFAR10 --images 10000 --rounds 1 --skip retrieval
    python benchmarks/evaluation.py --skip classification         # needs no data, but 5 GB

CIFAR10 is a folder with the Hub's test-*.parquet of uoft-cs/cifar10 (columns img and label).

Classification: both command lines on the first `--images` of CIFAR-10's test set in CLIP_benchmark's layout, with its
18 prompts, the bundled teacher and a ViT-T-16 with random weights; batch 64, no mixed precision, no workers.
Retrieval: `retrieval_metrics` and CLIP_benchmark's own on the same random embeddings, 5,000 images with five captions
each; its function takes a model, so it is given one whose embeddings are the rows of a table.

Each measurement is a fresh process with an empty cache of embeddings, the two take turns. Time is that of the call,
model loading included (ours bootstraps intervals too), after all imports, and once more with them. Memory is the peak
resident memory during the call above what was resident before it: VmHWM of /proc/self/status (Linux), reset before the
call. Given are ratios, ours over theirs: the median over the rounds with the smallest and the largest. Seconds, on
stderr, depend on the machine.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

SIDES = ("theirs", "ours")
BATCH = 64
RECALL_K = [1, 5, 10]
IMAGES, CAPTIONS_PER_IMAGE, DIM = 5000, 5, 512
EVAL = Path(__file__).parents[1] / "eval"
TEACHER = "bundled teacher"
RANDOM = "random ViT-T-16"


# ---- what is evaluated -------------------------------------------------------------------------------------------


def write_cifar10(data: Path, root: Path, images: int) -> None:
    """The Hub's parquet in CLIP_benchmark's layout, the images' bytes as they are."""
    import clip_benchmark.datasets
    import pyarrow.parquet as pq

    files = sorted(data.rglob("test-*.parquet"))
    if not files:
        sys.exit(f"{data} holds no test-*.parquet")
    table = pq.read_table(files[0])
    rows = table.slice(0, images).to_pylist()
    (root / "test").mkdir(parents=True)
    shards = [rows[start : start + 1000] for start in range(0, len(rows), 1000)]
    for index, shard in enumerate(shards):
        with tarfile.open(root / "test" / f"{index}.tar", "w") as tar:
            for place, row in enumerate(shard):
                key, image = f"s{1000 * index + place:07d}", row["img"]["bytes"]
                add(tar, f"{key}.png" if image.startswith(b"\x89PNG") else f"{key}.jpg", image)
                add(tar, f"{key}.cls", str(row["label"]).encode())
    (root / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    (root / "classnames.txt").write_text("\n".join(features["label"]["names"]) + "\n")
    prompts = Path(clip_benchmark.datasets.__path__[0]) / "en_zeroshot_classification_templates.json"
    templates = json.loads(prompts.read_text())["cifar10"]
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_models(folder: Path) -> dict[str, str]:
    """Folders in open_clip's format, which both load, by what the tables call them."""
    import torch
    from safetensors.torch import save_file

    from gkl_vl.models.clip import BUNDLED_TEACHER, MODEL_CONFIGS, load_clip

    random = folder / "vit"
    random.mkdir()
    torch.manual_seed(0)
    save_file(load_clip("ViT-T-16").towers.get_submodule("model").state_dict(), random / "open_clip_model.safetensors")
    config = {"model_cfg": json.loads((MODEL_CONFIGS / "ViT-T-16.json").read_text()), "preprocess_cfg": {}}
    (random / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copytree(BUNDLED_TEACHER.removeprefix("local-dir:"), folder / "teacher")
    return {TEACHER: "local-dir:teacher", RANDOM: "local-dir:vit"}


# ---- one measurement, in a process of its own --------------------------------------------------------------------


def command_line(side: str, model: str) -> Callable[[], dict]:
    """The command of one side on the set in ./cifar10, all of it imported; the call gives its metrics."""
    output = Path(f"{side}.json")
    flags = ["--dataset", "wds/cifar10", "--dataset_root", "{dataset}", "--model", model, "--num_workers", "0"]
    flags += ["--batch_size", str(BATCH), "--output", str(output)]
    if side == "theirs":
        flags = ["eval", *flags, "--pretrained", "none", "--no_amp", "--quiet"]
        main = importlib.import_module("clip_benchmark.cli").main
    else:
        script = str(EVAL / "zero_shot.py")
        runpy.run_path(script, run_name="imported")
        main = partial(runpy.run_path, script, run_name="__main__")

    def call() -> dict:
        sys.argv = [side, *flags]
        output.unlink(missing_ok=True)
        main()
        return json.loads(output.read_text())["metrics"]

    return call


def retrieval(side: str) -> Callable[[], dict]:
    """The metric function of one side on the same embeddings, which are in memory before the call."""
    import torch
    import torch.nn.functional as F

    draw = torch.Generator().manual_seed(0)
    owners = torch.arange(IMAGES).repeat_interleave(CAPTIONS_PER_IMAGE)
    image = F.normalize(torch.randn(IMAGES, DIM, generator=draw), dim=1)
    text = F.normalize(image[owners] + 8 * F.normalize(torch.randn(len(owners), DIM, generator=draw), dim=1), dim=1)
    if side == "ours":
        from gkl_vl.evaluation.metrics import retrieval_metrics

        return lambda: retrieval_metrics(image=image, text=text, owners=owners, recall_k=RECALL_K)

    from clip_benchmark.metrics import zeroshot_retrieval

    class Table:
        encode_image = staticmethod(image.__getitem__)
        encode_text = staticmethod(text.__getitem__)

    def batches() -> Iterator[tuple[torch.Tensor, list[list[str]]]]:
        captions = [[str(5 * row + place) for place in range(CAPTIONS_PER_IMAGE)] for row in range(IMAGES)]
        for rows in torch.arange(IMAGES).split(BATCH):
            yield rows, [captions[row] for row in rows]

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([int(text) for text in texts])

    function = zeroshot_retrieval.evaluate
    return lambda: function(Table(), batches(), tokenize, device="cpu", amp=False, recall_k_list=RECALL_K)


def resident_bytes(key: str) -> int:
    """VmRSS, what is resident, or VmHWM, its peak."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def measure_here(side: str, task: str, model: str) -> None:
    """Prints one line of JSON; what the two print themselves is thrown away."""
    started = time.perf_counter()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        call = command_line(side, model) if task == "classification" else retrieval(side)
        imported = time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        before = resident_bytes("VmRSS")
        metrics = call()
        seconds = time.perf_counter() - imported
    memory = resident_bytes("VmHWM") - before
    print(json.dumps(dict(metrics=metrics, seconds=seconds, imports=imported - started, bytes=memory)))


# ---- all of them -------------------------------------------------------------------------------------------------


def measure(side: str, task: str, model: str, folder: Path, threads: int) -> dict:
    """`measure_here` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", side, task, model]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "",
            "XDG_CACHE_HOME": cache,
        }
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}, {task}: {done.stderr[-2000:]}")
    record = json.loads(done.stdout.splitlines()[-1])
    costs = f"{record['seconds']:.1f} s after {record['imports']:.1f} s of imports, {record['bytes'] / 1e6:.0f} MB"
    print(f"{task:15}{model:20}{side:8}{costs}", file=sys.stderr)
    return record


def take_turns(task: str, model: str, folder: Path, rounds: int, threads: int) -> dict[str, list[dict]]:
    runs = {side: [] for side in SIDES}
    for index in range(rounds):
        for side in SIDES if index % 2 else reversed(SIDES):
            runs[side].append(measure(side, task, model, folder, threads))
    return runs


def ratio(runs: dict[str, list[dict]], cost: Callable[[dict], float]) -> str:
    """Ours over theirs."""
    ratios = sorted(cost(own) / cost(other) for own, other in zip(runs["ours"], runs["theirs"], strict=True))
    return f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def print_costs(rows: dict[str, dict[str, list[dict]]]) -> None:
    print("\n| ours / CLIP_benchmark | time | with imports | peak memory |\n| --- | --- | --- | --- |")
    for name, runs in rows.items():
        cells = [lambda m: m["seconds"], lambda m: m["seconds"] + m["imports"], lambda m: m["bytes"]]
        print(f"| {name} | {' | '.join(ratio(runs, cost) for cost in cells)} |")


def print_metrics(rows: dict[str, dict[str, list[dict]]]) -> bool:
    """Both values of every key; whether they agree to 1e-6 in all rounds."""
    print("\n| | metric | CLIP_benchmark | ours | difference |\n| --- | --- | --- | --- | --- |")
    agree = True
    for name, runs in rows.items():
        theirs, own = ([run["metrics"] for run in runs[side]] for side in SIDES)
        agree &= all(one.keys() == theirs[0].keys() for one in theirs + own)
        for key, value in theirs[0].items():
            other = own[0].get(key, math.nan)
            print(f"| {name} | {key} | {value:.8f} | {other:.8f} | {abs(other - value):.0e} |")
            agree &= all(abs(one.get(key, math.nan) - value) <= 1e-6 for one in theirs + own)
    return agree


def report(options: argparse.Namespace) -> bool:
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.skip != "classification":
            write_cifar10(options.data, folder / "cifar10", options.images)
            for title, model in write_models(folder).items():
                runs = take_turns("classification", model, folder, options.rounds, options.threads)
                rows[f"classification, {title}"] = runs
        if options.skip != "retrieval":
            runs = take_turns("retrieval", "", folder, options.rounds, options.threads)
            rows[f"retrieval, {IMAGES:,} x {IMAGES * CAPTIONS_PER_IMAGE:,}"] = runs
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"first {options.images:,} images, {options.rounds} rounds, {options.threads} threads, load {load}")
    print_costs(rows)
    return print_metrics(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's test-*.parquet")
    parser.add_argument("--images", type=int, default=2000, help="of its 10,000, from the first")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of either side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", choices=["classification", "retrieval"])
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "TASK", "MODEL"), help="print only this, of this process")
    options = parser.parse_args()
    if options.child:
        measure_here(*options.child)
        return
    if not sys.platform.startswith("linux"):
        parser.error("memory is read from /proc, which only Linux has")
    if options.skip != "classification" and options.data is None:
        parser.error("--data names a folder with CIFAR-10's test-*.parquet; or --skip classification")
    if not report(options):
        sys.exit("the two differ by more than 1e-6, or in their keys")


if __name__ == "__main__":
    main()
