"""The image-text loss at scale: the dense form, the tiled one, and open_clip's DistillClipLoss, in time and memory.

    python benchmarks/loss_scale.py                          # n = 8,192, then the growth up to 32,768: about 20 minutes
    python benchmarks/loss_scale.py --n 2048 --growth 1024 2048 4096
    python benchmarks/loss_scale.py --output docs/loss_scale.png
    python benchmarks/loss_scale.py --errors                 # float32 against float64, a minute
    python benchmarks/loss_scale.py --edge                   # small batches, where `auto` changes over: a minute
    python benchmarks/loss_scale.py --device cuda --growth 4096 8192 16384 32768 65536
    python benchmarks/loss_scale.py --device cuda --tiles    # other sizes of the tiles: 20 seconds on an H100

Forward and backward in float32, student embeddings of 512 and teacher embeddings of 768 dimensions, gradient to the
student's embeddings and scale. "All terms": contrastive, soft CE, KL and wMSE at gamma 0.5. On a CPU every figure is
from a fresh process: the extra memory is the peak (VmHWM of /proc/self/status, Linux) above what the process held
before the first call; on CUDA it is PyTorch's peak of allocated memory. The time is the smallest of `--repeats` calls,
which other load on the machine disturbs least. Report the ratios: seconds depend on the machine.

The floor is the time of the matrix products alone, on the same tiles: three of the student's (logits, and its gradient
to either side) and one of the teacher's per sweep and tile, 2 n^2 (4 d + 2 e) multiplications and additions in all.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl_vl.losses.image_text import CPU_TILE, GPU_TILE, image_text_loss

STUDENT_DIM, TEACHER_DIM = 512, 768
TILES = {"cpu": CPU_TILE, "cuda": GPU_TILE}
OTHER_TILES = (512, 1024, 2048, 4096, 8192)
ALL_TERMS = {"kl_weight": 1.0, "gamma": 0.5}
SHARED_WITH_OPEN_CLIP = {"wmse_weight": 0.0}


def embeddings(n: int) -> dict[str, Tensor]:
    """Pairs that the models separate partly: each text is slightly closer to its image."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for prefix, dim in (("", STUDENT_DIM), ("teacher_", TEACHER_DIM)):
        image = F.normalize(torch.randn(n, dim, generator=draw))
        tensors[f"{prefix}image"] = image
        tensors[f"{prefix}text"] = F.normalize(image + 6 * F.normalize(torch.randn(n, dim, generator=draw)))
    return tensors


def ours(tile_size: int | None, options: dict) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    def loss(tensors: dict[str, Tensor], scale: Tensor, teacher_scale: Tensor) -> Tensor:
        return image_text_loss(
            **tensors, logit_scale=scale, teacher_logit_scale=teacher_scale, tile_size=tile_size, **options
        )[0]

    return loss


def open_clip_loss(tensors: dict[str, Tensor], scale: Tensor, teacher_scale: Tensor) -> Tensor:
    from open_clip.loss import DistillClipLoss

    contrastive, distil = DistillClipLoss()(
        tensors["image"], tensors["text"], scale, tensors["teacher_image"], tensors["teacher_text"], teacher_scale
    )
    return contrastive + distil


def leaning(tensors: dict[str, Tensor], offset: float) -> dict[str, Tensor]:
    """A direction shared by all student embeddings adds about `offset` to all logits; the teacher has none."""
    common = (offset / (1 - offset)) ** 0.5 * F.normalize(torch.ones(STUDENT_DIM), dim=0)
    return tensors | {name: F.normalize(tensors[name] + common) for name in ("image", "text")}


