"""The losses of CLIP distillation on image and text embeddings, over the rows of all processes.

Axis letters: n = images of this process, N = images of all processes, k = captions of an image, d = the student's
embedding, e = the teacher's.

Every term is a mean over rows of all processes, or a ratio of two sums over them. A rank computes its own rows' share
of it, times the number of ranks, against the columns of all ranks; `gather_rows` has gradients, so that
DistributedDataParallel's averaging gives exactly the gradient of one process on the joined batch. The returned value
is the global one on every rank. All ranks must have the same number of rows.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, no_type_check

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
    mean_logits,
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
    text: Float[Tensor, "n *k d"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "n e"] | Sequence[Float[Tensor, "n _e"]] | None = None,
    teacher_text: Float[Tensor, "n *k e"] | Sequence[Float[Tensor, "n *k _e"]] | None = None,
    teacher_logit_scale: Float[Tensor, ""] | Sequence[Float[Tensor, ""]] | None = None,
    logit_bias: Float[Tensor, ""] | None = None,
    teacher_logit_bias: Float[Tensor, ""] | Sequence[Float[Tensor, ""] | None] | None = None,
    teacher_weights: Sequence[float] | None = None,
    contrastive_weight: float = 1.0,
    soft_ce_weight: float = 1.0,
    wmse_weight: float = 0.05,
    kl_weight: float = 0.0,
    gamma: float = 0.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    text_ids: Int[Tensor, " n *k"] | None = None,
    tile_size: int | Literal["auto"] | None = "auto",
    ring: bool = False,
    sigmoid: bool = False,
    teacher_sigmoid: bool | Sequence[bool] = False,
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

    Of several teachers k with weights a_k, sum 1, the soft targets are averaged: the softmax in soft CE and KL is
    sum_k a_k softmax(t_k/T), where KL is computed as sum_k a_k KL_k, which has the same gradient. wMSE is that of the
    mean logits t = sum_k a_k t_k.

    An image may have several captions, the same number for all. Its row then has the captions of all images as columns,
    and its contrastive target is spread evenly over its own; the row of a caption has the images as columns.

    Args:
        image: the student's L2-normalised embeddings of this process's images.
        text: those of the captions of each, [n, d] or [n, k, d].
        logit_scale, teacher_logit_scale: factors of the cosine similarities, already exponentiated.
        teacher_image, teacher_text: the teacher's L2-normalised embeddings; their length may differ from the
            student's. None = no teacher: contrastive loss only. Of several teachers, lists with a tensor for each, as
            for the scale, the bias and `teacher_sigmoid`.
        logit_bias, teacher_logit_bias: SigLIP's bias. A softmax is invariant to it: without `sigmoid` it has no effect.
        teacher_weights: relative weights of several teachers, divided by their sum. None = equal.
        temperature: T, of the soft cross entropy and of KL. No factor T^2.
        weight_temperature: T2, of the weights.
        text_ids: [n] or [n, k], equal ids mark equal captions. An image is a positive of a caption if one of its
            captions is equal to it, and the contrastive target is spread evenly over a row's positives, so that equal
            captions are not negatives of each other. None = all captions differ.
        tile_size: side of the tiles in which the logits are computed, twice and never as a whole (`losses/tiles.py`):
            memory O(N) in place of O(nN), the same value. None = the [n, N] matrices, which have second derivatives;
            "auto" = these for small batches, tiles where they are smaller and faster.
        ring: texts are passed from rank to rank in place of being gathered: memory O(n) in place of O(N), with more
            and smaller messages, the same value. In tiles only.
        sigmoid: the student is a SigLIP: each pair is a binary decision. With z = 1 for positives, else -1,
            the contrastive term is sum_ij -log sigmoid(z_ij s_ij) / (k N), and soft CE the binary cross entropy
            sum_ij -p_ij log sigmoid(s_ij / T) - (1 - p_ij) log sigmoid(-s_ij / T), / (k N). Its target p is
            sigmoid(t / T) with `teacher_sigmoid`, otherwise the mean of the two directions' softmax(t / T).
            wMSE is the same. A softmax student takes a SigLIP teacher as any other, by the softmax of its logits.
        teacher_sigmoid: the teacher is a SigLIP too; its bias counts.

    Returns:
        The loss, equal on all ranks, and detached scalars for the log: each term, agreement@1 (share of images with the
        same best caption for student and teacher), entropies in nats, scales, accuracy of the pairing in the batch.
        Those of the k-th of several teachers end in ".k".
        With all weights 0, as when training with `mimicry_loss` alone, the loss is 0 and the scalars are still
        computed.

    Raises:
        ValueError: teacher and student with different numbers of images or captions; part of a teacher missing;
            gamma < 0, a temperature or a teacher's weight <= 0, a tile size below 1.
        RuntimeError: a second derivative of the tiled form.

    Source: Cui et al., arXiv 2305.13948 (NeurIPS 2024) and 2503.08038 (TPAMI 2026); Radford et al. 2021 and, for the
    sigmoid, Zhai et al. 2023 (arXiv 2303.15343) for the contrastive losses.
    """
    for name, value in (("temperature", temperature), ("weight_temperature", weight_temperature)):
        check_positive(name, value)
    check_gamma(gamma)
    teachers = _teachers(
        image=teacher_image, text=teacher_text, scale=teacher_logit_scale, bias=teacher_logit_bias,
        weights=teacher_weights, sigmoid=teacher_sigmoid,
    )  # fmt: skip
    student = _Side(image, text, logit_scale, logit_bias if sigmoid else None)
    text_ids = _text_ids(text_ids, text)
    _check_rows(student, text, text_ids, teachers)
    _check_forms(sigmoid=sigmoid, teacher_sigmoid=any(t.sigmoid for t in teachers), kl_weight=kl_weight)
    terms = Terms(
        contrastive_weight=contrastive_weight,
        gkl=GklSettings(
            soft_ce_weight=soft_ce_weight if teachers else 0,
            wmse_weight=wmse_weight if teachers else 0,
            gamma=gamma,
            temperature=temperature,
            weight_temperature=weight_temperature,
        ),
        kl_weight=kl_weight if teachers else 0,
        sigmoid=sigmoid,
        teacher_weights=tuple(teacher.weight for teacher in teachers),
        teacher_sigmoid=tuple(teacher.sigmoid for teacher in teachers),
    )
    size = _tile_size(tile_size, pairs=len(image) * len(student.text), ring=ring, device=image.device)
    with torch.autocast(image.device.type, enabled=False):  # else products would be in half precision
        if size is None:
            share, scalars = _dense_loss(student, teachers, text_ids, terms)
        else:
            share, scalars = _tiled_loss(student, teachers, text_ids, terms, size, ring)
    # With mimicry alone no term uses the scale, and a softmax does not use the bias. Both stay in the graph, since DDP
    # waits for the gradient of every parameter.
    loss = share + 0.0 * logit_scale if logit_bias is None else share + 0.0 * (logit_scale + logit_bias)
    scalars["logit_scale"] = logit_scale
    for side, teacher in zip(terms.teachers, teachers, strict=True):
        scalars[side.replace("teacher", "teacher_logit_scale")] = teacher.scale
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


