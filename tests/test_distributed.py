"""Gathered rows are in the order of the ranks and get the gradients of all ranks; one process changes nothing."""

import torch
from helpers import run_ranks

from gkl_vl.distributed import gather_rows, max_across_processes, pass_on_ring, rank, sum_across_processes, world_size


def test_one_process_returns_its_arguments():
    x = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather_rows(x) is x
    for reduced in (sum_across_processes(x), max_across_processes(x)):
        assert torch.equal(reduced, x) and not reduced.requires_grad
    assert pass_on_ring([x])[0] is x


def gather_and_weigh(my_rank, ranks):
    rows = (10 * my_rank + torch.arange(3.0)).reshape(3, 1).requires_grad_()
    gathered = gather_rows(rows)
    # rank r weights gathered row j by (r + 1) * j, so the gradient of row j is sum_r (r + 1) * j
    weight = (my_rank + 1) * torch.arange(3.0 * ranks).reshape(-1, 1)
    (weight * gathered).sum().backward()
    ids = gather_rows(torch.tensor([my_rank, 7]))
    x = torch.tensor([1.0, my_rank], requires_grad=True)
    total = sum_across_processes(x)
    return gathered.detach(), rows.grad, ids, total, x.detach(), total.requires_grad


def test_rows_of_three_ranks_and_their_gradients():
    for my_rank, (rows, gradient, ids, total, x, has_gradient) in enumerate(run_ranks(gather_and_weigh, 3)):
        assert rows.flatten().tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
        assert gradient.flatten().tolist() == [6 * j for j in range(3 * my_rank, 3 * my_rank + 3)]
        assert ids.tolist() == [0, 7, 1, 7, 2, 7]
        assert total.tolist() == [3, 3] and x.tolist() == [1, my_rank] and not has_gradient


def pass_on_twice(my_rank, ranks):
    tensors = [torch.full((2, 3), float(my_rank)).T, torch.tensor([my_rank])]  # one of them not contiguous
    once = pass_on_ring(tensors)
    return once, pass_on_ring(once), max_across_processes(torch.tensor([my_rank, -my_rank]))


def test_a_ring_passes_on_by_one_rank_and_the_maximum_is_over_all_ranks():
    for my_rank, (once, twice, highest) in enumerate(run_ranks(pass_on_twice, 3)):
        for tensors, owner in ((once, (my_rank + 1) % 3), (twice, (my_rank + 2) % 3)):
            assert torch.equal(tensors[0], torch.full((3, 2), float(owner))) and tensors[1].tolist() == [owner]
        assert highest.tolist() == [2, 0]
