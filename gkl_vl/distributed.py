"""Collectives: gathers, sums and maxima over processes, a ring, FSDP state. No other module uses torch.distributed.

A single process needs no branch in the caller: every function then returns its argument unchanged (detached where there
is no gradient).
Axis letters: n = rows of this process, N = rows of all processes in the order of the ranks; n is the same on all ranks.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

Value = TypeVar("Value")


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    """all_gather with the correct gradient, a reduce_scatter: the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())  # all ranks
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # gloo has no reduce_scatter; all_reduce and the slice of this rank give the same sum.
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd owns the argument
        dist.all_reduce(gradient)  # all ranks
        num_rows = gradient.shape[0] // world_size()
        return gradient[rank() * num_rows : (rank() + 1) * num_rows]


def gather_rows(rows: Shaped[Tensor, " n *rest"]) -> Shaped[Tensor, " N *rest"]:
    """Rows of all ranks, in the order of the ranks, with gradient (`accelerator.gather` has none).

    The gradient of this rank's rows is the sum of the gradients of all ranks' losses with respect to them.
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows)


def _reduced(x: Tensor, op: Any) -> Tensor:
    """A copy reduced over ranks. nccl reduces CUDA tensors only, so a CPU tensor is copied to the GPU and back."""
    device = "cuda" if dist.get_backend() == "nccl" else x.device
    result = x.detach().to(device, copy=True)
    dist.all_reduce(result, op=op)  # all ranks
    return result.to(x.device)


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
    """Sends the tensors to the previous rank and returns those of the next rank. Without gradient.

    Shapes must be equal on all ranks. After `world_size()` calls every rank has received the tensors of all ranks and
    has its own again.
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
    """The full state dict of a model sharded by FSDP2, on every rank."""
    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))  # all ranks
    return state
