"""LoRA adapters: the adapted function and its gradients, the frozen rest, the merged model, peft's folders, targets."""

import copy
import json

import open_clip
import pytest
import torch
import transformers
from helpers import run_ranks
from open_clip.transform import PreprocessCfg
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.lora import add_lora, merged, save_adapters, trainable_table
from gkl_vl.models.student import OneTower, Student
from gkl_vl.models.towers import OpenClipTowers, TransformersTowers
from gkl_vl.training.engine import moving_average

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft, and this file for transformers 5.0, use the former name of "activation checkpointing"
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
]
RANK, ALPHA = 3, 6.0
LENGTH, EOT = 9, 63
VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": LENGTH, "vocab_size": EOT + 1, "width": 32, "heads": 2, "layers": 2}
BUILDERS = {
    "CLIP": lambda: open_clip.CLIP(16, VISION, TEXT),
    "QuickGELU": lambda: open_clip.CLIP(16, VISION, TEXT, quick_gelu=True),
    "CustomTextCLIP": lambda: open_clip.CustomTextCLIP(16, VISION, TEXT),
    "timm": lambda: open_clip.CustomTextCLIP(16, {"timm_model_name": "test_vit", "image_size": 32}, TEXT),
    "CLIPModel": lambda: transformers.CLIPModel(hf_config(transformers.CLIPConfig, projection_dim=16)),
    "SiglipModel": lambda: transformers.SiglipModel(hf_config(transformers.SiglipConfig)),
}
LAYERS = {"timm": 6 * 4 + 2 * 3, "CLIPModel": 2 * 2 * 6, "SiglipModel": 2 * 2 * 6}
"""Layers with adapters by default, where they are not `attn`, c_fc and c_proj of 2 blocks per tower; timm's has 6
blocks with qkv, proj, fc1 and fc2."""


def hf_config(config_class, **settings):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    text = sizes | {"vocab_size": EOT + 1, "max_position_embeddings": LENGTH, "eos_token_id": EOT}
    return config_class(text_config=text, vision_config=vision, **settings)


