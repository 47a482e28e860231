"""Classifiers for small images: mdistiller's CIFAR models, He's CIFAR ResNets, wide and pre-activation ResNets, ViTs.

mdistiller's models are reimplemented from https://github.com/megvii-research/mdistiller (mdistiller/models/cifar) with
its model and parameter names, so that its checkpoints load unchanged. Most models are an `nn.Sequential` with named
layers. `ZOO` maps names to constructors.

Axis letters: n = images, c d = channels, C = classes, h w = pixels.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# ---- layers and blocks


def _conv(c: int, d: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, d, size, stride=stride, padding=size // 2, groups=groups, bias=False)


def _conv_bn_relu(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]


def _pool() -> nn.Module:
    """Global average pooling: [n c h w] -> [n c]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _projection_shortcut(c: int, d: int, *, stride: int) -> nn.Module:
    """Option B (He et al. 2016, section 4.2): the identity if the shape does not change, else a 1x1 convolution."""
    same_shape = stride == 1 and c == d
    return nn.Identity() if same_shape else nn.Sequential(_conv(c, d, 1, stride=stride), nn.BatchNorm2d(d))


def _padded_shortcut(c: int, d: int, *, stride: int) -> nn.Module:
    """Option A: the identity if the number of channels does not change, else `PaddedShortcut`. No parameters."""
    return nn.Identity() if c == d else PaddedShortcut(c, d, stride=stride)


class PaddedShortcut(nn.Module):
    """Option A (He et al. 2016, section 4.2): strided subsampling, and zero channels, half in front and half behind."""

    def __init__(self, c: int, d: int, *, stride: int):
        super().__init__()
        self.stride = stride
        self.extra = d - c

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions and a shortcut; ReLU after the sum."""

    def __init__(self, c: int, d: int, *, stride: int, shortcut: Callable[..., nn.Module]):
        super().__init__()
        self.conv1, self.bn1 = _conv(c, d, 3, stride=stride), nn.BatchNorm2d(d)
        self.conv2, self.bn2 = _conv(d, d, 3), nn.BatchNorm2d(d)
        self.downsample = shortcut(c, d, stride=stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """ResNet's block of 1x1, 3x3 and 1x1 convolutions and a shortcut; the inner width is a quarter of the output's."""

    def __init__(self, c: int, d: int, *, stride: int):
        super().__init__()
        width = d // 4
        self.conv1, self.bn1 = _conv(c, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride=stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, d, 1), nn.BatchNorm2d(d)
        self.shortcut = _projection_shortcut(c, d, stride=stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class WideBlock(nn.Module):
    """Wide ResNet's block: batch norm and activation before each convolution, none after the sum.

    A projection shortcut takes the activated input, an identity shortcut the input itself.
    """

    def __init__(self, c: int, d: int, *, stride: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.bn1, self.conv1 = nn.BatchNorm2d(c), _conv(c, d, 3, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(d), _conv(d, d, 3)
        self.projects = c != d
        self.convShortcut = _conv(c, d, 1, stride=stride) if self.projects else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        active = self.activation(self.bn1(x))
        out = self.conv2(self.activation(self.bn2(self.conv1(active))))
        return self.convShortcut(active if self.projects else x) + out


class PreActBlock(nn.Module):
    """`WideBlock` with ReLU, with the parameter names of the robustness literature's ResNet-18."""

    def __init__(self, c: int, d: int, *, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), _conv(c, d, 3, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(d), _conv(d, d, 3)
        self.projects = c != d
        self.shortcut = nn.Sequential(_conv(c, d, 1, stride=stride)) if self.projects else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return self.shortcut(active if self.projects else x) + out


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expansion, depthwise 3x3, linear 1x1 projection.

    As in mdistiller: ReLU, not ReLU6, and an expansion layer even where the factor is 1.
    """

    def __init__(self, c: int, d: int, *, stride: int, expand: int):
        super().__init__()
        wide = c * expand
        depthwise = _conv(wide, wide, 3, stride=stride, groups=wide)
        self.conv = nn.Sequential(
            *_conv_bn_relu(_conv(c, wide, 1)), *_conv_bn_relu(depthwise), _conv(wide, d, 1), nn.BatchNorm2d(d)
        )
        self.adds = stride == 1 and c == d

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        return x + self.conv(x) if self.adds else self.conv(x)


def _shuffle(x: Float[Tensor, "n c h w"], groups: int) -> Float[Tensor, "n c h w"]:
    """Channel shuffle, as in `nn.ChannelShuffle`."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleV1Block(nn.Module):
    """ShuffleNet's block: grouped 1x1 convolutions with a channel shuffle.

    With stride 2 the average-pooled input is concatenated instead of added.
    """

    def __init__(self, c: int, d: int, *, stride: int):
        super().__init__()
        added = d - c if stride == 2 else d  # output channels of the convolutions
        width = added // 4
        self.groups = 1 if c == 24 else 3  # the stem's 24 channels are too few to split
        self.conv1, self.bn1 = _conv(c, width, 1, groups=self.groups), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride=stride, groups=width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, added, 1, groups=3), nn.BatchNorm2d(added)
        self.stride = stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        out = _shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1) if self.stride == 2 else out + x)


