"""Exact gradients of a loss over a batch that does not fit in memory (GradCache).

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gkl_vl.training.protocols import Batch, Objective, Tensors


@dataclass
class Embedded:
    """Several batches as one: what the loss is computed on, and what is needed to go on from its gradient."""

    leaves: Tensors
    """The model's outputs, rows of all batches below each other, cut off from the model."""
    targets: Tensors
    first: Tensors
    """The first batch's outputs, still tied to the model."""
    random_states: list[Any]
    """Of the generators, before the outputs of each batch but the first."""


def embed(accelerator: Accelerator, model: nn.Module, objective: Objective, batches: list[Batch]) -> Embedded:
    """Outputs and targets of all batches. Only the first keeps its graph."""
    outputs, targets, random_states = [], [], []
    statistics: list[Tensor] = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        if number == 1:
            statistics = [buffer.clone() for buffer in model.buffers()]
        with accelerator.autocast():
            targets.append(objective.targets(batch))
        random_states.append(random_state(accelerator.device) if number > 0 else None)
        # One context for both: DDP gets ready to average where the last batch's graph is made.
        with nullcontext() if last and number == 0 else accelerator.no_sync(model), torch.set_grad_enabled(number == 0):
            outputs.append(objective.outputs(model, batch))
    # BatchNorm's statistics count each batch once: when it is embedded again. Through `data`, since autograd would take
    # a change for one of something that the first batch's graph needs; in training it does not.
    for buffer, before in zip(model.buffers() if statistics else (), statistics, strict=True):
        buffer.data.copy_(before)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in joined(outputs).items()}
    return Embedded(leaves, joined(targets), outputs[0], random_states)


def backward_from_cache(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batches: list[Batch], embedded: Embedded
) -> None:
    """From the gradient of the leaves to that of the parameters, batch by batch. All ranks, with the last batch."""
    start = 0
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        rows = slice(start, start := start + len(batch["keys"]))
        with nullcontext() if last else accelerator.no_sync(model):
            outputs = embedded.first
            if number > 0:
                set_random_state(embedded.random_states[number], accelerator.device)  # the same dropout
                outputs = objective.outputs(model, batch)
            ends, gradients = [], []
            for name, output in outputs.items():
                gradient = embedded.leaves[name].grad
                # What has no rows is one and the same for all batches: its gradient is given once.
                if gradient is not None and output.requires_grad and (output.ndim > 0 or last):
                    ends.append(output)
                    gradients.append(gradient[rows] if output.ndim > 0 else gradient)
            torch.autograd.backward(ends, gradients)


def joined(parts: list[Tensors]) -> Tensors:
    """Rows below each other; of what has no axis, the first."""
    return {name: torch.cat([p[name] for p in parts]) if x.ndim else x for name, x in parts[0].items()}


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the generators that a model's forward pass draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
