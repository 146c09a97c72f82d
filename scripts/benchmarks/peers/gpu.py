"""9B shapes with random weights in bfloat16: how much of a device prefill, decoding and sweeps use.

`B` denotes prompts, `T` their tokens, `S` sweep points.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmech as jm
from jaxmech.answers.prompts import Prefix
from jaxmech.answers.trie import Trie
from jaxmech.interventions.edits import add_vector, at_last
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import param_shapes
from jaxmech.models.families import config_from_hf
from peers.flops import text_flops, unembed_flops
from peers.results import Row
from peers.timing import seconds_of

PUBLISHED = Path(__file__).resolve().parents[3] / "tests" / "goldens" / "published.json"
MODELS = {"gemma-2-9b": "Gemma 2 9B", "llama-3.1-8b": "Llama 3.1 8B"}
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


class Device(NamedTuple):
    """Of a kind of device: TFLOP/s of dense bfloat16 products, and TB/s of its memory, as its data sheet says."""

    tflops: float
    bandwidth: float


KINDS = {
    "GB200": Device(2500, 8.0), "B200": Device(2250, 8.0), "H200": Device(989, 4.8), "H100 PCIe": Device(756, 2.0),
    "H100": Device(989, 3.35), "GH200": Device(989, 4.0), "A100-SXM4-80GB": Device(312, 2.039),
    "A100 80GB": Device(312, 1.935), "A100": Device(312, 1.555), "L40S": Device(362, 0.864), "L4": Device(121, 0.3),
    "RTX 4090": Device(165, 1.008),
}  # fmt: skip
"""A device is the first of these that stands in its kind."""


class Sizes(NamedTuple):
    """prompts x tokens of the prefill; new tokens of decoding, behind prompts of as many tokens, for `rows` prompts;
    points x prompts of the sweep, whose worked examples have `examples` tokens."""

    prompts: int = 8
    tokens: int = 1024
    rows: int = 8
    new: int = 128
    points: int = 256
    asked: int = 16
    families: int = 4
    examples: int = 384


QUICK = Sizes(prompts=2, tokens=32, rows=2, new=16, points=8, asked=4, families=2, examples=24)


def device() -> dict[str, Any]:
    """The device as part of the machine's description."""
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def stated() -> Device | None:
    """What the data sheet says of this device, None where that is not known here."""
    kind = jax.devices()[0].device_kind
    return next((facts for name, facts in KINDS.items() if name in kind), None)


def config_of(name: str, *, quick: bool) -> ModelConfig:
    published = json.loads(PUBLISHED.read_text())[name]["config"]
    return config_from_hf(published | SMALL if quick else published)


@partial(jax.jit, static_argnums=0)
def random_params(config: ModelConfig, key: jax.Array):
    """Normal weights in bfloat16; norms that do nothing."""

    def leaf(path, shape, key):
        if path[-1].key == "scale":
            return jnp.full(shape.shape, 1.0 - config.norm_offset, jnp.bfloat16)
        return 0.02 * jax.random.normal(key, shape.shape, jnp.bfloat16)

    shapes = param_shapes(config)
    keys = jax.tree.unflatten(jax.tree.structure(shapes), list(jax.random.split(key, len(jax.tree.leaves(shapes)))))
    return jax.tree_util.tree_map_with_path(leaf, shapes, keys)


def products(n: int, repeats: int = 10) -> float:
    """TFLOP/s of a dense product of two [n,n] bfloat16 matrices, the best of several."""
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / min(seconds_of(lambda: product(a, a))[0] for _ in range(repeats)) / 1e12


