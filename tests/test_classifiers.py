"""Classifiers: the zoo has mdistiller's parameters and logits; weights fit, or fail with one line."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gkl_vl.errors import UserError
from gkl_vl.models import weights
from gkl_vl.models.cifar_zoo import (
    ZOO,
    BasicBlock,
    Bottleneck,
    InvertedResidual,
    PaddedShortcut,
    ShuffleV1Block,
    ShuffleV2Block,
    ShuffleV2Down,
    WideBlock,
    _shuffle,
)
from gkl_vl.models.classifiers import CIFAR_MEAN_STD, IMAGENET_MEAN_STD, load_classifier, scaled

# Parameters and tensors of the state dict, for 100 classes, as mdistiller's own code builds them; the tables of CRD
# (Tian et al. 2020, appendix) have the first in millions: 0.28 for resnet20, 2.26 for wrn_40_2, 9.46 for vgg13.
COUNTS = {
    "resnet8": (83_892, 56),
    "resnet14": (181_108, 92),
    "resnet20": (278_324, 128),
    "resnet32": (472_756, 200),
    "resnet44": (667_188, 272),
    "resnet56": (861_620, 344),
    "resnet110": (1_736_564, 668),
    "resnet8x4": (1_233_540, 62),
    "resnet32x4": (7_433_860, 206),
    "wrn_16_1": (180_916, 82),
    "wrn_16_2": (703_284, 83),
    "wrn_40_1": (569_780, 226),
    "wrn_40_2": (2_255_156, 227),
    "vgg8": (3_965_028, 37),
    "vgg11": (9_277_284, 58),
    "vgg13": (9_462_180, 72),
    "vgg16": (14_774_436, 93),
    "vgg19": (20_086_692, 114),
    "MobileNetV2": (812_836, 320),
    "ShuffleV1": (949_258, 296),
    "ShuffleV2": (1_355_528, 338),
    "ResNet50": (23_705_252, 320),
    # the robustness literature has 46.16 and 36.48 million for the wide ones, 11.17 for the ResNet-18, for 10 classes
    "wrn_34_10": (46_218_164, 191),
    "wrn_28_10": (36_536_884, 155),
    "wrn_28_10_silu": (36_536_884, 155),
    "preact_resnet18": (11_218_340, 107),
    # USB's are its ViT-S/2 of 21.4 million and ViT-B/16 of 85.3; the semi-supervised literature has a WRN-28-2 of 1.5
    "vit_tiny_patch2_32": (5_410_084, 152),
    "vit_small_patch2_32": (21_436_900, 152),
    "vit_base_patch16_96": (85_752_676, 152),
    "wrn_28_2": (1_479_220, 155),
    # He et al. 2016, table 6, has 0.27, 0.46, 0.66, 0.85 and 1.7 million for 10 classes
    "resnet20_a": (275_572, 116),
    "resnet32_a": (470_004, 188),
    "resnet44_a": (664_436, 260),
    "resnet56_a": (858_868, 332),
    "resnet110_a": (1_733_812, 656),
}

# Shapes where the families differ: heads, shortcuts, strided blocks, groups.
SHAPES = {
    "resnet20": {
        "conv1.weight": (16, 3, 3, 3),
        "layer2.0.conv1.weight": (32, 16, 3, 3),
        "layer2.0.downsample.0.weight": (32, 16, 1, 1),
        "layer2.0.downsample.1.running_var": (32,),
        "layer3.2.bn2.num_batches_tracked": (),
        "fc.weight": (100, 64),
    },
    "resnet8x4": {
        "conv1.weight": (32, 3, 3, 3),
        "layer1.0.downsample.0.weight": (64, 32, 1, 1),
        "fc.weight": (100, 256),
    },
    "resnet56_a": {"layer2.0.conv1.weight": (32, 16, 3, 3), "layer3.8.bn2.weight": (64,), "linear.bias": (100,)},
    "wrn_16_2": {
        "conv1.weight": (16, 3, 3, 3),
        "block1.layer.0.bn1.weight": (16,),
        "block1.layer.0.convShortcut.weight": (32, 16, 1, 1),
        "block3.layer.1.conv2.weight": (128, 128, 3, 3),
        "bn1.running_mean": (128,),
        "fc.weight": (100, 128),
    },
    "vgg13": {
        "block0.0.weight": (64, 3, 3, 3),
        "block0.3.bias": (64,),
        "block4.4.running_mean": (512,),
        "classifier.weight": (100, 512),
    },
    "MobileNetV2": {
        "conv1.0.weight": (16, 3, 3, 3),
        "blocks.0.0.conv.0.weight": (16, 16, 1, 1),
        "blocks.1.0.conv.3.weight": (48, 1, 3, 3),
        "blocks.6.0.conv.6.weight": (160, 480, 1, 1),
        "conv2.0.weight": (1280, 160, 1, 1),
        "classifier.0.weight": (100, 1280),
    },
    "ShuffleV1": {
        "conv1.weight": (24, 3, 1, 1),
        "layer1.0.conv1.weight": (54, 24, 1, 1),
        "layer1.0.conv3.weight": (216, 18, 1, 1),
        "layer2.0.conv1.weight": (60, 80, 1, 1),
        "layer2.7.conv2.weight": (120, 1, 3, 3),
        "linear.weight": (100, 960),
    },
    "ShuffleV2": {
        "conv1.weight": (24, 3, 1, 1),
        "layer1.0.conv1.weight": (24, 1, 3, 3),
        "layer1.0.conv5.weight": (58, 58, 1, 1),
        "layer2.7.conv1.weight": (116, 116, 1, 1),
        "conv2.weight": (1024, 464, 1, 1),
        "bn2.weight": (1024,),
        "linear.weight": (100, 1024),
    },
    "ResNet50": {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.0.shortcut.0.weight": (256, 64, 1, 1),
        "layer4.0.conv2.weight": (512, 512, 3, 3),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "linear.weight": (100, 2048),
    },
}


# The first logits of one image from mdistiller's own modules, with the weights of `fill_with_waves`.
LOGITS = {
    "resnet8x4": [-0.809907, 0.10566, 0.3719, -0.56615],
    "wrn_16_2": [-0.12444, 0.0466467, 0.188156, 0.159637],
    "vgg13": [0.349458, -0.294966, 0.0814089, 0.0425921],
    "MobileNetV2": [-0.565385, 0.18156, 0.886626, 0.932069],
    "ShuffleV1": [0.223649, -1.67098, -1.29022, 1.18608],
    "ShuffleV2": [-0.611467, -0.543176, -0.299535, -0.604441],
    "ResNet50": [1.06839, -0.910699, -1.60023, -0.0291865],
}


def empty(name: str, num_classes: int = 100) -> nn.Module:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return ZOO[name](num_classes)


# ---- the zoo


def test_every_model_of_the_zoo_has_its_counts():
    built = {name: empty(name) for name in ZOO}
    assert COUNTS == {
        name: (sum(p.numel() for p in model.parameters()), len(model.state_dict())) for name, model in built.items()
    }


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_have_mdistillers_names(name):
    state = empty(name).state_dict()
    assert {key: tuple(state[key].shape) for key in SHAPES[name]} == SHAPES[name]


SMALL = ["resnet8", "resnet20_a", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "preact_resnet18"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("n", [1, 3])
def test_logits_have_a_row_per_image(name, n):
    classifier = load_classifier(name, num_classes=7)
    logits = classifier.model(classifier.prepare(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)))
    assert logits.shape == (n, 7) and logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad is not None for p in classifier.model.parameters())


@pytest.mark.parametrize(
    "name, shape",
    [
        ("resnet110", (64, 8, 8)),
        ("resnet32x4", (256, 8, 8)),
        ("resnet56_a", (64, 8, 8)),
        ("wrn_40_2", (128, 8, 8)),
        ("vgg19", (512, 4, 4)),
        ("MobileNetV2", (1280, 2, 2)),
        ("ShuffleV1", (960, 4, 4)),
        ("ShuffleV2", (1024, 4, 4)),
        ("ResNet50", (2048, 4, 4)),
    ],
)
def test_the_last_feature_map_has_mdistillers_size(name, shape):
    features = empty(name)[:-2]
    assert features(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, *shape)


def test_prepare_and_on_pixels_agree():
    classifier = load_classifier("resnet8", num_classes=4)
    classifier.model.eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    expected = classifier.model(classifier.prepare(images))
    torch.testing.assert_close(classifier.on_pixels()(scaled(images)), expected)
    assert scaled(images).is_contiguous(memory_format=torch.channels_last)
    assert classifier.on_pixels().state_dict().keys() == {f"model.{key}" for key in classifier.model.state_dict()}


def test_a_wide_resnet_with_silu_uses_it_everywhere():
    model = ZOO["wrn_28_10_silu"](10)
    assert not any(isinstance(module, torch.nn.ReLU) for module in model.modules())
    assert all(isinstance(m.activation, torch.nn.SiLU) for m in model.modules() if isinstance(m, WideBlock))


def waves(shape: torch.Size, index: int) -> torch.Tensor:
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * (1 + index % 7) + index).view(shape)


@torch.no_grad()
def fill_with_waves(model: nn.Module) -> nn.Module:
    """Deterministic weights without a random generator, in float64, so that rounding is far below the tolerance."""
    for index, (key, value) in enumerate(model.double().eval().state_dict().items()):
        if key.endswith("running_var"):
            value.copy_(1 + waves(value.shape, index) / 2)
        elif value.dim() == 1:  # norms and biases
            value.copy_(float(key.endswith("weight")) + waves(value.shape, index) / 5)
        elif value.dim() > 1:
            value.copy_(waves(value.shape, index) * math.sqrt(4 / math.prod(value.shape[1:])))
    return model


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_mdistillers(name):
    model = fill_with_waves(ZOO[name](100))
    logits = model(waves(torch.Size([1, 3, 32, 32]), 0))[0, :4]
    assert logits.tolist() == pytest.approx(LOGITS[name], rel=1e-4, abs=1e-6)


def test_convolutions_have_he_initialisation():
    for name, key, fan in [("resnet8", "layer3.0.conv2.weight", 64 * 9), ("vgg8", "block2.0.weight", 256 * 9)]:
        weight = ZOO[name](10).state_dict()[key]
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.03)
    # fan_in, not fan_out, where the two differ
    weight = ZOO["resnet20_a"](10).state_dict()["layer3.0.conv1.weight"]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.03)


def test_heads_are_initialised_as_mdistillers():
    vgg, wide = ZOO["vgg8"](100).state_dict(), ZOO["wrn_16_1"](100).state_dict()
    assert vgg["classifier.weight"].std().item() == pytest.approx(0.01, rel=0.03)
    assert not vgg["classifier.bias"].any() and not vgg["block0.0.bias"].any() and not wide["fc.bias"].any()
    assert ZOO["resnet8"](100).state_dict()["fc.bias"].any()


# ---- blocks of the zoo: with the last convolution set to zero, only the other path remains

X = torch.randn(2, 24, 6, 6, generator=torch.Generator().manual_seed(1))


def set_to_zero(convolution: nn.Conv2d) -> None:
    nn.init.zeros_(convolution.weight)


def test_option_a_takes_every_second_pixel_and_pads_with_zero_channels():
    expected = torch.zeros(2, 48, 3, 3)
    for channel in range(24):
        for row in range(3):
            for column in range(3):
                expected[:, 12 + channel, row, column] = X[:, channel, 2 * row, 2 * column]
    assert torch.equal(PaddedShortcut(24, 48, stride=2)(X), expected)


def test_a_residual_block_activates_the_sum():
    basic = BasicBlock(24, 48, stride=2, shortcut=PaddedShortcut)
    set_to_zero(basic.conv2)
    assert torch.equal(basic(X), F.relu(PaddedShortcut(24, 48, stride=2)(X)))
    bottleneck = Bottleneck(24, 24, stride=1)
    set_to_zero(bottleneck.conv3)
    assert torch.equal(bottleneck(X), F.relu(X))


def test_a_wide_block_projects_the_activated_input_and_adds_the_plain_one():
    same = WideBlock(24, 24, stride=1, activation=F.relu)
    set_to_zero(same.conv2)
    assert torch.equal(same(X), X)
    other = WideBlock(24, 32, stride=2, activation=F.relu)
    set_to_zero(other.conv2)
    expected = F.conv2d(F.relu(other.bn1(X)), other.convShortcut.weight, stride=2)
    assert torch.allclose(other(X), expected, atol=1e-6)


def test_an_inverted_residual_adds_only_where_it_fits():
    same, strided = InvertedResidual(24, 24, stride=1, expand=6), InvertedResidual(24, 24, stride=2, expand=6)
    set_to_zero(same.conv[6])
    set_to_zero(strided.conv[6])
    assert torch.equal(same(X), X)
    assert not strided(X).any()


def test_shufflenet_pools_the_concatenated_input():
    down, same = ShuffleV1Block(24, 60, stride=2), ShuffleV1Block(24, 24, stride=1)
    set_to_zero(down.conv3)
    set_to_zero(same.conv3)
    assert torch.equal(same(X), F.relu(X))
    out = down(X)
    assert not out[:, :36].any()
    assert torch.equal(out[:, 36:], F.relu(F.avg_pool2d(X, 3, stride=2, padding=1)))


def test_shufflenet_shuffles_its_groups():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert _shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(_shuffle(X, 2), nn.ChannelShuffle(2)(X))


def test_shufflenet_v2_passes_half_of_its_channels():
    block = ShuffleV2Block(24)
    set_to_zero(block.conv3)
    out = block(X)
    assert torch.equal(out[:, ::2], X[:, :12]) and not out[:, 1::2].any()
    down = ShuffleV2Down(24, 60)
    set_to_zero(down.conv2)
    out = down(X)
    assert out.shape == (2, 60, 3, 3) and not out[:, ::2].any() and out[:, 1::2].any()


# ---- images


def test_images_are_scaled_and_normalised_for_the_model():
    classifier = load_classifier("resnet8", num_classes=10)
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8)
    pixels = classifier.prepare(images)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    for channel, (mean, std) in enumerate(zip(*CIFAR_MEAN_STD, strict=True)):
        assert torch.allclose(pixels[:, channel], (images[:, channel] / 255 - mean) / std, atol=1e-6)
    plain = replace(classifier, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert torch.allclose(plain.prepare(images) * 255, images.float())


@pytest.mark.parametrize(
    "name, mean_std",
    [
        ("resnet8", CIFAR_MEAN_STD),
        ("resnet20_a", IMAGENET_MEAN_STD),
        ("torchvision:squeezenet1_1", IMAGENET_MEAN_STD),
        ("timm:test_resnet", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
        ("timm:resnet18", IMAGENET_MEAN_STD),
        ("timm:test_resnet.r160_in1k", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    ],
)
def test_a_name_loads_its_model_and_its_normalisation(name, mean_std):
    classifier = load_classifier(name, num_classes=5)
    assert (classifier.mean, classifier.std) == mean_std
    assert (classifier.name, classifier.num_classes) == (name, 5)
    classifier.model.eval()
    with torch.no_grad():
        assert classifier.model(classifier.prepare(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))).shape == (1, 5)


def test_timm_has_the_students_and_teachers_for_imagenet():
    assert {"mobilenetv1_100", "resnext101_32x4d", "resnet50", "resnet34", "resnet18"} <= set(timm.list_models())


# ---- weights that fit


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def source() -> nn.Module:
    """A model all of whose tensors, batch counts included, differ from those of a new one."""
    model = ZOO["resnet8"](10)
    model(torch.randn(4, 3, 32, 32))
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 240, "model": state, "accuracy": torch.tensor(72.3), "optimizer": {}},  # mdistiller's
        lambda state: {"model": state},  # its students'
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "best_prec1": 91.0},
        lambda state: state,
    ],
)
@pytest.mark.parametrize("file", ["ckpt_epoch_240.pth", "student_best"])
def test_a_checkpoint_loads_however_it_is_wrapped(tmp_path, source, wrap, file):
    torch.save(wrap(source.state_dict()), tmp_path / file)
    loaded = load_classifier("resnet8", num_classes=10, weights=str(tmp_path / file), allow_pickle=True)
    assert same_weights(loaded.model, source)


def test_safetensors_load_without_allow_pickle_and_without_batch_counts(tmp_path, source):
    state = source.state_dict()
    save_file(state, tmp_path / "all.safetensors")
    assert same_weights(load_classifier("resnet8", num_classes=10, weights=f"{tmp_path}/all.safetensors").model, source)
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    loaded = load_classifier("resnet8", num_classes=10, weights=f"{tmp_path}/old.safetensors").model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in old.items())


def test_weights_from_a_file_go_into_every_library(tmp_path):
    for name, model in [
        ("timm:test_resnet", timm.create_model("test_resnet", num_classes=4)),
        ("torchvision:squeezenet1_1", torchvision.models.get_model("squeezenet1_1", num_classes=4)),
    ]:
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        loaded = load_classifier(name, num_classes=4, weights=f"{tmp_path}/w.safetensors")
        assert same_weights(loaded.model, model)


def test_weights_of_other_classes_can_be_fine_tuned_under_a_new_head(tmp_path, source):
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    loaded = load_classifier("resnet8", num_classes=3, weights=f"{tmp_path}/w.pth", new_head=True, allow_pickle=True)
    state = loaded.model.state_dict()
    assert state["fc.weight"].shape == (3, 64)
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items() if key[:3] != "fc.")
    torch.save({"fc.weight": torch.ones(3, 64)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="do not fit 'resnet8': .* missing"):
        load_classifier("resnet8", num_classes=3, weights=f"{tmp_path}/part.pth", new_head=True, allow_pickle=True)


def test_a_vit_interpolates_positions_and_ignores_other_heads(tmp_path):
    """For MAE's ViT-B/16 of 224 px in USB's of 96 px, and for USB's weights, which have an mlp besides the head."""
    trained = VisionTransformer(img_size=64, patch_size=2, embed_dim=192, num_heads=3, num_classes=1000)
    weights = {key: torch.randn_like(value) for key, value in trained.state_dict().items()}
    torch.save({"model": weights | {"mlp.0.weight": torch.ones(4, 4)}}, tmp_path / "w.pth")
    flags = {"weights": f"{tmp_path}/w.pth", "allow_pickle": True}
    state = load_classifier("vit_tiny_patch2_32", num_classes=10, new_head=True, **flags).model.state_dict()
    assert state["pos_embed"].shape == (1, 257, 192) and state["head.weight"].shape == (10, 192)
    assert torch.equal(state["blocks.3.attn.qkv.weight"], weights["blocks.3.attn.qkv.weight"])
    assert torch.equal(state["pos_embed"][:, 0], weights["pos_embed"][:, 0])
    with pytest.raises(UserError, match="do not fit"):
        load_classifier("vit_tiny_patch2_32", num_classes=10, **flags)


