"""Rows and sums across processes. The only home of torch.distributed.

One process is the special case of many: alone, every function returns its argument and the caller's code is the same.
Axis letters: n = my rows, N = everybody's rows in the order of the ranks; every rank has the same n.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

Value = TypeVar("Value")


def world_size() -> int:
    """Number of processes, 1 when nothing was launched."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """My number among the processes, 0 when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    """all_gather whose gradient is the reduce_scatter that it ought to be: every rank's use of my rows counts."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())  # all ranks
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # gloo has no reduce_scatter; an all_reduce followed by my slice is the same sum.
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd owns the argument
        dist.all_reduce(gradient)  # all ranks
        mine = gradient.shape[0] // world_size()
        return gradient[rank() * mine : (rank() + 1) * mine]


def gather_rows(rows: Shaped[Tensor, " n *rest"]) -> Shaped[Tensor, " N *rest"]:
    """Everybody's rows, in the order of the ranks, with gradient.

    The gradient of my rows is the sum of what all ranks' losses say of them (`accelerator.gather` has none).
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows)


def _reduced(x: Tensor, op: Any) -> Tensor:
    """A copy, reduced over ranks; nccl takes what is on a GPU alone, so the CPU's goes there and back."""
    there = "cuda" if dist.get_backend() == "nccl" else x.device
    found = x.detach().to(there, copy=True)
    dist.all_reduce(found, op=op)  # all ranks
    return found.to(x.device)


def max_across_processes(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Maximum over ranks, without gradient; a new tensor when there are several processes."""
    if world_size() == 1:
        return x.detach()
    return _reduced(x, dist.ReduceOp.MAX)  # all ranks


def sum_across_processes(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum over ranks, without gradient; a new tensor when there are several processes."""
    if world_size() == 1:
        return x.detach()
    return _reduced(x, dist.ReduceOp.SUM)  # all ranks


def pass_on_ring(tensors: list[Tensor]) -> list[Tensor]:
    """Mine to the previous rank, the next rank's to me; shapes are the same on all ranks. Without gradient.

    After as many calls as there are ranks everybody has had everybody's, and one's own are back.
    """
    if world_size() == 1:
        return tensors
    previous, following = (rank() - 1) % world_size(), (rank() + 1) % world_size()
    received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    sends = [dist.P2POp(dist.isend, tensor.contiguous(), previous) for tensor in tensors]
    receives = [dist.P2POp(dist.irecv, tensor, following) for tensor in received]
    for request in dist.batch_isend_irecv([*sends, *receives]):  # all ranks
        request.wait()
    return received


def gather_objects(value: Value) -> list[Value]:
    """Returns the picklable values of all ranks, in the order of the ranks.

    nccl copies them through the current CUDA device, so each process must have set its own; Accelerate does.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)  # all ranks
    return values


def gather_shards(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a model whose parameters FSDP2 keeps in shards, on every rank."""
    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))  # all ranks
    return state
