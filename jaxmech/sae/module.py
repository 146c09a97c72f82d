"""Sparse autoencoders as Flax modules: one canonical form, single or stacked over layers.

`D` denotes the width at the site, `F` dictionary features, `K` selected features, `L'` the layers that have a
dictionary (the model's own number of layers is `L`).

Row vectors: `pre = x' @ W_enc + b_enc`, `f = act(pre)`, `y = f @ W_dec + b_dec`, where `x' = x - b_dec` if
`subtract_b_dec`, else `x`. x is the raw activation: scales and norms are folded into the weights before they get here.
Everything is computed in float32 with full-precision products, because a rounded pre-activation opens or closes gates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

ACTIVATIONS = ("relu", "jumprelu", "topk")
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What a dictionary is, as static data.

    Attributes:
      d_in, d_sae: widths of the input and of the code; d_out: of the output, d_in when None.
      activation: "relu", "jumprelu" (`pre` where `pre > threshold` and `pre > 0`, strictly) or "topk" (the k largest
        of each token, then ReLU).
      k: features a token keeps; TopK only.
      subtract_b_dec: whether b_dec is taken off the input before encoding.
      site: where the input is read and the output belongs ("resid_post", ...).
      layers: the model's layer of each dictionary of a stack; one entry for a single dictionary.
      model: name of the model it was trained on.
      units: what an activation of 1 means; "residual" when decoder rows have unit norm.
      source: where the weights come from.
    """

    d_in: int
    d_sae: int
    d_out: int | None = None
    activation: str = "jumprelu"
    k: int | None = None
    subtract_b_dec: bool = True
    site: str = "resid_post"
    layers: tuple[int, ...] = (0,)
    model: str | None = None
    units: str = "unknown"
    source: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "d_out", self.d_in if self.d_out is None else self.d_out)
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if (self.activation == "topk") != (self.k is not None):
            raise ValueError(f"k: goes with activation 'topk' and only with it, got k={self.k}, {self.activation!r}")
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ValueError(f"k: expected 1..d_sae={self.d_sae}, got {self.k}")
        if self.subtract_b_dec and self.d_in != self.d_out:
            raise ValueError(f"subtract_b_dec: needs d_in == d_out, got {self.d_in} and {self.d_out}; set it to False")
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: expected distinct layers, at least one, got {self.layers}")