def test_torchvisions_own_weights_load(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = torchvision.models.get_model("squeezenet1_1")
    url = torchvision.models.get_model_weights("squeezenet1_1")["DEFAULT"].url
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(model.state_dict(), cached)
    loaded = load_classifier("torchvision:squeezenet1_1", num_classes=1000, weights="pretrained")
    assert same_weights(loaded.model, model)


# ---- weights that do not fit


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("fc.bias"), r"do not fit 'resnet8': 1 missing \(fc.bias\): take"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\): take"),
        (lambda s: [s.pop(k) for k in list(s) if "bn" in k], r"28 missing \(bn1.weight, bn1.bias, [\w.]*, \.\.\.\)"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(16, 1, 3, 3)}),
            r"1 of another shape \(conv1.weight has \[16, 1, 3, 3\], not \[16, 3, 3, 3\]\)",
        ),
        (
            lambda s: (s.pop("fc.bias"), s.update({"fc.weight": torch.zeros(7, 64), "linear.bias": torch.zeros(7)})),
            r"1 missing \(fc.bias\); 1 unexpected \(linear.bias\); 1 of another shape \(fc.weight has \[7, 64\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(tmp_path, source, change, message):
    state = source.state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load_classifier("resnet8", num_classes=10, weights=str(tmp_path / "w.safetensors"))
    assert "\n" not in str(caught.value)


def test_weights_for_other_classes_are_named(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w.safetensors' are for 10 classes, the data has 100: take other weights"):
        load_classifier("resnet8", num_classes=100, weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["timm:test_resnet.r160_in1k", "torchvision:squeezenet1_1"])
def test_pretrained_weights_are_for_their_own_classes(name):
    with pytest.raises(UserError, match=f"pretrained weights of {name} are for 1000 classes, the data has 10: take"):
        load_classifier(name, num_classes=10, weights="pretrained")


@pytest.mark.parametrize("name", ["timm:test_resnet.r160_in1k", "torchvision:squeezenet1_1"])
def test_pretrained_weights_that_cannot_be_fetched_are_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{name} could not be .*connect, or give the path of a downloaded file"):
        load_classifier(name, num_classes=1000, weights="pretrained")


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("resnet21", None, "unknown classifier 'resnet21': the nearest names are resnet[^:]*, or write timm:NAME, tor"),
        ("resnet50", None, "the nearest names are ResNet50, "),
        ("xyzzy", None, "unknown classifier 'xyzzy': no similar name, or write timm:NAME"),
        ("tim:resnet18", None, "unknown prefix 'tim' of classifier 'tim:resnet18': write timm:NAME"),
        ("timm:resnet19", None, "timm has no model 'resnet19': the nearest names are resnet18"),
        ("timm:resnet18.a1_in1j", None, "timm has no model .*: the nearest names are resnet18.a1_in1k"),
        ("torchvision:resnet19", None, "torchvision has no classifier 'resnet19': the nearest names are resnet18"),
        ("torchvision:googlenet", None, "torchvision has no classifier 'googlenet'"),
        ("torchvision:fcn_resnet50", None, "torchvision has no classifier 'fcn_resnet50'"),
        ("resnet8", "pretrained", "'resnet8' has no pretrained weights: give the path"),
        ("resnet8", "nowhere.pth", "weights 'nowhere.pth' are no file: give the path"),
        (
            "local-dir:nowhere",
            None,
            "'nowhere' holds no config.json: name a folder exported by this package or in timm's",
        ),
        ("local-dir:nowhere", "w.pth", "weights 'w.pth' do not go with 'local-dir:nowhere', which carries its own"),
        ("hf-hub:org/repo", None, "repository 'org/repo' could not be fetched .* check the name and the connection"),
    ],
)
def test_user_errors_are_one_line(name, weights, message):
    with pytest.raises(UserError, match=message) as caught:
        load_classifier(name, num_classes=10, weights=weights)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_needs_allow_pickle_and_is_never_executed(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol=2))
    with pytest.raises(UserError, match="w.pth is a pickle, not safetensors: convert it, or pass --allow-pickle"):
        load_classifier("resnet8", num_classes=10, weights=str(path))
    with pytest.raises(UserError, match="w.pth' cannot be read: it holds .*, which could run code: save"):
        load_classifier("resnet8", num_classes=10, weights=str(path), allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_files_without_a_state_dict_are_refused(tmp_path):
    for stored in ([1, 2], {}, {"model": {"fc.weight": 3}}):
        torch.save(stored, tmp_path / "w.pth")
        with pytest.raises(UserError, match="w.pth' hold no state dict, plain or under 'model' or 'state_dict'"):
            load_classifier("resnet8", num_classes=10, weights=str(tmp_path / "w.pth"), allow_pickle=True)
    (tmp_path / "w.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="w.safetensors' cannot be read: the file is cut off or damaged"):
        load_classifier("resnet8", num_classes=10, weights=str(tmp_path / "w.safetensors"))


# ---- folders in timm's Hub format


@pytest.fixture
def folder(tmp_path) -> Path:
    model = timm.create_model("test_resnet", num_classes=4)
    save_for_hf(
        model, str(tmp_path / "m"), safe_serialization="both", model_config={"pretrained_cfg": {"std": [1.0] * 3}}
    )
    return tmp_path / "m"


def test_a_folder_in_timms_format_gives_model_weights_and_normalisation(folder):
    classifier = load_classifier(f"local-dir:{folder}", num_classes=4)
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same_weights(classifier.model, reference)
    assert (classifier.mean, classifier.std) == ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))


