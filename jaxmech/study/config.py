"""A study's configuration: one flat YAML file, checked against one dataclass; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.io.settings import load_settings, renamed
from jaxmech.sae.training.config import SAETrainConfig

_AT_LEAST_ONE = (
    "batch", "pairs", "development_families", "sae_steps", "sae_batch", "sae_epochs", "random_sets", "audit_features",
    "attribution_steps", "proximity_features", "text_check", "arithmetic_items", "items_per_generator", "permutations",
    "relabelings", "half_splits", "game_families",
)  # fmt: skip
_SAE_KEYS = {"d_sae": "sae_features", "sparsity": "sae_sparsity"} | {k: f"sae_{k}" for k in ("kind", "steps", "lr")}
_LARGEST_SEED = 2**31 - 8  # stages add small numbers to it, and JAX, NumPy and pandas all have to take it


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Every parameter of a study. `configs/quickstart.yaml` comments each group."""

    # model and run
    model: str
    run_dir: str
    dtype: str = "float32"
    seed: int = 0
    batch: int = 16

    # behaviour
    selection_families: int = 32
    development_families: int = 8
    test_families: int = 8
    pairs: int = 2
    examples: int = 8
    stakes: list[int] = dataclasses.field(default_factory=lambda: [10, 20])
    stance_words: list[list[str]] = dataclasses.field(
        default_factory=lambda: [["generous", "selfish"], ["compassionate", "ruthless"]]
    )
    heldout_words: list[list[str]] = dataclasses.field(default_factory=lambda: [["charitable", "greedy"]])
    samples: int = 8
    gate_shift_pp: float = 10.0
    gate_placebo_ratio: float = 0.34

    # dictionaries
    sae_path: str | None = None
    sae_layers: list[int] | None = None
    sae_features: int = 4096
    sae_kind: str = "batchtopk"
    sae_sparsity: float = 32  # k, or the penalty's coefficient: see jaxmech.sae.training.config
    sae_steps: int = 1000
    sae_batch: int = 512
    sae_epochs: int = 2
    sae_buffer: int = 65536
    sae_lr: float = 3e-3
    text_file: str | None = None
    text_dataset: str | None = None
    text_count: int = 128
    text_length: int = 128

    # contrast: see jaxmech.contrast.selection.Rule
    rule_q: float = 0.01
    rule_d_z: float = 0.8
    rule_sign: float = 0.9
    rule_auroc: float = 0.85
    rule_fires: float = 0.25
    rule_density: float = 0.2
    rule_placebo_ratio: float = 3.0
    rule_half_splits: float = 0.8
    half_splits: int = 20
    permutations: int = 1000
    relabelings: int = 50
    selection: str = "rule"  # or "budget"
    budget_share: float = 0.00024

    # dual process
    items_per_generator: int = 16
    index_cut: float = 0.3

    # patching, attribution, proximity
    random_sets: int = 199
    audit_features: int = 200
    attribution_steps: int = 10
    proximity_features: int = 32

    # steering and games
    alphas: list[float] = dataclasses.field(default_factory=lambda: [-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0])
    random_directions: int = 100
    text_check: int = 8
    arithmetic_items: int = 33
    game_families: int = 6
    game_alphas: list[float] = dataclasses.field(default_factory=lambda: [-1.0, 0.0, 1.0])
    game_directions: int = 20

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.type))
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ValueError(f"seed: expected a whole number from 0 to {_LARGEST_SEED}, got {self.seed}")
        for name in ("model", "run_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a name, got ''")
        layers = self.sae_layers
        if layers is not None and (not layers or len(set(layers)) < len(layers) or min(layers) < 0):
            raise ValueError(f"sae_layers: expected distinct layers from 0 on, at least one, or null, got {layers}")
        if self.text_file and self.text_dataset:
            raise ValueError(
                f"text_file, text_dataset: expected one of them, got {self.text_file} and {self.text_dataset}"
            )
        for name in ("text_count", "text_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2, got {getattr(self, name)}")
        if self.selection not in ("rule", "budget"):
            raise ValueError(f"selection: expected one of rule, budget, got {self.selection!r}")
        for name in ("alphas", "game_alphas"):
            values = list(getattr(self, name))
            if values != sorted(set(values)) or 0.0 not in values or len(values) < 3:
                raise ValueError(f"{name}: expected at least three ascending numbers with 0 among them, got {values}")
        for name in ("stance_words", "heldout_words"):
            pairs = getattr(self, name)
            if not pairs or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
                raise ValueError(f"{name}: expected pairs [generous word, selfish word], got {pairs}")
        for name in ("selection_families", "test_families"):
            if getattr(self, name) < 6:
                raise ValueError(
                    f"{name}: families are the unit of inference, at least 6 are needed, got {getattr(self, name)}"
                )
        for name in ("random_directions", "game_directions"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: a null needs at least 2 directions, got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and field.name != "seed" and value < 0:
                raise ValueError(f"{field.name}: expected a number that is not negative, got {value}")
        if twice := sorted({stake for stake in self.stakes if self.stakes.count(stake) > 1}):
            raise ValueError(f"stakes: {twice[0]} stands twice; families get the stakes evenly, list each once")
        if not 0 < self.budget_share <= 1:
            raise ValueError(f"budget_share: expected a share above 0, up to 1, got {self.budget_share}")
        if not self.index_cut < 1:
            raise ValueError(f"index_cut: expected less than 1, the index's largest value, got {self.index_cut}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if 1.0 not in self.game_alphas:
            raise ValueError(f"game_alphas: 1 must be among them, to compare directions at, got {self.game_alphas}")
        if self.sae_path is None:
            with renamed(_SAE_KEYS):
                self.training  # noqa: B018 - refused now, not once the stages before have run

    @property
    def training(self) -> SAETrainConfig:
        """How the study's own dictionaries are trained."""
        return SAETrainConfig(
            d_sae=self.sae_features, sparsity=self.sae_sparsity, kind=self.sae_kind, steps=self.sae_steps,
            lr=self.sae_lr, checkpoint_every=max(1, self.sae_steps // 8),
        )  # fmt: skip


def _typed(name: str, value: Any, kind: str) -> Any:
    """A value as plain data of a field's type, which configuration files are held to by OmegaConf and Python is here.

    Raises:
      ValueError: it is of another type, or not finite.
    """
    if kind.endswith(" | None"):
        return None if value is None else _typed(name, value, kind.removesuffix(" | None"))
    if kind.startswith("list["):
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        return [_typed(name, entry, kind.removeprefix("list[").removesuffix("]")) for entry in value]
    accepted, said = {
        "str": (str | os.PathLike, "a string"),
        "int": (numbers.Integral, "a whole number"),
        "float": (numbers.Real, "a number"),
    }[kind]
    if isinstance(value, bool | np.bool_) or not isinstance(value, accepted):
        raise ValueError(f"{name}: expected {said}, got {value!r}")
    if kind == "float" and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if kind == "str" else value


def load_config(
    path: str | Path, overrides: Sequence[str] = (), others: Mapping[str, type] | None = None
) -> StudyConfig:
    """Reads a study's YAML file and applies `key=value` overrides; takes and raises what `load_settings` does."""
    return load_settings(StudyConfig, path, overrides, others)