def tokenize(texts: list[str]) -> torch.Tensor:
    """Random tokens; a text of n characters ends at position n."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, EOT, (len(texts), LENGTH), generator=draw)
    for row, text in zip(tokens, texts, strict=True):
        row[len(text)] = EOT
        row[len(text) + 1 :] = 0
    return tokens


def clip_of(name: str) -> Clip:
    torch.manual_seed(1)
    model = BUILDERS[name]()
    towers = TransformersTowers(model) if name in ("CLIPModel", "SiglipModel") else OpenClipTowers(model)
    size = 32 if name == "timm" else 16
    preprocess = PreprocessCfg(size=size, mean=(0, 0, 0), std=(1, 1, 1))
    return Clip(name, towers, preprocess, tokenize, None, None)


def randomise(towers: nn.Module, seed: int = 2) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in towers.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def adapted(name: str, **settings) -> tuple[Clip, Clip]:
    """A CLIP as it is built, and the same with random adapters."""
    plain, clip = clip_of(name), clip_of(name)
    add_lora(clip, rank=RANK, alpha=ALPHA, **settings)
    randomise(clip.towers)
    return plain, clip


def inputs(clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(3, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(4))
    return pixels, clip.tokenize(["abc", "", "abcdefgh", "ab", "abcd"])


def embeddings(towers, pixels, tokens) -> list[torch.Tensor]:
    return [towers.encode_image(pixels), towers.encode_text(tokens), towers.encode_text_by_length(tokens)]


def same(got, want, atol: float = 2e-6) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def naive_weights(plain: nn.Module, towers: nn.Module) -> dict[str, torch.Tensor]:
    """W + alpha / rank * B A of every adapted weight under its plain name."""
    parameters, weights = dict(towers.named_parameters()), {}
    for name, a in parameters.items():
        if ".lora_A." not in name or not a.requires_grad:
            continue
        layer = name.partition(".lora_A.")[0].replace(".base_layer", "")
        is_attention = isinstance(plain.get_submodule(layer), nn.MultiheadAttention)
        key = f"{layer}.in_proj_weight" if is_attention else f"{layer}.weight"
        b, weight = parameters[name.replace("lora_A", "lora_B")], plain.get_parameter(key).detach()
        product = torch.einsum("or,ri...->oi...", b.flatten(1), a)  # a convolution's B has a 1 x 1 kernel
        weights[key] = weight + ALPHA / RANK * product
    return weights


# ---- the adapted function ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_the_model_starts_as_it_was_and_only_adapters_are_trainable(name):
    plain, clip = clip_of(name), clip_of(name)
    add_lora(clip, rank=RANK, alpha=ALPHA)
    for got, want in zip(embeddings(clip.towers, *inputs(clip)), embeddings(plain.towers, *inputs(clip)), strict=True):
        same(got, want)
    trainable = {key for key, parameter in clip.towers.named_parameters() if parameter.requires_grad}
    # peft holds adapters of the output projections of open_clip's attention, which stay zero
    assert trainable == {key for key in clip.towers.state_dict() if "lora_" in key and ".base_layer." not in key}
    assert all(not clip.towers.get_parameter(key).any() for key in clip.towers.state_dict() if ".lora_B." in key)
    layers = {key.partition(".lora_")[0] for key in trainable}
    assert len(layers) == LAYERS.get(name, 2 * 2 * 3)
    assert all(clip.towers.get_parameter(key).shape.count(RANK) == 1 for key in trainable)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_merged_model_is_a_plain_one_with_the_same_embeddings(name, training):
    plain, clip = adapted(name)
    before = copy.deepcopy(clip.towers.train(training).state_dict())
    single = merged(clip.towers)
    assert single.training == training and not hasattr(single.model, "peft_config")
    with torch.set_grad_enabled(training):  # without gradients, attention has another kernel
        first = embeddings(plain.towers.train(training), *inputs(clip))
        want = embeddings(clip.towers, *inputs(clip))
        for far, own, got in zip(first, want, embeddings(single, *inputs(clip)), strict=True):
            same(got, own)
            assert (far - own).abs().max() > 0.01
    state, weights = plain.towers.state_dict(), naive_weights(plain.towers, clip.towers)
    assert [type(module) for module in single.modules()] == [type(module) for module in plain.towers.modules()]
    assert list(single.state_dict()) == list(state) and weights
    for key, tensor in single.state_dict().items():
        assert tensor.dtype == state[key].dtype and tensor.shape == state[key].shape
        if key in weights:
            same(tensor, weights[key].detach())
        else:
            assert torch.equal(tensor, state[key]), key
    clip_of(name).towers.load_state_dict(single.state_dict(), strict=True)
    after = clip.towers.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["CLIP", "CLIPModel"])
def test_autocast_computes_adapters_of_attention_as_merged_weights(name, training):
    """Those of linear layers are products of their own, in bfloat16, and equal up to its rounding."""
    targets = ["attn"] if name == "CLIP" else ["fc1", "q_proj"]
    _, clip = adapted(name, targets=targets)
    single = merged(clip.towers.train(training))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
        got, want = embeddings(clip.towers, *inputs(clip)), embeddings(single, *inputs(clip))
        again = merged(clip.towers)
    for adapted_rows, rows in zip(got, want, strict=True):
        assert adapted_rows.dtype == rows.dtype
        same(adapted_rows, rows, atol=0 if name == "CLIP" else 0.03)
    for tensor, merged_outside in zip(again.parameters(), single.parameters(), strict=True):
        assert torch.equal(tensor, merged_outside)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("name", BUILDERS)
def test_adapters_have_the_gradient_of_their_formula_and_nothing_else_has_one(name, checkpointing):
    plain, clip = adapted(name)
    student = Student(clip.towers, embed_dim=16)
    adapters = {key: p for key, p in clip.towers.named_parameters() if p.requires_grad}
    if checkpointing and isinstance(clip.towers, OpenClipTowers):
        clip.towers.model.set_grad_checkpointing()
    elif checkpointing:
        clip.towers.model.gradient_checkpointing_enable()

    def loss(outputs):
        return outputs["image"][0] @ outputs["text"].T @ torch.linspace(-1, 2, 5) + outputs["image"][:, 0].sum()

    got_loss = loss(student.train()(*inputs(clip)))
    got_loss.backward()
    weights = {f"towers.{key}": weight for key, weight in naive_weights(plain.towers, clip.towers).items()}
    plain_student = Student(plain.towers, embed_dim=16).train()
    want_loss = loss(functional_call(plain_student, weights, inputs(clip)))
    want = torch.autograd.grad(want_loss, list(adapters.values()))
    same(got_loss, want_loss, atol=1e-5)
    for (key, parameter), gradient in zip(adapters.items(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=key)
        assert gradient.abs().max() > 0
    assert all(p.grad is None for p in student.parameters() if not p.requires_grad)
    assert adapters and all("lora_" in key for key in adapters)


def test_training_leaves_every_frozen_weight_as_it_was():
    """peft's own attention adds the adapters to its weights and subtracts them, with other rounding in every step."""
    plain, clip = adapted("CLIP")
    student = Student(clip.towers, embed_dim=16).train()
    frozen = {key: p for key, p in student.named_parameters() if not p.requires_grad}
    trained = [p for p in student.parameters() if p.requires_grad]
    before = {key: p.clone() for key, p in student.named_parameters()}
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for _ in range(5):
        student(*inputs(clip))["image"].sum().backward()
        student(*inputs(clip))["text"].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(student.named_parameters())
    assert all(after[key] is p and torch.equal(p, before[key]) for key, p in frozen.items())
    assert all(not torch.equal(p, before[key]) for key, p in after.items() if p.requires_grad)
    assert {key.replace(".base_layer", "") for key in frozen if "lora_" not in key} == {
        f"towers.{key}" for key, _ in plain.towers.named_parameters()
    }


