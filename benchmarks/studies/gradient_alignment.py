"""How well each term's gradient at the student's images points at the teacher's embeddings of the same images.

    python benchmarks/studies/gradient_alignment.py
    python benchmarks/studies/gradient_alignment.py --student local-dir:runs/x/model --output docs/cross_logits.png

For a row with the student's embedding x and the teacher's z of the same image: the cosine between the negative gradient
at x and z - x, both projected onto the tangent space of the sphere at x. Means over the rows of `BATCHES` batches of
training pairs; the seed draws batches, noise and initial weights. The table has mean ± standard deviation over seeds.

Students: the teacher's embeddings plus Gaussian noise of a norm relative to theirs, independent for images and texts,
normalised, at the teacher's scale; `emoji-student` at its initial weights; each `--student`, trained on the bundled
set. Models are in training mode, as when the loss sees them. Mimicry has cosine 1 by construction, which is a check.

The cosine is not the worth of a term. In-batch terms do not change when images and texts are rotated together, so that
0 at initial weights is expected of them: what they teach is not where the teacher's embeddings are.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bundled import bundled_embeddings
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gkl_vl.data.captions import usable_captions
from gkl_vl.data.files import stable_hash
from gkl_vl.data.pairs import bundled_pairs
from gkl_vl.losses.cross_logits import cross_logits_loss
from gkl_vl.losses.image_text import image_text_loss, mimicry_loss
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.teachers.online import teacher_scales
from gkl_vl.training.clip_teacher import BUNDLED_VIEWS

SEEDS, BATCHES, ROWS = range(5), 4, 256
NOISES, DRAWN = (0.5, 1.0, 2.0), "noise 1"
NO_TERM = {"soft_ce_weight": 0.0, "wmse_weight": 0.0}
GKL_TERMS: dict[str, dict[str, float]] = {
    "soft CE": {"soft_ce_weight": 1.0},
    "soft CE, T = 2": {"soft_ce_weight": 1.0, "temperature": 2.0},
    **{f"wMSE, γ = {gamma:g}": {"wmse_weight": 1.0, "gamma": gamma} for gamma in (0.0, 0.5, 1.0)},
}
IN_BATCH, CROSS_BATCH, CROSS_ALL = "in the batch", "cross, the batch's texts", "cross, all captions"
STUDENT, TEACHER, INK, MUTED, RULE = "#0072b2", "#d55e00", "#1f2328", "#656d76", "#d8dee4"
MARKERS = {"noise 0.5": "v", "noise 2": "^", "initial weights": "s"}
"""Of all other students, D."""
Batch = dict[str, Any]
Embeddings = dict[str, Tensor]
"""Arguments of `image_text_loss`, in float64 because some gradients are small."""
Term = Callable[[Embeddings], Tensor]
Results = dict[tuple[str, str], dict[str, list[float]]]
"""Cosine of each seed, by (columns, term) and student."""


def make_terms(bank: Tensor) -> dict[tuple[str, str], Term]:
    """Every term as a function of the embeddings. `bank`: the teacher's texts of all captions, [K, e]."""

    def in_batch(weights: dict[str, float]) -> Term:
        return lambda of: image_text_loss(**of, **({"contrastive_weight": 0.0} | NO_TERM | weights))[0]

    def cross(weights: dict[str, float], columns: str) -> Term:
        names = ("image", "teacher_image", "teacher_logit_scale")
        return lambda of: cross_logits_loss(
            **{name: of[name] for name in names},
            text_bank=bank if columns == CROSS_ALL else of["teacher_text"],
            **(NO_TERM | weights),
        )[0]

    def mimicry(of: Embeddings) -> Tensor:
        return mimicry_loss(**{name: of[name] for name in ("image", "text", "teacher_image", "teacher_text")})

    terms = {(IN_BATCH, "contrastive"): in_batch({"contrastive_weight": 1.0})}
    terms |= {(IN_BATCH, name): in_batch(weights) for name, weights in GKL_TERMS.items()}
    for columns in (CROSS_BATCH, CROSS_ALL):
        terms |= {(columns, name): cross(weights, columns) for name, weights in GKL_TERMS.items()}
    return terms | {("none", "mimicry"): mimicry}


