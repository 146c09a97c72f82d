"""What a stage may reach: the configuration, the run folder, and the model and dictionaries, loaded when needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import pandas as pd

from jaxmech.behavior.altruism.altruism import altruism, games
from jaxmech.behavior.behavior import Behavior, Task
from jaxmech.behavior.prompts import digest
from jaxmech.behavior.read import FORMATS, is_own, read_behavior
from jaxmech.behavior.scoring import Encoded, encode_table
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.load import load_model
from jaxmech.sae.formats import load_saes
from jaxmech.sae.module import SAE
from jaxmech.sae.selection import Selection, select
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import RunFolder
from jaxmech.study.keys import Settings, with_ancestors
from jaxmech.study.organisms import with_organism


def open_behavior(c: StudyConfig, tokenizer: Any) -> Behavior:
    """The behaviour that a configuration names, its prompts checked with a tokenizer.

    Raises:
      ValueError: names the configuration's keys.
    """
    if c.behavior == "altruism":
        return altruism(c.bank, tokenizer, seed=c.seed)
    if not is_own(c.behavior):
        raise ValueError(
            f"behavior: expected altruism, a file of prompts ({', '.join(FORMATS)}) or module:function, "
            f"got {c.behavior!r}"
        )
    return read_behavior(c.behavior, words=c.words, rules_out=c.words.controls)


_FEWEST = 16
"""Features per layer that a selection has room for, at least."""


class Context:
    """One run's shared state. Everything here is derived, so that any stage can be the first to run after a restart.

    A stage gets its own view (`of`), which shares what was loaded and refuses what the stage's key does not hold.
    """

    def __init__(self, config: StudyConfig):
        self.config: Any = with_organism(config)
        self.folder = RunFolder(config.run_dir)
        self._made: dict[str, Any] = {}
        self._drawn: set[str] = set()

    def of(self, stage: str) -> Context:
        """The context as one stage may use it: its settings, the results that it reads."""
        view = copy.copy(self)
        view._drawn = set()
        view.config = Settings(self.config, stage)
        view.folder = RunFolder(self.folder.path, create=False, reads={s.name for s in with_ancestors(stage)} - {stage})
        return view

    def key(self, name: str) -> jax.Array:
        """The key of one draw, such as "steering.directions".

        Raises:
          ValueError: this stage already has a key of that name: two draws from one key are equal.
        """
        if name in self._drawn:
            raise ValueError(f"key {name}: already drawn from; give each draw its own name")
        self._drawn.add(name)
        return jax.random.fold_in(jax.random.key(self.config.seed), digest(name) % 2**32)

    def _once(self, name: str, make: Callable[..., Any], *settings: Any, **options: Any) -> Any:
        """What `make` returns, made once; every stage that asks for it reads the settings."""
        if name not in self._made:
            self._made[name] = make(*settings, **options)
        return self._made[name]

    @property
    def lm(self) -> LanguageModel:
        return self._once("lm", partial(load_model, dtype=self.config.dtype), self.config.model)

    @property
    def behavior(self) -> Behavior:
        return self._once("behavior", open_behavior, self.config, self.lm.tokenizer)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The other tasks, to which the behaviour may carry over."""
        chosen = self.config.transfer.tasks
        if self.config.behavior != "altruism":
            return {name: task for name, task in self.behavior.transfer.items() if chosen is None or name in chosen}
        make = partial(games, names=chosen, seed=self.config.seed)
        return self._once("tasks", make, self.config.transfer.families, self.lm.tokenizer)

    def prompts(self, split: str, *conditions: str) -> pd.DataFrame:
        """The behaviour's prompts of a split, of some conditions."""
        table = self.behavior.prompts
        return table[(table["split"] == split) & table["condition"].isin(conditions)].reset_index(drop=True)

    @property
    def saes(self) -> SAE:
        """The dictionaries given, at the layers asked for, or else those trained in this run."""
        path, layers = self.config.dictionaries.path, self.config.dictionaries.layers
        if path:
            return self._once("saes", partial(load_saes, layers=layers), path)
        return self._once("saes", load_saes, self.folder.stage("dictionaries") / "saes")

    @property
    def saes_again(self) -> SAE | None:
        """Those that this run trained from a second seed, if it did."""
        folder = self.folder.stage("dictionaries") / "saes_again"
        return self._once("saes_again", load_saes, folder) if folder.is_dir() else None

    @property
    def encoded(self) -> tuple[pd.DataFrame, Encoded]:
        """The prompts of the test families and their encoding, prefixes computed."""
        return self._once("encoded", _encode_test, self.lm, self.behavior)

    def rows(self, condition: str, *, per_family: int | None = None) -> np.ndarray:
        """Rows of `encoded` in a condition, in the order of families and pairs; `per_family` keeps the first few."""
        table = self.encoded[0]
        chosen = table[table["condition"] == condition].sort_values(["family", "pair"])
        if per_family is not None:
            chosen = chosen.groupby("family", sort=True).head(per_family)
        return chosen.index.to_numpy()

    def families(self, rows: np.ndarray) -> np.ndarray:
        return self.encoded[0].loc[rows, "family"].to_numpy()

    @property
    def selected(self) -> pd.DataFrame:
        """The selected features, one per row, strongest first."""
        self.folder.stage("contrast")  # refuses a stage that may not read it
        return self._once("selected", self.folder.table, "contrast", "selected")

    def selection(self, features: pd.DataFrame | None = None) -> Selection:
        """Selected features (all by default) as a `Selection`."""
        features = self.selected if features is None else features
        pairs = list(zip(features["layer"], features["feature"], strict=True))
        return select(pairs, self.lm.config.n_layers, self.room(pairs))

    def room(self, *sets: Sequence[tuple[int, int]]) -> int:
        """K of a `Selection` that each of these sets fits into: a power of two, so that most share their programs."""
        L = self.lm.config.n_layers
        counts = [np.bincount([layer for layer, _ in pairs], minlength=L).max() for pairs in sets if pairs]
        fullest = max(counts, default=1)
        return max(_FEWEST, 1 << (int(fullest) - 1).bit_length())

    def per_feature(self, selection: Selection, features: pd.DataFrame, column: str) -> np.ndarray:
        """A column of `features` laid out like the selection, [L,K]."""
        lookup = features.set_index(["layer", "feature"])[column].to_dict()
        index, valid = np.asarray(selection.index), np.asarray(selection.valid)
        out = np.zeros(index.shape, np.float32)
        for layer, k in zip(*np.nonzero(valid), strict=True):
            out[layer, k] = lookup[int(layer), int(index[layer, k])]
        return out


def _encode_test(lm: LanguageModel, behavior: Behavior) -> tuple[pd.DataFrame, Encoded]:
    table = behavior.prompts
    table = table[table["split"] == "test"].reset_index(drop=True)
    return table, encode_table(lm, table)
