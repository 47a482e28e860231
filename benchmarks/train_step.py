"""Cost of a teacher in training: stored, online and none, beside open_clip's distillation; size and cost of a store.

    python benchmarks/train_step.py                # eight minutes on two idle cores
    python benchmarks/train_step.py --rounds 5 --steps 40
    python benchmarks/train_step.py --device cuda --batch-size 512 --workers 15
    python benchmarks/train_step.py --memory       # the student alone, with the flags that change its passes

Training: `recipes/clip_kd.py` with its default loss and `python -m open_clip_train.main --distill-model` train the same
ViT student on the same table of JPEGs, with random weights, each run in a fresh process: on the CPU in float32, with a
teacher of twice the student's widths and four times its operations; on a GPU ViT-S-16 from ViT-L-14 under bfloat16
autocast. Both have the same batch, threads and workers, clip the gradient at norm 1 and crop 90 to 100 % of an image to
the size that both models take. Every file is read once, so that no image of an earlier epoch is used again; on a GPU
drawings and captions repeat under other names. Measured is the mean rate after the first ten steps, with the loader.
What differs:

    loss         clip_kd: contrastive, soft CE and feature mimicry through linear maps. open_clip: contrastive, soft CE
    texts        clip_kd cuts a causal text tower's input behind the last end-of-text token of a quarter of the batch.
                 open_clip computes all 77 positions. The head of the table has the mean number of tokens
    tokens       clip_kd tokenises for student and online teacher, and a worker keeps the tokens of its last captions;
                 open_clip tokenises once for both
    pixels       clip_kd normalises a batch in the training process, open_clip an image in the worker
    workers      clip_kd keeps 4 batches ahead, open_clip 2
    log          clip_kd every ten steps, open_clip every step

Store: `build_blocks`, the work of `recipes/store_teacher.py`, against the teacher's forward pass alone on the same
numbers of views and captions, prepared in advance; from the first forward pass on, without the start of the workers.
Bytes are those of the block files, per pair; the manifest, some 40 KB a store, is left out.

Measurements take turns. Given are ratios within a round: their median over the rounds, with the smallest and largest.
Rates, on stderr, depend on the machine.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import harmonic_mean, median

import open_clip
import torch
from open_clip import get_model_config
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gkl_vl.data.pairs import bundled_pairs, open_source
from gkl_vl.data.sources import RawPair, Source, memory_source
from gkl_vl.export.hub import CONFIG_NAME, WEIGHTS_NAME
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.teachers.embed_pairs import BATCH, build_blocks, describe_store, finish_store
from gkl_vl.teachers.embeddings import StoreDtype
from gkl_vl.training.clip_teacher import augmentation

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "clip_kd.py"
TABLE = "train.tsv"
LEFT_OUT = 10
"""First steps of a run: kernels are chosen, memory is allocated, the workers fill their queues. clip_kd logs a rate
for every ten steps."""
SPARE = 4
"""Batches beyond the last step, so that open_clip's worker, which reads the table once, has work in every step."""
VIEWS, WIDE = 5, 768
BUILT_BATCHES = 4
RATIOS = (
    ("time of a step, stored teacher / no teacher", "none", "stored", "at most 1.10"),
    ("time of a step, online teacher / no teacher", "none", "online", ""),
    ("building a store / forward pass alone, embeddings per second", "build", "forward", "at least 0.9"),
    ("online teacher / open_clip, pairs per second", "online", "open_clip", "at least 1.2"),
    ("stored teacher / open_clip, pairs per second", "stored", "open_clip", "at least 3"),
)
"""Name of each ratio, of what rates it is, and its target."""
MEMORY = {
    "checkpointed": ["--grad-checkpointing"],
    "dropped": ["--patch-dropout", "0.5"],
    "compiled": ["--torchcompile"],
}
"""Name of a run of --memory: its flags. The steps that compile for a new shape are not left out."""
MEMORY_RATIOS = tuple((f"time of a step, {' '.join(flags)} / plain", "none", run, "") for run, flags in MEMORY.items())
MOST_BYTES: dict[StoreDtype, int] = {"int8": 5000, "float16": 10_000}


# ---- data and models ---------------------------------------------------------------------------------------------


