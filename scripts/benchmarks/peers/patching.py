"""W3: a few features of every layer take a donor's values at the last position, and the error term stays."""

from __future__ import annotations

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxmech as jm
from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import before_last
from jaxmech.interventions import edits
from peers.bench import APART, Bench, shared_flops, to_torch
from peers.flops import text_flops, unembed_flops
from peers.results import Row
from peers.timing import Peer, compare, relative


@partial(jax.jit, static_argnums=0)
def patched_logits(config, params, prompts: Prompts, saes: jm.SAE, selection: edits.Selection, values: jax.Array):
    """Next-token logits [B,V] with the chosen features at the donors' values [L,B,K]."""
    prompts = before_last(config, params, prompts)
    edit = edits.features(saes, selection, gain=0.0, shift=values, spans=edits.at_last(config.n_layers, 1))
    out = jm.forward(
        config, params, prompts.tokens, mask=prompts.mask, cache=prompts.cache, edits={saes.config.site_out: (edit,)}
    )
    return out.logits


@contextlib.contextmanager
def hooked(model, hook_of):
    """HF's layers with the forward hook `hook_of(layer)` each."""
    handles = [layer.register_forward_hook(hook_of(i)) for i, layer in enumerate(model.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Patch:
    """The peers' ways of setting features `index [L,K]` to `values [L,B,K]`."""

    def __init__(self, bench: Bench, index: np.ndarray, values: np.ndarray):
        self.bench, self.tokens = bench, to_torch(bench.tokens).long()
        self.index, self.values = to_torch(index).long(), to_torch(values)

    def every_position(self) -> torch.Tensor:
        """The dictionaries attached to the model, and a hook on their codes."""

        def put(acts, hook, layer):
            acts[:, -1, self.index[layer]] = self.values[layer]
            return acts

        saes = self.bench.peer_saes
        for sae in saes:
            sae.use_error_term = True
        hooks = [(f"blocks.{i}.hook_out.hook_sae_acts_post", partial(put, layer=i)) for i in range(len(saes))]
        logits = self.bench.bridge.run_with_hooks_with_saes(
            self.tokens, saes=saes, fwd_hooks=hooks, logits_to_keep=1
        )  # fmt: skip
        return logits[:, -1]

    def last_position(self) -> torch.Tensor:
        """The dictionaries' own encode and decode, on the last position alone."""

        def hook_of(layer):
            sae = self.bench.peer_saes[layer]

            def hook(_, __, out):
                x = out[:, -1]
                acts = sae.encode(x)
                error = x - sae.decode(acts)
                acts[:, self.index[layer]] = self.values[layer]
                out[:, -1] = sae.decode(acts) + error
                return out

            return hook

        return self._logits(hook_of)

    def chosen_alone(self) -> torch.Tensor:
        """By hand: the chosen features' weights alone."""

        def hook_of(layer):
            sae, index = self.bench.peer_saes[layer], self.index[layer]
            W_enc, W_dec = sae.W_enc[:, index], sae.W_dec[index]
            b_enc, threshold = sae.b_enc[index], sae.threshold[index]

            def hook(_, __, out):
                pre = (out[:, -1] - sae.b_dec) @ W_enc + b_enc
                z = torch.where(pre > threshold, pre.relu(), 0.0)
                out[:, -1] += (self.values[layer] - z) @ W_dec
                return out

            return hook

        return self._logits(hook_of)

    def _logits(self, hook_of) -> torch.Tensor:
        with hooked(self.bench.hf, hook_of):
            return self.bench.hf(self.tokens, use_cache=False, logits_to_keep=1).logits[:, -1]


def patching(bench: Bench) -> list[Row]:
    """W3."""
    config, params, K = bench.lm.config, bench.lm.params, bench.sizes.chosen
    prompts, tokens, saes = bench.prompts, jnp.asarray(bench.tokens), bench.saes
    alone = prompts._replace(tokens=tokens, mask=jnp.ones(tokens.shape, bool), prefix=None)
    B, T = tokens.shape
    # Donors: each prompt's neighbour. Chosen are the features that fire most strongly on them.
    donor = jax.block_until_ready(saes.encode(jnp.roll(bench.residuals[:, :, -1], 1, axis=1)))
    index = np.argsort(-np.asarray(donor.sum(1)), axis=1)[:, :K].astype(np.int32)
    values = jnp.take_along_axis(donor, jnp.asarray(index)[:, None], axis=2)
    selection = edits.Selection(jnp.asarray(index), jnp.ones(index.shape, bool))
    patch = Patch(bench, index, np.asarray(values))

    def ours(prompts):
        return patched_logits(config, params, prompts, saes, selection, values)

    bench.hf.set_attn_implementation("sdpa")
    with torch.no_grad():
        return compare(
            "W3",
            f"{K} features per layer from donors, last position, {config.n_layers} layers, {B} prompts of {T} tokens",
            partial(ours, prompts),
            [
                Peer("SAELens, every position", patch.every_position, relative, 10, most=2,
                     note="run_with_hooks_with_saes with the error term"),
                Peer("SAELens objects, last position", patch.last_position, relative, 1.6),
                Peer("hand-made hooks, the chosen features alone", patch.chosen_alone, relative, 1.5),
                Peer("jaxmech, nothing shared", partial(ours, alone), relative, note=APART),
            ],
            runs=bench.runs,
            flops=B * (text_flops(config, T) + unembed_flops(config)) - shared_flops(config, prompts),
        )  # fmt: skip
