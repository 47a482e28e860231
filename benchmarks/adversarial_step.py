"""Cost of the parts of adversarial training: PGD relative to torchattacks', the loss, weight perturbation.

    python benchmarks/adversarial_step.py                       # WRN-16-1, n = 128: two minutes on two cores
    python benchmarks/adversarial_step.py --model preact_resnet18 --n 32

Prints ratios of times measured in turns in one process: the median over rounds, with the smallest and largest. Report
these, not seconds. torchattacks is no dependency of this project; it is compared where it is installed.
"""

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from gkl_vl.models.classifiers import load_classifier
from gkl_vl.objectives.adversarial import Adversarial, AdversarialTraining, MultiBatch, robust_loss
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.robustness.pgd import pgd

CLASSES, EPSILON, STEPS = 10, 8 / 255, 10


def ratio(one: Callable[[], object], other: Callable[[], object], rounds: int) -> str:
    """Time of `one` over time of `other`."""
    ratios = []
    for _ in range(rounds + 1):
        first, second = seconds(one), seconds(other)
        ratios.append(first / second)
    ratios = sorted(ratios[1:])  # the first round is a warm-up
    return f"{median(ratios):.3g} ({ratios[0]:.3g} to {ratios[-1]:.3g})"


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn_16_1", help="a name of the CIFAR zoo")
    parser.add_argument("--n", type=int, default=128, help="images of a batch")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    on_pixels = load_classifier(options.model, num_classes=CLASSES).on_pixels()
    on_pixels.to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (options.n, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (options.n,))
    print(f"{options.model}, n = {options.n}, {CLASSES} classes, {torch.get_num_threads()} threads")
    attack(on_pixels, images, labels, options.rounds)
    step(MultiBatch(on_pixels), images, labels, options.rounds)


def attack(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, rounds: int) -> None:
    pixels = (images.float() / 255).contiguous(memory_format=torch.channels_last)

    def ours() -> torch.Tensor:
        def loss(logits: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits, labels)

        return pgd(model, pixels, loss=loss, epsilon=EPSILON, step_size=EPSILON / 4, steps=STEPS, start="uniform")

    if importlib.util.find_spec("torchattacks") is None:
        print("PGD: torchattacks is not installed, nothing to compare with")
        return
    import torchattacks  # pyright: ignore[reportMissingImports]

    theirs = torchattacks.PGD(copy.deepcopy(model), eps=EPSILON, alpha=EPSILON / 4, steps=STEPS, random_start=True)
    print(f"PGD-{STEPS}, time over that of torchattacks' PGD: {ratio(ours, lambda: theirs(pixels, labels), rounds)}")


def step(model: MultiBatch, images: torch.Tensor, labels: torch.Tensor, rounds: int) -> None:
    """A training step of GKL with the published settings, in an epoch with weight perturbation."""
    batch = {"image": images, "label": labels, "epoch": 0}
    settings = AdversarialTraining(epochs=1, awp_epoch=1)
    objective = Adversarial(model=model, settings=settings, prior=EpochPrior(CLASSES, 1))

    def update() -> None:
        part = objective.prepare(batch)
        model.train()
        with objective.around_update([part]):
            loss, _ = objective.loss(objective.outputs(model, part), objective.targets(part))
            loss.backward()
        model.zero_grad()

    def forward_backward() -> None:
        natural, attacked = model([pixels, pixels])
        (natural.sum() + attacked.sum()).backward()
        model.zero_grad()

    pixels = (images.float() / 255).contiguous(memory_format=torch.channels_last)
    prior = EpochPrior(CLASSES, 1).rows(labels, epoch=0)
    logits = torch.randn(2, len(images), CLASSES, requires_grad=True)

    def loss() -> None:
        robust_loss(attacked=logits[0], natural=logits[1], prior=prior, settings=settings).backward()

    part = objective.prepare(batch)

    def perturb() -> None:
        with objective.around_update([part]):
            pass

    model.train()
    print(f"GKL, forward and backward, over the whole training step: {ratio(loss, update, rounds)}")
    measured = ratio(perturb, forward_backward, rounds)
    print(f"weight perturbation, over a forward and backward pass of both batches: {measured}")


if __name__ == "__main__":
    main()
