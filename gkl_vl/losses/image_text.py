"""The losses of CLIP distillation on image and text embeddings, over the rows of all processes.

Axis letters: n = rows of this process, N = rows of all processes, d = the student's embedding, e = the teacher's.

Every term is a mean over N rows, or a ratio of two sums over N rows. A rank computes its own rows' share of it, times
the number of ranks, against the columns of all ranks; `gather_rows` has gradients, so that DistributedDataParallel's
averaging gives exactly the gradient of one process on the joined batch. The returned value is the global one on every
rank. All ranks must have the same number of rows.
"""

from typing import Literal, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gkl_vl.distributed import gather_rows, rank, sum_across_processes, world_size
from gkl_vl.losses.gkl import (
    GklSettings,
    check_gamma,
    check_positive,
    kl_rows,
    ratio_of_sums,
    smooth_weight,
    soft_cross_entropy_rows,
    upcast,
    wmse_rows,
)
from gkl_vl.losses.tiles import Terms, TiledLoss, sigmoid_contrastive, sigmoid_cross_entropy

Scalars = dict[str, Tensor]
CPU_TILE = 512
"""Side of a tile on a CPU: its logits stay in the cache. An [n, N] up to a single tile, which needs the same memory, is
dense. Beyond, tiles are faster (0.8 of the time from n = 512 on) and smaller (half the memory there, 1/14 at 2,048),
measured by `benchmarks/loss_scale.py --edge`."""
GPU_TILE = 4096
"""Side of a tile on a GPU, which small tiles leave idle: with tiles of 512 the loss took 16 times the dense form's time
at n = 4,096 on an H100."""
GPU_DENSE_ENTRIES = 2048**2
"""Largest [n, N] for the dense form on a GPU. Beyond, tiles need less memory and about the same time."""


