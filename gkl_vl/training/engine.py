"""fit(): the training loop, on Accelerate. It receives callables and imports no loss, model or data set."""

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, gather_object, send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from gkl_vl.distributed import gather_shards
from gkl_vl.errors import Stopped, UserError
from gkl_vl.protocols import Loader, Objective, Record, Tensors
from gkl_vl.training.checkpoint import RunFolder, frozen_weights, load_checkpoint, read_loop_state, save_checkpoint
from gkl_vl.training.gradient_cache import backward_from_cache, embed_all


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Length and intervals of a run. A step is an optimizer update."""

    steps: int
    grad_clip_norm: float = math.inf
    """Largest norm of the gradient; inf = no clipping."""
    accum_steps: int = 1
    """Batches per update. The loss is that of the joined batch, the memory that of one."""
    average_from_step: int = 0
    """The moving average starts with a copy of the weights after this many updates plus one."""
    log_every_steps: int = 10
    eval_every_steps: int = 0
    """0 = at the end only."""
    checkpoint_every_steps: int = 0
    """0 = at the end only."""


def fit(
    *,
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    learning_rate: Callable[[int], float],
    make_loader: Callable[[dict[str, Any] | None], Loader],
    run: RunFolder,
    config: FitConfig,
    evaluate: Callable[[nn.Module], Iterable[Record]],
    after_step: Callable[[], None] = lambda: None,
    average: AveragedModel | None = None,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Trains `model` for `config.steps` updates and returns the model to export: the model, or its moving average.

    Args:
        objective: model outputs, targets, and the loss between them.
        make_optimizer: see `optim.py`.
        learning_rate: number of updates made -> learning rate of the next one, for all parameter groups.
        make_loader: position from a checkpoint, or None for the start -> loader of this rank.
        evaluate: model -> records with `model`, `dataset` and metrics; called on every rank.
        after_step: called after each update, for constraints on parameters.
        average: moving average of the model, see `moving_average`; evaluated and exported in its place. It is updated
            here; an objective may hold it as well.
        checkpoint: folder to resume from. On CPU the resumed run equals the uninterrupted one bit for bit.

        stop: whether this rank was requested to stop; called in every step.

    Raises:
        UserError: Accelerate's gradient accumulation is on; the loss is not finite.
        Stopped: after a checkpoint at the first step at which `stop` of any rank is true, but for the last one. Then
            trackers and process group have ended, and the folder is released.
    """
    check_no_accumulation(accelerator)
    check_fsdp(accelerator, average)
    whole = unsharded_copy(accelerator, model)
    plain = model
    frozen = None if accelerator.is_fsdp2 else frozen_weights(model)  # FSDP's checkpoints hold them
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    if average is not None:
        average.to(accelerator.device)
    step, position = 0, None
    if checkpoint is not None:
        step, position = read_loop_state(
            checkpoint, rank=accelerator.process_index, world_size=accelerator.num_processes, frozen=frozen
        )
    loader = make_loader(position)  # may refuse the position, and then nothing is rewound
    if checkpoint is not None:
        objective.load_state(load_checkpoint(accelerator, checkpoint, ema=average))
        run.rewind(step)
    started_at, stopping = step, False
    batches = iter(loader)
    speed = Speed(accelerator.num_processes)
    quiet = not accelerator.is_main_process or not sys.stderr.isatty()
    bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True, disable=quiet)

    while True:
        last = step == config.steps
        result = whole if average is None or step <= config.average_from_step else average.module
        evaluating = last or is_time(step, config.eval_every_steps)
        saving = last or stopping or is_time(step, config.checkpoint_every_steps)
        if evaluating or saving:
            share_buffers(model, *([] if average is None else [average]))  # all ranks
            fill_from_shards(accelerator, model, whole)  # all ranks
        fresh = step > started_at  # a checkpoint's own step was evaluated and saved before it was written
        if fresh and evaluating:
            for record in evaluate(result):  # all ranks
                log_evaluation(accelerator, run, record, step)
                if not quiet:
                    bar.write(evaluation_line(record, step))
        if fresh and saving:
            save_checkpoint(  # all ranks
                accelerator,
                run,
                step=step,
                position=loader.position(),
                ema=average,
                memory=objective.state(),
                frozen=frozen,
            )
        if last:
            break
        if stopping:
            end_early(accelerator, run, step, config.steps)

        # ---------------------------------------------------------------- one update
        parts: list[Any] = [
            send_to_device(next(batches), accelerator.device, non_blocking=True) for _ in range(config.accum_steps)
        ]
        keys = [key for part in parts for key in part["keys"]]
        lr = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # timm's key for layer-wise decay of the learning rate
        with accelerator.autocast():
            parts = [objective.prepare(part) for part in parts]
        model.train()
        with objective.around_update(parts):
            cached = embed_all(accelerator, model, objective, parts)
            loss, scalars = objective.loss(cached.outputs, cached.targets)
            stopping = agree(accelerator, loss, scalars, keys, step, stop=stop())  # all ranks
            accelerator.backward(loss)  # to the cached outputs
            backward_from_cache(accelerator, model, objective, parts, cached)  # all ranks: to the parameters
        norm = accelerator.clip_grad_norm_(model.parameters(), config.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        after_step()
        if average is not None and step >= config.average_from_step:
            average.update_parameters(plain)  # the first call copies
        step += 1
        # ----------------------------------------------------------------

        speed.count(len(keys))
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.3f}, {speed.per_second():.0f} images/s", refresh=False)
        if is_time(step, config.log_every_steps) or step == config.steps:
            values = {"loss": loss.detach()} | scalars | {"grad_norm": norm, "lr": lr}
            record = {f"train/{name}": float(value) for name, value in values.items()}
            record |= {"train/images_per_second": speed.per_second(), "train/skipped": loader.num_skipped()}
            record |= {"train/images_seen": step * len(keys) * accelerator.num_processes}  # batches have one size
            run.log({"step": step} | record)
            accelerator.log(record, step=step)
    bar.close()
    return result


