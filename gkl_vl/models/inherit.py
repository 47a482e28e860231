"""Weight inheritance: the initial weights of a narrower or shallower ViT student, taken from its teacher.

Source: manual inheritance of TinyCLIP (Wu et al., ICCV 2023; code in microsoft/Cream, TinyCLIP/src/open_clip/
weight_inherit.py, which takes every n-th layer and the first heads, MLP neurons and channels; here they are chosen by
importance, and the layers span the depth).

Axis letters: w = residual channels of a tower (its width), m = MLP neurons of a layer, k = heads, a = width of a head,
r = rows of some heads in a projection, d = embedding.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip import CLIP, CustomTextCLIP
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, resize_pos_embed
from torch import Tensor

from gkl_vl.errors import UserError
from gkl_vl.models.agreement import place_of
from gkl_vl.models.clip import Clip
from gkl_vl.models.towers import OpenClipTowers, Side

_SECTIONS: dict[Side, str] = {"image": "vision_cfg", "text": "text_cfg"}
_BLOCKS = ("block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
_UNSUPPORTED: dict[Side, tuple[str, ...]] = {
    "image": ("attentional_pool", "output_tokens", *_BLOCKS),
    "text": ("embed_cls", "output_tokens", *_BLOCKS),
}
_LAYERS = ("act_kwargs", "norm_kwargs", "ls_init_value")
_SAME: dict[Side, tuple[str, ...]] = {
    "image": ("patch_size", "pool_type", "final_ln_after_pool", "no_ln_pre", "pos_embed_type", *_LAYERS),
    "text": ("pool_type", "no_causal_mask", "proj_type", "proj_bias", *_LAYERS),
}
"""Settings that the weights were trained with and that a part of them needs as well."""
_LOGITS = ("logit_scale", "logit_bias")
_PROBES = ("a", "A cat.", "7 é", "some_DOGS!")
"""Short texts, which show another vocabulary, cleaning, padding or other special tokens."""


def inherit(
    student: Clip, teacher: Clip, *, layers: Sequence[int] | None = None, text_layers: Sequence[int] | None = None
) -> list[str]:
    """Overwrites the student's weights, in place, with a part of its teacher's. Equal shapes give the teacher itself.

    What is taken; indices keep their order, and of equal importances the first count:

    - Layers: `layers` and `text_layers`, or evenly spaced ones, with the first and the last (one: the first).
    - Heads, by layer: those with the largest Frobenius norm of their map from the layer's normalised input to the
      residual stream, W_o^h W_v^h.
    - MLP neurons, by layer: those with the largest product of the norms of their row in c_fc and column in c_proj.
    - Residual channels, one choice for a whole tower: those with the largest estimate of their mean square, the sum of
      what writes into a channel. That is the squared norm of its row in the patch embedding and its squared class
      embedding, or the mean square of the token embeddings; the mean square of the positions; these as normalised by
      ln_pre where there is one; and the squared norms of its rows and biases in out_proj and c_proj, of the layers,
      heads and neurons taken.
    - Dimensions of the embedding, one choice for both towers: those with the largest product of the norms of their
      columns in the image and the text projection. Without text projection they are the text tower's channels.
    - Positions of texts: the first. Those of images are interpolated where the grid differs (open_clip's
      `resize_pos_embed`). Logit scale and bias.

    These importances need no data; weights behind a LayerNorm are multiplied by its gains, those before a LayerScale by
    its. A LayerNorm keeps the gains and biases of its channels, but takes mean and variance over fewer of them: a
    narrower student is another function than its teacher before training, even if all dropped channels are zero. Fewer
    heads are always fewer channels. Layers and MLP neurons that add nothing can be dropped without a change.

    Args:
        student: plain ViT CLIP of open_clip (`CLIP` or `CustomTextCLIP`), in no way larger than the teacher, but for
            its images.
        teacher: likewise; the two classes may differ. It is not changed.
        layers: indices of layers of the teacher's image tower from 0, ascending, as many as the student has.
        text_layers: likewise of the text tower.

    Returns:
        At most 5 lines for the terminal: what was taken.

    Raises:
        UserError: other kinds of towers on either side, a student with larger sizes, another width of heads, other
            patches, tokens, normalisation, activation, or other settings that the weights depend on; layers that do
            not exist, are not ascending or too few. The student is unchanged then.
    """
    for role, clip in (("student", student), ("teacher", teacher)):
        _check_kind(role, clip)
    place = place_of(student.name if student.name.endswith(".json") else None)
    _check_settings(student, teacher, place)
    _check_inputs(student, teacher, place)
    _check_maxima(student, teacher, place)
    ours: dict[Side, _Tower] = {side: _tower(student, side) for side in _SECTIONS}
    theirs: dict[Side, _Tower] = {side: _tower(teacher, side) for side in _SECTIONS}
    for side in _SECTIONS:
        _check_widths(ours[side], theirs[side], place)
    given: dict[Side, Sequence[int] | None] = {"image": layers, "text": text_layers}
    chosen = {side: _layers(given[side], ours[side], theirs[side]) for side in _SECTIONS}
    kept: dict[Side, _Kept] = {side: _choose(theirs[side], ours[side], chosen[side]) for side in _SECTIONS}
    dimensions = _dimensions(theirs, kept, _config(student)["embed_dim"])
    positions = torch.arange(_settings(student, "text")["context_length"])
    sliced = _sliced(theirs["image"], kept["image"], ours["image"].prefix, dimensions, positions=None)
    sliced |= _sliced(theirs["text"], kept["text"], ours["text"].prefix, dimensions, positions=positions)
    _load(_model(student), _model(teacher), sliced)
    return _report(ours, theirs, kept)


# ---- towers


@dataclass(frozen=True, kw_only=True)
class _Tower:
    """One tower of an open_clip model."""

    side: Side
    name: str
    """For messages: of which model it is."""
    prefix: str
    """Of its tensors in the model's state dict."""
    tensors: dict[str, Tensor]
    """Its part of the state dict, without the prefix, on the CPU."""
    heads: int
    num_layers: int

    @property
    def width(self) -> int:
        return self.tensors["positional_embedding"].shape[1]

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def num_neurons(self) -> int:
        return len(self.layer(0)["mlp.c_fc.bias"])

    def layer(self, index: int) -> dict[str, Tensor]:
        """Tensors of a layer under their names in its module."""
        prefix = f"transformer.resblocks.{index}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def _model(clip: Clip) -> Any:
    towers: Any = clip.towers
    return towers.model


