"""A student in shards is trained like a whole one: the same weights are evaluated, exported, saved and resumed.

Accelerate enables FSDP for GPUs only. Here its state is set as on GPUs, and its FSDP2 code runs on CPUs over gloo.
"""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import RankFailed, run_ranks
from torch.distributed.tensor import DTensor

from gkl_vl.losses.image_text import image_text_loss, mimicry_loss
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.depth import lock, rate_scales
from gkl_vl.models.lora import add_lora, merged
from gkl_vl.models.student import OneTower, Student
from gkl_vl.models.towers import clamp_scale
from gkl_vl.protocols import Objective
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import FitConfig, fit, moving_average
from gkl_vl.training.optim import adamw, clip_adamw, warmup_cosine

FSDP_CONFIG = Path(__file__).parents[1] / "accelerate_configs" / "fsdp.yaml"
CONFIG = {"accum_steps": 2, "eval_every_steps": 1, "checkpoint_every_steps": 1}
ROWS = 3


def sharding_accelerator(version: int = 2) -> Accelerator:
    """With the shipped settings, passed in the environment as `accelerate launch` does."""
    for name, value in yaml.safe_load(FSDP_CONFIG.read_text())["fsdp_config"].items():
        os.environ[name.upper().replace("_LAYER_CLS", "_CLS")] = str(value)
    os.environ["FSDP_VERSION"] = str(version)
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


class Loader:
    """Endless batches, the same in every run; each rank has others."""

    def __init__(self, rank: int, size: int, length: int, position):
        self.rank, self.size, self.length, self.taken = rank, size, length, (position or {"taken": 0})["taken"]

    def __iter__(self):
        while True:
            draw = torch.Generator().manual_seed(100 * self.taken + self.rank)
            self.taken += 1
            image = torch.randn(ROWS, 3, self.size, self.size, generator=draw)
            text = torch.randint(1, 1000, (ROWS, self.length), generator=draw)
            teacher = F.normalize(torch.randn(2 * ROWS, 24, generator=draw), dim=1)
            keys = [str(number) for number in range(ROWS)]
            yield {"image": image, "text": text, "teacher": teacher, "keys": keys}

    def position(self):
        return {"taken": self.taken}

    def num_skipped(self):
        return 0


class Distil(Objective):
    def outputs(self, model, batch):
        return model(batch["image"], batch["text"])

    def targets(self, batch):
        image, text = batch["teacher"].split(ROWS)
        return {"teacher_image": image, "teacher_text": text}

    def loss(self, outputs, targets):
        loss, scalars = image_text_loss(
            **{name: tensor for name, tensor in outputs.items() if not name.startswith("mapped_")},
            **targets,
            teacher_logit_scale=torch.tensor(20.0),
        )
        mimicry = {name: outputs[f"mapped_{name}"] for name in ("image", "text")}
        return loss + 10 * mimicry_loss(**mimicry, **targets), scalars


class Mimic(Objective):
    """For one tower: the images alone."""

    def outputs(self, model, batch):
        return {"rows": model(batch["image"])}

    def targets(self, batch):
        return {"rows": batch["teacher"][:ROWS]}

    def loss(self, outputs, targets):
        padded = F.pad(targets["rows"], (0, outputs["rows"].shape[1] - targets["rows"].shape[1]))
        return 100 * F.mse_loss(outputs["rows"], padded), {}


def student_of(clip: Clip, kind: str) -> Student | OneTower:
    """A student with frozen weights of this kind."""
    if kind == "one tower":
        return OneTower(clip.towers, "image")
    if kind == "locked":
        lock(clip.towers, "image", unlocked_groups=4)  # the stem and the first stage
    else:
        add_lora(clip, rank=2, alpha=8, targets=["attn", "c_fc", "conv1"])
    return Student(clip.towers, embed_dim=clip.embed_dim, teacher_dims=[24], mapped=("image", "text"))


