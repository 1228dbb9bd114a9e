"""A5: LN sees one example, BN the batch."""

from normlab.claims.base import Claim

CLAIM = Claim(
    id="a5_ln_sees_one_example",
    sentence="LN's output for an example does not depend on the other examples in the batch; BN's does in training.",
    source="the note, layer normalization; Ba, Kiros & Hinton 2016, arXiv 1607.06450, section 3",
    kind="exact",
    checks=("ln_ignores_companions", "bn_depends_on_companions", "bn_in_evaluation_ignores_companions"),
)
