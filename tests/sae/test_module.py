"""Encode and decode against NumPy formulas; stacks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmech.sae.module import (
    ACTIVATIONS,
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
    if activation.endswith("topk"):
        options.setdefault("k", 4)
    config = SAEConfig(D, F, activation=activation, layers=layers, subtract_b_dec=subtract, **options)
    lead = (len(layers),) if len(layers) > 1 else ()
    params = {n: rng.normal(size=lead + s).astype(np.float32) for n, s in param_shapes(config).items()}
    return make_sae(params, config)


def random_x():
    return np.random.default_rng(1).normal(size=(3, 5, D)).astype(np.float32)


def numpy_normalise(kind, x):
    """n(x), scale and shift."""
    if kind == "none":
        return x, 1.0, 0.0
    if kind == "norm":
        scale = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(x.shape[-1])
        return x / scale, scale, 0.0
    shift, scale = x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)
    return (x - shift) / (scale + 1e-5), scale, shift


def numpy_encode(sae, x):
    c, p = sae.config, {name: np.asarray(leaf, np.float64) for name, leaf in sae.params.items()}
    x = numpy_normalise(c.normalize, x.astype(np.float64))[0]
    pre = (x - p["b_dec"] if c.subtract_b_dec else x) @ p["W_enc"] + p["b_enc"]
    if c.activation == "relu":
        return np.maximum(pre, 0)
    if c.activation == "jumprelu":
        return np.maximum(pre, 0) * (pre > p["threshold"])
    if c.activation == "batchtopk":
        n = int(c.k * pre.size / F)
        return np.where(pre >= np.sort(np.maximum(pre, 0), axis=None)[-n], np.maximum(pre, 0), 0)
    signed = c.activation == "abstopk"
    order = np.argsort(-np.abs(pre) if signed else -pre, axis=-1)[..., : c.k]
    kept = np.take_along_axis(pre, order, -1)
    out = np.zeros_like(pre)
    np.put_along_axis(out, order, kept if signed else np.maximum(kept, 0), -1)
    return out


def numpy_decode(sae, f, x):
    p = {name: np.asarray(leaf, np.float64) for name, leaf in sae.params.items()}
    x, scale, shift = numpy_normalise(sae.config.normalize, x.astype(np.float64))
    y = f @ p["W_dec"] + p["b_dec"]
    return (y + x @ p["W_skip"] if sae.config.skip else y) * scale + shift


def compare(sae, x):
    f = numpy_encode(sae, x)
    y = numpy_decode(sae, f, x)
    np.testing.assert_array_equal(np.asarray(sae.encode(x)) != 0, f != 0)
    np.testing.assert_allclose(sae.encode(x), f, atol=1e-5)
    np.testing.assert_allclose(sae.decode(jnp.asarray(f), x), y, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda s, x: s(x))(sae, x), y, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "abstopk", "batchtopk"])
def test_formulas(activation, subtract):
    compare(random_sae(activation, subtract=subtract), random_x())


@pytest.mark.parametrize("normalize", ["norm", "layer_norm"])
@pytest.mark.parametrize("options", [{}, {"skip": True}, {"subtract": False, "skip": True, "d_out": 9}])
def test_normalised_tokens_and_skip_terms(normalize, options):
    compare(random_sae(normalize=normalize, **options), 3 + 2 * random_x())


def test_a_batchtopk_code_may_keep_a_fraction_more_than_whole_features():
    sae, x = random_sae("batchtopk", k=2.5), random_x()
    assert np.count_nonzero(sae.encode(x)) == int(2.5 * 15)
    compare(sae, x)
    assert np.isfinite(jax.grad(lambda x: sae(x).sum())(jnp.asarray(x))).all()


def test_decoding_asks_for_the_input_where_it_needs_it():
    for options, why in [({"skip": True}, "skip term"), ({"normalize": "layer_norm"}, "layer_norm")]:
        with pytest.raises(ValueError, match=rf"{why}.*decode\(f, x\)"):
            random_sae(**options).decode(jnp.zeros((2, F)))
    with pytest.raises(ValueError, match="x: decode of a single dictionary expects"):
        random_sae(skip=True).decode(jnp.zeros((2, F)), jnp.zeros((2, D + 1)))


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


@pytest.mark.slow
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_token_that_is_no_number_stays_none_and_disturbs_no_other(activation, sign):
    sae, x = random_sae(activation), random_x().reshape(15, D)
    expected = np.asarray(sae.encode(x))
    bad = x.copy()
    bad[4] = np.copysign(np.nan, sign)
    code = np.asarray(sae.encode(bad))
    assert np.isnan(code[4]).all() and np.isnan(np.asarray(sae(bad))[4]).all()
    others = np.delete(np.arange(15), 4)
    assert np.isfinite(code[others]).all()
    if activation == "batchtopk":  # its places go to the next in line: the 4 * 15 largest of the others
        pre = numpy_encode(
            dataclasses.replace(sae, config=dataclasses.replace(sae.config, activation="relu", k=None)), x
        )
        largest = np.sort(pre[others], axis=None)[-4 * 15 :]
        np.testing.assert_allclose(np.sort(code[others][code[others] > 0]), largest[largest > 0], rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(code[others], expected[others])


def test_numbers_of_a_configuration_are_pythons_own():
    config = SAEConfig(np.int64(D), np.int32(F), activation="batchtopk", k=np.float32(2.5), layers=np.array([1, 3]),
                       l0=np.array([2.5, 3.0]), skip_first=np.int8(1))  # fmt: skip
    assert config == SAEConfig(D, F, activation="batchtopk", k=2.5, layers=(1, 3), l0=(2.5, 3.0))
    assert repr(config) == repr(SAEConfig(D, F, activation="batchtopk", k=2.5, layers=(1, 3), l0=(2.5, 3.0)))
    json.dumps(dataclasses.asdict(config))
    for change in ({"layers": ("1", "3")}, {"layers": "13"}, {"layers": (1.7,)}, {"d_sae": 40.0}, {"k": "4"}):
        name = next(iter(change))
        with pytest.raises(ValueError, match=f"{name}: expected"):
            SAEConfig(**({"d_in": D, "d_sae": F, "activation": "batchtopk", "k": 2} | change))


def test_another_width_is_named_with_the_argument():
    single, stack = random_sae(), random_sae(layers=(3, 5))
    with pytest.raises(ValueError, match=r"x: encode of a single dictionary expects \[..., 6\], got shape \(4, 7\)"):
        single.encode(np.zeros((4, 7)))
    with pytest.raises(ValueError, match=r"f: decode of a single dictionary expects \[..., 20\], got shape \(6,\)"):
        single.decode([0.0] * D)
    with pytest.raises(ValueError, match=r"x: encode of a stack over 2 layers .*got shape \(4, 6\); .*sae.at\(layer\)"):
        stack.encode(np.zeros((4, 6)))
    np.testing.assert_array_equal(single.encode(random_x().tolist()), single.encode(random_x()))


def test_batchtopk_under_64_bit_jax_is_the_same():
    sae, x = random_sae("batchtopk"), random_x()
    expected = np.asarray(sae.encode(x))
    with jax.enable_x64(True):
        got = sae.encode(x)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)
