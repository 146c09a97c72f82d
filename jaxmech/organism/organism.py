"""The whole organism: a model, its dictionaries and what is true of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pandas as pd

from jaxmech.behavior.altruism.altruism import games
from jaxmech.behavior.altruism.dictator import BankConfig, build_bank
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.saved import save_model
from jaxmech.organism.dictionary import make_dictionaries
from jaxmech.organism.wiring import Wiring, model_config, wire
from jaxmech.organism.words import make_tokenizer, only_in, pieces, word_codes
from jaxmech.sae.formats import save_saes
from jaxmech.sae.module import SAE

NAME = "organism"


@dataclasses.dataclass(frozen=True, eq=False)
class Organism:
    """lm, saes: as any other model and its dictionaries. features: name -> index, the same at every layer. wiring: what
    is true of it."""

    lm: LanguageModel
    saes: SAE
    features: Mapping[str, int]
    wiring: Wiring


def build_organism(
    wiring: Wiring | None = None,
    bank: BankConfig | None = None,
    *,
    wordings: int = 6,
    texts: Iterable[str] = (),
    hidden: Collection[str] = (),
) -> Organism:
    """An organism that reads the prompts of a bank and of the other games.

    Args:
      wordings: of each game. texts: others whose words it should know.
      hidden: features that its dictionaries lack.

    Raises:
      ValueError: a question about keeping, taking or one's own accounts has no word that tells it from the others.
    """
    wiring, bank = wiring or Wiring(), bank or BankConfig()
    tables = [build_bank(bank, _WholeWords()).prompts, *(t.prompts for t in games(wordings, None).values())]
    codes, asked = word_codes(bank), pd.concat(tables, ignore_index=True)
    tokenizer = make_tokenizer([*asked["prefix"], *asked["query"], *texts], codes)
    given, reverse, own = (
        set(asked.loc[asked["frame"].isin(frames), "query"])
        for frames in (("give",), ("keep", "take"), ("own_accounts",))
    )
    vocabulary = tokenizer.get_vocab()
    params, rotation = wire(wiring, vocabulary, codes, only_in(reverse, given | own), only_in(own, given | reverse))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    config = model_config(len(vocabulary), vocabulary[tokenizer.bos_token])
    saes, features = make_dictionaries(rotation, seed=wiring.seed, hidden=hidden, model=NAME)
    return Organism(LanguageModel(NAME, config, params, tokenizer), saes, features, wiring)


def save_organism(organism: Organism, folder: str | Path) -> tuple[Path, Path]:
    """Writes it as any model and its dictionaries are kept, to `folder/model` and `folder/saes`, and returns these."""
    folder = Path(folder)
    return save_model(organism.lm, folder / "model"), save_saes(organism.saes, folder / "saes")


class _WholeWords:
    """A tokenizer whose vocabulary grows with what it reads: the bank is checked before the vocabulary is known."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = False) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[self._known.setdefault(piece, len(self._known)) for piece in pieces(text)])