def write_table(folder: Path, pairs: list[RawPair], *, count: int, size: int) -> None:
    """So many JPEGs of bundled drawings, each with all of its captions in one, and the table that both read."""
    rows = ["filepath\ttitle"]
    (folder / "images").mkdir()
    drawings = []
    for pair in pairs[:count]:
        drawing, encoded = Image.open(io.BytesIO(pair.image)).convert("RGB"), io.BytesIO()
        drawing.resize((size, size), Image.Resampling.BICUBIC).save(encoded, "jpeg", quality=90)
        drawings.append((encoded.getvalue(), ", ".join(pair.captions)))
    for number in range(count):  # a drawing repeats where there are fewer
        path = folder / "images" / f"{number}.jpg"
        jpeg, caption = drawings[number % len(drawings)]
        path.write_bytes(jpeg)
        rows.append(f"{path}\t{caption}")
    (folder / TABLE).write_text("\n".join(rows) + "\n", encoding="utf-8")


def vit(*, scale: int) -> dict:
    """A ViT with six layers of width 192 * scale, whose text tower takes 0.6 of its operations, as in ViT-B-32."""
    vision = {"image_size": 96, "patch_size": 16, "layers": 6, "width": 192 * scale}
    text = {"context_length": 77, "vocab_size": 49408, "layers": 4, "width": 128 * scale, "heads": 2 * scale}
    return {"embed_dim": 128 * scale, "vision_cfg": vision, "text_cfg": text}


def tiny(*, embed_dim: int) -> dict:
    """A model of one narrow layer, for the size of its embeddings alone."""
    vision = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "layers": 1, "width": 64, "heads": 1}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}


def write_model(folder: Path, config: dict) -> Clip:
    """Writes a folder with random weights that both toolkits read as local-dir:FOLDER."""
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    clip = load_clip(str(folder / CONFIG_NAME))
    save_file(clip.towers.get_submodule("model").state_dict(), folder / WEIGHTS_NAME)
    return clip


def operations(clip: Clip) -> int:
    """Floating-point operations of the forward pass of an image and of all 77 positions of a text."""
    with FlopCounterMode(display=False) as counter:
        clip.towers.encode_image(torch.zeros(1, 3, clip.image_size, clip.image_size))
        clip.towers.encode_text(clip.tokenize([""]))
    return counter.get_total_flops()


def parameters(clip: Clip) -> int:
    """Parameters without the table of token embeddings, whose rows take no operations."""
    tokens = clip.towers.get_parameter("model.token_embedding.weight")
    return sum(p.numel() for p in clip.towers.parameters()) - tokens.numel()


