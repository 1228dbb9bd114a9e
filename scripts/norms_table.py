"""Write docs/norms.md and its pictures from what the norms declare and from built instances: make norms

Nothing here is typed per norm: a new file in src/normlab/norms/ is in the tables and pictures at the next call.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon
from PIL import Image

from normlab.config import InputError, NormOptions, available_norms
from normlab.norms import build_norm, norm_options
from normlab.norms.base import Norm, Shares

DOCS = Path(__file__).resolve().parent.parent / "docs"
README = DOCS.parent / "README.md"
PAGE, EVERY_NORM, EVERY_SET = DOCS / "norms.md", DOCS / "norms.png", DOCS / "sharing.png"

POOLS = get_args(get_args(get_type_hints(NormOptions)["pool"])[0])
DIM, MAX_STEPS = 40, 100  # of the norms built for the tables; unlike each other and any constant, so shapes are told

B, T, F = 4, 5, 8  # the block of the pictures
BLOCK_OPTIONS = {"groups": 4}  # where the default does not fit so few features


class Variant(NamedTuple):
    """A norm with one of its pools; `pool` is empty where it takes none."""

    name: str
    pool: str

    def build(self, dim: int, **more: int) -> Norm:
        """An instance, with those of the options `more` that the norm takes."""
        options: dict[str, Any] = {key: value for key, value in more.items() if key in norm_options(self.name)}
        if self.pool:
            options["pool"] = self.pool
        return build_norm(self.name, dim, **options)


def variants() -> list[Variant]:
    """Every norm, with every pool that it takes; the control first, the pools of a norm from few entries to many."""
    found: list[Variant] = []
    for name in available_norms():
        if "pool" not in norm_options(name):
            found.append(Variant(name, ""))
            continue
        for pool in POOLS:
            try:
                build_norm(name, DIM, pool=pool)
            except InputError:
                continue
            found.append(Variant(name, pool))
    return sorted(found, key=lambda v: (not v.build(DIM).identity, v.name, extent(v.build(DIM).shares)))


# Which entries share a statistic.

TIMES = {"step": "this time step", "prefix": "up to this time step", "sequence": "all time steps"}
FEATURES = {
    "one": "one feature",
    "window": "neighbouring features",
    "group": "its group of features",
    "all": "all features",
}


def extent(shares: Shares) -> tuple[int, int, int]:
    """Sorts from few entries to many."""
    return int(shares.batch), list(TIMES).index(shares.time), list(FEATURES).index(shares.features)


def words(shares: Shares) -> str:
    """`shares` in words."""
    if shares == Shares():
        return "the entry by itself"
    return f"{'all rows' if shares.batch else 'this row'}, {TIMES[shares.time]}, {FEATURES[shares.features]}"


def shared_entries(norm: Norm, rows: int, columns: int, dim: int, entry: tuple[int, int, int]) -> np.ndarray:
    """Boolean B x T x F: the entries that share a training statistic of `entry` (b, t, f), itself included."""
    b, t, f = entry
    time, feature = np.arange(columns), np.arange(dim)
    in_B = np.full(rows, True) if norm.shares.batch else np.arange(rows) == b
    in_T = {"step": time == t, "prefix": time <= t, "sequence": time >= 0}[norm.shares.time]
    match norm.shares.features:
        case "one":
            in_F = feature == f
        case "window":
            window = int(getattr(norm, "window", 0))
            in_F = (feature >= f - window // 2) & (feature <= f + (window - 1) // 2)
        case "group":
            width = dim // int(getattr(norm, "groups", 0) or getattr(norm, "group_scaling", 0))
            in_F = feature // width == f // width
        case "all":
            in_F = feature >= 0
    return in_B[:, None, None] & in_T[None, :, None] & in_F[None, None, :]


# The page.

HEAD = """# The norms

Made by `make norms` from what the files in `src/normlab/norms/` declare and from norms built by them; do not edit.
Options that are not named have their defaults. x is B x T x F: B rows of the batch, T time steps, F features.

![One block of B x T x F entries per norm and pool; the entries that share a statistic are coloured](norms.png)

The dark entry is normalized in training with a statistic of the coloured ones; those hatched in orange come later in
the text.

## Formula and pooled entries

Pooled are the entries that share a training statistic. In evaluation a norm computes the same, or stored values stand
in (last table). A model gets the default pool unless asked: a language model (LM) must not see later text, a
classifier may.
"""

PROPERTIES = """## Properties

- *scale*: norm(a x) = norm(x) in training, a > 0, up to eps
- *shift*: norm(x + a) = norm(x) in training, a the same for all entries
- *rows apart*: in training no row of the batch sees another
- *causal*: no output sees a later time step
- *gradient*: backward is the derivative of forward in training
- *batch 1*: can train on a batch of one row
"""

KEPT = """## Parameters, stored values, options, paper

