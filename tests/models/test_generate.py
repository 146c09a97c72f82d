"""Cached decoding against recomputation of the whole text, with and without edits; sampling against plain NumPy."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxmech.interventions.edits import Add, Replace, Spans, add_vector, everywhere, features, select, with_answers
from jaxmech.models import block
from jaxmech.models import generate as module
from jaxmech.models.decoder import forward, init_params
from jaxmech.models.generate import bucket, draw, filter_logits, generate, until_end
from jaxmech.models.load import load_model

GOLDENS = Path(__file__).parents[1] / "goldens"
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model(lm):
    """A model that looks at its whole context: with tied embeddings a random one repeats its last token for ever."""
    config = dataclasses.replace(lm.config, tied=False)
    return dataclasses.replace(lm, config=config, params=spread(config))


def spread(config):
    params = jax.jit(partial(init_params, config))(jax.random.key(0))
    return jax.tree.map(lambda p: p * (20.0 if p.ndim > 1 else 1.0), params)


def write(model, tokens, **how):
    return generate(model.config, model.params, tokens, **how)


def np_filter(row, top_k=None, top_p=None):
    """transformers' TopKLogitsWarper, then its TopPLogitsWarper, for one row [V]."""
    row = np.array(row, np.float64)
    if top_k is not None:
        row[row < np.sort(row)[::-1][min(top_k, len(row)) - 1]] = -np.inf
    if top_p is not None:
        rising = np.argsort(row)
        p = np.exp(row[rising] - row.max())
        out = np.cumsum(p / p.sum()) <= 1 - top_p
        out[-1] = False
        row[rising[out]] = -np.inf
    return row


def np_sample(logits, step, temperature=0.0, top_k=None, top_p=None):
    """One token a row, by inversion of the row's own uniform number."""
    if temperature == 0:
        return logits.argmax(-1)
    picked = []
    for b, row in enumerate(np.asarray(logits)):
        p = np.exp(np_filter(row / temperature, top_k, top_p) - row.max() / temperature)
        uniform = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, b), step))
        picked.append(np.searchsorted(np.cumsum(p), float(uniform) * p.sum(), side="right"))
    return np.array(picked)


def recompute(model, tokens, steps, mask=None, edits=None, **how):
    """Runs the whole text again for every new token."""
    T = tokens.shape[1]
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    whole, seen = np.pad(tokens, ((0, 0), (0, steps))), np.pad(mask, ((0, 0), (0, steps)))
    for step in range(steps):
        logits = forward(model.config, model.params, jnp.asarray(whole), mask=jnp.asarray(seen), edits=edits).logits
        whole[:, T + step], seen[:, T + step] = np_sample(logits, step, **how), True
    return whole[:, T:]


def steering(saes, where):
    """A vector everywhere; features on the prompt tokens `where` [4,B,T] and on later ones; a donor on the others."""
    _, B, T = where.shape
    later = jnp.array([[False], [True], [False], [True]])
    chosen = select([(1, 3), (3, 7)], 4)
    donor = jax.random.normal(jax.random.key(2), (4, B, T, 32))
    return {
        "resid_pre": (add_vector(jax.random.normal(jax.random.key(1), (4, 32)), everywhere(4, (1, 2))),),
        "resid_post": (features(saes, chosen, gain=2.0, shift=3.0, spans=Spans(None, where, later)),),
        "mlp_out": (Replace(donor=donor, spans=Spans(None, ~where, ~later)),),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(temperature=0.7),
        dict(temperature=2.0, top_k=5),
        dict(temperature=1.5, top_p=0.7),
        dict(temperature=1.2, top_k=12, top_p=0.9),
    ],
    ids=str,
)
def test_steered_cached_decoding_equals_steered_recomputation(model, tokens, saes, how):
    tokens = tokens[:, :10]  # not a bucket's size
    edits = steering(saes, jax.random.bernoulli(jax.random.key(4), 0.5, (4, 3, 10)))
    whole = with_answers(edits, 10, 9)
    off = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if leaf.dtype == bool else leaf, whole)
    for real in (jnp.arange(10) >= jnp.array([[0], [3], [6]]), jnp.arange(10) < jnp.array([[10], [5], [8]])):
        key = KEY if how else None
        got = write(model, tokens, mask=real, max_new_tokens=9, edits=edits, key=key, **how)
        np.testing.assert_array_equal(got, recompute(model, tokens, 9, real, whole, **how))
        plain = recompute(model, tokens, 9, real, off, **how)
        assert (np.asarray(got) != plain).mean() > 0.5 and min(len(set(row)) for row in plain.tolist()) > 2


