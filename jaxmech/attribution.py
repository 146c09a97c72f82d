"""Attribution patching: what each feature of each layer would do to the expected amount, from one backward pass.

`B` denotes prompts, `L` layers, `D` the residual width, `F` features.

To first order, moving a feature by dz moves the outcome m by dz * <dm/dx, D_j>, with the gradient taken at the
unedited run (Nanda 2023; Syed et al. 2023, arXiv 2310.10348). Gradients with respect to a zero vector added at the
decision token of every layer give all of them together.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxmech import edits as ed
from jaxmech.choices import Prompts, score
from jaxmech.models.decoder import Params
from jaxmech.sae.module import SAE


@partial(jax.jit, static_argnums=0, static_argnames="site")
def decision_gradient(config, params: Params, prompts: Prompts, values: jax.Array, *, site: str = "resid_post"):
    """The gradient [L,B,D] of each prompt's expected value (values [B,N]) at the decision token of every layer."""
    spans = ed.at_last(config.n_layers, prompts.tokens.shape[1])

    def outcome(vector):
        edits = {site: (ed.Add(vector=vector, **spans),)}
        return score(config, params, prompts, edits=edits)[0].expected(values).sum()

    return jax.grad(outcome)(jnp.zeros((config.n_layers, len(prompts.tokens), config.d_model)))


@jax.jit
def attribute(saes: SAE, gradient: jax.Array, base: jax.Array, donor: jax.Array) -> jax.Array:
    """First-order effect [L',B,F] of setting each feature of `saes` to its donor's value.

    Args:
      gradient, base, donor: [L',B,D] over the layers of `saes`, at the decision token.
    """
    slope = jnp.einsum("lbd,lfd->lbf", gradient, saes.params["W_dec"], precision=jax.lax.Precision.HIGHEST)
    return (saes.encode(donor) - saes.encode(base)) * slope