def test_the_hub_is_a_folder_fetched_without_pickles(folder, monkeypatch):
    patterns = []
    monkeypatch.setattr(
        weights, "snapshot_download", lambda repo, allow_patterns: patterns.append(allow_patterns) or str(folder)
    )
    for allow in (False, True):
        classifier = load_classifier("hf-hub:org/repo", num_classes=4, allow_pickle=allow)
        assert same_weights(classifier.model, load_classifier(f"local-dir:{folder}", num_classes=4).model)
    assert patterns == [["config.json", "model.safetensors"], ["config.json", "model.safetensors", "pytorch_model.bin"]]


def test_a_folder_is_for_its_own_classes(folder):
    with pytest.raises(UserError, match="model.safetensors' are for 4 classes, the data has 10"):
        load_classifier(f"local-dir:{folder}", num_classes=10)


def test_only_a_folder_stores_the_number_of_classes(folder):
    assert load_classifier(f"local-dir:{folder}").num_classes == 4
    for name in ("resnet8", "timm:test_resnet"):
        with pytest.raises(UserError, match=f"'{name}' needs the number of classes"):
            load_classifier(name)


def test_an_exported_folder_gives_a_model_of_the_zoo(tmp_path, source):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    config = {"library": "gkl-vl", "architecture": "resnet8", "num_classes": 10, "mean": mean, "std": std}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    classifier = load_classifier(f"local-dir:{tmp_path}")
    assert same_weights(classifier.model, source)
    assert (classifier.mean, classifier.std, classifier.num_classes) == (mean, std, 10)


def test_a_folder_of_pickles_needs_allow_pickle(folder):
    whole = load_classifier(f"local-dir:{folder}", num_classes=4).model
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle, not safetensors"):
        load_classifier(f"local-dir:{folder}", num_classes=4)
    assert same_weights(load_classifier(f"local-dir:{folder}", num_classes=4, allow_pickle=True).model, whole)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no weights: expected model.safetensors"):
        load_classifier(f"local-dir:{folder}", num_classes=4)


@pytest.mark.parametrize("text", ["{", "{}", json.dumps({"architecture": "test_resnot"})])
def test_a_config_that_names_no_model_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json.? (of .* names no model that is known|is no JSON)"):
        load_classifier(f"local-dir:{folder}", num_classes=4)
