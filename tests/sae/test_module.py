"""Encode and decode against NumPy formulas; stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmech.sae.module import (
    SAE,
    SAEConfig,
    SparseCoder,
    make_sae,
    param_shapes,
    stack_saes,
)

D, F = 6, 20


def random_sae(activation="jumprelu", layers=(3,), seed=0, subtract=True, **options):
    rng = np.random.default_rng(seed)
    if activation == "topk":
        options.setdefault("k", 4)
    config = SAEConfig(D, F, activation=activation, layers=layers, subtract_b_dec=subtract, **options)
    lead = (len(layers),) if len(layers) > 1 else ()
    params = {n: rng.normal(size=lead + s).astype(np.float32) for n, s in param_shapes(config).items()}
    return make_sae(params, config)


def numpy_encode(sae, x):
    p = {name: np.asarray(leaf, np.float64) for name, leaf in sae.params.items()}
    pre = (x - p["b_dec"] * sae.config.subtract_b_dec) @ p["W_enc"] + p["b_enc"]
    if sae.config.activation == "relu":
        return np.maximum(pre, 0)
    if sae.config.activation == "jumprelu":
        return np.maximum(pre, 0) * (pre > p["threshold"])
    out = np.zeros_like(pre)
    for row, order in zip(np.ndindex(pre.shape[:-1]), np.argsort(-pre, axis=-1).reshape(-1, F), strict=True):
        keep = order[: sae.config.k]
        out[row][keep] = np.maximum(pre[row][keep], 0)
    return out


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_formulas(activation, subtract):
    sae = random_sae(activation, subtract=subtract)
    x = np.random.default_rng(1).normal(size=(3, 5, D)).astype(np.float32)
    f = numpy_encode(sae, x)
    y = f @ np.asarray(sae.params["W_dec"]) + np.asarray(sae.params["b_dec"])
    np.testing.assert_array_equal(np.asarray(sae.encode(x)) > 0, f > 0)
    np.testing.assert_allclose(sae.encode(x), f, atol=1e-5)
    np.testing.assert_allclose(sae.decode(f), y, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda s, x: s(x))(sae, x), y, atol=1e-4)


def test_jumprelu_is_strict_and_never_negative():
    config = SAEConfig(2, 3, subtract_b_dec=False)
    threshold = np.array([0.5, 0.5, -2.0])
    params = {
        "W_enc": np.eye(2, 3),
        "b_enc": np.array([0, 0, -1.0]),
        "W_dec": np.ones((3, 2)),
        "b_dec": np.zeros(2),
    }
    sae = make_sae(params | {"threshold": threshold}, config)
    np.testing.assert_array_equal(sae.encode(jnp.array([0.5, 0.75])), [0.0, 0.75, 0.0])


def test_topk_ties_keep_exactly_k():
    config = SAEConfig(1, 5, activation="topk", k=2, subtract_b_dec=False)
    params = {"W_enc": np.ones((1, 5)), "b_enc": np.zeros(5), "W_dec": np.ones((5, 1)), "b_dec": np.zeros(1)}
    np.testing.assert_array_equal(
        make_sae(params, config).encode(jnp.array([[3.0], [-1.0]])), [[3, 3, 0, 0, 0], [0] * 5]
    )


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_stack_is_each_layer_alone(activation):
    singles = [random_sae(activation, layers=(layer,), seed=layer) for layer in (2, 7, 4)]
    stack = stack_saes(singles)
    assert stack.config.layers == (2, 7, 4) and stack.stacked
    x = np.random.default_rng(1).normal(size=(3, 8, D)).astype(np.float32)
    # allclose, not equal: a batched product may sum in another order than a single one
    for row, single in enumerate(singles):
        np.testing.assert_allclose(stack.encode(x)[row], single.encode(x[row]), atol=1e-5)
        np.testing.assert_allclose(stack(x)[row], stack.at(single.config.layers[0])(x[row]), atol=1e-5)
    scanned = jax.lax.scan(lambda _, inputs: (None, inputs[0](inputs[1])), None, (stack, x))[1]
    np.testing.assert_allclose(scanned, stack(x), atol=1e-5)


def test_refusals_say_what_was_expected():
    sae = random_sae()
    with pytest.raises(ValueError) as error:
        make_sae(
            {"W_enc": np.zeros((F, D)), "b_enc": np.zeros(F), "W_skip": 0, "W_dec": np.zeros((F, D))},
            sae.config,
        )
    for part in (
        "W_enc: expected (6, 20), got (20, 6)",
        "b_dec: missing",
        "threshold: missing",
        "W_skip: unknown",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"expects \[\.\.\., 6\], got shape \(4, 7\)"):
        sae.encode(jnp.zeros((4, 7)))
    with pytest.raises(ValueError, match=r"expects \[2, \.\.\., 6\]"):
        random_sae(layers=(0, 1)).encode(jnp.zeros((4, 6)))
    with pytest.raises(ValueError, match="differ in d_sae"):
        stack_saes([sae, SAE(sae.params, SAEConfig(D, F + 1, layers=(4,)))])
    with pytest.raises(ValueError, match="layer: this stack has layers"):
        sae.at(9)
    for wrong in (
        {"activation": "gelu"},
        {"k": 3},
        {"activation": "topk", "k": 99},
        {"layers": (1, 1)},
        {"d_out": 3},
    ):
        with pytest.raises(ValueError):
            SAEConfig(D, F, **wrong)


def test_linen_module_initialises_the_canonical_tree():
    config = SAEConfig(D, F)
    boxed = SparseCoder(config).init(jax.random.key(0), jnp.zeros(D))["params"]
    assert {n: v.shape for n, v in nn.meta.unbox(boxed).items()} == param_shapes(config)
    assert nn.get_partition_spec(boxed)["W_enc"] == jax.sharding.PartitionSpec("embed", "feature")
    assert hash(config) == hash(SAEConfig(D, F))
