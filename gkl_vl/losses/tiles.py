"""Memory-efficient losses of `image_text.py`, without [n, N] matrices: one pass for statistics, one for gradients.

A pass iterates over tiles of the logits: images of this process (rows) against texts of all processes (columns), of
which there may be several for an image. A tile
is computed once for both directions, image to text (its rows) and text to image (its columns). Each direction needs a
few softmaxes of its logits: the log-sum-exp of each, and the mean and variance of some values under it, which are
updated tile by tile. The second pass recomputes each tile and accumulates its gradient in the embeddings' gradients.

Axis letters: n = images of this process, N = images of all processes, k = texts of an image, m = columns, r c = rows
and columns of a tile, q = rows of one direction, v = values, d = the student's embedding, e = the teacher's.

Stability: the exponents of a running softmax are shifted by their running maximum; means and variances are updated by
differences of means (Chan et al. 1979), so that no large sums are subtracted. Biases do not change a softmax and are
added for sigmoids only, and never to the difference of teacher and student, which would lose digits.

Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867), used by Inf-CL (arXiv 2410.17243) for the contrastive
loss with hard targets. Its extension to soft targets and to GKL's weighted variance is this project's.
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
from gkl_vl.losses.gkl import GklSettings, mean_logits

Logits = dict[str, Float[Tensor, "r c"]]
"""A tile: "student", each teacher's side (`Terms.teachers`) and, for wMSE, "teacher", the teachers' weighted mean, and
"difference" = teacher - student."""
Key = tuple[str, float]
"""A softmax: the side of its logits and the factor, an inverse temperature, on them."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Settings as in `image_text_loss`; without a teacher the weights of the distillation terms are 0."""

    contrastive_weight: float
    gkl: GklSettings
    kl_weight: float
    sigmoid: bool
    teacher_weights: tuple[float, ...]
    """One for each teacher, with sum 1."""
    teacher_sigmoid: tuple[bool, ...]

    @property
    def teachers(self) -> dict[str, float]:
        """Weight of each teacher by the name of its side; a single one is "teacher", its own mean."""
        several = len(self.teacher_weights) > 1
        return {f"teacher.{k}" if several else "teacher": weight for k, weight in enumerate(self.teacher_weights)}

    def by_scalar(self) -> dict[str, float]:
        """Weight of each scalar of the loss by its name: "soft_ce.0" and so on of several teachers."""

        def of_teachers(name: str, weight: float) -> dict[str, float]:
            return {side.replace("teacher", name): share * weight for side, share in self.teachers.items()}

        return {
            "contrastive": self.contrastive_weight,
            **of_teachers("soft_ce", self.gkl.soft_ce_weight),
            "wmse": self.gkl.wmse_weight,
            **of_teachers("kl", self.kl_weight),
        }

    @property
    def sigmoid_targets(self) -> dict[str, float]:
        """Of `teachers` those whose targets are sigmoids."""
        return dict(side for side, sigmoid in zip(self.teachers.items(), self.teacher_sigmoid, strict=True) if sigmoid)

    @property
    def softmax_targets(self) -> dict[str, float]:
        """The other ones."""
        return {side: weight for side, weight in self.teachers.items() if side not in self.sigmoid_targets}


