"""GKL on cross logits: the student's embeddings against the teacher's, over the rows of all processes.

Axis letters: n = rows of this process, K = columns (the bank), e = the teacher's embedding, r = rows of a block.

In `image_text_loss` the student's images are compared with the student's texts, and both move. Here one side of each
logit is the teacher's, so the target stands still: with the same embedding as the teacher the student has the same
logits, whatever its other tower does.

The columns have no gradient, so a block of whole rows has all that its gradient needs: value and gradient are computed
together, with three matrix products a block and nothing kept but the gradient of the rows. The extra memory is that of
a few blocks, whatever n is.
"""

from dataclasses import dataclass, replace
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gkl_vl.losses.gkl import GklSettings, check_gamma, check_positive, upcast
from gkl_vl.losses.image_text import Scalars, global_value, scalars_of_all_ranks
from gkl_vl.losses.tiles import sigmoid_cross_entropy

CHUNK_ENTRIES = 2**23
"""Most logits of a chunk of rows, whose matrix products are computed at once: 32 MiB in float32, three times."""
CPU_BLOCK_ENTRIES = 2**18
"""On a CPU, everything else is computed for so many logits at a time, which stay in its cache."""


# The public loss checks shapes with messages of its own; the test suite's shape checker would raise first.
@no_type_check
def cross_logits_loss(
    *,
    image: Float[Tensor, "n e"],
    teacher_image: Float[Tensor, "n e"],
    text_bank: Float[Tensor, "K e"],
    teacher_logit_scale: Float[Tensor, ""],
    text: Float[Tensor, "m e"] | None = None,
    teacher_text: Float[Tensor, "m e"] | None = None,
    image_bank: Float[Tensor, "L e"] | None = None,
    teacher_logit_bias: Float[Tensor, ""] | None = None,
    class_prior: Float[Tensor, "n K"] | None = None,
    soft_ce_weight: float = 1.0,
    wmse_weight: float = 1.0,
    gamma: float = 0.5,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    sigmoid: bool = False,
) -> tuple[Float[Tensor, ""], Scalars]:
    """GKL between the teacher's logits and the student's logits against the teacher's embeddings.

    With the logits of the student's image i, s_ij = scale * <image_i, text_bank_j>, of the teacher's,
    t_ij = scale * <teacher_image_i, text_bank_j>, and the teacher's scale in both:

        loss = soft_ce_weight * mean_i -sum_j softmax(t/T)_ij log softmax(s/T)_ij
             + wmse_weight    * mean_i 1/2 sum_j w_ij (d_ij - mu_i)^2

    where d = t - s, w_i = softmax(gamma t_i / T2), which is softmax(t_i / T2)^gamma with sum 1, mu_i = sum_j w_ij d_ij.
    With `text`, `teacher_text` and `image_bank` the loss is the mean of this and of the same for texts against images.

    wMSE = 1/2 scale^2 (z_i - x_i)' Cov_i (z_i - x_i), where x and z are the student's and the teacher's embedding and
    Cov_i is the covariance of the bank under w_i: a mimicry that counts the directions in which the row's likely texts
    differ. To second order in d it is T^2 KL at the temperature T = T2 / gamma.

    The mean over rows of wMSE differs from `gkl_loss`'s ratio of sums, which weighs row i by (sum_j base_ij^gamma)^2.

    Args:
        image, text: the student's L2-normalised embeddings of this process's rows, mapped into the teacher's space.
        teacher_image, teacher_text: the teacher's of the same images and texts, without gradient.
        text_bank, image_bank: the teacher's embeddings that form the columns, the same on all ranks: those of the
            joined batch (`gather_rows`), a queue of earlier ones, class prompts. No gradient. The row's own pair
            need not be among them.
        teacher_logit_scale: factor of the cosine similarities, already exponentiated.
        teacher_logit_bias: SigLIP's bias. A softmax is invariant to it: without `sigmoid` it has no effect.
        class_prior: probabilities, the base of wMSE's weights in the rows of images: w_i = class_prior_i^gamma, divided
            by its sum. None = softmax(t / T2). For a bank of class prompts, see `ClassPrior.rows`.
        gamma, weight_temperature: gamma and T2 of the weights. gamma = 0: all columns count alike, and Cov is one
            matrix for all rows, O(K e^2 + n e^2) in all.
        temperature: T, of the soft cross entropy. No factor T^2.
        sigmoid: the teacher is a SigLIP, and soft CE the binary cross entropy sum_j -p_ij log sigmoid(s_ij / T)
            - (1 - p_ij) log sigmoid(-s_ij / T) with p = sigmoid(t / T), bias included in s and t. wMSE is the same.

    Time O(n K e), extra memory O(n e) plus a few chunks of `CHUNK_ENTRIES`, or of one row where that is more.

    Returns:
        The loss, equal on all ranks, and the detached terms "cross_soft_ce" (nats) and "cross_wmse" (squared logits).
        The mean of the ranks' gradients, as by DistributedDataParallel, is that of the joined batch; all ranks must
        have the same number of rows.

    Raises:
        ValueError: shapes that do not fit, an empty bank, part of the texts' side missing, gamma < 0, a
            temperature <= 0.
        RuntimeError: a second derivative, of a form other than wMSE alone at gamma 0.

    Source: GKL as in `gkl_loss`; its cross form is this project's (docs/cross_logits.md). KL on cross logits: DIME-FM
    (Sun et al., ICCV 2023, arXiv 2303.18232); with the pairing as target: CLIP-KD's "ICL" (Yang et al., CVPR 2024).
    """
    for name, value in (("temperature", temperature), ("weight_temperature", weight_temperature)):
        check_positive(name, value)
    check_gamma(gamma)
    directions = [(image, teacher_image, text_bank, class_prior)]
    if _has_texts(text=text, teacher_text=teacher_text, image_bank=image_bank):
        directions.append((text, teacher_text, image_bank, None))
    for name, direction in zip(("image", "text"), directions, strict=False):
        _check_direction(name, *direction)
    settings = GklSettings(
        soft_ce_weight=soft_ce_weight,
        wmse_weight=wmse_weight,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=weight_temperature,
    )
    dtype = upcast(image).dtype
    scale, bias = teacher_logit_scale.detach().to(dtype), None
    if sigmoid and teacher_logit_bias is not None:
        bias = teacher_logit_bias.detach().to(dtype)
    form = _Form(settings=settings, sigmoid=sigmoid, scale=scale, bias=bias)
    with torch.autocast(image.device.type, enabled=False):  # else products would be in half precision
        shares, terms = zip(*(_one_direction(form, *direction) for direction in directions), strict=True)
    means = {name: torch.stack([of[name] for of in terms]).mean() for name in terms[0]}
    return global_value(torch.stack(shares).mean()), scalars_of_all_ranks(means)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Everything but the embeddings."""

    settings: GklSettings
    sigmoid: bool
    scale: Float[Tensor, ""]
    bias: Float[Tensor, ""] | None


def _has_texts(**side: Tensor | None) -> bool:
    missing = [name for name, tensor in side.items() if tensor is None]
    if len(missing) not in (0, len(side)):
        raise ValueError(f"text, teacher_text and image_bank go together, and {', '.join(missing)} is missing")
    return not missing


def _check_direction(name: str, rows: Tensor, teacher: Tensor, bank: Tensor, prior: Tensor | None) -> None:
    other = "text" if name == "image" else "image"
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"{name} must be embeddings [n, e], n and e at least 1, got {list(rows.shape)}")
    if teacher.shape != rows.shape:
        raise ValueError(
            f"teacher_{name} must have the shape of {name} {list(rows.shape)}, got {list(teacher.shape)}: map the "
            "student's embeddings into the teacher's space first"
        )
    if bank.ndim != 2 or bank.shape[0] == 0 or bank.shape[1] != rows.shape[1]:
        raise ValueError(f"{other}_bank must be [K, {rows.shape[1]}] with K at least 1, got {list(bank.shape)}")
    if prior is not None and prior.shape != (len(rows), len(bank)):
        raise ValueError(f"class_prior must be [{len(rows)}, {len(bank)}] like the logits, got {list(prior.shape)}")


def _one_direction(
    form: _Form,
    rows: Float[Tensor, "n e"],
    teacher: Float[Tensor, "n e"],
    bank: Float[Tensor, "K e"],
    prior: Float[Tensor, "n K"] | None,
) -> tuple[Float[Tensor, ""], Scalars]:
    """The weighted sum of the terms over this rank's rows, and each term."""
    rows, teacher, bank = upcast(rows), upcast(teacher.detach()), upcast(bank.detach())
    settings = form.settings
    blockwise = form if settings.gamma else replace(form, settings=replace(settings, wmse_weight=0.0))
    share, soft_ce, wmse = rows.new_zeros(()), rows.new_zeros(()), rows.new_zeros(())
    if blockwise.settings.counts:
        share, soft_ce, wmse = _InBlocks.apply(rows, teacher, bank, prior, blockwise)
    if settings.wmse_weight and not settings.gamma:
        wmse = _uniform_wmse(form, rows, teacher, bank)
        share = share + settings.wmse_weight * wmse
    terms = {"cross_soft_ce": (settings.soft_ce_weight, soft_ce), "cross_wmse": (settings.wmse_weight, wmse)}
    return share, {name: value.detach() for name, (weight, value) in terms.items() if weight}