# The public losses check shapes with messages of their own; the test suite's shape checker would raise first.
@no_type_check
def image_text_loss(
    *,
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "n e"] | None = None,
    teacher_text: Float[Tensor, "n e"] | None = None,
    teacher_logit_scale: Float[Tensor, ""] | None = None,
    logit_bias: Float[Tensor, ""] | None = None,
    teacher_logit_bias: Float[Tensor, ""] | None = None,
    contrastive_weight: float = 1.0,
    soft_ce_weight: float = 1.0,
    wmse_weight: float = 0.05,
    kl_weight: float = 0.0,
    gamma: float = 0.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    text_ids: Int[Tensor, " n"] | None = None,
    tile_size: int | Literal["auto"] | None = "auto",
    ring: bool = False,
    sigmoid: bool = False,
    teacher_sigmoid: bool = False,
) -> tuple[Float[Tensor, ""], Scalars]:
    """Contrastive loss of the student plus GKL between the image-text logits of student and teacher.

    With the student's logits s_ij = scale * <image_i, text_j> + bias and the teacher's t_ij likewise, for the two
    directions (rows = images against all texts, rows = texts against all images), averaged:

        loss = contrastive_weight * CE(target, softmax(s))
             + soft_ce_weight     * mean_i -sum_j softmax(t/T)_ij log softmax(s/T)_ij
             + wmse_weight        * 1/2 sum_i W_i sum_j w_ij (d_ij - mu_i)^2 / sum_i W_i^2
             + kl_weight          * mean_i KL(softmax(t/T)_i || softmax(s/T)_i)

    where d = s - t, w = softmax(t/T2)^gamma, W_i = sum_j w_ij, mu_i = sum_j w_ij d_ij / W_i. `soft_ce_weight` and
    `wmse_weight` are the two halves of GKL (paper: beta and alpha; released code: ALPHA and BETA). Captions have no
    class, so the weight is the teacher's own distribution over the row's candidates. The image-text form is this
    project's; the released code has none.

    Args:
        image, text: the student's L2-normalised embeddings of this process's pairs; row i of both is one pair.
        logit_scale, teacher_logit_scale: factors of the cosine similarities, already exponentiated.
        teacher_image, teacher_text: the teacher's L2-normalised embeddings; their length may differ from the
            student's. None = no teacher: contrastive loss only.
        logit_bias, teacher_logit_bias: SigLIP's bias. A softmax is invariant to it: without `sigmoid` it has no effect.
        temperature: T, of the soft cross entropy and of KL. No factor T^2.
        weight_temperature: T2, of the weights.
        text_ids: equal ids mark equal captions; the contrastive target is spread evenly over them, so that equal
            captions are not negatives of each other. None = all captions differ.
        tile_size: side of the tiles in which the logits are computed, twice and never as a whole (`losses/tiles.py`):
            memory O(N) in place of O(nN), the same value. None = the [n, N] matrices, which have second derivatives;
            "auto" = these for small batches, tiles where they are smaller and faster.
        ring: texts are passed from rank to rank in place of being gathered: memory O(n) in place of O(N), with more
            and smaller messages, the same value. In tiles only.
        sigmoid: the student is a SigLIP: each pair is a binary decision. With z = 1 for equal captions, else -1,
            the contrastive term is sum_ij -log sigmoid(z_ij s_ij) / N, and soft CE the binary cross entropy
            sum_ij -p_ij log sigmoid(s_ij / T) - (1 - p_ij) log sigmoid(-s_ij / T), / N. Its target p is
            sigmoid(t / T) with `teacher_sigmoid`, otherwise the mean of the two directions' softmax(t / T).
            wMSE is the same. A softmax student takes a SigLIP teacher as any other, by the softmax of its logits.
        teacher_sigmoid: the teacher is a SigLIP too; its bias counts.

    Returns:
        The loss, equal on all ranks, and detached scalars for the log: each term, agreement@1 (share of images with the
        same best caption for student and teacher), entropies in nats, scales, accuracy of the pairing in the batch.
        With all weights 0, as when training with `mimicry_loss` alone, the loss is 0 and the scalars are still
        computed.

    Raises:
        ValueError: teacher and student with different numbers of rows; part of the teacher missing; gamma < 0, a
            temperature <= 0, a tile size below 1.
        RuntimeError: a second derivative of the tiled form.

    Source: Cui et al., arXiv 2305.13948 (NeurIPS 2024) and 2503.08038 (TPAMI 2026); Radford et al. 2021 and, for the
    sigmoid, Zhai et al. 2023 (arXiv 2303.15343) for the contrastive losses.
    """
    for name, value in (("temperature", temperature), ("weight_temperature", weight_temperature)):
        check_positive(name, value)
    check_gamma(gamma)
    has_teacher = _check(image, text, teacher_image, teacher_text, teacher_logit_scale, text_ids)
    _check_forms(sigmoid=sigmoid, teacher_sigmoid=teacher_sigmoid, kl_weight=kl_weight)
    terms = Terms(
        contrastive_weight=contrastive_weight,
        gkl=GklSettings(
            soft_ce_weight=soft_ce_weight if has_teacher else 0,
            wmse_weight=wmse_weight if has_teacher else 0,
            gamma=gamma,
            temperature=temperature,
            weight_temperature=weight_temperature,
        ),
        kl_weight=kl_weight if has_teacher else 0,
        sigmoid=sigmoid,
        teacher_sigmoid=teacher_sigmoid,
    )
    student = _Side(image, text, logit_scale, logit_bias if sigmoid else None)
    teacher = None
    if has_teacher:
        assert teacher_image is not None and teacher_text is not None and teacher_logit_scale is not None
        teacher = _Side(
            teacher_image.detach(),
            teacher_text.detach(),
            teacher_logit_scale.detach(),
            teacher_logit_bias.detach() if teacher_sigmoid and teacher_logit_bias is not None else None,
        )
    if text_ids is None:
        text_ids = torch.arange(rank() * len(image), (rank() + 1) * len(image), device=image.device)
    size = _tile_size(tile_size, rows=len(image), ring=ring, device=image.device)
    with torch.autocast(image.device.type, enabled=False):  # else products would be in half precision
        if size is None:
            share, scalars = _dense_loss(student, teacher, text_ids, terms)
        else:
            share, scalars = _tiled_loss(student, teacher, text_ids, terms, size, ring)
    # With mimicry alone no term uses the scale, and a softmax does not use the bias. Both stay in the graph, since DDP
    # waits for the gradient of every parameter.
    loss = share + 0.0 * logit_scale if logit_bias is None else share + 0.0 * (logit_scale + logit_bias)
    scalars |= {"logit_scale": logit_scale} | ({} if teacher is None else {"teacher_logit_scale": teacher.scale})
    return global_value(loss), scalars_of_all_ranks(scalars)