# ---- training, each run in a process of its own ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where runs are made, and what all have in common."""

    folder: Path
    device: str
    steps: int
    batch_size: int
    threads: int
    workers: int

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def flags(self) -> list[str]:
        """Flags that the two toolkits share."""
        return [
            *("--train-data", TABLE, "--batch-size", str(self.batch_size), "--workers", str(self.workers)),
            *("--precision", "fp32" if self.on_cpu else "amp_bf16"),
        ]

    def run(self, command: list[str]) -> None:
        """Runs a command with these threads, on the device and offline."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        if self.on_cpu:
            environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, *command], cwd=self.folder, env=environment, capture_output=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr.decode()[-2000:]}")


def models(settings: Settings) -> dict[str, dict]:
    """Configs of student and teacher."""
    if settings.on_cpu:
        return {"student": vit(scale=1), "teacher": vit(scale=2)}
    student, teacher = get_model_config("ViT-S-16"), get_model_config("ViT-L-14")
    assert student is not None and teacher is not None  # open_clip ships them
    return {"student": student, "teacher": teacher}


def device_name(settings: Settings) -> str:
    return "CPU" if settings.on_cpu else torch.cuda.get_device_name()


def clip_kd(settings: Settings, run: str, teacher: list[str]) -> float:
    """Pairs per second of the recipe."""
    flags = ["--student", "local-dir:student", "--columns", "filepath", "title", "--checkpoint-every-steps", "0"]
    settings.run(
        [str(RECIPE), *settings.flags(), *flags, *teacher, "--steps", str(settings.steps), "--output-dir", run]
    )
    records = map(json.loads, (settings.folder / run / "results.jsonl").read_text().splitlines())
    rates = [record["train/images_per_second"] for record in records if record["step"] > LEFT_OUT]
    return harmonic_mean(rates)  # each is of ten steps


def open_clip_train(settings: Settings, run: str) -> float:
    """Pairs per second of open_clip with an online teacher."""
    teacher = ["--distill-model", "local-dir:teacher", "--distill-pretrained", "none"]  # the tag is not read
    optimisation = ["--lr", "1e-3", "--warmup", "50", "--grad-clip-norm", "1.0", "--epochs", "1"]
    output = ["--logs", "logs", "--name", run, "--log-every-n-steps", "1"]
    flags = ["--dataset-type", "csv", "--model", "local-dir:student", "--device", settings.device]
    settings.run(["-m", "open_clip_train.main", *settings.flags(), *flags, *teacher, *optimisation, *output])
    log = (settings.folder / "logs" / run / "out.log").read_text()
    rates = [float(rate) for rate in re.findall(r"Batch \(t\): \S+ (\S+)/s,", log)]
    return harmonic_mean(rates[LEFT_OUT : settings.steps])  # each is of one step


# ---- stores ------------------------------------------------------------------------------------------------------


def autocast(settings: Settings) -> AbstractContextManager:
    """As the recipes with the precision of `Settings.flags`."""
    return nullcontext() if settings.on_cpu else torch.autocast("cuda", torch.bfloat16)


def build(
    folder: Path,
    teacher: Clip,
    source: Source,
    *,
    views: int,
    workers: int,
    dtype: StoreDtype = "float16",
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> float:
    """Builds a store; embeddings per second from its first forward pass to the end."""
    augment = augmentation(bundled=False, distils=True)
    manifest = describe_store([teacher], source, augment, views=views, dtype=dtype)
    started: list[float] = []

    def stamp() -> AbstractContextManager:
        started.append(time.perf_counter())
        return precision()

    folder.mkdir()
    build_blocks(
        folder,
        manifest,
        range(len(manifest.blocks)),
        [teacher],
        source,
        augment,
        num_workers=workers,
        autocast=stamp,
        quiet=True,
    )
    seconds = time.perf_counter() - started[0]
    return finish_store(folder, manifest).pairs * (views + 1) / seconds  # each pair has one caption


@torch.inference_mode()
def forward(settings: Settings, teacher: Clip, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Embeddings per second of the forward passes that a build makes, on prepared pixels and tokens."""
    started = time.perf_counter()
    with autocast(settings):
        for pixels, tokens in batches:
            teacher.towers.encode_image(pixels).float().cpu()  # waits for a GPU
            teacher.towers.encode_text_by_length(tokens).float().cpu()
    seconds = time.perf_counter() - started
    return sum(len(pixels) + len(tokens) for pixels, tokens in batches) / seconds