def test_copies_and_moving_averages_have_adapters_of_their_own():
    plain, clip = adapted("CLIP")
    student = Student(clip.towers, embed_dim=16).eval()
    average, mean = moving_average(student, 0.5), None
    for seed in (1, 2, 3):
        randomise(clip.towers, seed)
        average.update_parameters(student)
        now = {key: p.clone() for key, p in student.named_parameters()}
        mean = now if mean is None else {key: 0.5 * mean[key] + 0.5 * now[key] for key in now}
    for key, parameter in average.module.named_parameters():
        same(parameter, mean[key], atol=1e-6 if parameter.requires_grad else 0)
    rows = student(*inputs(clip))["text"]
    copied = copy.deepcopy(student)
    same(copied(*inputs(clip))["text"], rows)
    averaged = average.module(*inputs(clip))["text"]
    same(merged(average.module.towers).encode_text_by_length(inputs(clip)[1]), averaged)
    randomise(copied, seed=5)
    same(student(*inputs(clip))["text"], rows, atol=0)
    assert (averaged - rows).abs().max() > 0.01
    assert (copied(*inputs(clip))["text"] - rows).abs().max() > 0.01


def gradients(rank, world_size):
    """Of every adapter after a step, from this rank's rows, averaged over the ranks; SigLIP's has the most layers."""
    results = []
    for name in ("CLIP", "SiglipModel"):
        _, clip = adapted(name)
        student = Student(clip.towers, embed_dim=16)
        model = DistributedDataParallel(student) if world_size > 1 else student
        pixels, tokens = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(6)), tokenize(["ab"] * 4)
        own = slice(4 * rank // world_size, 4 * (rank + 1) // world_size)
        for _ in range(2):  # DDP refuses a second step if a parameter had no gradient in the first
            student.zero_grad()
            output = model(pixels[own], tokens[own])
            (output["image"] * output["text"]).sum(1).mean().backward()
        results.append({key: p.grad for key, p in student.named_parameters() if p.requires_grad})
    return results


def test_every_adapter_has_a_gradient_on_two_processes():
    whole, ranks = gradients(0, 1), run_ranks(gradients, 2)
    for position, want in enumerate(whole):
        for got in (results[position] for results in ranks):
            assert got.keys() == want.keys() and all(gradient is not None for gradient in got.values())
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-6)


