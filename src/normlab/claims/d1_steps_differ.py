"""D1: the time steps of a recurrent net have different statistics."""

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import CHAR_LSTM, LSTM_RATES, TUNING_SEEDS, VERDICT_SEEDS, norm_arms
from normlab.claims.measurements import Measurement, probe

SITES = ("hidden_to_hidden", "cell")
REASON = "a tenth of the standard deviation within a step, the distance at which the probe calls a step settled"


def spread(statistic: str, site: str) -> Measurement:
    """Standard deviation over time steps of a population statistic, in standard deviations within a step."""
    name = f"step_{statistic}_spread.{site}"
    return Measurement(name, "sigma", False, probe("step_statistics", name))


CLAIM = Claim(
    id="d1_steps_differ",
    sentence=(
        "The time steps of a recurrent network have different statistics, so that batch normalization must keep "
        "separate ones."
    ),
    source="the note, recurrent networks; Cooijmans et al. 2016, arXiv 1603.09025, section 3",
    kind="measured",
    settings={"char_lstm": Setting(CHAR_LSTM, norm_arms("none", "ln", "bn_step"), LSTM_RATES)},
    measurements=(
        *(spread(statistic, site) for statistic in ("mean", "std") for site in SITES),
        *(
            Measurement(f"settling_step.{site}", "time steps", False, probe("step_statistics", f"settling_step.{site}"))
            for site in SITES
        ),
        # The first step alone: h_0 and c_0 are the same in all rows.
        *(
            Measurement(
                f"first_step_mean_distance.{site}",
                "sigma",
                False,
                probe("step_statistics", f"first_step_mean_distance.{site}"),
            )
            for site in SITES
        ),
        Measurement("noise", "sigma", False, probe("step_statistics", "noise")),
    ),
    # Before normalization, in the net that keeps separate statistics and in the one that has no norm; what the sample
    # alone makes of equal steps ("noise") is far below the margin.
    comparisons=tuple(
        Comparison(arm, 0.0, f"step_mean_spread.{site}", "better", 0.1, REASON)
        for arm in ("bn_step", "none")
        for site in SITES
    ),
    tuning_seeds=TUNING_SEEDS,
    verdict_seeds=VERDICT_SEEDS,
)