@pytest.mark.slow
def test_padding_side_and_neighbours_do_not_matter(model, tokens):
    run = partial(write, model, max_new_tokens=6, temperature=1.0, top_p=0.95, key=KEY)
    whole = run(tokens, eos_ids=(-1,))
    for pad in [(4, 0), (0, 4), (1, 3), (11, 20)]:
        mask = jnp.pad(jnp.ones_like(tokens, bool), ((0, 0), pad))
        padded = run(jnp.pad(tokens, ((0, 0), pad)), mask=mask, eos_ids=(-1,))
        np.testing.assert_array_equal(padded, whole)
    np.testing.assert_array_equal(run(tokens.at[1:].set(1), eos_ids=(-1,))[0], whole[0])
    ended = run(tokens, eos_ids=(int(whole[1, 0]),))  # a neighbour that ends at once
    kept = np.asarray(until_end(whole, (int(whole[1, 0]),)))
    assert kept[0].all() and kept[1].sum() == 1
    np.testing.assert_array_equal(np.asarray(ended)[kept], np.asarray(whole)[kept])


def test_buckets_change_nothing(model, tokens, saes, monkeypatch):
    run = partial(
        write,
        model,
        tokens[:, :10],
        max_new_tokens=5,
        temperature=1.0,
        top_p=0.8,
        key=KEY,
        edits=steering(saes, jax.random.bernoulli(jax.random.key(4), 0.5, (4, 3, 10))),
    )
    padded = run()
    monkeypatch.setattr(module, "bucket", lambda n: n)
    np.testing.assert_array_equal(run(), padded)


def test_one_compilation_for_a_bucket(model, tokens):
    long = jnp.concatenate([tokens, tokens], axis=1)
    spans = everywhere(4, (1,))
    before = module._generate._cache_size()
    for T, new, temperature, top_k, top_p, scale in [
        (13, 9, 1.0, 3, 0.9, 0.0),
        (14, 12, 0.5, 40, 0.5, 1.0),
        (16, 10, 2.0, 10**6, 0.999, -3.0),
    ]:
        edits = {"resid_post": (add_vector(jnp.full((4, 32), scale), spans),)}
        out = write(
            model,
            long[:, :T],
            max_new_tokens=new,
            edits=edits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            key=KEY,
            eos_ids=(new,),
        )
        assert out.shape == (3, new)
    assert module._generate._cache_size() == before + 1


def test_buckets_waste_less_than_half():
    assert [bucket(n) for n in (0, 1, 8, 9, 13, 17, 25, 33, 50, 100)] == [8, 8, 8, 12, 16, 24, 32, 48, 64, 128]
    assert all(n <= bucket(n) < 1.5 * n for n in range(9, 3000))


@pytest.mark.slow
def test_sampling_follows_the_distribution(model, tokens):
    row = jnp.repeat(tokens[:1], 4000, axis=0)
    first = write(model, row, max_new_tokens=1, temperature=1.5, key=jax.random.key(0))[:, 0]
    p = jax.nn.softmax(forward(model.config, model.params, tokens[:1]).logits[0] / 1.5)
    seen = np.bincount(np.asarray(first), minlength=len(p)) / len(first)
    assert np.abs(seen - p).max() < 4 * np.sqrt(0.25 / 4000)


def test_rows_stop_at_eos(model, tokens):
    run = partial(write, model, tokens, max_new_tokens=8)
    free = np.asarray(run(eos_ids=(-1, -1)))
    stops = (int(free[0, 2]), int(free[1, 4]))
    out = np.asarray(run(eos_ids=stops))
    mask = np.asarray(until_end(jnp.asarray(out), stops))
    for a, b, kept in zip(free, out, mask, strict=True):
        end = next((i for i in range(8) if a[i] in stops), 8)
        np.testing.assert_array_equal(b[: end + 1], a[: end + 1])
        assert (b[end:] == b[min(end, 7)]).all()
        np.testing.assert_array_equal(kept, np.arange(8) <= end)


@struct.dataclass
class Counted(Add):
    """Tells the host about every layer that it acts in."""

    told: list = struct.field(pytree_node=False, default=None)

    def delta(self, x):
        jax.debug.callback(lambda _: self.told.append(x.shape[1]), x[0, 0, 0])
        return super().delta(x)


@pytest.mark.slow
def test_decoding_ends_with_the_last_row(model, tokens):
    told = []
    edits = {"resid_post": (Counted(vector=jnp.zeros((4, 1, 32)), told=told, spans=everywhere(4)),)}
    run = partial(write, model, tokens, max_new_tokens=20, edits=edits)
    free = np.asarray(run(eos_ids=(-1,) * 3))
    jax.effects_barrier()
    assert told.count(1) == 4 * 19  # the last token is not fed
    told.clear()
    ends = tuple(int(i) for i in free[:, 3])
    out = np.asarray(run(eos_ids=ends))
    jax.effects_barrier()
    longest = max(next(i for i in range(20) if row[i] in ends) for row in free)
    assert told.count(1) == 4 * longest and longest <= 3
    assert (out[:, longest:] == out[:, longest, None]).all()


