"""LoRA: low-rank adapters of a CLIP's linear layers and attention, with peft.

An adapted layer computes with the weight W + alpha / rank * B A, where A [rank, in] and B [out, rank] are trained and W
is frozen. B starts at zero, so that the model starts as it was.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; https://github.com/huggingface/peft.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip
from gkl_vl.models.modes import evaluating
from gkl_vl.models.student import OneTower, Student
from gkl_vl.models.towers import OpenClipTowers, Side, Towers, TransformersTowers

_ADAPTER = "default"
"""peft's name of the adapters."""


class _Attention(MultiheadAttention):
    """peft's adapter of the input projections of an `nn.MultiheadAttention`, which never changes the frozen weights.

    peft adds the adapter to the weights before every call and subtracts it after it. That leaves rounding errors in the
    weights, which a checkpoint of the adapters alone would lose, and replaces the parameters, which FSDP holds.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention: Any = self.base_layer
        with torch.autocast(query.device.type, enabled=False):  # autocast rounds the sum, as it does all weights
            weight = attention.in_proj_weight + self.get_delta_weight(_ADAPTER)
        return functional_call(attention, {"in_proj_weight": weight}, (query, *args), kwargs)

    def _restore_weights(self) -> None:
        """No-op: the weights are registered at all times."""


def add_lora(
    clip: Clip,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    sides: Sequence[Side] = ("image", "text"),
) -> None:
    """Adds adapters to layers of a CLIP in place, and freezes everything else, logit scale and bias included.

    Layers that can have adapters are linear layers, convolutions without groups, dilation and special padding, and
    attention of torch, as open_clip's, of which the projections of queries, keys and values are adapted. Its output
    projection is not: peft up to 0.21.2 adds its adapter twice (https://github.com/huggingface/peft/pull/3774), and a
    folder of adapters would be one model before and another after the correction. The names of the adapters' parameters
    contain "lora_".

    Args:
        alpha: the update of a weight is alpha / rank * B A.
        targets: names of layers, in full (`visual.transformer.resblocks.0.attn`) or from their end, as in peft (`attn`,
            `mlp.c_fc`). None = all linear layers and attention in the towers' blocks: attention and MLPs of
            transformers, MLPs of some convolutional towers; not patch embeddings, pooling and projections.
        sides: the towers that get adapters.

    Raises:
        UserError: a target that names no layer of these towers that can have an adapter; without targets, a tower
            without such layers in its blocks, as ResNets are.
    """
    layers = {side: _adaptable(clip, side) for side in sides}
    if targets is None:
        names = [name for side in sides for name in _in_blocks(clip, side, layers[side])]
    else:
        all_layers = {name: layer for side in sides for name, layer in layers[side].items()}
        names = [name for target in targets for name in _named(clip, target, all_layers)]
    # A pattern of full names: in a list, peft would take that of a text block for the end of an image block's.
    pattern = "|".join(re.escape(name) for name in dict.fromkeys(names))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern)  # pyright: ignore[reportArgumentType]: hint
    config._register_custom_module({nn.MultiheadAttention: _Attention})
    model = _towers_of_one_model(clip.towers).model
    inject_adapter_in_model(config, model, _ADAPTER)
    for layer in model.modules():
        if isinstance(layer, _Attention):
            layer.base_layer.out_proj.requires_grad_(False)  # peft's files need these adapters: they stay zero


def merged(towers: Towers) -> Towers:
    """A copy of the towers in which each adapted weight is W + alpha / rank * B A: the model without adapters, frozen.

    Its state dict has the keys, shapes and dtypes of the model before `add_lora`.
    """
    plain = copy.deepcopy(towers)
    model = _towers_of_one_model(plain).model
    with torch.no_grad(), torch.autocast(towers.log_scale().device.type, enabled=False):
        for name, layer in reversed(list(model.named_modules())):  # children first: attention holds a layer
            if isinstance(layer, _Attention):
                layer.in_proj_weight.add_(layer.get_delta_weight(_ADAPTER))
            elif isinstance(layer, LoraLayer):
                layer.merge()
            else:
                continue
            model.set_submodule(name, layer.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return plain


def save_adapters(towers: Towers, folder: Path, *, base: str, share: float = 1.0) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` loads onto the
    model without adapters.

    Args:
        base: the name of that model.
        share: of the update in what is saved, a factor of alpha.
    """
    model = _towers_of_one_model(towers).model
    config = copy.copy(model.peft_config[_ADAPTER])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.lora_alpha *= share
    # Not "auto": that looks for a config of the model on the Hub.
    adapters = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    # As a PeftModel, the model's wrapper in peft, names them.
    named = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def trainable_table(model: Student | OneTower) -> str:
    """A line for each part of the trained module: its parameters, and how many of them are trained, also per cent."""
    towers = model.towers
    image, text, both = set(towers.image_parameters()), set(towers.text_parameters()), set(towers.parameters())
    parts = {
        "image tower": image,
        "text tower": text,
        "logit scale and bias": both - image - text,
        "maps": set(model.parameters()) - both,
        "all": set(model.parameters()),
    }
    lines = [f"{'':20} {'parameters':>13} {'trainable':>13} {'per cent':>8}"]
    for name, part in parts.items():
        total, trainable = sum(p.numel() for p in part), sum(p.numel() for p in part if p.requires_grad)
        if total:
            lines.append(f"{name:20} {total:13,} {trainable:13,} {100 * trainable / total:8.2f}")
    return "\n".join(lines)


def _towers_of_one_model(towers: Towers) -> OpenClipTowers | TransformersTowers:
    assert isinstance(towers, OpenClipTowers | TransformersTowers)  # the others are for evaluation alone
    return towers


@torch.no_grad()
def _adaptable(clip: Clip, side: Side) -> dict[str, nn.Module]:
    """The layers of a tower that can have an adapter, by name.

    Only layers that are called: some models compute with a layer's weight themselves, without the layer, as
    `nn.MultiheadAttention` does with its output projection, and would ignore its adapter.
    """
    towers = _towers_of_one_model(clip.towers)
    device, called = towers.log_scale().device, set()
    hook = register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        with evaluating(towers):
            if side == "image":
                towers.encode_image(torch.zeros(1, 3, clip.image_size, clip.image_size, device=device))
            else:
                towers.encode_text(clip.tokenize([""]).to(device))
    finally:
        hook.remove()
    return {name: module for name, module in towers.model.named_modules() if module in called and _supported(module)}


def _supported(module: nn.Module) -> bool:
    """Whether peft's adapter of a layer is right. Subclasses may compute otherwise, as with standardised weights."""
    if type(module) is nn.MultiheadAttention:
        return module.in_proj_weight is not None  # queries, keys and values of one width
    if type(module) is nn.Conv2d:  # peft's adapters have one group, no dilation and zeros as padding
        return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return type(module) is nn.Linear


def _in_blocks(clip: Clip, side: Side, layers: dict[str, nn.Module]) -> list[str]:
    """Names of the linear layers and attention of a tower inside of numbered modules."""
    names = [name for name in layers if re.search(r"\.\d+\.", name) and not isinstance(layers[name], nn.Conv2d)]
    if not names:
        raise UserError(
            f"the {side} tower of {clip.name} has no linear layers or attention in its blocks: give --lora-targets, "
            f"from {_ends(layers)}"
        )
    return names


def _named(clip: Clip, target: str, layers: dict[str, nn.Module]) -> list[str]:
    """Names of the layers that a target names: the layer with this full name, or else those that end with it."""
    names = [target] if target in layers else [name for name in layers if name.endswith(f".{target}")]
    if not names:
        raise UserError(
            f"--lora-targets {target!r} names no layer of {clip.name} that can have an adapter: write full names, such "
            f"as {next(iter(layers))}, or their ends, such as {_ends(layers)}"
        )
    return names


def _ends(layers: dict[str, nn.Module]) -> str:
    ends = {name.rpartition(".")[2] for name in layers}
    return ", ".join(sorted(end for end in ends if not end.isdecimal()))
