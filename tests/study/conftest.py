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
    for text in [
        *bank.prompts["prefix"],
        *bank.prompts["query"],
        *build_items(per_generator=12, seed=0)["text"],
        "+=;:",
    ]:
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


@pytest.fixture(scope="session")
def small_settings():
    """`small_settings(run_dir)` -> a study of seconds."""
    return _small


@pytest.fixture
def small_study(tmp_path, monkeypatch, word_lm):
    monkeypatch.setattr(Context, "lm", property(lambda self: word_lm))
    return _small(tmp_path / "run")


def _small(run_dir) -> StudyConfig:
    return StudyConfig(
        model="tiny", run_dir=str(run_dir),
        bank=dict(selection=6, development=1, test=6, pairs=1, examples=2, stakes=[10, 20]), gate=dict(samples=1),
        text=dict(count=6, length=24),
        dictionaries=dict(layers=[0, 2], batch=64, train=dict(d_sae=48, sparsity=8, steps=12)),
        selection=dict(permutations=50, relabelings=3, half_splits=4, budget=0.03), fidelity=dict(rows=1),
        dual_process=dict(items=2), patching=dict(random_sets=3), attribution=dict(audited=3),
        proximity=dict(features=3), steering=dict(alphas=[-1, 0, 1], random_directions=2, sums=3),
        transfer=dict(families=2, random_directions=2),
    )  # fmt: skip
