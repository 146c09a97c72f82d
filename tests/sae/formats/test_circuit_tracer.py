"""circuit-tracer's per-layer transcoders, written by hand: the numbers of their definition, and faults named."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from jaxmech.sae.formats import load_sae, load_saes

D, F, K = 6, 20, 4
CONFIG = """model_name: "Qwen/Qwen3-4B"
model_kind: "transcoder_set"
feature_input_hook: "mlp.hook_in"
feature_output_hook: "mlp.hook_out"
scan: "someone/transcoders"
"""


def tensors(seed=0, skip=False, threshold=False, d_out=D):
    rng = np.random.default_rng(seed)
    raw = {
        "W_enc": rng.normal(size=(F, D)),
        "b_enc": rng.normal(size=F),
        "W_dec": rng.normal(size=(F, d_out)) * rng.uniform(0.2, 3, (F, 1)),
        "b_dec": rng.normal(size=d_out),
    }
    if skip:
        raw["W_skip"] = rng.normal(size=(d_out, D))
    if threshold:
        raw["activation_function.threshold"] = rng.uniform(0, 1, F)
    return {name: jnp.asarray(value, jnp.bfloat16) for name, value in raw.items()}


def write(root, layers=(0,), config=CONFIG, weights=tensors, **options):
    for layer in layers:
        save_file(weights(layer, **options), root / f"layer_{layer}.safetensors")
    if config:
        (root / "config.yaml").write_text(config)
    return root


def check(sae, w, k=None):
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    x = np.random.default_rng(5).normal(size=(50, D)) * 2
    pre = x @ w["W_enc"].T + w["b_enc"]
    if "activation_function.threshold" in w:
        f = pre * (pre > w["activation_function.threshold"])
    elif k:
        f = np.where(pre >= np.sort(pre, axis=1)[:, -k, None], pre, 0)
        assert (f >= 0).all()  # so that a ReLU makes no difference
    else:
        f = np.maximum(pre, 0)
    y = f @ w["W_dec"] + w["b_dec"]
    if "W_skip" in w:
        y = y + x @ w["W_skip"].T
    x = x.astype(np.float32)
    got = np.asarray(sae.encode(x))
    np.testing.assert_array_equal(got > 0, f > 0)
    np.testing.assert_allclose(got, f, atol=1e-4)
    np.testing.assert_allclose(sae.decode(got, x), y, atol=1e-4)
    np.testing.assert_allclose(sae(x), y, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("d_out", [D, D - 1])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_all_layers_of_a_folder(threshold, skip, d_out, tmp_path):
    options = dict(threshold=threshold, skip=skip, d_out=d_out)
    stack = load_saes(write(tmp_path, (0, 1, 2), **options))
    c = stack.config
    assert (c.layers, c.site, c.site_out, c.model) == ((0, 1, 2), "mlp_in", "mlp_out", "Qwen/Qwen3-4B")
    assert (c.activation, c.skip, c.subtract_b_dec) == ("jumprelu" if threshold else "relu", skip, False)
    for layer in range(3):
        check(stack.at(layer), tensors(layer, **options))
    check(load_sae(tmp_path, layer=1), tensors(1, **options))
    check(load_sae(tmp_path / "layer_2.safetensors"), tensors(2, **options))
    assert load_saes(tmp_path, layers=[2, 0]).config.layers == (2, 0)


@pytest.mark.parametrize("where", ["config", "file", "caller"])
def test_topk(where, tmp_path):
    def weights(seed):
        return tensors(seed) | ({"k": jnp.asarray(K)} if where == "file" else {})

    config = CONFIG + "activation: topk\n" + (f"k: {K}\n" if where == "config" else "")
    folder = write(tmp_path, config=config, weights=weights)
    sae = load_sae(folder, k=K if where == "caller" else None)
    assert (sae.config.activation, sae.config.k) == ("topk", K)
    check(sae, tensors(), K)
    with pytest.raises(ValueError, match="k: the files say 4|nothing in it says its k"):
        load_sae(folder, k=None if where == "caller" else 5)


@pytest.mark.parametrize(
    "hook, site",
    [
        ("hook_resid_mid", "resid_mid"),
        ("ln2.hook_normalized", "mlp_normed"),
        ("blocks.{layer}.hook_resid_pre", "resid_pre"),
    ],
)
def test_input_hooks(hook, site, tmp_path):
    folder = write(tmp_path, config=CONFIG.replace("mlp.hook_in", hook).replace("mlp.hook_out", "hook_mlp_out"))
    assert load_sae(folder).config.site == site


def test_without_a_configuration_the_caller_says_the_site(tmp_path):
    folder = write(tmp_path, config=None)
    with pytest.raises(ValueError, match="nothing in it says its site"):
        load_sae(folder)
    sae = load_sae(folder, site="mlp_in", model="Qwen/Qwen3-14B")
    assert (sae.config.site, sae.config.site_out, sae.config.model) == ("mlp_in", "mlp_out", "Qwen/Qwen3-14B")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("transcoder_set", "cross_layer_transcoder", "cross-layer transcoder.*not supported"),
        ("transcoder_set", "other", "model_kind: expected 'transcoder_set', got 'other'"),
        ("mlp.hook_in", "hook_mlp_in", "feature_input_hook: 'hook_mlp_in' is not a known site"),
        ("Qwen/Qwen3-4B", "google/gemma-2-2b", "feature_output_hook: 'mlp.hook_out' is not a known site"),
        ("scan:", "colour:", "colour: unknown key"),
        ("scan:", "activation: gelu\nscan:", "activation: expected relu, topk"),
        ("scan:", "activation: relu\nscan:", "activation_function.threshold: unknown tensor"),
        ("scan:", "transcoders: ['hf://a/b/layer_0/params.npz']\nscan:", r"load_saes\(\['a/b/layer_0', "),
        ("model_name:", "model_name: [", "config.yaml is damaged"),
    ],
)
def test_faults_of_the_configuration(old, new, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_sae(write(tmp_path, config=CONFIG.replace(old, new), threshold=True))


def test_cross_layer_files_are_refused_by_name(tmp_path):
    for layer in range(2):
        save_file({f"W_enc_{layer}": jnp.ones((F, D))}, tmp_path / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": jnp.ones((F, 2 - layer, D))}, tmp_path / f"W_dec_{layer}.safetensors")
    with pytest.raises(ValueError, match="a cross-layer transcoder"):
        load_saes(tmp_path)


def test_contradictions_and_damage(tmp_path):
    folder = write(tmp_path, (3,))
    for said in ({"site": "mlp_out"}, {"layer": 4}, {"model": "gpt2"}):
        with pytest.raises(ValueError, match="the files say"):
            load_sae(folder / "layer_3.safetensors", **said)
    path = folder / "layer_3.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="layer_3.safetensors is damaged or truncated"):
        load_sae(folder)


def test_faults_of_the_tensors_at_once(tmp_path):
    def weights(seed):
        w = tensors(seed, skip=True, d_out=D - 1)
        w["W_skip"], w["b_gate"] = w["W_skip"].T, w.pop("b_enc")
        return w | {"b_dec": w["b_dec"].at[0].set(jnp.inf)}

    with pytest.raises(ValueError) as error:
        load_sae(write(tmp_path, weights=weights))
    for fault in (
        "W_skip: expected (5, 6), got (6, 5)",
        "b_gate: unknown tensor",
        "b_enc: missing",
        "b_dec: 1 values are NaN or infinite",
    ):
        assert fault in str(error.value)


def test_negative_thresholds_are_refused(tmp_path):
    def weights(seed):
        w = tensors(seed, threshold=True)
        return w | {"activation_function.threshold": -w["activation_function.threshold"]}

    with pytest.raises(ValueError, match="activation_function.threshold: negative"):
        load_sae(write(tmp_path, weights=weights))


@pytest.mark.parametrize("said", [{"k": 4}, {"batch_topk": True}])
def test_what_is_for_topk_dictionaries_is_refused(said, tmp_path):
    folder = write(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(said))}: for TopK dictionaries"):
        load_sae(folder, **said)
