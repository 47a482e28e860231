"""The losses of `image_text.py` without their [n, N] matrices: one sweep for statistics, one for gradients.

A sweep goes over tiles of the logits, my images (rows) against everybody's texts (columns). A tile is computed once and
serves both directions: its rows belong to images, its columns to texts. All that a direction needs of its logits is a
few softmaxes of them, and of each the log-sum-exp and the mean and variance of some values under it; these merge from
tile to tile. The second sweep computes each tile again and sends its gradient to the embeddings.

Axis letters: n = my rows, N = everybody's, r c = rows and columns of a tile, q = rows of one direction, k = values,
d = the student's embedding, e = the teacher's.

Stability: a running softmax is shifted by its largest exponent so far; a mean moves by a share of the difference of two
means, and a variance grows by that difference squared (Chan et al. 1979): no large sums are subtracted. Biases are left
out where no term feels them, in all softmaxes: the difference of teacher and student would lose digits to them.

Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867), used by Inf-CL (arXiv 2410.17243) for the contrastive
loss with hard targets. The soft targets and GKL's weighted variance in this form are this project's.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gkl_vl.distributed import max_across_processes, pass_on_ring, rank, sum_across_processes, world_size

Logits = dict[str, Float[Tensor, "r c"]]
"""A tile: "student" and, where there is a teacher, "teacher" and "difference" = teacher - student."""
Key = tuple[str, float]
"""A softmax: whose logits, and the factor that they are multiplied by first."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Weights, temperatures and gamma, as `image_text_loss` documents them; without a teacher its weights are 0."""

    contrastive_weight: float
    soft_ce_weight: float
    wmse_weight: float
    kl_weight: float
    gamma: float
    temperature: float
    weight_temperature: float
    sigmoid: bool
    teacher_sigmoid: bool


class Softmax:
    """Running softmax(factor * logits) of q rows, and means of values under it.

    `high` and `total` [q]: the largest exponent, and the sum of the exponentials relative to it. `mean` [k, q] has a
    row for each value; `variance` [q] is that of the difference, when it is one of them.
    """

    def __init__(self, key: Key, values: tuple[str, ...], *, like: Float[Tensor, " q"]):
        (self.side, self.factor), self.values = key, values
        self.high, self.total = torch.full_like(like, -torch.inf), torch.zeros_like(like)
        self.mean, self.variance = like.new_zeros(len(values), len(like)), torch.zeros_like(like)

    def add(self, rows: slice, logits: Logits) -> None:
        """Another tile of these rows."""
        high = self.factor * logits[self.side].amax(dim=1)
        weight = torch.add(-high[:, None], logits[self.side], alpha=self.factor).exp_()
        total = weight.sum(dim=1)
        top = torch.maximum(self.high[rows], high)
        before, now = self.total[rows] * (self.high[rows] - top).exp(), total * (high - top).exp()
        self.high[rows], self.total[rows] = top, before + now
        share = now / (before + now)
        for index, value in enumerate(self.values):
            mean = torch.linalg.vecdot(weight, logits[value], dim=1) / total
            step = mean - self.mean[index, rows]
            self.mean[index, rows] += share * step
            if value == "difference":
                spread = torch.linalg.vecdot((logits[value] - mean[:, None]).square_(), weight, dim=1) / total
                self.variance[rows] += share * (spread - self.variance[rows] + (1 - share) * step.square())

    def join_processes(self) -> None:
        """Ranks that have seen other columns of the same rows put together what they saw. All ranks."""
        high = max_across_processes(self.high)  # all ranks
        mine = self.total * (self.high - high).exp()
        total = sum_across_processes(mine)  # all ranks
        share = mine / total
        mean = sum_across_processes(share * self.mean)  # all ranks
        if "difference" in self.values:
            step = mean[self.values.index("difference")] - self.mean_of("difference")
            self.variance = sum_across_processes(share * (self.variance + step.square()))  # all ranks
        self.high, self.total, self.mean = high, total, mean

    def log_sum_exp(self) -> Float[Tensor, " q"]:
        return self.high + self.total.log()

    def mean_of(self, value: str) -> Float[Tensor, " q"]:
        return self.mean[self.values.index(value)]


