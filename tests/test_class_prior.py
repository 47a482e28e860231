"""`ClassPrior` is the teacher's mean softmax of each class over an epoch, in one process or several, and resumes."""

import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

from gkl_vl.losses.gkl import ClassPrior, gkl_loss

CLASSES, TEMPERATURE = 5, 4.0


def samples(n, seed, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes - 1, (n,), generator=generator)  # the last class never occurs


def naive_prior(logits, labels):
    prior = torch.full((CLASSES, CLASSES), 1 / CLASSES, dtype=torch.float64)
    for label in labels.unique():
        own = logits[labels == label].double()
        rows = [torch.softmax(row / TEMPERATURE, 0) for row in own]
        prior[label] = sum(rows) / len(rows)
    return prior.float()


def prior_after(*batches):
    prior = ClassPrior(CLASSES, TEMPERATURE)
    for logits, labels in batches:
        prior.update(logits, labels)
    prior.end_epoch()
    return prior


def test_the_prior_of_the_first_epoch_is_uniform():
    prior = ClassPrior(CLASSES, TEMPERATURE)
    logits, labels = samples(8, seed=0)
    prior.update(logits, labels)
    assert torch.equal(prior.rows(labels), torch.full((8, CLASSES), 1 / CLASSES))


def test_the_prior_is_the_mean_softmax_of_each_class():
    first, second = samples(40, seed=0), samples(7, seed=1)
    expected = naive_prior(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    prior = prior_after(first, second)
    assert_close(prior.prior, expected, rtol=1e-6, atol=0)
    assert_close(prior.rows(second[1]), expected[second[1]], rtol=1e-6, atol=0)


def test_a_class_without_samples_is_uniform():
    prior = prior_after(samples(40, seed=0))
    assert torch.equal(prior.prior[CLASSES - 1], torch.full((CLASSES,), 1 / CLASSES))
    assert not torch.equal(prior.prior[0], prior.prior[CLASSES - 1])


def test_each_epoch_starts_anew():
    prior = prior_after(samples(40, seed=0))
    prior.update(*samples(9, seed=1))
    prior.end_epoch()
    assert torch.equal(prior.prior, prior_after(samples(9, seed=1)).prior)


def test_a_long_epoch_loses_no_sample():
    """Adding 0.3 to a float32 sum of 2^24 would not change it."""
    prior = ClassPrior(2, 1.0)
    prior.sums[0] = 2.0**24
    logits = torch.tensor([[0.0, 1.0]])
    prior.update(logits, torch.tensor([0]))
    assert_close(prior.sums[0] - 2.0**24, torch.softmax(logits.double(), 1)[0], rtol=1e-6, atol=0)


def test_no_gradient_is_kept_and_half_precision_is_upcast():
    logits, labels = samples(8, seed=0)
    prior = prior_after((logits.bfloat16().requires_grad_(), labels))
    assert not prior.prior.requires_grad
    assert torch.equal(prior.prior, prior_after((logits.bfloat16().float(), labels)).prior)


def test_rows_fit_the_loss_on_the_device_of_the_labels():
    prior = ClassPrior(CLASSES, TEMPERATURE)
    logits, labels = (x.to("meta") for x in samples(8, seed=0))
    assert gkl_loss(student=logits, teacher=logits, class_prior=prior.rows(labels)).device.type == "meta"
    prior.update(logits, labels)
    assert prior.sums.device.type == "meta"


def test_a_saved_prior_continues_bit_for_bit():
    prior = prior_after(samples(40, seed=0))
    prior.update(*samples(9, seed=1))
    file = io.BytesIO()
    torch.save(prior.state_dict(), file)
    snapshot = prior.state_dict()
    restored, from_snapshot = ClassPrior(CLASSES, TEMPERATURE), ClassPrior(CLASSES, TEMPERATURE)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for each in (prior, restored):
        each.update(*samples(6, seed=2))
    from_snapshot.load_state_dict(snapshot)  # taken before the update above, and not changed by it
    from_snapshot.update(*samples(6, seed=2))
    for each in (restored, from_snapshot):
        assert torch.equal(each.prior, prior.prior)
        each.end_epoch()
    prior.end_epoch()
    assert torch.equal(restored.prior, prior.prior) and torch.equal(from_snapshot.prior, prior.prior)


def test_a_state_can_be_loaded_twice():
    prior = prior_after(samples(40, seed=0))
    prior.update(*samples(9, seed=1))
    state = prior.state_dict()
    for _ in range(2):
        restored = ClassPrior(CLASSES, TEMPERATURE)
        restored.load_state_dict(state)
        assert torch.equal(restored.sums, prior.sums)
        restored.update(*samples(6, seed=2))


def test_errors_name_the_argument_and_the_value():
    logits, labels = samples(8, seed=0)
    prior = ClassPrior(CLASSES, TEMPERATURE)
    with pytest.raises(ValueError, match="num_classes .*got 0"):
        ClassPrior(0, 1.0)
    with pytest.raises(ValueError, match="temperature .*got -1"):
        ClassPrior(CLASSES, -1.0)
    with pytest.raises(ValueError, match=r"logits must be \[n, 5\], got \[8, 4\]"):
        prior.update(logits[:, :4], labels)
    with pytest.raises(ValueError, match=r"labels must be \[8\] like the logits, got \[3\]"):
        prior.update(logits, labels[:3])
    with pytest.raises(ValueError, match=r"prior in the saved state must be \[5, 5\], got \[3, 3\]"):
        prior.load_state_dict(ClassPrior(3, 1.0).state_dict())


def one_of_two(rank: int, folder: str) -> None:
    """One of two processes with different data: 13 and 8 samples."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    prior = prior_after(samples(13 - 5 * rank, seed=rank))
    torch.save(prior.state_dict(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joined_data(tmp_path):
    spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = prior_after(samples(13, seed=0), samples(8, seed=1))
    for name in ("prior", "sums"):
        assert torch.equal(first[name], second[name])
    assert torch.equal(first["prior"], alone.prior)
    assert not torch.equal(alone.prior, prior_after(samples(13, seed=0)).prior)  # the data of one rank give another
