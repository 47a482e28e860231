"""The student of a CLIP run: its initial weights, which of them are trained, and the plain model at the end."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from gkl_vl import cli
from gkl_vl.data.sources import Source
from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip, comes_with_weights, load_clip
from gkl_vl.models.depth import depth_groups, lock
from gkl_vl.models.inherit import inherit
from gkl_vl.models.lora import add_lora, merged
from gkl_vl.models.modes import checkpoint_activations, drop_patches
from gkl_vl.models.student import OneTower, Student, with_tower_of
from gkl_vl.models.towers import OnnxTowers, Side
from gkl_vl.training.clip_models import Adaptation, ClipModels, InitialWeights, StudentFlags
from gkl_vl.training.clip_teacher import RunTeachers, teacher_of


def load_student(
    models: ClipModels,
    flags: StudentFlags,
    teachers: RunTeachers,
    source: Source,
    *,
    bundled: bool,
    allow_pickle: bool,
    one_tower: Side | None = None,
) -> tuple[Clip, list[str]]:
    """The student with its initial weights, of which those that are not trained are frozen.

    Args:
        one_tower: the side whose tower alone is the student's; the other one is the teacher's.

    Returns:
        The student, and lines that say what it inherited.

    Raises: UserError for a model that cannot be exported, joined, cut out of its teacher or adapted as the flags say,
        and where nothing would be trained.
    """
    start, adaptation = flags.start, flags.adaptation
    _check_flags(models, flags, one_tower)
    student = load_clip(
        models.student,
        start.student_pretrained,
        allow_pickle=allow_pickle,
        random_weights=start.student_init == "random",
    )
    if isinstance(student.towers, OnnxTowers):
        raise UserError(
            f"--student {models.student} is a pair of ONNX files, which cannot be trained: name the model that it was "
            "made from"
        )
    _refuse_frozen_noise(student, models, flags)
    lines: list[str] = []
    if start.init_from_teacher or one_tower is not None:
        teacher = teacher_of(teachers, models.teachers, source, bundled=bundled, allow_pickle=allow_pickle)
        if start.init_from_teacher:
            lines = inherit(student, teacher, layers=start.inherit_layers, text_layers=start.inherit_text_layers)
            _refuse_frozen_cut(student, teacher, adaptation)
        if one_tower is not None:
            _check_projection(student, teacher, flags)
            lines = [line for line in lines if f"{one_tower} tower" in line]
            student = with_tower_of(student, teacher, one_tower)
    sides: Sequence[Side] = ("image", "text") if one_tower is None else (one_tower,)
    if flags.memory.grad_checkpointing:
        checkpoint_activations(student, sides)
    if flags.memory.patch_dropout:
        drop_patches(student, flags.memory.patch_dropout)
    _adapt(student, adaptation, sides)
    _check_trained(student, one_tower)
    student.towers.to(memory_format=torch.channels_last)
    return student, lines


def make_model(
    student: Clip, teachers: RunTeachers, adaptation: Adaptation, *, mapped: Sequence[str], one_tower: Side | None
) -> Student | OneTower:
    """The trained module."""
    fixed = adaptation.freeze_norm_stats or adaptation.lora_rank is not None
    if one_tower is not None:
        return OneTower(student.towers, one_tower, fixed_statistics=fixed)
    return Student(
        student.towers,
        embed_dim=student.embed_dim,
        teacher_dims=teachers.embed_dims,
        mapped=mapped if teachers.names else (),
        fixed_statistics=fixed,
    )


def whole(clip: Clip, adaptation: Adaptation) -> Clip:
    """The student with its adapters merged: a plain model."""
    return clip if adaptation.lora_rank is None else replace(clip, towers=merged(clip.towers))


def is_partly_frozen(model: nn.Module) -> bool:
    """Whether some parameters are not trained."""
    return not all(parameter.requires_grad for parameter in model.parameters())


def _adapt(student: Clip, adaptation: Adaptation, sides: Sequence[Side]) -> None:
    if adaptation.lora_rank is not None:
        alpha = 2 * adaptation.lora_rank if adaptation.lora_alpha is None else adaptation.lora_alpha
        add_lora(student, rank=adaptation.lora_rank, alpha=alpha, targets=adaptation.lora_targets, sides=sides)
    for side, is_locked in _locks(adaptation).items():
        if is_locked:
            lock(student.towers, side, unlocked_groups=adaptation.unlocked_groups)


def _locks(adaptation: Adaptation) -> dict[Side, bool]:
    return {"image": adaptation.lock_image, "text": adaptation.lock_text}


def _check_flags(models: ClipModels, flags: StudentFlags, one_tower: Side | None) -> None:
    """Raises: UserError for flags that contradict each other or have no effect."""
    start, adaptation = flags.start, flags.adaptation
    _check_start(models, start)
    if one_tower == "text" and flags.memory.patch_dropout:
        raise UserError(f"--patch-dropout {flags.memory.patch_dropout:g} is of images, and the text tower is trained")
    locked = [side for side, is_locked in _locks(adaptation).items() if is_locked]
    lora = adaptation.lora_rank is not None
    if not lora:
        cli.refuse_unused(vars(adaptation), ["lora_alpha", "lora_targets"], "has no effect without --lora-rank")
    if locked and lora:
        raise UserError(
            f"--lock-{locked[0]} has no effect with --lora-rank, which trains adapters alone: name the layers that get "
            "some with --lora-targets"
        )
    if one_tower is not None and (others := set(locked) - {one_tower}):
        raise UserError(f"--lock-{min(others)} has no effect, for this tower is the teacher's: leave it out")
    if adaptation.unlocked_groups and not locked:
        raise UserError(
            f"--unlocked-groups {adaptation.unlocked_groups} has no effect without --lock-image or --lock-text"
        )
    if adaptation.freeze_norm_stats and not locked:
        reason = "is what --lora-rank does anyway" if lora else "has no effect without --lock-image or --lock-text"
        raise UserError(f"--freeze-norm-stats {reason}: leave it out")


def _refuse_frozen_noise(student: Clip, models: ClipModels, flags: StudentFlags) -> None:
    """Raises: UserError where random weights would be frozen."""
    start, adaptation = flags.start, flags.adaptation
    frozen = [f"--lock-{side}" for side, is_locked in _locks(adaptation).items() if is_locked]
    frozen += ["--lora-rank"] if adaptation.lora_rank is not None else []
    text_cfg = {} if student.model_cfg is None else student.model_cfg["text_cfg"]
    if text_cfg.get("hf_model_name") and start.student_init is None:  # which load_clip loads with its weights
        frozen = [flag for flag in frozen if flag != "--lock-text"]
    if frozen and not has_weights(models, start):
        raise UserError(
            f"{frozen[0]} keeps weights of --student {models.student} that are random: {random_remedy(start)}"
        )


def has_weights(models: ClipModels, start: InitialWeights) -> bool:
    """Whether the student starts from weights that were trained."""
    if start.student_init == "random":
        return False
    return start.student_pretrained is not None or start.init_from_teacher or comes_with_weights(models.student)


def random_remedy(start: InitialWeights) -> str:
    """For a student without."""
    if start.student_init == "random":
        return "leave out --student-init random"
    return "add --student-pretrained, or take a student that comes with weights"


def _check_start(models: ClipModels, start: InitialWeights) -> None:
    if not start.init_from_teacher:
        flags = ["inherit_layers", "inherit_text_layers"]
        cli.refuse_unused(vars(start), flags, "has no effect without --init-from-teacher")
        return
    if not models.distils:
        raise UserError("--init-from-teacher needs a teacher to take weights from: leave out --teacher none")
    reason = "is of other weights than those of --init-from-teacher"
    cli.refuse_unused(vars(start), ["student_pretrained", "student_init"], reason)
    if comes_with_weights(models.student):
        raise UserError(
            f"--student {models.student} comes with weights, which --init-from-teacher would replace: leave one out"
        )


def _refuse_frozen_cut(student: Clip, teacher: Clip, adaptation: Adaptation) -> None:
    """Raises: UserError where a frozen tower would be a part of the teacher's, which has to be trained."""
    frozen: dict[str, list[Side]] = {f"--lock-{side}": [side] for side, locked in _locks(adaptation).items() if locked}
    if adaptation.lora_rank is not None:
        frozen = {"--lora-rank": list(_locks(adaptation))}
    for flag, sides in frozen.items():
        if any(_shapes(student, side) != _shapes(teacher, side) for side in sides):
            raise UserError(
                f"{flag} would freeze a tower that --init-from-teacher cuts out of a larger one, and that has to be "
                "trained: leave one out"
            )