Parameters and stored values (buffers) are given with their shapes; one without a shape is a single number. *Gain* is
the initial gain in a recurrent cell (0.1 is published for `bn_step`; other batch norms follow it). Options are flags,
`--model.norm_options.<name>`; {common} are of the site.
"""


def page() -> str:
    """The text of docs/norms.md."""
    all_variants = variants()
    return "\n".join(
        [
            HEAD,
            *table(("norm", "pool", "formula", "pooled entries"), (computes(v) for v in all_variants)),
            "",
            PROPERTIES,
            *table(
                ("norm", "pool", "scale", "shift", "rows apart", "causal in training", "causal in evaluation",
                 "gradient", "batch 1", "what it leaks"),
                (properties(v) for v in all_variants),
            ),
            "",
            KEPT.format(common=listed(common_options())),
            *table(
                ("norm", "parameters", "stored values", "gain", "options", "paper"),
                (keeps(v) for v in one_per_norm(all_variants)),
            ),
            "",
        ]
    )  # fmt: skip


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table; a bar within a cell is escaped."""
    cells = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]


def computes(variant: Variant) -> tuple[str, ...]:
    """A row of the first table."""
    norm = variant.build(DIM)
    pool = f"`{variant.pool}`" if variant.pool else "–"
    defaults = [whose for whose, causal in (("LM", True), ("classifier", False)) if is_default(variant, causal)]
    if variant.pool and defaults:
        pool += f" (default{'' if len(defaults) == 2 else ', ' + defaults[0]})"
    return f"`{variant.name}`", pool, f"`{norm.formula}`", words(norm.shares)


def is_default(variant: Variant, causal: bool) -> bool:
    """Whether this pool is the one a model that is `causal`, or is not, gets unasked."""
    return build_norm(variant.name, DIM, causal=causal).shares == variant.build(DIM).shares


def properties(variant: Variant) -> tuple[str, ...]:
    """A row of the second table."""
    norm = variant.build(DIM)
    declared = (
        norm.scale_invariant,
        norm.shift_invariant,
        norm.batch_independent,
        norm.causal,
        norm.causal_in_evaluation,
        norm.exact_gradient,
        norm.works_at_batch_1,
    )
    pool = f"`{variant.pool}`" if variant.pool else "–"
    return f"`{variant.name}`", pool, *("✓" if holds else "–" for holds in declared), norm.leaks or "–"


def keeps(variant: Variant) -> tuple[str, ...]:
    """A row of the third table."""
    norm = variant.build(DIM, max_steps=MAX_STEPS)
    options = [option for option in norm_options(variant.name) if option not in common_options()]
    return (
        f"`{variant.name}`",
        shapes(norm.named_parameters()),
        shapes(norm.named_buffers()),
        f"{norm.recurrent_gain:g}" if norm.weight is not None else "–",
        listed(options) or "–",
        norm.paper or "–",
    )


def shapes(tensors: Iterable[tuple[str, object]]) -> str:
    """Names with their shapes, in terms of F and of the option `max_steps`."""
    found = []
    for name, tensor in tensors:
        sizes = [size_in_words(size) for size in getattr(tensor, "shape", ())]
        found.append(f"`{name}` {' x '.join(sizes)}".rstrip())
    return ", ".join(found) or "–"


def size_in_words(size: int) -> str:
    if size == DIM:
        return "F"
    if size >= MAX_STEPS:
        return "`max_steps`" if size == MAX_STEPS else f"(`max_steps` + {size - MAX_STEPS})"
    return str(size)


def common_options() -> list[str]:
    """Options that every norm takes."""
    return sorted(set.intersection(*(set(norm_options(name)) for name in available_norms())))


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def one_per_norm(found: list[Variant]) -> list[Variant]:
    """The first variant of each norm, and those that keep something else."""
    return list({keeps(variant): variant for variant in reversed(found)}.values())[::-1]


# The pictures, in the manner of figure 2 of Wu & He 2018, arXiv 1803.08494.


class Panel(NamedTuple):
    """One block: the marked entry, the entries that share its statistic, and what is said about it."""

    names: tuple[str, ...]
    pool: str
    norm: Norm
    entry: tuple[int, int, int]
    shared: np.ndarray

    @property
    def caption(self) -> list[str]:
        """What is pooled, in two lines."""
        head, comma, last = words(self.norm.shares).rpartition(", ")
        return [head + ",", last] if comma else [last]

    @property
    def evaluation(self) -> str:
        """Where evaluation takes its statistics from."""
        if self.norm.per_step:
            return "evaluation: stored, per time step"
        if self.norm.needs_statistics:
            return "evaluation: stored values"
        return "" if self.norm.shares == Shares() else "evaluation: the same"

    @property
    def warning(self) -> str:
        """Of norms that are not causal."""
        if self.norm.causal:
            return ""
        return "training sees the future" if self.norm.causal_in_evaluation else "sees the future"


