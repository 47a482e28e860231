"""Share of the loss in the time of a distillation step: GKL and its released form with a ResNet-18 at 224 px.

    python benchmarks/kd_step.py                           # n = 512, C = 1000: two minutes on two cores, 14 GB
    python benchmarks/kd_step.py --n 128

The step is the student's forward and backward pass and its update, the batch in parts of 32 to fit in memory; the
teacher is left out, as its logits may be stored. The loss is forward and backward to the student's logits, gamma 0.5,
float32. The share is loss / (loss + step), in one process; the time of a loss is the median of its calls. Report the
shares: seconds depend on the machine.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from loss import ours, released
from torch import Tensor

from gkl_vl.models.classifiers import load_classifier
from gkl_vl.training.optim import sgd

PART = 32


def student_step(n: int, classes: int) -> Callable[[], None]:
    """A step on random images, backward from a random gradient of the logits in place of the loss's."""
    model = load_classifier("timm:resnet18", num_classes=classes).model.to(memory_format=torch.channels_last)
    optimizer = sgd(model, lr=0.1, wd=1e-4)
    images = torch.randn(PART, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(PART, classes) / n

    def step() -> None:
        for _ in range(n // PART):
            model(images).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_step(loss: Callable[..., Tensor], n: int, classes: int) -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, n, classes, generator=draw)).unbind()
    loss(student=student.requires_grad_(), teacher=teacher).backward()


def seconds(call: Callable[[], None], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=512, help="images of a step, a multiple of 32")
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    if options.n < PART or options.n % PART:
        parser.error(f"--n {options.n} must be a multiple of {PART}")
    torch.manual_seed(0)
    loss_step(ours, PART, options.classes)  # a warm-up, which loads libraries
    step = seconds(student_step(options.n, options.classes), 1)
    for name, loss, repeats in (("gkl_loss", ours, 20), ("the released form", released, 1)):
        own = seconds(partial(loss_step, loss, options.n, options.classes), repeats)
        print(f"n = {options.n}, C = {options.classes:,}: {name} takes {100 * own / (own + step):.2f} % of the step")


if __name__ == "__main__":
    main()