@pytest.mark.parametrize("top_k", [None, 1, 7, 300, 5000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 0.999])
def test_filters_are_those_of_transformers(top_k, top_p):
    logits = np.array(3 * jax.random.normal(jax.random.key(0), (6, 999)))
    logits[1] = -np.abs(logits[1])
    logits[2, 5:] = -np.inf
    logits[3] *= 20
    logits[4] *= 1e-3
    traced = [None if v is None else jnp.asarray(v) for v in (top_k, top_p)]
    got = np.asarray(jax.jit(filter_logits)(jnp.asarray(logits), *traced))
    want = np.stack([np_filter(row, top_k, top_p) for row in logits])
    np.testing.assert_array_equal(got, np.where(np.isfinite(want), logits, -np.inf))


def test_nucleus_keeps_the_smallest_set():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.04, 0.01]]))
    kept = np.isfinite(filter_logits(logits, None, 0.75))
    np.testing.assert_array_equal(kept, [[True, True, False, False], [False, True, False, False]])
    # What is left of top_k is all there is: 0.5 / 0.8 is less than 0.75, 0.5 / 0.5 is not.
    np.testing.assert_array_equal(np.isfinite(filter_logits(logits[:1], 2, 0.75)), [[True, True, False, False]])
    np.testing.assert_array_equal(np.isfinite(filter_logits(logits[:1], 2, 0.6)), [[True, False, False, False]])


