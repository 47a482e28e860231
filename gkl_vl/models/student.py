"""The trained modules: a student with towers of its own, or one tower in the embedding space of a teacher.

Axis letters: n = rows of this process, d = the student's embedding, e = the teacher's, h w = pixels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip, comes_with_weights
from gkl_vl.models.modes import evaluating, fix_statistics
from gkl_vl.models.pretrained import build_open_clip
from gkl_vl.models.towers import OpenClipTowers, PairedTowers, Side, Towers


class Student(nn.Module):
    """The trained module: the towers and, where dimensions differ, linear maps into the teachers' embedding spaces.

    The maps are checkpointed with the model and not exported. `forward` computes all outputs because
    DistributedDataParallel supports one forward per step.

    Args:
        embed_dim: of the student.
        teacher_dims: of each teacher.
        mapped: the sides, "image" and "text", whose embeddings the loss compares with the teachers'.
        fixed_statistics: batch norms whose parameters are frozen stay in evaluation mode.
    """

    def __init__(
        self,
        towers: Towers,
        *,
        embed_dim: int,
        teacher_dims: Sequence[int] = (),
        mapped: Sequence[str] = (),
        fixed_statistics: bool = False,
    ):
        super().__init__()
        self.towers, self.fixed_statistics = towers, fixed_statistics
        self.mapped = tuple(mapped)
        self.dims = list(teacher_dims) or [embed_dim]
        width = sum(self.dims)  # the maps of all teachers are one matrix
        needed = self.mapped if self.dims != [embed_dim] else ()  # DDP waits for the gradient of every parameter
        self.image_map = nn.Linear(embed_dim, width, bias=False) if "image" in needed else nn.Identity()
        self.text_map = nn.Linear(embed_dim, width, bias=False) if "text" in needed else nn.Identity()

    @property
    def in_teachers_space(self) -> bool:
        """Whether images are trained into the space of a single teacher as they are, without a map."""
        return "image" in self.mapped and isinstance(self.image_map, nn.Identity)

    def text_parameters(self) -> list[nn.Parameter]:
        """Parameters of the text tower and of its map."""
        return [*self.towers.text_parameters(), *self.text_map.parameters()]

    def train(self, mode: bool = True) -> "Student":
        """Training mode, but for batch norms that stay fixed."""
        super().train(mode)
        if self.fixed_statistics:
            fix_statistics(self.towers)
        return self

    def forward(self, pixels: Float[Tensor, "n 3 h w"], tokens: Int[Tensor, "*m length"]) -> dict[str, Tensor]:
        """Embeddings [n, d] of the images and [*m, d] of any number of texts.

        "mapped_image" and "mapped_text" are those in the teacher's space, also normalised, of the sides in `mapped`;
        with several teachers those in each space, one behind the other.
        """
        text = self.towers.encode_text_by_length(tokens)  # first: it waits for the device, which has nothing to do yet
        image = self.towers.encode_image(pixels)
        output = {"image": image, "text": text, "logit_scale": self.towers.log_scale().exp()}
        if "image" in self.mapped:
            output["mapped_image"] = self._normalised(self.image_map(image))
        if "text" in self.mapped:
            output["mapped_text"] = self._normalised(self.text_map(text))
        bias = self.towers.bias()
        return output if bias is None else output | {"logit_bias": bias}

    def _normalised(self, mapped: Float[Tensor, "*m width"]) -> Float[Tensor, "*m width"]:
        return torch.cat([F.normalize(part, dim=-1) for part in mapped.split(self.dims, dim=-1)], dim=-1)


class OneTower(nn.Module):
    """The trained module where one tower is trained, in a teacher's space, and the other is the teacher's own.

    Args:
        towers: those of `with_tower_of`; all parameters but the trained tower's are frozen.
        side: of the trained tower.
        fixed_statistics: as of `Student`.
    """

    def __init__(self, towers: Towers, side: Side, *, fixed_statistics: bool = False):
        super().__init__()
        self.towers, self.side, self.fixed_statistics = towers, side, fixed_statistics
        trained = set(towers.image_parameters() if side == "image" else towers.text_parameters())
        for parameter in towers.parameters():
            if parameter not in trained:  # of the trained, fixed positions stay fixed
                parameter.requires_grad_(False)

    def text_parameters(self) -> list[nn.Parameter]:
        """Parameters of the text tower."""
        return list(self.towers.text_parameters())

    def train(self, mode: bool = True) -> "OneTower":
        """Training mode, but for batch norms that stay fixed."""
        super().train(mode)
        if self.fixed_statistics:
            fix_statistics(self.towers)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Embeddings [n, e] of pixels [n, 3, h, w], or [*n, e] of tokens [*n, length]; L2-normalised."""
        return self.towers.encode_image(inputs) if self.side == "image" else self.towers.encode_text_by_length(inputs)