def train(rank, world_size, folder, sharded, steps, resume=None, kind="locked"):
    """The student's weights, embeddings and scale in each evaluation, and the number of parameters on this rank."""
    accelerator = sharding_accelerator() if sharded else Accelerator(cpu=True)
    torch.manual_seed(0)
    clip = load_clip("emoji-student")
    length, seen = clip.model_cfg["text_cfg"]["context_length"], []
    model = student_of(clip, kind)

    def make_loader(position):
        return Loader(rank, clip.image_size, length, position)

    def evaluate(model):
        model.eval()
        batch = next(iter(make_loader(None)))
        towers = merged(model.towers) if kind == "lora" else model.towers
        image, text = towers.encode_image(batch["image"]), towers.encode_text(batch["text"])
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        seen.append((weights, image.detach(), text.detach(), model.towers.log_scale().item()))
        return []

    run = RunFolder(Path(folder), is_main=rank == 0)
    exported = fit(
        accelerator=accelerator,
        model=model,
        objective=Mimic() if kind == "one tower" else Distil(),
        make_loader=make_loader,
        run=run,
        make_optimizer=partial(
            clip_adamw,
            of_text=model.text_parameters(),
            lr=1e-3,
            text_lr=5e-4,
            wd=0.1,
            scales=rate_scales(clip.towers, 0.9) if kind == "locked" else {},
        ),
        learning_rate=partial(warmup_cosine, lr=1e-3, steps=steps, warmup_steps=0),
        config=FitConfig(steps=steps, **CONFIG),
        evaluate=evaluate,
        after_step=lambda: clamp_scale(clip.towers),
        checkpoint=Path(resume) if resume else None,
    )
    scale = model.towers.model.logit_scale
    local = {name: p.to_local().numel() if sharded else p.numel() for name, p in model.named_parameters()}
    assert isinstance(scale, DTensor) == sharded and exported.towers.model.logit_scale.shape == ()
    return seen, sum(local.values())


def test_shards_train_like_the_whole_model_and_resume(tmp_path):
    whole = run_ranks(train, 2, str(tmp_path / "whole"), False, 3)
    sharded = run_ranks(train, 2, str(tmp_path / "sharded"), True, 3)
    for of_whole, of_shards in zip(whole[0][0], sharded[0][0], strict=True):
        for name, tensor in of_whole[0].items():
            # A softmax does not depend on the keys' bias: its gradient is rounding, which Adam divides by its own size.
            # Elsewhere few gradients are as small; three updates at 1e-3 move a weight by up to 3e-3.
            atol = 1e-5 if name.endswith("in_proj_bias") else 3e-6
            torch.testing.assert_close(
                of_shards[0][name], tensor, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )
        for ours, theirs in zip(of_shards[1:3], of_whole[1:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(sharded[0][0]) == 3 and sharded[0][0][0][3] != sharded[0][0][2][3]  # the scale is trained
    assert max(held for _, held in sharded) < 0.6 * whole[0][1]  # a rank has half of the parameters
    last = sharded[0][0][-1][0]
    for name, tensor in sharded[1][0][-1][0].items():
        assert torch.equal(tensor, last[name]), name  # every rank evaluates the same model

    checkpoint = str(tmp_path / "sharded" / "checkpoints" / "step_00000002")
    for (of_resumed,), _ in run_ranks(train, 2, str(tmp_path / "resumed"), True, 3, checkpoint):
        for name, tensor in of_resumed[0].items():
            assert torch.equal(tensor, last[name]), name


@pytest.mark.parametrize("kind", ["lora", "one tower"])
def test_adapters_and_one_tower_train_in_shards_like_whole(tmp_path, kind):
    ((whole, _), _), ((sharded, _), _) = (
        run_ranks(train, 2, str(tmp_path / name), name == "sharded", 2, None, kind) for name in ("whole", "sharded")
    )
    trained = [name for name in whole[0][0] if not torch.equal(whole[0][0][name], whole[1][0][name])]
    parts = {"lora": ("lora_", "_map.", "running_", "num_batches"), "one tower": ("towers.model.visual.",)}
    assert trained and all(any(part in name for part in parts[kind]) for name in trained)
    for of_whole, of_shards in zip(whole, sharded, strict=True):
        for name, tensor in of_whole[0].items():
            torch.testing.assert_close(of_shards[0][name], tensor, rtol=1e-5, atol=3e-6)
        for ours, theirs in zip(of_shards[1:3], of_whole[1:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def refused(rank, world_size, folder, version, decay):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    fit(
        accelerator=sharding_accelerator(version),
        model=model,
        objective=Distil(),
        make_loader=lambda position: Loader(rank, 1, 1, position),
        run=RunFolder(Path(folder), is_main=False),
        make_optimizer=partial(adamw, lr=1.0, wd=0.0),
        learning_rate=lambda step: 1.0,
        config=FitConfig(steps=1),
        evaluate=lambda model: [],
        average=moving_average(model, decay),
    )


@pytest.mark.parametrize(
    "version, decay, message",
    [(1, 0.0, "fsdp_version 1 .*: set fsdp_version: 2"), (2, 0.9, "a moving average .*: set --ema-decay 0")],
)
def test_fsdp_1_and_a_moving_average_are_refused(tmp_path, version, decay, message):
    with pytest.raises(RankFailed, match=message):
        run_ranks(refused, 1, str(tmp_path), version, decay)
