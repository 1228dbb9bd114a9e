"""D4: LN is the answer to what recurrent nets make of batch normalization."""

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import CHAR_LSTM, LSTM_RATES, TUNING_SEEDS, VERDICT_SEEDS, norm_arms
from normlab.claims.measurements import Measurement, Tail, probe, result

MARGIN = 0.01
REASON = "what LN gained over no norm in Laurent et al. 2017: 1.455 to 1.439 bits per character, 0.011 nats"

CLAIM = Claim(
    id="d4_ln_solves_it",
    sentence="Layer normalization has none of batch normalization's problems with sequences, and does better.",
    source="the note, recurrent networks; Ba, Kiros & Hinton 2016, arXiv 1607.06450",
    kind="measured",
    settings={"char_lstm": Setting(CHAR_LSTM, norm_arms("none", "ln", "bn_step"), LSTM_RATES)},
    measurements=(
        Measurement("test_loss_nats", "nats", True, result("test_loss_nats", "unigram_test_loss_nats")),
        Measurement("train_mode_loss_nats", "nats", True, Tail("train_loss_nats")),
        Measurement(
            "test_running_loss_nats",
            "nats",
            True,
            result("test_running_loss_nats", "test_loss_nats", "unigram_test_loss_nats"),
        ),
        # How fast d loss_T / d h_t fades with the lag T - t: nearer 0 is better.
        Measurement("log10_gradient_decay_per_step", "decades", False, probe("gradient_flow", "log10_decay_per_step")),
    ),
    comparisons=tuple(
        Comparison("ln", control, measurement, "better", MARGIN, REASON)
        for control in ("bn_step", "none")
        for measurement in ("test_loss_nats", "train_mode_loss_nats")
    ),
    tuning_seeds=TUNING_SEEDS,
    verdict_seeds=VERDICT_SEEDS,
)
