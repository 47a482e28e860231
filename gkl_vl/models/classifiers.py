"""Loads image classifiers by name: the CIFAR zoo, timm, torchvision, a local folder, the Hub; with their normalisation.

Axis letters: n = images, C = classes, h w = pixels.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from gkl_vl.errors import UserError, first_line, refuse_full_disk
from gkl_vl.models.cifar_zoo import ZOO
from gkl_vl.models.preprocessing import three_numbers
from gkl_vl.models.weights import fetch, load_exactly, read_state_dict
from gkl_vl.reading import read_json

RGB = tuple[float, float, float]

CIFAR_MEAN_STD: tuple[RGB, RGB] = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))  # CIFAR-100, mdistiller's
IMAGENET_MEAN_STD: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_HUB_FILES = {"files": ("config.json", "model.safetensors"), "pickles": ("pytorch_model.bin",)}
_FOLDERS = ("hf-hub:", "local-dir:")
_HEADS = ("head.", "fc.", "linear.", "classifier.", "mlp.", "mlp_head.")
"""Prefixes of a head's parameters in the zoo, in timm's ViTs and in USB's checkpoints, which have several heads."""
_PREFIXES = "timm:NAME, torchvision:NAME, hf-hub:org/repo or local-dir:path"
_CONNECT = "connect, or give the path of a downloaded file"


