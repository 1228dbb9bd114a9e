"""A4: what each norm pools over."""

from normlab.claims.base import Claim

CLAIM = Claim(
    id="a4_axes",
    sentence=(
        "BN pools over examples per feature; IN over the positions of one example per feature; LN over the features of "
        "one example; GN over groups of features; GN with one group is LN, with one group per feature IN."
    ),
    source="the note, comparison of normalizations; Wu & He 2018, arXiv 1803.08494, section 3",
    kind="exact",
    checks=(
        "bn_pools_examples_per_feature",
        "inorm_pools_positions_of_one_example",
        "ln_pools_features_of_one_example",
        "gn_pools_groups_of_features",
        "gn_with_one_group_is_ln",
        "gn_with_a_group_per_feature_is_inorm",
        "layers_differ",
    ),
)