class Direction:
    """q rows against all columns: the softmaxes of one direction, and the terms that follow from them."""

    def __init__(self, terms: Terms, *, num_columns: int, has_teacher: bool, watched: bool, like: Float[Tensor, " q"]):
        self.terms, self.num_columns, self.watched = terms, num_columns, watched
        self.distil_weight, self.wmse_weight = terms.soft_ce_weight + terms.kl_weight, terms.wmse_weight
        self.cold = 1 / terms.temperature
        self.contrastive_weight = 0 if terms.sigmoid else terms.contrastive_weight
        self.softmax_targets = self.distil_weight if not terms.teacher_sigmoid else 0
        self.of_wmse: Key = ("teacher", terms.gamma / terms.weight_temperature)
        """softmax(t / T2)^gamma, normalised, is this softmax."""
        self.of_base: Key = ("teacher", 1 / terms.weight_temperature)
        self.softmaxes = {
            key: Softmax(key, tuple(values), like=like) for key, values in self._wanted(has_teacher).items()
        }
        self.positive, self.num_positive = torch.zeros_like(like), torch.zeros_like(like)
        """Sum and number of the logits of a row's own captions."""
        sides = (("student", "teacher") if has_teacher else ("student",)) if watched else ()
        self.best = {
            side: (
                torch.full_like(like, -torch.inf),
                torch.zeros_like(like, dtype=torch.long),
                torch.zeros_like(like),
            )
            for side in sides
        }
        """The largest logit of a row, its column, and whether that carries the row's caption."""

    def _wanted(self, has_teacher: bool) -> dict[Key, dict[str, None]]:
        """The softmaxes, and the values whose mean under each is asked for (an ordered set)."""
        wanted: dict[Key, dict[str, None]] = {}

        def want(key: Key, *values: str) -> None:
            wanted.setdefault(key, {}).update(dict.fromkeys(values))

        if self.contrastive_weight:
            want(("student", 1.0))
        if self.watched:  # entropies, for the log
            want(("student", 1.0), "student")
            if has_teacher:
                want(("teacher", 1.0), "teacher")
        if self.distil_weight and not self.terms.sigmoid:
            want(("student", self.cold))
        if self.softmax_targets:
            want(("teacher", self.cold), "student", "teacher")
        if self.wmse_weight:
            want(self.of_wmse, "difference")
            want(self.of_base)
        return wanted

    def add(self, rows: slice, first_column: int, logits: Logits, same: Float[Tensor, "r c"]) -> None:
        """Another tile of these rows."""
        for softmax in self.softmaxes.values():
            softmax.add(rows, logits)
        if self.contrastive_weight:
            self.positive[rows] += torch.linalg.vecdot(same, logits["student"], dim=1)
            self.num_positive[rows] += same.sum(dim=1)
        for side, (best, column, is_same) in self.best.items():
            value, index = logits[side].max(dim=1)
            better = value > best[rows]
            is_same[rows] = torch.where(better, same.gather(1, index[:, None])[:, 0], is_same[rows])
            column[rows] = torch.where(better, index + first_column, column[rows])
            best[rows] = torch.where(better, value, best[rows])

    def state(self) -> list[Tensor]:
        """What was seen so far, to travel with the rows; without what is watched."""
        of_softmaxes = [t for s in self.softmaxes.values() for t in (s.high, s.total, s.mean, s.variance)]
        return [*of_softmaxes, self.positive, self.num_positive]

    def with_state(self, state: list[Tensor]) -> "Direction":
        """The same of other rows."""
        other = copy(self)
        other.softmaxes = {}
        for number, (key, softmax) in enumerate(self.softmaxes.items()):
            other.softmaxes[key] = copy(softmax)
            moved = other.softmaxes[key]
            moved.high, moved.total, moved.mean, moved.variance = state[4 * number : 4 * number + 4]
        other.positive, other.num_positive = state[-2:]
        return other

    def join_processes(self) -> None:
        """All ranks."""
        for softmax in self.softmaxes.values():
            softmax.join_processes()
        self.positive = sum_across_processes(self.positive)  # all ranks
        self.num_positive = sum_across_processes(self.num_positive)  # all ranks

    def terms_by_row(self) -> dict[str, Float[Tensor, " q"]]:
        """Each term of each row, without its weight; wMSE as a numerator and a denominator.

        Of a sigmoid student's terms only what depends on the row: `Pairs` has the rest.
        """
        found = {}
        if self.contrastive_weight:
            found["contrastive"] = self.softmaxes["student", 1.0].log_sum_exp() - self.positive / self.num_positive
        if self.softmax_targets and self.terms.sigmoid:
            found["soft_ce"] = -self.cold * self.softmaxes["teacher", self.cold].mean_of("student")
        elif self.softmax_targets:
            student, teacher = self.softmaxes["student", self.cold], self.softmaxes["teacher", self.cold]
            soft_ce = student.log_sum_exp() - self.cold * teacher.mean_of("student")
            entropy = teacher.log_sum_exp() - self.cold * teacher.mean_of("teacher")
            found |= {"soft_ce": soft_ce, "kl": soft_ce - entropy}
        if self.wmse_weight:
            squared = self._total_weight().square()
            found |= {"wmse": 0.5 * squared * self.softmaxes[self.of_wmse].variance, "wmse_denominator": squared}
        return found

    def _total_weight(self) -> Float[Tensor, " q"]:
        """W = sum_j softmax(t / T2)_j^gamma of each row."""
        base = self.softmaxes[self.of_base].log_sum_exp()
        return (self.softmaxes[self.of_wmse].log_sum_exp() - self.terms.gamma * base).exp()

    def entropy(self, side: str) -> Float[Tensor, " q"]:
        """Of the plain softmax of each row, in nats."""
        softmax = self.softmaxes[side, 1.0]
        return softmax.log_sum_exp() - softmax.mean_of(side)

    def prepare_gradient(self, *, row_share: float, wmse_denominator: Float[Tensor, ""] | None) -> None:
        """A mean over rows counts each `row_share`; `wmse_denominator` is the sum over everybody's rows."""
        terms, pulls = self.terms, dict.fromkeys(self.softmaxes, 0.0)
        pull = self.cold * row_share * self.distil_weight
        if self.contrastive_weight:
            pulls["student", 1.0] += row_share * self.contrastive_weight
        if not terms.sigmoid and self.distil_weight:
            pulls["student", self.cold] += pull
        if self.softmax_targets:
            pulls["teacher", self.cold] -= pull
        # Divided by the total, not shifted by its logarithm: beside an offset of 50 that would lose four digits.
        self.pulls = {key: pull / self.softmaxes[key].total for key, pull in pulls.items() if pull}
        """The gradient is the sum of pull * softmax, less the positives', wMSE's and that of `Pairs`."""
        self.positive_pull = row_share * self.contrastive_weight / self.num_positive
        if wmse_denominator is not None:
            scale = row_share * self.num_columns * self.wmse_weight
            pull = scale * self._total_weight().square() / wmse_denominator
            self.wmse_shift = self.softmaxes[self.of_wmse].log_sum_exp() - pull.log()  # exp(x - shift) carries the pull

    def gradient(self, rows: slice, logits: Logits, same: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
        """Of this direction's loss with respect to the student's logits of a tile."""
        total = torch.zeros_like(logits["student"])
        for key, pull in self.pulls.items():
            softmax = self.softmaxes[key]
            weight = torch.add(-softmax.high[rows, None], logits[softmax.side], alpha=softmax.factor).exp_()
            total.addcmul_(weight, pull[rows, None])
        if self.contrastive_weight:
            total.addcmul_(same, self.positive_pull[rows, None], value=-1)
        if self.wmse_weight:
            weight = torch.add(-self.wmse_shift[rows, None], logits["teacher"], alpha=self.of_wmse[1]).exp_()
            mean = self.softmaxes[self.of_wmse].mean_of("difference")
            total.addcmul_(logits["difference"] - mean[rows, None], weight, value=-1)
        return total


class Pairs:
    """What a sigmoid student's terms have of each pair, whatever else its row and its column hold.

    The contrastive term is softplus(-s) of a caption's own images and softplus(s) of all others. A cross entropy with a
    sigmoid target p is p softplus(-s) + (1 - p) softplus(s); with a softmax target it is softplus(s) - p s, of which
    `Direction` has the second half. Sums are float64: they go over all pairs.
    """

    def __init__(self, terms: Terms, *, device: torch.device):
        self.terms, self.cold = terms, 1 / terms.temperature
        self.sums = {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name, weight in (("contrastive", terms.contrastive_weight), ("soft_ce", terms.soft_ce_weight))
            if weight and terms.sigmoid
        }

    def add(self, logits: Logits, same: Float[Tensor, "r c"]) -> None:
        """Another tile."""
        if "contrastive" in self.sums:
            self.sums["contrastive"] += sigmoid_contrastive(logits["student"], same).sum()
        if "soft_ce" in self.sums and self.terms.teacher_sigmoid:
            student, teacher = self.cold * logits["student"], self.cold * logits["teacher"]
            self.sums["soft_ce"] += sigmoid_cross_entropy(student, teacher).sum()
        elif "soft_ce" in self.sums:
            self.sums["soft_ce"] += F.softplus(self.cold * logits["student"]).sum()

    def add_gradient(
        self, tile: Float[Tensor, "r c"], logits: Logits, same: Float[Tensor, "r c"], *, row_share: float
    ) -> None:
        """To the gradient of a tile; a mean over rows counts each `row_share`."""
        if "contrastive" in self.sums:
            pull = row_share * self.terms.contrastive_weight
            sign = 1 - 2 * same
            tile.addcmul_(torch.sigmoid(sign * logits["student"]), sign, value=pull)
        if "soft_ce" in self.sums:
            pull = row_share * self.cold * self.terms.soft_ce_weight
            tile.add_(torch.sigmoid(self.cold * logits["student"]), alpha=pull)
            if self.terms.teacher_sigmoid:
                tile.sub_(torch.sigmoid(self.cold * logits["teacher"]), alpha=pull)


def sigmoid_contrastive(student: Float[Tensor, "r c"], same: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """-log sigmoid(s) of pairs that belong together, -log sigmoid(-s) of all others (SigLIP, arXiv 2303.15343)."""
    return F.softplus((1 - 2 * same) * student)


def sigmoid_cross_entropy(student: Float[Tensor, "r c"], teacher: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """-p log sigmoid(s) - (1 - p) log sigmoid(-s) with p = sigmoid(t), which keeps its digits at both ends."""
    return torch.sigmoid(teacher) * F.softplus(-student) + torch.sigmoid(-teacher) * F.softplus(student)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """My images, with the scale in them."""

    student: Float[Tensor, "n d"]
    teacher: Float[Tensor, "n e"] | None
    ids: Int[Tensor, " n"]
    """Equal numbers mark equal captions."""
    bias: Float[Tensor, ""] | None
    teacher_bias: Float[Tensor, ""] | None
    """For sigmoids; a softmax does not feel them."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Texts: everybody's, or in a ring those of one rank at a time; what is known of them travels with them."""

    student: Float[Tensor, "m d"]
    teacher: Float[Tensor, "m e"] | None
    ids: Int[Tensor, " m"]
    first: int
    """Number of the first among everybody's."""
    direction: Direction

    def tiles(self, rows: Rows, size: int) -> Iterator[tuple[slice, slice, Logits, Float[Tensor, "r c"]]]:
        """(rows, columns, logits, 1 where the captions are the same) of each tile."""
        for start in range(0, len(rows.ids), size):
            for first in range(0, len(self.ids), size):
                r, c = slice(start, start + size), slice(first, first + size)
                logits = {"student": rows.student[r] @ self.student[c].T}
                if self.teacher is not None:
                    assert rows.teacher is not None
                    logits["teacher"] = rows.teacher[r] @ self.teacher[c].T
                    logits["difference"] = logits["teacher"] - logits["student"]
                for side, bias in (("student", rows.bias), ("teacher", rows.teacher_bias)):
                    if bias is not None:
                        logits[side] += bias
                # Numbers to multiply by: a choice by a mask costs ten times that.
                same = (rows.ids[r, None] == self.ids[c]).to(rows.student.dtype)
                yield r, c, logits, same

    def pass_on(self, *more: Tensor) -> tuple["Columns", list[Tensor]]:
        """Mine and `more` to the previous rank, the next rank's to me. All ranks."""
        tensors = [self.student, *([] if self.teacher is None else [self.teacher]), self.ids]
        ours = [*tensors, *more]
        received = pass_on_ring([*ours, *self.direction.state()])  # all ranks
        student, *teacher, ids = received[: len(tensors)]
        following = Columns(
            student=student,
            teacher=teacher[0] if teacher else None,
            ids=ids,
            first=(self.first + len(ids)) % (world_size() * len(ids)),
            direction=self.direction.with_state(received[len(ours) :]),
        )
        return following, received[len(tensors) : len(ours)]


class TiledLoss(torch.autograd.Function):
    """(my images, texts, scale, bias) -> (my share of the loss times the number of ranks, scalars of my rows).

    The texts are everybody's, gathered with gradient; or with `ring` mine, and everybody's come by one rank at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Float[Tensor, "n d"],
        text: Float[Tensor, "m d"],
        scale: Float[Tensor, ""],
        bias: Float[Tensor, ""] | None,
        teacher: tuple[Float[Tensor, "n e"], Float[Tensor, "m e"], Float[Tensor, ""] | None] | None,
        ids: tuple[Int[Tensor, " n"], Int[Tensor, " m"]],
        terms: Terms,
        tile_size: int,
        ring: bool,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        teacher_image, teacher_text, teacher_bias = (None, None, None) if teacher is None else teacher
        rows = Rows(student=scale * image, teacher=teacher_image, ids=ids[0], bias=bias, teacher_bias=teacher_bias)
        pairs = Pairs(terms, device=image.device)
        common = {"num_columns": world_size() * len(image), "has_teacher": teacher is not None}
        images = Direction(terms, **common, watched=True, like=rows.student[:, 0])
        texts = Direction(terms, **common, watched=False, like=text[:, 0])
        first = rank() * len(text) if ring else 0
        columns = Columns(student=text, teacher=teacher_text, ids=ids[1], first=first, direction=texts)
        for _ in range(world_size() if ring else 1):
            for r, c, logits, same in columns.tiles(rows, tile_size):
                pairs.add(logits, same)
                images.add(r, columns.first + c.start, logits, same)
                columns.direction.add(c, r.start, {name: tile.T for name, tile in logits.items()}, same.T)
            if ring:
                columns, _ = columns.pass_on()  # all ranks; after the last round mine are at home
        if not ring:
            columns.direction.join_processes()  # all ranks

        start = 0 if ring else rank() * len(image)
        mine = slice(start, start + len(image))
        of_texts = {name: by_row[mine] for name, by_row in columns.direction.terms_by_row().items()}
        found = [images.terms_by_row(), of_texts]
        scalars = {name: torch.stack([by_row[name].mean() for by_row in found]).mean() for name in found[0]}
        for name, total in pairs.sums.items():
            scalars[name] = scalars.get(name, 0.0) + (total / len(image)).to(image.dtype)
        denominators = (None, None)
        if "wmse" in scalars:
            sums = torch.stack([by_row["wmse_denominator"].sum() for by_row in found])
            denominators = sum_across_processes(sums).unbind()  # all ranks
            ratios = [by_row["wmse"].sum() / whole for by_row, whole in zip(found, denominators, strict=True)]
            scalars["wmse"] = world_size() * torch.stack(ratios).mean()
        ctx.save_for_backward(image, scale)
        ctx.rows, ctx.images, ctx.columns, ctx.pairs, ctx.denominators = rows, images, columns, pairs, denominators
        ctx.tile_size, ctx.ring = tile_size, ring
        return _loss_and_scalars(terms, scalars, images)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, ""], _: None):
        if torch.is_grad_enabled():
            raise RuntimeError("the tiled image_text_loss has no second derivative: pass tile_size=None")
        image, scale = ctx.saved_tensors
        rows, images, columns = ctx.rows, ctx.images, ctx.columns
        of_images, of_texts = ({"row_share": 0.5 / len(image), "wmse_denominator": d} for d in ctx.denominators)
        images.prepare_gradient(**of_images)
        to_image, to_text = torch.zeros_like(rows.student), torch.zeros_like(columns.student)
        to_bias = torch.zeros_like(scale)
        for _turn in range(world_size() if ctx.ring else 1):
            columns.direction.prepare_gradient(**of_texts)
            for r, c, logits, same in columns.tiles(rows, ctx.tile_size):
                tile = images.gradient(r, logits, same)
                tile += columns.direction.gradient(c, {name: part.T for name, part in logits.items()}, same.T).T
                ctx.pairs.add_gradient(tile, logits, same, row_share=1 / len(image))
                if rows.bias is not None:
                    to_bias += tile.sum()
                to_image[r] += tile @ columns.student[c]
                to_text[c] += tile.T @ rows.student[r]
            if ctx.ring:
                columns, (to_text,) = columns.pass_on(to_text)  # all ranks
        to_scale = (image * to_image).sum()
        of_bias = None if rows.bias is None else grad * to_bias
        return grad * scale * to_image, grad * to_text, grad * to_scale, of_bias, None, None, None, None, None


def _loss_and_scalars(
    terms: Terms, scalars: dict[str, Tensor], images: Direction
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    weights = {
        "contrastive": terms.contrastive_weight,
        "soft_ce": terms.soft_ce_weight,
        "wmse": terms.wmse_weight,
        "kl": terms.kl_weight,
    }
    named = {name: scalars[name] for name, weight in weights.items() if weight and name in scalars}
    loss = sum((weights[name] * term for name, term in named.items()), torch.zeros_like(images.positive[0]))
    _, column, is_same = images.best["student"]
    named["batch_acc1"] = is_same.mean()
    named["student_entropy"] = images.entropy("student").mean()
    if "teacher" in images.best:
        named["agreement@1"] = (column == images.best["teacher"][1]).float().mean()
        named["teacher_entropy"] = images.entropy("teacher").mean()
    return loss, named