@dataclass(frozen=True)
class Classifier:
    """A classifier with its normalisation, which `dataclasses.replace(classifier, mean=..., std=...)` changes."""

    name: str
    """The argument of `load_classifier`; for a folder, the name of its architecture."""
    model: nn.Module
    """Normalised pixels [n 3 h w] -> logits [n C]. Loaded in training mode, torch's default."""
    mean: RGB
    std: RGB
    num_classes: int
    classnames: tuple[str, ...] | None = None
    """Name of each logit's class; None = unknown. An exported classifier carries them."""

    def prepare(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Scales uint8 images to [0, 1] and normalises them. Crops and augmentations come before."""
        pixels = scaled(images)
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def on_pixels(self) -> "OnPixels":
        """The model with its normalisation as its first layer."""
        return OnPixels(self.model, self.mean, self.std)


def scaled(images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Scales uint8 images to [0, 1] in channels_last, the fastest layout of convolutions on CPU and GPU.

    The layout makes no difference to a ViT.
    """
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


class OnPixels(nn.Module):
    """A classifier that takes pixels in [0, 1] and normalises them itself, as attacks and RobustBench expect."""

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
    """Loads a classifier by name.

    Args:
        name: a name of `ZOO` (32 px), `timm:NAME` or `torchvision:NAME`; `hf-hub:org/repo` or `local-dir:path` for
            a folder with weights, exported by this package or in timm's Hub format.
        num_classes: number of logits; None = the number in the folder's config.json.
        weights: None = random; `pretrained` = timm's or torchvision's pretrained weights; else the path of a state
            dict, plain or under "model" or "state_dict", whose keys and shapes must equal the model's.
        new_head: for fine-tuning on other classes: ignores the head of the weights and initialises the model's at
            random; interpolates a ViT's position embeddings to the model's image size.
        allow_pickle: read weights that are not safetensors, still with `weights_only=True`.

    Raises:
        UserError: unknown name, weights that are missing or do not fit, a pickle without `allow_pickle`.
    """
    prefix, colon, rest = name.partition(":")
    if prefix in ("hf-hub", "local-dir"):
        return _load_folder(name, num_classes=num_classes, weights=weights, allow_pickle=allow_pickle)
    if num_classes is None:
        raise UserError(f"{name!r} needs the number of classes: only a folder or a Hub repository stores it")
    if not colon:
        model = _build_zoo(name, num_classes=num_classes, weights=weights)
    elif prefix == "timm":
        model = _build_timm(rest, num_classes=num_classes, pretrained=weights == "pretrained", new_head=new_head)
    elif prefix == "torchvision":
        model = _build_torchvision(rest, num_classes=num_classes, pretrained=weights == "pretrained")
    else:
        raise UserError(f"unknown prefix {prefix!r} of classifier {name!r}: write {_PREFIXES}")
    if weights not in (None, "pretrained"):
        _check_timm_tag(name, weights)
        stored = read_state_dict(weights, allow_pickle=allow_pickle)
        if new_head:
            stored = _with_new_head(stored, model)
        _load_weights(model, stored, path=weights, name=name, num_classes=num_classes)
    mean, std = _mean_std(name, model)
    return Classifier(name=name, model=model, mean=mean, std=std, num_classes=num_classes)


def _mean_std(name: str, model: Any) -> tuple[RGB, RGB]:  # Any: timm adds the attribute pretrained_cfg
    if name.startswith("timm:"):
        return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    return IMAGENET_MEAN_STD if name.startswith("torchvision:") or name.endswith("_a") else CIFAR_MEAN_STD


def _check_timm_tag(name: str, weights: str) -> None:
    """Refuses a file for an architecture of timm without a tag whose tags normalise in different ways."""
    prefix, _, architecture = name.partition(":")
    if prefix != "timm" or "." in architecture:
        return
    groups: dict[str, list[str]] = {}
    for tagged in timm.list_pretrained(f"{architecture}.*"):
        config: Any = timm.get_pretrained_cfg(tagged)
        values = f"mean {' '.join(f'{v:.3g}' for v in config.mean)}, std {' '.join(f'{v:.3g}' for v in config.std)}"
        groups.setdefault(values, []).append(tagged.partition(".")[2])
    if len(groups) > 1:
        listed = "; ".join(f"{values} for {', '.join(tags)}" for values, tags in groups.items())
        raise UserError(
            f"weights {weights!r} do not say how their images were normalised, and the tags of {name} differ: "
            f"write {name}.TAG with the tag whose values apply ({listed})"
        )


# ---- one loader per source


def _build_zoo(name: str, *, num_classes: int, weights: str | None) -> nn.Module:
    if name not in ZOO:
        raise UserError(f"unknown classifier {name!r}: {_nearest(name, list(ZOO))}, or write {_PREFIXES}")
    if weights == "pretrained":
        raise UserError(f"{name!r} has no pretrained weights: give the path of a checkpoint, or none")
    return ZOO[name](num_classes)


def _build_timm(name: str, *, num_classes: int, pretrained: bool, new_head: bool) -> nn.Module:
    names = timm.list_pretrained() if "." in name else timm.list_models()  # NAME.TAG, the tag of its weights
    if name not in names:
        raise UserError(f"timm has no model {name!r}: {_nearest(name, names)}")
    if not pretrained:
        return timm.create_model(name, num_classes=num_classes)
    config: Any = timm.get_pretrained_cfg(name)  # never None: the name is known
    if not new_head:
        _check_classes(config.num_classes, num_classes, f"the pretrained weights of timm:{name}")
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes)
    except Exception as error:  # no weights for this name, or any error of the Hub's client
        refuse_full_disk(error)
        raise UserError(f"timm:{name} could not be loaded ({first_line(error)}): {_CONNECT}") from error


def _build_torchvision(name: str, *, num_classes: int, pretrained: bool) -> nn.Module:
    # In training mode these two also return the logits of auxiliary classifiers. timm's inception_v3 does not.
    names = set(torchvision.models.list_models(module=torchvision.models)) - {"googlenet", "inception_v3"}
    if name not in names:
        raise UserError(f"torchvision has no classifier {name!r}: {_nearest(name, sorted(names))}")
    weights = torchvision.models.get_model_weights(name)["DEFAULT"] if pretrained else None
    if weights is not None:
        _check_classes(len(weights.meta["categories"]), num_classes, f"the pretrained weights of torchvision:{name}")
    try:
        return torchvision.models.get_model(name, weights=weights, num_classes=num_classes)
    except (OSError, RuntimeError) as error:  # no connection, a damaged download
        refuse_full_disk(error)
        raise UserError(
            f"the weights of torchvision:{name} could not be fetched ({first_line(error)}): {_CONNECT}"
        ) from error


