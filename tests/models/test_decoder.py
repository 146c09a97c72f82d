"""The decoder against itself: padding, caches, scans, edits and taps that must agree exactly or to rounding."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.activations.stream import ActivationStream
from jaxmech.answers.prompts import make_prompts
from jaxmech.interventions.edits import Replace, add_vector, everywhere
from jaxmech.interventions.steering import AddVector, language_cost, next_token, steer
from jaxmech.models import block, decoder
from jaxmech.models.decoder import Tap, forward, init_params
from jaxmech.models.generate import generate
from jaxmech.sae.collect import run_decision
from tests.conftest import tiny_config

TIGHT = dict(rtol=2e-5, atol=2e-5)


def test_padding_on_either_side_changes_nothing(lm, tokens):
    whole = forward(lm.config, lm.params, tokens, logits="all")
    for before, after in [(5, 0), (0, 5), (2, 3)]:
        pad = ((0, 0), (before, after))
        padded, mask = jnp.pad(tokens, pad), jnp.pad(jnp.ones_like(tokens, bool), pad)
        out = forward(lm.config, lm.params, padded, mask=mask, logits="all", taps=("resid_post",))
        np.testing.assert_allclose(out.logits[:, before : before + 12], whole.logits, **TIGHT)
        last = forward(lm.config, lm.params, padded, mask=mask).logits
        np.testing.assert_allclose(last, whole.logits[:, -1], **TIGHT)


def test_cached_segments_equal_one_pass(lm, tokens):
    whole = forward(lm.config, lm.params, tokens, logits="all").logits
    segments = []
    for start, stop in [(0, 4), (4, 9), (9, 12)]:
        out = forward(
            lm.config, lm.params, tokens[:, start:stop], cache=tuple(segments), logits="all", return_cache=True
        )
        np.testing.assert_allclose(out.logits, whole[:, start:stop], **TIGHT)
        segments.append(out.cache)


def test_scan_equals_an_unrolled_loop(lm, tokens):
    """Layer by layer with one-layer models, each started from the residual that the last one left."""
    c, p = lm.config, lm.params
    resid = forward(c, p, tokens, taps=("resid_pre", "resid_post")).taps
    for layer in range(c.n_layers):
        one = tiny_config(n_layers=1, is_local=(c.is_local[layer],))
        params = p | {"layers": jax.tree.map(lambda a: a[layer : layer + 1], p["layers"])}  # noqa: B023
        start = Replace(donor=resid["resid_pre"][layer : layer + 1], spans=everywhere(1))
        got = forward(one, params, tokens, edits={"resid_pre": (start,)}, taps=("resid_post",)).taps["resid_post"][0]
        np.testing.assert_allclose(got, resid["resid_post"][layer], **TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("T, cached", [(207, 0), (208, 3), (313, 0), (600, 7)])
def test_causal_attention_in_blocks_equals_all_at_once(lm, T, cached):
    """A mask `within` that is causal, but of which nobody knows that it is, takes all keys at once."""
    c = lm.config
    tokens = jax.random.randint(jax.random.key(3), (3, cached + T), 0, c.vocab_size)
    mask = jnp.ones((3, T), bool).at[1, :40].set(False).at[2, 150:].set(False)  # padding on either side
    before = forward(c, lm.params, tokens[:, :cached], return_cache=True).cache if cached else None
    run = partial(forward, c, lm.params, tokens[:, cached:], mask=mask, cache=(before,) if cached else ())
    blocks = run(logits="all").logits
    at_once = run(logits="all", within=jnp.tril(jnp.ones((T, T), bool))).logits
    np.testing.assert_allclose(blocks[mask], at_once[mask], **TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_ends_apart_change_nothing(lm, tokens, n_layers):
    c = tiny_config(n_layers=n_layers, is_local=lm.config.is_local[:n_layers])
    params = lm.params | {"layers": jax.tree.map(lambda a: a[:n_layers], lm.params["layers"])}
    vector = jax.random.normal(jax.random.key(1), (n_layers, c.d_model))
    edits = {"mlp_out": (add_vector(vector, everywhere(n_layers)),)}
    runs = [
        forward(c, params, tokens, edits=edits, taps=("resid_mid",), return_cache=True, ends_apart=apart)
        for apart in (False, True)
    ]
    chex.assert_trees_all_close(*runs, **TIGHT)


def test_window_and_softcap_matter(lm, tokens):
    base = forward(lm.config, lm.params, tokens).logits
    for change in (dict(window=200), dict(attn_softcap=1.0), dict(final_softcap=1.0), dict(qk_norm=None)):
        if "qk_norm" in change:
            attn = {k: v for k, v in lm.params["layers"]["attn"].items() if not k.endswith("norm")}
            params = lm.params | {"layers": lm.params["layers"] | {"attn": attn}}
        else:
            params = lm.params
        assert np.abs(forward(tiny_config(**change), params, tokens).logits - base).max() > 1e-3, change


def test_taps_reduce_inside_the_scan(lm, tokens):
    weights = jax.random.normal(jax.random.key(0), (lm.config.n_layers, lm.config.d_model))
    taps = {"dot": Tap("resid_mid", lambda w, x: x[:, -1] @ w, weights), "all": Tap("resid_mid")}
    out = forward(lm.config, lm.params, tokens, taps=taps).taps
    np.testing.assert_allclose(
        out["dot"], jnp.einsum("lbd,ld->lb", out["all"][:, :, -1], weights), rtol=1e-4, atol=1e-4
    )


def test_sites_add_up(lm, tokens):
    t = forward(lm.config, lm.params, tokens, taps=block.SITES).taps
    np.testing.assert_allclose(t["resid_pre"] + t["attn_out"], t["resid_mid"], **TIGHT)
    np.testing.assert_allclose(t["resid_mid"] + t["mlp_out"], t["resid_post"], **TIGHT)
    np.testing.assert_array_equal(t["resid_post"][:-1], t["resid_pre"][1:])
    gain = 1 + lm.params["layers"]["mlp_norm"]["scale"]  # Gemma's norms store their gain less one
    np.testing.assert_allclose(t["mlp_normed"] * gain[:, None, None], t["mlp_in"], **TIGHT)
    np.testing.assert_allclose(jnp.mean(t["mlp_normed"] ** 2, axis=-1), 1.0, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"norm": "layer"}, {"pre_norms": False}])
def test_every_site_can_be_edited(change):
    """Doubling a site doubles what is read there, and changes what the layer gives, whatever the norms."""
    config = tiny_config(n_layers=2, is_local=(True, False), qk_norm=None, **change)
    params = decoder.init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(3), (2, 6), 1, config.vocab_size)
    base = forward(config, params, tokens, taps=block.SITES)
    for site in block.SITES:
        edit = Replace(donor=2 * base.taps[site], spans=everywhere(2, (1,)))
        taps = forward(config, params, tokens, taps=(site, "resid_post"), edits={site: (edit,)}).taps
        np.testing.assert_allclose(taps[site][1], 2 * base.taps[site][1], **TIGHT, err_msg=site)
        assert np.abs(taps["resid_post"][1] - base.taps["resid_post"][1]).max() > 1e-4, site


def test_shapes_axes_and_parameters_agree(lm):
    shapes, axes = decoder.param_shapes(lm.config), decoder.param_axes(lm.config)
    chex.assert_trees_all_equal_shapes(shapes, lm.params)
    jax.tree.map(lambda s, a: None if len(s.shape) == len(a) else pytest.fail(f"{s} {a}"), shapes, axes)


def test_one_trace_whatever_changes_in_an_edit(lm, tokens):
    def run(vector, layer, position):
        spans = everywhere(lm.config.n_layers, jnp.arange(lm.config.n_layers) == layer)
        spans = spans.replace(prompt=spans.prompt & (jnp.arange(12) == position))
        return forward(lm.config, lm.params, tokens, edits={"resid_post": (add_vector(vector, spans),)}).logits

    run = jax.jit(chex.assert_max_traces(run, 1))
    out = [run(jnp.full((4, 32), a), layer, p) for a, layer, p in [(0.0, 0, 11), (3.0, 2, 11), (3.0, 1, 4)]]
    assert np.abs(out[1] - out[0]).max() > 1e-3 and np.abs(out[2] - out[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(taps=("resid_psot",)), "resid_psot"),
        (dict(edits={"nowhere": ()}), "nowhere"),
        (dict(logits="first"), "logits"),
        (dict(taps="resid_post"), r"write|tuple, such as \('resid_post',\)"),
        (dict(edits={"resid_post": add_vector(jnp.ones((4, 32)), everywhere(4))}), "expected a tuple of edits"),
        (dict(edits={"resid_post": (add_vector(jnp.ones((3, 32)), everywhere(4)),)}), "the model's 4 layers"),
        (dict(edits=(add_vector(jnp.ones((4, 32)), everywhere(4)),)), "expected {site"),
        (dict(logits=99), "1..12"),
        (dict(mask=jnp.ones((3, 4), bool)), r"\(3, 12\)"),
    ],
)
def test_bad_calls_name_what_is_wrong(lm, tokens, call, message):
    with pytest.raises(ValueError, match=message):
        forward(lm.config, lm.params, tokens, **call)


V = 43  # of the fixture's vocabulary


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            np.array([[1, V + 1000]]),
            r"expected integers 0\.\.42, ids of .* vocabulary, got 1043 in row 0, slot 1",
        ),
        (np.array([[3, 1], [-1, 2]]), "got -1 in row 1, slot 0"),
        (np.array([[-100]]), "got -100"),
        (np.array([[2**32 + 5]]), "got 4294967301"),
        (np.array([[1.0, 2.0]]), r"expected integers \[B,T\], token ids, got float64"),
        ("hello", r"expected integers \[B,T\].*encode_prompts"),
        (["hello"], r"expected integers \[B,T\]"),
        (np.array([[True]]), "got bool"),
        (np.array([1, 2]), r"add a batch axis with tokens\[None\]"),
    ],
)
def test_tokens_are_ids_of_the_vocabulary(lm, bad, message):
    for run in (
        lambda t: forward(lm.config, lm.params, t),
        lambda t: generate(lm.config, lm.params, t, max_new_tokens=1),
        lambda t: language_cost(lm.config, lm.params, t, AddVector(everywhere(4)), np.zeros((1, 4, 32)), mask=None),
        lambda t: next_token(lm.config, lm.params, t, AddVector(everywhere(4)), np.zeros((1, 4, 32)), mask=None),
    ):
        with pytest.raises(ValueError, match=f"^tokens: .*{message}"):
            run(bad)


@pytest.mark.parametrize("wrong", [99999, -1, -100])
def test_traced_tokens_outside_the_vocabulary_give_nan(lm, wrong):
    """Where they cannot be refused; the other rows are what they were."""
    prompts = make_prompts(lm, ["a kind man $", "the mean man $"], ["1", "5"], prefixes=["kind $1\n", "mean $5\n"])
    want = run_decision(lm.config, lm.params, prompts).choices.logprobs
    for odd in (
        prompts._replace(tokens=prompts.tokens.at[0, -1].set(wrong)),
        prompts._replace(prefix=prompts.prefix._replace(tokens=prompts.prefix.tokens.at[0, -1].set(wrong))),
    ):
        vectors = np.zeros((1, lm.config.n_layers, lm.config.d_model), np.float32)
        for got in (
            run_decision(lm.config, lm.params, odd).choices.logprobs,
            steer(lm.config, lm.params, odd, vectors).logprobs[0],
        ):
            assert np.isnan(got[0]).all()
            np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_what_the_mask_leaves_out_may_hold_anything(lm, tokens):
    mask = np.ones((3, 12), bool)
    mask[:, :4] = False
    want = forward(lm.config, lm.params, tokens, mask=mask).logits
    filled = np.where(mask, np.asarray(tokens), -100)
    for given in (mask, mask.astype(int), mask.tolist(), mask.astype(np.float32)):
        np.testing.assert_array_equal(forward(lm.config, lm.params, filled.tolist(), mask=given).logits, want)
    with pytest.raises(ValueError, match="mask: expected bools, True on real tokens, or ones and zeros"):
        forward(lm.config, lm.params, tokens, mask=np.asarray(tokens))


@pytest.mark.slow
def test_padding_takes_no_learned_positions(lm, tokens):
    config = tiny_config(learned_positions=True, rope=None, rope_local=None, max_positions=12, is_local=(False,) * 4)
    params = init_params(config, jax.random.key(0))
    padded = jnp.pad(tokens, ((0, 0), (5, 0)))
    mask = jnp.pad(jnp.ones(tokens.shape, bool), ((0, 0), (5, 0)))
    want = forward(config, params, tokens).logits
    np.testing.assert_allclose(forward(config, params, padded, mask=mask).logits, want, atol=1e-5)
    for run in (
        lambda: forward(config, params, padded),
        lambda: forward(config, params, padded, mask=np.ones(padded.shape, int)),
        lambda: language_cost(config, params, padded, AddVector(everywhere(4)), np.zeros((1, 4, 32)), mask=None),
        lambda: next_token(config, params, padded, AddVector(everywhere(4)), np.zeros((1, 4, 32)), mask=None),
        lambda: ActivationStream(config, params, padded, mask=None, layers=(0,)),
    ):
        with pytest.raises(ValueError, match="a text has 17, but the model learned only 12 positions"):
            run()
    cache = forward(config, params, tokens, return_cache=True).cache
    with pytest.raises(ValueError, match="a text has 13, but the model learned only 12 positions"):
        forward(config, params, tokens[:, :1], cache=(cache,))
