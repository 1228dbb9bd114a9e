"""E3: LN puts embeddings on a sphere, with mean 0 and variance 1."""

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import FIVE_SEEDS, ONE_TUNING_SEED, TRANSFORMER_RATES, char_transformer, norm_arms
from normlab.claims.measurements import Measurement, probe

MARGIN = 0.1
REASON = "a tenth of the radius: closer to the sphere than this counts as on it"
ARMS = norm_arms("none", "ln", "bn")
SITES = ("attention", "ffn")


def after(quantity: str, unit: str, site: str) -> Measurement:
    """Of what a norm gives on, gain and bias included, mean over layers."""
    return Measurement(f"{quantity}.{site}", unit, True, probe("sphere", f"{quantity}_after.{site}"))


CLAIM = Claim(
    id="e3_sphere",
    sentence="Layer normalization puts embeddings on a sphere with mean 0 and variance 1.",
    source="the note, Transformers; Brody et al. 2023, arXiv 2305.02582",
    kind="both",
    checks=("ln_puts_tokens_on_a_sphere",),
    settings={
        "char_transformer_pre": Setting(char_transformer("pre"), ARMS, TRANSFORMER_RATES),
        "char_transformer_post": Setting(char_transformer("post"), ARMS, TRANSFORMER_RATES),
    },
    measurements=(
        *(after("sphere_distance", "radii", site) for site in SITES),
        *(after("token_variance", "1", site) for site in SITES),
        *(after("token_mean", "1", site) for site in SITES),
        *(after("anisotropy", "cosine", site) for site in SITES),
    ),
    # Exact before gain and bias; this is after them.
    comparisons=tuple(Comparison("ln", 0.0, f"sphere_distance.{site}", "same", MARGIN, REASON) for site in SITES),
    tuning_seeds=ONE_TUNING_SEED,
    verdict_seeds=FIVE_SEEDS,
)
