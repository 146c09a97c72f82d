"""What the workloads share: the model here and in the peers, sizes, texts, dictionaries."""

from __future__ import annotations

import copy
import dataclasses
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import torch
from peer_models import NAME, hf_model, keep_off_the_hub
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata

import jaxmech as jm
from jaxmech.answers.prompts import Prefix, Prompts
from jaxmech.behavior.altruism.dictator import BankConfig, build_bank
from jaxmech.sae.module import make_sae
from peers.flops import text_flops

ANSWERS = tuple(str(amount) for amount in range(11))
MIDDLE = 9
"""The layer that is steered at."""


APART = "every prompt its own worked examples, where a family's four prompts share theirs"
"""Of jaxmech without its sharing."""


class Sizes(NamedTuple):
    """length: of a prompt of W1 to W3; features: of a dictionary; chosen: of them, a layer, in W3; coefficients: of W4;
    families, examples: of its prompts, four a family; sampled: points that a peer's loop is timed on;
    tests, flips: of W6; sets: of W7."""

    length: int = 128
    features: int = 16_384
    chosen: int = 8
    coefficients: int = 17
    families: int = 8
    examples: int = 10
    sampled: int = 4
    tests: int = 1_000_000
    flips: int = 1000
    sets: int = 1000


QUICK = Sizes(
    length=48, features=1024, coefficients=3, families=2, examples=2, sampled=2, tests=20_000, flips=100,
    sets=20,
)  # fmt: skip


@dataclasses.dataclass
class Bench:
    """gguf: the model's file; runs: of each side; full: whether the peers' loops run over all points."""

    gguf: Path
    sizes: Sizes
    runs: int
    full: bool

    @cached_property
    def lm(self) -> jm.LanguageModel:
        return jm.load_model(str(self.gguf))

    @cached_property
    def hf(self) -> torch.nn.Module:
        return hf_model(self.gguf).requires_grad_(False)

    @cached_property
    def bridge(self) -> SAETransformerBridge:
        """The same weights in TransformerLens; its wrapper goes around a model of its own."""
        keep_off_the_hub(self.lm.tokenizer)
        weights = {id(parameter): parameter for parameter in self.hf.parameters()}
        return SAETransformerBridge.boot_transformers(
            NAME,
            hf_model=copy.deepcopy(self.hf, weights),
            tokenizer=copy.deepcopy(self.lm.tokenizer),
            device="cpu",
            dtype=torch.float32,
        )

    @cached_property
    def table(self) -> pd.DataFrame:
        """Prompts of W4, four a family, the worked examples of a family alike: columns prefix, query, amounts, ..."""
        config = BankConfig(
            selection=self.sizes.families, development=0, test=0, examples=self.sizes.examples, selection_controls=(),
            controls=(),
        )  # fmt: skip
        return build_bank(config, self.lm.tokenizer).prompts

    @cached_property
    def prompts(self) -> Prompts:
        """Those of the table with worked examples cut short, from the left, until a prompt is `length` tokens long."""
        table, T = self.table, self.sizes.length
        whole = jm.make_prompts(self.lm, list(table["query"]), list(ANSWERS), prefixes=list(table["prefix"]))
        queries, rows = np.asarray(whole.mask).sum(1), np.asarray(whole.prefix.rows)
        left = np.array([T - np.unique(queries[rows == g]).item() for g in range(rows.max() + 1)])  # alike in a family
        mask = np.arange(left.max()) >= (left.max() - left)[:, None]
        tokens = np.asarray(whole.prefix.tokens)[:, -left.max() :].copy()
        tokens[np.arange(len(left)), left.max() - left] = self.lm.config.bos_id
        return whole._replace(prefix=Prefix(jnp.asarray(tokens * mask), jnp.asarray(mask), whole.prefix.rows))

    @cached_property
    def tokens(self) -> np.ndarray:
        """`prompts`, each whole: [B,length] int32."""
        prompts, prefix = self.prompts, self.prompts.prefix
        tokens = np.concatenate([np.asarray(prefix.tokens)[prefix.rows], np.asarray(prompts.tokens)], axis=1)
        return tokens[real_tokens(prompts)].reshape(-1, self.sizes.length).astype(np.int32)

    @cached_property
    def residuals(self) -> jax.Array:
        """The residual stream after every layer at `tokens`, [L,batch,length,D]."""
        out = jm.forward(self.lm.config, self.lm.params, self.tokens, taps=("resid_post",), logits="none")
        return out.taps["resid_post"]

    @cached_property
    def saes(self) -> jm.SAE:
        """Random JumpReLU dictionaries of all layers, of which about 0.4 % of the features fire on a token.

        Encoders look along random directions of the stream as it is, so that a few large dimensions do not rule all
        features; thresholds stand 2.7 deviations above a feature's mean.
        """
        c, F = self.lm.config, self.sizes.features
        params = {name: [] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
        rng = np.random.default_rng(0)
        for x in np.asarray(self.residuals).reshape(c.n_layers, -1, c.d_model):
            spread = x.std(0)
            W_dec = rng.standard_normal((F, c.d_model), np.float32)
            W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
            params["W_dec"].append(W_dec)
            params["W_enc"].append(W_dec.T / spread[:, None])
            params["b_dec"].append(x.mean(0))
            params["b_enc"].append(0.1 * rng.standard_normal(F, np.float32))
            pre = (x[::8] - x.mean(0)) @ params["W_enc"][-1] + params["b_enc"][-1]
            params["threshold"].append(np.maximum(pre.mean(0) + 2.7 * pre.std(0), 0.0))
        config = jm.SAEConfig(c.d_model, F, site="resid_post", layers=tuple(range(c.n_layers)))
        return make_sae({name: np.stack(leaves) for name, leaves in params.items()}, config)

    @cached_property
    def peer_saes(self) -> list[JumpReLUSAE]:
        """The same weights as SAELens' objects, one per layer."""
        saes = []
        for layer in range(self.lm.config.n_layers):
            metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_out")
            shape = {"d_in": self.lm.config.d_model, "d_sae": self.sizes.features, "device": "cpu", "dtype": "float32"}
            sae = JumpReLUSAE(JumpReLUSAEConfig(**shape, apply_b_dec_to_input=True, metadata=metadata))
            for name, value in self.saes.params.items():
                getattr(sae, name).data = torch.from_dlpack(value)[layer]  # the same memory
            saes.append(sae.requires_grad_(False))
        return saes


def real_tokens(prompts: Prompts) -> np.ndarray:
    """Where prompts have tokens and no padding, [B,P+T] with those of their worked examples first."""
    prefix = prompts.prefix
    return np.concatenate([np.asarray(prefix.mask)[prefix.rows], np.asarray(prompts.mask)], axis=1)


def shared_flops(config, prompts: Prompts) -> float:
    """What running worked examples once for all prompts that share them saves."""
    each = np.array([text_flops(config, int(n)) for n in np.asarray(prompts.prefix.mask).sum(1)])
    return float(each[np.asarray(prompts.prefix.rows)].sum() - each.sum())


def steering_vector(bench: Bench) -> np.ndarray:
    """[D], a tenth of the residual stream's length at the layer that is steered at, in a random direction."""
    vector = np.random.default_rng(1).standard_normal(bench.lm.config.d_model).astype(np.float32)
    length = np.median(np.linalg.norm(np.asarray(bench.residuals[MIDDLE]), axis=-1))
    return vector / np.linalg.norm(vector) * 0.1 * length


def to_torch(x: np.ndarray | jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))
