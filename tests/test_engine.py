"""fit() equals a plain training loop; its evaluations, checkpoints, moving averages and errors."""

import json
import math
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import RankFailed, run_ranks
from safetensors.torch import load_file

from gkl_vl.errors import UserError
from gkl_vl.losses.image_text import image_text_loss
from gkl_vl.protocols import Objective
from gkl_vl.training import engine
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import adamw, warmup_cosine

CONFIG = FitConfig(steps=5, log_every_steps=1, grad_clip_norm=0.5)


class Loader:
    """Endless random batches, the n-th always the same."""

    def __init__(self, position, rows=slice(None)):
        self.taken, self.rows = (position or {"batches": 0})["batches"], rows

    def __iter__(self):
        while True:
            self.taken += 1
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.taken))[self.rows]
            yield {"x": x, "keys": [f"sample-{self.taken}-{i}" for i in range(len(x))]}

    def position(self):
        return {"batches": self.taken}

    def num_skipped(self):
        return 2


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


class Regression(Objective):
    """A toy loss, times `factor(batch)`."""

    def __init__(self, factor=lambda batch: 1.0):
        self.factor = factor

    def outputs(self, model, batch):
        return {"y": model(batch["x"])}

    def targets(self, batch):
        return {"factor": torch.tensor(self.factor(batch))}

    def loss(self, outputs, targets):
        y = outputs["y"]
        return (y.square().mean() + y.mean()) * targets["factor"], {"size": y.detach().abs().mean()}


def toy_loss(model, batch):
    return Regression().loss(Regression().outputs(model, batch), Regression().targets(batch))[0]


def run_fit(
    folder,
    *,
    model=None,
    config=CONFIG,
    evaluate=lambda model: [],
    accelerator=None,
    keep_checkpoints=0,
    is_main=True,
    **options,
):
    model = model or net()
    schedule = partial(warmup_cosine, lr=0.1, steps=config.steps, warmup_steps=2)
    options = {"objective": Regression(), "make_loader": Loader, "learning_rate": schedule} | options
    run = RunFolder(folder, is_main=is_main, keep_checkpoints=keep_checkpoints)
    result = fit(
        accelerator=accelerator or Accelerator(cpu=True),
        model=model,
        make_optimizer=partial(adamw, lr=0.1, wd=0.3),
        run=run,
        config=config,
        evaluate=evaluate,
        **options,
    )
    return model, result, run


def test_fit_equals_a_plain_loop(tmp_path):
    ours, _, run = run_fit(tmp_path)
    model, loader = net(), iter(Loader(None))
    weights = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6)
    losses = []
    for lr in (0.05, 0.1, 0.1, 0.1 * 0.75, 0.1 * 0.25):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = toy_loss(model, next(loader))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    records = run.records()
    assert [record["train/loss"] for record in records] == losses
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert {"train/size", "train/grad_norm", "train/lr", "train/images_per_second"} <= set(records[0])
    assert records[0]["train/skipped"] == 2


def test_evaluations_and_checkpoints_come_once_at_their_intervals(tmp_path):
    config = FitConfig(steps=5, eval_every_steps=2, checkpoint_every_steps=3)
    steps = []

    def evaluate(model):
        steps.append(len(steps))
        return [{"model": "student", "dataset": "toy", "acc1": float(len(steps))}]

    clamped = []
    _, _, run = run_fit(tmp_path, config=config, evaluate=evaluate, after_step=lambda: clamped.append(1))
    evaluations = [record for record in run.records() if "model" in record]
    assert [(record["step"], record["acc1"]) for record in evaluations] == [(2, 1.0), (4, 2.0), (5, 3.0)]
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step_00000003", "step_00000005"]
    assert len(clamped) == 5


def test_evaluations_are_printed_above_the_bar_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    def evaluate(model):
        return [{"model": "student", "dataset": "toy", "acc1": 0.25, "acc5": 0.5, "recall": 1.0}]

    config = FitConfig(steps=2)
    run_fit(tmp_path / "file", config=config, evaluate=evaluate)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(engine.sys.stderr, "isatty", lambda: True)
    run_fit(tmp_path / "terminal", config=config, evaluate=evaluate)
    printed = capsys.readouterr()
    assert "step 2: student on toy: acc1 0.250, acc5 0.500\n" in printed.out + printed.err
    assert "loss" in printed.err and "images/s" in printed.err and "2/2" in printed.err


def test_the_moving_average_equals_its_closed_form_and_keeps_constants():
    model = net()
    model.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1), persistent=False)
    ema = moving_average(model, 0.9)
    expected, statistics = None, None
    for step in range(6):
        with torch.no_grad():
            model[0].weight.add_(step)
            model[1].running_mean.add_(step)
        ema.update_parameters(model)
        weight, mean = model[0].weight.detach().clone(), model[1].running_mean.clone()
        expected = weight if expected is None else 0.9 * expected + 0.1 * weight
        statistics = mean if statistics is None else 0.9 * statistics + 0.1 * mean
    torch.testing.assert_close(ema.module[0].weight.detach(), expected)
    torch.testing.assert_close(ema.module[1].running_mean, statistics)
    assert torch.equal(ema.module.mask, model.mask)
    assert moving_average(model, 0.0) is None


def test_the_average_is_returned_and_evaluated(tmp_path):
    seen = []
    model = net()
    average = moving_average(model, 0.5)
    config = FitConfig(steps=3)
    _, result, _ = run_fit(
        tmp_path, model=model, config=config, average=average, evaluate=lambda m: seen.append(m) or []
    )
    assert result is seen[0] and result is not model
    assert not torch.equal(result[0].weight, model[0].weight)


