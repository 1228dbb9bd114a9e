"""D3: sequences longer than any seen in training have no statistics."""

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import CHAR_LSTM, LSTM_RATES, TUNING_SEEDS, VERDICT_SEEDS, norm_arm
from normlab.claims.measurements import Difference, Measurement, probe

MARGIN = 0.015
REASON = "as in d2_shared_statistics_fail: all that BN gained over no norm in published runs, 0.010 to 0.015 nats"
MULTIPLES = (2, 5, 10)


def growth(multiple: int) -> Measurement:
    """Loss of the same characters after that many training lengths of text, the state carried, less that after one."""
    longer, trained = (probe("by_length", f"loss_nats_at_{k}x") for k in (multiple, 1))
    return Measurement(f"loss_growth_nats.{multiple}x", "nats", True, Difference(longer, trained))


CLAIM = Claim(
    id="d3_unknown_length",
    sentence="A recurrent network's depth is not fixed: sequences longer than any seen in training have no statistics.",
    source="the note, recurrent networks; Ba, Kiros & Hinton 2016, arXiv 1607.06450, section 1",
    kind="measured",
    settings={
        "char_lstm": Setting(
            CHAR_LSTM,
            {
                "none": norm_arm("none"),
                "ln": norm_arm("ln"),
                # Later steps take the statistics of the last step of training, ...
                "bn_step": norm_arm("bn_step"),
                # ... or those that all steps after the twentieth share, ...
                "bn_step_20": norm_arm("bn_step", max_steps=20),
                # ... or those of all steps.
                "bn": norm_arm("bn"),
            },
            LSTM_RATES,
        )
    },
    measurements=tuple(growth(multiple) for multiple in MULTIPLES),
    # More text may help any net; what longer texts do to BN is what they do beyond that.
    comparisons=tuple(
        Comparison("bn_step", control, "loss_growth_nats.10x", "worse", MARGIN, REASON) for control in ("ln", "none")
    ),
    tuning_seeds=TUNING_SEEDS,
    verdict_seeds=VERDICT_SEEDS,
)
