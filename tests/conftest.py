"""A tiny random model over characters, so that every identity can be checked in seconds."""

import gc
import os
from pathlib import Path

import jaxlib

# Most of a test's time is the compilation of small programs, which goes four times as fast unoptimised and, on a GPU,
# untuned, and twice as fast again without the CPU's fusion emitters. Eight fake devices are for the tests of sharding;
# whatever asks for no mesh uses the first. Set XLA_FLAGS to test otherwise.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
                      "--xla_gpu_autotune_level=0 --xla_force_host_platform_device_count=8"
                      # XLA ends a process that gives it a flag it does not know.
                      + " --xla_cpu_use_fusion_emitters=false" * jaxlib.__version__.startswith("0.10."))  # fmt: skip

# What is read back from a compilation cache brings pages of warnings about features of the processor that are none.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import jax

del os.environ["TF_CPP_MIN_LOG_LEVEL"]  # what tests start says what it has to say
import jax.numpy as jnp
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.decoder import init_params
from jaxmech.models.language_model import LanguageModel
from jaxmech.sae.module import SAE, SAEConfig

# Tests share what they compile, and the next run of them finds it there: `pytest --cache-clear` takes it away.
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache/programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

ALPHABET = "0123456789 abcdefghijklmnopqrstuvwxyz$.:?\n"


def tiny_config(**changes) -> ModelConfig:
    """Gemma-like in every structural respect: grouped heads, window, two RoPE bases, post-norms, q/k norms."""
    facts = dict(
        family="gemma3", vocab_size=len(ALPHABET) + 1, n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, head_dim=16,
        d_mlp=64, activation="gelu_tanh", norm_eps=1e-6, rope=Rope(1e6), query_scale=0.25, max_positions=256,
        is_local=(True, False, True, True), window=5, rope_local=Rope(1e4), norm_offset=1.0, qk_norm="head",
        post_norms=True, embed_scale=5.65, bos_id=0,
    )  # fmt: skip
    return ModelConfig(**(facts | changes))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() == "cpu":
        pytest.skip("needs an accelerator")
    if item.get_closest_marker("devices") and jax.device_count() < 8:
        pytest.skip("needs eight devices, which only a CPU fakes")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Linux lets a process hold 65,530 memory maps; compiled programs take some each, and beyond that JAX crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tokenizer():
    vocab = {"<bos>": 0} | {c: i + 1 for i, c in enumerate(ALPHABET)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<bos>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>")


@pytest.fixture(scope="session")
def lm(tokenizer):
    config = tiny_config()
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    # Ten times the usual spread, so that the model has opinions and a missing term cannot hide in a flat softmax.
    params = jax.tree.map(lambda p: p * (10.0 if p.ndim > 2 else 1.0), params)
    params["embed"]["embedding"] = params["embed"]["embedding"] * 30
    return LanguageModel(name="tiny", config=config, params=params, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def saes(lm):
    """A stack of JumpReLU dictionaries at layers 1 and 3."""
    D, F, keys = lm.config.d_model, 24, jax.random.split(jax.random.key(7), 4)
    params = {
        "W_enc": jax.random.normal(keys[0], (2, D, F)) / D**0.5,
        "b_enc": 0.1 * jax.random.normal(keys[1], (2, F)),
        "W_dec": jax.random.normal(keys[2], (2, F, D)) / D**0.5,
        "b_dec": 0.1 * jax.random.normal(keys[3], (2, D)),
        "threshold": jnp.full((2, F), 0.05),
    }
    return SAE(params, SAEConfig(d_in=D, d_sae=F, activation="jumprelu", subtract_b_dec=True, layers=(1, 3)))


@pytest.fixture(scope="session")
def tokens(lm):
    return jax.random.randint(jax.random.key(3), (3, 12), 1, lm.config.vocab_size)
