"""Every fault that a dictionary can be declared with is named, on a tiny model with dictionaries trained to fit it."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmech.activations.text import pack_texts
from jaxmech.models.decoder import forward
from jaxmech.models.language_model import LanguageModel
from jaxmech.sae.check import TEXT, check_sae
from jaxmech.sae.module import SAE, SAEConfig, make_sae, param_shapes

pytestmark = pytest.mark.slow

D, F, K = 32, 64, 6
LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def model(lm):
    """The tiny model with activations that have a mean, a BOS that is an outlier, and norms with a gain."""
    embedding = lm.params["embed"]["embedding"]
    embedding = embedding + 0.5 * embedding.std() * jax.random.normal(jax.random.key(5), (D,))
    embedding = embedding.at[0].multiply(30.0)
    gain = {"scale": jax.random.normal(jax.random.key(6), (lm.config.n_layers, D))}
    layers = {**lm.params["layers"], "mlp_norm": gain}
    return LanguageModel(
        "tiny", lm.config, {**lm.params, "embed": {"embedding": embedding}, "layers": layers}, lm.tokenizer
    )


@pytest.fixture(scope="module")
def texts():
    """The check's own text in the letters that the tiny tokenizer knows, and in an order of its own for training."""
    text = re.sub(r"[^a-z0-9 .:?\n]", "", TEXT.read_text().lower())
    return [text], [text[3000:] + text[:3000]]


@pytest.fixture(scope="module")
def saes(model, texts):
    """A JumpReLU stack for resid_post, trained as TopK and cut at the threshold that keeps as many features."""
    tokens, _ = pack_texts(model, texts[1], length=64, limit=24)
    taps = forward(model.config, model.params, jnp.asarray(tokens), taps=("resid_post",), logits="none").taps
    x = taps["resid_post"][np.array(LAYERS)][:, :, 1:].reshape(len(LAYERS), -1, D)
    params = jax.tree.map(np.asarray, jax.jit(jax.vmap(fitted))(x, jax.random.split(jax.random.key(1), len(LAYERS))))
    return make_sae(params, SAEConfig(D, F, layers=LAYERS, l0=(K,) * len(LAYERS)))


def fitted(x, key):
    scale, mean = jnp.std(x), x.mean(0)
    rows = jax.random.normal(key, (F, D))
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    params = {"W_enc": rows.T, "b_enc": jnp.zeros(F), "W_dec": rows, "b_dec": mean / scale}
    x, optimiser = x / scale, optax.adam(2e-2)

    def code(p, x):
        pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        return pre, jax.lax.top_k(pre, K)[0][:, -1:]

    def loss(p, x):
        pre, least = code(p, x)
        return jnp.mean((x - jnp.where(pre >= least, jax.nn.relu(pre), 0) @ p["W_dec"] - p["b_dec"]) ** 2)

    def step(state, key):
        rows = jax.random.randint(key, (128,), 0, len(x))
        updates, memory = optimiser.update(jax.grad(loss)(state[0], x[rows]), state[1])
        return (optax.apply_updates(state[0], updates), memory), None

    (p, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key, 300))
    threshold = jnp.full(F, jnp.quantile(code(p, x)[0], 1 - K / F))
    folded = {"W_dec": p["W_dec"] * scale, "b_dec": p["b_dec"] * scale, "W_enc": p["W_enc"] / scale}
    return {**p, **folded, "threshold": threshold}


def declared(saes, **facts):
    return SAE(saes.params, dataclasses.replace(saes.config, **facts))


def scaled(saes, factor):
    p = saes.params
    changed = {"W_enc": p["W_enc"] * factor, "W_dec": p["W_dec"] / factor, "b_dec": p["b_dec"] / factor}
    return saes.replace(params={**p, **changed})


def test_what_fits_is_not_warned_of(model, saes, texts, caplog):
    check = check_sae(model, saes, texts[0])
    assert check.table.fvu.max() < 0.4 and check.table.tokens.eq(8 * 127).all()
    assert check.table.likely_cause.tolist() == [""] * 3 and check.warnings == () and not caplog.records
    np.testing.assert_allclose(check.table.l0, saes.config.l0, rtol=0.2)
    single = check_sae(model, saes.at(2), texts[0])
    np.testing.assert_allclose(
        single.table.iloc[0, 1:5].astype(float), check.table.iloc[1, 1:5].astype(float), rtol=1e-4
    )


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "mlp_in"])
def test_a_wrong_site_is_named(model, saes, texts, site, caplog):
    check = check_sae(model, declared(saes, site=site, site_out=site), texts[0])
    # What a layer reads is what the one below writes; above the last one there is none.
    expected = ["site or layer", "site or layer", "site"] if site == "resid_pre" else ["site"] * 3
    assert check.table.likely_cause.tolist() == expected
    assert "resid_post of layer 2" in check.warnings[1]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


def test_a_wrong_layer_is_named(model, saes, texts):
    check = check_sae(model, declared(saes.at(3), layers=(1,)), texts[0])
    assert check.table.likely_cause.tolist() == ["layer"] and "resid_post of layer 3" in check.warnings[0]


@pytest.mark.parametrize("factor", [30.0, 0.01])
def test_a_scale_folded_twice_or_never_is_named(model, saes, texts, factor):
    check = check_sae(model, scaled(saes, factor), texts[0])
    assert check.table.likely_cause.tolist() == ["scale"] * 3
    found = [float(re.search(r"times ([\d.e+-]+)", warning)[1]) for warning in check.warnings]
    np.testing.assert_allclose(found, 1 / factor, rtol=0.1)


