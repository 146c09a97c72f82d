"""Exact answers against naive teacher forcing, sampling, and finite differences."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import jaxmech as jm
import jaxmech.answers.trie as tries
from jaxmech.answers import score
from jaxmech.answers.prompts import make_prompts
from jaxmech.answers.trie import build_tries
from jaxmech.behavior.scoring import encode_table
from jaxmech.interventions.edits import Replace, add_vector, at_last, everywhere
from jaxmech.models.decoder import forward, init_params
from jaxmech.models.generate import generate
from jaxmech.models.text import token_ids
from tests.conftest import tiny_config

PROMPTS = ["how much? $", "a kind player gives $", "so $"]
AMOUNTS = ["0", "1", "5", "10", "15", "100"]


CHARACTERS = ["<bos>", *"0123456789 abcdefghijklmnopqrstuvwxyz$.:?\n"]


def logprobs_after(lm, ids, edits=None):
    """Of the token after these. What stands to the right of them changes nothing, and lets all lengths share a program;
    edits act where they are told to, and get no such tokens."""
    ids = [0, *ids]
    width = len(ids) if edits else min(32, lm.config.max_positions)
    tokens = jnp.asarray([ids + [0] * (width - len(ids))])
    return jax.nn.log_softmax(forward(lm.config, lm.params, tokens, edits=edits, logits="all").logits[0, len(ids) - 1])


def naive(lm, prompt, strings, edits=None, goes_on=str.isdigit):
    """Each string teacher-forced alone, one sequence at a time. What follows must not go on with it: be it at once, or
    after a point."""
    on = np.array([goes_on(c) for c in CHARACTERS])
    point = CHARACTERS.index(".")
    total = -np.inf
    for string in strings:
        ids = token_ids(lm.tokenizer, prompt)
        value = 0.0
        for token in token_ids(lm.tokenizer, string):
            value += float(logprobs_after(lm, ids, edits)[token])
            ids.append(token)
        p = np.exp(np.asarray(logprobs_after(lm, ids, edits), np.float64))
        end = p[~on].sum()
        if string[-1].isdigit():
            end -= p[point] * np.exp(np.asarray(logprobs_after(lm, [*ids, point], edits), np.float64))[on].sum()
        total = np.logaddexp(total, value + np.log(end))
    return total


@pytest.mark.slow
def test_trie_equals_teacher_forcing(lm):
    got = score.choice_distribution(lm, PROMPTS, AMOUNTS).logprobs
    want = [[naive(lm, p, [a]) for a in AMOUNTS] for p in PROMPTS]
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_several_strings_for_one_answer_and_edits(lm):
    choices = [("10", "ten"), ("5", "five", "5.0"), "0"]
    push = {"resid_post": (add_vector(jnp.ones((4, 32)), everywhere(4, (1, 2))),)}
    got = score.choice_distribution(lm, PROMPTS, [("10",), ("5", "55"), "0"], edits=push).logprobs
    want = [[naive(lm, p, s, push) for s in (["10"], ["5", "55"], ["0"])] for p in PROMPTS]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert score.choice_distribution(lm, PROMPTS, choices).logprobs.shape == (3, 3)


@pytest.mark.slow
def test_moving_the_prompt_into_the_cache_changes_nothing(lm):
    tokens, mask = jm.encode_prompts(lm, PROMPTS)
    prompts = jm.Prompts(tokens, mask, build_tries(lm, PROMPTS, [AMOUNTS] * 3, nodes=20))
    short = score.before_last(lm.config, lm.params, prompts)
    assert short.tokens.shape == (3, 1) and score.before_last(lm.config, lm.params, short) is short
    vector = jax.random.normal(jax.random.key(0), (4, 32))
    results = []
    for p in (prompts, short):
        edits = {"resid_post": (add_vector(vector, at_last(4, p.tokens.shape[1])),)}
        results.append(score.score(lm.config, lm.params, p, edits=edits)[0].logprobs)
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


@pytest.mark.slow
def test_mass_and_samples_agree(lm):
    n = 2000
    amounts = [str(a) for a in range(10)]
    dist = score.choice_distribution(lm, PROMPTS[:1], amounts)
    tokens, mask = jm.encode_prompts(lm, PROMPTS[:1] * n)
    out = np.asarray(
        generate(lm.config, lm.params, tokens, mask=mask, max_new_tokens=3, temperature=1.0, key=jax.random.key(1))
    )
    texts = ["".join(CHARACTERS[t] for t in row) for row in out]
    first = np.array([int(t[0]) if re.match(r"\d(?!\.?\d)", t) else -1 for t in texts])
    seen = np.array([(first == a).mean() for a in range(10)])
    want = np.exp(np.asarray(dist.logprobs[0]))
    assert (np.abs(seen - want) < 4 * np.sqrt(want * (1 - want) / n) + 1e-3).all()
    assert abs(float(dist.mass[0]) - want.sum()) < 1e-6


@pytest.mark.slow
def test_a_number_with_decimals_is_another_number(lm):
    """Points of their own, as they stand in this vocabulary; "1.5" beside "1" takes nothing from it."""
    for amounts in (["1", "2"], ["1", "1.5", "2", "10.25"]):
        got = score.choice_distribution(lm, PROMPTS, amounts).logprobs
        np.testing.assert_allclose(got, [[naive(lm, p, [a]) for a in amounts] for p in PROMPTS], atol=1e-4)


def test_of_answers_that_begin_alike_the_longer_takes_its_part(lm):
    """What is left for the shorter is its own probability less that of the longer ones; a letter would go on."""
    answers = ["ya", "ya b", "ya b c", "no", "yak"]
    got = np.exp(score.choice_distribution(lm, PROMPTS, answers).logprobs)
    alone = np.exp([[naive(lm, p, [a], goes_on=str.isalnum) for a in answers] for p in PROMPTS])
    want = alone.copy()
    want[:, 0] -= alone[:, 1]  # which holds the third
    want[:, 1] -= alone[:, 2]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-9)
    any_of_them = alone[:, [0, 3, 4]].sum(1)
    np.testing.assert_allclose(got.sum(1), any_of_them, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 0.5])
def test_probabilities_are_never_more_than_everything(lm, step):
    """Every string over two digits, or with half amounts between, is at most a partition of what can happen."""
    amounts = [f"{a:g}" for a in np.arange(0, 100 if step == 1 else 20, step)]
    assert float(score.choice_distribution(lm, PROMPTS, amounts).mass.max()) <= 1.0 + 1e-5


@pytest.mark.slow
def test_expectation_is_differentiable(lm):
    tokens, mask = jm.encode_prompts(lm, PROMPTS)
    prompts = jm.Prompts(tokens, mask, build_tries(lm, PROMPTS, [AMOUNTS] * 3))
    values = jnp.array([float(a) for a in AMOUNTS])
    direction = jax.random.normal(jax.random.key(4), (4, 32))

    @jax.jit
    def mean(scale):
        edits = {"resid_post": (add_vector(scale * direction, at_last(4, tokens.shape[1])),)}
        return score.score(lm.config, lm.params, prompts, edits=edits)[0].expected(values).sum()

    slope, h = jax.grad(mean)(0.0), 1e-2
    assert abs(slope - (mean(h) - mean(-h)) / (2 * h)) < 2e-2 * max(1.0, abs(slope))


def test_one_trace_for_a_sweep(lm):
    tokens, mask = jm.encode_prompts(lm, PROMPTS)
    prompts = jm.Prompts(tokens, mask, build_tries(lm, PROMPTS, [AMOUNTS] * 3))
    before = score._score_jit._cache_size()
    for scale in (0.0, 1.0, -3.0):
        edits = {"resid_post": (add_vector(jnp.full((4, 32), scale), everywhere(4, jnp.arange(4) == 2)),)}
        score._score_jit(lm.config, lm.params, prompts, edits)
    assert score._score_jit._cache_size() == before + 1


@pytest.mark.slow
def test_a_shared_prefix_is_the_text_before_the_prompt(lm):
    """Left-padded, in any order, and edited or not: as if it had stood in the prompt."""
    before = ["a b c\n", "longer one\n", "a b c\n"]
    prompts = jm.make_prompts(lm, PROMPTS, AMOUNTS, prefixes=before)
    assert prompts.prefix.tokens.shape[0] == 2
    whole = [a + b for a, b in zip(before, PROMPTS, strict=True)]
    vector = jax.random.normal(jax.random.key(0), (4, 32))
    own = jax.random.normal(jax.random.key(1), (4, 3, 32))
    for edit in (None, add_vector(vector, everywhere(4)), add_vector(own, everywhere(4))):
        edits = None if edit is None else {"resid_mid": (edit,)}
        want = score.choice_distribution(lm, whole, AMOUNTS, edits=edits).logprobs
        got = score.score(lm.config, lm.params, prompts, edits=edits)[0].logprobs
        np.testing.assert_allclose(got, want, atol=2e-4)
    with pytest.raises(ValueError, match="has a value per prompt token and none for the worked examples"):
        donor = Replace(donor=jnp.zeros((4, 1, 16, 32)), spans=everywhere(4))
        score.score(lm.config, lm.params, prompts, edits={"mlp_out": (donor,)})


@pytest.mark.slow
def test_reading_out_in_pieces_changes_nothing(lm, monkeypatch):
    prompts = jm.make_prompts(lm, PROMPTS, AMOUNTS)
    _, out = score.score(lm.config, lm.params, prompts)
    final = out.final[:, prompts.tokens.shape[1] - 1 :]
    whole = score.read_out(lm.config, lm.params, final, prompts.trie)
    monkeypatch.setattr(score, "_LOGITS_AT_ONCE", 5 * lm.config.vocab_size)
    np.testing.assert_allclose(score.read_out(lm.config, lm.params, final, prompts.trie), whole, atol=1e-5)
    two = score.read_out(lm.config, lm.params, jnp.stack([final, 2 * final]), prompts.trie)
    np.testing.assert_allclose(two[0], whole, atol=1e-5)


def test_thousands_are_read_with_and_without_commas():
    class Letters:
        """Two tokenizers' worth: of a vocabulary with "," and of one without."""

        unk_token_id = 0

        def __init__(self, alphabet):
            self.alphabet = alphabet

        def __call__(self, text, add_special_tokens=False):
            return SimpleNamespace(input_ids=[1 + self.alphabet.find(c) for c in text])

    wide, narrow = Letters("0123456789,$ "), Letters("0123456789 ")
    assert tries._spellings(wide, ["1000", "999", "$20,500", ("12345", "x")]) == [
        ("1000", "1,000"), ("999",), ("$20,500", "$20500"), ("12345", "x", "12,345")
    ]  # fmt: skip
    assert tries._spellings(wide, ["1000", "1,000", "0100", "a1000"]) == [("1000",), ("1,000",), ("0100",), ("a1000",)]
    assert tries._spellings(narrow, ["1000"]) == [("1000",)]