class Softmax:
    """Running softmax(factor * logits) of q rows, and the means of v values under it.

    `maximum` and `sum_exp` [q]: the largest exponent, and the sum of exponentials relative to it. `mean` [v, q] has one
    row per value; `variance` [q] is the variance of the value "difference", if requested.
    """

    def __init__(self, key: Key, values: tuple[str, ...], *, like: Float[Tensor, " q"]):
        (self.side, self.factor), self.values = key, values
        self.maximum, self.sum_exp = torch.full_like(like, -torch.inf), torch.zeros_like(like)
        self.mean, self.variance = like.new_zeros(len(values), len(like)), torch.zeros_like(like)

    def add(self, rows: slice, logits: Logits) -> None:
        """Updates the statistics of `rows` with a tile of further columns."""
        maximum = self.factor * logits[self.side].amax(dim=1)
        weight = torch.add(-maximum[:, None], logits[self.side], alpha=self.factor).exp_()
        sum_exp = weight.sum(dim=1)
        new_maximum = torch.maximum(self.maximum[rows], maximum)
        old_part = self.sum_exp[rows] * (self.maximum[rows] - new_maximum).exp()
        new_part = sum_exp * (maximum - new_maximum).exp()
        self.maximum[rows], self.sum_exp[rows] = new_maximum, old_part + new_part
        share = new_part / (old_part + new_part)
        for index, value in enumerate(self.values):
            mean = torch.linalg.vecdot(weight, logits[value], dim=1) / sum_exp
            delta = mean - self.mean[index, rows]
            self.mean[index, rows] += share * delta
            if value == "difference":
                variance = torch.linalg.vecdot((logits[value] - mean[:, None]).square_(), weight, dim=1) / sum_exp
                self.variance[rows] += share * (variance - self.variance[rows] + (1 - share) * delta.square())

    def join_processes(self) -> None:
        """Merges the statistics of the same rows from all ranks, each of which has other columns. All ranks."""
        maximum = max_across_processes(self.maximum)  # all ranks
        own_part = self.sum_exp * (self.maximum - maximum).exp()
        sum_exp = sum_across_processes(own_part)  # all ranks
        share = own_part / sum_exp
        mean = sum_across_processes(share * self.mean)  # all ranks
        if "difference" in self.values:
            delta = mean[self.values.index("difference")] - self.mean_of("difference")
            self.variance = sum_across_processes(share * (self.variance + delta.square()))  # all ranks
        self.maximum, self.sum_exp, self.mean = maximum, sum_exp, mean

    def log_sum_exp(self) -> Float[Tensor, " q"]:
        return self.maximum + self.sum_exp.log()

    def mean_of(self, value: str) -> Float[Tensor, " q"]:
        return self.mean[self.values.index(value)]