def moving_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """For `fit`: average = decay * average + (1 - decay) * model after each update; None for decay 0.

    Averages buffers as well: BatchNorm statistics of the current weights do not fit averaged weights.
    """
    if not decay:
        return None

    def average(ema: Tensor, now: Tensor, _: Any) -> Tensor:
        if not now.is_floating_point():
            return now
        # Equal entries are kept: an attention mask's -inf would become -inf - -inf = nan.
        return torch.where(ema == now, now, torch.lerp(ema, now, 1 - decay))

    return AveragedModel(model, avg_fn=average, use_buffers=True)


def is_time(step: int, every: int) -> bool:
    """Whether a step is a multiple of an interval; interval 0 = never."""
    return every > 0 and step % every == 0


def check_all_processes_joined(accelerator: Accelerator) -> None:
    """Raises: UserError where more processes were launched than Accelerate joined into a group.

    Each would train alone and write as the main process. Accelerate joins torchrun's processes on a CPU only if
    ACCELERATE_USE_CPU is set.
    """
    launched = int(os.environ["WORLD_SIZE"]) if {"LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() else 1
    if launched > accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but Accelerate joined {accelerator.num_processes}: on a CPU set "
            "ACCELERATE_USE_CPU=true, on GPUs use `accelerate launch`"
        )


def check_no_accumulation(accelerator: Accelerator) -> None:
    """Raises: UserError for Accelerate's gradient accumulation, which would compute the loss of each micro-batch alone.

    A contrastive loss would then lose negatives. Accelerate also reads the number from the environment, so the check is
    here and not at a flag.
    """
    if accelerator.gradient_accumulation_steps > 1:
        raise UserError(
            f"gradient_accumulation_steps = {accelerator.gradient_accumulation_steps}: micro-batches would shrink the "
            "set of negatives and change the loss; use 1 and --accum-steps, which gives the loss of them all as one"
        )


