"""What a run shows at the decision token: residuals for donors, and feature moments reduced inside the scan.

`B` denotes prompts (or pairs), `T` tokens, `L` layers, `D` the residual width, `F` features, `K` families.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmech.choices import Choices, Prompts, score
from jaxmech.contrast import Moments, batch_moments, merge_moments
from jaxmech.edits import over_layers
from jaxmech.models.decoder import Params, Tap
from jaxmech.sae.module import SAE


class Run(NamedTuple):
    """choices: exact answers; resid [L,B,D] at `site` of the decision token."""

    choices: Choices
    resid: jax.Array


@partial(jax.jit, static_argnames=("config", "site"))
def run_decision(config, params: Params, prompts: Prompts, *, site: str = "resid_post") -> Run:
    """Scores the prompts and keeps what stands at the decision token."""
    at = prompts.tokens.shape[1] - 1
    choices, out = score(config, params, prompts, taps={"resid": Tap(site, partial(_at_slot, at))})
    return Run(choices, out.taps["resid"])


def _at_slot(slot: int, _, x):
    return x[:, slot]


@partial(jax.jit, static_argnames=("config",), donate_argnames=("moments",))
def update_moments(
    config, params: Params, saes: SAE, prompts: Prompts, values: jax.Array, member: jax.Array, moments: Moments
) -> tuple[Moments, Run]:
    """Folds a batch of pairs into the moments; features are encoded layer by layer inside the scan.

    Args:
      prompts: 2B prompts, the generous ones first, then their selfish twins.
      values: [2B,N] share given for each choice; member: [B,K], 1 where a pair belongs to a family.
      moments: [.., L', ..] over the layers of `saes`; its buffers are reused.

    Returns:
      The new moments, and the batch's `Run` of 2B prompts.
    """
    at, site = prompts.tokens.shape[1] - 1, saes.config.site
    encode = Tap(site, partial(_encode_slot, at), over_layers(saes, config.n_layers))
    taps = {"z": encode, "resid": Tap(site, partial(_at_slot, at))}
    choices, out = score(config, params, prompts, taps=taps)
    z = out.taps["z"][jnp.asarray(saes.config.layers)]  # [L',2B,F]
    z = jnp.moveaxis(z.reshape(z.shape[0], 2, -1, z.shape[2]), 1, 0)
    g = choices.expected(values).reshape(2, -1)
    return merge_moments(moments, batch_moments(z, g, member)), Run(choices, out.taps["resid"])


def _encode_slot(slot: int, sae: SAE, x):
    return sae.encode(x[:, slot])
