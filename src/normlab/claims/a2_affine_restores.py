"""A2: gain and bias can give BN's input back, and let a network keep what plain normalization destroys."""

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.families import MLP_RATES, MLP_VERDICT_SEEDS, TUNING_SEEDS, char_mlp, norm_arm
from normlab.claims.measurements import Measurement, result

MARGIN = 0.01
REASON = (
    "what BN itself gained over no norm on this text in published runs is 0.010 nats (Cooijmans et al. 2016) to 0.015 "
    "(Laurent et al. 2017): gain and bias that are worth less are not what makes BN work"
)

# Sigmoid is the example of Ioffe & Szegedy 2015, section 3: plain normalization holds its inputs in the linear part.
# The bias of the linear map stands in both arms, and BN takes it out again in both.
ARMS = {"bn": norm_arm("bn"), "bn_plain": norm_arm("bn", affine=False)}

CLAIM = Claim(
    id="a2_affine_restores",
    sentence=(
        "With gain = the data's standard deviation and bias = its mean, BN gives its input back; so gain and bias let "
        "a network keep the features that plain normalization destroys."
    ),
    source="the note, gamma and beta; Ioffe & Szegedy 2015, arXiv 1502.03167, section 3",
    kind="both",
    checks=("affine_restores_the_input", "bn_without_affine_loses_mean_and_scale"),
    settings={
        "char_mlp_sigmoid": Setting(char_mlp("sigmoid"), ARMS, MLP_RATES),
        "char_mlp_relu": Setting(char_mlp("relu"), ARMS, MLP_RATES),
    },
    measurements=(Measurement("test_loss_nats", "nats", True, result("test_loss_nats", "unigram_test_loss_nats")),),
    comparisons=(Comparison("bn_plain", "bn", "test_loss_nats", "worse", MARGIN, REASON),),
    tuning_seeds=TUNING_SEEDS,
    verdict_seeds=MLP_VERDICT_SEEDS,
)
