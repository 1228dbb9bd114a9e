"""D5: LN accelerates the training of LSTMs."""

import math

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import CHAR_LSTM, LSTM_RATES, SST2_LSTM, TUNING_SEEDS, VERDICT_SEEDS, norm_arms
from normlab.claims.measurements import Log2, Measurement, Reach

MARGIN = math.log2(1.1)
REASON = "a tenth: less than two rates of the sweep differ by"
ARMS = norm_arms("none", "ln", "bn_step")

CLAIM = Claim(
    id="d5_ln_speeds_up_lstm",
    sentence="Layer normalization accelerates the training of LSTMs.",
    source="the note, recurrent networks; Ba, Kiros & Hinton 2016, arXiv 1607.06450, section 6",
    kind="measured",
    settings={
        "char_lstm": Setting(CHAR_LSTM, ARMS, LSTM_RATES),
        "sst2_lstm": Setting(SST2_LSTM, ARMS, LSTM_RATES),
    },
    # Until the best validation loss of the LSTM without a norm with the same seed. That one runs on torch.nn.LSTM, the
    # others on this project's fused recurrence: each record names its own.
    measurements=(
        Measurement("log2_steps_to_reach", "log2 steps", True, Log2(Reach("step", of="none"))),
        Measurement("log2_seconds_to_reach", "log2 seconds", True, Log2(Reach("seconds", of="none"))),
        # Those that never get there count with the end of their training: too little.
        Measurement("reached", "share of runs", False, Reach("reached", of="none")),
    ),
    comparisons=tuple(
        Comparison("ln", "none", f"log2_{axis}_to_reach", "better", MARGIN, REASON) for axis in ("steps", "seconds")
    ),
    tuning_seeds=TUNING_SEEDS,
    verdict_seeds=VERDICT_SEEDS,
)
