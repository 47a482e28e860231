"""What `fit` requires of an objective and of a loader."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Batch = dict[str, Any]
Record = dict[str, Any]
Tensors = dict[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """What is trained on, in three parts: a loss over several batches can then be had from one batch at a time.

    Tensors have a row per sample, or no axis at all (a scale, the same for every batch).
    """

    def prepared(self, batch: Batch) -> Batch:
        """The batch as the other parts see it: once for each update, and free to draw random numbers (an attack)."""
        ...

    def perturbed(self, batches: list[Batch]) -> AbstractContextManager[None]:
        """Around all forward and backward passes of an update; the optimizer's step comes after it. All ranks."""
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> Tensors:
        """What the model says of a batch, with gradient; calls it once."""
        ...

    def targets(self, batch: Batch) -> Tensors:
        """What else the loss needs of the batch: what a teacher says, ids, labels. No gradient, no randomness."""
        ...

    def loss(self, outputs: Tensors, targets: Tensors) -> tuple[Tensor, Tensors]:
        """The loss, and detached scalars for the log. It is equal on all ranks, or its mean is meant."""
        ...

    def state(self) -> Tensors:
        """What this rank must remember from step to step, for the checkpoint; {} when nothing."""
        ...

    def load_state(self, state: Tensors) -> None:
        """Go on from where `state` was taken."""
        ...


class Loader(Protocol):
    """Endless batches (dicts with a list `keys`), and where they stand."""

    def __iter__(self) -> Any: ...
    def position(self) -> dict[str, Any]: ...
    def num_skipped(self) -> int: ...
