"""W1, the residual stream after every layer, and W2, what every feature of every layer's dictionary does on it."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import torch

import jaxmech as jm
from jaxmech.sae.collect import distinct_residuals
from jaxmech.sae.collect import residuals as run_residuals
from peers.bench import APART, Bench, real_tokens, shared_flops, to_torch
from peers.flops import text_flops
from peers.results import Row
from peers.timing import Peer, compare, relative


def residuals(bench: Bench) -> list[Row]:
    """W1."""
    config, params, prompts, tokens = bench.lm.config, bench.lm.params, bench.prompts, jnp.asarray(bench.tokens)
    B, T = tokens.shape
    theirs, real = to_torch(tokens).long(), real_tokens(prompts)

    def ours():
        return run_residuals(config, params, prompts)

    def alone():
        return jm.forward(config, params, tokens, taps=("resid_post",), logits="none").taps["resid_post"]

    def own(result):
        """[L,B,T,D]: the prompts' tokens without padding."""
        return np.asarray(result)[:, real].reshape(config.n_layers, B, T, -1)

    def bridge(**options):
        cache = bench.bridge.run_with_cache(
            theirs, names_filter=lambda name: name.count(".") == 2 and name.endswith(".hook_out"), **options
        )[1]
        return [cache[f"blocks.{layer}.hook_out"] for layer in range(config.n_layers)]

    def hidden_states(kind):
        bench.hf.set_attn_implementation(kind)
        return bench.hf.model(theirs, output_hidden_states=True, use_cache=False).hidden_states[1:]

    def after_norm(result, peer):
        """HF norms the last of them."""
        result = own(result)
        last = bench.hf.model.norm(to_torch(result[-1]))
        return max(relative(result[:-1], torch.stack(peer[:-1])), relative(last, peer[-1]))

    def same(result, peer):
        return relative(own(result), torch.stack(peer))

    with torch.no_grad():
        return compare(
            "W1",
            f"residuals after every layer, {B} prompts of {T} tokens",
            ours,
            [
                Peer("TransformerLens run_with_cache", bridge, same, 4, most=3,
                     note="the bridge, residuals alone kept; it computes the logits of all positions, as by default"),
                Peer("TransformerLens run_with_cache, logits_to_keep=1", partial(bridge, logits_to_keep=1), same),
                Peer("HF output_hidden_states, sdpa", partial(hidden_states, "sdpa"), after_norm, 1.5),
                Peer("HF output_hidden_states, eager", partial(hidden_states, "eager"), after_norm),
                Peer("jaxmech, nothing shared", alone, lambda a, b: relative(own(a), b), note=APART),
            ],
            runs=bench.runs,
            flops=B * text_flops(config, T) - shared_flops(config, prompts),
        )  # fmt: skip


def encoding(bench: Bench) -> list[Row]:
    """W2."""
    config, F = bench.lm.config, bench.sizes.features
    resid = bench.residuals.reshape(config.n_layers, -1, config.d_model)
    n, theirs = resid.shape[1], to_torch(resid)
    x, count = distinct_residuals(config, bench.lm.params, bench.prompts)
    distinct, count = x[:, count > 0], count[count > 0]  # no padding, as the peer has none

    def ours():
        return jm.collect.feature_totals(bench.saes, distinct, count=count)

    def alone():
        return jm.collect.feature_totals(bench.saes, resid)

    def saelens():
        codes = (sae.encode(x) for sae, x in zip(bench.peer_saes, theirs, strict=True))
        totals = [(f.sum(0), (f > 0).sum(0)) for f in codes]
        return [torch.stack(part) for part in zip(*totals, strict=True)]

    def difference(result, peer):
        """Of the sum of all. A rounding more or less takes a few of a thousand million codes over their threshold."""
        pairs = ((np.asarray(a), np.asarray(b)) for a, b in zip(result, peer, strict=True))
        return max(float(np.abs(a - b).sum() / b.sum()) for a, b in pairs)

    with torch.no_grad():
        rows = compare(
            "W2",
            f"sums and firings of {F:,} JumpReLU features at {config.n_layers} layers, {n:,} tokens",
            ours,
            [
                Peer("SAELens encode", saelens, difference, 1.5, most=3),
                Peer("jaxmech, nothing shared", alone, difference, note=APART),
            ],
            runs=bench.runs,
            flops=2.0 * config.n_layers * len(count) * config.d_model * F,
            tolerance=1e-4,
        )
    fired = float(np.asarray(ours().fired).sum()) / n / config.n_layers
    for row in rows:
        row.figures["features firing on a token"] = fired
        row.figures["tokens encoded"] = float(len(count))
    return rows
