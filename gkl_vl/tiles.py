"""The losses of `image_text.py` without their [n, N] matrices: one sweep for statistics, one for gradients.

A sweep goes over tiles of the logits, my images (rows) against everybody's texts (columns). A tile is computed once and
serves both directions: its rows belong to images, its columns to texts. All that a direction needs of its logits is a
few softmaxes of them, and of each the log-sum-exp and the mean and variance of some values under it; these merge from
tile to tile. The second sweep computes each tile again and sends its gradient to the embeddings.

Axis letters: n = my rows, N = everybody's, r c = rows and columns of a tile, q = rows of one direction, k = values,
d = the student's embedding, e = the teacher's.

Stability: a running softmax is shifted by its largest exponent so far; a mean moves by a share of the difference of two
means, and a variance grows by that difference squared (Chan et al. 1979): no large sums are subtracted. Biases are left
out: no term feels a number added to a row, and the difference of teacher and student would lose digits to it.

Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867), used by Inf-CL (arXiv 2410.17243) for the contrastive
loss with hard targets. The soft targets and GKL's weighted variance in this form are this project's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gkl_vl.gather import max_across_processes, rank, sum_across_processes, world_size
from gkl_vl.gkl import Number

Logits = dict[str, Float[Tensor, "r c"]]
"""A tile: "student" and, where there is a teacher, "teacher" and "difference" = teacher - student."""
Key = tuple[str, float]
"""A softmax: whose logits, and the factor that they are multiplied by first."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Weights, temperatures and gamma, as `image_text_loss` documents them."""

    contrastive_weight: Number
    soft_ce_weight: Number
    wmse_weight: Number
    kl_weight: Number
    gamma: Number
    temperature: Number
    weight_temperature: Number


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Embeddings of both directions. The images carry the scale already."""

    student: tuple[Float[Tensor, "n d"], Float[Tensor, "N d"]]
    teacher: tuple[Float[Tensor, "n e"], Float[Tensor, "N e"]] | None
    ids: tuple[Int[Tensor, " n"], Int[Tensor, " N"]]
    """Equal numbers mark equal captions."""

    def tiles(self, size: int) -> Iterator[tuple[slice, slice, Logits, Bool[Tensor, "r c"]]]:
        """(rows, columns, logits, whether the captions are the same) of each tile."""
        for row in range(0, len(self.ids[0]), size):
            for column in range(0, len(self.ids[1]), size):
                rows, columns = slice(row, row + size), slice(column, column + size)
                logits = {"student": self.student[0][rows] @ self.student[1][columns].T}
                if self.teacher is not None:
                    logits["teacher"] = self.teacher[0][rows] @ self.teacher[1][columns].T
                    logits["difference"] = logits["teacher"] - logits["student"]
                yield rows, columns, logits, self.ids[0][rows, None] == self.ids[1][columns]


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
        exponents = self.factor * logits[self.side]
        high = exponents.amax(dim=1)
        weight = exponents.sub_(high[:, None]).exp_()
        total = weight.sum(dim=1)
        top = torch.maximum(self.high[rows], high)
        before, now = self.total[rows] * (self.high[rows] - top).exp(), total * (high - top).exp()
        self.high[rows], self.total[rows] = top, before + now
        share = now / (before + now)
        for index, value in enumerate(self.values):
            mean = (weight * logits[value]).sum(dim=1) / total
            step = mean - self.mean[index, rows]
            self.mean[index, rows] += share * step
            if value == "difference":
                spread = (logits[value] - mean[:, None]).square_().mul_(weight).sum(dim=1) / total
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
        self.distil_weight = terms.soft_ce_weight + terms.kl_weight if has_teacher else 0
        self.wmse_weight = terms.wmse_weight if has_teacher else 0
        self.cold = 1 / terms.temperature
        self.of_wmse: Key = ("teacher", terms.gamma / terms.weight_temperature)
        """softmax(t / T2)^gamma, normalised, is this softmax."""
        self.of_base: Key = ("teacher", 1 / terms.weight_temperature)
        self.softmaxes = {
            key: Softmax(key, tuple(values), like=like) for key, values in self._wanted(has_teacher).items()
        }
        self.positive, self.num_positive = torch.zeros_like(like), torch.zeros_like(like)
        """Sum and number of the logits of a row's own captions."""
        nowhere = torch.zeros_like(like, dtype=torch.long)
        sides = (("student", "teacher") if has_teacher else ("student",)) if watched else ()
        self.best = {side: (torch.full_like(like, -torch.inf), nowhere.clone()) for side in sides}
        """The largest logit of a row, and its column."""

    def _wanted(self, has_teacher: bool) -> dict[Key, dict[str, None]]:
        """The softmaxes, and the values whose mean under each is asked for (an ordered set)."""
        wanted: dict[Key, dict[str, None]] = {}

        def want(key: Key, *values: str) -> None:
            wanted.setdefault(key, {}).update(dict.fromkeys(values))

        if self.terms.contrastive_weight:
            want(("student", 1.0))
        if self.watched:  # entropies, for the log
            want(("student", 1.0), "student")
            if has_teacher:
                want(("teacher", 1.0), "teacher")
        if self.distil_weight:
            want(("student", self.cold))
            want(("teacher", self.cold), "student", "teacher")
        if self.wmse_weight:
            want(self.of_wmse, "difference")
            want(self.of_base)
        return wanted

    def add(self, rows: slice, first_column: int, logits: Logits, same: Bool[Tensor, "r c"]) -> None:
        """Another tile of these rows."""
        for softmax in self.softmaxes.values():
            softmax.add(rows, logits)
        if self.terms.contrastive_weight:
            self.positive[rows] += logits["student"].where(same, 0).sum(dim=1)
            self.num_positive[rows] += same.sum(dim=1)
        for side, (best, column) in self.best.items():
            value, index = logits[side].max(dim=1)
            column[rows] = torch.where(value > best[rows], index + first_column, column[rows])
            best[rows] = torch.maximum(value, best[rows])

    def join_processes(self) -> None:
        """All ranks."""
        for softmax in self.softmaxes.values():
            softmax.join_processes()
        self.positive = sum_across_processes(self.positive)  # all ranks
        self.num_positive = sum_across_processes(self.num_positive)  # all ranks

    def terms_by_row(self) -> dict[str, Float[Tensor, " q"]]:
        """Each term of each row, without its weight; wMSE as a numerator and a denominator."""
        found = {}
        if self.terms.contrastive_weight:
            found["contrastive"] = self.softmaxes["student", 1.0].log_sum_exp() - self.positive / self.num_positive
        if self.distil_weight:
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
        pull = self.cold * row_share * self.distil_weight
        self.pulls: dict[Key, float] = {}
        for key, more in (("student", 1.0), row_share * self.terms.contrastive_weight), (("student", self.cold), pull):
            self.pulls[key] = self.pulls.get(key, 0.0) + more
        self.pulls["teacher", self.cold] = -pull
        self.pulls = {key: pull for key, pull in self.pulls.items() if pull}
        self.shift = {key: softmax.log_sum_exp() for key, softmax in self.softmaxes.items()}
        self.positive_pull = row_share * self.terms.contrastive_weight / self.num_positive
        if wmse_denominator is not None:
            scale = row_share * self.num_columns * self.wmse_weight
            self.wmse_pull = scale * self._total_weight().square() / wmse_denominator

    def gradient(self, rows: slice, logits: Logits, same: Bool[Tensor, "r c"]) -> Float[Tensor, "r c"]:
        """Of this direction's loss with respect to the student's logits of a tile."""
        total = torch.zeros_like(logits["student"])
        for (side, factor), pull in self.pulls.items():
            exponents = factor * logits[side] - self.shift[side, factor][rows, None]
            total.add_(exponents.exp_(), alpha=pull)
        if self.terms.contrastive_weight:
            total -= same * self.positive_pull[rows, None]
        if self.wmse_weight:
            weight = (self.of_wmse[1] * logits["teacher"] - self.shift[self.of_wmse][rows, None]).exp_()
            centred = logits["difference"] - self.softmaxes[self.of_wmse].mean_of("difference")[rows, None]
            total -= centred.mul_(weight).mul_(self.wmse_pull[rows, None])
        return total