# ---- peft's folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIP", "timm", "CLIPModel"])
def test_peft_loads_the_adapters_onto_the_plain_model(name, tmp_path):
    plain, clip = adapted(name)
    save_adapters(clip.towers, tmp_path / "adapters", base="org/student")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("org/student", RANK, ALPHA)
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    stored = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(stored) == sum("lora_" in key for key in clip.towers.state_dict())
    loaded = PeftModel.from_pretrained(plain.towers.model, str(tmp_path / "adapters")).base_model.model
    same_class = type(clip.towers)(loaded)
    for got, want in zip(embeddings(same_class, *inputs(clip)), embeddings(clip.towers, *inputs(clip)), strict=True):
        same(got, want)
    assert clip.towers.model.peft_config["default"].inference_mode is False  # training goes on


# ---- targets -----------------------------------------------------------------------------------------------------


def layers_with_adapters(clip: Clip) -> set[str]:
    names = {key.partition(".lora_")[0] for key in clip.towers.model.state_dict() if "lora_" in key}
    return {name for name in names if ".base_layer." not in name}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("CLIP", {"targets": ["transformer.resblocks.0.attn"]}, {"transformer.resblocks.0.attn"}),
        (
            "CLIP",
            {"targets": ["resblocks.1.attn", "visual.conv1"]},
            {"transformer.resblocks.1.attn", "visual.transformer.resblocks.1.attn", "visual.conv1"},
        ),
        (
            "CLIP",
            {"targets": ["c_fc"], "sides": ["text"]},
            {"transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.1.mlp.c_fc"},
        ),
        (
            "timm",
            {"targets": ["blocks.3.attn.qkv", "head.proj"]},
            {"visual.trunk.blocks.3.attn.qkv", "visual.head.proj"},
        ),
        (
            "SiglipModel",
            {"targets": ["head.attention", "out_proj"], "sides": ["image"]},
            {"vision_model.head.attention", *(f"vision_model.encoder.layers.{n}.self_attn.out_proj" for n in (0, 1))},
        ),
        ("CLIPModel", {"targets": ["text_projection", "text_projection"]}, {"text_projection"}),
    ],
)
def test_targets_are_full_names_or_their_ends(name, settings, expected, tmp_path):
    plain, clip = adapted(name, **settings)
    assert layers_with_adapters(clip) == expected
    rows, single = embeddings(clip.towers, *inputs(clip)), merged(clip.towers)
    save_adapters(clip.towers, tmp_path, base="plain")
    loaded = type(clip.towers)(PeftModel.from_pretrained(plain.towers.model, str(tmp_path)).base_model.model)
    for want, *others in zip(rows, embeddings(single, *inputs(clip)), embeddings(loaded, *inputs(clip)), strict=True):
        for got in others:
            same(got, want)
    sum(row.sum() for row in rows).backward()
    assert all(p.grad is not None for p in clip.towers.parameters() if p.requires_grad)


def test_default_targets_of_one_side_leave_the_other_without_adapters():
    _, clip = adapted("CLIP", sides=["image"])
    assert {name.split(".")[0] for name in layers_with_adapters(clip)} == {"visual"}
    assert {name.split(".")[-1] for name in layers_with_adapters(clip)} == {"attn", "c_fc", "c_proj"}


