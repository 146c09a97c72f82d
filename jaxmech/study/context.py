"""What a stage may reach: the configuration, the run folder, and the model and dictionaries, loaded when needed."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd

from jaxmech.behavior.dictator import SPLITS, Bank, BankConfig, build_bank
from jaxmech.behavior.scoring import Encoded, encode_table
from jaxmech.interventions import edits as ed
from jaxmech.io.settings import renamed
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.load import load_model
from jaxmech.sae.formats import load_saes
from jaxmech.sae.module import SAE
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import RunFolder

_BANK_KEYS = {split: f"{split}_families" for split in SPLITS} | {"stake": "stakes"}


def bank_config(c: StudyConfig) -> BankConfig:
    """What a study asks its prompt bank for.

    Raises:
      ValueError: names the configuration's keys.
    """
    with renamed(_BANK_KEYS):
        return BankConfig(
            selection=c.selection_families, development=c.development_families, test=c.test_families,
            pairs=c.pairs, examples=c.examples, stakes=tuple(c.stakes), seed=c.seed,
            stance_words=tuple(map(tuple, c.stance_words)), heldout_words=tuple(map(tuple, c.heldout_words)),
        )  # fmt: skip


class Context:
    """One run's shared state. Everything here is derived, so that any stage can be the first to run after a restart."""

    def __init__(self, config: StudyConfig):
        self.config = config
        self.folder = RunFolder(config.run_dir)

    @cached_property
    def lm(self) -> LanguageModel:
        return load_model(self.config.model, dtype=self.config.dtype)

    @cached_property
    def bank(self) -> Bank:
        return build_bank(bank_config(self.config), self.lm.tokenizer)

    @cached_property
    def saes(self) -> SAE:
        """The dictionaries given, at the layers asked for, or else those trained in this run."""
        if self.config.sae_path:
            return load_saes(self.config.sae_path, layers=self.config.sae_layers)
        return load_saes(self.folder.path / "saes")

    @cached_property
    def encoded(self) -> tuple[pd.DataFrame, Encoded]:
        """The prompts of the test families and their encoding, prefixes computed."""
        table = self.bank.prompts
        table = table[table["split"] == "test"].reset_index(drop=True)
        return table, encode_table(self.lm, table)

    def rows(self, condition: str, *, per_family: int | None = None) -> np.ndarray:
        """Rows of `encoded` in a condition, in the order of families and pairs; `per_family` keeps the first few."""
        table = self.encoded[0]
        chosen = table[table["condition"] == condition].sort_values(["family", "pair"])
        if per_family is not None:
            chosen = chosen.groupby("family", sort=True).head(per_family)
        return chosen.index.to_numpy()

    def families(self, rows: np.ndarray) -> np.ndarray:
        return self.encoded[0].loc[rows, "family"].to_numpy()

    @cached_property
    def selected(self) -> pd.DataFrame:
        """The selected features, one a row, strongest first."""
        return self.folder.table("contrast", "selected")

    def selection(self, features: pd.DataFrame | None = None) -> ed.Selection:
        """Selected features (all by default) as a `Selection`."""
        features = self.selected if features is None else features
        return ed.select(zip(features["layer"], features["feature"], strict=True), self.lm.config.n_layers)

    def per_feature(self, selection: ed.Selection, features: pd.DataFrame, column: str) -> np.ndarray:
        """A column of `features` laid out like the selection, [L,K]."""
        lookup = features.set_index(["layer", "feature"])[column].to_dict()
        index, valid = np.asarray(selection.index), np.asarray(selection.valid)
        out = np.zeros(index.shape, np.float32)
        for layer, k in zip(*np.nonzero(valid), strict=True):
            out[layer, k] = lookup[int(layer), int(index[layer, k])]
        return out
