"""Figures as SVG: one style, one colour per norm; text stays text and takes the colour of what is around it.

The only module here that needs matplotlib.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from normlab.claims.base import Claim, Scale
from normlab.claims.figure_tables import mean_and_std
from normlab.config import available_norms
from normlab.machine.terminal import printable
from normlab.report.judged import Found
from normlab.report.numbers import as_measured
from normlab.report.sections import CurvePlot, EffectPlot, LinePlot, Picture
from normlab.stats.divergence import divergence_decides

__all__ = ["alone", "draw", "norm_colours"]

# Of middling lightness: 3 to 1 or more against white and against the dark page.
COLOURS = {
    "none": "#7b838c",
    "ln": "#2f7fd6",
    "rms": "#0f98a8",
    "bn": "#d9483b",
    "bn_step": "#c07600",
    "brn": "#c2479f",
    "gn": "#2e9a4b",
    "inorm": "#84860f",
}
SPARE = ("#8a63d2", "#a5673f", "#d6517d", "#5a8a8a", "#6f8f3a", "#b07090", "#4f76a8", "#9a7b4f")
"""For the other norms, in the order of their names; a new one may take over the colour of one after it."""
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
"""Of arms that have the same norm."""

INK = "#0a0b0c"
"""Stands for the colour of the text around; matplotlib has no name for it."""

WIDTH, HEIGHT = 3.9, 2.1  # inches; of the picture, and of the axes in it. A phone shows it near its own size.
LEFT, RIGHT, ABOVE, BELOW = 0.66, 0.14, 0.12, 0.5
LEGEND_ROW = 0.2
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.unicode_minus": True,
}


def norm_colours() -> dict[str, str]:
    """A colour for every norm there is."""
    others = [norm for norm in available_norms() if norm not in COLOURS]
    return COLOURS | {norm: SPARE[number % len(SPARE)] for number, norm in enumerate(others)}


def draw(picture: Picture) -> str:
    """The figure as an SVG element to stand in a page; the same numbers give the same text."""
    plot = picture.plot
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE, "svg.hashsalt": picture.name}
    with matplotlib.rc_context(style):
        if isinstance(plot, EffectPlot):
            figure = _effects(plot)
        elif isinstance(plot, CurvePlot):
            figure = _curves(plot)
        else:
            figure = _lines(plot)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), picture.caption)


def alone(svg: str) -> str:
    """An SVG of `draw` as a file of its own: dark on white, whatever shows it."""
    opening, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening} color="#1b1f24">\n{WHITE}{rest}\n'


WHITE = '<rect width="100%" height="100%" fill="#ffffff"/>'


def _inline(svg: str, caption: str) -> str:
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Names of groups would stand twice in a page with two figures; what is referred to has names of its own.
    svg = re.sub(r'<g id="[\w.]+_\d+"', "<g", svg)
    svg = re.sub(r"font: ([^;'\"]*?px) [^;\"]*", r"font: \1 sans-serif", svg)
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(printable(caption))}" ', 1)


def _axes(legend_rows: int, height: float = HEIGHT, left: float = LEFT) -> tuple[Figure, Axes]:
    below = BELOW + legend_rows * LEGEND_ROW
    whole = ABOVE + height + below
    figure = Figure(figsize=(WIDTH, whole))
    axes = figure.add_axes((left / WIDTH, below / whole, 1 - (left + RIGHT) / WIDTH, height / whole))
    return figure, axes


def _looks(claim: Claim, scale: Scale, setting: str) -> dict[str, tuple[str, object]]:
    """Colour and dashes of each arm of a setting."""
    colours, seen = norm_colours(), dict[str, int]()
    looks: dict[str, tuple[str, object]] = {}
    for arm in claim.settings[setting].arms:
        norm = claim.settings[setting].config(scale, arm).model.norm
        looks[arm] = colours.get(norm, COLOURS["none"]), DASHES[seen.get(norm, 0) % len(DASHES)]
        seen[norm] = seen.get(norm, 0) + 1
    return looks


Line = tuple[list[float], list[float], list[float]]
"""x, mean and standard deviation."""


def _bands(lines: Mapping[str, Line], looks: Mapping[str, tuple[str, object]], x_label: str, y_label: str) -> Figure:
    longest = max(map(len, lines), default=0)
    rows = math.ceil(len(lines) / (3 if longest < 11 else 2 if longest < 20 else 1))
    columns = math.ceil(len(lines) / max(1, rows))
    figure, axes = _axes(rows)
    for arm, (x, mean, std) in lines.items():
        colour, dashes = looks[arm]
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        marker = "o" if len(x) < 2 else ""
        axes.plot(x, mean, color=colour, linestyle=dashes, marker=marker, label=_shortened(arm, LETTERS - 14))  # pyright: ignore[reportArgumentType]
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.legend(loc="lower center", ncols=columns, frameon=False, handlelength=2.2, columnspacing=1.2, borderpad=0)
    return figure


def _curves(plot: CurvePlot) -> Figure:
    part = plot.part
    rows = [row for row in part.curves if (row.setting, row.metric) == (plot.setting, plot.metric)]
    looks = _looks(part.claim, part.scale, plot.setting)
    lines: dict[str, Line] = {}
    for arm in looks:
        of_arm = [row for row in rows if row.arm == arm]
        steps = sorted({row.step for row in of_arm})
        at = [[row for row in of_arm if row.step == step] for step in steps]
        spread = [mean_and_std([row.value for row in here]) for here in at]
        if plot.axis == "seconds":
            x = [mean_and_std([row.seconds for row in here])[0] for here in at]
        else:
            x = [float(step) for step in steps]
        if x:
            lines[arm] = x, [mean for mean, _ in spread], [std for _, std in spread]
    labels = {"step": "optimizer steps", "seconds": "seconds of training"}
    return _bands(lines, looks, labels[plot.axis], _words(plot.metric))


def _lines(plot: LinePlot) -> Figure:
    part, figure = plot.part, plot.figure
    wanted = (plot.setting, figure.probe, figure.kind, plot.by, figure.x, plot.quantity)
    rows = [row for row in part.probes if (row.setting, row.probe, row.kind, row.by, row.axis, row.quantity) == wanted]
    looks = _looks(part.claim, part.scale, plot.setting)
    lines: dict[str, Line] = {}
    for arm in looks:
        of_arm = [row for row in rows if row.arm == arm]
        if of_arm:
            lines[arm] = [row.x for row in of_arm], [row.mean for row in of_arm], [row.std for row in of_arm]
    drawn = _bands(lines, looks, _words(figure.x), _words(plot.quantity))
    if figure.log:
        drawn.axes[0].set_yscale("log")
    return drawn


ROW = 0.68
LETTERS = 54  # that the picture is wide


def _effects(plot: EffectPlot) -> Figure:
    part = plot.part
    found = [each for each in part.found if each.verdict.unit == plot.unit]
    figure, axes = _axes(0, ROW * len(found), left=RIGHT)
    for row, each in enumerate(found):
        _effect(axes, len(found) - 1 - row, each, _looks(part.claim, part.scale, each.setting)[each.comparison.arm][0])
    axes.set_ylim(-0.25, len(found) - 0.25)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    better = {"lower" if each.measurement.lower_is_better else "higher" for each in found}
    axes.set_xlabel(f"arm minus control, {plot.unit} ({' or '.join(sorted(better))} is better)")
    axes.margins(x=0.04)
    return figure


def _effect(axes: Axes, height: int, found: Found, colour: str) -> None:
    verdict = found.verdict
    mean, low, high = as_measured(verdict, found.measurement.lower_is_better)
    band = Rectangle((-verdict.margin, height - 0.15), 2 * verdict.margin, 0.3, linewidth=0, facecolor=INK, alpha=0.17)
    axes.add_patch(band)
    axes.plot([0, 0], [height - 0.17, height + 0.17], color=INK, linewidth=1.2)
    # Both ends are data, so that the axis shows all of the margin.
    axes.plot([-verdict.margin, verdict.margin], [height, height], alpha=0)
    axes.plot([low, high], [height, height], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot([mean], [height], "o", color=colour, markersize=6)
    at = axes.get_yaxis_transform()
    comparison = found.comparison
    verdicts = f"{comparison.arm} against {comparison.control}: {verdict.kind}" + (
        ", by diverged runs" if divergence_decides(*verdict.divergence) else ""
    )
    where = f"{comparison.measurement} in {found.setting}"
    axes.text(0, height + 0.58, _shortened(verdicts), transform=at, va="center", fontsize=8.5, fontweight="bold")
    axes.text(0, height + 0.33, _shortened(where), transform=at, va="center", fontsize=8.5)


def _shortened(text: str, letters: int = LETTERS) -> str:
    text = printable(text)  # SVG has no control characters
    text = text if len(text) <= letters else f"{text[: letters - 1]}…"
    return text.replace("$", r"\$")  # else what stands between two is read as mathematics


def _words(name: str) -> str:
    """valid_loss_nats: valid loss, nats"""
    words = name.split("_")
    unit = words[-1] if words[-1] in ("nats", "seconds", "bits", "mib", "sigma") and len(words) > 1 else ""
    return " ".join(words[:-1]) + f", {unit}" if unit else " ".join(words)