def test_convolutions_have_adapters_by_name():
    clip = load_clip("emoji-student")
    with pytest.raises(UserError, match="the image tower of emoji-student has no linear .*, from conv1, conv2, conv3"):
        add_lora(clip, rank=2, alpha=ALPHA)
    for module in clip.towers.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts residual branches with zeros
    plain = copy.deepcopy(clip.towers)
    add_lora(clip, rank=RANK, alpha=ALPHA, targets=["conv1", "conv2"])
    randomise(clip.towers)
    pixels = torch.rand(2, 3, clip.image_size, clip.image_size)
    clip.towers.eval()
    rows, single = clip.towers.encode_image(pixels), merged(clip.towers)
    same(single.encode_image(pixels), rows, atol=1e-5)
    assert (plain.eval().encode_image(pixels) - rows).abs().max() > 0.01
    weights = naive_weights(plain, clip.towers)
    assert weights and all(".conv" in key for key in weights)
    for key, weight in weights.items():
        torch.testing.assert_close(single.get_parameter(key), weight.detach(), rtol=1e-4, atol=1e-5)


def test_targets_without_effect_are_refused_in_one_line():
    """`out_proj` of torch's attention and the layers of a ResNet's pooling are never called: their weights are read."""
    resnet = open_clip.CLIP(16, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8}, TEXT)
    pooled = Clip("RN", OpenClipTowers(resnet), PreprocessCfg(size=32), tokenize, None, None)
    for clip, target, ends in (
        (clip_of("CLIP"), "ln_1", "attn, c_fc, c_proj, conv1"),
        (clip_of("CLIP"), "attn.out_proj", "attn, c_fc, c_proj, conv1"),
        (clip_of("CLIP"), "ttn", "attn, c_fc, c_proj, conv1"),
        (pooled, "attnpool.c_proj", "attn, c_fc, c_proj, conv1, conv2, conv3"),
    ):
        with pytest.raises(
            UserError, match=f"--lora-targets '{target}' names no layer of .*: .* such as {ends}$"
        ) as caught:
            add_lora(clip, rank=RANK, alpha=ALPHA, targets=["attn", target])
        assert "\n" not in str(caught.value)
        assert all(p.requires_grad for p in clip.towers.parameters()) and not layers_with_adapters(clip)


def test_adapters_of_layers_that_peft_would_adapt_otherwise_are_refused():
    towers = clip_of("CLIP").towers
    for settings in ({"groups": 2}, {"dilation": 2, "padding": 4}, {"padding": 1, "padding_mode": "circular"}):
        towers.model.visual.ln_pre = nn.Sequential(nn.LayerNorm(32), Wide(**settings))
        clip = Clip("CLIP", towers, PreprocessCfg(size=16), tokenize, None, None)
        with pytest.raises(UserError, match="'ln_pre.1.conv' names no layer of CLIP that can have an adapter"):
            add_lora(clip, rank=4, alpha=ALPHA, targets=["ln_pre.1.conv"])


class Wide(nn.Module):
    """A convolution along tokens and channels."""

    def __init__(self, **settings):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, **settings)

    def forward(self, x):
        return x + self.conv(torch.stack([x, x], dim=1)).mean()


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_counts_the_parameters_of_every_part():
    _, clip = adapted("SiglipModel", targets=["q_proj"], sides=["text"])
    lines = trainable_table(Student(clip.towers, embed_dim=32, teacher_dims=[7], mapped=["image", "text"])).splitlines()
    counts = {line[:20].strip(): line[20:].split() for line in lines[1:]}
    image, text = (
        sum(p.numel() for p in part()) for part in (clip.towers.image_parameters, clip.towers.text_parameters)
    )
    lora, maps = 2 * RANK * (32 + 32), 2 * 7 * 32
    total = image + text + 2 + maps
    assert list(counts) == ["image tower", "text tower", "logit scale and bias", "maps", "all"]
    assert counts["image tower"] == [f"{image:,}", "0", "0.00"]
    assert counts["text tower"] == [f"{text:,}", f"{lora}", f"{100 * lora / text:.2f}"]
    assert counts["logit scale and bias"] == ["2", "0", "0.00"] and counts["maps"] == [f"{maps}", f"{maps}", "100.00"]
    assert counts["all"] == [f"{total:,}", f"{lora + maps}", f"{100 * (lora + maps) / total:.2f}"]
    one = trainable_table(OneTower(clip.towers, "text"))
    assert "maps" not in one and len({len(line) for line in one.splitlines()}) == 1
