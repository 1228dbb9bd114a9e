"""E2: BN fails in Transformers because its batch statistics vary and differ between training and inference."""

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import (
    FIVE_SEEDS,
    ONE_TUNING_SEED,
    TRANSFORMER_RATES,
    char_transformer,
    norm_arms,
    sst2_transformer,
)
from normlab.claims.measurements import Difference, Measurement, probe, result

MARGIN = 0.02
REASON = "0.02 nats, as in e1_ln_better_in_transformer, whose gap this is to explain"
ARMS = norm_arms("ln", "bn", "bn_step")
STORED, BATCH = (probe("discrepancy", f"loss_nats_{which}") for which in ("stored", "batch"))
RUNNING, REESTIMATED = result("test_running_loss_nats", "test_loss_nats"), result("test_loss_nats")

CLAIM = Claim(
    id="e2_why_bn_fails",
    sentence=(
        "Batch normalization fails in Transformers because its batch statistics vary on text and differ between "
        "training and inference. (The note's own words: it suits image data.)"
    ),
    source="the note, Transformers; Shen et al. 2020, arXiv 2003.07845, section 4; Wang et al. 2022, arXiv 2210.05153",
    kind="measured",
    settings={
        "char_transformer_pre": Setting(char_transformer("pre"), ARMS, TRANSFORMER_RATES),
        "char_transformer_post": Setting(char_transformer("post"), ARMS, TRANSFORMER_RATES),
        "sst2_transformer_pre": Setting(sst2_transformer("pre"), ARMS, TRANSFORMER_RATES),
        "sst2_transformer_post": Setting(sst2_transformer("post"), ARMS, TRANSFORMER_RATES),
    },
    measurements=(
        Measurement("stored_minus_batch_loss_nats", "nats", True, Difference(STORED, BATCH)),
        Measurement("batch_statistics_loss_nats", "nats", True, BATCH),
        Measurement("running_minus_reestimated_loss_nats", "nats", True, Difference(RUNNING, REESTIMATED)),
        Measurement("discrepancy_mean", "sigma", True, probe("discrepancy", "discrepancy_mean")),
        Measurement("discrepancy_std", "sigma", True, probe("discrepancy", "discrepancy_std")),
    ),
    # Both must hold: stored statistics cost loss against the batch's own, and with the batch's own BN is as good as LN
    # (or better: the batch's own tell of other rows, in the encoder of later text too).
    comparisons=(
        Comparison("bn", 0.0, "stored_minus_batch_loss_nats", "worse", MARGIN, REASON),
        Comparison("bn", "ln", "batch_statistics_loss_nats", "not worse", MARGIN, REASON),
    ),
    tuning_seeds=ONE_TUNING_SEED,
    verdict_seeds=FIVE_SEEDS,
)