@pytest.mark.parametrize(
    "written, continues, separators",
    [
        (["1", "01", ".5", ",000", "½"], "number", ".,"),
        (["a", "é", "'s", "’t", "-in", "7", "Ünder"], "word", "'’-"),
    ],
)
@pytest.mark.parametrize("byte_level", [True, False])
def test_which_tokens_go_on(written, continues, separators, byte_level):
    """By what they write, whatever a vocabulary's way of writing bytes and spaces."""
    ends = [" 1", "\n2", "—", "…", "”", ".", ",", "'", "’", "-", "$", " a", "\n", "!"]
    texts = dict.fromkeys([*written, *ends])
    if byte_level:
        letters = {byte: letter for letter, byte in tries._byte_alphabet().items()}
        forms = ["".join(letters[b] for b in text.encode()) for text in texts]
        assert "Ġ1" in forms and "Ċ2" in forms and "âĢĶ" in forms  # as GPT-2 writes them
    else:
        forms = [text.replace(" ", "▁") for text in texts]
    backend = Tokenizer(models.WordLevel({form: i for i, form in enumerate(forms)}, unk_token="!"))
    backend.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    kinds, joins = tries._token_kinds(PreTrainedTokenizerFast(tokenizer_object=backend), len(forms) + 3)
    bits = tries._continuations("1" if continues == "number" else "yes")
    got = {text for text, kind in zip(texts, kinds, strict=False) if kind & bits}
    assert got == set(written)
    kind = tries._DIGIT if continues == "number" else tries._LETTER
    assert {list(texts)[token] for token in joins[kind]} == set(separators)


