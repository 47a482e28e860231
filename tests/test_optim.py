"""Who decays, and how the rate goes."""

import math
from functools import partial

import pytest
import torch
from small_models import tiny_clip
from transformers import CLIPConfig, CLIPModel

from gkl_vl.models.classifiers import load_classifier
from gkl_vl.models.student import Student
from gkl_vl.models.towers import TransformersTowers
from gkl_vl.training.optim import (
    clip_adamw,
    layered_adamw,
    multi_step,
    parameter_groups,
    sgd,
    warmup_cosine,
    warmup_fixmatch,
)


def test_the_schedule_warms_up_and_falls_to_zero():
    rate = partial(warmup_cosine, lr=2.0, steps=10, warmup_steps=4)
    assert [rate(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0
    assert rate(7) == pytest.approx(1.0)
    assert rate(9) == pytest.approx(1 + math.cos(5 / 6 * math.pi))
    assert rate(10) == pytest.approx(0)


def test_biases_norms_and_the_scale_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    model[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model.parameters(), 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert sorted(p.ndim for p in plain["params"]) == [0, 1, 1, 1, 1]


def test_each_tower_has_its_rate(tmp_path):
    clip = tiny_clip(tmp_path)
    student = Student(clip.towers, embed_dim=12, teacher_dims=[20], mapped=("image", "text"))
    names = {parameter: name for name, parameter in student.named_parameters()}
    for lr, text_lr in ((0.4, 0.1), (0.1, 0.4), (0.0, 0.4), (0.0, 0.0)):
        optimizer = clip_adamw(student, of_text=student.text_parameters(), lr=lr, text_lr=text_lr, wd=0.3)
        rates = {names[p]: g["lr"] * g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates) == len(names)
        of_image = {name for name in names.values() if "visual" in name or "image_map" in name or "logit" in name}
        assert {name for name, rate in rates.items() if rate == pytest.approx(lr)} >= of_image
        of_text = rates.keys() - of_image
        assert {"towers.model.token_embedding.weight", "towers.model.text_projection", "text_map.weight"} <= of_text
        assert all(rates[name] == pytest.approx(text_lr) for name in of_text)
        decays = {names[p] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        assert decays == {name for name, parameter in student.named_parameters() if parameter.ndim >= 2}


def test_transformers_towers_have_their_sides():
    config = CLIPConfig(
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        projection_dim=8,
    )
    towers = TransformersTowers(CLIPModel(config))
    image, text = set(towers.image_parameters()), set(towers.text_parameters())
    assert not image & text and {*towers.parameters()} - image - text == {towers.model.logit_scale}


def test_sgd_decays_everything_that_is_trained():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    (group,) = sgd(model, lr=0.1, wd=0.5).param_groups
    assert [p.shape for p in group["params"]] == [(2, 3)]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.5)


def test_milestones_take_a_tenth_each():
    rates = [multi_step(step, lr=1.0, milestones=(2, 3)) for step in range(5)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_sgd_spares_biases_and_norms_where_told():
    matrices, others = sgd(torch.nn.Linear(3, 2), lr=0.1, wd=0.5, nesterov=True, norms_decay=False).param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.5, 0) and matrices["nesterov"]
    assert [p.ndim for p in (*matrices["params"], *others["params"])] == [2, 1]


def test_fixmatchs_schedule_ends_at_a_fifth():
    rate = partial(warmup_fixmatch, lr=2.0, steps=10, warmup_steps=2)
    assert [rate(step) for step in range(3)] == [0, 1, 2]
    assert rate(6) == pytest.approx(2 * math.cos(7 / 32 * math.pi))
    assert rate(10) == pytest.approx(0.39, abs=1e-3)


def test_the_rate_falls_from_layer_to_layer():
    """Of a ViT of 12 blocks: the head at the whole rate, the norm with the last block, the patches at 0.5^13 of it."""
    model = load_classifier("vit_tiny_patch2_32", num_classes=10).model
    groups = layered_adamw(model, lr=0.1, wd=0.3, layer_decay=0.5).param_groups
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    scale, decay = (
        {name_of[p]: group[key] for group in groups for p in group["params"]} for key in ("lr_scale", "weight_decay")
    )
    assert set(scale) == set(name_of.values())
    assert (scale["head.weight"], scale["norm.weight"]) == (1, 0.5)
    assert [scale[f"blocks.{block}.mlp.fc1.weight"] for block in (11, 10, 0)] == [0.5, 0.25, 0.5**12]
    assert scale["patch_embed.proj.weight"] == 0.5**13
    assert decay["blocks.3.mlp.fc1.weight"] == 0.3
    assert {decay[name] for name in ("pos_embed", "cls_token", "head.bias", "norm.weight")} == {0}
