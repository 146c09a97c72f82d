"""Which features differ between two conditions: moments by family, sign flips, the rule, inference over families."""

from jaxmech.contrast.flips import FlipTests, flip_tests, permutation_p, sign_flips
from jaxmech.contrast.moments import (
    Moments,
    Positions,
    batch_moments,
    correlation_with_g,
    empty_moments,
    merge_moments,
)  # fmt: skip
from jaxmech.contrast.selection import (
    Rule,
    control_size,
    draw_relabelings,
    expected_false,
    family_tests,
    feature_stats,
    select_features,
)  # fmt: skip

__all__ = [
    "FlipTests", "Moments", "Positions", "Rule", "batch_moments", "control_size", "correlation_with_g",
    "draw_relabelings", "empty_moments", "expected_false", "family_tests", "feature_stats", "flip_tests",
    "merge_moments", "permutation_p", "select_features", "sign_flips",
]  # fmt: skip
