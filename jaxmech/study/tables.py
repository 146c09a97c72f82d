"""The columns of every table that a stage writes: checked when it is saved, relied on when it is read."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from jaxmech.behavior.behavior import COLUMNS, EXCLUDED

_FEATURE = ("layer", "feature")
_EDGES = ("mass", "p_zero", "p_half", "p_all")
_FEATURES = (
    *_FEATURE, "live", "dz", "strength", "t", "p", "q", "d_z", "sign", "sign_words", "t_words", "min_f", "flipped_sign",
    "permutation_p", "p_max", "auroc", "fires_plus", "fires_minus", "density", "control", "control_d_z",
    "correlation_plus", "correlation_minus", "stability", "selected", "d_z_after", "in_budget",
)  # fmt: skip

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "behavior": {
        "prompts": (*COLUMNS, "g", *_EDGES, "logprobs"),
        "effects": (
            "contrast", "families", "shift_pp", "low_pp", "high_pp", "p", "d_z", "mass", "size_pp", "detectable_pp",
            "excess_pp", "excess_low_pp", "excess_high_pp", "excess_detectable_pp",
        ),
        "factors": ("factor", "level", "families", "shift_pp", "low_pp", "high_pp"),
        "distributions": ("condition", "share", "probability"),
        "exclusions": EXCLUDED,
    },
    "dictionaries": {"training": ("step", "layer", "fvu", "l0", "dead")},
    "fidelity": {
        "layers": (
            "layer", "tokens", "fvu", "cosine_centred", "norm_ratio", "l0", "dead", "dense", "recovered_zero",
            "recovered_mean", "fvu_decision", "l0_decision",
        ),
        "density": ("layer", "low", "high", "features"),
        "check": ("layer", "tokens", "l0_declared", "l0", "fvu", "cosine_centred", "likely_cause"),
    },
    "contrast": {
        "features": _FEATURES,
        "selected": _FEATURES,
        "cards": (*_FEATURE, "promoted", "suppressed", "top_tokens", "contexts", "activations", "trigger_ids"),
        "criteria": ("criterion", "alone", "remaining"),
        "budgets": ("share", "features", "smallest_t"),
    },
    "dual_process": {
        "classes": (
            *_FEATURE, "class", "index", "silent_share", "demand", "demand_low", "demand_high", "instruction",
            "instruction_low", "instruction_high", "anchor", "arithmetic_slope", "arithmetic_slope_low",
            "arithmetic_slope_high", "lexical",
        ),
        "sensitivity": ("cut", "s1", "s2", "mixed", "neither", "silent"),
        "items": (
            "id", "item", "family", "generator", "arm", "condition", "prefix", "query", "answers", "score", "level",
            "p_correct", "log_mass", "tokens", "log_likelihood",
        ),
    },
    "patching": {
        "bars": ("direction", "name", "kind", "recovered", "low", "high", "change_pp"),
        "null": ("direction", "null", "recovered"),
        "singles": (*_FEATURE, "change_pp", "low_pp", "high_pp", "p", "p_holm", "passenger"),
    },
    "attribution": {
        "attribution": (*_FEATURE, "selected", "live", "attribution", "integrated"),
        "audit": (*_FEATURE, "selected", "live", "attribution", "integrated", "group", "patched"),
    },
    "proximity": {
        "sets": (
            "set", "features", "total_pp", "total_low", "total_high", "direct_pp", "indirect_pp", "pi", "pi_low",
            "pi_high",
        ),
        "features": (*_FEATURE, "class", "total", "direct", "proximity"),
    },
    "steering": {
        "dose": ("alpha", "g", "g_low", "g_high", *_EDGES, "perplexity", "kl", "accuracy", "cost", "usable"),
        "comparators": ("name", "kind", "slope_pp"),
        "ways": ("kind", "name", "layers", "change_pp", "low_pp", "high_pp", "mass", "development_pp", "chosen"),
    },
    "transfer": {
        "tasks": (
            "task", "label", "kind", "expected_sign", "home", "families", "baseline", "slope_pp", "low_pp", "high_pp",
            "p", "p_random", "p_holm", "null_sd_pp", "detectable_pp", "mass", "human", "stance_pp", "stance_low_pp",
            "stance_high_pp",
        ),
        "curves": ("task", "alpha", "score", "mass"),
        "prompts": ("task", "family", "prefix", "query"),
    },
}  # fmt: skip


def missing_columns(stage: str, name: str, frame: pd.DataFrame) -> list[str]:
    """The declared columns of a table that it lacks."""
    return [column for column in TABLES[stage][name] if column not in frame]


def check_tables(stage: str, tables: Mapping[str, pd.DataFrame]) -> None:
    """Refuses a table that is not declared, or that lacks a declared column.

    Raises:
      ValueError: names them.
    """
    for name, frame in tables.items():
        if name not in TABLES.get(stage, {}):
            raise ValueError(f"stage {stage}: table {name} is not declared in jaxmech.study.tables")
        if missing := missing_columns(stage, name, frame):
            raise ValueError(f"stage {stage}: table {name} lacks the declared column {', '.join(missing)}")