def test_equals_stay_together():
    logits = jnp.array([[1.0, 0.0, 2.0, 0.0, -0.0, -1.0]])
    for top_k in (3, 4, 5):
        np.testing.assert_array_equal(np.isfinite(filter_logits(logits, top_k))[0], [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(np.isfinite(filter_logits(jnp.zeros((1, 4)), None, 0.5))[0], [1, 1, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("V", "share"), [(5000, 0.5), (262144, 0.0003)])
def test_draw_inverts_the_distribution_and_never_leaves_the_set(V, share):
    B, rng, rows = 16, np.random.default_rng(0), np.arange(16)
    logits = 3 * jax.random.normal(jax.random.key(1), (B, V))
    logits = jnp.where(jax.random.bernoulli(jax.random.key(2), share, logits.shape), logits, -jnp.inf)
    p = np.exp(np.asarray(logits, np.float64))
    edges = np.pad(np.cumsum(p, axis=1), ((0, 0), (1, 0)))
    edges /= edges[:, -1:]
    sets = [rng.random(B), np.zeros(B), np.ones(B)]
    # On the border between two tokens rounding decides which of them it is, and a parallel sum may point beside both.
    sets += [edges[rows, [1 + rng.choice(np.flatnonzero(row)) for row in p]] for _ in range(100)]
    run = jax.jit(draw)
    for uniform in sets:
        uniform = np.minimum(np.asarray(uniform, np.float32), np.float32(1 - 2**-24))
        at = np.asarray(run(logits, jnp.asarray(uniform)))
        assert (p[rows, at] > 0).all()
        assert (edges[rows, at] <= uniform + 1e-6).all() and (uniform <= edges[rows, at + 1] + 1e-6).all()


def test_no_row_is_padded_past_learned_positions(lm, tokens):
    config = dataclasses.replace(
        lm.config,
        tied=False,
        learned_positions=True,
        rope=None,
        rope_local=None,
        max_positions=15,
        is_local=(False,) * 4,
    )
    model = dataclasses.replace(lm, config=config, params=spread(config))
    tokens = jnp.concatenate([tokens, tokens[:, :1]], axis=1)  # 13 of them: the bucket would be 16
    got = write(model, tokens, max_new_tokens=3)
    np.testing.assert_array_equal(got[:, :2], recompute(model, tokens, 2))
    with pytest.raises(ValueError, match="longest prompt has 13 tokens and the model 15 positions.* at most 3 new"):
        write(model, tokens, max_new_tokens=4)
    mask = jnp.arange(13) >= 5
    out = write(model, tokens, mask=jnp.broadcast_to(mask, tokens.shape), max_new_tokens=8)
    assert out.shape == (3, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(temperature=1.0), "key"),
        (dict(temperature=-1.0), "temperature >= 0"),
        (dict(temperature=float("nan"), key=KEY), "temperature >= 0"),
        (dict(temperature=1.0, top_p=0.0, key=KEY), "top_p"),
        (dict(temperature=1.0, top_k=0, key=KEY), "top_k: expected at least 1, or None"),
        (dict(mask=jnp.ones((3, 5), bool)), r"mask: expected the shape of tokens \(3, 12\), got \(3, 5\)"),
        (
            dict(temperature=1.0, key=0),
            r"key: sampling .* needs one key, such as jax.random.key\(0\), got 0",
        ),
        (dict(temperature=1.0, key=np.int64(0)), r"key: sampling .* got (np.int64\()?0"),
        (dict(temperature=1.0, key=jax.random.split(KEY)), "key: sampling .* needs one key"),
        (dict(temperature="1"), "temperature: expected a number, got '1'"),
        (dict(temperature=1.0, top_p="0.9", key=KEY), "top_p: expected a number, got '0.9'"),
        (dict(temperature=1.0, top_k=2.5, key=KEY), "top_k: expected a whole number, got 2.5"),
        (dict(max_new_tokens=-1), "max_new_tokens: expected a whole number of at least 0, got -1"),
        (dict(max_new_tokens=2.0), "max_new_tokens: expected a whole number, got 2.0"),
        (dict(eos_ids=5), r"eos_ids: expected whole numbers in a list, such as \[1, 3\], got 5"),
    ],
)
def test_wrong_settings_are_named(lm, tokens, wrong, message):
    with pytest.raises(ValueError, match=message):
        write(lm, tokens, **(dict(max_new_tokens=1) | wrong))
    with pytest.raises(ValueError, match=r"tokens: expected \[B,T\]"):
        write(lm, tokens[0], max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("pad", [(0, 0), (3, 0), (0, 3)])
def test_crossing_longropes_original_context_recomputes_the_text(pad):
    """One row crosses while decoding, one has crossed before; HF drops its cache there."""
    phi = load_model(GOLDENS / "tiny-phi3")  # its original context is 10
    prompt = jnp.asarray(np.load(GOLDENS / "tiny-phi3" / "golden.npz")["tokens"])
    mask = jnp.arange(12) < jnp.array([[7], [12]])
    padding = ((0, 0), pad)
    tokens, mask = jnp.pad(jnp.where(mask, prompt[:, :12], 0), padding), jnp.pad(mask, padding)
    vector = jax.random.normal(jax.random.key(0), (phi.config.n_layers, phi.config.d_model))
    edits = {"resid_post": (add_vector(vector, everywhere(phi.config.n_layers)),)}
    got = generate(phi.config, phi.params, tokens, mask=mask, max_new_tokens=7, edits=edits, eos_ids=())
    for row, count in enumerate((7, 12)):
        text = prompt[row : row + 1, :count]
        for _ in range(7):
            logits = forward(phi.config, phi.params, text, edits=edits).logits
            text = jnp.concatenate([text, logits.argmax(-1)[:, None].astype(text.dtype)], axis=1)
        np.testing.assert_array_equal(got[row], text[0, count:])
    prefix = forward(phi.config, phi.params, tokens, mask=mask, return_cache=True).cache
    with pytest.raises(ValueError, match="cache: with it the text would cross"):
        generate(phi.config, phi.params, prompt[:, :2], max_new_tokens=12, cache=(prefix,))


@pytest.mark.slow
@pytest.mark.parametrize("how", [dict(), dict(temperature=1.0, key=KEY), dict(temperature=1.0, top_p=0.9, key=KEY)])
def test_there_is_no_next_token_after_nan(lm, tokens, how):
    """In one row of three, from the second new token on."""
    vector = jnp.zeros((4, 3, 32)).at[:, 1].set(jnp.nan)
    later = Spans(None, jnp.zeros((4, 1, 1), bool), jnp.ones((4, 1), bool))
    edits = {"resid_post": (add_vector(vector, later),)}
    with pytest.raises(ValueError, match="^row 1: the logits of new token 1 are not finite, so that there is no"):
        write(lm, tokens, max_new_tokens=4, edits=edits, **how)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("ins", "out"), [((48,), (7,)), ((5,), (2, 3)), ((4, 24), (10,))])
def test_the_product_of_one_token_is_the_row_of_many(ins, out, dtype):
    """On a CPU it is summed in another way."""
    x, kernel = jax.random.normal(KEY, (1, 3, *ins)).astype(dtype), jax.random.normal(KEY, ins + out).astype(dtype)
    expected = np.tensordot(np.float64(x), np.float64(kernel), len(ins))
    letters = "".join("nhk"[: len(ins)]), "".join("xyz"[: len(out)])
    linear = block._Linear(
        f"bt{letters[0]},{letters[0]}{letters[1]}->bt{letters[1]}", kernel.shape, (None,) * kernel.ndim
    )
    for t in range(3):
        got = jax.jit(linear.apply)({"params": {"kernel": kernel}}, x[:, t : t + 1])
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got[0, 0].astype(float), expected[0, t], rtol=1e-5 if dtype == jnp.float32 else 8e-3, atol=1e-5
        )
