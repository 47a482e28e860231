"""Exact gradients of a loss over more batches than fit in memory, from one batch at a time (GradCache).

The batches are embedded without keeping their graphs, the loss of all embeddings gives the gradient of each embedding
(the cache), and each batch is embedded once more, with the same random numbers, to pass its cached gradients on to the
parameters. Memory is that of one batch; the gradient is that of the joined batch.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gkl_vl.protocols import Batch, Objective, Tensors


@dataclass
class Cached:
    """Outputs and targets of several batches, joined."""

    outputs: Tensors
    """Leaves of a new graph; after `backward` of the loss their `.grad` is the cache."""
    targets: Tensors
    first: Tensors
    """Outputs of the first batch, still attached to the model."""
    random_states: list[Any]
    """State of the random generators before each batch's forward pass; None for the first batch."""


def embed_all(accelerator: Accelerator, model: nn.Module, objective: Objective, batches: list[Batch]) -> Cached:
    """Computes outputs and targets of all batches. Only the first batch keeps its graph."""
    outputs, targets, random_states = [], [], []
    statistics: list[Tensor] = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        if number == 1:
            statistics = [buffer.clone() for buffer in model.buffers()]
        with accelerator.autocast():
            targets.append(objective.targets(batch))
        random_states.append(_random_state(accelerator.device) if number > 0 else None)
        # One context for both: DDP prepares its all-reduce where the graph of the last batch is built.
        with nullcontext() if last and number == 0 else accelerator.no_sync(model), torch.set_grad_enabled(number == 0):
            outputs.append(objective.outputs(model, batch))
    # BatchNorm's statistics must count each batch once: in the second pass. Assigned through `data`, since autograd
    # would take the change for one of a tensor that the first batch's graph needs; in training mode it does not.
    for buffer, before in zip(model.buffers() if statistics else (), statistics, strict=True):
        buffer.data.copy_(before)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in _joined(outputs).items()}
    return Cached(leaves, _joined(targets), outputs[0], random_states)


def backward_from_cache(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batches: list[Batch], cached: Cached
) -> None:
    """Backpropagates the cached gradients to the parameters, batch by batch. DDP reduces with the last; all ranks."""
    start = 0
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        rows = slice(start, start := start + len(batch["keys"]))
        with nullcontext() if last else accelerator.no_sync(model):
            outputs = cached.first
            if number > 0:
                _set_random_state(cached.random_states[number], accelerator.device)  # the same dropout
                outputs = objective.outputs(model, batch)
            roots, gradients = [], []
            for name, output in outputs.items():
                gradient = cached.outputs[name].grad
                # An output without rows is the same for all batches: its gradient is passed on once.
                if gradient is not None and output.requires_grad and (output.ndim > 0 or last):
                    roots.append(output)
                    gradients.append(gradient[rows] if output.ndim > 0 else gradient)
            torch.autograd.backward(roots, gradients)


def _joined(parts: list[Tensors]) -> Tensors:
    """Concatenates rows; a tensor without axes is the first batch's."""
    return {name: torch.cat([p[name] for p in parts]) if x.ndim else x for name, x in parts[0].items()}


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that a forward pass draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
