"""Exact answers against naive teacher forcing, sampling, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmech.choices as ch
from jaxmech import edits as ed
from jaxmech.models.decoder import forward
from jaxmech.models.generate import generate

PROMPTS = ["how much? $", "a kind player gives $", "so $"]
AMOUNTS = ["0", "1", "5", "10", "15", "100"]


def naive(lm, prompt, strings, edits=None):
    """Each string teacher-forced alone, one sequence at a time; the end is the sum over tokens that do not go on."""
    continues = np.array([c.isdigit() for c in ["<bos>", *"0123456789 abcdefghijklmnopqrstuvwxyz$.:?\n"]])
    total = -np.inf
    for string in strings:
        head = [0, *ch.token_ids(lm.tokenizer, prompt)]
        tail = ch.token_ids(lm.tokenizer, string)
        tokens = jnp.asarray([head + tail])
        logp = np.asarray(
            jax.nn.log_softmax(forward(lm.config, lm.params, tokens, edits=edits, logits="all").logits[0])
        )
        at = len(head) - 1
        value = sum(logp[at + i, t] for i, t in enumerate(tail))
        value += np.log(np.exp(logp[at + len(tail)])[~continues].sum())
        total = np.logaddexp(total, value)
    return total


def test_trie_equals_teacher_forcing(lm):
    got = ch.choice_distribution(lm, PROMPTS, AMOUNTS).logprobs
    want = [[naive(lm, p, [a]) for a in AMOUNTS] for p in PROMPTS]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_several_strings_for_one_answer_and_edits(lm):
    choices = [("10", "ten"), ("5", "five", "5.0"), "0"]
    push = {"resid_post": (ed.add_vector(jnp.ones((4, 32)), **ed.everywhere(4, (1, 2))),)}
    got = ch.choice_distribution(lm, PROMPTS, [("10",), ("5", "55"), "0"], edits=push).logprobs
    want = [[naive(lm, p, s, push) for s in (["10"], ["5", "55"], ["0"])] for p in PROMPTS]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert ch.choice_distribution(lm, PROMPTS, choices).logprobs.shape == (3, 3)


def test_moving_the_prompt_into_the_cache_changes_nothing(lm):
    tokens, mask = ch.encode_prompts(lm, PROMPTS)
    prompts = ch.Prompts(tokens, mask, ch.build_tries(lm, PROMPTS, [AMOUNTS] * 3, nodes=20))
    short = ch.before_last(lm.config, lm.params, prompts)
    assert short.tokens.shape == (3, 1) and ch.before_last(lm.config, lm.params, short) is short
    vector = jax.random.normal(jax.random.key(0), (4, 32))
    results = []
    for p in (prompts, short):
        edits = {"resid_post": (ed.add_vector(vector, **ed.at_last(4, p.tokens.shape[1])),)}
        results.append(ch.score(lm.config, lm.params, p, edits=edits)[0].logprobs)
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


def test_mass_and_samples_agree(lm):
    n = 2000
    amounts = [str(a) for a in range(10)]
    dist = ch.choice_distribution(lm, PROMPTS[:1], amounts)
    tokens, mask = ch.encode_prompts(lm, PROMPTS[:1] * n)
    out = np.asarray(
        generate(lm.config, lm.params, tokens, mask=mask, max_new_tokens=2, temperature=1.0, key=jax.random.key(1))
    )
    digit = {i + 1: i for i in range(10)}
    first = np.array([digit.get(a, -1) if b not in digit else -1 for a, b in out])
    seen = np.array([(first == a).mean() for a in range(10)])
    want = np.exp(np.asarray(dist.logprobs[0]))
    assert (np.abs(seen - want) < 4 * np.sqrt(want * (1 - want) / n) + 1e-3).all()
    assert abs(float(dist.mass[0]) - want.sum()) < 1e-6


def test_probabilities_are_never_more_than_everything(lm):
    """Every string over two digits, with its end, is at most a partition of what can happen."""
    amounts = [str(a) for a in range(100)]
    assert float(ch.choice_distribution(lm, PROMPTS, amounts).mass.max()) <= 1.0 + 1e-5


def test_expectation_is_differentiable(lm):
    tokens, mask = ch.encode_prompts(lm, PROMPTS)
    prompts = ch.Prompts(tokens, mask, ch.build_tries(lm, PROMPTS, [AMOUNTS] * 3))
    values = jnp.array([float(a) for a in AMOUNTS])
    direction = jax.random.normal(jax.random.key(4), (4, 32))

    @jax.jit
    def mean(scale):
        edits = {"resid_post": (ed.add_vector(scale * direction, **ed.at_last(4, tokens.shape[1])),)}
        return ch.score(lm.config, lm.params, prompts, edits=edits)[0].expected(values).sum()

    slope, h = jax.grad(mean)(0.0), 1e-2
    assert abs(slope - (mean(h) - mean(-h)) / (2 * h)) < 2e-2 * max(1.0, abs(slope))


def test_one_trace_for_a_sweep(lm):
    tokens, mask = ch.encode_prompts(lm, PROMPTS)
    prompts = ch.Prompts(tokens, mask, ch.build_tries(lm, PROMPTS, [AMOUNTS] * 3))
    before = ch._score_jit._cache_size()
    for scale in (0.0, 1.0, -3.0):
        edits = {"resid_post": (ed.add_vector(jnp.full((4, 32), scale), **ed.everywhere(4, jnp.arange(4) == 2)),)}
        ch._score_jit(lm.config, lm.params, prompts, edits)
    assert ch._score_jit._cache_size() == before + 1


def test_a_shared_prefix_is_the_text_before_the_prompt(lm):
    """Left-padded, in any order, and edited or not: as if it had stood in the prompt."""
    before = ["a b c\n", "longer one\n", "a b c\n"]
    prompts = ch.make_prompts(lm, PROMPTS, AMOUNTS, prefixes=before)
    assert prompts.prefix.tokens.shape[0] == 2
    whole = [a + b for a, b in zip(before, PROMPTS, strict=True)]
    vector = jax.random.normal(jax.random.key(0), (4, 32))
    own = jax.random.normal(jax.random.key(1), (4, 3, 32))
    for edit in (None, ed.add_vector(vector, **ed.everywhere(4)), ed.add_vector(own, **ed.everywhere(4))):
        edits = None if edit is None else {"resid_mid": (edit,)}
        want = ch.choice_distribution(lm, whole, AMOUNTS, edits=edits).logprobs
        got = ch.score(lm.config, lm.params, prompts, edits=edits)[0].logprobs
        np.testing.assert_allclose(got, want, atol=2e-4)
    with pytest.raises(ValueError, match="says nothing of the worked examples"):
        donor = ed.Replace(donor=jnp.zeros((4, 1, 16, 32)), **ed.everywhere(4))
        ch.score(lm.config, lm.params, prompts, edits={"mlp_out": (donor,)})


def test_reading_out_in_pieces_changes_nothing(lm, monkeypatch):
    prompts = ch.make_prompts(lm, PROMPTS, AMOUNTS)
    _, out = ch.score(lm.config, lm.params, prompts)
    final = out.final[:, prompts.tokens.shape[1] - 1 :]
    whole = ch.read_out(lm.config, lm.params, final, prompts.trie)
    monkeypatch.setattr(ch, "_LOGITS_AT_ONCE", 5 * lm.config.vocab_size)
    np.testing.assert_allclose(ch.read_out(lm.config, lm.params, final, prompts.trie), whole, atol=1e-5)
    two = ch.read_out(lm.config, lm.params, jnp.stack([final, 2 * final]), prompts.trie)
    np.testing.assert_allclose(two[0], whole, atol=1e-5)


def test_bad_choices_are_named(lm):
    with pytest.raises(ValueError, match="'5' and '5'"):
        ch.choice_distribution(lm, PROMPTS, ["5", "5"])
    with pytest.raises(ValueError, match="does not tokenise"):
        ch.choice_distribution(lm, PROMPTS, ["5", ""])
    with pytest.raises(ValueError, match="at most 256"):
        ch.choice_distribution(lm, ["a" * 300], ["5"])