def _tower(clip: Clip, side: Side) -> _Tower:
    model = _model(clip)
    if side == "image":
        prefix, module = "visual.", model.visual
    else:  # the text tower of a `CLIP` has no module of its own
        prefix, module = ("text.", model.text) if isinstance(model, CustomTextCLIP) else ("", model)
    others = ("visual.", "logit_") if side == "text" else ()
    tensors = {
        name.removeprefix(prefix): tensor.cpu()
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix) and not name.startswith(others)
    }
    blocks: Any = module.transformer.resblocks
    return _Tower(
        side=side,
        name=clip.name,
        prefix=prefix,
        tensors=tensors,
        heads=blocks[0].attn.num_heads,
        num_layers=len(blocks),
    )


# ---- refusals


def _check_kind(role: str, clip: Clip) -> None:
    """Raises: UserError if a model is not a plain ViT CLIP of open_clip with its own text transformer."""
    remedy = f"take a {role} such as {'ViT-T-16' if role == 'student' else 'ViT-B-16'}"
    cfg = clip.model_cfg
    if cfg is None or not isinstance(clip.towers, OpenClipTowers):
        raise UserError(
            f"{role} {clip.name} is no open_clip model of `load_clip`, whose weights have known places: {remedy}"
        )
    if not isinstance(clip.towers.model, CLIP | CustomTextCLIP):
        raise UserError(f"{role} {clip.name} is a {type(clip.towers.model).__name__} and no plain CLIP: {remedy}")
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    needs = "inheritance needs open_clip's ViT towers"
    if timm_name := vision.get("timm_model_name"):
        raise UserError(f"the image tower of {role} {clip.name} is timm's {timm_name}: {needs}, so {remedy}")
    if isinstance(vision.get("layers"), list | tuple):
        raise UserError(
            f"the image tower of {role} {clip.name} is a ResNet with no heads to take: {needs}, so {remedy}"
        )
    if hf_name := text.get("hf_model_name"):
        raise UserError(
            f"the text tower of {role} {clip.name} is transformers' {hf_name}: inheritance needs open_clip's own text "
            f"transformer, so {remedy}"
        )
    for side, section in _SECTIONS.items():
        for key in _UNSUPPORTED[side]:
            value = _settings(clip, side)[key]
            if value not in (None, False, "default"):
                step = f"remove it from {clip.name}" if role == "student" else remedy
                raise UserError(
                    f"{section}.{key} of {role} {clip.name} is {json.dumps(value)}, which inheritance does not "
                    f"support: {step}"
                )


