"""Which features differ between two conditions: moments by family, sign flips, the rule, inference over families."""

from jaxmech.contrast.flips import permutation_p, sign_flips
from jaxmech.contrast.moments import Moments, batch_moments, correlation_with_g, empty_moments, merge_moments
from jaxmech.contrast.selection import Rule, expected_false, feature_stats, select_features

__all__ = [
    "Moments", "Rule", "batch_moments", "correlation_with_g", "empty_moments", "expected_false", "feature_stats",
    "merge_moments", "permutation_p", "select_features", "sign_flips",
]  # fmt: skip
