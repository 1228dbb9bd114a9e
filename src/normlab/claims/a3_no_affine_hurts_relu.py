"""A3: BN without gain and bias makes ReLU units half active, and loses what they learned."""

from normlab.claims.a2_affine_restores import ARMS, MARGIN, REASON
from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import MLP_RATES, MLP_VERDICT_SEEDS, TUNING_SEEDS, char_mlp, norm_arm
from normlab.claims.measurements import Measurement, probe, result

CLAIM = Claim(
    id="a3_no_affine_hurts_relu",
    sentence=(
        "Without gain and bias, ReLU inputs that were mostly positive are forced to about half active, and what was "
        "learned is lost."
    ),
    source="the note, gamma and beta; Ioffe & Szegedy 2015, arXiv 1502.03167, section 3",
    kind="both",
    checks=("mostly_positive_before_bn", "half_active_after_bn"),
    limits=("skewed_inputs_are_not_half_active",),
    settings={"char_mlp_relu": Setting(char_mlp("relu"), {"none": norm_arm("none"), **ARMS}, MLP_RATES)},
    measurements=(
        Measurement("test_loss_nats", "nats", True, result("test_loss_nats", "unigram_test_loss_nats")),
        # Of what enters the ReLU, over both layers. With arm none that is what the premise speaks of: the inputs of a
        # net that was never normalized.
        Measurement("active_share", "share", False, probe("activations", "active.hidden")),
    ),
    # The same runs as in a2, where they are one of two settings.
    comparisons=(Comparison("bn_plain", "bn", "test_loss_nats", "worse", MARGIN, REASON),),
    tuning_seeds=TUNING_SEEDS,
    verdict_seeds=MLP_VERDICT_SEEDS,
)
