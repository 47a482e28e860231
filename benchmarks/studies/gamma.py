"""What gamma does: the weights of wMSE over the bundled class names, for the bundled teacher and held-out drawings.

    python benchmarks/studies/gamma.py --output docs/gamma.png

The weights of a drawing are w = softmax(t)^gamma over all names, t the teacher's logits. The table has the number of
names that count, (sum w)^2 / sum w^2, over the drawings of `emoji`: median and quartiles. The picture has one drawing's
weights, divided by their sum, for the names that the teacher holds likeliest, and the table as a curve.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from gkl_vl.disk_cache import cache_folder
from gkl_vl.evaluation.embed import Embedder, class_weights, embed_images
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.losses.gkl import smooth_weight
from gkl_vl.models.clip import load_clip

GAMMAS = torch.linspace(0, 1, 21)
SHOWN = {0.0: "#a0a7b0", 0.5: "#0072b2", 1.0: "#d55e00"}
"""gamma -> colour."""
NAMES = 8
CERTAINTY = 0.6
"""The drawing shown is the one whose likeliest name has a probability nearest to this."""
INK, MUTED, RULE = "#1f2328", "#656d76", "#d8dee4"


def teacher_logits() -> tuple[Tensor, list[str]]:
    """Logits [images, names] of the held-out drawings, and the names."""
    emoji = load_benchmark_set("emoji")
    embedder = Embedder(clip=load_clip("bundled"), cache=cache_folder("embeddings"))
    cosines = embed_images(embedder, emoji, "cls").rows @ class_weights(embedder, emoji).T
    return cosines * embedder.clip.towers.log_scale().detach().exp(), list(emoji.class_names or ())


def counted(logits: Tensor) -> Tensor:
    """The number of names that count, by gamma and quartile: [gammas, 3]."""
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    rows = []
    for gamma in GAMMAS.tolist():
        weight = smooth_weight(teacher=logits, gamma=gamma, weight_temperature=1.0)
        rows.append((weight.sum(dim=1).square() / weight.square().sum(dim=1)).quantile(quartiles))
    return torch.stack(rows)


def draw(logits: Tensor, names: list[str], quartiles: Tensor, output: Path) -> None:
    figure = Figure(figsize=(10, 4.2), dpi=120, facecolor="white")
    draw_weights(figure.add_axes((0.225, 0.1, 0.255, 0.68)), logits, names)
    draw_counts(figure.add_axes((0.58, 0.13, 0.4, 0.65)), quartiles)
    for x, title, note in (
        (
            0.015,
            "Weights of one drawing",
            f"the {NAMES} likeliest of {len(names):,} names, share of all weight, logarithmic",
        ),
        (0.535, "Names that count", f"median and quartiles of {len(logits):,} drawings, logarithmic"),
    ):
        figure.text(x, 0.93, title, color=INK, fontsize=11.5, weight="bold")
        figure.text(x, 0.875, note, color=MUTED, fontsize=9.5)
    figure.savefig(output)


def draw_weights(axes: Axes, logits: Tensor, names: list[str]) -> None:
    certainty = logits.softmax(dim=1).amax(dim=1)
    row = logits[(certainty - CERTAINTY).abs().argmin()][None]
    best = row[0].topk(NAMES).indices
    for gamma, colour in SHOWN.items():
        weight = smooth_weight(teacher=row, gamma=gamma, weight_temperature=1.0)[0]
        percent = (100 * weight / weight.sum())[best]
        axes.plot(percent.tolist(), range(NAMES), "o-", color=colour, linewidth=1.2, label=f"γ = {gamma:g}")
    axes.set(xscale="log", xlim=(0.04, 100))
    axes.xaxis.set_major_locator(FixedLocator([0.1, 1, 10, 100]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(NAMES), [names[index] for index in best.tolist()])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc=(-0.1, 1.0), ncols=3, handlelength=1.2)
    _style(axes)


def draw_counts(axes: Axes, quartiles: Tensor) -> None:
    gammas, (low, median, high) = GAMMAS.tolist(), (column.tolist() for column in quartiles.unbind(dim=1))
    axes.fill_between(gammas, low, high, color=SHOWN[0.5], alpha=0.18, linewidth=0)
    axes.plot(gammas, median, color=SHOWN[0.5], linewidth=2)
    for gamma, colour in SHOWN.items():
        at = gammas.index(gamma)
        axes.plot([gamma], [median[at]], "o", color=colour, markersize=7, zorder=3)
        place = {"xytext": (8, 6) if gamma < 1 else (0, 14), "ha": "left" if gamma < 1 else "right"}
        axes.annotate(f"{median[at]:,.0f}", (gamma, median[at]),
                      textcoords="offset points", color=INK, fontsize=9.5, **place)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([1, 10, 100, 1000]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlim=(-0.02, 1.03), ylim=(0.9, 3000))
    axes.set_xlabel("γ", color=INK)
    _style(axes)


def _style(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=9.5, labelcolor=INK)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="draw the picture into this PNG")
    options = parser.parse_args()
    logits, names = teacher_logits()
    quartiles = counted(logits)
    print("| gamma | names that count: median | quartiles |\n|---|---|---|")
    for gamma, (low, median, high) in zip(GAMMAS.tolist(), quartiles.tolist(), strict=True):
        print(f"| {gamma:g} | {median:,.1f} | {low:,.1f} to {high:,.1f} |")
    if options.output is not None:
        draw(logits, names, quartiles, options.output)


if __name__ == "__main__":
    main()
