"""Label models by their known names: mdistiller's CIFAR zoo, He's CIFAR ResNets, timm, torchvision, a folder, the Hub.

The zoo is written anew after https://github.com/megvii-research/mdistiller (mdistiller/models/cifar) and keeps its
parameter names, so that its checkpoints load unchanged. Most of its models are chains: an `nn.Sequential` with names.

Axis letters: n = images, c d = channels, C = classes, h w = pixels.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import snapshot_download
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from gkl_vl.errors import UserError, first_line

RGB = tuple[float, float, float]

CIFAR_MEAN_STD: tuple[RGB, RGB] = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))  # CIFAR-100, mdistiller's
IMAGENET_MEAN_STD: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_FOLDERS = ("hf-hub:", "local-dir:")
_HEADS = ("head.", "fc.", "linear.", "classifier.", "mlp.", "mlp_head.")
"""How the classifier's parameters begin: in the zoo, in timm's ViTs, in USB's checkpoints, which have more than one."""
_PREFIXES = "timm:NAME, torchvision:NAME, hf-hub:org/repo or local-dir:path"
_CONNECT = "connect, or give the path of a downloaded file"


@dataclass(frozen=True)
class Classifier:
    """A label model with its way to prepare images. Another normalisation: `dataclasses.replace(it, mean=, std=)`."""

    name: str
    """What `load_classifier` was asked for; of a folder, the architecture that it holds."""
    model: nn.Module
    """pixels [n 3 h w] -> logits [n C]; in training mode, as torch makes it."""
    mean: RGB
    std: RGB
    num_classes: int

    def prepare(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """uint8 images, augmented and cropped already -> pixels as this model wants them: scaled and normalised."""
        pixels = scaled(images)
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def on_pixels(self) -> "OnPixels":
        """The model with its normalisation inside."""
        return OnPixels(self.model, self.mean, self.std)


def scaled(images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Pixels in [0, 1], in the layout that convolutions are fastest in on CPU and GPU; a ViT does not mind."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


class OnPixels(nn.Module):
    """A label model that takes pixels in [0, 1] and normalises them itself: what attacks and RobustBench expect."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: RGB, std: RGB):
        super().__init__()
        self.model = model
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n C"]:
        return self.model((pixels - self.mean) / self.std)


def load_classifier(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | None = None,
    new_head: bool = False,
    allow_pickle: bool = False,
) -> Classifier:
    """Load a label model by name.

    Args:
        name: a name of `ZOO` (32 px), `timm:NAME` or `torchvision:NAME`; `hf-hub:org/repo` or `local-dir:path` for
            an exported folder, ours or in timm's Hub format, which carries its weights.
        num_classes: classes of the data: how many logits the model gives; None = as many as the folder says.
        weights: None = random; `pretrained` = timm's or torchvision's own; else the path of a state dict, plain or
            under "model" or "state_dict", which must fit the model to the last key and shape.
        new_head: to fine-tune weights on other classes: their classifier is left out, the model's is random; a ViT's
            positions are interpolated to its own image size.
        allow_pickle: read weights that are not safetensors, still with `weights_only=True`.

    Raises:
        UserError: unknown name, weights that are missing or do not fit, a pickle without `allow_pickle`.
    """
    prefix, colon, rest = name.partition(":")
    if prefix in ("hf-hub", "local-dir"):
        return _load_folder(name, num_classes=num_classes, weights=weights, allow_pickle=allow_pickle)
    if num_classes is None:
        raise UserError(f"{name!r} needs the number of classes: only a folder or a Hub repository carries it")
    if not colon:
        model = _build_zoo(name, num_classes=num_classes, weights=weights)
    elif prefix == "timm":
        model = _build_timm(rest, num_classes=num_classes, pretrained=weights == "pretrained", new_head=new_head)
    elif prefix == "torchvision":
        model = _build_torchvision(rest, num_classes=num_classes, pretrained=weights == "pretrained")
    else:
        raise UserError(f"unknown prefix {prefix!r} of classifier {name!r}: write {_PREFIXES}")
    if weights not in (None, "pretrained"):
        stored = _state_dict(Path(weights), allow_pickle=allow_pickle)
        if new_head:
            stored = _with_new_head(stored, model)
        _load_weights(model, stored, path=weights, name=name, num_classes=num_classes)
    mean, std = _mean_std(name, model)
    return Classifier(name=name, model=model, mean=mean, std=std, num_classes=num_classes)


def _mean_std(name: str, model: Any) -> tuple[RGB, RGB]:  # Any: pretrained_cfg is what timm hangs on its models
    if name.startswith("timm:"):
        return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    return IMAGENET_MEAN_STD if name.startswith("torchvision:") or name.endswith("_a") else CIFAR_MEAN_STD


# ---- where models come from


def _build_zoo(name: str, *, num_classes: int, weights: str | None) -> nn.Module:
    if name not in ZOO:
        raise UserError(f"unknown classifier {name!r}: {_nearest(name, list(ZOO))}, or write {_PREFIXES}")
    if weights == "pretrained":
        raise UserError(f"{name!r} has no pretrained weights of its own: give the path of a checkpoint, or none")
    return ZOO[name](num_classes)


def _build_timm(name: str, *, num_classes: int, pretrained: bool, new_head: bool) -> nn.Module:
    names = timm.list_pretrained() if "." in name else timm.list_models()  # a tag of weights follows the dot
    if name not in names:
        raise UserError(f"timm has no model {name!r}: {_nearest(name, names)}")
    if not pretrained:
        return timm.create_model(name, num_classes=num_classes)
    config: Any = timm.get_pretrained_cfg(name)  # never None: the name is known
    if not new_head:
        _check_classes(config.num_classes, num_classes, f"the pretrained weights of timm:{name}")
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes)
    except Exception as error:  # there are no weights, or whatever the Hub's client raises
        raise UserError(f"timm:{name} could not be loaded ({first_line(error)}): {_CONNECT}") from error


def _build_torchvision(name: str, *, num_classes: int, pretrained: bool) -> nn.Module:
    # These two train with auxiliary classifiers, whose logits they give beside the logits; timm has an inception_v3.
    names = set(torchvision.models.list_models(module=torchvision.models)) - {"googlenet", "inception_v3"}
    if name not in names:
        raise UserError(f"torchvision has no label model {name!r}: {_nearest(name, sorted(names))}")
    weights = torchvision.models.get_model_weights(name)["DEFAULT"] if pretrained else None
    if weights is not None:
        _check_classes(len(weights.meta["categories"]), num_classes, f"the pretrained weights of torchvision:{name}")
    try:
        return torchvision.models.get_model(name, weights=weights, num_classes=num_classes)
    except (OSError, RuntimeError) as error:  # no connection, a damaged download
        raise UserError(
            f"the weights of torchvision:{name} could not be fetched ({first_line(error)}): {_CONNECT}"
        ) from error


def _load_folder(name: str, *, num_classes: int | None, weights: str | None, allow_pickle: bool) -> Classifier:
    if weights is not None:
        raise UserError(f"weights {weights!r} do not go with {name!r}, which carries its own: leave them out")
    prefix, _, rest = name.partition(":")
    folder = Path(rest) if prefix == "local-dir" else _fetch(rest, allow_pickle=allow_pickle)
    if not (folder / "config.json").is_file():
        raise UserError(f"{rest!r} holds no config.json: name an exported folder, ours or in timm's Hub format")
    found = [folder / file for file in ("model.safetensors", "pytorch_model.bin") if (folder / file).is_file()]
    if not found:
        raise UserError(f"{rest!r} holds no weights: expected model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text())
        classes = num_classes or config["num_classes"]
        if config.get("library") == "gkl-vl":
            if config["architecture"].startswith(_FOLDERS):  # a chain of folders, perhaps one that bites its tail
                raise UserError(f"{config['architecture']!r} is another folder: write the architecture there")
            built = load_classifier(config["architecture"], num_classes=classes)
            model, mean, std, architecture = built.model, config["mean"], config["std"], built.name
        else:
            model: Any = timm.create_model(f"local-dir:{folder}", num_classes=classes)
            mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
            architecture = f"timm:{config['architecture']}"
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.json of {rest!r} names no model that is known: {first_line(error)}") from error
    stored = _state_dict(found[0], allow_pickle=allow_pickle)
    _load_weights(model, stored, path=str(found[0]), name=name, num_classes=classes)
    return Classifier(name=architecture, model=model, mean=tuple(mean), std=tuple(std), num_classes=classes)


def _fetch(repo: str, *, allow_pickle: bool) -> Path:
    """The folder of a Hub repository in the local cache, downloaded if need be; pickles only where allowed."""
    pickles = ["pytorch_model.bin"] if allow_pickle else []
    try:
        return Path(snapshot_download(repo, allow_patterns=["config.json", "model.safetensors", *pickles]))
    except Exception as error:  # offline, unknown repository, no access: the client's first line says which
        raise UserError(
            f"the Hub repository {repo!r} could not be fetched ({first_line(error)}): "
            "check the name and the connection, or download it and write local-dir:path"
        ) from error


def _nearest(name: str, names: list[str]) -> str:
    of_lower = {each.lower(): each for each in names}
    close = get_close_matches(name.lower(), list(of_lower), n=4)
    return f"the nearest names are {', '.join(of_lower[each] for each in close)}" if close else "no name comes near"


def _check_classes(theirs: int, ours: int, whose: str) -> None:
    # timm would put a random classifier in the place of theirs and go on
    if theirs != ours:
        raise UserError(f"{whose} are for {theirs} classes, the data has {ours}: take other weights, or none")


# ---- weights from a file


def _with_new_head(stored: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights with the model's own, random classifier in the place of theirs."""
    if isinstance(model, VisionTransformer):
        stored = checkpoint_filter_fn(stored, model)  # interpolates positions
    body = {key: tensor for key, tensor in stored.items() if not key.startswith(_HEADS)}
    return body | {key: tensor for key, tensor in model.state_dict().items() if key.startswith(_HEADS)}


def _load_weights(model: nn.Module, stored: dict[str, Tensor], *, path: str, name: str, num_classes: int) -> None:
    """Fill `model` with what lies at `path`; every key and every shape must agree.

    One exception: `num_batches_tracked`, a count that only averaging without momentum reads and that early versions
    of torch did not store, may be missing.
    """
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in stored and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in stored if k not in wanted]
    misfits = [k for k in wanted if k in stored and stored[k].shape != wanted[k].shape]
    heads = [k for k in misfits if wanted[k].shape[:1] == (num_classes,) and wanted[k].shape[1:] == stored[k].shape[1:]]
    if misfits and heads == misfits and not missing and not unexpected:  # only the classifier differs
        _check_classes(stored[heads[0]].shape[0], num_classes, f"weights {path!r}")
    shapes = [f"{k} has {list(stored[k].shape)}, not {list(wanted[k].shape)}" for k in misfits]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [f"{len(keys)} {kind} ({_first_few(keys)})" for kind, keys in kinds.items() if keys]
    if faults:
        raise UserError(f"weights {path!r} do not fit {name!r}: {'; '.join(faults)}: take those of this model")
    model.load_state_dict(stored, strict=False)


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _state_dict(path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The state dict in a file, plain or nested as trainers write it."""
    stored = _read(path, allow_pickle=allow_pickle)
    for key in ("model", "state_dict"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not stored or not all(isinstance(v, Tensor) for v in stored.values()):
        raise UserError(f"weights {str(path)!r} hold no state dict, plain or under 'model' or 'state_dict': save one")
    prefix = "module." if all(k.startswith("module.") for k in stored) else ""  # DataParallel's
    return {k.removeprefix(prefix): v for k, v in stored.items()}


def _read(path: Path, *, allow_pickle: bool) -> Any:
    if not path.is_file():
        raise UserError(f"weights {str(path)!r} are no file: give the path of a checkpoint, or leave them out")
    if path.suffix != ".safetensors" and not allow_pickle:
        raise UserError(f"{path} is a pickle, not safetensors: convert it, or pass --allow-pickle if you trust it")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle can raise anything, one with code in it raises UnpicklingError
        raise UserError(
            f"weights {str(path)!r} cannot be read as tensors alone ({first_line(error)}): "
            "fetch them again, or save the state dict"
        ) from error


# ---- parts of the zoo


def _conv(c: int, d: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, d, size, stride=stride, padding=size // 2, groups=groups, bias=False)


def _active(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]


def _pool() -> nn.Module:
    """[n c h w] -> [n c], the mean over the pixels."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _projection(c: int, d: int, *, stride: int) -> nn.Module:
    """Option B: the identity where it fits, else a 1x1 convolution."""
    fits = stride == 1 and c == d
    return nn.Identity() if fits else nn.Sequential(_conv(c, d, 1, stride=stride), nn.BatchNorm2d(d))


def _padding(c: int, d: int, *, stride: int) -> nn.Module:
    """Option A: no parameters."""
    return nn.Identity() if c == d else PaddedShortcut(c, d, stride=stride)


class PaddedShortcut(nn.Module):
    """Option A (He et al. 2016, section 4.2): every second pixel, and zero channels, half before and half behind."""

    def __init__(self, c: int, d: int, *, stride: int):
        super().__init__()
        self.stride = stride
        self.extra = d - c

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, ReLU after the sum."""

    def __init__(self, c: int, d: int, *, stride: int, shortcut: Callable[..., nn.Module]):
        super().__init__()
        self.conv1, self.bn1 = _conv(c, d, 3, stride=stride), nn.BatchNorm2d(d)
        self.conv2, self.bn2 = _conv(d, d, 3), nn.BatchNorm2d(d)
        self.downsample = shortcut(c, d, stride=stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the width is a quarter of the output's channels."""

    def __init__(self, c: int, d: int, *, stride: int):
        super().__init__()
        width = d // 4
        self.conv1, self.bn1 = _conv(c, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride=stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, d, 1), nn.BatchNorm2d(d)
        self.shortcut = _projection(c, d, stride=stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class WideBlock(nn.Module):
    """Norm and activation before each convolution, none after the sum; a projection sees the activated input."""

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
    """`WideBlock` with ReLU under the names that ResNet-18s of the robustness literature have."""

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
    """MobileNetV2's block: wider, depthwise, narrow again; ReLU, not ReLU6, and an expansion even where it is 1."""

    def __init__(self, c: int, d: int, *, stride: int, expand: int):
        super().__init__()
        wide = c * expand
        depthwise = _conv(wide, wide, 3, stride=stride, groups=wide)
        self.conv = nn.Sequential(
            *_active(_conv(c, wide, 1)), *_active(depthwise), _conv(wide, d, 1), nn.BatchNorm2d(d)
        )
        self.adds = stride == 1 and c == d

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        return x + self.conv(x) if self.adds else self.conv(x)


def _shuffle(x: Float[Tensor, "n c h w"], groups: int) -> Float[Tensor, "n c h w"]:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleV1Block(nn.Module):
    """Grouped 1x1 convolutions with a shuffle between; with stride 2 the pooled input is put beside, not added."""

    def __init__(self, c: int, d: int, *, stride: int):
        super().__init__()
        added = d - c if stride == 2 else d  # channels that the convolutions make
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
    """Half of the channels pass untouched, then both halves are shuffled."""

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
    """Halves the resolution: all channels go down two branches, each of which makes half of the output."""

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


@torch.no_grad()
def _initialise(
    model: nn.Module, *, mode: Literal["fan_in", "fan_out"] = "fan_out", linear_std: float | None = None
) -> nn.Module:
    """He's initialisation of the convolutions; `linear_std`: that of the classifier, None = torch's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, nn.Linear) and linear_std is not None:
            module.weight.normal_(0, linear_std)
            module.bias.zero_()
    return model


# ---- the models of the zoo

Layers = OrderedDict[str, nn.Module]  # what an nn.Sequential with names is made of


def _stem(d: int, *, size: int = 3) -> Layers:
    return OrderedDict(conv1=_conv(3, d, size), bn1=nn.BatchNorm2d(d), relu=nn.ReLU())


def _stage(block: Callable[..., nn.Module], c: int, d: int, n: int, *, stride: int) -> nn.Sequential:
    """n blocks, the first of which changes channels and resolution."""
    return nn.Sequential(block(c, d, stride=stride), *(block(d, d, stride=1) for _ in range(n - 1)))


def _residual_stages(depth: int, widths: tuple[int, int, int, int], shortcut: Callable[..., nn.Module]) -> Layers:
    """All of a CIFAR ResNet but the classifier: a stem, and three stages of (depth - 2) / 6 blocks."""
    block, n = partial(BasicBlock, shortcut=shortcut), (depth - 2) // 6
    stem, one, two, three = widths
    layers = _stem(stem)
    layers["layer1"] = _stage(block, stem, one, n, stride=1)
    layers["layer2"] = _stage(block, one, two, n, stride=2)
    layers["layer3"] = _stage(block, two, three, n, stride=2)
    layers["pool"] = _pool()
    return layers


def _resnet(depth: int, widths: tuple[int, int, int, int], num_classes: int) -> nn.Module:
    layers = _residual_stages(depth, widths, _projection)
    layers["fc"] = nn.Linear(widths[-1], num_classes)
    return _initialise(nn.Sequential(layers))


def _resnet_a(depth: int, num_classes: int) -> nn.Module:
    """He et al.'s own; parameter names and initialisation as in akamaster/pytorch_resnet_cifar10."""
    layers = _residual_stages(depth, (16, 16, 32, 64), _padding)
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
    """As in csdongxian/AWP and locuslab/robust_overfitting, with a norm before the pooling. torch's initialisation."""
    layers: Layers = OrderedDict(conv1=_conv(3, 64, 3))
    c = 64
    for i, d in enumerate((64, 128, 256, 512), start=1):
        layers[f"layer{i}"] = _stage(PreActBlock, c, d, 2, stride=1 if i == 1 else 2)
        c = d
    return nn.Sequential(
        layers | {"bn": nn.BatchNorm2d(c), "relu": nn.ReLU(), "pool": _pool(), "linear": nn.Linear(c, num_classes)}
    )


def _wrn(depth: int, widen: int, num_classes: int, *, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Wide ResNet of (depth - 4) / 6 blocks a stage; inside a stage they are called `layer`.

    The 28-2 of the semi-supervised literature has leaky ReLUs; its convolutions have biases and its norms a momentum
    of 0.001 there, not here.
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
    """timm's ViT of 12 blocks with heads of 64, for small images; USB's `vit_*_patch*_*`, whose weights load."""
    return VisionTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        num_heads=width // 64,
        drop_path_rate=0.2 if width > 192 else 0.1,
        num_classes=num_classes,
    )


def _vgg(convolutions: tuple[int, int, int, int, int], num_classes: int) -> nn.Module:
    """VGG with norms and one linear layer. At 32 px three of the four poolings between the blocks are used."""
    layers: Layers = OrderedDict()
    c = 3
    for i, (d, n) in enumerate(zip((64, 128, 256, 512, 512), convolutions, strict=True)):
        block = []
        for _ in range(n):
            block += _active(nn.Conv2d(c, d, 3, padding=1))
            c = d
        layers[f"block{i}"] = nn.Sequential(*block)
        if i < 3:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers |= {"pool4": _pool(), "classifier": nn.Linear(512, num_classes)}
    return _initialise(nn.Sequential(layers), linear_std=0.01)


def _mobilenet_v2(num_classes: int) -> nn.Module:
    """MobileNetV2 at half its width, but for the last convolution; the second stage does not stride."""
    c = 16
    stem = nn.Sequential(*_active(_conv(3, c, 3, stride=2)))
    stages = []
    plan = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    for expand, d, n, stride in plan:
        stages.append(_stage(partial(InvertedResidual, expand=expand), c, d, n, stride=stride))
        c = d
    last = nn.Sequential(*_active(_conv(c, 1280, 1)))
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
"""Name -> (number of classes -> model with random weights)."""
