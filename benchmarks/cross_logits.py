"""The loss on cross logits: time over its matrix products alone, extra memory, and its share of a training step.

    python benchmarks/cross_logits.py                        # n = 4,096, K = 65,536, d = 512, forward and backward
    python benchmarks/cross_logits.py --n 512 --k 4096
    python benchmarks/cross_logits.py --step                 # an update of the bundled student, with and without it

One direction, soft CE and wMSE at gamma 0.5, in float32. The products are the three that the loss needs: the teacher's
logits, their difference from the student's, and the gradient with respect to the student's rows; in chunks of the same
size. Calls of both alternate and the fastest of each counts, which other load on the machine disturbs least. The extra
memory is the peak of a fresh process (VmHWM of /proc/self/status, Linux) above what it held before the first call.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from loss_scale import peak_bytes
from torch import Tensor

from gkl_vl.losses.cross_logits import CHUNK_ENTRIES, cross_logits_loss
from gkl_vl.losses.image_text import image_text_loss, mimicry_loss
from gkl_vl.models.clip import load_clip
from gkl_vl.models.student import Student
from gkl_vl.teachers.bank import Bank

SCALE = torch.tensor(50.0)


def unit_rows(count: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def loss_and_gradient(image: Tensor, teacher: Tensor, bank: Tensor) -> None:
    image.grad = None
    loss, _ = cross_logits_loss(image=image, teacher_image=teacher, text_bank=bank, teacher_logit_scale=SCALE)
    loss.backward()


def products(image: Tensor, teacher: Tensor, bank: Tensor) -> None:
    """The matrix products alone."""
    gradient, rows = torch.empty_like(image), CHUNK_ENTRIES // len(bank)
    with torch.no_grad():
        for start in range(0, len(image), rows):
            chunk = slice(start, start + rows)
            _, difference = teacher[chunk] @ bank.T, image[chunk] @ bank.T
            torch.mm(difference, bank, out=gradient[chunk])


def fastest(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest call of each, after one that does not count; calls alternate."""
    seconds = dict.fromkeys(calls, float("inf"))
    for number in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def loss(n: int, k: int, d: int, repeats: int) -> None:
    given = unit_rows(n, d, 0).requires_grad_(), unit_rows(n, d, 1), unit_rows(k, d, 2)
    if repeats == 0:  # in a fresh process
        loss_and_gradient(unit_rows(8, d, 0).requires_grad_(), *(part[:8] for part in given[1:]))
        before = peak_bytes()
        loss_and_gradient(*given)
        print(f"{(peak_bytes() - before) / 2**20:,.0f} MiB")
        return
    flags = [f"--{name}={value}" for name, value in (("n", n), ("k", k), ("d", d), ("repeats", 0))]
    extra = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True).stdout
    calls = {"loss": lambda: loss_and_gradient(*given), "products": lambda: products(*given)}
    seconds = fastest(calls, repeats)
    ratio = seconds["loss"] / seconds["products"]
    print(f"n = {n:,}, K = {k:,}, d = {d}: {ratio:.2f} times its products, {extra.strip()} extra")


def step(repeats: int) -> None:
    """Forward and backward of the bundled student on 256 pairs, without the optimizer and the data."""
    clip = load_clip("emoji-student")
    clip.towers.to(memory_format=torch.channels_last)
    model = Student(clip.towers, embed_dim=clip.embed_dim, mapped=("image", "text")).train()
    pixels = torch.randn(256, 3, clip.image_size, clip.image_size).to(memory_format=torch.channels_last)
    tokens = clip.tokenize([f"an emoji of a drawing, number {n}" for n in range(256)])
    teacher = {"teacher_image": unit_rows(256, clip.embed_dim, 0), "teacher_text": unit_rows(256, clip.embed_dim, 1)}

    def update(bank: Bank | None) -> None:
        out = model(pixels, tokens)
        mapped = {side: out.pop(f"mapped_{side}") for side in ("image", "text")}
        total, _ = image_text_loss(**out, **teacher, teacher_logit_scale=SCALE)
        total = total + mimicry_loss(**mapped, **teacher)
        if bank is not None:
            text_bank, image_bank = bank.columns(teacher["teacher_text"], teacher["teacher_image"])
            banks = {"text_bank": text_bank, "image_bank": image_bank}
            total = total + cross_logits_loss(**mapped, **teacher, **banks, teacher_logit_scale=SCALE)[0]
            bank.advance()
        total.backward()

    sizes = (256, 1024, 4096, 16384)
    banks = {size: Bank(size) for size in sizes}
    for size, bank in banks.items():
        while len(bank.columns(teacher["teacher_text"], teacher["teacher_image"])[0]) < size:
            bank.advance()
    calls = {"without": lambda: update(None)} | {str(size): lambda size=size: update(banks[size]) for size in sizes}
    seconds = fastest(calls, repeats)
    for size in sizes:
        ratio = seconds[str(size)] / seconds["without"]
        print(f"bank of {size:,}: {ratio:.3f} of a step's forward and backward pass without cross logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="rows")
    parser.add_argument("--k", type=int, default=65536, help="columns")
    parser.add_argument("--d", type=int, default=512, help="embedding")
    parser.add_argument("--repeats", type=int, default=3, help="calls, of which the fastest counts")
    parser.add_argument("--step", action="store_true", help="only the step")
    options = parser.parse_args()
    if options.step:
        return step(5 * options.repeats)
    loss(options.n, options.k, options.d, options.repeats)


if __name__ == "__main__":
    main()