def test_b_dec_taken_off_wrongly_is_named(model, saes, texts):
    check = check_sae(model, declared(saes, subtract_b_dec=False), texts[0])
    assert check.table.likely_cause.tolist() == ["apply_b_dec_to_input"] * 3


def test_bos_is_named_whether_left_in_or_left_out(model, saes, texts):
    short = dict(rows=64, length=8)
    check = check_sae(model, declared(saes, skip_first=0), texts[0], **short)
    assert check.table.likely_cause.tolist() == ["BOS"] * 3 and "skip_first=1 instead of 0" in check.warnings[0]
    without, with_it = (check_sae(model, declared(saes, skip_first=n, l0=()), texts[0], **short) for n in (1, 0))
    assert (with_it.table.l0 > without.table.l0).all()
    l0 = tuple(2.05 * without.table.l0)
    check = check_sae(model, declared(saes, l0=l0), texts[0], **short)
    assert check.table.likely_cause.tolist() == ["BOS"] * 3 and "skip_first=0 instead of 1" in check.warnings[0]


def test_what_nothing_explains_is_unknown(model, saes, texts):
    noise = jax.random.normal(jax.random.key(0), saes.params["W_dec"].shape)
    check = check_sae(model, saes.replace(params={**saes.params, "W_dec": noise * 100}), texts[0])
    assert check.table.likely_cause.tolist() == ["unknown"] * 3 and (check.table.fvu > 1).all()
    nan = saes.replace(params={**saes.params, "b_dec": saes.params["b_dec"] * np.nan})
    check = check_sae(model, nan, texts[0])
    assert check.table.likely_cause.tolist() == ["unknown"] * 3 and "FVU is NaN" in check.warnings[0]


def test_a_transcoder_is_checked_at_both_sites(model, texts):
    tokens, _ = pack_texts(model, texts[1], length=64, limit=24)
    taps = forward(model.config, model.params, jnp.asarray(tokens), taps=("mlp_in", "mlp_out"), logits="none").taps
    x, y = (np.asarray(taps[site][1][:, 1:], np.float64).reshape(-1, D) for site in ("mlp_in", "mlp_out"))
    skip, *_ = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)
    zeros = {
        "W_enc": np.zeros((D, 4)),
        "b_enc": np.ones(4),
        "W_dec": np.zeros((4, D)),
        "b_dec": y.mean(0) - x.mean(0) @ skip,
    }
    config = SAEConfig(
        D, 4, activation="relu", subtract_b_dec=False, skip=True, site="mlp_in", site_out="mlp_out", layers=(1,)
    )
    sae = make_sae({**zeros, "W_skip": skip}, config)
    assert not check_sae(model, sae, texts[0]).warnings
    check = check_sae(model, declared(sae, site="mlp_normed"), texts[0])
    assert check.table.likely_cause.tolist() == ["site"] and "mlp_in read instead of mlp_normed" in check.warnings[0]


def test_dictionaries_of_another_model_are_refused_with_all_faults(model, saes):
    config = SAEConfig(8, 4, activation="relu", layers=(9,))
    wide = make_sae({name: np.zeros((1, *shape)) for name, shape in param_shapes(config).items()}, config)
    faults = r"d_in: 8, but resid_post of tiny is 32 wide; d_out.*layers: tiny has 0..3, got \[9\]"
    with pytest.raises(ValueError, match=faults):
        check_sae(model, wide)
    with pytest.raises(ValueError, match="more text"):
        check_sae(model, saes, ["short"])


def test_texts_go_through_the_chat_template_where_more_than_bos_is_skipped(model, saes, texts):
    talk = "{% for m in messages %}{{ bos_token }}u\n{{ m['content'] }}\n{% endfor %}"
    tokenizer = type(model.tokenizer)(tokenizer_object=model.tokenizer.backend_tokenizer, bos_token="<bos>")
    tokenizer.chat_template = talk
    tuned = dataclasses.replace(model, tokenizer=tokenizer)
    passages = [texts[0][0][:90], texts[0][0][90:150]]
    check = check_sae(tuned, declared(saes, skip_first=3, l0=()), passages)
    # BOS, "u" and a line break are left out of every message, and nothing else.
    assert check.table.tokens.eq(sum(len(p.strip()) for p in passages) + 2 - 0).all()


def test_one_string_is_no_list_of_texts(model, saes, texts):
    with pytest.raises(ValueError, match="texts: expected strings in a list, got one str"):
        check_sae(model, saes, texts[0][0])


def test_a_model_whose_activations_are_no_numbers_is_refused(model, saes, texts):
    broken = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), model.params["layers"])
    broken = dataclasses.replace(model, params={**model.params, "layers": broken})
    with pytest.raises(ValueError, match="lm: resid_post of layer 2, 3 of tiny is not finite on these texts"):
        check_sae(broken, saes, texts[0])
    # A layer that nobody asked for may be broken, and is then no better place for the dictionary.
    expected = check_sae(model, saes.at(1), texts[0]).table
    np.testing.assert_allclose(check_sae(broken, saes.at(1), texts[0]).table.fvu, expected.fvu, rtol=1e-5)
