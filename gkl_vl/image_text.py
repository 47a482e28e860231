"""The losses of CLIP distillation on image and text embeddings, over the rows of all processes.

Axis letters: n = my rows, N = everybody's rows, d = the student's embedding, e = the teacher's.

Every term is a mean over N rows, or one ratio of two sums over N rows. A rank computes its own rows' share of it, times
the number of ranks, against everybody's columns; `gather_rows` carries gradients, so that DistributedDataParallel's
averaging gives exactly the gradient of one process on the joined batch. The value that comes back is the global one on
every rank. All ranks must hold the same number of rows.
"""

from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gkl_vl.gather import gather_rows, rank, sum_across_processes, world_size
from gkl_vl.gkl import Number, check_gamma, check_positive, kl_rows, smooth_weight, soft_cross_entropy_rows, wmse_rows

Scalars = dict[str, Tensor]


# The public losses say in words what is wrong with a caller's shapes; the test suite's shape checker would speak first.
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
    contrastive_weight: Number = 1.0,
    soft_ce_weight: Number = 1.0,
    wmse_weight: Number = 0.05,
    kl_weight: Number = 0.0,
    gamma: Number = 0.0,
    temperature: Number = 1.0,
    weight_temperature: Number = 1.0,
    text_ids: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, ""], Scalars]:
    """Contrastive loss of the student plus GKL between the image-text logits of teacher and student.

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
        image, text: the student's L2-normalised embeddings of my pairs; row i of both is one pair.
        logit_scale, teacher_logit_scale: the scales that multiply, already exponentiated.
        teacher_image, teacher_text: the teacher's L2-normalised embeddings; their length may differ from the
            student's. None = no teacher: contrastive loss only.
        logit_bias, teacher_logit_bias: SigLIP's bias. A softmax does not feel it; it is here so that such models work.
        temperature: T, of the soft cross entropy and of KL. No factor T^2.
        weight_temperature: T2, of the weights.
        text_ids: equal numbers mark equal captions; the contrastive target is spread evenly over them, so that a
            caption is not its twin's negative. None = all captions differ.

    Returns:
        The loss, equal on all ranks, and detached scalars for the log: each term, agreement@1 (share of images whose
        best caption is the same for both), entropies in nats, scales, accuracy of the batch's own pairing. With all
        weights 0, as for `mimicry_loss` alone, the loss is 0 and the scalars are what the call is for.

    Raises:
        ValueError: teacher and student with different numbers of rows; part of the teacher missing; gamma < 0, a
            temperature <= 0.

    Source: Cui et al., arXiv 2305.13948 (NeurIPS 2024) and 2503.08038 (TPAMI 2026); Radford et al. 2021 for the
    contrastive loss.
    """
    for name, value in (("temperature", temperature), ("weight_temperature", weight_temperature)):
        check_positive(name, value)
    check_gamma(gamma)
    has_teacher = _check(image, text, teacher_image, teacher_text, teacher_logit_scale, text_ids)
    student = _two_directions(image, text, logit_scale, logit_bias)
    positives = _positives(text_ids, n=image.shape[0], device=image.device)
    scalars: Scalars = {"logit_scale": logit_scale, "batch_acc1": _batch_accuracy(student[0], positives)}
    terms: list[tuple[str, Number, Tensor]] = []

    if contrastive_weight:
        target = positives / positives.sum(dim=1, keepdim=True)
        rows = [F.cross_entropy(logits, target.to(logits.dtype), reduction="none") for logits in student]
        terms.append(("contrastive", contrastive_weight, _mean_of_rows(rows)))

    if has_teacher:
        assert teacher_image is not None and teacher_text is not None and teacher_logit_scale is not None
        with torch.no_grad():
            teacher = _two_directions(teacher_image, teacher_text, teacher_logit_scale, teacher_logit_bias)
        pairs = list(zip(student, teacher, strict=True))
        if soft_ce_weight:
            rows = [soft_cross_entropy_rows(student=s, teacher=t, temperature=temperature) for s, t in pairs]
            terms.append(("soft_ce", soft_ce_weight, _mean_of_rows(rows)))
        if wmse_weight:
            ratios = []
            for s, t in pairs:
                weight = smooth_weight(teacher=t, gamma=gamma, weight_temperature=weight_temperature)
                ratios.append(_ratio_of_sums(*wmse_rows(student=s, teacher=t, weight=weight)))
            terms.append(("wmse", wmse_weight, torch.stack(ratios).mean()))
        if kl_weight:
            rows = [kl_rows(student=s, teacher=t, temperature=temperature) for s, t in pairs]
            terms.append(("kl", kl_weight, _mean_of_rows(rows)))
        scalars |= _teacher_scalars(student[0], teacher[0], teacher_logit_scale)

    # Mimicry alone leaves no term here. Scale and bias stay in the graph: DDP waits for every parameter's gradient.
    loss = 0.0 * logit_scale if logit_bias is None else 0.0 * (logit_scale + logit_bias)
    for _, weight, term in terms:
        loss = loss + weight * term
    scalars |= {name: term for name, _, term in terms}
    return global_value(loss), _scalars_of_all_ranks(scalars)


