"""Modes of a model: frozen, in evaluation, with checkpointed activations, with dropped patches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import open_clip.transformer
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.layers.patch_dropout import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip
from gkl_vl.models.towers import Side, TransformersTowers


def freeze(clip: Clip) -> Clip:
    """Freezes the model in place: no gradients, evaluation mode. Returns it."""
    clip.towers.requires_grad_(False).eval()
    return clip


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode inside the block; restores the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def fix_statistics(model: nn.Module) -> None:
    """Evaluation mode of the batch norms with frozen parameters, so that their running statistics stay."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def checkpoint_activations(clip: Clip, sides: Sequence[Side] = ("image", "text")) -> None:
    """The towers of these sides compute their activations again in the backward pass: equal gradients, less memory.

    Batch norms see each batch twice, which moves their running statistics at twice the rate.

    Raises: UserError for an image tower that cannot.
    """
    model: Any = clip.towers.get_submodule("model")
    if isinstance(clip.towers, TransformersTowers):
        _checkpoint_transformers(model)
        return
    if "image" in sides:
        _checkpoint_images(model, clip.name)
    if "text" not in sides:
        return
    text = getattr(model, "text", None)
    if text is None:
        model.transformer.grad_checkpointing = True
    elif isinstance(text, HFTextEncoder):
        _checkpoint_transformers(text.transformer)
    else:
        text.set_grad_checkpointing(True)


def _checkpoint_transformers(model: Any) -> None:
    settings = {"use_reentrant": False}  # a reentrant checkpoint has no gradient behind frozen embeddings
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # its name in earlier versions
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _checkpoint_images(model: Any, name: str) -> None:
    if isinstance(model.visual, ModifiedResNet):  # for which open_clip's method does nothing
        raise UserError(
            f"--grad-checkpointing: the ResNet of {name} does not support it: leave it out, and lower "
            "--batch-size with more --accum-steps"
        )
    if isinstance(model.visual, TimmModel):  # whose method logs a failure and goes on
        trunk: Any = model.visual.trunk
        try:
            trunk.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise UserError(
                f"--grad-checkpointing: timm's image tower of {name} does not support it: leave it out, and lower "
                "--batch-size with more --accum-steps"
            ) from error
    else:
        model.visual.set_grad_checkpointing(True)


def drop_patches(clip: Clip, share: float) -> None:
    """A ViT's image tower leaves out a random share of the patches of each image in training (FLIP, arXiv 2212.00794).

    Raises: UserError for an image tower without patches to leave out.
    """
    visual: Any = getattr(clip.towers.get_submodule("model"), "visual", None)
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    if isinstance(trunk, open_clip.transformer.VisionTransformer):
        trunk.patch_dropout = open_clip.transformer.PatchDropout(share)
    elif isinstance(trunk, VisionTransformer):
        trunk.patch_drop = PatchDropout(share, num_prefix_tokens=trunk.num_prefix_tokens)
    else:
        raise UserError(
            f"--patch-dropout {share:g}: the image tower of {clip.name} is no ViT of open_clip or timm: leave it out"
        )