def feature_mse(student: Float[Tensor, "n e"], teacher: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """One side of `mimicry_loss`: mean_ik (student_ik - teacher_ik)^2. Equal on all ranks.

    Raises: ValueError where shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    return global_value(F.mse_loss(upcast(student), upcast(teacher)))


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


def _text_ids(given: Tensor | None, text: Tensor) -> Tensor:
    """[n, k]; where none are given, another number for each caption of all ranks."""
    if given is not None:
        return given.unsqueeze(1) if given.ndim == 1 else given
    count = text[..., 0].numel()
    return torch.arange(rank() * count, (rank() + 1) * count, device=text.device).view(len(text), -1)


def _check_rows(student: "_Side", text: Tensor, text_ids: Tensor, teachers: "Sequence[_Side]") -> None:
    images, texts = len(student.image), len(student.text)
    rows = [("text", text, images, "image"), ("text_ids", text_ids, images, "image")]
    rows += [("text_ids", text_ids.flatten(), texts, "text")]
    rows += [("teacher_image", teacher.image, images, "image") for teacher in teachers]
    rows += [("teacher_text", teacher.text, texts, "text") for teacher in teachers]
    for name, value, count, other in rows:
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} rows, {other} has {count}: they must be the same pairs")


class _Side:
    """Embeddings of one model in float32 or float64, its scale, and its bias for the sigmoid forms.

    `image` is [n, d]; `text` is [k n, d], the captions of an image one behind the other.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        weight: float = 1.0,
        sigmoid: bool = False,
    ):
        self.image, self.text, self.scale, self.bias = upcast(image), upcast(text).flatten(0, -2), scale, bias
        self.weight, self.sigmoid = weight, sigmoid
        """Of a teacher: its share of the targets, and whether they are sigmoids."""

    def shift(self) -> Tensor | float:
        return 0.0 if self.bias is None else self.bias

    def two_directions(self) -> tuple[Tensor, Tensor]:
        """Own images against all texts [n, k N], own texts against all images [k n, N], without the bias."""
        (n, d), texts = self.image.shape, self.text
        rows = gather_rows(torch.cat([self.image, texts.reshape(n, -1)], dim=1))  # one collective instead of two
        all_images, all_texts = rows[:, :d], rows[:, d:].reshape(-1, texts.shape[1])
        return self.scale * self.image @ all_texts.T, self.scale * texts @ all_images.T


