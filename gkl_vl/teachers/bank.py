"""The columns of cross logits: a teacher's text and image embeddings of the batch and of earlier batches.

Axis letters: n = rows of this process, N = rows of all processes, K = columns, e = the teacher's embedding.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gkl_vl.distributed import gather_rows, rank, sum_across_processes


class Bank:
    """The teacher's last `size` text and image embeddings, at least those of the batch; the same on all ranks.

    A frozen teacher's embeddings do not become stale, unlike those of MoCo's queue (He et al., CVPR 2020), whose
    encoder has to change slowly.

    Args:
        size: embeddings of each kind, those of the batch included. Fewer until so many have been seen.
    """

    def __init__(self, size: int):
        self.size = size
        self._rows = torch.zeros(2, 0, 1)
        """Texts and images; a ring buffer once it is full."""
        self._seen = 0
        """Rows of earlier batches, which are kept until they are overwritten."""
        self._batch = 0

    def columns(
        self, teacher_text: Float[Tensor, "n e"], teacher_image: Float[Tensor, "n e"]
    ) -> tuple[Float[Tensor, "K e"], Float[Tensor, "K e"]]:
        """Columns of texts and of images, with those of the batch of all ranks. All ranks.

        Views of the bank, which are valid until the next call. Until `advance`, another batch takes the place of this.
        """
        batch = gather_rows(torch.stack([teacher_text, teacher_image], dim=1)).transpose(0, 1)  # all ranks
        self._batch = batch.shape[1]
        capacity = max(self.size, self._batch)
        if self._rows.shape[1:] != (capacity, batch.shape[2]) or self._rows.device != batch.device:
            rows = batch.new_zeros(2, capacity, batch.shape[2])
            rows[:, : self._rows.shape[1]] = self._rows
            self._rows = rows
        self._rows[:, (torch.arange(self._batch, device=batch.device) + self._seen) % capacity] = batch
        text, image = self._rows[:, : self._seen + self._batch]
        return text, image

    def advance(self) -> None:
        """Keeps the last batch. Once per update."""
        self._seen, self._batch = self._seen + self._batch, 0

    def state(self) -> dict[str, Tensor]:
        """The kept embeddings, on the first rank only: the others have the same."""
        return {"bank": self._rows, "bank_seen": torch.tensor(self._seen)} if rank() == 0 else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned on the first rank. All ranks."""
        first = rank() == 0
        sizes = torch.tensor([state["bank_seen"], *state["bank"].shape[1:]] if first else [0, 0, 0])
        self._seen, capacity, dim = sum_across_processes(sizes).tolist()  # all ranks
        rows = state["bank"] if first else torch.zeros(2, capacity, dim)
        self._rows = sum_across_processes(rows)  # all ranks: zeros but on the first
