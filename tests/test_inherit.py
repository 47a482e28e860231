"""Weight inheritance: which part of a teacher a student takes, what it computes then, and what is refused."""

import copy
import json
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from torch import Tensor

from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.inherit import inherit
from gkl_vl.models.modes import freeze
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER, BUNDLED_TOKENIZER_NAME

TOKENS = {"context_length": 16, "vocab_size": 4096, "hf_tokenizer_name": BUNDLED_TOKENIZER_NAME}
TEACHER = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 24, "patch_size": 8, "layers": 4, "width": 48, "head_width": 16},
    "text_cfg": TOKENS | {"width": 32, "heads": 4, "layers": 3},
}
SMALLER = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 2, "width": 32, "mlp_ratio": 3.0},
    "text_cfg": {"context_length": 10, "layers": 2, "width": 16, "heads": 2, "mlp_ratio": 3.5},
}
IMAGE, TEXT = "vision_cfg", "text_cfg"
TEXTS = ["a cat", "the flag of a country with dogs and cats", ""]

pytestmark = pytest.mark.usefixtures("one_thread")


def build(folder: Path, name: str, changes: dict | None = None, *, preprocess: dict | None = None) -> Clip:
    """A CLIP of TEACHER's configuration with changes, in evaluation mode, all parameters drawn by the name."""
    config = copy.deepcopy(TEACHER)
    for key, value in (changes or {}).items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    content = config if preprocess is None else {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / f"{name}.json").write_text(json.dumps(content))
    clip = freeze(load_clip(str(folder / f"{name}.json")))
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for parameter in clip.towers.parameters():
        parameter.nan_to_num_()  # open_clip leaves a CoCa's last projection uninitialised
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return clip


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Clip:
    """A teacher that tests leave as it is."""
    return build(tmp_path_factory.mktemp("plain"), "teacher")


def state(clip: Clip) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in clip.towers.model.state_dict().items()}