def _config(clip: Clip) -> dict:
    assert clip.model_cfg is not None
    return clip.model_cfg


def _settings(clip: Clip, side: Side) -> dict[str, Any]:
    """A tower's section of the model config, with open_clip's defaults."""
    section = _config(clip)[_SECTIONS[side]]
    return asdict(CLIPVisionCfg(**section) if side == "image" else CLIPTextCfg(**section))


def _check_settings(student: Clip, teacher: Clip, place: str) -> None:
    """Raises: UserError if a setting differs that weights depend on and that no slice can change."""
    cfg, others = _config(student), _config(teacher)
    pairs: list[tuple[str, Any, Any]] = [("quick_gelu", bool(cfg.get("quick_gelu")), bool(others.get("quick_gelu")))]
    for side, section in _SECTIONS.items():
        own, theirs = _settings(student, side), _settings(teacher, side)
        pairs += [(f"{section}.{key}", own[key], theirs[key]) for key in _SAME[side]]
    pairs.append(("init_logit_bias", cfg.get("init_logit_bias"), others.get("init_logit_bias")))
    for key, ours, wanted in pairs:
        same = ours == wanted
        if key.endswith(("ls_init_value", "init_logit_bias")):  # initial values: only whether they exist counts
            same = (ours is None) == (wanted is None)
        if not same:
            raise UserError(
                f"{key} of student {student.name} is {json.dumps(ours)} and of teacher {teacher.name} "
                f"{json.dumps(wanted)}, which its weights need: set it to {json.dumps(wanted)} in {place}"
            )


def _check_inputs(student: Clip, teacher: Clip, place: str) -> None:
    """Raises: UserError if texts have other tokens or images another normalisation."""
    own, theirs = _settings(student, "text"), _settings(teacher, "text")
    if own["vocab_size"] != theirs["vocab_size"] or not _same_tokens(student, teacher):
        tokenizer = None if teacher.hf_tokenizer is None else teacher.hf_tokenizer.name_or_path
        wanted = {"vocab_size": theirs["vocab_size"], "hf_tokenizer_name": tokenizer}
        wanted |= {key: theirs[key] for key in ("tokenizer_mode", "tokenizer_kwargs")}
        values = ", ".join(f"{key} to {json.dumps(value)}" for key, value in wanted.items())
        raise UserError(
            f"student {student.name} has another tokenizer than teacher {teacher.name}, whose token embeddings it "
            f"would take: set in text_cfg of {place} {values}"
        )
    pairs = [(list(clip.preprocess.mean), list(clip.preprocess.std)) for clip in (student, teacher)]
    (mean, std), (mean_wanted, std_wanted) = pairs
    if any(abs(a - b) > 1e-3 for a, b in zip(mean + std, mean_wanted + std_wanted, strict=True)):
        raise UserError(
            f"student {student.name} normalises images with mean {mean} and std {std}, teacher {teacher.name} with "
            f"{mean_wanted} and {std_wanted}, which its weights need: write them as mean and std in preprocess_cfg, "
            f"beside model_cfg, in {place}"
        )


