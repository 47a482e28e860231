"""Shared by several objectives: a class prior that changes per epoch, and accuracy."""

import torch
from torch import Tensor

from gkl_vl.losses.gkl import ClassPrior


class EpochPrior:
    """A `ClassPrior` collected during an epoch and used in the next; the batch carries its epoch number."""

    def __init__(self, num_classes: int, temperature: float):
        self._prior, self._epoch = ClassPrior(num_classes, temperature), 0

    def rows(self, labels: Tensor, *, epoch: int) -> Tensor:
        """The prior of each sample's label. All ranks, since a new epoch sums over processes."""
        if epoch != self._epoch:
            self._prior.end_epoch()
            self._epoch = epoch
        return self._prior.rows(labels)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds the softmax of these samples to the sums of their labels."""
        self._prior.update(logits, labels)

    def state(self) -> dict[str, Tensor]:
        """State of this rank, for the checkpoint."""
        return self._prior.state_dict() | {"epoch": torch.tensor(self._epoch)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        self._prior.load_state_dict(state)
        self._epoch = int(state["epoch"])


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is the label's, without gradient."""
    return (logits.detach().argmax(dim=1) == labels).float().mean()