def test_lr_scale_of_a_group_multiplies_the_learning_rate(tmp_path):
    def make_optimizer(model):
        first, *others = model.parameters()
        return torch.optim.SGD([{"params": [first], "lr_scale": 0.25}, {"params": others}], lr=1.0)

    optimizers = []
    model = net()
    fit(
        accelerator=Accelerator(cpu=True),
        model=model,
        objective=Regression(),
        make_optimizer=lambda module: optimizers.append(make_optimizer(module)) or optimizers[0],
        learning_rate=lambda step: 0.1,
        make_loader=Loader,
        run=RunFolder(tmp_path, is_main=True),
        config=FitConfig(steps=1),
        evaluate=lambda model: [],
    )
    assert [group["lr"] for group in optimizers[0].param_groups] == pytest.approx([0.025, 0.1])


@pytest.mark.parametrize("by_environment", [False, True])
def test_accumulation_is_refused_with_the_reason(tmp_path, monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1 if by_environment else 4)
    with pytest.raises(UserError, match="gradient_accumulation_steps = 4.*negatives"):
        engine.check_no_accumulation(accelerator)


def test_processes_that_accelerate_did_not_join_are_refused(monkeypatch):
    alone, both = (Mock(spec=Accelerator, num_processes=n) for n in (1, 2))
    engine.check_all_processes_joined(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a scheduler may set it for a script that is not a rank
    engine.check_all_processes_joined(alone)
    monkeypatch.setenv("LOCAL_RANK", "1")
    engine.check_all_processes_joined(both)
    with pytest.raises(UserError, match="2 processes were launched, but Accelerate joined 1: .*ACCELERATE_USE_CPU"):
        engine.check_all_processes_joined(alone)


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_frozen_teacher_computes_in_the_precision_of_the_run(tmp_path, precision, dtype):
    teacher, seen = net().requires_grad_(False), []

    def factor(batch):
        seen.append(teacher(batch["x"]).dtype)
        return 1.0

    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    run_fit(tmp_path, objective=Regression(factor), accelerator=accelerator)
    assert seen == [dtype] * CONFIG.steps


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    model = net()
    poisoned = Regression(lambda batch: math.nan if batch["keys"][0].startswith("sample-3") else 1.0)
    config = FitConfig(steps=5, checkpoint_every_steps=2)
    with pytest.raises(UserError, match=r"loss is nan at step 2 \(size .*samples sample-3-0, sample-3-1"):
        run_fit(tmp_path, model=model, objective=poisoned, config=config)
    kept = RunFolder(tmp_path, is_main=True).find_checkpoint("latest")
    assert kept.name == "step_00000002"
    saved = load_file(kept / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


def nan_on_one_rank(rank, world_size, folder):
    model = net()
    before = [p.detach().clone() for p in model.parameters()]

    poisoned = Regression(lambda batch: math.nan if rank == 1 else 1.0)
    try:
        run_fit(folder, model=model, objective=poisoned, make_loader=lambda p: Loader(p, slice(2 * rank, 2 * rank + 2)))
    except UserError as error:
        return str(error), all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return "no error", False


def test_one_bad_rank_stops_all(tmp_path):
    for message, unchanged in run_ranks(nan_on_one_rank, 2, tmp_path):
        assert "at step 0" in message and "samples sample-1-0, sample-1-1" in message
        assert unchanged


class TwoTowers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
        self.log_scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        image, text = F.normalize(self.image(x), dim=1), F.normalize(self.text(x.flip(1)), dim=1)
        return {"image": image, "text": text, "logit_scale": self.log_scale.exp()}


class Distil(Objective):
    def outputs(self, model, batch):
        return model(batch["x"])

    def targets(self, batch):
        teacher = F.normalize(batch["x"], dim=1)
        return {"teacher_image": teacher, "teacher_text": teacher, "teacher_logit_scale": torch.tensor(5.0)}

    def loss(self, outputs, targets):
        return image_text_loss(**outputs, **targets)


def three_steps(rank, world_size, folder):
    rows = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    model, _, run = run_fit(
        folder / f"{world_size}-{rank}",
        model=TwoTowers(),
        objective=Distil(),
        make_loader=lambda position: Loader(position, rows),
        config=FitConfig(steps=3, log_every_steps=1),
    )
    losses = [record["train/loss"] for record in run.records()]
    return losses, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_two_processes_train_like_one(tmp_path):
    one = three_steps(0, 1, tmp_path)
    for losses, state in run_ranks(three_steps, 2, tmp_path):
        assert losses == pytest.approx(one[0], rel=1e-5)
        for name, tensor in one[1].items():
            # Adam divides by the root of the gradient's square: where a gradient is almost 0, rounding decides
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-4)


def test_an_incomplete_last_line_of_the_results_is_left_out(tmp_path):
    run = RunFolder(tmp_path, is_main=True)
    for step in (1, 2, 3):
        run.log({"step": step})
    with open(run.results, "a") as file:
        file.write('{"step": 4, "train/lo')
    assert [record["step"] for record in run.records()] == [1, 2, 3]
    run.rewind(2)
    assert [json.loads(line)["step"] for line in run.results.read_text().splitlines()] == [1, 2]


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankFailed, match="went wrong"):
        run_ranks(die, 2)


def die(rank, world_size):
    raise RuntimeError("went wrong")