def _same_tokens(student: Clip, teacher: Clip) -> bool:
    """Whether two tokenizers give every token the same id, and texts that fit the same ids."""
    vocabularies, special = [], set()
    for clip in (student, teacher):
        tokenizer: Any = clip.tokenize if clip.hf_tokenizer is None else clip.hf_tokenizer
        tokens = tokenizer.encoder if clip.hf_tokenizer is None else tokenizer.get_vocab()
        vocabularies.append({number: token for token, number in tokens.items()})
        special |= set(tokenizer.all_special_ids)  # of different names in open_clip and transformers
    first, second = ({number: t for number, t in tokens.items() if number not in special} for tokens in vocabularies)
    ids, others = (clip.tokenize(list(_PROBES)) for clip in (student, teacher))
    if ids.shape[1] != others.shape[1]:  # the last token of a text that was cut is another
        length = min(ids.shape[1], others.shape[1]) - 1
        ids, others = ids[:, :length], others[:, :length]
    return first == second and torch.equal(ids, others)


def _check_maxima(student: Clip, teacher: Clip, place: str) -> None:
    """Raises: UserError if the student has more layers, positions of texts, or dimensions than the teacher."""
    places: tuple[tuple[Side, str], ...] = (("image", "layers"), ("text", "layers"), ("text", "context_length"))
    sizes = {"embed_dim": tuple(_config(clip)["embed_dim"] for clip in (student, teacher))}
    for side, key in places:
        sizes[f"{_SECTIONS[side]}.{key}"] = tuple(_settings(clip, side)[key] for clip in (student, teacher))
    for key, (size, largest) in sizes.items():
        if size > largest:
            raise UserError(
                f"{key} of student {student.name} is {size}, and teacher {teacher.name} has {largest} to take from: "
                f"set it to at most {largest} in {place}"
            )
    length, longest = sizes["text_cfg.context_length"]
    if length < longest and _settings(teacher, "text")["pool_type"] == "last":
        raise UserError(
            f"text_cfg.context_length of student {student.name} is {length}, and teacher {teacher.name} reads the "
            f"embedding of a text at its last position, {longest - 1}: set it to {longest} in {place}"
        )


def _check_widths(ours: _Tower, theirs: _Tower, place: str) -> None:
    """Raises: UserError if the student's width, heads or MLP neurons are no part of the teacher's."""
    side, section = ours.side, _SECTIONS[ours.side]
    which = f"the {side} tower of student {ours.name}"
    if ours.head_width != theirs.head_width or ours.heads > theirs.heads:
        heads = min(max(math.ceil(ours.width / theirs.head_width - 0.5), 1), theirs.heads)
        key, value = ("head_width", theirs.head_width) if side == "image" else ("heads", heads)
        raise UserError(
            f"{which} has a width of {ours.width} with {ours.heads} heads of {ours.head_width}, and whole heads of "
            f"teacher {theirs.name}, at most {theirs.heads} of {theirs.head_width}, are taken: set {section}.width to "
            f"{heads * theirs.head_width} and {section}.{key} to {value} in {place}"
        )
    if ours.num_neurons > theirs.num_neurons:
        raise UserError(
            f"{which} has {ours.num_neurons} MLP neurons in a layer, of which teacher {theirs.name} has "
            f"{theirs.num_neurons}: set {section}.mlp_ratio to at most {theirs.num_neurons / ours.width:g} in {place}"
        )