def check_fsdp(accelerator: Accelerator, average: AveragedModel | None) -> None:
    """Raises: UserError for FSDP 1, and for a moving average under FSDP."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise UserError(
            "fsdp_version 1 flattens parameters, which these checkpoints do not support: set fsdp_version: 2"
        )
    if average is not None:
        raise UserError("a moving average needs whole parameters, and FSDP shards them: set --ema-decay 0")


def unsharded_copy(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model to evaluate and export: itself, or with FSDP a copy that `fill_from_shards` fills.

    FSDP shards along the first axis, so parameters without axes (a scale) get one. The copy keeps their shape.
    """
    if not accelerator.is_fsdp2:
        return model
    whole = copy.deepcopy(model).to(accelerator.device)
    for parameter in model.parameters():
        if parameter.ndim == 0:
            parameter.data = parameter.data.reshape(1)
    return whole


def share_buffers(*models: nn.Module) -> None:
    """Sets buffers to those of rank 0. All ranks.

    BatchNorm's statistics are each rank's own. Without this the ranks would evaluate different models, a checkpoint
    of shards would mix their statistics, and other checkpoints hold those of rank 0, from which all ranks go on.
    """
    for model in models:
        for buffer in model.buffers():
            broadcast(buffer)  # all ranks


def fill_from_shards(accelerator: Accelerator, model: nn.Module, whole: nn.Module) -> None:
    """Gathers all shards into the copy of every rank; no-op where `whole` is the model. All ranks."""
    if accelerator.is_fsdp2:
        state = gather_shards(model)  # all ranks
        shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
        whole.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in state.items()})


def agree(accelerator: Accelerator, loss: Tensor, scalars: Tensors, keys: list[str], step: int, *, stop: bool) -> bool:
    """Whether `stop` is true on any rank. All ranks, in one reduction.

    Raises: UserError on all ranks, before the update, when the loss of any rank is not finite.
    """
    value = loss.detach()
    flags = torch.stack([(~torch.isfinite(value)).float(), value.new_full((), float(stop)).float()])
    counts: Any = accelerator.reduce(flags, reduction="sum")  # all ranks
    bad_ranks, stopped_ranks = counts.tolist()
    if bad_ranks == 0:
        return stopped_ranks > 0
    keys = gather_object([] if torch.isfinite(value) else keys[:4])  # all ranks
    terms = ", ".join(f"{name} {float(scalar):.4g}" for name, scalar in scalars.items())
    raise UserError(
        f"the loss is {float(value)} at step {step} ({terms}); samples {', '.join(map(str, keys[:8]))} ...: "
        "lower --lr or look at these samples; the last checkpoint is good"
    )


def end_early(accelerator: Accelerator, run: RunFolder, step: int, steps: int) -> None:
    """Raises: Stopped, after the end of trackers and process group. All ranks."""
    accelerator.end_training()
    run.release()
    raise Stopped(
        f"stopped as requested, with a checkpoint at step {step:,} of {steps:,} in {run.path}: continue with "
        f"--output-dir {run.path} --resume latest"
    )


def evaluation_line(record: Record, step: int) -> str:
    """One line for the terminal: the first two metrics of an evaluation."""
    metrics = [f"{key} {value:.3f}" for key, value in record.items() if isinstance(value, float)]
    return f"step {step:,}: {record['model']} on {record['dataset']}: {', '.join(metrics[:2])}"


def log_evaluation(accelerator: Accelerator, run: RunFolder, record: Record, step: int) -> None:
    """Writes one evaluation to results.jsonl and to the trackers."""
    run.log({"step": step} | record)
    prefix = f"{record['dataset']}/{record['model']}"
    numbers = {f"{prefix}/{k}": v for k, v in record.items() if isinstance(v, (int, float))}
    accelerator.log(numbers, step=step)


class Speed:
    """Images per second of all processes, over the last ten steps."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        self._stamps: list[tuple[float, int]] = [(time.perf_counter(), 0)]

    def count(self, images: int) -> None:
        self._stamps = [*self._stamps[-10:], (time.perf_counter(), images * self._num_processes)]

    def per_second(self) -> float:
        images = sum(n for _, n in self._stamps[1:])
        return images / max(self._stamps[-1][0] - self._stamps[0][0], 1e-9)