class TiledLoss(torch.autograd.Function):
    """(my images, everybody's texts, scale) -> (my share of the loss times the number of ranks, scalars of my rows)."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Float[Tensor, "n d"],
        all_text: Float[Tensor, "N d"],
        scale: Float[Tensor, ""],
        teacher: tuple[Float[Tensor, "n e"], Float[Tensor, "N e"]] | None,
        ids: tuple[Int[Tensor, " n"], Int[Tensor, " N"]],
        terms: Terms,
        tile_size: int,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        sides = Sides(student=(scale * image, all_text), teacher=teacher, ids=ids)
        common = {"num_columns": len(all_text), "has_teacher": teacher is not None}
        images = Direction(terms, **common, watched=True, like=sides.student[0][:, 0])
        texts = Direction(terms, **common, watched=False, like=all_text[:, 0])
        for rows, columns, logits, same in sides.tiles(tile_size):
            images.add(rows, columns.start, logits, same)
            texts.add(columns, rows.start, {name: tile.T for name, tile in logits.items()}, same.T)
        texts.join_processes()  # all ranks
        ctx.save_for_backward(image, all_text, scale)
        ctx.sides, ctx.images, ctx.texts, ctx.tile_size = sides, images, texts, tile_size

        mine = slice(rank() * len(image), (rank() + 1) * len(image))
        found = [images.terms_by_row(), {name: rows[mine] for name, rows in texts.terms_by_row().items()}]
        scalars = {name: torch.stack([rows[name].mean() for rows in found]).mean() for name in found[0]}
        ctx.wmse_denominators = (None, None)
        if "wmse" in scalars:
            sums = torch.stack([rows["wmse_denominator"].sum() for rows in found])
            ctx.wmse_denominators = sum_across_processes(sums).unbind()  # all ranks
            ratios = [rows["wmse"].sum() / sum for rows, sum in zip(found, ctx.wmse_denominators, strict=True)]
            scalars["wmse"] = world_size() * torch.stack(ratios).mean()
        return _loss_and_scalars(terms, scalars, images, ids)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, ""], _: None):
        if torch.is_grad_enabled():
            raise RuntimeError("the tiled image_text_loss has no second derivative: pass tile_size=None")
        image, all_text, scale = ctx.saved_tensors
        for direction, denominator in zip((ctx.images, ctx.texts), ctx.wmse_denominators, strict=True):
            direction.prepare_gradient(row_share=0.5 / len(image), wmse_denominator=denominator)
        to_image, to_text = torch.zeros_like(ctx.sides.student[0]), torch.zeros_like(all_text)
        for rows, columns, logits, same in ctx.sides.tiles(ctx.tile_size):
            tile = ctx.images.gradient(rows, logits, same)
            tile += ctx.texts.gradient(columns, {name: part.T for name, part in logits.items()}, same.T).T
            to_image[rows] += tile @ all_text[columns]
            to_text[columns] += tile.T @ ctx.sides.student[0][rows]
        to_scale = (image * to_image).sum()
        return grad * scale * to_image, grad * to_text, grad * to_scale, None, None, None, None


def _loss_and_scalars(
    terms: Terms, scalars: dict[str, Tensor], images: Direction, ids: tuple[Tensor, Tensor]
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    weights = {
        "contrastive": terms.contrastive_weight,
        "soft_ce": terms.soft_ce_weight,
        "wmse": terms.wmse_weight,
        "kl": terms.kl_weight,
    }
    named = {name: scalars[name] for name, weight in weights.items() if weight and name in scalars}
    loss = sum((weights[name] * term for name, term in named.items()), torch.zeros_like(images.positive[0]))
    _, column = images.best["student"]
    named["batch_acc1"] = (ids[1][column] == ids[0]).float().mean()
    named["student_entropy"] = images.entropy("student").mean()
    if "teacher" in images.best:
        named["agreement@1"] = (column == images.best["teacher"][1]).float().mean()
        named["teacher_entropy"] = images.entropy("teacher").mean()
    return loss, named