def _teachers(
    *, image: Any, text: Any, scale: Any, bias: Any, weights: Sequence[float] | None, sigmoid: bool | Sequence[bool]
) -> list[_Side]:
    """One for each teacher, without gradient."""
    needed = [image, text, scale]
    if all(part is None for part in needed):
        return []
    if any(part is None for part in needed):
        raise ValueError(
            "teacher_image, teacher_text and teacher_logit_scale must be given together: pass all three or none"
        )
    images, texts, scales = ([part] if isinstance(part, Tensor) else list(part) for part in needed)
    count = len(images)
    biases = [bias] * count if bias is None or isinstance(bias, Tensor) else list(bias)
    sigmoids = [sigmoid] * count if isinstance(sigmoid, bool) else list(sigmoid)
    shares = [1.0] * count if weights is None else list(weights)
    parts = {"teacher_image": images, "teacher_text": texts, "teacher_logit_scale": scales}
    parts |= {"teacher_logit_bias": biases, "teacher_sigmoid": sigmoids, "teacher_weights": shares}
    for name, part in parts.items():
        if len(part) != count:
            raise ValueError(f"{name} is of {len(part)} teachers, teacher_image of {count}")
    for share in shares:
        check_positive("teacher_weights", share)
    total = math.fsum(shares)
    return [
        _Side(
            images[k].detach(),
            texts[k].detach(),
            scales[k].detach(),
            given.detach() if sigmoids[k] and (given := biases[k]) is not None else None,
            weight=shares[k] / total,
            sigmoid=sigmoids[k],
        )
        for k in range(count)
    ]


def _tile_size(requested: int | Literal["auto"] | None, *, pairs: int, ring: bool, device: torch.device) -> int | None:
    """None = dense. `pairs`: logits of this process's images and texts."""
    if requested == "auto":
        on_cpu = device.type == "cpu"
        tile, dense_entries = (CPU_TILE, CPU_TILE**2) if on_cpu else (GPU_TILE, GPU_DENSE_ENTRIES)
        return tile if ring or pairs * world_size() > dense_entries else None
    if requested is None and ring:
        raise ValueError("ring=True needs tiles: tile_size must not be None")
    if requested is not None and requested < 1:
        raise ValueError(f"tile_size must be at least 1, 'auto' or None, got {requested}")
    return requested


def _dense_loss(student: _Side, teachers: Sequence[_Side], text_ids: Tensor, terms: Terms) -> tuple[Tensor, Scalars]:
    """This rank's share of the loss times the number of ranks, and the scalars of its rows; reference of the tiles."""
    student_logits = student.two_directions()
    same = [of_pairs.to(student.image.dtype) for of_pairs in _positives(text_ids)]
    scalars: Scalars = {}
    if terms.contrastive_weight:
        rows = [_contrastive_rows(s + student.shift(), of, terms) for s, of in zip(student_logits, same, strict=True)]
        scalars["contrastive"] = _mean_of_rows(rows, terms)
    teacher_logits = [teacher.two_directions() for teacher in teachers]
    for side, teacher, logits in zip(terms.teachers, teachers, teacher_logits, strict=True):
        pairs, suffix = list(zip(student_logits, logits, strict=True)), side.removeprefix("teacher")
        if terms.gkl.soft_ce_weight and terms.sigmoid:
            rows = [_sigmoid_soft_rows(s + student.shift(), t + teacher.shift(), teacher, terms) for s, t in pairs]
            scalars[f"soft_ce{suffix}"] = _mean_of_rows(rows, terms)
        elif terms.gkl.soft_ce_weight:
            rows = [soft_cross_entropy_rows(student=s, teacher=t, temperature=terms.gkl.temperature) for s, t in pairs]
            scalars[f"soft_ce{suffix}"] = _mean_of_rows(rows, terms)
        if terms.kl_weight:
            rows = [kl_rows(student=s, teacher=t, temperature=terms.gkl.temperature) for s, t in pairs]
            scalars[f"kl{suffix}"] = _mean_of_rows(rows, terms)
    if terms.gkl.wmse_weight:
        ratios = []
        for s, *ts in zip(student_logits, *teacher_logits, strict=True):
            t = mean_logits(teachers=ts, weights=terms.teacher_weights)
            weight = smooth_weight(teacher=t, gamma=terms.gkl.gamma, weight_temperature=terms.gkl.weight_temperature)
            ratios.append(ratio_of_sums(*wmse_rows(student=s, teacher=t, weight=weight)))
        scalars["wmse"] = torch.stack(ratios).mean()
    weights = {name: weight for name, weight in terms.by_scalar().items() if name in scalars}
    loss = sum((weight * scalars[name] for name, weight in weights.items()), student_logits[0].new_zeros(()))
    of_images = {side: logits[0] for side, logits in zip(terms.teachers, teacher_logits, strict=True)}
    return loss, {name: scalars[name] for name in weights} | _diagnostics(student_logits[0], of_images, same[0])


