"""Image and text towers of CLIP models of open_clip and transformers, and of ONNX files, with one interface.

Axis letters: n = rows of this process, d = embedding, h w = pixels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gkl_vl.errors import UserError

Side = Literal["image", "text"]
TEXT_PARTS = 4
"""Parts of a batch's texts by length. On bundled captions 2, 4 and 8 parts take 0.66, 0.52 and 0.46 of the time of one
(512 texts, forward and backward on a CPU); smaller parts use a GPU less well."""


class OpenClipTowers(nn.Module):
    """The towers of an open_clip model (`CLIP`, `CustomTextCLIP`); embeddings are L2-normalised."""

    def __init__(self, model: Any):  # Any: CLIP and CustomTextCLIP have no common type
        super().__init__()
        self.model: Any = model

    def encode_image(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        return self.model.encode_image(pixels, normalize=True)

    def encode_text(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        return self.model.encode_text(tokens, normalize=True)

    def encode_text_by_length(self, tokens: Int[Tensor, "*n length"]) -> Float[Tensor, "*n d"]:
        """`encode_text` in `TEXT_PARTS` parts of similar lengths, each cut behind its last end-of-text token.

        CLIP's text tower has causal attention and pools the end-of-text token, so that the padding behind it changes no
        embedding. For other towers this is `encode_text`.
        """
        shape, tokens = tokens.shape[:-1], tokens.flatten(0, -2)
        if not self._ends_early():
            return self.encode_text(tokens).unflatten(0, shape)
        ends, order = tokens.argmax(dim=1).sort(stable=True)
        num_parts = min(TEXT_PARTS, len(tokens))  # equal on all ranks: FSDP gathers its shards for every part
        longest = torch.stack([part[-1] for part in ends.tensor_split(num_parts)]).tolist()
        parts = zip(order.tensor_split(num_parts), longest, strict=True)
        rows = torch.cat([self._encode_shortened(tokens[part, : end + 1]) for part, end in parts])
        return rows[order.argsort()].unflatten(0, shape)

    def _encode_shortened(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        # as open_clip 3.3.0's `CLIP.encode_text`, which needs the whole context
        model, length = self.model, tokens.shape[1]
        dtype = model.transformer.get_cast_dtype()
        x = model.token_embedding(tokens).to(dtype) + model.positional_embedding[:length].to(dtype)
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
        projection = model.text_projection
        return F.normalize(projection(x) if isinstance(projection, nn.Linear) else x @ projection, dim=-1)

    def _ends_early(self) -> bool:
        model = self.model
        causal = isinstance(model, open_clip.CLIP) and model.attn_mask is not None
        return causal and model.text_pool_type == "argmax" and model.text_projection is not None

    def log_scale(self) -> Float[Tensor, ""]:
        """Logarithm of the logit scale, a parameter; under FSDP and in some checkpoints its shape is [1]."""
        return self.model.logit_scale.reshape(())

    def bias(self) -> Float[Tensor, ""] | None:
        bias = self.model.logit_bias
        return None if bias is None else bias.reshape(())

    def image_parameters(self) -> Iterator[nn.Parameter]:
        return self.model.visual.parameters()

    def text_parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self.model.named_parameters():
            if not name.startswith(("visual.", "logit_")):
                yield parameter


class TransformersTowers(nn.Module):
    """The towers of a transformers `CLIPModel` or `SiglipModel`; embeddings are L2-normalised."""

    def __init__(self, model: Any):  # Any: CLIPModel and SiglipModel have no common type
        super().__init__()
        self.model: Any = model

    def encode_image(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def encode_text(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        return F.normalize(self.model.get_text_features(input_ids=tokens).pooler_output, dim=-1)

    def encode_text_by_length(self, tokens: Int[Tensor, "*n length"]) -> Float[Tensor, "*n d"]:
        """`encode_text`."""
        return self.encode_text(tokens.flatten(0, -2)).unflatten(0, tokens.shape[:-1])

    def log_scale(self) -> Float[Tensor, ""]:
        """Logarithm of the logit scale, a parameter; SigLIP stores it with shape [1]."""
        return self.model.logit_scale.reshape(())

    def bias(self) -> Float[Tensor, ""] | None:
        bias = dict(self.model.named_parameters(recurse=False)).get("logit_bias")
        return None if bias is None else bias.reshape(())

    def image_parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self.model.named_parameters():
            if name.startswith(("vision_model.", "visual_projection.")):
                yield parameter

    def text_parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self.model.named_parameters():
            if name.startswith(("text_model.", "text_projection.")):
                yield parameter


class PairedTowers(nn.Module):
    """The image tower of one model with the text tower, scale and bias of another, both in one embedding space."""

    def __init__(self, image_of: "Towers", text_of: "Towers", *, embed_dim: int):
        super().__init__()
        self.image_of, self.text_of, self.embed_dim = image_of, text_of, embed_dim

    def encode_image(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        return self.image_of.encode_image(pixels)

    def encode_text(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        return self.text_of.encode_text(tokens)

    def encode_text_by_length(self, tokens: Int[Tensor, "*n length"]) -> Float[Tensor, "*n d"]:
        return self.text_of.encode_text_by_length(tokens)

    def log_scale(self) -> Float[Tensor, ""]:
        return self.text_of.log_scale()

    def bias(self) -> Float[Tensor, ""] | None:
        return self.text_of.bias()

    def image_parameters(self) -> Iterator[nn.Parameter]:
        return self.image_of.image_parameters()

    def text_parameters(self) -> Iterator[nn.Parameter]:
        return self.text_of.text_parameters()


class OnnxTowers(nn.Module):
    """The towers of two ONNX files, run on the CPU; embeddings are L2-normalised. They have no gradients.

    Args:
        image, text: run a file on a batch of inputs.
        log_scale, bias: of the logits; bias None = none.
        counts: numbers of parameters, as of `parameter_counts`.
        identity: what their outputs depend on, for cache keys.
    """

    log_logit_scale: Tensor
    logit_bias: Tensor | None

    def __init__(
        self,
        image: Callable[[np.ndarray], np.ndarray],
        text: Callable[[np.ndarray], np.ndarray],
        *,
        log_scale: float,
        bias: float | None,
        embed_dim: int,
        counts: Mapping[str, int],
        identity: str,
    ):
        super().__init__()
        self.run_image, self.run_text = image, text
        self.embed_dim, self.counts, self.identity = embed_dim, dict(counts), identity
        self.register_buffer("log_logit_scale", torch.tensor(log_scale))
        self.register_buffer("logit_bias", None if bias is None else torch.tensor(bias))

    def encode_image(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        if pixels.requires_grad and torch.is_grad_enabled():
            raise UserError("an ONNX model has no gradients, which attacks need: name the model that it was made from")
        return _run(self.run_image, pixels.float())

    def encode_text(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        return _run(self.run_text, tokens.long())

    def encode_text_by_length(self, tokens: Int[Tensor, "*n length"]) -> Float[Tensor, "*n d"]:
        """`encode_text`."""
        return self.encode_text(tokens.flatten(0, -2)).unflatten(0, tokens.shape[:-1])

    def log_scale(self) -> Float[Tensor, ""]:
        """Logarithm of the logit scale, a constant."""
        return self.log_logit_scale

    def bias(self) -> Float[Tensor, ""] | None:
        return self.logit_bias

    def image_parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def text_parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


def _run(function: Callable[[np.ndarray], np.ndarray], inputs: Tensor) -> Tensor:
    return torch.from_numpy(function(inputs.detach().cpu().numpy())).to(inputs.device)


Towers = OpenClipTowers | TransformersTowers | PairedTowers | OnnxTowers


def parameter_counts(towers: Towers) -> dict[str, int]:
    """Numbers of parameters: `parameters` of both towers with the scale, `image_parameters` of the image tower."""
    if isinstance(towers, OnnxTowers):
        return dict(towers.counts)
    return {
        "parameters": sum(p.numel() for p in towers.parameters()),
        "image_parameters": sum(p.numel() for p in towers.image_parameters()),
    }


@torch.no_grad()
def clamp_scale(towers: Towers, *, largest: float = 100.0) -> None:
    """Clamps a trained logit scale to [1, largest] after an update, as CLIP does; the parameter is its logarithm.

    A frozen one is a teacher's and stays: SigLIP's are above 100.

    Args:
        largest: 100 as in CLIP, or the scale that training starts with where that is larger.
    """
    scale = towers.get_parameter("model.logit_scale")
    if scale.requires_grad:
        scale.clamp_(0, math.log(largest))  # in place on the parameter: FSDP's shards allow no views
