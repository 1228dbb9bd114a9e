"""A1: BN gives mean 0 and variance 1 over the batch."""

from normlab.claims.base import Claim

CLAIM = Claim(
    id="a1_bn_whitens_batch",
    sentence=(
        "Batch normalization gives every feature mean 0 and variance 1 over the batch; it whitens approximately: "
        "features stay as correlated as they were."
    ),
    source="the note, batch normalization; Ioffe & Szegedy 2015, arXiv 1502.03167, section 3",
    kind="exact",
    checks=("bn_mean_and_variance", "bn_keeps_correlations", "bn_output_is_correlated"),
)