def with_tower_of(student: Clip, teacher: Clip, side: Side) -> Clip:
    """The student's tower of this side with the teacher's other tower, logit scale and bias, as one open_clip model.

    The embeddings have the teacher's length. A student's tower keeps its weights, but for the last layers where they
    have another width, which are drawn anew. Size and normalisation of images, or the tokenizer, are those of the
    student's tower.

    Raises:
        UserError: a model of transformers, a CoCa; a student with weights for another activation than the teacher's; a
            student's tower without projection, of another width.
    """
    configs = [_open_clip_config(role, clip) for role, clip in (("student", student), ("teacher", teacher))]
    quick = [bool(config.get("quick_gelu")) for config in configs]
    if quick[0] != quick[1] and comes_with_weights(student.name) and _has_gelu_flag(configs[0], side):
        own, others = ("QuickGELU" if is_quick else "GELU" for is_quick in quick)
        raise UserError(
            f"--student {student.name} was trained with {own} and its teacher with {others}, and a model has one "
            "activation: take another student, or the name of an architecture, which has random weights"
        )
    of_student, of_teacher = configs
    key = "vision_cfg" if side == "image" else "text_cfg"
    config = of_teacher | {key: of_student[key]}
    if side == "text":  # the key decides the class of the text tower
        config = {name: value for name, value in config.items() if name != "custom_text"}
        config |= {name: value for name, value in of_student.items() if name == "custom_text"}
    model = build_open_clip(config, student.name, pretrained_text=False, allow_pickle=False)
    weights = model.state_dict()
    students, teachers = student.towers.state_dict(), teacher.towers.state_dict()
    for name, drawn in weights.items():
        trained = name.startswith("visual.") == (side == "image") and not name.startswith("logit_")
        stored = (students if trained else teachers)[f"model.{name}"]
        if stored.shape == drawn.shape:
            weights[name] = stored
    model.load_state_dict(weights)
    images, texts = (student, teacher) if side == "image" else (teacher, student)
    joined = Clip(
        name=student.name,
        towers=OpenClipTowers(model),
        preprocess=images.preprocess,
        tokenize=texts.tokenize,
        hf_tokenizer=texts.hf_tokenizer,
        model_cfg=config,
    )
    width = _width(joined, side)
    if width != teacher.embed_dim:
        raise UserError(
            f"the {side} tower of --student {student.name} has no projection and a width of {width}, and the teacher's "
            f"embeddings have a length of {teacher.embed_dim}: set timm_proj, proj_type or hf_proj_type in its config "
            "to 'linear'"
        )
    return joined


@torch.inference_mode()
def _width(clip: Clip, side: Side) -> int:
    """Length of the embeddings of one tower."""
    with evaluating(clip.towers):
        if side == "text":
            return clip.towers.encode_text(clip.tokenize(["a"])).shape[1]
        return clip.towers.encode_image(torch.zeros(1, 3, clip.image_size, clip.image_size)).shape[1]


def _has_gelu_flag(config: dict, side: Side) -> bool:
    """Whether a tower has the activation that `quick_gelu` names: timm's, transformers' and ResNets have their own."""
    if side == "text":
        return not config["text_cfg"].get("hf_model_name")
    vision = config["vision_cfg"]
    return not vision.get("timm_model_name") and not isinstance(vision.get("layers"), list)


def _open_clip_config(role: str, clip: Clip) -> dict:
    if clip.model_cfg is None:
        raise UserError(
            f"--{role} {clip.name} is a transformers model, whose towers cannot join another's: take an open_clip one"
        )
    if "multimodal_cfg" in clip.model_cfg or any(
        clip.model_cfg[key].get("output_tokens") for key in ("vision_cfg", "text_cfg")
    ):
        raise UserError(f"--{role} {clip.name} is a CoCa, whose towers return tokens as well: take a CLIP or a SigLIP")
    return clip.model_cfg


def paired(*, image_of: Clip, text_of: Clip) -> Clip:
    """The images of one model with the texts and the scale of another, whose space they share. For evaluation.

    Raises:
        UserError: embeddings of different lengths.
    """
    if image_of.embed_dim != text_of.embed_dim:
        raise UserError(
            f"{image_of.name} has embeddings of length {image_of.embed_dim} and {text_of.name} of {text_of.embed_dim}: "
            "its images and texts cannot be compared; recipes/clip_image_tower.py trains a tower for another's space"
        )
    return replace(
        image_of,
        towers=PairedTowers(image_of.towers, text_of.towers, embed_dim=text_of.embed_dim),
        tokenize=text_of.tokenize,
        hf_tokenizer=text_of.hf_tokenizer,
        model_cfg=None,
    )