class ShuffleV2Block(nn.Module):
    """ShuffleNetV2's block: convolves half of the channels, passes the other half through, and shuffles both."""

    def __init__(self, c: int):
        super().__init__()
        half = c // 2
        self.conv1, self.bn1 = _conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _conv(half, half, 3, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        left, right = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(right)))))
        return _shuffle(torch.cat([left, F.relu(self.bn3(self.conv3(out)))], 1), 2)


class ShuffleV2Down(nn.Module):
    """ShuffleNetV2's block with stride 2: two branches of all input channels, each with half of the output channels."""

    def __init__(self, c: int, d: int):
        super().__init__()
        half = d // 2
        self.conv1, self.bn1 = _conv(c, c, 3, stride=2, groups=c), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = _conv(c, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(c, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _conv(half, half, 3, stride=2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return _shuffle(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], 1), 2)


# ---- models

Layers = OrderedDict[str, nn.Module]
"""Named layers, the argument of an `nn.Sequential`."""


@torch.no_grad()
def _initialise(
    model: nn.Module, *, mode: Literal["fan_in", "fan_out"] = "fan_out", linear_std: float | None = None
) -> nn.Module:
    """He initialisation of the convolutions, and N(0, linear_std^2) of the linear layers; None = torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, nn.Linear) and linear_std is not None:
            module.weight.normal_(0, linear_std)
            module.bias.zero_()
    return model


def _stem(d: int, *, size: int = 3) -> Layers:
    return OrderedDict(conv1=_conv(3, d, size), bn1=nn.BatchNorm2d(d), relu=nn.ReLU())


def _stage(block: Callable[..., nn.Module], c: int, d: int, n: int, *, stride: int) -> nn.Sequential:
    """n blocks, of which the first changes the number of channels and the resolution."""
    return nn.Sequential(block(c, d, stride=stride), *(block(d, d, stride=1) for _ in range(n - 1)))


def _residual_stages(depth: int, widths: tuple[int, int, int, int], shortcut: Callable[..., nn.Module]) -> Layers:
    """A CIFAR ResNet without its classifier: a stem, three stages of (depth - 2) / 6 blocks, and pooling."""
    block, n = partial(BasicBlock, shortcut=shortcut), (depth - 2) // 6
    stem, one, two, three = widths
    layers = _stem(stem)
    layers["layer1"] = _stage(block, stem, one, n, stride=1)
    layers["layer2"] = _stage(block, one, two, n, stride=2)
    layers["layer3"] = _stage(block, two, three, n, stride=2)
    layers["pool"] = _pool()
    return layers


def _resnet(depth: int, widths: tuple[int, int, int, int], num_classes: int) -> nn.Module:
    layers = _residual_stages(depth, widths, _projection_shortcut)
    layers["fc"] = nn.Linear(widths[-1], num_classes)
    return _initialise(nn.Sequential(layers))


def _resnet_a(depth: int, num_classes: int) -> nn.Module:
    """He et al.'s CIFAR ResNet; parameter names and initialisation as in akamaster/pytorch_resnet_cifar10."""
    layers = _residual_stages(depth, (16, 16, 32, 64), _padded_shortcut)
    layers["linear"] = linear = nn.Linear(64, num_classes)
    nn.init.kaiming_normal_(linear.weight)
    return _initialise(nn.Sequential(layers), mode="fan_in")


def _resnet50(num_classes: int) -> nn.Module:
    """ImageNet's ResNet-50 with a stem for small images: 3x3, stride 1, no pooling."""
    layers = _stem(64)
    layers["layer1"] = _stage(Bottleneck, 64, 256, 3, stride=1)
    layers["layer2"] = _stage(Bottleneck, 256, 512, 4, stride=2)
    layers["layer3"] = _stage(Bottleneck, 512, 1024, 6, stride=2)
    layers["layer4"] = _stage(Bottleneck, 1024, 2048, 3, stride=2)
    layers |= {"pool": _pool(), "linear": nn.Linear(2048, num_classes)}
    return _initialise(nn.Sequential(layers))


def _preact_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 with pre-activation, as in csdongxian/AWP and locuslab/robust_overfitting. torch's initialisation.

    A batch norm precedes the pooling.
    """
    layers: Layers = OrderedDict(conv1=_conv(3, 64, 3))
    c = 64
    for i, d in enumerate((64, 128, 256, 512), start=1):
        layers[f"layer{i}"] = _stage(PreActBlock, c, d, 2, stride=1 if i == 1 else 2)
        c = d
    return nn.Sequential(
        layers | {"bn": nn.BatchNorm2d(c), "relu": nn.ReLU(), "pool": _pool(), "linear": nn.Linear(c, num_classes)}
    )


def _wrn(depth: int, widen: int, num_classes: int, *, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Wide ResNet with three stages of (depth - 4) / 6 blocks, named `block{i}.layer`.

    The WRN-28-2 of the semi-supervised literature has leaky ReLUs, as in `ZOO`, but also convolutions with bias and
    batch norms with momentum 0.001, which this one has not.
    """
    block = partial(WideBlock, activation=activation())
    layers: Layers = OrderedDict(conv1=_conv(3, 16, 3))
    c = 16
    for i, d in enumerate([16 * widen, 32 * widen, 64 * widen], start=1):
        blocks = _stage(block, c, d, (depth - 4) // 6, stride=1 if i == 1 else 2)
        layers[f"block{i}"] = nn.Sequential(OrderedDict(layer=blocks))
        c = d
    linear = nn.Linear(c, num_classes)
    nn.init.zeros_(linear.bias)
    layers |= {"bn1": nn.BatchNorm2d(c), "relu": activation(), "pool": _pool(), "fc": linear}
    return _initialise(nn.Sequential(layers))


def _vit(size: int, patch: int, width: int, num_classes: int) -> nn.Module:
    """timm's ViT of 12 blocks and heads of width 64, for small images. Loads the weights of USB's `vit_*_patch*_*`."""
    return VisionTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        num_heads=width // 64,
        drop_path_rate=0.2 if width > 192 else 0.1,
        num_classes=num_classes,
    )


def _vgg(convolutions: tuple[int, int, int, int, int], num_classes: int) -> nn.Module:
    """VGG with batch norm and one linear layer. Max pooling after the first three of five blocks, for 32 px."""
    layers: Layers = OrderedDict()
    c = 3
    for i, (d, n) in enumerate(zip((64, 128, 256, 512, 512), convolutions, strict=True)):
        block = []
        for _ in range(n):
            block += _conv_bn_relu(nn.Conv2d(c, d, 3, padding=1))
            c = d
        layers[f"block{i}"] = nn.Sequential(*block)
        if i < 3:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers |= {"pool4": _pool(), "classifier": nn.Linear(512, num_classes)}
    return _initialise(nn.Sequential(layers), linear_std=0.01)


def _mobilenet_v2(num_classes: int) -> nn.Module:
    """MobileNetV2 at half width except for the last convolution; the second stage has stride 1."""
    c = 16
    stem = nn.Sequential(*_conv_bn_relu(_conv(3, c, 3, stride=2)))
    stages = []
    plan = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    for expand, d, n, stride in plan:
        stages.append(_stage(partial(InvertedResidual, expand=expand), c, d, n, stride=stride))
        c = d
    last = nn.Sequential(*_conv_bn_relu(_conv(c, 1280, 1)))
    classifier = nn.Sequential(nn.Linear(1280, num_classes))
    layers: Layers = OrderedDict(conv1=stem, blocks=nn.Sequential(*stages), conv2=last)
    layers |= {"pool": _pool(), "classifier": classifier}
    return _initialise(nn.Sequential(layers), linear_std=0.01)


def _shuffle_v1(num_classes: int) -> nn.Module:
    """ShuffleNet with 3 groups and a stem for small images: 1x1, no pooling. torch's initialisation."""
    layers = _stem(24, size=1)
    layers["layer1"] = _stage(ShuffleV1Block, 24, 240, 4, stride=2)
    layers["layer2"] = _stage(ShuffleV1Block, 240, 480, 8, stride=2)
    layers["layer3"] = _stage(ShuffleV1Block, 480, 960, 4, stride=2)
    return nn.Sequential(layers | {"pool": _pool(), "linear": nn.Linear(960, num_classes)})


def _shuffle_v2(num_classes: int) -> nn.Module:
    """ShuffleNetV2 1x with a stem for small images: 1x1, no pooling. torch's initialisation."""
    layers = _stem(24, size=1)
    c = 24
    for i, (d, n) in enumerate([(116, 3), (232, 7), (464, 3)], start=1):
        layers[f"layer{i}"] = nn.Sequential(ShuffleV2Down(c, d), *(ShuffleV2Block(d) for _ in range(n)))
        c = d
    layers |= {"conv2": _conv(c, 1024, 1), "bn2": nn.BatchNorm2d(1024), "relu2": nn.ReLU()}
    return nn.Sequential(layers | {"pool": _pool(), "linear": nn.Linear(1024, num_classes)})


ZOO: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(_resnet, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(_resnet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    **{f"resnet{depth}_a": partial(_resnet_a, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"wrn_{depth}_{widen}": partial(_wrn, depth, widen) for depth in (16, 40) for widen in (1, 2)},
    **{f"wrn_{depth}_10": partial(_wrn, depth, 10) for depth in (28, 34)},
    "wrn_28_2": partial(_wrn, 28, 2, activation=partial(nn.LeakyReLU, 0.1)),
    "vit_tiny_patch2_32": partial(_vit, 32, 2, 192),
    "vit_small_patch2_32": partial(_vit, 32, 2, 384),
    "vit_base_patch16_96": partial(_vit, 96, 16, 768),
    "wrn_28_10_silu": partial(_wrn, 28, 10, activation=nn.SiLU),
    "preact_resnet18": _preact_resnet18,
    "vgg8": partial(_vgg, (1, 1, 1, 1, 1)),
    "vgg11": partial(_vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(_vgg, (2, 2, 2, 2, 2)),
    "vgg16": partial(_vgg, (2, 2, 3, 3, 3)),
    "vgg19": partial(_vgg, (2, 2, 4, 4, 4)),
    "MobileNetV2": _mobilenet_v2,
    "ShuffleV1": _shuffle_v1,
    "ShuffleV2": _shuffle_v2,
    "ResNet50": _resnet50,
}
"""Name -> constructor, which takes the number of classes and returns a model with random weights."""
