"""E5: LN lowers the variance of the model."""

import dataclasses
from collections.abc import Mapping

from normlab.claims.base import Claim, Comparison, Scale, Setting
from normlab.claims.families import (
    ONE_TUNING_SEED,
    TRANSFORMER_RATES,
    VERDICT_SEEDS,
    char_transformer,
    norm_arms,
    sst2_transformer,
)
from normlab.claims.measurements import Log2, Measurement, across_seeds, result
from normlab.config import RunConfig

MARGIN = 0.01
REASON = "half of the 0.02 nats by which losses are told apart in e1: of the two parts of a loss variance is one"
ARMS = norm_arms("none", "ln", "bn")
# Nats by which the predictions of one seed's run are off the common prediction of all seeds of its arm (Heskes 1998):
# their mean is the variance part of the loss. It depends on how many runs are split: arms have as many, but for those
# that diverge. Values of seeds are a little alike, having the common prediction in common, so that intervals are about
# a tenth too narrow.
VARIANCE = across_seeds("bias_variance", "variance_nats", VERDICT_SEEDS, examples=2**15)


def on_samples(base: Mapping[Scale, RunConfig]) -> dict[Scale, RunConfig]:
    """Each seed trains on a bootstrap sample of the training split, beside other weights and another order."""
    return {
        scale: dataclasses.replace(run, data=dataclasses.replace(run.data, resample=True))
        for scale, run in base.items()
    }


CLAIM = Claim(
    id="e5_lower_model_variance",
    sentence="Layer normalization lowers the variance of the model.",
    source="the note, Transformers; the split of the loss is that of Heskes 1998, Neural Computation 10:1425",
    kind="measured",
    settings={
        # Runs of e1, but for one seed.
        "sst2_transformer_pre": Setting(sst2_transformer("pre"), ARMS, TRANSFORMER_RATES),
        "sst2_transformer_pre_samples": Setting(on_samples(sst2_transformer("pre")), ARMS, TRANSFORMER_RATES),
        "char_transformer_pre_samples": Setting(on_samples(char_transformer("pre")), ARMS, TRANSFORMER_RATES),
    },
    measurements=(
        Measurement("variance_nats", "nats", True, VARIANCE),
        # A ratio says more where all variances are small. Of the loss its spread over seeds is of interest; and a model
        # that has learned little varies little, too.
        Measurement("log2_variance", "doublings", True, Log2(VARIANCE)),
        Measurement("test_loss_nats", "nats", True, result("test_loss_nats", "unigram_test_loss_nats")),
    ),
    comparisons=tuple(
        Comparison("ln", control, "variance_nats", "better", MARGIN, REASON) for control in ("bn", "none")
    ),
    tuning_seeds=ONE_TUNING_SEED,
    verdict_seeds=VERDICT_SEEDS,
)