@no_type_check
def mimicry_loss(
    *,
    image: Float[Tensor, "n e"],
    text: Float[Tensor, "n e"],
    teacher_image: Float[Tensor, "n e"],
    teacher_text: Float[Tensor, "n e"],
) -> Float[Tensor, ""]:
    """Feature mimicry: mean squared error of the normalised embeddings, images and texts added.

        mean_ik (image_ik - teacher_image_ik)^2 + mean_ik (text_ik - teacher_text_ik)^2

    The means run over rows and dimensions, so that published weights (2000 in CLIP-KD) keep their meaning; `image` and
    `text` are the student's embeddings after the map into the teacher's space. Equal on all ranks, as every loss here.

    Raises: ValueError where shapes differ. Source: CLIP-KD (Yang et al., CVPR 2024), "FD".
    """
    for name, ours, theirs in (("image", image, teacher_image), ("text", text, teacher_text)):
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} {tuple(ours.shape)} and teacher_{name} {tuple(theirs.shape)} differ in shape")
    pairs = ((image, teacher_image), (text, teacher_text))
    return global_value(sum(F.mse_loss(_at_least_fp32(ours), _at_least_fp32(theirs)) for ours, theirs in pairs))


def global_value(share: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """My rank's share (times the number of ranks) as the global loss: everybody's value, my gradient."""
    return share + (_mean_over_ranks(share) - share.detach())


def _check(image, text, teacher_image, teacher_text, teacher_logit_scale, text_ids) -> bool:
    given = [x is not None for x in (teacher_image, teacher_text, teacher_logit_scale)]
    if any(given) and not all(given):
        raise ValueError("teacher_image, teacher_text and teacher_logit_scale come together or not at all")
    named = {"text": text, "teacher_image": teacher_image, "teacher_text": teacher_text, "text_ids": text_ids}
    for name, value in named.items():
        if value is not None and value.shape[0] != image.shape[0]:
            raise ValueError(
                f"{name} has {value.shape[0]} rows, image has {image.shape[0]}: they must be the same pairs"
            )
    return all(given)


def _two_directions(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """My images against everybody's texts and my texts against everybody's images, [n, N] each, at least fp32."""
    image, text = _at_least_fp32(image), _at_least_fp32(text)
    everybody = gather_rows(torch.cat([image, text], dim=1))  # one collective instead of two
    all_images, all_texts = everybody.split([image.shape[1], text.shape[1]], dim=1)
    shift = 0.0 if bias is None else bias
    with torch.autocast(image.device.type, enabled=False):  # a caller's would multiply in half precision
        return scale * image @ all_texts.T + shift, scale * text @ all_images.T + shift


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _positives(text_ids: Tensor | None, *, n: int, device: torch.device) -> Tensor:
    """[n, N], 1 where column j carries the caption of my row i."""
    if text_ids is None:
        text_ids = torch.arange(rank() * n, (rank() + 1) * n, device=device)
    return (text_ids[:, None] == gather_rows(text_ids)[None, :]).float()


def _mean_of_rows(directions: list[Tensor]) -> Tensor:
    return torch.stack([rows.mean() for rows in directions]).mean()


def _ratio_of_sums(numerator: Tensor, denominator: Tensor) -> Tensor:
    """My share of sum(numerator) / sum(denominator) over the global batch, times the number of ranks.

    The mean of the ranks' own ratios would be another number: 1.3278 instead of 1.2359 on 8 rows over 4 ranks.
    """
    return world_size() * numerator.sum() / sum_across_processes(denominator.sum())


def _mean_over_ranks(x: Tensor) -> Tensor:
    return sum_across_processes(x) / world_size()


def _scalars_of_all_ranks(scalars: Scalars) -> Scalars:
    means = _mean_over_ranks(torch.stack([value.detach().float() for value in scalars.values()]))  # one collective
    return dict(zip(scalars, means.unbind(), strict=True))


@torch.no_grad()
def _batch_accuracy(logits: Tensor, positives: Tensor) -> Tensor:
    return positives.gather(1, logits.argmax(dim=1, keepdim=True)).mean()


@torch.no_grad()
def _teacher_scalars(student: Tensor, teacher: Tensor, teacher_logit_scale: Tensor) -> Scalars:
    """How the two see the rows of images."""

    def entropy(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1).mean()

    return {
        "agreement@1": (student.argmax(dim=1) == teacher.argmax(dim=1)).float().mean(),
        "student_entropy": entropy(student),
        "teacher_entropy": entropy(teacher),
        "teacher_logit_scale": teacher_logit_scale,
    }
