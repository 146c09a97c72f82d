"""A whole study on a tiny random model: nothing to find, but every stage runs."""

import re

import jax
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxmech.behavior.altruism.dictator import BankConfig, build_bank
from jaxmech.behavior.altruism.games import GAMES, game_prompts
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.models.decoder import init_params
from jaxmech.models.language_model import LanguageModel
from jaxmech.study.config import StudyConfig
from jaxmech.study.context import Context
from tests.conftest import tiny_config

_PIECES = r"\d|[A-Za-z]+(?:-[A-Za-z]+)*|\n| |[^\w\s]"


class _Words:
    """Enough of a tokenizer to build the texts whose words become the vocabulary."""

    def __init__(self):
        self.ids = {"<bos>": 0}

    def __call__(self, text, add_special_tokens=False):
        ids = [self.ids.setdefault(piece, len(self.ids)) for piece in re.findall(_PIECES, text)]
        return type("Encoding", (), {"input_ids": ids})


@pytest.fixture(scope="session")
def word_lm():
    words = _Words()
    bank = build_bank(BankConfig(selection=16, development=4, test=8), words)
    for text in [*bank.prompts["prefix"], *bank.prompts["query"], *build_items(12, seed=0)["text"], "+=;:"]:
        words(text)
    for game in GAMES.values():
        for row in game_prompts(game).itertuples():
            words(row.prefix + row.query)
    tokenizer = Tokenizer(models.WordLevel(words.ids, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    config = tiny_config(
        vocab_size=len(words.ids), n_layers=3, is_local=(True, False, True), window=64, max_positions=2048
    )
    params = init_params(config, jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"] * 30
    return LanguageModel("tiny", config, params, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>"))


@pytest.fixture
def small_study(tmp_path, monkeypatch, word_lm):
    monkeypatch.setattr(Context, "lm", property(lambda self: word_lm))
    return StudyConfig(
        model="tiny", run_dir=str(tmp_path / "run"), selection_families=6, development_families=1, test_families=6,
        pairs=1, examples=2, samples=1, sae_layers=[0, 2], sae_features=48, sae_sparsity=8, sae_steps=12, sae_batch=64,
        text_count=6, text_length=24, permutations=50, relabelings=3, half_splits=4, budget_share=0.03,
        items_per_generator=2, random_sets=3, audit_features=3, proximity_features=3,
        alphas=[-1.0, 0.0, 1.0], random_directions=2, text_check=1, arithmetic_items=3, game_families=2,
        game_directions=2,
    )  # fmt: skip
