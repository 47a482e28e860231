"""The interface between the training loop, an objective and a data loader.

Axis letters: n = rows of a batch.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Batch = dict[str, Any]
"""Of a loader: tensors with a row per sample, and `keys`, a list with the name of each sample."""
Tensors = dict[str, Tensor]
Record = dict[str, Any]
"""One evaluation: `model`, `dataset` and metrics."""


@runtime_checkable
class Objective(Protocol):
    """What is minimised, in three parts: model outputs, targets, and the loss between them.

    An objective derives from this class and implements `outputs`, `targets` and `loss`; the other methods have
    defaults. The parts are separate so that the loss of a joined batch can be computed from one batch at a time
    (`training/gradient_cache.py`). Tensors have a row per sample, or no axis (a scale, the same for every batch).
    """

    def outputs(self, model: nn.Module, batch: Batch) -> Tensors:
        """Outputs of the model, with gradient. Calls the model once."""
        ...

    def targets(self, batch: Batch) -> Tensors:
        """Everything else that the loss needs: a teacher's outputs, ids, labels. No gradient, no random numbers."""
        ...

    def loss(self, outputs: Tensors, targets: Tensors) -> tuple[Tensor, Tensors]:
        """The loss, and detached scalars for the log.

        Either equal on all ranks, or each rank's own, whose mean over ranks is minimised.
        """
        ...

    def prepare(self, batch: Batch) -> Batch:
        """Called once per update, before the other methods; may draw random numbers (an attack). Default: no change."""
        return batch

    def around_update(self, batches: list[Batch]) -> AbstractContextManager[None]:
        """Entered around all forward and backward passes of an update; the optimizer steps afterwards. All ranks."""
        return nullcontext()

    def state(self) -> Tensors:
        """State of this rank for the checkpoint. Default: none."""
        return {}

    def load_state(self, state: Tensors) -> None:
        """Restores what `state` returned."""


class Loader(Protocol):
    """Endless batches of one rank, with a position from which another loader continues exactly."""

    def __iter__(self) -> Any: ...

    def position(self) -> dict[str, Any]:
        """The position after the last batch taken, as JSON-serialisable data."""
        ...

    def num_skipped(self) -> int:
        """Samples of this rank that could not be read and were skipped."""
        ...