def _positives(text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Whether one of an image's captions is the caption: own images, all texts [n, k N]; own texts, all images."""
    all_ids = gather_rows(text_ids)
    of_images = (text_ids[:, :, None] == all_ids.flatten()).any(dim=1)
    return of_images, (text_ids.flatten()[:, None, None] == all_ids).any(dim=2)


def _contrastive_rows(student: Tensor, same: Tensor, terms: Terms) -> Tensor:
    if terms.sigmoid:
        return sigmoid_contrastive(student, same).sum(dim=1)
    return F.cross_entropy(student, same / same.sum(dim=1, keepdim=True), reduction="none")


def _sigmoid_soft_rows(student: Tensor, teacher: Tensor, side: _Side, terms: Terms) -> Tensor:
    student, teacher = student / terms.gkl.temperature, teacher / terms.gkl.temperature
    if side.sigmoid:
        return sigmoid_cross_entropy(student, teacher).sum(dim=1)
    return (F.softplus(student) - teacher.softmax(dim=1) * student).sum(dim=1)


def _tiled_loss(
    student: _Side, teachers: Sequence[_Side], text_ids: Tensor, terms: Terms, tile_size: int, ring: bool
) -> tuple[Tensor, Scalars]:
    """The result of `_dense_loss`, in tiles."""

    def columns(rows: Tensor) -> Tensor:
        return rows if ring else gather_rows(rows)

    of_teachers = tuple((teacher.scale * teacher.image, columns(teacher.text), teacher.bias) for teacher in teachers)
    student_tensors = student.image, columns(student.text), student.scale, student.bias
    ids = text_ids, columns(text_ids.flatten())
    return TiledLoss.apply(*student_tensors, of_teachers, ids, terms, tile_size, ring)


def _mean_of_rows(directions: list[Tensor], terms: Terms) -> Tensor:
    """The mean of both directions' mean over rows; a sigmoid student's sum over pairs, divided by the texts."""
    if terms.sigmoid:
        return torch.stack([rows.sum() for rows in directions]).mean() / len(directions[1])
    return torch.stack([rows.mean() for rows in directions]).mean()


def _mean_over_ranks(x: Tensor) -> Tensor:
    return sum_across_processes(x) / world_size()


def scalars_of_all_ranks(scalars: Scalars) -> Scalars:
    """The mean of each scalar over ranks, for the log. All ranks."""
    means = _mean_over_ranks(torch.stack([value.detach().float() for value in scalars.values()]))  # one collective
    return dict(zip(scalars, means.unbind(), strict=True))


@torch.no_grad()
def _diagnostics(student: Tensor, teachers: dict[str, Tensor], same: Tensor) -> Scalars:
    """Accuracy, agreement and entropies of the rows of images."""

    def entropy(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1).mean()

    best = student.argmax(dim=1)
    scalars = {"batch_acc1": same.gather(1, best[:, None]).mean(), "student_entropy": entropy(student)}
    for side, teacher in teachers.items():
        suffix = side.removeprefix("teacher")
        scalars[f"agreement@1{suffix}"] = (best == teacher.argmax(dim=1)).float().mean()
        scalars[f"teacher_entropy{suffix}"] = entropy(teacher)
    return scalars