def panels() -> list[Panel]:
    """One per norm and pool, from few shared entries to many."""
    found = [panel(variant) for variant in variants()]
    return sorted(found, key=lambda p: extent(p.norm.shares))


def panel(variant: Variant) -> Panel:
    """The marked entry is in the first row, where the block's front, top and right side show all that it shares."""
    norm = variant.build(F, **BLOCK_OPTIONS)
    sets = {f: shared_entries(norm, B, T, F, (0, T // 2, f)) for f in range(F)}
    whole = max(shared.sum() for shared in sets.values())
    top = next(f for f, shared in sets.items() if shared.sum() == whole)  # a window is cut short at the edge
    return Panel((variant.name,), variant.pool, norm, (0, T // 2, top), sets[top])


def panels_by_set() -> list[Panel]:
    """One per set of entries and kind of stored values: norms that agree in both are in one."""
    together: dict[tuple[object, ...], Panel] = {}
    for one in panels():
        key = (one.norm.shares, one.pool, one.evaluation)
        if one.norm.shares == Shares() or not one.pool:
            key = (one.norm.shares, one.evaluation)
        names = together[key].names if key in together else ()
        together[key] = one._replace(names=names + one.names)
    return list(together.values())


WHITE, TEXT, FAINT = "#ffffff", "#1b1f24", "#59636e"
BLUE, ORANGE = "#0b3c6f", "#a84300"  # told apart by colour-blind readers too
COLOURS = {"other": WHITE, "shared": "#86bfec", "future": "#ffc38a", "marked": BLUE}
LINES = {"other": "#a9b1ba", "shared": "#3d7fb5", "future": ORANGE, "marked": "#6f9fd0"}
SHADES = {"front": 1.0, "top": 0.93, "side": 0.85}
HATCH = "////"  # so that the future is told from the past without colours as well
HEIGHT, DEPTH = 0.56, (0.52, 0.36)  # of an entry, its width being 1; how far each row is set back
WIDE, HIGH, MARGIN, KEY = 2.25, 2.70, 0.08, 0.58  # inches: a panel, the edge of the picture, the key
UNIT, FLOOR, LEADING = 0.215, 0.87, 0.15  # inches: an entry, what is below the block, lines of text


class Face(NamedTuple):
    """A visible face of an entry."""

    entry: tuple[int, int, int]
    side: str
    kind: str
    corners: list[tuple[float, float]]


def faces(shared: np.ndarray, marked: tuple[int, int, int]) -> list[Face]:
    """What is seen of the block: time to the right, features down, rows to the back."""
    rows, columns, dim = shared.shape

    def corner(b: float, t: float, f: float) -> tuple[float, float]:
        return t + b * DEPTH[0], (dim - f) * HEIGHT + b * DEPTH[1]

    def face(side: str, b: int, t: int, f: int, steps: list[tuple[int, int, int]]) -> Face:
        entry = (b, t, f)
        kind = (
            "marked" if entry == marked else "other" if not shared[entry] else "future" if t > marked[1] else "shared"
        )
        return Face(entry, side, kind, [corner(b + db, t + dt, f + df) for db, dt, df in steps])

    front = [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1)]
    top = [(0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 0)]
    side = [(0, 1, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1)]
    return [
        *(face("front", 0, t, f, front) for t in range(columns) for f in range(dim)),
        *(face("top", b, t, 0, top) for b in range(rows) for t in range(columns)),
        *(face("side", b, columns - 1, f, side) for b in range(rows) for f in range(dim)),
    ]


def picture(found: list[Panel], columns: int = 4) -> Figure:
    """The panels, with a key below."""
    rows = -(-len(found) // columns)
    width, height = columns * WIDE + 2 * MARGIN, rows * HIGH + KEY + 2 * MARGIN
    figure = Figure(figsize=(width, height), facecolor=WHITE)
    for index, one in enumerate(found):
        left = MARGIN + index % columns * WIDE
        bottom = height - MARGIN - (index // columns + 1) * HIGH
        axes = figure.add_axes((left / width, bottom / height, WIDE / width, HIGH / height))
        axes.set_axis_off()
        axes.set(xlim=(0, WIDE), ylim=(0, HIGH))
        draw_panel(axes, one)
    draw_key(figure)
    return figure


def save(found: list[Panel], path: Path) -> None:
    """The picture of the panels as a PNG file, the same whatever matplotlib is set to."""
    drawn = BytesIO()
    with matplotlib.style.context(["default", {"hatch.linewidth": 0.8}]):
        picture(found).savefig(drawn, dpi=180)
    # Few flat colours: a palette is a quarter of the size. It also leaves matplotlib's version out of the file.
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_panel(axes: Axes, one: Panel) -> None:
    middle, left = WIDE / 2, (WIDE - (T + B * DEPTH[0]) * UNIT) / 2
    # What is coloured comes last: its edges lie over those of its neighbours.
    for seen in sorted(faces(one.shared, one.entry), key=lambda face: list(COLOURS).index(face.kind)):
        corners = [(left + x * UNIT, FLOOR + y * UNIT) for x, y in seen.corners]
        look = {"edgecolor": LINES[seen.kind], "linewidth": 0.6, "joinstyle": "round"}
        axes.add_patch(Polygon(corners, facecolor=shaded(COLOURS[seen.kind], SHADES[seen.side]), **look))
        if seen.kind == "future":
            axes.add_patch(Polygon(corners, fill=False, edgecolor=ORANGE, linewidth=0, hatch=HATCH))
    draw_directions(axes, left)

    above = FLOOR + (F * HEIGHT + B * DEPTH[1]) * UNIT + 0.13
    if one.pool:
        axes.text(middle, above, f"pool={one.pool}", ha="center", va="center", fontsize=8.5, color=TEXT)
        above += 0.17
    names = textwrap.fill("  ".join(one.names), 24)
    axes.text(middle, above - 0.08, names, ha="center", va="bottom", fontsize=10.5, fontweight="bold", color=TEXT)

    lines = [(line, TEXT, "normal") for line in one.caption]
    lines += [(one.evaluation, FAINT, "normal")] if one.evaluation else []
    lines += [(one.warning, ORANGE, "bold")] if one.warning else []
    for number, (line, colour, weight) in enumerate(lines):
        below = FLOOR - 0.27 - number * LEADING
        axes.text(middle, below, line, ha="center", va="center", fontsize=8, color=colour, fontweight=weight)


def shaded(colour: str, shade: float) -> tuple[float, ...]:
    """`colour` darkened to the part `shade` of its light."""
    return tuple(part * shade for part in to_rgb(colour))


def draw_directions(axes: Axes, left: float) -> None:
    """Arrows along time, features and rows."""
    right, high, gap = left + T * UNIT, FLOOR + F * HEIGHT * UNIT, 0.07
    arrows = {
        "T": ((left, FLOOR - gap), (2.0, 0.0)),
        "F": ((left - gap, high), (0.0, -3 * HEIGHT)),
        "B": ((right + gap, FLOOR - 0.04), (2 * DEPTH[0], 2 * DEPTH[1])),
    }
    style = {"arrowstyle": "-|>,head_length=0.22,head_width=0.11", "color": FAINT, "linewidth": 0.7}
    for letter, ((x, y), (dx, dy)) in arrows.items():
        end = (x + dx * UNIT, y + dy * UNIT)
        axes.annotate("", end, (x, y), arrowprops={**style, "shrinkA": 0, "shrinkB": 0})
        beyond = 0.08 / (dx * dx + dy * dy) ** 0.5
        at = (end[0] + dx * beyond, end[1] + dy * beyond)
        axes.text(*at, letter, ha="center", va="center", fontsize=8, color=FAINT)


def draw_key(figure: Figure) -> None:
    said = {
        "marked": "an entry",
        "shared": "shares a training statistic with it",
        "future": "shares one, and comes later in the text",
    }
    boxes = [
        Patch(
            facecolor=COLOURS[kind], edgecolor=LINES[kind], linewidth=0.6, hatch=HATCH * (kind == "future"), label=text
        )
        for kind, text in said.items()
    ]
    height = figure.get_figheight()
    place = {"loc": "center", "bbox_to_anchor": (0.5, (MARGIN + 0.40) / height)}
    figure.legend(handles=boxes, ncols=3, frameon=False, fontsize=9, labelcolor=TEXT, handlelength=1.2, **place)
    letters = "B: rows of the batch     T: time steps     F: features"
    figure.text(0.5, (MARGIN + 0.14) / height, letters, ha="center", va="center", fontsize=9, color=FAINT)


def named_in(readme: str) -> str:
    """The README with all norms in its row of `--norm`, the control first."""
    names = sorted(available_norms(), key=lambda name: (not build_norm(name, DIM).identity, name))
    return re.sub(r"(`--norm` \| `)[^`]+`", rf"\g<1>{' '.join(names)}`", readme)


def main() -> int:
    DOCS.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(named_in(README.read_text(encoding="utf-8")), encoding="utf-8")
    save(panels(), EVERY_NORM)
    save(panels_by_set(), EVERY_SET)
    for path in (PAGE, EVERY_NORM, EVERY_SET):
        print(f"wrote {path.relative_to(DOCS.parent)}, {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
