"""The released GKL formula, which builds [n, C, C], against `gkl_loss`: time and memory.

    python benchmarks/loss.py                              # n = 512, C = 1000: the released form needs 13 GB
    python benchmarks/loss.py --n 128 --classes 500        # 0.8 GB
    python benchmarks/loss.py --device cuda

Forward + backward in float32, gradient to student and teacher, gamma 0.5, weights from the teacher. First
both are compared. Then the two are timed in turns in one process; a time of `gkl_loss` is the mean of 20 calls.
The extra memory is the peak during the first call above the process's memory before it: on the CPU from
VmHWM of /proc/self/status (Linux), each variant in a fresh process after a call on a tiny batch, so that
libraries are loaded and nothing freed by the other variant is reused; on CUDA from
`torch.cuda.max_memory_allocated`. Report ratios: seconds depend on the machine.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from gkl_vl.losses.gkl import gkl_loss

GAMMA, TEMPERATURE = 0.5, 4.0
CALLS_PER_TIMING = {"released": 1, "gkl_loss": 20}
PEAK_TENSORS = 6.5  # [n, C, C] tensors the released form holds at its peak: 6 were measured


def released(*, student: Tensor, teacher: Tensor) -> Tensor:
    """`dkl_loss` of jiequancui/DKL, DKLv2/KD-dkl/mdistiller/distillers/GKL_KD.py, over all pairs."""
    teacher_pairs = teacher[:, :, None] - teacher[:, None, :]
    student_pairs = student[:, :, None] - student[:, None, :]
    with torch.no_grad():
        weight = torch.softmax(teacher / TEMPERATURE, dim=1).pow(GAMMA)
        weight_pairs = weight[:, :, None] @ weight[:, None, :]
    wmse = 0.25 * ((teacher_pairs - student_pairs).pow(2) * weight_pairs).sum() / weight_pairs.sum()
    target = torch.softmax(teacher.detach() / TEMPERATURE, dim=1)
    soft_ce = -(target * torch.log_softmax(student / TEMPERATURE, dim=1)).sum(1).mean()
    return wmse + soft_ce


def ours(*, student: Tensor, teacher: Tensor) -> Tensor:
    return gkl_loss(
        student=student, teacher=teacher, gamma=GAMMA, temperature=TEMPERATURE, weight_temperature=TEMPERATURE
    )


VARIANTS = {"released": released, "gkl_loss": ours}


def logits(n: int, classes: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, n, classes, generator=generator)).to(device).unbind()
    return student.clone().requires_grad_(), teacher.clone().requires_grad_()


def step(variant: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients."""
    loss = VARIANTS[variant](student=student, teacher=teacher)
    to_student, to_teacher = torch.autograd.grad(loss, [student, teacher])
    return loss.detach(), to_student, to_teacher


def check_agreement(n: int, classes: int, device: str) -> None:
    student, teacher = logits(n, classes, device)
    theirs, own = step("released", student, teacher), step("gkl_loss", student, teacher)
    for name, a, b in zip(("loss", "student gradient", "teacher gradient"), theirs, own, strict=True):
        error = ((a - b).abs().max() / a.abs().max()).item()
        if not error < 1e-5:
            sys.exit(f"{name}: the two differ by {error:.1e} of its largest entry")
        print(f"{name:16} agrees to {error:.0e} of its largest entry")


def seconds(variant: str, student: Tensor, teacher: Tensor) -> float:
    synchronize = torch.cuda.synchronize if student.is_cuda else lambda: None
    calls = CALLS_PER_TIMING[variant]
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        step(variant, student, teacher)
    synchronize()
    return (time.perf_counter() - started) / calls


def peak_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def extra_bytes_here(variant: str, n: int, classes: int, device: str) -> int:
    """Peak memory of one step above the memory before it, in this process."""
    step(variant, *logits(2, 8, device))
    student, teacher = logits(n, classes, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(variant, student, teacher)
        return torch.cuda.max_memory_allocated() - before
    before = peak_resident_bytes()
    step(variant, student, teacher)
    return peak_resident_bytes() - before


def extra_bytes(variant: str, n: int, classes: int, device: str) -> int:
    """The same in a fresh process."""
    flags = f"--extra-bytes-of {variant} --n {n} --classes {classes} --device {device}"
    command = [sys.executable, __file__, *flags.split()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])


def report(n: int, classes: int, repeats: int, device: str) -> None:
    memory = {variant: extra_bytes(variant, n, classes, device) for variant in VARIANTS}
    check_agreement(n, classes, device)
    student, teacher = logits(n, classes, device)
    times = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant in VARIANTS:
            times[variant].append(seconds(variant, student, teacher))
    ratios = [a / b for a, b in zip(times["released"], times["gkl_loss"], strict=True)]
    print(f"\nn={n} C={classes} float32, {device}, {torch.get_num_threads()} threads, {repeats} repeats")
    print(f"{'':10}{'ms (median)':>14}{'min .. max':>24}{'extra memory, MB':>20}")
    for variant, values in times.items():
        low, mid, high = (1e3 * value for value in (min(values), median(values), max(values)))
        print(f"{variant:10}{mid:14.2f}{f'{low:.2f} .. {high:.2f}':>24}{memory[variant] / 1e6:20.1f}")
    spread = f"{min(ratios):,.0f} .. {max(ratios):,.0f}"
    memory_ratio = memory["released"] / max(memory["gkl_loss"], 4096)  # less than a page cannot be seen
    print(f"{'ratio':10}{median(ratios):14,.0f}{spread:>24}{memory_ratio:20,.0f}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--n", type=int, default=512, help="rows of the batch")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5, help="timings of each variant, taken in turns")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--extra-bytes-of", choices=list(VARIANTS), help="print only this, of this process")
    args = parser.parse_args()
    if args.extra_bytes_of:
        print(extra_bytes_here(args.extra_bytes_of, args.n, args.classes, args.device))
        return
    if args.device == "cpu" and not sys.platform.startswith("linux"):
        parser.error("the memory of a CPU run is read from /proc, which only Linux has; use --device cuda")
    needed, free = PEAK_TENSORS * 4 * args.n * args.classes**2, free_bytes(args.device)
    if needed > free:
        sizes = f"about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        parser.error(f"the released form needs {sizes}; lower --n or --classes")
    report(args.n, args.classes, args.repeats, args.device)


if __name__ == "__main__":
    main()
