"""D6: statistics per time step are troublesome to compute and to store."""

import math

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import CHAR_LSTM, LSTM_RATES, TUNING_SEEDS, VERDICT_SEEDS, norm_arms
from normlab.claims.measurements import Log2, Measurement, probe

MARGIN = math.log2(1.1)
REASON = "a tenth: less would change nobody's choice of a norm"

CLAIM = Claim(
    id="d6_bn_step_is_costly",
    sentence="Computing and storing statistics per time step is troublesome.",
    source="the note, recurrent networks; Ba, Kiros & Hinton 2016, arXiv 1607.06450, section 1",
    kind="measured",
    settings={"char_lstm": Setting(CHAR_LSTM, norm_arms("none", "ln", "bn_step"), LSTM_RATES)},
    # "fused": the fastest recurrence that has the norm (torch.nn.LSTM without one); "eager": the plain loop, for all.
    measurements=(
        Measurement("log2_seconds_per_step_fused", "log2 seconds", True, Log2(probe("cost", "seconds_per_step"))),
        Measurement(
            "log2_seconds_per_step_eager", "log2 seconds", True, Log2(probe("cost", "seconds_per_step_reference"))
        ),
        Measurement("log2_peak_bytes", "log2 bytes", True, Log2(probe("cost", "peak_bytes"))),
        Measurement("buffer_bytes", "bytes", True, probe("cost", "buffer_bytes")),
    ),
    comparisons=tuple(
        Comparison("bn_step", control, measurement, "worse", MARGIN, REASON)
        for measurement in ("log2_seconds_per_step_fused", "log2_seconds_per_step_eager", "log2_peak_bytes")
        for control in ("ln", "none")
    ),
    tuning_seeds=TUNING_SEEDS,
    verdict_seeds=VERDICT_SEEDS,
)
