"""A FixMatch step relative to one with all views in one pass (USB's `use_cat`): time, and memory saved for backward.

    python benchmarks/semi_supervised_step.py                                   # WRN-28-2, 4 labelled images, mu 7
    python benchmarks/semi_supervised_step.py --model vit_tiny_patch2_32 --mu 1

Forward, loss (GKL, every pseudo-label is used) and backward on random images. This project passes the weak views
through the model separately, without graph; the other step has all three parts in one batch, and the gradient of the
weak rows is zero. Without BatchNorm and random depth the two losses are equal, which is checked first; BatchNorm has
other statistics. Prints ratios, median and range of paired rounds: seconds depend on the machine.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl_vl.losses.consistency import SemiSupervised, consistency_loss
from gkl_vl.models.classifiers import Classifier, load_classifier
from gkl_vl.objectives.semi_supervised import SemiSupervisedTraining

SETTINGS = SemiSupervised(threshold=0)


def batch_of(n: int, mu: int) -> dict:
    draw = torch.Generator().manual_seed(0)
    counts = {"image": n, "weak": n * mu, "strong": n * mu}
    images = {
        name: torch.randint(0, 256, (k, 3, 32, 32), generator=draw, dtype=torch.uint8) for name, k in counts.items()
    }
    return images | {"label": torch.arange(n) % 10, "hidden_label": torch.zeros(n * mu).long(), "epoch": 0, "step": 0}


def ours(student: Classifier, batch: dict) -> Callable[[], Tensor]:
    training = SemiSupervisedTraining(student=student, average=None, settings=SETTINGS, thresholds=None, prior=None)

    def loss() -> Tensor:
        prepared = training.prepare(batch)
        return training.loss(training.outputs(student.model, prepared), training.targets(prepared))[0]

    return loss


def together(student: Classifier, batch: dict) -> Callable[[], Tensor]:
    n, u = len(batch["label"]), len(batch["weak"])

    def loss() -> Tensor:
        images = torch.cat([batch["image"], batch["weak"], batch["strong"]])
        labelled, weak, strong = student.model(student.prepare(images)).split([n, u, u])
        mask = torch.ones(u, dtype=torch.bool)
        term = consistency_loss(strong=strong, weak=weak, mask=mask, prior=None, settings=SETTINGS)
        return F.cross_entropy(labelled, batch["label"]) + term

    return loss


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that the forward pass saves for the backward pass, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()  # its graph keeps the storages alive, so that no address is used twice
    assert value.requires_grad
    return sum(sizes.values())


def seconds(loss: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    loss().backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn_28_2")
    parser.add_argument("--n", type=int, default=4, help="labelled images")
    parser.add_argument("--mu", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    batch = batch_of(options.n, options.mu)
    plain = load_classifier("vit_tiny_patch2_32", num_classes=10)
    plain.model.eval()
    plain.model.train = lambda mode=True: plain.model  # neither BatchNorm nor random depth
    torch.testing.assert_close(ours(plain, batch)(), together(plain, batch)(), rtol=1e-4, atol=1e-5)
    student = load_classifier(options.model, num_classes=10)
    student.model.train()
    calls = {"ours": ours(student, batch), "together": together(student, batch)}
    memory = {name: saved_bytes(call) for name, call in calls.items()}
    for call in calls.values():  # a warm-up, which loads libraries
        seconds(call)
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(options.rounds)]
    ratios = sorted(times["ours"] / times["together"] for times in rounds)
    print(f"{options.model}, {options.n} labelled images, mu {options.mu}, {torch.get_num_threads()} threads")
    print(f"time of a step over that of one pass: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"saved for the backward pass: {memory['ours'] / memory['together']:.2f} of its bytes")


if __name__ == "__main__":
    main()