def errors(n: int, device: str) -> None:
    """The errors of float32 against the dense form in float64 on the CPU, with sharp logits and offsets of 50.

    Of the loss, and of the gradients to embeddings and scale; the largest difference relative to the largest entry.
    """
    sigmoid = {"sigmoid": True, "kl_weight": 0.0}
    settings = {
        "softmax": ({}, 0.0),
        "softmax, student's logits 50 higher": ({}, 0.5),
        "sigmoid, bias -50": (sigmoid, 0.0),
        "sigmoid, bias -50, logits 50 higher": (sigmoid, 0.5),
    }
    print(f"n = {n:,}, scales of 100, all terms: relative error of float32 against float64")
    print("| logits | gamma | dense: loss | embeddings | scale | tiled: loss | embeddings | scale |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (options, offset) in settings.items():
        tensors = leaning(embeddings(n), offset)
        for gamma in (0.0, 0.5, 1.0):
            exact = value_and_gradients(tensors, torch.float64, "cpu", None, options | {"gamma": gamma})
            cells = []
            for tile_size in (None, CPU_TILE):
                got = value_and_gradients(tensors, torch.float32, device, tile_size, options | {"gamma": gamma})
                loss, image, text, scale = (
                    ((ours.cpu().double() - right).abs().max() / right.abs().max()).item()
                    for ours, right in zip(got, exact, strict=True)
                )
                cells += [loss, max(image, text), scale]
            print(f"| {name} | {gamma:g} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")


def value_and_gradients(
    tensors: dict[str, Tensor], dtype: torch.dtype, device: str, tile_size: int | None, options: dict
) -> tuple[Tensor, ...]:
    """Of the same float32 numbers, computed in `dtype`: the loss, its gradient to images, texts and scale."""
    leaves = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    scale, teacher_scale, bias = (torch.tensor(value, dtype=dtype, device=device) for value in (100.0, 100.0, -50.0))
    trained = [leaf.requires_grad_() for leaf in (leaves["image"], leaves["text"], scale)]
    loss, _ = image_text_loss(
        **leaves,
        logit_scale=scale,
        logit_bias=bias,
        teacher_logit_scale=teacher_scale,
        tile_size=tile_size,
        **(ALL_TERMS | options),
    )
    return loss.detach(), *torch.autograd.grad(loss, trained)


def edge(sizes: list[int], device: str, repeats: int) -> None:
    """Batch sizes at which tiles become faster or smaller than the dense form."""
    for n in sizes:
        tiled, dense = (measured(form, n, device, repeats) for form in ("tiled", "dense"))
        memory = f"{tiled['extra'] / 2**20:,.0f} MiB against {dense['extra'] / 2**20:,.0f}"
        print(f"n = {n:,}: tiled takes {tiled['seconds'] / dense['seconds']:.2f} of the dense form's time; {memory}")


def forms(tile: int) -> dict[str, Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]]:
    """The forms of the loss, with tiles of this size."""
    return {
        "dense": ours(None, ALL_TERMS),
        "tiled": ours(tile, ALL_TERMS),
        "open_clip": open_clip_loss,
        "dense, open_clip's terms": ours(None, SHARED_WITH_OPEN_CLIP),
        "tiled, open_clip's terms": ours(tile, SHARED_WITH_OPEN_CLIP),
    }


def products(tensors: dict[str, Tensor], size: int) -> None:
    """The matrix products of the two sweeps alone."""
    image, text, teacher_image, teacher_text = tensors.values()
    to_image, to_text = torch.zeros_like(image), torch.zeros_like(text)
    tile = torch.empty(0)
    for sweep in range(2):
        for row in range(0, len(image), size):
            for column in range(0, len(text), size):
                r, c = slice(row, row + size), slice(column, column + size)
                tile = image[r] @ text[c].T
                tile = teacher_image[r] @ teacher_text[c].T
                if sweep:
                    to_image[r] += tile @ text[c]
                    to_text[c] += tile.T @ image[r]


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status[status.index("VmHWM:") :].split()[1])