def _layers(given: Sequence[int] | None, ours: _Tower, theirs: _Tower) -> list[int]:
    """The teacher's layers that the student takes.

    Raises:
        UserError: layers that do not exist, are not ascending, or another number of them.
    """
    count, depth = ours.num_layers, theirs.num_layers
    steps = max(count - 1, 1)
    even = [(2 * index * (depth - 1) + steps) // (2 * steps) for index in range(count)]  # half a layer is rounded up
    if given is None:
        return even
    chosen, remedy = list(given), f"write {count} of them, such as {_spelt(even)}"
    start = f"{'--inherit-layers' if ours.side == 'image' else '--inherit-text-layers'} {_spelt(chosen)}"
    if outside := [index for index in chosen if not 0 <= index < depth]:
        raise UserError(
            f"{start}: teacher {theirs.name} has the {ours.side} layers 0 to {depth - 1}, no {outside[0]}: {remedy}"
        )
    if len(chosen) != count:
        raise UserError(f"{start}: the {ours.side} tower of student {ours.name} has {count} layers: {remedy}")
    if chosen != sorted(set(chosen)):
        raise UserError(f"{start}: not each layer once in ascending order: {remedy}")
    return chosen


# ---- what is taken


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Indices of what a tower of the student takes of its teacher's, each ascending."""

    layers: list[int]
    heads: list[list[int]]
    """By layer of the student, as `rows` and `neurons`."""
    rows: list[Int[Tensor, " r"]]
    """Of these heads, in each of the teacher's three projections to them."""
    neurons: list[Int[Tensor, " kept_neurons"]]
    channels: Int[Tensor, " kept_channels"]


def _choose(teacher: _Tower, student: _Tower, layers: list[int]) -> _Kept:
    heads, rows, neurons, power = [], [], [], _embedded(teacher)
    for layer in map(teacher.layer, layers):
        value = layer["attn.in_proj_weight"][2 * teacher.width :].double() * _vector(layer, "ln_1.weight")
        fc = layer["mlp.c_fc.weight"].double() * _vector(layer, "ln_2.weight")
        scales = [_vector(layer, f"ls_{number}.gamma") for number in (1, 2)]
        out = scales[0][..., None] * layer["attn.out_proj.weight"].double()
        proj = scales[1][..., None] * layer["mlp.c_proj.weight"].double()
        best = _largest(_head_norms(value, out, teacher.heads), student.heads)
        heads.append(best.tolist())
        rows.append((best[:, None] * teacher.head_width + torch.arange(teacher.head_width)).flatten())
        neurons.append(_largest(fc.norm(dim=1) * proj.norm(dim=0), student.num_neurons))
        power = power + out[:, rows[-1]].square().sum(dim=1) + proj[:, neurons[-1]].square().sum(dim=1)
        for scale, bias in zip(scales, ("attn.out_proj.bias", "mlp.c_proj.bias"), strict=True):
            power = power + (scale * layer[bias].double()).square()
    return _Kept(layers=layers, heads=heads, rows=rows, neurons=neurons, channels=_largest(power, student.width))


def _vector(tensors: Mapping[str, Tensor], name: str, *, missing: float = 1.0) -> Tensor:
    """A gain or a bias [w]; a constant [] where there is none."""
    return tensors[name].double() if name in tensors else torch.tensor(missing, dtype=torch.float64)


def _largest(importance: Float[Tensor, " n"], count: int) -> Int[Tensor, " kept"]:
    """Indices of the largest, ascending; of equal ones the first."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _head_norms(value: Float[Tensor, "w w"], out: Float[Tensor, "w w"], heads: int) -> Float[Tensor, " k"]:
    """Frobenius norms of W_o^h W_v^h of all heads: |A B|^2 = tr(A^T A B B^T), without the [w, w] products."""
    rows, columns = value.unflatten(0, (heads, -1)), out.unflatten(1, (heads, -1))
    outs, values = torch.einsum("whi,whj->hij", columns, columns), torch.einsum("hiw,hjw->hij", rows, rows)
    return (outs * values).sum(dim=(1, 2)).clamp(min=0).sqrt()


def _embedded(tower: _Tower) -> Float[Tensor, " w"]:
    """Estimate of the mean square of a channel of the embedded image or text, for pixels of variance 1."""
    tensors = tower.tensors
    power = tensors["positional_embedding"].double().square().mean(dim=0)
    if tower.side == "text":
        return power + tensors["token_embedding.weight"].square().mean(dim=0, dtype=torch.float64)
    power = power + tensors["class_embedding"].double().square()
    power = power + tensors["conv1.weight"].double().flatten(1).square().sum(dim=1)
    if "ln_pre.weight" in tensors:
        bias = _vector(tensors, "ln_pre.bias", missing=0.0)
        power = tensors["ln_pre.weight"].double().square() * power / power.mean() + bias.square()
    return power


def _dimensions(
    teacher: Mapping[Side, _Tower], kept: Mapping[Side, _Kept], count: int
) -> Int[Tensor, " kept_dimensions"]:
    image, text = teacher["image"].tensors, teacher["text"].tensors
    if "text_projection" in text:
        projection = text["text_projection"]
    elif "text_projection.weight" in text:
        projection = text["text_projection.weight"].T
    else:
        return kept["text"].channels
    norms = []
    for tensors, norm, matrix in ((image, "ln_post", image["proj"]), (text, "ln_final", projection)):
        gains = _vector(tensors, f"{norm}.weight")
        norms.append((gains[..., None] * matrix.double()).norm(dim=0))
    return _largest(norms[0] * norms[1], count)


def _sliced(
    teacher: _Tower, kept: _Kept, prefix: str, dimensions: Tensor, *, positions: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of the student's tower, of whose state dict `prefix` is the prefix, but images have all positions."""
    channels = kept.channels
    axes: dict[str, tuple[Tensor | None, ...]] = {
        "positional_embedding": (positions, channels),
        "token_embedding.weight": (None, channels),
        "proj": (channels, dimensions),
        "text_projection": (channels, dimensions),
        "text_projection.weight": (dimensions, channels),
        "text_projection.bias": (dimensions,),
    }
    taken = {
        name: _take(tensor, axes.get(name, (channels,)))  # of the others, a vector or a kernel for each channel
        for name, tensor in teacher.tensors.items()
        if not name.startswith("transformer.")
    }
    for place, index in enumerate(kept.layers):
        rows, neurons = kept.rows[place], kept.neurons[place]
        projections = torch.cat([rows + part * teacher.width for part in range(3)])  # of queries, keys and values
        axes = {
            "attn.in_proj_weight": (projections, channels),
            "attn.in_proj_bias": (projections,),
            "attn.out_proj.weight": (channels, rows),
            "mlp.c_fc.weight": (neurons, channels),
            "mlp.c_fc.bias": (neurons,),
            "mlp.c_proj.weight": (channels, neurons),
        }
        for name, tensor in teacher.layer(index).items():
            taken[f"transformer.resblocks.{place}.{name}"] = _take(tensor, axes.get(name, (channels,)))
    return {prefix + name: tensor for name, tensor in taken.items()}


def _take(tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """The entries at these indices of the first axes; None stands for all."""
    for axis, index in enumerate(indices):
        tensor = tensor if index is None else tensor.index_select(axis, index)
    return tensor


def _load(model: Any, source: Any, sliced: dict[str, Tensor]) -> None:
    """Overwrites the student's model with the tensors of its towers and the logit scale and bias of the teacher's."""
    state, teachers = model.state_dict(), source.state_dict()
    resize_pos_embed(sliced, model)
    sliced |= {name: teachers[name].reshape(state[name].shape) for name in _LOGITS if name in state}
    # torch would load all others before it raises
    assert {name: t.shape for name, t in sliced.items()} == {name: t.shape for name, t in state.items()}
    model.load_state_dict(sliced)


def _report(ours: Mapping[Side, _Tower], theirs: Mapping[Side, _Tower], kept: Mapping[Side, _Kept]) -> list[str]:
    lines = []
    for side, choice in kept.items():
        small, large = ours[side], theirs[side]
        positions, longest = (len(tower.tensors["positional_embedding"]) for tower in (small, large))
        how = "interpolated from" if side == "image" else "the first of"
        lines.append(
            f"{side} tower from {large.name}: layers {_spelt(choice.layers)} of {large.num_layers}, {small.width} of "
            f"{large.width} channels, {small.heads} of {large.heads} heads and {small.num_neurons} of "
            f"{large.num_neurons} MLP neurons a layer"
            + (f", {positions} positions, {how} {longest}" if positions != longest else "")
        )
        if small.heads < large.heads:
            lines.append(f"  heads of the {side} tower, by layer: {', '.join(map(_spelt, choice.heads))}")
    dims, most = (sides["image"].tensors["proj"].shape[1] for sides in (ours, theirs))
    return [*lines, f"embedding: {dims} of {most} dimensions"]


def _spelt(indices: Sequence[int]) -> str:
    return " ".join(map(str, indices))