@no_type_check
def mimicry_loss(
    *,
    image: Float[Tensor, "n e"],
    text: Float[Tensor, "m e"],
    teacher_image: Float[Tensor, "n e"],
    teacher_text: Float[Tensor, "m e"],
) -> Float[Tensor, ""]:
    """Feature mimicry: mean squared error of the normalised embeddings, images and texts added.

        mean_ik (image_ik - teacher_image_ik)^2 + mean_jk (text_jk - teacher_text_jk)^2

    The means run over rows and dimensions, so that published weights (2000 in CLIP-KD) keep their meaning; `image` and
    `text` are the student's embeddings after the map into the teacher's space. Equal on all ranks.

    Raises: ValueError where shapes differ. Source: CLIP-KD (Yang et al., CVPR 2024), "FD".
    """
    for name, ours, theirs in (("image", image, teacher_image), ("text", text, teacher_text)):
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} {tuple(ours.shape)} and teacher_{name} {tuple(theirs.shape)} differ in shape")
    pairs = ((image, teacher_image), (text, teacher_text))
    return global_value(sum(F.mse_loss(upcast(ours), upcast(theirs)) for ours, theirs in pairs))


def class_logits(
    *,
    image: Float[Tensor, "n d"],
    classes: Float[Tensor, "C d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "n C"]:
    """Zero-shot logits of images over classes, in float32 or float64, also under autocast:

        logits = logit_scale * image @ classes.T + logit_bias

    Args:
        image, classes: L2-normalised embeddings.
        logit_scale: exponentiated.
        logit_bias: of a SigLIP; the same for all classes.
    """
    with torch.autocast(image.device.type, enabled=False):
        logits = upcast(logit_scale) * upcast(image) @ upcast(classes).T
        return logits if logit_bias is None else logits + upcast(logit_bias)


def global_value(share: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean of `share` over ranks, with the gradient of this rank's share."""
    return share + (_mean_over_ranks(share) - share.detach())


def _check_forms(*, sigmoid: bool, teacher_sigmoid: bool, kl_weight: float) -> None:
    if teacher_sigmoid and not sigmoid:
        raise ValueError("teacher_sigmoid=True needs sigmoid=True: a softmax student takes the teacher's softmax")
    if sigmoid and kl_weight:
        raise ValueError(
            f"kl_weight={kl_weight} has no meaning with sigmoid=True: use soft_ce_weight, whose gradient is KL's"
        )


def _check(image, text, teacher_image, teacher_text, teacher_logit_scale, text_ids) -> bool:
    given = [x is not None for x in (teacher_image, teacher_text, teacher_logit_scale)]
    if any(given) and not all(given):
        raise ValueError(
            "teacher_image, teacher_text and teacher_logit_scale must be given together: pass all three or none"
        )
    named = {"text": text, "teacher_image": teacher_image, "teacher_text": teacher_text, "text_ids": text_ids}
    for name, value in named.items():
        if value is not None and value.shape[0] != image.shape[0]:
            raise ValueError(
                f"{name} has {value.shape[0]} rows, image has {image.shape[0]}: they must be the same pairs"
            )
    return all(given)


class _Side:
    """Embeddings of one model in float32 or float64, its scale, and its bias for the sigmoid forms."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None):
        self.image, self.text, self.scale, self.bias = upcast(image), upcast(text), scale, bias

    def shift(self) -> Tensor | float:
        return 0.0 if self.bias is None else self.bias

    def two_directions(self) -> tuple[Tensor, Tensor]:
        """Own images against all texts, own texts against all images: [n, N] each, without the bias."""
        rows = gather_rows(torch.cat([self.image, self.text], dim=1))  # one collective instead of two
        all_images, all_texts = rows.split([self.image.shape[1], self.text.shape[1]], dim=1)
        return self.scale * self.image @ all_texts.T, self.scale * self.text @ all_images.T


def _tile_size(requested: int | Literal["auto"] | None, *, rows: int, ring: bool, device: torch.device) -> int | None:
    if requested == "auto":
        on_cpu = device.type == "cpu"
        tile, dense_entries = (CPU_TILE, CPU_TILE**2) if on_cpu else (GPU_TILE, GPU_DENSE_ENTRIES)
        return tile if ring or rows * rows * world_size() > dense_entries else None
    if requested is None and ring:
        raise ValueError("ring=True needs tiles: tile_size must not be None")
    if requested is not None and requested < 1:
        raise ValueError(f"tile_size must be at least 1, 'auto' or None, got {requested}")
    return requested


def _dense_loss(student: _Side, teacher: _Side | None, text_ids: Tensor, terms: Terms) -> tuple[Tensor, Scalars]:
    """This rank's share of the loss times the number of ranks, and the scalars of its rows; reference of the tiles."""
    student_logits = student.two_directions()
    same = (text_ids[:, None] == gather_rows(text_ids)).to(student.image.dtype)
    weighted: dict[str, tuple[float, Tensor]] = {}
    if terms.contrastive_weight:
        rows = [_contrastive_rows(logits + student.shift(), same, terms) for logits in student_logits]
        weighted["contrastive"] = terms.contrastive_weight, _mean_of_rows(rows)
    teacher_logits = None
    if teacher is not None:
        teacher_logits = teacher.two_directions()
        pairs = list(zip(student_logits, teacher_logits, strict=True))
        if terms.gkl.soft_ce_weight and terms.sigmoid:
            rows = [_sigmoid_soft_rows(s + student.shift(), t + teacher.shift(), terms) for s, t in pairs]
            weighted["soft_ce"] = terms.gkl.soft_ce_weight, _mean_of_rows(rows)
        elif terms.gkl.soft_ce_weight:
            rows = [soft_cross_entropy_rows(student=s, teacher=t, temperature=terms.gkl.temperature) for s, t in pairs]
            weighted["soft_ce"] = terms.gkl.soft_ce_weight, _mean_of_rows(rows)
        if terms.kl_weight:
            rows = [kl_rows(student=s, teacher=t, temperature=terms.gkl.temperature) for s, t in pairs]
            weighted["kl"] = terms.kl_weight, _mean_of_rows(rows)
        if terms.gkl.wmse_weight:
            ratios = []
            for s, t in pairs:
                weight = smooth_weight(
                    teacher=t, gamma=terms.gkl.gamma, weight_temperature=terms.gkl.weight_temperature
                )
                ratios.append(ratio_of_sums(*wmse_rows(student=s, teacher=t, weight=weight)))
            weighted["wmse"] = terms.gkl.wmse_weight, torch.stack(ratios).mean()
    loss = sum((weight * term for weight, term in weighted.values()), student_logits[0].new_zeros(()))
    image_logits = student_logits[0], None if teacher_logits is None else teacher_logits[0]
    return loss, {name: term for name, (_, term) in weighted.items()} | _diagnostics(*image_logits, same)


def _contrastive_rows(student: Tensor, same: Tensor, terms: Terms) -> Tensor:
    if terms.sigmoid:
        return sigmoid_contrastive(student, same).sum(dim=1)
    return F.cross_entropy(student, same / same.sum(dim=1, keepdim=True), reduction="none")


def _sigmoid_soft_rows(student: Tensor, teacher: Tensor, terms: Terms) -> Tensor:
    student, teacher = student / terms.gkl.temperature, teacher / terms.gkl.temperature
    if terms.teacher_sigmoid:
        return sigmoid_cross_entropy(student, teacher).sum(dim=1)
    return (F.softplus(student) - teacher.softmax(dim=1) * student).sum(dim=1)


def _tiled_loss(
    student: _Side, teacher: _Side | None, text_ids: Tensor, terms: Terms, tile_size: int, ring: bool
) -> tuple[Tensor, Scalars]:
    """The result of `_dense_loss`, in tiles."""

    def columns(rows: Tensor) -> Tensor:
        return rows if ring else gather_rows(rows)

    teacher_tensors = None if teacher is None else (teacher.scale * teacher.image, columns(teacher.text), teacher.bias)
    student_tensors = student.image, columns(student.text), student.scale, student.bias
    return TiledLoss.apply(*student_tensors, teacher_tensors, (text_ids, columns(text_ids)), terms, tile_size, ring)


def _mean_of_rows(directions: list[Tensor]) -> Tensor:
    return torch.stack([rows.mean() for rows in directions]).mean()


def _mean_over_ranks(x: Tensor) -> Tensor:
    return sum_across_processes(x) / world_size()


def scalars_of_all_ranks(scalars: Scalars) -> Scalars:
    """The mean of each scalar over ranks, for the log. All ranks."""
    means = _mean_over_ranks(torch.stack([value.detach().float() for value in scalars.values()]))  # one collective
    return dict(zip(scalars, means.unbind(), strict=True))


@torch.no_grad()
def _diagnostics(student: Tensor, teacher: Tensor | None, same: Tensor) -> Scalars:
    """Accuracy, agreement and entropies of the rows of images."""

    def entropy(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1).mean()

    best = student.argmax(dim=1)
    scalars = {"batch_acc1": same.gather(1, best[:, None]).mean(), "student_entropy": entropy(student)}
    if teacher is None:
        return scalars
    agreement = (best == teacher.argmax(dim=1)).float().mean()
    return scalars | {"agreement@1": agreement, "teacher_entropy": entropy(teacher)}