def copies(size: int, repeats: int = 10) -> float:
    """TB/s moved when `size` bytes are read and as many written, the best of several."""
    a, add = jnp.zeros(size // 4), jax.jit(lambda a: a + 1)
    return 2 * size / min(seconds_of(lambda: add(a))[0] for _ in range(repeats)) / 1e12


def answers(B: int, vocab_size: int) -> Trie:
    """The amounts 0 to 10 as a small vocabulary of digits, tokens 10 to 19, would spell them, each with two separators,
    tokens 20 and 21, after it."""
    amounts = np.array([*range(10, 20), 10], np.int32)
    parent = np.array([*[0] * 10, 2, *np.repeat(np.arange(1, 12), 2)], np.int32)  # "10" stands under "1"
    nodes = np.array([*amounts, *np.tile([20, 21], 11)], np.int32)
    depth, ancestors = np.ones(len(nodes), np.int32), np.eye(len(nodes), dtype=bool)
    for node, above in enumerate(parent):
        if above:
            depth[node] += depth[above - 1]
            ancestors[node] |= ancestors[above - 1]
    cells = np.zeros((11, 2, len(nodes) + 1), bool)
    for n in range(11):
        cells[n, 0, [n + 1, 12 + 2 * n, 13 + 2 * n]] = True
    digit = np.uint8(1)
    every = (nodes, depth, parent, ancestors, np.array([0] + [digit] * len(nodes), np.uint8), cells)
    kinds = jnp.isin(jnp.arange(vocab_size), jnp.arange(10, 20)).astype(jnp.uint8) * digit
    return Trie(*(jnp.broadcast_to(a, (B, *a.shape)) for a in every), kinds)


def rates(*, quick: bool) -> dict[str, float]:
    """What the device can do: measured, and as its data sheet says where that is known here."""
    found = {
        "measured bfloat16 TFLOP/s": products(512 if quick else 8192),
        "measured TB/s": copies(2**24 if quick else 2**31),
    }
    if (facts := stated()) is not None:
        found |= {"stated bfloat16 TFLOP/s": facts.tflops, "stated TB/s": facts.bandwidth}
    return found


def measure(peak: dict[str, float], *, quick: bool, runs: int) -> Iterator[Row]:
    """The rows of both models as they come, with their shares of the rates `peak`."""
    for name, title in MODELS.items():
        yield from _of_model(config_of(name, quick=quick), title, QUICK if quick else Sizes(), runs, peak)


def _of_model(config: ModelConfig, name: str, sizes: Sizes, runs: int, peak: dict[str, float]) -> Iterator[Row]:
    made, params = seconds_of(lambda: random_params(config, jax.random.key(0)))
    prefill = _prefill(config, params, name, sizes, runs, peak)
    prefill.figures["seconds to make random weights"] = made
    yield prefill
    yield _decode(config, params, name, sizes, runs, peak)
    yield _sweep(config, params, name, sizes, runs)


def _timed(run, runs: int) -> tuple[list[float], float]:
    """Seconds of each run but the first, and what the first took beyond their median."""
    first = seconds_of(run)[0]
    seconds = [seconds_of(run)[0] for _ in range(runs)]
    return seconds, max(first - float(np.median(seconds)), 0.0)


def _shares(of: float, peak: dict[str, float], unit: str) -> dict[str, float]:
    """A rate's shares of the stated and of the measured peak."""
    return {f"share of the {kind.split()[0]} {unit}": of / rate for kind, rate in peak.items() if kind.endswith(unit)}


def _prefill(config, params, name: str, sizes: Sizes, runs: int, peak: dict[str, float]) -> Row:
    B, T = sizes.prompts, sizes.tokens
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, config.vocab_size)
    seconds, compiled = _timed(lambda: jm.forward(config, params, tokens, return_cache=True), runs)
    flops = B * (text_flops(config, T) + unembed_flops(config))
    rate = flops / float(np.median(seconds)) / 1e12
    return Row(
        "gpu", f"{name}, prefill, [{B},{T}] tokens", "", seconds, compile_seconds=compiled, flops=flops,
        share=rate / max(value for kind, value in peak.items() if kind.endswith("TFLOP/s")),
        figures={"TFLOP/s": rate, **_shares(rate, peak, "TFLOP/s")},
    )  # fmt: skip


def _decode(config, params, name: str, sizes: Sizes, runs: int, peak: dict[str, float]) -> Row:
    """Two lengths, whose difference is decoding alone."""
    B, n = sizes.rows, sizes.new
    tokens = jax.random.randint(jax.random.key(2), (B, n), 0, config.vocab_size)

    def generate(new):
        return jm.generate(config, params, tokens, max_new_tokens=new, eos_ids=())

    few = n // 2 + 1  # the same program: buckets of new tokens are as long
    whole, compiled = _timed(lambda: generate(n), runs)
    part, _ = _timed(lambda: generate(few), runs)
    step = (float(np.median(whole)) - float(np.median(part))) / (n - few)
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if not config.tied:  # a step reads one row per prompt of the embedding
        read -= params["embed"]["embedding"].nbytes
    seen = n + (few + n) / 2
    read += B * seen * config.n_layers * 2 * config.n_kv_heads * config.head_dim * 2
    rate = read / step / 1e12
    return Row(
        "gpu", f"{name}, decoding, {B} prompts", "", [step], compile_seconds=compiled,
        figures={"tokens/s": B / step, "TB/s": rate, **_shares(rate, peak, "TB/s")},
        note=f"seconds per step, from {n} and {few} new tokens; weights and cache are read once a step",
    )  # fmt: skip


def _sweep(config, params, name: str, sizes: Sizes, runs: int) -> Row:
    S, B, T, G = sizes.points, sizes.asked, 16, sizes.families
    keys = jax.random.split(jax.random.key(3), 3)
    tokens = jax.random.randint(keys[0], (B, T), 0, config.vocab_size)
    examples = jax.random.randint(keys[1], (G, sizes.examples), 0, config.vocab_size)
    prefix = Prefix(examples, jnp.ones(examples.shape, bool), jnp.arange(B) % G)
    prompts = jm.Prompts(tokens, jnp.ones(tokens.shape, bool), answers(B, config.vocab_size), prefix=prefix)
    middle = config.n_layers // 2
    one = add_vector(
        jnp.zeros((config.n_layers, config.d_model)), spans=at_last(config.n_layers, T, [middle])
    )  # fmt: skip
    every = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (S, *leaf.shape)), one)
    vectors = jax.random.normal(keys[2], (S, 1, 1, config.d_model))
    edits = {"resid_post": (every.replace(vector=jnp.broadcast_to(vectors, every.vector.shape)),)}

    seconds, compiled = _timed(lambda: jm.sweep(config, params, prompts, edits).logprobs, runs)
    return Row(
        "gpu", f"{name}, sweep, {S} points × {B} prompts of {sizes.examples + T} tokens", "", seconds,
        compile_seconds=compiled, figures={"points/s": S / float(np.median(seconds))},
        note=f"a vector added after layer {middle}, last position; exact distribution over 11 answers",
    )  # fmt: skip