def prepared(settings: Settings, teacher: Clip, source: Source) -> list[tuple[Tensor, Tensor]]:
    """Batches of a build's sizes on the device: random pixels, and the tokens of its captions."""
    size = teacher.image_size
    captions = [pair.captions[0] for pair in source.pairs.read(0)]
    parts = [captions[start : start + BATCH // VIEWS] for start in range(0, len(captions), BATCH // VIEWS)]
    pixels = [teacher.normalised(torch.rand(VIEWS * len(part), 3, size, size)) for part in parts]
    tokens = map(teacher.tokenize, parts)
    return [(x.to(settings.device), t.to(settings.device)) for x, t in zip(pixels, tokens, strict=True)]


def bytes_of_a_pair(folder: Path, source: Source, dtype: StoreDtype) -> float:
    """In a store of five views and one caption, with embeddings of 768 dimensions."""
    config = folder / "tiny.json"
    config.write_text(json.dumps(tiny(embed_dim=WIDE)))
    store = folder / dtype
    build(store, freeze(load_clip(str(config))), source, views=VIEWS, workers=0, dtype=dtype)
    assert source.num_pairs is not None  # it is a list
    return sum(path.stat().st_size for path in store.glob("*.safetensors")) / source.num_pairs


# ---- all of them -------------------------------------------------------------------------------------------------


def measure(settings: Settings, teacher: Clip, source: Source, rounds: int) -> list[dict[str, float]]:
    """Rates of every round: pairs per second of training, embeddings per second of the teacher."""
    batches = prepared(settings, teacher, source)
    precision = partial(autocast, settings)
    forward(settings, teacher, batches[:1])  # a warm-up
    measured = []
    for number in range(rounds):
        store = settings.folder / f"built-{number}"
        calls = {
            "none": partial(clip_kd, settings, f"none-{number}", ["--teacher", "none"]),
            "stored": partial(clip_kd, settings, f"stored-{number}", ["--teacher-store", "store"]),
            "online": partial(clip_kd, settings, f"online-{number}", ["--teacher", "local-dir:teacher"]),
            "open_clip": partial(open_clip_train, settings, f"open_clip-{number}"),
            "build": partial(build, store, teacher, source, views=VIEWS, workers=settings.workers, precision=precision),
            "forward": partial(forward, settings, teacher, batches),
        }
        rates = {}
        for name in calls if number % 2 else reversed(calls):
            rates[name] = calls[name]()
            print(f"{name} {rates[name]:.1f}/s", file=sys.stderr, flush=True)  # kept if a later one fails
        measured.append(rates)
    return measured


def measure_memory(settings: Settings, rounds: int) -> list[dict[str, float]]:
    """Pairs per second of training without a teacher, in every round."""
    measured = []
    for number in range(rounds):
        runs = {"none": [], **MEMORY}
        rates = {}
        for name in runs if number % 2 else reversed(runs):
            rates[name] = clip_kd(settings, f"{name}-{number}", ["--teacher", "none", *runs[name]])
            print(f"{name} {rates[name]:.1f}/s", file=sys.stderr, flush=True)
        measured.append(rates)
    return measured


def print_models(student: Clip, teacher: Clip, captions: list[str]) -> None:
    flops, size = operations(student), parameters(student)
    tokens = student.tokenize(captions).argmax(dim=1) + 1
    print(
        f"student: {flops / 1e9:.2f} GFLOP a pair, {size / 1e6:.1f} M parameters without the token table\n"
        f"teacher: {operations(teacher) / flops:.1f} and {parameters(teacher) / size:.1f} times these\n"
        f"captions: {tokens.float().mean():.0f} of 77 tokens on average\n"
    )


def print_table(
    measured: list[dict[str, float]],
    sizes: dict[StoreDtype, float],
    rows: Sequence[tuple[str, str, str, str]] = RATIOS,
) -> None:
    print("| | median (smallest to largest) | target |\n| --- | --- | --- |")
    for name, one, other, target in rows:
        ratios = sorted(rates[one] / rates[other] for rates in measured)
        print(f"| {name} | {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {target} |")
    for dtype, size in sizes.items():
        name = f"bytes a pair, {VIEWS} views, 1 caption, {WIDE} dimensions, {dtype}"
        print(f"| {name} | {size:,.0f} | at most {MOST_BYTES[dtype]:,} |")


def report(settings: Settings, rounds: int, *, memory: bool) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    folder = settings.folder
    count = (settings.steps + SPARE) * settings.batch_size
    write_table(folder, bundled_pairs(), count=count, size=128 if settings.on_cpu else 256)
    student, teacher = (write_model(folder / role, config) for role, config in models(settings).items())
    table = open_source(str(folder / TABLE), columns=("filepath", "title"))
    pairs = list(table.pairs.read(0))
    load = os.getloadavg()[0]
    print(
        f"{rounds} rounds of {settings.steps} steps, batch {settings.batch_size}, {settings.threads} threads, "
        f"{settings.workers} workers, {device_name(settings)}, torch {torch.__version__}, "
        f"open_clip {open_clip.__version__}, load {load:.1f}"
    )
    print_models(student, teacher, [pair.captions[0] for pair in pairs])
    if memory:
        print_table(measure_memory(settings, rounds), {}, MEMORY_RATIOS)
        return
    freeze(teacher).towers.to(settings.device)
    precision = partial(autocast, settings)
    build(folder / "store", teacher, table, views=1, workers=settings.workers, precision=precision)
    some = memory_source("some", pairs[: BUILT_BATCHES * (BATCH // VIEWS)])
    measured = measure(settings, teacher, some, rounds)
    print_table(measured, {dtype: bytes_of_a_pair(folder, some, dtype) for dtype in MOST_BYTES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of everything, in turns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", action="store_true", help="only the runs of MEMORY, beside a plain one")
    parser.add_argument("--steps", type=int, default=30, help="of a run, a multiple of ten; the first ten do not count")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="data-loading processes of a run and of a build")
    options = vars(parser.parse_args())
    rounds, memory = options.pop("rounds"), options.pop("memory")
    if options["steps"] <= LEFT_OUT or options["steps"] % 10:
        parser.error(f"--steps {options['steps']} must be a multiple of ten above {LEFT_OUT}")
    with tempfile.TemporaryDirectory() as folder:
        report(Settings(folder=Path(folder), **options), rounds, memory=memory)


if __name__ == "__main__":
    main()