def param_shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of a single dictionary."""
    shapes = {
        "W_enc": (config.d_in, config.d_sae),
        "b_enc": (config.d_sae,),
        "W_dec": (config.d_sae, config.d_out),
        "b_dec": (config.d_out,),
    }
    return shapes | ({"threshold": (config.d_sae,)} if config.activation == "jumprelu" else {})


def activate(config: SAEConfig, pre: jax.Array, threshold: jax.Array | None = None) -> jax.Array:
    """The code of pre-activations [..., F]."""
    if config.activation == "relu":
        return jax.nn.relu(pre)
    if config.activation == "jumprelu":
        return jnp.where(pre > threshold, jax.nn.relu(pre), 0.0)
    # Ties are broken by index, so that a token never keeps more than k: comparing with the k-th largest would not do.
    values, index = jax.lax.top_k(pre, config.k)
    flat = jnp.zeros((pre.size // config.d_sae, config.d_sae), pre.dtype)
    rows = jnp.arange(flat.shape[0])[:, None]
    flat = flat.at[rows, index.reshape(-1, config.k)].set(jax.nn.relu(values).reshape(-1, config.k))
    return flat.reshape(pre.shape)


class SparseCoder(nn.Module):
    """The Linen module of a single dictionary; `apply` it on an explicit parameter tree."""

    config: SAEConfig

    def setup(self):
        c, zeros = self.config, nn.initializers.zeros_init()
        axes = {"W_enc": ("embed", "feature"), "W_dec": ("feature", "embed"), "b_dec": ("embed",)}
        for name, shape in param_shapes(c).items():
            init = nn.initializers.lecun_normal() if name.startswith("W_") else zeros
            init = nn.with_logical_partitioning(init, axes.get(name, ("feature",)))
            setattr(self, name, self.param(name, init, shape))

    def pre(self, x: jax.Array) -> jax.Array:
        """[..., d_in] -> pre-activations [..., F]."""
        x = x.astype(jnp.float32)
        return matmul(x - self.b_dec if self.config.subtract_b_dec else x, self.W_enc) + self.b_enc

    def encode(self, x: jax.Array) -> jax.Array:
        return activate(self.config, self.pre(x), self.threshold if self.config.activation == "jumprelu" else None)

    def decode(self, f: jax.Array) -> jax.Array:
        return matmul(f.astype(jnp.float32), self.W_dec) + self.b_dec

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x))


@struct.dataclass
class SAE:
    """A dictionary, or a stack of them over layers when the leaves lead with `L' = len(config.layers)`.

    Methods of a single dictionary take [..., D] or [..., F]; those of a stack take the same with `L'` in front. All
    are pure and work under jit, vmap, grad and scan (which slices a stack into single dictionaries).
    """

    params: Mapping[str, jax.Array]
    config: SAEConfig = struct.field(pytree_node=False)

    @property
    def stacked(self) -> bool:
        return self.params["W_dec"].ndim == 3

    def encode(self, x: jax.Array) -> jax.Array:
        """Raw activations [..., d_in] -> features [..., F]."""
        return self._apply("encode", x, self.config.d_in)

    def decode(self, f: jax.Array) -> jax.Array:
        """Features [..., F] -> activations [..., d_out]."""
        return self._apply("decode", f, self.config.d_sae)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The reconstruction of x."""
        return self._apply("__call__", x, self.config.d_in)

    def at(self, layer: int) -> SAE:
        """The dictionary of the model's layer `layer`."""
        if layer not in self.config.layers:
            raise ValueError(f"layer: this stack has layers {self.config.layers}, got {layer}")
        config = dataclasses.replace(self.config, layers=(layer,))
        if not self.stacked:
            return self
        row = self.config.layers.index(layer)
        return SAE({name: leaf[row] for name, leaf in self.params.items()}, config)

    def _apply(self, method: str, x: jax.Array, width: int) -> jax.Array:
        lead = (self.params["W_dec"].shape[0],) if self.stacked else ()
        if x.shape[-1:] != (width,) or x.shape[:-1][: len(lead)] != lead:
            kind = f"a stack over {lead[0]} layers" if lead else "a single dictionary"
            expected = f"[{''.join(f'{n}, ' for n in lead)}..., {width}]"
            raise ValueError(f"{method}: {kind} expects {expected}, got shape {tuple(x.shape)}")
        call = partial(SparseCoder(self.config).apply, method=method)

        def one(params, x):
            return call({"params": params}, x)

        return jax.vmap(one)(self.params, x) if lead else one(self.params, x)


def make_sae(params: Mapping[str, jax.Array | np.ndarray], config: SAEConfig) -> SAE:
    """An SAE of `params`, all shape mismatches refused at once.

    A config of one layer makes a single dictionary or, if the leaves lead with 1, a stack of one.
    """
    expected = param_shapes(config)
    lead = (len(config.layers),) if len(config.layers) > 1 or np.ndim(params.get("W_dec")) == 3 else ()
    faults = [f"{name}: missing" for name in expected if name not in params]
    faults += [f"{name}: unknown" for name in params if name not in expected]
    for name in expected.keys() & params.keys():
        if (got := tuple(np.shape(params[name]))) != lead + expected[name]:
            faults.append(f"{name}: expected {lead + expected[name]}, got {got}")
    if faults:
        raise ValueError(f"parameters of a {config.activation} SAE: {'; '.join(sorted(faults))}")
    return SAE({name: jnp.asarray(params[name], jnp.float32) for name in expected}, config)


def stack_saes(saes: Sequence[SAE]) -> SAE:
    """Single dictionaries of different layers, alike in all else, as one stack in the order given."""
    if not saes:
        raise ValueError("saes: expected at least one")
    if any(sae.stacked for sae in saes):
        raise ValueError("saes: expected single dictionaries, got a stack; take it apart with sae.at(layer)")
    alike = [dataclasses.replace(sae.config, layers=(0,), source=None) for sae in saes]
    for sae, config in zip(saes, alike, strict=True):
        if config != alike[0]:
            fields = [f.name for f in dataclasses.fields(config)]
            differing = [n for n in fields if getattr(config, n) != getattr(alike[0], n)]
            raise ValueError(
                f"saes: layers {saes[0].config.layers[0]} and {sae.config.layers[0]} differ in {', '.join(differing)};"
                " only dictionaries alike in all but the layer can be stacked"
            )
    sources = {sae.config.source for sae in saes}
    config = dataclasses.replace(
        alike[0],
        layers=tuple(sae.config.layers[0] for sae in saes),
        source=sources.pop() if len(sources) == 1 else "; ".join(str(s.config.source) for s in saes),
    )
    return SAE(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(dict(sae.params) for sae in saes)), config)