def _shapes(clip: Clip, side: Side) -> list[list[torch.Size]]:
    return [[parameter.shape for parameter in group] for group in depth_groups(clip.towers, side)]


def _check_projection(student: Clip, teacher: Clip, flags: StudentFlags) -> None:
    """Raises: UserError where joining the towers would draw a projection anew that was inherited or is frozen."""
    flag = "--init-from-teacher" if flags.start.init_from_teacher else "--lora-rank"
    if student.embed_dim != teacher.embed_dim and (flags.start.init_from_teacher or flags.adaptation.lora_rank):
        raise UserError(
            f"{flag}: --student {student.name} has embeddings of length {student.embed_dim}, and in its teacher's "
            f"space of {teacher.embed_dim} its projection would be random: take a student of this embed_dim"
        )


def _check_trained(student: Clip, one_tower: Side | None) -> None:
    """Raises: UserError for a CoCa, and where no parameter of the trained towers is left to train."""
    sides = {"image": student.towers.image_parameters(), "text": student.towers.text_parameters()}
    trained = [p for side, parameters in sides.items() if one_tower in (None, side) for p in parameters]
    if student.model_cfg is not None and "multimodal_cfg" in student.model_cfg:
        raise UserError(f"--student {student.name} is a CoCa, whose captioner no loss here trains: take a CLIP")
    if not any(parameter.requires_grad for parameter in trained):
        raise UserError(
            "--lock-image and --lock-text leave nothing to train: leave one out, or give --unlocked-groups"
            if one_tower is None
            else f"--lock-{one_tower} leaves nothing to train: leave it out, or give --unlocked-groups"
        )
