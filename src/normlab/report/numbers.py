"""Numbers as text: as many digits as the margin, or the spread, makes sense of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normlab.claims.figure_tables import mean_and_std
from normlab.stats.verdicts import Verdict

__all__ = ["as_measured", "decimals", "fixed", "interval", "mean_std", "plain", "probability", "signed"]

MINUS, NO_BREAK = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
MOST_DIGITS = 6


def decimals(scale: float) -> int:
    """Places after the point that show two digits of a number as large as `scale`."""
    if not (math.isfinite(scale) and scale > 0):
        return 3
    return min(12, max(0, 1 - math.floor(math.log10(scale))))


def fixed(value: float, places: int) -> str:
    """With so many places, and a minus sign that no line breaks at."""
    return f"{value:.{places}f}".replace("-", MINUS)


def signed(value: float, places: int) -> str:
    """As `fixed`, with a plus sign too."""
    return f"{value:+.{places}f}".replace("-", MINUS)


def plain(value: float) -> str:
    """To four digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{MINUS * (value < 0)}{abs(value):.4g}"


def as_measured(verdict: Verdict, lower_is_better: bool) -> tuple[float, float, float]:
    """Arm minus control: mean and both ends of the 95 % interval. In a verdict, positive is better."""
    if lower_is_better:
        return -verdict.effect, -verdict.high, -verdict.low
    return verdict.effect, verdict.low, verdict.high


def interval(verdict: Verdict, lower_is_better: bool) -> str:
    """Such as "-0.031 [-0.040, -0.022] nats"; no line breaks in it."""
    mean, low, high = as_measured(verdict, lower_is_better)
    places = effect_places(verdict)
    return f"{signed(mean, places)} [{signed(low, places)}, {signed(high, places)}] {verdict.unit}".replace(
        " ", NO_BREAK
    )


def effect_places(verdict: Verdict) -> int:
    """Two digits of the margin; one more where the interval is narrower than a tenth of it."""
    places = decimals(verdict.margin)
    return places + 1 if verdict.high - verdict.low < verdict.margin / 5 else places


def mean_std(values: Sequence[float]) -> str:
    """Such as "1.234 ± 0.012" of one value or more; the standard deviation has n - 1."""
    mean, std = mean_and_std(values)
    if len(values) == 1:
        return plain(mean)
    if not (math.isfinite(mean) and math.isfinite(std)) or max(abs(mean), std) >= 1e6:
        return f"{plain(mean)} ± {plain(std)}"
    places = min(decimals(std), max(0, MOST_DIGITS - 2 + decimals(abs(mean)))) if std > 0 else decimals(abs(mean) / 100)
    return f"{fixed(mean, places)} ± {fixed(std, places)}"


def probability(p: float) -> str:
    """Such as "0.012", or "<0.0001"."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"
