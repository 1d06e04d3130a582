"""The look that all plots of this folder share: quiet axes, direct labels, colours that the colour-blind tell apart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, so no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

# Okabe and Ito's palette, ordered so that neighbours differ in lightness as well.
PALETTE = ("#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
OTHERS, OURS = PALETTE[:2]  # ours are blue in every picture, and its title says so
INK = "#333333"
GRID = "#E4E4E4"

STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same picture
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.solid_capstyle": "round",
    "figure.dpi": 75,
}


def new_figure(widths: Sequence[float], height: float) -> tuple[Figure, list[Axes]]:
    """One row of panels with the given widths, in inches, under the shared style."""
    plt.rcParams.update(STYLE)
    figure, grid = plt.subplots(
        1, len(widths), figsize=(sum(widths), height), width_ratios=widths, layout="constrained", squeeze=False
    )
    figure.get_layout_engine().set(wspace=0.06)
    return figure, list(grid[0])


def label_line_ends(axes: Axes, lines: Sequence[tuple[str, Sequence[float], Sequence[float], str]]) -> None:
    """Write the text of each (text, xs, ys, colour) right of its last finite point, moved up where texts would overlap.

    Call it last: it lays the figure out and measures distances with the axis limits as they are.
    """
    axes.figure.draw_without_rendering()
    line_height = 1.25 * plt.rcParams["font.size"] / 72 * axes.figure.dpi  # pixels
    ends = []
    for text, xs, ys, color in lines:
        finite = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        if finite:
            ends.append((axes.transData.transform(finite[-1])[1], text, finite[-1], color))
    lowest_free = -math.inf
    for pixel_y, text, end, color in sorted(ends):
        shifted = max(pixel_y, lowest_free)
        lowest_free = shifted + line_height
        offset = (6, (shifted - pixel_y) * 72 / axes.figure.dpi)  # points
        axes.annotate(
            text, end, xytext=offset, textcoords="offset points", color=color, va="center", annotation_clip=False
        )


def bars(axes: Axes, rows: Sequence[tuple[str, float | None, bool]], longest: float, digits: int = 2) -> None:
    """A bar for each (name, value, whether it is ours), the first on top, its value beside it. Longer ones are cut."""
    for y, (_, value, ours) in enumerate(rows):
        if value is None:
            axes.annotate("not measured", (0, y), xytext=(3, 0), textcoords="offset points", va="center", color=OTHERS)
            continue
        axes.barh(y, min(value, longest), height=0.7, color=OURS if ours else OTHERS)
        text = f"{value:.{digits}f}" if value <= longest else f"{value:,.0f}, cut"
        axes.annotate(text, (min(value, longest), y), xytext=(3, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 1.22 * longest), ylim=(len(rows) - 0.4, -0.6))


def palette(colors: NDArray[Any], counts: NDArray[Any], size: int) -> NDArray[Any]:
    """So many colours that stand for these: by Lloyd's algorithm, from those that lie farthest from what is chosen. A
    colour weighs by the root of its count, so that a line does not drown in the background, which stays as it is."""
    colors, weights = colors.astype(float), counts**0.5
    chosen = colors[[counts.argmax()]]
    while len(chosen) < min(size, len(colors)):
        distances = ((colors[:, None] - chosen) ** 2).sum(2).min(1)
        chosen = np.vstack([chosen, colors[(distances * weights).argmax()]])
    for _ in range(30):
        nearest = ((colors[:, None] - chosen) ** 2).sum(2).argmin(1)
        for i in range(1, len(chosen)):
            if (nearest == i).any():
                chosen[i] = np.average(colors[nearest == i], axis=0, weights=weights[nearest == i])
    return chosen.round()


def save(figure: Figure, path: Path, colors: int = 20) -> None:
    """Write the figure, creating its folder, in so many colours: that takes a fifth of the bytes. A file that shows the
    same is left alone, since another version of the library may pack it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    image = np.asarray(Image.open(drawn).convert("RGB"))
    seen, place, counts = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    chosen = palette(seen, counts, colors)
    nearest = ((seen[:, None] - chosen) ** 2).sum(2).argmin(1)
    shown = chosen.astype(np.uint8)[nearest[place.ravel()]].reshape(image.shape)
    if path.exists() and np.array_equal(np.asarray(Image.open(path).convert("RGB")), shown):
        return
    # WebP without loss takes three quarters of a PNG's bytes. Options of one format mean nothing to the other.
    Image.fromarray(shown).save(path, optimize=True, lossless=True, quality=100, method=6)
