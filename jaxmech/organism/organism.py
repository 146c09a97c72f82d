"""The whole organism: a model, its dictionaries and what is true of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from jaxmech.behavior.altruism.altruism import games
from jaxmech.behavior.altruism.dictator import BankConfig, build_bank
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.saved import save_model
from jaxmech.organism.dictionary import make_dictionaries
from jaxmech.organism.meaning import read_prompts
from jaxmech.organism.truth import truth_of
from jaxmech.organism.wiring import STANCE, Wiring, model_config, wire
from jaxmech.organism.words import pieces
from jaxmech.sae.formats import save_saes
from jaxmech.sae.module import SAE

NAME = "organism"


@dataclasses.dataclass(frozen=True, eq=False)
class Organism:
    """lm, saes: as any other model and its dictionaries. features: name -> index, the same at every layer. wiring: what
    is true of it, and truth the same as a study should find it (`truth.truth_of`)."""

    lm: LanguageModel
    saes: SAE
    features: Mapping[str, int]
    wiring: Wiring
    truth: Mapping[str, Any]


def build_organism(
    wiring: Wiring | None = None,
    bank: BankConfig | None = None,
    *,
    wordings: int = 6,
    items: int = 4,
    texts: Iterable[str] = (),
    hidden: Collection[str] = (),
) -> Organism:
    """An organism that reads the prompts of a bank, of the other games and of dual-process items.

    Its seed is that of the prompts too. The vocabulary and all shapes are the same under every switch.

    Args:
      wordings: of each game. items: of each generator. texts: others whose words it should know.
      hidden: features that its dictionaries lack, besides those that `wiring.hidden` hides.

    Raises:
      ValueError: a question about keeping, taking or one's own accounts has no word that tells it from the others.
    """
    wiring, bank = wiring or Wiring(), bank or BankConfig()
    asked = build_bank(bank, _WholeWords(), seed=wiring.seed).prompts
    played = games(wordings, None, seed=wiring.seed)
    solved = build_items(per_generator=items, seed=wiring.seed)
    meaning = read_prompts(bank, asked, played, solved, list(texts), seed=wiring.seed)
    tokenizer, vocabulary = meaning.tokenizer, meaning.tokenizer.get_vocab()
    params, rotation = wire(wiring, vocabulary, meaning)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    config = model_config(len(vocabulary), vocabulary[tokenizer.bos_token])
    hidden = {*hidden, *(STANCE if wiring.hidden else ())}
    saes, features = make_dictionaries(rotation, seed=wiring.seed, hidden=hidden, model=NAME)
    truth = truth_of(wiring, features, asked, meaning, hidden=hidden)
    return Organism(LanguageModel(NAME, config, params, tokenizer), saes, features, wiring, truth)


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
