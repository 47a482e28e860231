"""The parameters of a tower by depth: locked towers, and learning rates that fall from the output to the input."""

from collections.abc import Iterable, Sequence
from typing import Any

from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models import group_parameters
from torch import nn

from gkl_vl.errors import UserError
from gkl_vl.models.towers import Side, Towers, TransformersTowers

Part = nn.Module | nn.Parameter | None
"""What a group is made of; None where a model lacks it."""


def depth_groups(towers: Towers, side: Side) -> list[list[nn.Parameter]]:
    """The parameters of one tower in groups, from the input to the output.

    The embeddings with their positions and norm; each block, the last one with the norm behind it; the projection. Of
    timm's image towers those of `group_matcher`, which are what layer-wise learning rates of timm use; of a ResNet its
    stem, stages and attention pooling. A part that none of these names is in the first group. These are the groups of
    open_clip's `lock_image_tower` and `lock_text_tower`, but for the projection behind a timm tower, which open_clip
    never locks.

    Raises: UserError for a model of timm without `group_matcher`.
    """
    of_side = list(towers.image_parameters() if side == "image" else towers.text_parameters())
    model: Any = towers.get_submodule("model")
    groups = [list(_parameters(group)) for group in _parts(towers, model, side)]
    grouped = {parameter for group in groups for parameter in group}
    groups[0] += [parameter for parameter in of_side if parameter not in grouped]
    return [group for group in groups if group]


def _parts(towers: Towers, model: Any, side: Side) -> list[list[Part]]:
    if isinstance(towers, TransformersTowers):
        return _transformers_parts(model, side)
    if side == "text":
        return _text_parts(getattr(model, "text", model))
    visual = model.visual
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        if not hasattr(trunk, "group_matcher"):
            raise UserError(
                f"timm's {type(trunk).__name__} does not say which of its layers is how deep: leave out --lock-image "
                "and --layer-decay, or take another image tower"
            )
        by_depth = group_parameters(trunk, trunk.group_matcher())
        return [*([trunk.get_parameter(name) for name in by_depth[k]] for k in sorted(by_depth)), [visual.head]]
    if isinstance(visual, ModifiedResNet):
        stem = [getattr(visual, f"{kind}{number}") for number in (1, 2, 3) for kind in ("conv", "bn")]
        return [stem, *([stage] for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4))] + [
            [visual.attnpool]
        ]
    assert isinstance(visual, VisionTransformer)  # the only other image tower of open_clip
    first = [visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre]
    pools = [getattr(visual, name, None) for name in ("attn_pool", "attn_pool_contrastive")]
    return _blocks(first, visual.transformer.resblocks, [visual.ln_post], [*pools, visual.proj])


def _text_parts(text: Any) -> list[list[Part]]:
    if isinstance(text, HFTextEncoder):
        tower: Any = text.transformer
        encoder = getattr(tower, "encoder", tower)
        return _blocks(
            [tower.get_input_embeddings()],
            getattr(encoder, arch_dict[tower.config.model_type]["config_names"].get("layer_attr", "layer")),
            [getattr(encoder, "final_layer_norm", None)],
            [getattr(tower, "pooler", None), text.proj],
        )
    first = [text.token_embedding, text.positional_embedding, getattr(text, "cls_emb", None)]
    return _blocks(first, text.transformer.resblocks, [text.ln_final], [text.text_projection])


def _transformers_parts(model: Any, side: Side) -> list[list[Part]]:
    tower = model.vision_model if side == "image" else model.text_model
    before = getattr(tower, "pre_layrnorm", None)  # sic, in transformers
    norm = tower.post_layernorm if side == "image" else tower.final_layer_norm
    projection = "visual_projection" if side == "image" else "text_projection"
    heads = [getattr(tower, "head", None), getattr(model, projection, None)]
    return _blocks([tower.embeddings, before], tower.encoder.layers, [norm], heads)


def _blocks(
    first: Sequence[Part], blocks: Iterable[nn.Module], norm: Sequence[Part], head: Sequence[Part]
) -> list[list[Part]]:
    *others, last = blocks
    return [list(first), *([block] for block in others), [last, *norm], list(head)]


def _parameters(parts: Iterable[Part]) -> Iterable[nn.Parameter]:
    for part in parts:
        if isinstance(part, nn.Parameter):
            yield part
        elif part is not None:
            yield from part.parameters()


def lock(towers: Towers, side: Side, *, unlocked_groups: int = 0) -> None:
    """Freezes one tower, but for its last `unlocked_groups` groups of `depth_groups`.

    Raises: UserError for as many groups as there are, which would lock nothing, and for a tower of unknown depth.
    """
    groups = depth_groups(towers, side)
    if unlocked_groups >= len(groups):
        raise UserError(
            f"--unlocked-groups {unlocked_groups} leaves nothing to lock, the {side} tower has {len(groups)} groups "
            f"from its embeddings to its projection: give at most {len(groups) - 1}, or leave out --lock-{side}"
        )
    for group in groups[: len(groups) - unlocked_groups]:
        for parameter in group:
            parameter.requires_grad_(False)


def rate_scales(towers: Towers, decay: float) -> dict[nn.Parameter, float]:
    """decay^k of each parameter of both towers, k groups of `depth_groups` before the last one.

    Source: Bao et al., arXiv 2106.08254 (BEiT). Scales and maps have none and train at the full rate.
    """
    scales = {}
    for side in ("image", "text"):
        groups = depth_groups(towers, side)
        for number, group in enumerate(groups, 1):
            scales |= dict.fromkeys(group, decay ** (len(groups) - number))
    return scales