def test_bad_choices_are_named(lm):
    with pytest.raises(ValueError, match="'5' and '5'"):
        score.choice_distribution(lm, PROMPTS, ["5", "5"])
    for choices, message in (
        ([0, 1, 5], r"choices: expected strings.*got 0 \(int\); write numbers as str\(number\)"),
        ("yes", "choices: expected a list of at least one answer, got 'yes'"),
        ([], r"choices: expected a list of at least one answer, got \[\]"),
        (["5", ()], r"got \(\) \(tuple\)"),
    ):
        with pytest.raises(ValueError, match=message):
            score.choice_distribution(lm, PROMPTS, choices)
    for texts in ("how much", [], [3]):
        with pytest.raises(ValueError, match="^texts: expected at least one, as a list of strings"):
            jm.make_prompts(lm, texts, ["5"])
    with pytest.raises(ValueError, match="prefixes: expected one for each of 3 texts, got 2"):
        jm.make_prompts(lm, PROMPTS, ["5"], prefixes=["a\n", "b\n"])
    with pytest.raises(ValueError, match="does not tokenise"):
        score.choice_distribution(lm, PROMPTS, ["5", ""])
    with pytest.raises(ValueError, match="at most 256"):
        score.choice_distribution(lm, ["a" * 300], ["5"])