def measure(form: str, n: int, device: str, repeats: int, tile: int) -> dict[str, float]:
    """In this process: loss, gradient norm, seconds, extra bytes."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def on_device(count: int) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in embeddings(count).items()}

    if form == "products":
        products(on_device(64), tile)  # libraries are loaded
        tensors = on_device(n)
        synchronize()
        started = time.perf_counter()
        products(tensors, tile)
        synchronize()
        return {"seconds": time.perf_counter() - started}
    run = forms(tile)[form]
    scale, teacher_scale = torch.tensor(50.0, device=device, requires_grad=True), torch.tensor(70.0, device=device)

    def call(tensors: dict[str, Tensor]) -> tuple[float, float]:
        leaves = tensors | {name: tensors[name].requires_grad_() for name in ("image", "text")}
        loss = run(leaves, scale, teacher_scale)
        gradients = torch.autograd.grad(loss, [leaves["image"], leaves["text"], scale])
        synchronize()
        return loss.item(), math.sqrt(sum(float(g.double().square().sum()) for g in gradients))

    call(on_device(64))  # libraries are loaded, threads started
    tensors = on_device(n)
    before, seconds, result = held_bytes(device), [], (0.0, 0.0)
    for _ in range(repeats):
        started = time.perf_counter()
        result = call(tensors)
        seconds.append(time.perf_counter() - started)
    extra = (peak_bytes() if device == "cpu" else torch.cuda.max_memory_allocated()) - before
    return {"loss": result[0], "gradient": result[1], "seconds": min(seconds), "extra": extra}


def held_bytes(device: str) -> int:
    """Memory that is held now, from which the peak is counted."""
    if device == "cpu":
        return peak_bytes()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measured(form: str, n: int, device: str, repeats: int = 1) -> dict[str, float]:
    """`measure`; on a CPU in a fresh process, whose peak of memory is not that of an earlier call."""
    if device == "cuda":
        return measure(form, n, device, repeats, TILES[device])
    command = [sys.executable, __file__, "--one", form, "--n", str(n), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{form} at n = {n}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def compare(n: int, device: str, repeats: int) -> None:
    """The forms side by side, and the floor."""
    costs = {form: measured(form, n, device, repeats) for form in forms(TILES[device])}
    floor = measured("products", n, device)["seconds"]
    for form, baseline in (
        ("tiled", "dense"),
        ("dense, open_clip's terms", "open_clip"),
        ("tiled, open_clip's terms", "open_clip"),
    ):
        a, b = costs[form], costs[baseline]
        for what in ("loss", "gradient"):
            if not math.isclose(a[what], b[what], rel_tol=1e-4):
                sys.exit(f"{form} and {baseline} differ in {what}: {a[what]} and {b[what]}")
        ratios = f"{a['seconds'] / b['seconds']:.2f} of the time and {a['extra'] / b['extra']:.3f} of the extra memory"
        print(f"n = {n:,}: {form} takes {ratios} of {baseline}")
    print(f"n = {n:,}: tiled takes {costs['tiled']['seconds'] / floor:.2f} times its matrix products alone")


def tiles(sizes: list[int], device: str, repeats: int) -> None:
    """Time and memory of other tiles, relative to the dense form."""
    print("| n | dense | " + " | ".join(f"tiles of {tile:,}" for tile in OTHER_TILES) + " |")
    print("|---" * (len(OTHER_TILES) + 2) + "|")
    for n in sizes:
        dense, cells = measure("dense", n, device, repeats, CPU_TILE), []
        for tile in OTHER_TILES:
            costs = measure("tiled", n, device, repeats, tile)
            cells.append(f"{costs['seconds'] / dense['seconds']:.2f}, {costs['extra'] / 2**20:,.0f} MiB")
        print(f"| {n:,} | 1, {dense['extra'] / 2**20:,.0f} MiB | {' | '.join(cells)} |")


def growth(sizes: list[int], device: str, output: Path | None) -> None:
    """How time and memory of the tiled form grow, and of the dense one while it fits."""
    curves: dict[str, list[tuple[int, dict[str, float]]]] = {
        "tiled": [(n, measured("tiled", n, device)) for n in sizes],
        "dense": [(n, measured("dense", n, device)) for n in sizes if n <= 8192],
    }
    for form, points in curves.items():
        for n, costs in points:
            times = f", {1e3 * costs['seconds']:.1f} ms" if device == "cuda" else ""
            print(f"{form}, n = {n:,}: {costs['extra'] / 2**20:,.0f} MiB extra{times}")
        if len(points) > 1:
            grows = {what: exponent([(n, costs[what]) for n, costs in points]) for what in ("extra", "seconds")}
            print(f"{form}: memory grows as n^{grows['extra']:.2f}, time as n^{grows['seconds']:.2f}")
    if output is not None:
        draw(curves, output)
        print(output)


def exponent(points: list[tuple[int, float]]) -> float:
    """Of a power law through the points: least squares in logarithms."""
    logs = [(math.log(n), math.log(value)) for n, value in points]
    x, y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)


def draw(curves: dict[str, list[tuple[int, dict[str, float]]]], output: Path) -> None:
    """Memory and time against the batch, time relative to the smallest tiled one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    unit = curves["tiled"][0][1]["seconds"]
    panels = (
        ("extra", 2**20, "Extra memory, MiB"),
        ("seconds", unit, f"Time, n = {curves['tiled'][0][0]:,} tiled is 1"),
    )
    for axes, (what, scale, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for (form, points), colour in zip(curves.items(), ("#0072b2", "#d55e00"), strict=True):
            axes.loglog(
                [n for n, _ in points], [costs[what] / scale for _, costs in points], "o-", color=colour, label=form
            )
        axes.set_title(title, loc="left", fontsize=11, weight="bold")
        axes.set_xlabel("batch n")
        ticks = [n for n, _ in curves["tiled"]]
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.minorticks_off()
        axes.grid(color="#d8dee4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192, help="batch of the comparison")
    parser.add_argument("--repeats", type=int, default=3, help="calls, of which the fastest counts")
    parser.add_argument("--growth", type=int, nargs="*", default=[2048, 4096, 8192, 16384, 32768], help="batches")
    parser.add_argument("--output", type=Path, help="draw the growth into this PNG")
    parser.add_argument("--errors", action="store_true", help="only the errors of float32, at n = 1,024")
    parser.add_argument("--edge", action="store_true", help="only small batches")
    parser.add_argument("--tiles", action="store_true", help="only other sizes of the tiles, in one process")
    parser.add_argument("--device", choices=list(TILES), default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiles and options.device == "cpu":
        parser.error("--tiles measures memory in one process, which only CUDA can: add --device cuda")
    if options.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if options.one:
        print(json.dumps(measure(options.one, options.n, "cpu", options.repeats, CPU_TILE)))
    elif options.errors:
        errors(1024, options.device)
    elif options.edge:
        edge([128, 256, 512, 768, 1024, 2048], options.device, 10 * options.repeats)
    elif options.tiles:
        tiles([512, 1024, 2048, 4096, 8192, 16384], options.device, options.repeats)
    else:
        compare(options.n, options.device, options.repeats)
        if options.growth:
            growth(options.growth, options.device, options.output)


if __name__ == "__main__":
    main()
