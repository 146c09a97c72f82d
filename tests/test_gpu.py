"""What an accelerator computes against the same functions on the CPU of its machine.

`pytest tests/test_gpu.py -n 0`, with JAX_PLATFORMS unset or naming both ("cuda,cpu").
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxmech as jm
from jaxmech.answers import score
from jaxmech.interventions import attribution
from jaxmech.interventions.edits import at_last, everywhere
from jaxmech.sae.module import SAE, SAEConfig
from tests.interventions.test_sweep import AMOUNTS, BEFORE, TEXTS, D, L, one_by_one, steered

pytestmark = pytest.mark.gpu
VALUES = np.array([0.0, 0.1, 0.5, 1.0], np.float32)


def on_both(function, *args):
    """What it returns on the accelerator, and on the CPU, as NumPy arrays."""
    return [
        jax.device_get(function(*jax.device_put(args, device))) for device in (jax.devices()[0], jax.devices("cpu")[0])
    ]


def assert_close(got, want, rtol):
    """Up to rtol of the largest value: TF32 and bfloat16 products are off by 1e-3 and more."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max()), got, want)


@pytest.fixture(scope="module")
def prompts(lm):
    return score.make_prompts(lm, TEXTS, AMOUNTS, prefixes=BEFORE)


def test_float32_products_are_not_rounded(lm, tokens):
    def run(params, tokens):
        out = jm.forward(lm.config, params, tokens, taps=("resid_post",), logits="all")
        return out.logits, out.taps

    got, want = on_both(run, lm.params, tokens)
    assert_close(got, want, 1e-5)


def test_bfloat16_is_as_near_to_float32_as_on_a_cpu(lm, tokens):
    def run(params, tokens):
        return jax.nn.log_softmax(jm.forward(lm.config, params, tokens, logits="all").logits)

    wide = jax.device_get(run(lm.params, tokens))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), lm.params)
    off = [np.abs(logprobs - wide).mean() for logprobs in on_both(run, half, tokens)]
    assert off[0] < 1.5 * off[1]


@pytest.mark.parametrize(("activation", "k"), [("jumprelu", None), ("topk", 32)])
def test_the_same_features_fire(activation, k):
    """Of 262,144 pre-activations a rounded product would move dozens past a threshold, or a rank."""
    n, width, features = 64, 1024, 4096
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "W_enc": jax.random.normal(keys[0], (1, width, features)) / width**0.5,
        "W_dec": jax.random.normal(keys[1], (1, features, width)) / features**0.5,
        "b_enc": jnp.zeros((1, features)), "b_dec": jnp.zeros((1, width)),
    }  # fmt: skip
    params |= {"threshold": jnp.full((1, features), 1.0)} if activation == "jumprelu" else {}
    config = SAEConfig(d_in=width, d_sae=features, activation=activation, layers=(0,), k=k)

    def run(params, x):
        saes = SAE(params, config)
        return saes.encode(x), jm.collect.feature_totals(saes, x)

    (z, totals), (z_cpu, totals_cpu) = on_both(run, params, jax.random.normal(keys[2], (1, n, width)))
    assert ((z != 0) != (z_cpu != 0)).sum() <= 2
    assert np.abs(totals.fired - totals_cpu.fired).sum() <= 2
    np.testing.assert_allclose(totals.total, z.sum(1), rtol=1e-4, atol=1e-4)
    fired = (z != 0) & (z_cpu != 0)
    assert_close(z[fired], z_cpu[fired], 1e-5)


@pytest.mark.parametrize("where", ["last", "everywhere"])
def test_a_sweep_is_each_point_alone_and_the_cpus(lm, prompts, where):
    spans = at_last(L, prompts.tokens.shape[1]) if where == "last" else everywhere(L)
    points = (np.linspace(-3, 3, 7, dtype=np.float32), np.asarray(jax.random.normal(jax.random.key(1), (7, L, D))))

    def run(params, prompts, points, spans):
        return jm.sweep(lm.config, params, prompts, Partial(steered, spans=spans), points, chunk=4).logprobs

    got, want = on_both(run, lm.params, prompts, points, spans)
    np.testing.assert_allclose(got, want, atol=1e-3)
    alone = one_by_one(lm, prompts, [steered(point, spans) for point in zip(*points, strict=True)])
    np.testing.assert_allclose(got, alone, atol=2e-4)


def test_gradients_are_the_cpus(lm, prompts):
    def run(params, prompts, values):
        return attribution.residual_gradient(lm.config, params, prompts, values)

    assert_close(*on_both(run, lm.params, prompts, VALUES), 1e-4)


def test_cached_decoding_is_recomputation(lm, tokens):
    ids = jm.generate(lm.config, lm.params, tokens, max_new_tokens=8, eos_ids=())
    text = tokens
    for new in ids.T:
        logits = jm.forward(lm.config, lm.params, text).logits
        taken = jnp.take_along_axis(logits, new[:, None], 1)[:, 0]
        np.testing.assert_allclose(taken, logits.max(-1), atol=1e-4)
        text = jnp.concatenate([text, new[:, None]], 1)