def test_positions_count_and_slots_do_not(lm, tokenizer):
    """A text may fill the learned positions up, however many nodes its answers have; what runs past them is named."""
    config = tiny_config(learned_positions=True, rope=None, rope_local=None, max_positions=24, is_local=(False,) * 4)
    model = replace(lm, config=config, params=init_params(config, jax.random.key(0)))
    short = score.choice_distribution(model, ["a" * 20], [str(a) for a in range(10)])
    assert np.isfinite(short.logprobs).all()
    want = [naive(model, "a" * 20, [str(a)]) for a in range(10)]
    np.testing.assert_allclose(short.logprobs[0], want, atol=1e-4)
    with pytest.raises(ValueError, match="^prompt 0: 23 tokens, worked examples included, and 2 of its longest answer"):
        score.choice_distribution(model, ["a" * 22], ["1"])
    with pytest.raises(ValueError, match="^prompt 1: 24 tokens, worked examples included, and 2 .* 24 positions"):
        jm.make_prompts(model, ["a", "a" * 13], ["1"], prefixes=["b" * 10, "b" * 10])
    asked = dict(prefix=["b" * 10] * 2, query=["a", "a" * 13], answers=[["0", "1"]] * 2, score=[[0.0, 1.0]] * 2)
    table = pd.DataFrame(asked)
    with pytest.raises(ValueError, match="^prompt 1: 24 tokens"):
        encode_table(model, table)


def test_some_of_the_prompts_by_index_or_mask(lm):
    prompts = make_prompts(lm, ["one $", "a kind man $"], ["1", "5"])
    for rows in ([1], np.array([False, True]), jnp.array([1])):
        np.testing.assert_array_equal(prompts.of(rows).tokens, prompts.tokens[1:])
    for rows in ([0, 7], [-1], [True], [0.0]):
        with pytest.raises(ValueError, match="^rows: expected"):
            prompts.of(rows)


def test_values_of_another_number_of_choices_are_named(lm):
    dist = score.choice_distribution(lm, PROMPTS, AMOUNTS)
    assert dist.expected(np.ones(6)).shape == dist.expected(np.ones((3, 6))).shape == (3,)
    for values in (np.ones(5), np.ones((2, 6)), 1.0, np.ones((6, 3))):
        with pytest.raises(ValueError, match=r"values: expected \[N\] or \[B,N\] for choices \[3, 6\], got shape"):
            dist.expected(values)
