"""E1: Transformers do better with LN than with BN."""

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import (
    FIVE_SEEDS,
    ONE_TUNING_SEED,
    TRANSFORMER_RATES,
    char_transformer,
    norm_arm,
    norm_arms,
    sst2_transformer,
)
from normlab.claims.measurements import Measurement, Tail, result

MARGIN = 0.02
REASON = (
    "0.02 nats: 0.03 bits per character, twice what LN gained over no norm in the LSTM of Laurent et al. 2017; in a "
    "sentence classifier a change of accuracy of about one in a hundred"
)
SHARED = norm_arms("none", "ln", "rms", "bn", "bn_step")
# In the decoder bn and bn_step pool the rows at one position, and see no later text. These pool the text so far, and
# the whole batch: the latter sees later text in training, which is not what BN itself costs.
POOLED = {"bn_prefix": norm_arm("bn", pool="prefix"), "bn_future": norm_arm("bn", pool="batch_time")}

CLAIM = Claim(
    id="e1_ln_better_in_transformer",
    sentence="Transformers do better with layer normalization than with batch normalization.",
    source="the note, Transformers; Shen et al. 2020, arXiv 2003.07845, section 3",
    kind="measured",
    settings={
        "char_transformer_pre": Setting(char_transformer("pre"), {**SHARED, **POOLED}, TRANSFORMER_RATES),
        "char_transformer_post": Setting(char_transformer("post"), SHARED, TRANSFORMER_RATES),
        # In the encoder bn pools all tokens of the batch, bn_step the rows at one position.
        "sst2_transformer_pre": Setting(sst2_transformer("pre"), SHARED, TRANSFORMER_RATES),
        "sst2_transformer_post": Setting(sst2_transformer("post"), SHARED, TRANSFORMER_RATES),
    },
    measurements=(
        Measurement("test_loss_nats", "nats", True, result("test_loss_nats", "unigram_test_loss_nats")),
        Measurement(
            "test_running_loss_nats",
            "nats",
            True,
            result("test_running_loss_nats", "test_loss_nats", "unigram_test_loss_nats"),
        ),
        # The same weights on a part of the training text in evaluation mode, and the last batches in training mode.
        Measurement("train_loss_nats", "nats", True, result("train_loss_nats")),
        Measurement("train_mode_loss_nats", "nats", True, Tail("train_loss_nats")),
    ),
    comparisons=tuple(
        Comparison("ln", control, "test_loss_nats", "better", MARGIN, REASON) for control in ("bn", "bn_step")
    ),
    tuning_seeds=ONE_TUNING_SEED,
    verdict_seeds=FIVE_SEEDS,
)