def alignment(term: Term, of: Embeddings) -> float:
    """Mean over rows of the cosine between the negative gradient and z - x, orthogonal to x."""
    x = of["image"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(term(of | {"image": x}), x)
    x = x.detach()
    down, towards = (v - (v * x).sum(1, keepdim=True) * x for v in (-gradient, of["teacher_image"] - x))
    return F.cosine_similarity(down, towards, dim=1, eps=1e-30).mean().item()


def noisy(targets: Embeddings, noise: float, draw: torch.Generator) -> Embeddings:
    def near(z: Tensor) -> Tensor:
        return F.normalize(z + noise / z.shape[1] ** 0.5 * torch.randn(z.shape, generator=draw, dtype=z.dtype))

    image, text = near(targets["teacher_image"]), near(targets["teacher_text"])
    return {"image": image, "text": text, "logit_scale": targets["teacher_logit_scale"]}


@torch.no_grad()
def embedded(model: Clip, batch: Batch) -> Embeddings:
    towers = model.towers.train()
    image, text = towers.encode_image(model.prepare(batch["image"])), towers.encode_text(batch["text"])
    return {"image": image.double(), "text": text.double(), "logit_scale": towers.log_scale().exp().double()}


def make_students(seed: int, trained: dict[str, Clip]) -> dict[str, Callable[[Batch, Embeddings], Embeddings]]:
    """(batch, teacher's side) -> embeddings and scale, by heading."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    models = {"initial weights": load_clip("emoji-student"), **trained}
    return {
        **{f"noise {noise:g}": lambda _, targets, noise=noise: noisy(targets, noise, draw) for noise in NOISES},
        **{heading: lambda batch, _, model=model: embedded(model, batch) for heading, model in models.items()},
    }


def measure(trained: dict[str, Clip]) -> Results:
    """All terms on all students and seeds."""
    teacher, student, pairs = freeze(load_clip("bundled")), load_clip("emoji-student"), bundled_pairs()
    stored, captions = bundled_embeddings(teacher, student), [usable_captions(p.captions) for p in pairs]

    def batches(seed: int) -> Iterator[tuple[Batch, Embeddings]]:
        """Random pairs with a random view and caption of each, and the teacher's side of them."""
        draw = random.Random(seed)
        for _ in range(BATCHES):
            rows = draw.sample(range(len(pairs)), ROWS)
            drawn = torch.tensor([(r, draw.randrange(BUNDLED_VIEWS), draw.randrange(len(captions[r]))) for r in rows])
            texts = [captions[row][number] for row, _, number in drawn.tolist()]
            p, view, caption = drawn.unbind(dim=1)
            targets = {"teacher_image": stored.image[p, view], "teacher_text": stored.text[p, caption]}
            targets |= teacher_scales(teacher)
            ids = torch.tensor([stable_hash(text) for text in texts])
            batch = {"image": stored.pixels[p, view], "text": student.tokenize(texts)}
            yield batch, {name: x.double() for name, x in targets.items()} | {"text_ids": ids}

    by_text = {text: stored.text[p, number] for p, own in enumerate(captions) for number, text in enumerate(own)}
    terms = make_terms(torch.stack(list(by_text.values())).double())
    results: Results = {row: {} for row in terms}
    for seed in SEEDS:
        drawn = list(batches(seed))
        for heading, embed in make_students(seed, trained).items():
            embeddings = [targets | embed(batch, targets) for batch, targets in drawn]
            for row, term in terms.items():
                cosine = statistics.mean(alignment(term, of) for of in embeddings)
                results[row].setdefault(heading, []).append(cosine)
    return results


def table(results: Results) -> str:
    """Markdown: a row per term, a column per student."""
    headings = list(next(iter(results.values())))
    lines = [f"| columns | term | {' | '.join(headings)} |", "|---" * (len(headings) + 2) + "|"]
    for (columns, term), of in results.items():
        cells = [f"{statistics.mean(of[h]):.3f} ± {statistics.stdev(of[h]):.3f}" for h in headings]
        lines.append(f"| {columns} | {term} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the picture -------------------------------------------------------------------------------------------------


def draw(results: Results, output: Path) -> None:
    figure = Figure(figsize=(10, 5.8), dpi=120, facecolor="white")
    draw_schematic(figure.add_axes((0.015, 0.02, 0.375, 0.96)))
    draw_cosines(figure.add_axes((0.55, 0.06, 0.435, 0.7)), results)
    figure.savefig(output)


def draw_schematic(axes: Axes) -> None:
    """What is compared with what. Circles are images, squares are texts."""
    axes.set(xlim=(0, 10), ylim=(0, 20))
    axes.set_axis_off()
    of = {"x": STUDENT, "u": STUDENT, "z": TEACHER, "t": TEACHER}
    centred: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
    for texts, low, images in (("u", 13.8, {"x": 15.55}), ("t", 3.5, {"z": 6.8, "x": 3.5})):
        columns = {f"{texts}_{number}": low + 1.75 * (3 - number) for number in (1, 2, 3)}
        for name, y in images.items():
            for row in columns.values():
                axes.plot([2.6, 7.4], [y, row], color=of[name], linewidth=1.3, alpha=0.55)
        for x, nodes, marker, side in ((2.6, images, "o", -0.8), (7.4, columns, "s", 0.8)):
            for name, y in nodes.items():
                colour = of[name[0]]
                axes.plot([x], [y], marker, markersize=20, color=colour, zorder=3)
                axes.text(x, y, f"${name}$", color="white", fontsize=11, zorder=4, **centred)
                if colour == STUDENT:
                    axes.text(x + side, y, "↕", color=INK, fontsize=14, **centred)
    axes.annotate("", (2.6, 6.15), (2.6, 4.2), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.8})
    for y, text in ((19.5, "In the batch: both sides move"), (9.2, "Cross: the target stands still")):
        axes.text(0, y, text, color=INK, fontsize=11.5, weight="bold")
    for x, y, text, colour, size, align in (
        (0, 18.6, "↕ moves in training", MUTED, 9.5, "left"),
        (7.4, 18.35, "student's texts", STUDENT, 9.5, "center"),
        (2.6, 14.35, "student's image", STUDENT, 9.5, "center"),
        (0, 12.0, r"$d_j\,=\,s_T\,z\cdot t_j\,-\,s\,x\cdot u_j$", INK, 11, "left"),
        (0, 11.1, "at x = z not 0 unless the student's texts fit too", MUTED, 9.5, "left"),
        (2.6, 8.05, "teacher's image", TEACHER, 9.5, "center"),
        (7.4, 8.05, "teacher's texts", TEACHER, 9.5, "center"),
        (2.3, 5.0, "$z - x$", INK, 10.5, "right"),
        (2.6, 2.3, "student's image", STUDENT, 9.5, "center"),
        (0, 1.15, r"$d_j\,=\,s_T\,(z-x)\cdot t_j$", INK, 11, "left"),
        (0, 0.25, "at x = z always 0", MUTED, 9.5, "left"),
    ):
        axes.text(x, y, text, color=colour, fontsize=size, ha=align)


def draw_cosines(axes: Axes, results: Results) -> None:
    """Bars with standard deviations for the student `DRAWN`, in the batch and cross; markers for the others."""
    others = [heading for heading in next(iter(results.values())) if heading != DRAWN]
    terms = ["contrastive", *GKL_TERMS]
    bars, markers = [], []
    for columns, colour, shift in ((IN_BATCH, STUDENT, -0.2), (CROSS_ALL, TEACHER, 0.2)):
        rows = {row + shift: results[columns, term] for row, term in enumerate(terms) if (columns, term) in results}
        ys, of = list(rows), [of[DRAWN] for of in rows.values()]
        errors = {"xerr": list(map(statistics.stdev, of)), "error_kw": {"ecolor": INK, "elinewidth": 1.4, "capsize": 2}}
        bars.append(axes.barh(ys, list(map(statistics.mean, of)), 0.36, color=colour, alpha=0.7, **errors))
        markers = [
            axes.plot(
                [statistics.mean(of[heading]) for of in rows.values()], ys, MARKERS.get(heading, "D"), color=INK,
                markerfacecolor="white" if heading in MARKERS else INK, label=heading,
            )[0]
            for heading in others
        ]  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(0.985, 0.02, "mimicry: 1", fontsize=9.5, color=INK, ha="right", va="center")
    axes.set_yticks(range(len(terms)), terms)
    axes.set(xlim=(-0.04, 1.02), ylim=(len(terms) - 0.5, -0.5))
    axes.tick_params(length=0, labelsize=10, labelcolor=INK)
    axes.grid(axis="x", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.text(-0.45, -2.14, "Cosine of the negative gradient at x with z − x", fontsize=11.5, weight="bold", color=INK)
    note = f"Bars: teacher + {DRAWN}, with standard deviation. Markers: other students"
    axes.text(-0.45, -1.79, note, fontsize=9.5, color=MUTED)
    style = {"frameon": False, "fontsize": 9.5, "labelcolor": INK, "columnspacing": 1.2, "handletextpad": 0.4}
    names = ["in the batch, student's texts", "cross, teacher's texts of all captions"]
    axes.add_artist(axes.legend(bars, names, loc=(-0.4, 1.085), ncols=2, handlelength=1.2, **style))
    axes.legend(handles=markers, loc=(-0.4, 1.02), ncols=len(others), handlelength=1.2, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", action="append", default=[], help="local-dir:PATH of a trained model; repeatable")
    parser.add_argument("--output", type=Path, help="draw the picture into this PNG")
    options = parser.parse_args()
    names = ["trained", *(f"trained {n}" for n in range(2, len(options.student) + 1))]
    results = measure({heading: load_clip(name) for heading, name in zip(names, options.student, strict=False)})
    print(table(results))
    if options.output is not None:
        draw(results, options.output)
        print(options.output)


if __name__ == "__main__":
    main()