class Direction:
    """One direction, image to text or text to image: softmaxes of q rows over all columns, and the terms from them.

    `with_metrics` also accumulates what the logged metrics need: entropies and the most similar columns.
    """

    def __init__(self, terms: Terms, *, texts_per_row: int, with_metrics: bool, like: Float[Tensor, " q"]):
        self.terms, self.with_metrics = terms, with_metrics
        self.soft_share = 1 / texts_per_row if terms.sigmoid else 1
        """A sigmoid student's soft CE is a sum over pairs, divided by the number of texts, not of rows."""
        self.distil_weight, self.wmse_weight = terms.gkl.soft_ce_weight + terms.kl_weight, terms.gkl.wmse_weight
        self.inverse_temperature = 1 / terms.gkl.temperature
        self.contrastive_weight = 0 if terms.sigmoid else terms.contrastive_weight
        self.softmax_targets = terms.softmax_targets if self.distil_weight else {}
        self.wmse_key: Key = ("teacher", terms.gkl.gamma / terms.gkl.weight_temperature)
        """This softmax equals softmax(t / T2)^gamma, normalised."""
        self.base_key: Key = ("teacher", 1 / terms.gkl.weight_temperature)
        self.softmaxes = {key: Softmax(key, tuple(values), like=like) for key, values in self._required().items()}
        self.positive, self.num_positive = torch.zeros_like(like), torch.zeros_like(like)
        """Sum and number of the logits of a row's positives, the columns with the row's caption."""
        sides = ("student", *terms.teachers) if with_metrics else ()
        self.best = {
            side: (
                torch.full_like(like, -torch.inf),
                torch.zeros_like(like, dtype=torch.long),
                torch.zeros_like(like),
            )
            for side in sides
        }
        """A row's largest logit, its column, and 1 if that column is a positive, else 0."""

    def _required(self) -> dict[Key, dict[str, None]]:
        """The softmaxes that the terms need, and the values to average under each (an ordered set)."""
        required: dict[Key, dict[str, None]] = {}

        def require(key: Key, *values: str) -> None:
            required.setdefault(key, {}).update(dict.fromkeys(values))

        if self.contrastive_weight:
            require(("student", 1.0))
        if self.with_metrics:  # entropies
            for side in ("student", *self.terms.teachers):
                require((side, 1.0), side)
        if self.distil_weight and not self.terms.sigmoid:
            require(("student", self.inverse_temperature))
        for side in self.softmax_targets:
            require((side, self.inverse_temperature), "student", side)
        if self.wmse_weight:
            require(self.wmse_key, "difference")
            require(self.base_key)
        return required

    def add(self, rows: slice, first_column: int, logits: Logits, same: Float[Tensor, "r c"]) -> None:
        """Updates the statistics of `rows` with a tile of further columns."""
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
        """The running statistics as a list of tensors, to be sent with the rows; without the metrics."""
        statistics = [t for s in self.softmaxes.values() for t in (s.maximum, s.sum_exp, s.mean, s.variance)]
        return [*statistics, self.positive, self.num_positive]

    def with_state(self, state: list[Tensor]) -> "Direction":
        """A copy with the statistics of other rows, as returned by their `state`."""
        other = copy(self)
        other.softmaxes = {}
        for number, (key, softmax) in enumerate(self.softmaxes.items()):
            other.softmaxes[key] = copy(softmax)
            new = other.softmaxes[key]
            new.maximum, new.sum_exp, new.mean, new.variance = state[4 * number : 4 * number + 4]
        other.positive, other.num_positive = state[-2:]
        return other

    def join_processes(self) -> None:
        """Merges the statistics of all ranks. All ranks."""
        for softmax in self.softmaxes.values():
            softmax.join_processes()
        self.positive = sum_across_processes(self.positive)  # all ranks
        self.num_positive = sum_across_processes(self.num_positive)  # all ranks

    def terms_by_row(self) -> dict[str, Float[Tensor, " q"]]:
        """Each term per row, without its weight; wMSE as numerator ("wmse") and denominator.

        For a sigmoid student only the parts that depend on the whole row; `Pairs` computes the rest.
        """
        by_row, factor = {}, self.inverse_temperature
        if self.contrastive_weight:
            by_row["contrastive"] = self.softmaxes["student", 1.0].log_sum_exp() - self.positive / self.num_positive
        for side in self.softmax_targets:
            teacher, suffix = self.softmaxes[side, factor], side.removeprefix("teacher")
            by_row[f"soft_ce{suffix}"] = -factor * self.soft_share * teacher.mean_of("student")
            if not self.terms.sigmoid:
                by_row[f"soft_ce{suffix}"] += self.softmaxes["student", factor].log_sum_exp()
                entropy = teacher.log_sum_exp() - factor * teacher.mean_of(side)
                by_row[f"kl{suffix}"] = by_row[f"soft_ce{suffix}"] - entropy
        if self.wmse_weight:
            squared = self._total_weight().square()
            by_row |= {"wmse": 0.5 * squared * self.softmaxes[self.wmse_key].variance, "wmse_denominator": squared}
        return by_row

    def _total_weight(self) -> Float[Tensor, " q"]:
        """W = sum_j softmax(t / T2)_j^gamma of each row."""
        base = self.softmaxes[self.base_key].log_sum_exp()
        return (self.softmaxes[self.wmse_key].log_sum_exp() - self.terms.gkl.gamma * base).exp()

    def entropy(self, side: str) -> Float[Tensor, " q"]:
        """Entropy of softmax(logits) of each row, in nats."""
        softmax = self.softmaxes[side, 1.0]
        return softmax.log_sum_exp() - softmax.mean_of(side)

    def prepare_gradient(self, *, num_rows: int, wmse_denominator: Float[Tensor, ""] | None) -> None:
        """Computes the coefficients of `gradient` from the statistics.

        `num_rows` is the number of this process's rows; `wmse_denominator` is the sum over rows of all ranks.
        """
        row_weight = 0.5 / num_rows  # each direction counts half
        terms, factor = self.terms, self.inverse_temperature
        coefficients = dict.fromkeys(self.softmaxes, 0.0)
        distillation = factor * row_weight * self.soft_share * self.distil_weight
        if self.contrastive_weight:
            coefficients["student", 1.0] += row_weight * self.contrastive_weight
        if not terms.sigmoid and self.distil_weight:
            coefficients["student", factor] += distillation
        for side, weight in self.softmax_targets.items():
            coefficients[side, factor] -= weight * distillation
        # Divided by sum_exp, not shifted by its logarithm: beside an offset of 50 that would lose four digits.
        self.coefficients = {key: value / self.softmaxes[key].sum_exp for key, value in coefficients.items() if value}
        """Coefficient of each unnormalised softmax in the gradient; positives, wMSE and `Pairs` are added apart."""
        self.positive_coefficient = row_weight * self.contrastive_weight / self.num_positive
        if wmse_denominator is not None:
            scale = 0.5 * world_size() * self.wmse_weight
            coefficient = scale * self._total_weight().square() / wmse_denominator
            # exp(x - wmse_shift) is the softmax times the coefficient
            self.wmse_shift = self.softmaxes[self.wmse_key].log_sum_exp() - coefficient.log()

    def gradient(self, rows: slice, logits: Logits, same: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
        """Gradient of this direction's loss with respect to the student's logits of a tile."""
        gradient = torch.zeros_like(logits["student"])
        for key, coefficient in self.coefficients.items():
            softmax = self.softmaxes[key]
            weight = torch.add(-softmax.maximum[rows, None], logits[softmax.side], alpha=softmax.factor).exp_()
            gradient.addcmul_(weight, coefficient[rows, None])
        if self.contrastive_weight:
            gradient.addcmul_(same, self.positive_coefficient[rows, None], value=-1)
        if self.wmse_weight:
            weight = torch.add(-self.wmse_shift[rows, None], logits["teacher"], alpha=self.wmse_key[1]).exp_()
            mean = self.softmaxes[self.wmse_key].mean_of("difference")
            gradient.addcmul_(logits["difference"] - mean[rows, None], weight, value=-1)
        return gradient


class Pairs:
    """The parts of a sigmoid student's terms that depend on single pairs, not on a whole row or column.

    The contrastive term is softplus(-s) for positives and softplus(s) for negatives. The cross entropy with a sigmoid
    target p is p softplus(-s) + (1 - p) softplus(s); with a softmax target it is softplus(s) - p s, of which
    `Direction` computes the second part. The sums over all pairs are float64.
    """

    def __init__(self, terms: Terms, *, device: torch.device):
        self.terms, self.inverse_temperature = terms, 1 / terms.gkl.temperature
        named = ["contrastive"] if terms.sigmoid and terms.contrastive_weight else []
        self.soft_sides = terms.teachers if terms.sigmoid and terms.gkl.soft_ce_weight else {}
        named += [side.replace("teacher", "soft_ce") for side in self.soft_sides]
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in named}

    def add(self, logits: Logits, same: Float[Tensor, "r c"]) -> None:
        """Adds the terms of a tile to the sums."""
        if "contrastive" in self.sums:
            self.sums["contrastive"] += sigmoid_contrastive(logits["student"], same).sum()
        for side in self.soft_sides:
            student = self.inverse_temperature * logits["student"]
            if side in self.terms.sigmoid_targets:
                entropy = sigmoid_cross_entropy(student, self.inverse_temperature * logits[side])
            else:
                entropy = F.softplus(student)
            self.sums[side.replace("teacher", "soft_ce")] += entropy.sum()

    def add_gradient(
        self, gradient: Float[Tensor, "r c"], logits: Logits, same: Float[Tensor, "r c"], *, pair_weight: float
    ) -> None:
        """Adds to a tile's gradient in place; `pair_weight` is the weight of a pair in the mean."""
        if "contrastive" in self.sums:
            coefficient = pair_weight * self.terms.contrastive_weight
            sign = 1 - 2 * same
            gradient.addcmul_(torch.sigmoid(sign * logits["student"]), sign, value=coefficient)
        if self.soft_sides:
            coefficient = pair_weight * self.inverse_temperature * self.terms.gkl.soft_ce_weight
            gradient.add_(torch.sigmoid(self.inverse_temperature * logits["student"]), alpha=coefficient)
            for side, weight in self.terms.sigmoid_targets.items():
                target = torch.sigmoid(self.inverse_temperature * logits[side])
                gradient.sub_(target, alpha=weight * coefficient)