def _load_folder(name: str, *, num_classes: int | None, weights: str | None, allow_pickle: bool) -> Classifier:
    if weights is not None:
        raise UserError(f"weights {weights!r} do not go with {name!r}, which carries its own: leave them out")
    prefix, _, rest = name.partition(":")
    folder = Path(rest) if prefix == "local-dir" else fetch(rest, **_HUB_FILES, allow_pickle=allow_pickle)
    if not (folder / "config.json").is_file():
        raise UserError(f"{rest!r} holds no config.json: name a folder exported by this package or in timm's format")
    files = [folder / file for file in ("model.safetensors", "pytorch_model.bin") if (folder / file).is_file()]
    if not files:
        raise UserError(f"{rest!r} holds no weights: expected model.safetensors")
    config = read_json(folder / "config.json")
    try:
        classes = config["num_classes"] if num_classes is None else num_classes
        if config.get("library") == "gkl-vl":
            if config["architecture"].startswith(_FOLDERS):  # would recurse, perhaps without end
                raise UserError(f"{config['architecture']!r} is another folder: write the architecture there")
            built = load_classifier(config["architecture"], num_classes=classes)
            model, mean, std, architecture = built.model, config["mean"], config["std"], built.name
        else:
            model: Any = timm.create_model(f"local-dir:{folder}", num_classes=classes)
            mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
            architecture = f"timm:{config['architecture']}"
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.json of {rest!r} names no model that is known: {first_line(error)}") from error
    stored = read_state_dict(files[0], allow_pickle=allow_pickle)
    _load_weights(model, stored, path=str(files[0]), name=name, num_classes=classes)
    return Classifier(
        name=architecture,
        model=model,
        mean=three_numbers(mean, f"mean in {folder / 'config.json'}", positive=False),
        std=three_numbers(std, f"std in {folder / 'config.json'}", positive=True),
        num_classes=classes,
        classnames=_classnames(config, folder / "config.json", num_classes=classes),
    )


def _classnames(config: dict, path: Path, *, num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes in a folder's config.json; None where it has none.

    The key is `label_names`, as in timm's format: a list, or an object from class index to name.
    """
    names = config.get("label_names")
    if not names:
        return None
    if isinstance(names, dict):
        names = [names.get(str(index)) for index in range(len(names))]
    named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if not named or len(named) != len(names):
        raise UserError(f"label_names in {path} is not a list of names by class index: correct or remove it")
    if len(names) != num_classes:
        raise UserError(f"label_names in {path} has {len(names)} names for {num_classes} classes: correct or remove it")
    return tuple(named)


def _nearest(name: str, names: list[str]) -> str:
    by_lower_case = {each.lower(): each for each in names}
    close = get_close_matches(name.lower(), list(by_lower_case), n=4)
    return f"the nearest names are {', '.join(by_lower_case[each] for each in close)}" if close else "no similar name"


def _check_classes(trained: int, requested: int, weights: str) -> None:
    # timm would silently replace the trained head by a random one
    if trained != requested:
        raise UserError(f"{weights} are for {trained} classes, the data has {requested}: take other weights, or none")


# ---- weights from a file


def _with_new_head(stored: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`stored` with its head replaced by the model's random one."""
    if isinstance(model, VisionTransformer):
        stored = checkpoint_filter_fn(stored, model)  # interpolates position embeddings
    body = {key: tensor for key, tensor in stored.items() if not key.startswith(_HEADS)}
    return body | {key: tensor for key, tensor in model.state_dict().items() if key.startswith(_HEADS)}


def _load_weights(model: nn.Module, stored: dict[str, Tensor], *, path: str, name: str, num_classes: int) -> None:
    """Loads the state dict `stored`, read from `path`, into `model`; every key and every shape must agree."""
    state = model.state_dict()
    misfits = [k for k in state if k in stored and stored[k].shape != state[k].shape]
    heads = [k for k in misfits if state[k].shape[:1] == (num_classes,) and state[k].shape[1:] == stored[k].shape[1:]]
    if misfits and heads == misfits and stored.keys() <= state.keys():  # only the number of classes differs
        _check_classes(stored[heads[0]].shape[0], num_classes, f"weights {path!r}")
    load_exactly(model, stored, path=path, name=name)