def assert_bitwise(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def embeddings(clip: Clip) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(3, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(1))
    return clip.towers.encode_image(pixels), clip.towers.encode_text(clip.tokenize(TEXTS))


def of_side(clip: Clip, side: str) -> dict[str, Tensor]:
    """Tensors of a tower under their names in it."""
    prefix = "visual." if side == "image" else "text." if isinstance(clip.towers.model, CustomTextCLIP) else ""
    other = ("visual.", "logit_") if side == "text" else "logit_"
    named = {name: t for name, t in state(clip).items() if name.startswith(prefix) and not name.startswith(other)}
    return {name.removeprefix(prefix): tensor for name, tensor in named.items()}


def blocks(clip: Clip) -> list[Any]:
    """Those of the image and of the text tower."""
    model: Any = clip.towers.model
    text = model.text if isinstance(model, CustomTextCLIP) else model
    return [model.visual.transformer.resblocks, text.transformer.resblocks]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"custom_text": True},
        {"quick_gelu": True, "init_logit_bias": -10.0, "nonscalar_logit_scale": True},
        {IMAGE: {"ls_init_value": 0.1, "no_ln_pre": True}, TEXT: {"ls_init_value": 0.1}},
        {IMAGE: {"pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}},
        {IMAGE: {"patch_dropout": 0.5, "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}},
        {"custom_text": True, TEXT: {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}},
        {"embed_dim": 32, TEXT: {"proj_type": "none", "norm_kwargs": {"elementwise_affine": False}}},
    ],
)
def test_a_student_of_the_teachers_shape_becomes_the_teacher(tmp_path, changes):
    teacher, student = build(tmp_path, "teacher", changes), build(tmp_path, "student", changes)
    before = state(teacher)
    lines = inherit(student, teacher)
    assert_bitwise(state(student), before)
    assert_bitwise(state(teacher), before)
    for ours, theirs in zip(embeddings(student), embeddings(teacher), strict=True):
        assert torch.equal(ours, theirs)
    image = "layers 0 1 2 3 of 4, 48 of 48 channels, 3 of 3 heads and 192 of 192 MLP neurons a layer"
    text = "layers 0 1 2 of 3, 32 of 32 channels, 4 of 4 heads and 128 of 128 MLP neurons a layer"
    assert lines[:2] == [f"image tower from {teacher.name}: {image}", f"text tower from {teacher.name}: {text}"]


# ---- a part of the teacher


def largest(importance: list[float], count: int) -> list[int]:
    best = sorted(range(len(importance)), key=lambda index: -importance[index])
    return sorted(best[:count])


def pick(tensor: Tensor, *indices: list[int]) -> Tensor:
    """The entries at these indices of the first axes, one at a time."""
    if not indices:
        return tensor
    return torch.stack([pick(tensor[index], *indices[1:]) for index in indices[0]])


def naive_layer(layer: dict[str, Tensor], sizes: dict[str, int]) -> tuple[list[int], list[int], list[float]]:
    """Rows of the heads and the neurons that a layer keeps, and the squares that it writes into each channel."""
    layer = {name: tensor.double() for name, tensor in layer.items()}
    width, head_width, heads, neurons, power = len(layer["ln_1.bias"]), sizes["head_width"], [], [], []
    scales = [layer.get(f"ls_{number}.gamma", torch.ones(width).double()) for number in (1, 2)]
    for head in range(width // head_width):
        ov = torch.zeros(width, width).double()
        for row in range(head * head_width, (head + 1) * head_width):
            read = layer["attn.in_proj_weight"][2 * width + row] * layer["ln_1.weight"]
            ov += torch.outer(scales[0] * layer["attn.out_proj.weight"][:, row], read)
        heads.append(ov.norm().item())
    for neuron in range(len(layer["mlp.c_fc.bias"])):
        incoming = layer["mlp.c_fc.weight"][neuron] * layer["ln_2.weight"]
        neurons.append((incoming.norm() * (scales[1] * layer["mlp.c_proj.weight"][:, neuron]).norm()).item())
    rows = [head * head_width + place for head in largest(heads, sizes["heads"]) for place in range(head_width)]
    neurons = largest(neurons, sizes["neurons"])
    for channel in range(width):
        power.append((scales[0][channel] * layer["attn.out_proj.bias"][channel]).item() ** 2)
        power[-1] += (scales[1][channel] * layer["mlp.c_proj.bias"][channel]).item() ** 2
        for row in rows:
            power[-1] += (scales[0][channel] * layer["attn.out_proj.weight"][channel, row]).item() ** 2
        for neuron in neurons:
            power[-1] += (scales[1][channel] * layer["mlp.c_proj.weight"][channel, neuron]).item() ** 2
    return rows, neurons, power


def naive_embedded(tower: dict[str, Tensor]) -> list[float]:
    tower, power = {name: tensor.double() for name, tensor in tower.items()}, []
    for channel in range(tower["positional_embedding"].shape[1]):
        power.append((tower["positional_embedding"][:, channel] ** 2).mean().item())
        if "conv1.weight" in tower:
            power[-1] += tower["class_embedding"][channel].item() ** 2
            power[-1] += (tower["conv1.weight"][channel] ** 2).sum().item()
        else:
            power[-1] += (tower["token_embedding.weight"][:, channel] ** 2).mean().item()
    if "ln_pre.weight" in tower:
        mean, pairs = sum(power) / len(power), zip(tower["ln_pre.weight"], tower["ln_pre.bias"], strict=True)
        power = [(g**2 * value / mean + b**2).item() for value, (g, b) in zip(power, pairs, strict=True)]
    return power


def naive_tower(teacher: Clip, side: str, *, layers: list[int], sizes: dict[str, int]):
    """Tensors of a student's tower without its last projection, and the channels taken."""
    tower, power = of_side(teacher, side), naive_embedded(of_side(teacher, side))
    width, choices, expected = len(power), [], {}
    for index in layers:
        prefix = f"transformer.resblocks.{index}."
        layer = {name.removeprefix(prefix): t for name, t in tower.items() if name.startswith(prefix)}
        rows, neurons, added = naive_layer(layer, sizes)
        power = [one + other for one, other in zip(power, added, strict=True)]
        choices.append((layer, rows, neurons))
    channels = largest(power, sizes["width"])
    for place, (layer, rows, neurons) in enumerate(choices):
        qkv = [part * width + row for part in range(3) for row in rows]
        axes = {"attn.in_proj_weight": (qkv, channels), "attn.in_proj_bias": (qkv,)}
        axes |= {"attn.out_proj.weight": (channels, rows), "mlp.c_proj.weight": (channels, neurons)}
        axes |= {"mlp.c_fc.weight": (neurons, channels), "mlp.c_fc.bias": (neurons,)}
        for name, tensor in layer.items():
            expected[f"transformer.resblocks.{place}.{name}"] = pick(tensor, *axes.get(name, (channels,)))
    for name, tensor in tower.items():
        if name.startswith(("ln_", "conv1", "class_embedding")):
            expected[name] = pick(tensor, channels)
        if name in ("token_embedding.weight", "positional_embedding"):
            expected[name] = pick(tensor.T, channels).T
    if side == "text":
        expected["positional_embedding"] = expected["positional_embedding"][: sizes["positions"]]
    return expected, channels


@pytest.mark.parametrize(
    "changes, of_student",
    [
        ({}, {}),
        ({"custom_text": True, TEXT: {"proj_bias": True}}, {}),
        ({"custom_text": True}, {"custom_text": False}),
        ({}, {"custom_text": True}),
        ({IMAGE: {"ls_init_value": 1.0, "no_ln_pre": True}, TEXT: {"ls_init_value": 1.0}}, {}),
    ],
)
def test_a_part_of_the_teacher_equals_that_of_loops(tmp_path, changes, of_student):
    teacher = build(tmp_path, "teacher", changes)
    teacher.towers.model.visual.class_embedding *= 20  # that it and biases decide between channels
    for block in chain(*blocks(teacher)):
        block.attn.out_proj.bias *= 10
        block.mlp.c_proj.bias *= 10
    smaller = {key: changes.get(key, {}) | SMALLER[key] for key in (IMAGE, TEXT)}
    student = build(tmp_path, "student", SMALLER | changes | smaller | of_student)
    lines = inherit(student, teacher, layers=[1, 2])
    sizes = {"head_width": 16, "heads": 2, "neurons": 96, "width": 32}
    image, image_channels = naive_tower(teacher, "image", layers=[1, 2], sizes=sizes)
    sizes = {"head_width": 8, "heads": 2, "neurons": 56, "width": 16, "positions": 10}
    text, text_channels = naive_tower(teacher, "text", layers=[0, 2], sizes=sizes)

    theirs = of_side(teacher, "image") | of_side(teacher, "text")
    projection = theirs["text_projection.weight"].T if "text_projection.weight" in theirs else theirs["text_projection"]
    importance = []
    for dimension in range(12):
        image_norm = (theirs["proj"][:, dimension].double() * theirs["ln_post.weight"]).norm().item()
        importance.append(image_norm * (projection[:, dimension].double() * theirs["ln_final.weight"]).norm().item())
    dimensions = largest(importance, 8)
    image["proj"] = pick(theirs["proj"], image_channels, dimensions)
    if "text_projection.bias" in theirs:
        text["text_projection.weight"] = pick(projection, text_channels, dimensions).T
        text["text_projection.bias"] = pick(theirs["text_projection.bias"], dimensions)
    else:
        text["text_projection"] = pick(projection, text_channels, dimensions)
    assert_bitwise(of_side(student, "image"), image)
    assert_bitwise(of_side(student, "text"), text)
    assert image_channels != list(range(32)) and text_channels != list(range(16)) and dimensions != list(range(8))
    assert "layers 1 2 of 4, 32 of 48 channels, 2 of 3 heads and 96 of 192 MLP" in lines[0]
    assert lines[2].endswith(", 10 positions, the first of 16") and lines[4:] == ["embedding: 8 of 12 dimensions"]


def test_a_narrower_text_tower_without_projection_decides_the_dimensions(tmp_path):
    """Whose channels they are."""
    changes = {"embed_dim": 32, TEXT: {"proj_type": "none"}}
    smaller = {"embed_dim": 16, TEXT: {"proj_type": "none", "width": 16, "heads": 2}}
    teacher, student = build(tmp_path, "teacher", changes), build(tmp_path, "student", smaller)
    inherit(student, teacher)
    sizes = {"head_width": 8, "heads": 2, "neurons": 64, "width": 16, "positions": 16}
    _, channels = naive_tower(teacher, "text", layers=[0, 1, 2], sizes=sizes)
    assert channels != list(range(16))
    theirs = of_side(teacher, "image")["proj"]
    assert torch.equal(of_side(student, "image")["proj"], pick(theirs.T, channels).T)


def test_a_dimension_counts_by_both_towers_and_is_the_same_in_both(tmp_path):
    teacher = build(tmp_path, "teacher", {"embed_dim": 4})
    student = build(tmp_path, "student", {"embed_dim": 2})
    model = teacher.towers.model
    for tower, scales in ((model.visual.proj, [9.0, 2.0, 2.0, 0.1]), (model.text_projection, [0.1, 2.0, 3.0, 9.0])):
        tower.copy_(F.normalize(torch.randn(tower.shape), dim=0) * torch.tensor(scales))
    inherit(student, teacher)
    assert torch.equal(student.towers.model.visual.proj, model.visual.proj[:, 1:3])
    assert torch.equal(student.towers.model.text_projection, model.text_projection[:, 1:3])


def test_of_equal_neurons_the_first_are_taken(tmp_path):
    teacher, student = build(tmp_path, "teacher"), build(tmp_path, "student", {TEXT: {"mlp_ratio": 2.0}})
    blocks(teacher)[1][0].mlp.c_fc.weight.zero_()
    inherit(student, teacher)
    assert torch.equal(blocks(student)[1][0].mlp.c_fc.bias, blocks(teacher)[1][0].mlp.c_fc.bias[:64])


def test_positions_of_images_are_interpolated_to_the_students_grid(tmp_path):
    teacher, student = build(tmp_path, "teacher"), build(tmp_path, "student", {IMAGE: {"image_size": 40}})
    lines = inherit(student, teacher)
    theirs = teacher.towers.model.visual.positional_embedding
    grid = theirs[1:].T.reshape(1, 48, 3, 3)
    wanted = F.interpolate(grid, (5, 5), mode="bicubic", antialias=True).reshape(48, 25).T
    ours = student.towers.model.visual.positional_embedding
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1:], wanted, rtol=0, atol=1e-6)
    assert lines[0].endswith(", 26 positions, interpolated from 10")


@pytest.mark.parametrize(
    "depths, of_student, image_layers, text_layers",
    [((12, 7), (4, 1), "0 4 7 11", "0"), ((12, 5), (6, 2), "0 2 4 7 9 11", "0 4"), ((4, 3), (3, 3), "0 2 3", "0 1 2")],
)
def test_layers_are_spaced_evenly_from_the_first_to_the_last(tmp_path, depths, of_student, image_layers, text_layers):
    teacher, student = (
        build(tmp_path, name, {IMAGE: {"layers": image}, TEXT: {"layers": text}})
        for name, (image, text) in (("teacher", depths), ("student", of_student))
    )
    for index, block in chain(*map(enumerate, blocks(teacher))):
        block.ln_1.bias.fill_(index)
    lines = inherit(student, teacher)
    for tower, layers in zip(blocks(student), (image_layers, text_layers), strict=True):
        assert " ".join(f"{block.ln_1.bias[0].item():g}" for block in tower) == layers
    assert f"layers {image_layers} of" in lines[0] and f"layers {text_layers} of" in lines[1]


@pytest.mark.parametrize("adds_nothing", [True, False])
def test_layers_and_neurons_that_add_nothing_are_dropped_without_a_change(tmp_path, adds_nothing):
    teacher = build(tmp_path, "teacher")
    parts = {"layers": 3, "mlp_ratio": 2.0}
    student = build(tmp_path, "student", {IMAGE: parts, TEXT: parts | {"layers": 2}})
    factor = 0.0 if adds_nothing else 0.9
    for tower, idle in zip(blocks(teacher), (1, 2), strict=True):
        for block in tower:
            hidden = block.mlp.c_fc.out_features
            block.mlp.c_proj.weight[:, torch.randperm(hidden)[: hidden // 2]] *= factor
        for parameter in (*tower[idle].attn.out_proj.parameters(), *tower[idle].mlp.c_proj.parameters()):
            parameter.mul_(factor)
    inherit(student, teacher, layers=[0, 2, 3], text_layers=[0, 1])
    for ours, theirs in zip(embeddings(student), embeddings(teacher), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) == adds_nothing


def spread(tensor: Tensor, size: int, places: list[int], axis: int) -> Tensor:
    """A tensor of zeros with `size` on the axis, with the given entries at these places."""
    shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]
    return torch.zeros(shape).index_copy(axis, torch.tensor(places), tensor)


def widened(small: dict[str, Tensor], large: dict[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """A tower of twice the width with a head and neurons that add nothing, each before one of the small tower, and
    with a copy behind every channel, which nothing reads: the mean and variance of LayerNorms are the same."""
    width, wide = {}, 2 * head_width
    even, last = list(range(0, wide, 2)), list(range(head_width, wide))
    for name, tensor in small.items():
        kind = name.split(".", 3)[-1] if name.startswith("transformer.") else name
        if kind.startswith("attn.in_proj"):
            tensor = tensor.unflatten(0, (3, head_width))
            tensor = spread(tensor, wide, even, 2) if tensor.ndim == 3 else tensor
            drawn = large[name].unflatten(0, (3, wide))
            width[name] = torch.cat([drawn[:, :head_width], tensor], dim=1).flatten(0, 1)
        elif kind == "attn.out_proj.weight":
            width[name] = spread(tensor.repeat_interleave(2, dim=0), wide, last, 1)
        elif kind.startswith("mlp.c_fc"):
            wanted = spread(tensor, wide, even, 1) if tensor.ndim == 2 else tensor
            width[name] = torch.stack([large[name][: len(wanted)], wanted], dim=1).flatten(0, 1)
        elif kind == "mlp.c_proj.weight":
            hidden = tensor.shape[1]
            width[name] = spread(tensor.repeat_interleave(2, dim=0), 2 * hidden, list(range(1, 2 * hidden, 2)), 1)
        elif kind in ("proj", "text_projection"):
            width[name] = spread(spread(tensor, wide, even, 0), 12, [0, 2, 3, 5, 6, 7, 9, 11], 1)
        else:
            axis = 1 if kind in ("positional_embedding", "token_embedding.weight") else 0
            width[name] = tensor.repeat_interleave(2, dim=axis)
    return width


def test_a_teacher_whose_other_heads_neurons_and_channels_are_redundant_is_kept(tmp_path):
    one = {IMAGE: {"width": 16, "no_ln_pre": True}, TEXT: {"width": 8, "heads": 1}, "embed_dim": 8}
    two = {IMAGE: {"width": 32, "no_ln_pre": True}, TEXT: {"width": 16, "heads": 2}}
    small, teacher, student = build(tmp_path, "small", one), build(tmp_path, "teacher", two), build(tmp_path, "b", one)
    for side, tower, head_width in (("image", teacher.towers.model.visual, 16), ("text", teacher.towers.model, 8)):
        tower.load_state_dict(widened(of_side(small, side), of_side(teacher, side), head_width), strict=side == "image")
    # A pixel and a token that the inputs lack decide between a channel and its copy.
    teacher.towers.model.visual.conv1.weight[::2, 0, 0, 0] = 100.0
    teacher.towers.model.token_embedding.weight[4000, ::2] = 10_000.0
    images = torch.randn(3, 3, 24, 24)
    images[:, 0, ::8, ::8] = 0.0
    lines = inherit(student, teacher)
    assert lines[1] == "  heads of the image tower, by layer: 1, 1, 1, 1"
    assert lines[3] == "  heads of the text tower, by layer: 1, 1, 1"
    dimensions = [0, 2, 3, 5, 6, 7, 9, 11]
    for encode, inputs in (("encode_image", images), ("encode_text", teacher.tokenize(TEXTS))):
        theirs, ours = getattr(teacher.towers, encode)(inputs), getattr(student.towers, encode)(inputs)
        torch.testing.assert_close(ours, theirs[:, dimensions], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, getattr(small.towers, encode)(inputs), rtol=1e-4, atol=1e-5)
        assert (ours[0] - ours[1]).abs().max() > 0.01


# ---- refusals


def refuse(student: Clip, teacher: Clip, message: str, **layers: list[int]) -> None:
    before = state(student)
    with pytest.raises(UserError) as caught:
        inherit(student, teacher, **layers)
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert_bitwise(state(student), before)


SHAPES = [  # change of the student, message, remedy
    ({IMAGE: {"layers": 6}}, "set it to at most 4 in", {IMAGE: {"layers": 4}}),
    ({TEXT: {"layers": 5}}, "set it to at most 3 in", {TEXT: {"layers": 3}}),
    ({TEXT: {"context_length": 20}}, "set it to at most 16 in", {TEXT: {"context_length": 16}}),
    ({"embed_dim": 13}, "embed_dim of student {student} is 13, and teacher", {"embed_dim": 12}),
    ({IMAGE: {"width": 64}}, "set vision_cfg.width to 48 and vision_cfg.head_width to 16", {IMAGE: {"width": 48}}),
    ({IMAGE: {"width": 34}}, "width to 32 and vision_cfg.head_width to 16", {IMAGE: {"width": 32}}),
    ({IMAGE: {"head_width": 8}}, "width to 48 and vision_cfg.head_width to 16", {IMAGE: {"head_width": 16}}),
    ({IMAGE: {"width": 40, "head_width": 40}}, "vision_cfg.width to 32 and", {IMAGE: {"width": 32, "head_width": 16}}),
    ({TEXT: {"width": 20, "heads": 2}}, "width to 16 and text_cfg.heads to 2", {TEXT: {"width": 16, "heads": 2}}),
    ({IMAGE: {"mlp_ratio": 4.1}}, "mlp_ratio to at most 4 in", {IMAGE: {"mlp_ratio": 4.0}}),
    ({TEXT: {"width": 24, "heads": 3, "mlp_ratio": 6.0}}, "to at most 5.33333 in", {TEXT: {"mlp_ratio": 5.33333}}),
]


@pytest.mark.parametrize("change, message, remedy", SHAPES)
def test_an_impossible_shape_is_refused_with_the_nearest_possible_one(tmp_path, plain, change, message, remedy):
    student = build(tmp_path, "student", change)
    refuse(student, plain, message.format(student=student.name))
    remedied = {key: old | remedy[key] if isinstance(old, dict) else remedy[key] for key, old in change.items()}
    assert inherit(build(tmp_path, "student", remedied), plain)


SETTINGS = [  # of the teacher, of the student, name, remedy
    ({"quick_gelu": True}, {}, "quick_gelu of student {student} is false", "set it to true in {student}"),
    ({}, {"quick_gelu": True}, "quick_gelu of student {student} is true", "set it to false in {student}"),
    ({IMAGE: {"act_kwargs": {"approximate": "tanh"}}}, {}, "act_kwargs", 'set it to {{"approximate": "tanh"}} in'),
    ({TEXT: {"norm_kwargs": {"eps": 1e-6}}}, {}, "text_cfg.norm_kwargs", 'set it to {{"eps": 1e-06}} in'),
    ({IMAGE: {"ls_init_value": 0.5}}, {}, "vision_cfg.ls_init_value", "set it to 0.5 in"),
    ({}, {TEXT: {"ls_init_value": 0.5}}, "text_cfg.ls_init_value", "set it to null in"),
    ({}, {IMAGE: {"patch_size": 4}}, "vision_cfg.patch_size", "set it to 8 in"),
    ({IMAGE: {"no_ln_pre": True}}, {}, "vision_cfg.no_ln_pre", "set it to true in"),
    ({IMAGE: {"pool_type": "avg"}}, {}, "vision_cfg.pool_type", 'set it to "avg" in'),
    ({}, {TEXT: {"no_causal_mask": True}}, "text_cfg.no_causal_mask", "set it to false in"),
    ({TEXT: {"proj_bias": True}}, {}, "text_cfg.proj_bias", "set it to true in"),
    ({"init_logit_bias": -10.0}, {}, "init_logit_bias", "set it to -10.0 in"),
    ({TEXT: {"pool_type": "last"}}, {TEXT: {"pool_type": "last", "context_length": 8}}, "context_length", "to 16 in"),
    ({}, {IMAGE: {"qk_norm": True}}, "vision_cfg.qk_norm", "remove it from {student}"),
    ({TEXT: {"block_type": "custom"}}, {}, "text_cfg.block_type of teacher", "take a teacher such as ViT-B-16"),
    ({IMAGE: {"attentional_pool": True, "attn_pooler_heads": 2}}, {}, "attentional_pool of teacher", "not support"),
]


@pytest.mark.parametrize("of_teacher, of_student, key, remedy", SETTINGS)
def test_another_setting_that_the_weights_depend_on_is_refused(tmp_path, plain, of_teacher, of_student, key, remedy):
    teacher = build(tmp_path, "teacher", of_teacher) if of_teacher else plain
    student = build(tmp_path, "student", of_student) if of_student else plain
    for message in (key, remedy):
        refuse(student, teacher, message.format(student=student.name))


COCA = {"context_length": 16, "vocab_size": 4096, "width": 32, "heads": 4, "layers": 1}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({IMAGE: {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}, "is a ResNet with no heads to take"),
        ({IMAGE: {"timm_model_name": "test_vit", "image_size": 160}}, "is timm's test_vit: inheritance needs"),
        ({"multimodal_cfg": COCA, TEXT: {"embed_cls": True, "output_tokens": True}}, "is a CoCa and no plain CLIP"),
    ],
)
def test_another_kind_of_model_is_refused_on_either_side(tmp_path, plain, changes, message):
    other = build(tmp_path, "other", changes)
    refuse(plain, other, f"teacher {other.name} {message}")
    refuse(other, plain, f"student {other.name} {message}")


def test_models_of_transformers_and_their_text_towers_are_refused(plain):
    unknown = replace(plain, model_cfg=None)
    refuse(plain, unknown, f"teacher {plain.name} is no open_clip model of `load_clip`")
    refuse(unknown, plain, f"student {plain.name} is no open_clip model of `load_clip`")
    config = TEACHER | {TEXT: TEACHER[TEXT] | {"hf_model_name": "org/bert"}}
    refuse(plain, replace(plain, model_cfg=config), "the text tower of teacher")


def test_another_vocabulary_or_cleaning_is_refused_with_the_teachers(tmp_path, plain):
    given = f'hf_tokenizer_name to "{BUNDLED_TOKENIZER}", tokenizer_mode to null, tokenizer_kwargs to null'
    larger = build(tmp_path, "larger", {TEXT: {"vocab_size": 49408, "hf_tokenizer_name": None}})
    refuse(larger, plain, f"set in text_cfg of {larger.name} vocab_size to 4096, {given}")
    settings = {"hf_tokenizer_name": str(BUNDLED_TOKENIZER), "tokenizer_mode": None, "tokenizer_kwargs": None}
    assert inherit(build(tmp_path, "larger", {TEXT: settings}), plain)
    refuse(build(tmp_path, "other", {TEXT: {"tokenizer_kwargs": {"clean": "canonicalize"}}}), plain, given)
    folder = shutil.copytree(BUNDLED_TOKENIZER, tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[3000:3002]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refuse(build(tmp_path, "swapped", {TEXT: {"hf_tokenizer_name": str(folder)}}), plain, given)


def test_another_normalisation_of_images_is_refused(tmp_path, plain):
    teacher = build(tmp_path, "teacher", preprocess={"mean": [0.5] * 3, "std": [0.5] * 3})
    refuse(plain, teacher, "teacher.json with [0.5, 0.5, 0.5] and [0.5, 0.5, 0.5], which its weights need")
    assert inherit(build(tmp_path, "student", preprocess={"mean": [0.5] * 3, "std": [0.5] * 3}), teacher)


@pytest.mark.parametrize(
    "layers, message",
    [
        (
            {"layers": [0, 4]},
            "--inherit-layers 0 4: teacher {teacher} has the image layers 0 to 3, no 4: write 2",
        ),
        ({"layers": [-1, 2]}, "no -1: write 2 of them, such as 0 3"),
        ({"layers": [2, 1]}, "layers 2 1: not each layer once in ascending order"),
        ({"text_layers": [1, 1]}, "--inherit-text-layers 1 1: not each layer once"),
        ({"text_layers": [0, 1, 2]}, "--inherit-text-layers 0 1 2: the text tower of student {student} has 2 layers"),
        ({"layers": []}, "has 2 layers: write 2 of them, such as 0 3"),
    ],
)
def test_layers_that_the_student_cannot_take_are_refused(tmp_path, plain, layers, message):
    student = build(tmp_path, "student", {IMAGE: {"layers": 2}, TEXT: {"layers": 2}})
    refuse(student, plain, message.format(teacher=plain.name, student=student.name), **layers)