def sigmoid_contrastive(student: Float[Tensor, "r c"], same: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """-log sigmoid(s) for positives, -log sigmoid(-s) for negatives (SigLIP, arXiv 2303.15343)."""
    return F.softplus((1 - 2 * same) * student)


def sigmoid_cross_entropy(student: Float[Tensor, "r c"], teacher: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """-p log sigmoid(s) - (1 - p) log sigmoid(-s) with p = sigmoid(t), accurate for p near 0 and near 1."""
    return torch.sigmoid(teacher) * F.softplus(-student) + torch.sigmoid(-teacher) * F.softplus(student)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Image embeddings of this process."""

    student: Float[Tensor, "n d"]
    """Multiplied by the logit scale."""
    teachers: tuple[Float[Tensor, "n _e"], ...]
    """Each multiplied by its scale."""
    ids: Int[Tensor, "n k"]
    """Of the captions of each: equal ids mark equal captions."""
    bias: Float[Tensor, ""] | None
    teacher_biases: tuple[Float[Tensor, ""] | None, ...]
    """The biases are for sigmoids; a softmax does not depend on them."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Text embeddings of all ranks, or in a ring of one rank at a time, with the statistics of their direction.

    The texts of an image are one behind the other.
    """

    student: Float[Tensor, "m d"]
    teachers: tuple[Float[Tensor, "m _e"], ...]
    ids: Int[Tensor, " m"]
    first: int
    """Index of the first among the texts of all ranks."""
    direction: Direction

    def tiles(self, rows: Rows, size: int) -> Iterator[tuple[slice, slice, Logits, Float[Tensor, "r c"]]]:
        """Yields (rows, columns, logits, 1 where the image has the caption and 0 elsewhere) of each tile."""
        for start in range(0, len(rows.ids), size):
            for first in range(0, len(self.ids), size):
                r, c = slice(start, start + size), slice(first, first + size)
                first_ids, *other_ids = rows.ids[r, :, None].unbind(1)  # [r, 1] each
                same = first_ids == self.ids[c]
                for ids in other_ids:  # in turn: no [r, c, k]
                    same |= ids == self.ids[c]
                # Floats to multiply by: selecting with a boolean mask is ten times slower.
                yield r, c, self._logits(rows, r, c), same.to(rows.student.dtype)

    def _logits(self, rows: Rows, r: slice, c: slice) -> Logits:
        logits, terms = {"student": rows.student[r] @ self.student[c].T}, self.direction.terms
        for side, images, texts in zip(terms.teachers, rows.teachers, self.teachers, strict=True):
            logits[side] = images[r] @ texts[c].T
        if terms.gkl.wmse_weight:
            own = [logits[side] for side in terms.teachers]
            logits["teacher"] = mean_logits(teachers=own, weights=terms.teacher_weights)
            logits["difference"] = logits["teacher"] - logits["student"]
        for side, bias in zip(("student", *terms.teachers), (rows.bias, *rows.teacher_biases), strict=True):
            if bias is not None:
                logits[side] += bias
        return logits

    def pass_on(self, *more: Tensor) -> tuple["Columns", list[Tensor]]:
        """Sends the columns and `more` to the previous rank and returns those of the next rank. All ranks."""
        tensors = [self.student, *self.teachers, self.ids]
        without_state = [*tensors, *more]
        received = pass_on_ring([*without_state, *self.direction.state()])  # all ranks
        student, *teachers, ids = received[: len(tensors)]
        following = Columns(
            student=student,
            teachers=tuple(teachers),
            ids=ids,
            first=(self.first + len(ids)) % (world_size() * len(ids)),
            direction=self.direction.with_state(received[len(without_state) :]),
        )
        return following, received[len(tensors) : len(without_state)]


class TiledLoss(torch.autograd.Function):
    """(images of this rank, texts, scale, bias) -> (its share of the loss times the number of ranks, its scalars).

    The texts are those of all ranks, gathered with gradient; with `ring` they are this rank's, and the texts of the
    others arrive one rank at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Float[Tensor, "n d"],
        text: Float[Tensor, "m d"],
        scale: Float[Tensor, ""],
        bias: Float[Tensor, ""] | None,
        teachers: tuple[tuple[Float[Tensor, "n _e"], Float[Tensor, "m _e"], Float[Tensor, ""] | None], ...],
        ids: tuple[Int[Tensor, "n k"], Int[Tensor, " m"]],
        terms: Terms,
        tile_size: int,
        ring: bool,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        teacher_images, teacher_texts, teacher_biases = zip(*teachers, strict=True) if teachers else ((), (), ())
        rows = Rows(
            student=scale * image, teachers=teacher_images, ids=ids[0], bias=bias, teacher_biases=teacher_biases
        )
        pairs = Pairs(terms, device=image.device)
        own_texts = ids[0].numel()
        images = Direction(terms, texts_per_row=ids[0].shape[1], with_metrics=True, like=rows.student[:, 0])
        texts = Direction(terms, texts_per_row=1, with_metrics=False, like=text[:, 0])
        first = rank() * len(text) if ring else 0
        columns = Columns(student=text, teachers=teacher_texts, ids=ids[1], first=first, direction=texts)
        for _ in range(world_size() if ring else 1):
            for r, c, logits, same in columns.tiles(rows, tile_size):
                pairs.add(logits, same)
                images.add(r, columns.first + c.start, logits, same)
                columns.direction.add(c, r.start, {name: tile.T for name, tile in logits.items()}, same.T)
            if ring:
                columns, _ = columns.pass_on()  # all ranks; after the last round each rank has its own texts again
        if not ring:
            columns.direction.join_processes()  # all ranks

        start = 0 if ring else rank() * own_texts
        own = slice(start, start + own_texts)
        text_terms = {name: by_row[own] for name, by_row in columns.direction.terms_by_row().items()}
        directions = [images.terms_by_row(), text_terms]
        scalars = {name: torch.stack([by_row[name].mean() for by_row in directions]).mean() for name in directions[0]}
        for name, total in pairs.sums.items():
            scalars[name] = scalars.get(name, 0.0) + (total / own_texts).to(image.dtype)
        denominators = (None, None)
        if "wmse" in scalars:
            sums = torch.stack([by_row["wmse_denominator"].sum() for by_row in directions])
            denominators = sum_across_processes(sums).unbind()  # all ranks
            ratios = [by_row["wmse"].sum() / total for by_row, total in zip(directions, denominators, strict=True)]
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
        own_texts = rows.ids.numel()
        for_images, for_texts = (
            {"num_rows": count, "wmse_denominator": denominator}
            for count, denominator in zip((len(image), own_texts), ctx.denominators, strict=True)
        )
        images.prepare_gradient(**for_images)
        image_grad, text_grad = torch.zeros_like(rows.student), torch.zeros_like(columns.student)
        bias_grad = torch.zeros_like(scale)
        for _round in range(world_size() if ctx.ring else 1):
            columns.direction.prepare_gradient(**for_texts)
            for r, c, logits, same in columns.tiles(rows, ctx.tile_size):
                tile = images.gradient(r, logits, same)
                tile += columns.direction.gradient(c, {name: part.T for name, part in logits.items()}, same.T).T
                ctx.pairs.add_gradient(tile, logits, same, pair_weight=1 / own_texts)
                if rows.bias is not None:
                    bias_grad += tile.sum()
                image_grad[r] += tile @ columns.student[c]
                text_grad[c] += tile.T @ rows.student[r]
            if ctx.ring:
                columns, (text_grad,) = columns.pass_on(text_grad)  # all ranks
        scale_grad = (image * image_grad).sum()
        bias_grad = None if rows.bias is None else grad * bias_grad
        return grad * scale * image_grad, grad * text_grad, grad * scale_grad, bias_grad, None, None, None, None, None


def _loss_and_scalars(
    terms: Terms, scalars: dict[str, Tensor], images: Direction
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    weights = terms.by_scalar()
    logged = {name: scalars[name] for name, weight in weights.items() if weight and name in scalars}
    loss = sum((weights[name] * term for name, term in logged.items()), torch.zeros_like(images.positive[0]))
    _, column, is_same = images.best["student"]
    logged["batch_acc1"] = is_same.mean()
    logged["student_entropy"] = images.entropy("student").mean()
    for side in terms.teachers:
        suffix = side.removeprefix("teacher")
        logged[f"agreement@1{suffix}"] = (column == images.best[side][1]).float().mean()
        logged[f"teacher_entropy{suffix}"] = images.entropy(side).mean()
    return loss, logged