def _uniform_wmse(
    form: _Form, rows: Float[Tensor, "n e"], teacher: Float[Tensor, "n e"], bank: Float[Tensor, "K e"]
) -> Float[Tensor, ""]:
    """wMSE at gamma 0: mean_i 1/2 (z_i - x_i)' C (z_i - x_i) with one C, scale^2 times the covariance of the bank."""
    centred = form.scale * (bank - bank.mean(dim=0))
    covariance = centred.T @ centred / len(bank)
    difference = teacher - rows
    return 0.5 * torch.linalg.vecdot(difference @ covariance, difference, dim=1).mean()


class _InBlocks(torch.autograd.Function):
    """(rows, teacher's rows, bank) -> (weighted sum of the terms, soft CE, wMSE), means over this rank's rows."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "n e"],
        teacher: Float[Tensor, "n e"],
        bank: Float[Tensor, "K e"],
        prior: Float[Tensor, "n K"] | None,
        form: _Form,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        factor = form.scale / form.settings.temperature
        bias = None if form.bias is None else form.bias / form.settings.temperature
        targets, differences = factor * teacher, factor * (teacher - rows)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        sums = rows.new_zeros(2)
        per_chunk = max(CHUNK_ENTRIES // len(bank), 1)
        per_block = max(CPU_BLOCK_ENTRIES // len(bank), 1) if rows.device.type == "cpu" else per_chunk
        for start in range(0, len(rows), per_chunk):
            chunk = slice(start, start + per_chunk)
            # The difference is a product of its own: that of two logits would lose digits near the teacher.
            target, difference = targets[chunk] @ bank.T, differences[chunk] @ bank.T
            if bias is not None:
                target += bias
            for first in range(0, len(target), per_block):
                block = slice(first, first + per_block)
                base = None if prior is None else prior[chunk][block].detach().to(rows.dtype)
                sums += _block(target[block], difference[block], base, form)
            if gradient is not None:
                torch.mm(difference, bank, out=gradient[chunk])
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(factor / len(rows)))
        soft_ce, wmse = (sums / len(rows)).unbind()
        ctx.mark_non_differentiable(soft_ce, wmse)
        return form.settings.soft_ce_weight * soft_ce + form.settings.wmse_weight * wmse, soft_ce, wmse

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, ""], *_: Any):
        if torch.is_grad_enabled():
            raise RuntimeError("cross_logits_loss has no second derivative")
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None, None


def _block(
    target: Float[Tensor, "r K"], difference: Float[Tensor, "r K"], prior: Float[Tensor, "r K"] | None, form: _Form
) -> Float[Tensor, " 2"]:
    """Sums of soft CE and wMSE over the rows; replaces `difference` by the gradient of their weighted sum.

    Args:
        target: the teacher's logits t / T.
        difference: (t - s) / T, replaced by the gradient with respect to s / T.
    """
    settings = form.settings
    soft_ce, wmse, gradient = target.new_zeros(()), target.new_zeros(()), None
    if settings.soft_ce_weight:
        student = target - difference
        if form.sigmoid:
            soft_ce = sigmoid_cross_entropy(student, target).sum()
            gradient = torch.sigmoid(student).sub_(torch.sigmoid(target))
        else:
            teacher_p, student_p = target.softmax(dim=1), student.softmax(dim=1)
            # The largest probability is exp(largest logit) / sum of exponentials.
            log_sum_exp = student.amax(dim=1) - student_p.amax(dim=1).log()
            soft_ce = (log_sum_exp - torch.linalg.vecdot(teacher_p, student, dim=1)).sum()
            gradient = student_p.sub_(teacher_p)
    if settings.wmse_weight:
        squared = settings.temperature**2  # from (t - s) / T to t - s
        if prior is None:
            weight = (target * (settings.gamma * settings.temperature / settings.weight_temperature)).softmax(dim=1)
        else:
            weight = F.normalize(prior.pow(settings.gamma), p=1, dim=1)  # a row of zeros has no weight
        difference -= torch.linalg.vecdot(weight, difference, dim=1)[:, None]
        weighted = weight.mul_(difference)
        wmse = 0.5 * squared * torch.linalg.vecdot(weighted, difference, dim=1).sum()
        torch.mul(weighted, -settings.wmse_weight * squared, out=difference)
    else:
        difference.zero_()
    if gradient is not None:
        difference.add_(gradient, alpha=settings.soft_ce_weight)
    return torch.stack([soft_ce, wmse])
