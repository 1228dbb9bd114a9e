"""E4: LN constrains how far the senses of one word spread."""

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import FIVE_SEEDS, ONE_TUNING_SEED, WORD_TRANSFORMER, norm_arms
from normlab.claims.measurements import Measurement, Probed, probe, result

MARGIN = 0.05
REASON = "a twentieth of the distance between random tokens of the same model"


def senses(key: str) -> Probed:
    """On pairs of WiC, none of which is trained on, so that its largest part may serve."""
    return probe("senses", key, split="train", pairs=3000)


CLAIM = Claim(
    id="e4_polysemy",
    sentence="Layer normalization constrains how far the senses of one word spread.",
    source="the note, Transformers; senses: Word-in-Context (Pilehvar & Camacho-Collados 2019, arXiv 1808.09121)",
    kind="measured",
    settings={"word_transformer": Setting(WORD_TRANSFORMER, norm_arms("none", "ln", "bn"), (1e-3, 3e-3, 1e-2))},
    # At what enters the head ("output"), in mean distances between random tokens of the same model.
    measurements=(
        Measurement("distance_different.output", "scale", True, senses("distance_different.output")),
        Measurement("distance_same.output", "scale", True, senses("distance_same.output")),
        Measurement("auc.output", "chance", False, senses("auc.output")),
        Measurement("distance_different.attention", "scale", True, senses("distance_different.attention")),
        Measurement("test_loss_nats", "nats", True, result("test_loss_nats", "unigram_test_loss_nats")),
    ),
    # "Better" is smaller here: the senses of a word lie closer together.
    comparisons=tuple(
        Comparison("ln", control, "distance_different.output", "better", MARGIN, REASON) for control in ("none", "bn")
    ),
    tuning_seeds=ONE_TUNING_SEED,
    verdict_seeds=FIVE_SEEDS,
)
