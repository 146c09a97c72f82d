"""Sparse autoencoders as Flax modules: one canonical form, single or stacked over layers.

`D` denotes the width at the site, `F` dictionary features, `K` selected features, `L'` the layers that have a
dictionary (the model's own number of layers is `L`).

Row vectors: `pre = x' @ W_enc + b_enc`, `f = act(pre)`, `y = f @ W_dec + b_dec (+ x @ W_skip)`, where
`x' = x - b_dec` if `subtract_b_dec`, else `x`. x is the raw activation: constant scales and decoder norms are folded
into the weights before they get here, and a gated dictionary is a JumpReLU one. A dictionary that was trained on tokens
normalised one by one does all of this on `n(x) = (x - shift) / scale`, and its output is `y * scale + shift`.
Everything is computed in float32 with full-precision products, because a rounded pre-activation opens or closes gates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from jaxmech.io import reprs
from jaxmech.io.arguments import Array, number, numbers_or_none, whole_number, whole_numbers
from jaxmech.sae.topk import largest

ACTIVATIONS = ("relu", "jumprelu", "topk", "abstopk", "batchtopk")
NORMALIZATIONS = ("none", "norm", "layer_norm")
_TINY = 1e-30  # far below rounding; keeps the gradient finite at a token of zeros
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What a dictionary is, as static data.

    Attributes:
      d_in, d_sae: widths of the input and of the code; d_out: of the output, d_in when None.
      activation: "relu"; "jumprelu" (`pre` where `pre > threshold` and `pre > 0`, strictly); "topk" (the k largest of
        each token, then ReLU); "abstopk" (the k largest of each token by magnitude, sign kept); or "batchtopk", as
        trained (the k * n largest positive ones of all n tokens of a call: what a token gets depends on the others).
      k: features kept per token, on average for "batchtopk"; only with the TopK kinds.
      subtract_b_dec: whether b_dec is subtracted from the input before encoding.
      normalize: of each token: "none", "norm" (to length sqrt(d_in)) or "layer_norm" (mean 0, unbiased deviation 1).
      skip: whether a linear skip term x @ W_skip joins the output.
      site: where the input is read ("resid_post", ...); site_out: where the output belongs, `site` when None.
      layers: the model's layer of each dictionary of a stack; one entry for a single dictionary.
      l0: features active on an average token, as declared for each of `layers`; None where nothing is declared.
      skip_first: tokens at the start of a text that it was not trained on, BOS included.
      model: name of the model it was trained on.
      units: what an activation of 1 means; "residual" when decoder rows have unit norm.
      source: where the weights come from. Dictionaries that differ in l0 and source alone share compiled programs.
    """

    d_in: int
    d_sae: int
    d_out: int = None  # type: ignore[assignment]  # d_in, set below
    activation: str = "jumprelu"
    k: float | None = None
    subtract_b_dec: bool = True
    normalize: str = "none"
    skip: bool = False
    site: str = "resid_post"
    site_out: str = None  # type: ignore[assignment]  # site, set below
    layers: tuple[int, ...] = (0,)
    l0: tuple[float | None, ...] = dataclasses.field(default=(), compare=False)
    skip_first: int = 1
    model: str | None = None
    units: str = "unknown"
    source: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        layers = whole_numbers("layers", self.layers)
        plain = {
            "d_in": whole_number("d_in", self.d_in, 1),
            "d_sae": whole_number("d_sae", self.d_sae, 1),
            "d_out": whole_number("d_out", self.d_in if self.d_out is None else self.d_out, 1),
            "k": None if self.k is None else number("k", self.k),
            "site_out": self.site if self.site_out is None else self.site_out,
            "layers": layers,
            "l0": numbers_or_none("l0", self.l0) or (None,) * len(layers),
            "skip_first": whole_number("skip_first", self.skip_first, 0),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)}, got {self.normalize!r}")
        if self.by_rank != (self.k is not None):
            raise ValueError(f"k: goes with the TopK kinds and only with them, got k={self.k}, {self.activation!r}")
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ValueError(f"k: expected 1..d_sae={self.d_sae}, got {self.k}")
        if self.k is not None and self.activation != "batchtopk" and self.k != int(self.k):
            raise ValueError(f"k: expected a whole number for {self.activation!r}, got {self.k}")
        if self.subtract_b_dec and self.d_in != self.d_out:
            raise ValueError(f"subtract_b_dec: needs d_in == d_out, got {self.d_in} and {self.d_out}; set it to False")
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers: expected distinct layers, at least one, got {layers}")
        if len(self.l0) != len(layers):
            raise ValueError(f"l0: expected one entry for each of the layers {layers}, got {self.l0}")

    @property
    def by_rank(self) -> bool:
        """Whether a feature's code depends on the other features, so that none can be encoded alone."""
        return self.activation in ("topk", "abstopk", "batchtopk")

    @property
    def needs_input(self) -> bool:
        """Whether decoding takes more than the code: each token's own scale, or the skip term."""
        return self.skip or self.normalize != "none"


def param_shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of a single dictionary."""
    shapes = {
        "W_enc": (config.d_in, config.d_sae),
        "b_enc": (config.d_sae,),
        "W_dec": (config.d_sae, config.d_out),
        "b_dec": (config.d_out,),
    }
    if config.activation == "jumprelu":
        shapes["threshold"] = (config.d_sae,)
    if config.skip:
        shapes["W_skip"] = (config.d_in, config.d_out)
    return shapes


def normalise(kind: str, x: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Each token of x [..., D] on its own: (n(x), scale [..., 1], shift [..., 1]), with x = n(x) * scale + shift.

    SAELens' `constant_norm_rescale` and `layer_norm`; the latter's 1e-5 is in n(x) alone, not in `scale`.
    """
    if kind == "none":
        return x, None, None
    if kind == "norm":
        scale = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + _TINY)
        return x / scale, scale, jnp.zeros_like(scale)
    shift = jnp.mean(x, axis=-1, keepdims=True)
    scale = jnp.sqrt(jnp.var(x, axis=-1, keepdims=True, ddof=1) + _TINY)
    return (x - shift) / (scale + 1e-5), scale, shift


def activate(config: SAEConfig, pre: jax.Array, threshold: jax.Array | None = None) -> jax.Array:
    """The code of pre-activations [..., F]; NaN where one is NaN, whatever the kind."""
    if config.activation == "relu":
        return jax.nn.relu(pre)
    if config.activation == "jumprelu":  # this comparison lets a NaN through
        assert threshold is not None
        return jnp.where(pre <= threshold, 0.0, jax.nn.relu(pre))
    rows = pre.reshape(-1, config.d_sae)
    assert config.k is not None
    if config.activation == "batchtopk":
        kept = largest(jax.lax.stop_gradient(rows), int(config.k * len(rows)))
        return jnp.where(kept | jnp.isnan(rows), rows, 0.0).reshape(pre.shape)
    # Ties are broken by index, so that a token never keeps more than k; comparing with the k-th could.
    signed = config.activation == "abstopk"
    _, index = jax.lax.top_k(jnp.abs(rows) if signed else rows, int(config.k))
    values = jnp.take_along_axis(rows, index, axis=1)
    places = jnp.arange(len(rows))[:, None], index
    code = jnp.zeros_like(rows).at[places].set(values if signed else jax.nn.relu(values))
    return jnp.where(jnp.isnan(rows), rows, code).reshape(pre.shape)


class SparseCoder(nn.Module):
    """The Linen module of a single dictionary; `apply` it on an explicit parameter tree."""

    config: SAEConfig

    def setup(self) -> None:
        c, zeros = self.config, nn.initializers.zeros_init()
        axes = {
            "W_enc": ("embed", "feature"),
            "W_dec": ("feature", "embed"),
            "b_dec": ("embed",),
            "W_skip": ("embed", None),
        }
        for name, shape in param_shapes(c).items():
            init = nn.initializers.lecun_normal() if name.startswith("W_") else zeros
            init = nn.with_logical_partitioning(init, axes.get(name, ("feature",)))
            setattr(self, name, self.param(name, init, shape))

    def centre(self, x: jax.Array) -> jax.Array:
        """[..., d_in] -> what is multiplied by W_enc [..., d_in]."""
        x, *_ = normalise(self.config.normalize, x.astype(jnp.float32))
        return x - self.b_dec if self.config.subtract_b_dec else x

    def encode_centred(self, x: jax.Array) -> jax.Array:
        """Centred [..., d_in] -> code [..., F]."""
        pre = matmul(x, self.W_enc) + self.b_enc
        return activate(self.config, pre, self.threshold if self.config.activation == "jumprelu" else None)

    def encode(self, x: jax.Array) -> jax.Array:
        """[..., d_in] -> code [..., F]."""
        return self.encode_centred(self.centre(x))

    def decode(self, f: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """Code [..., F], with the input [..., d_in] where `config.needs_input` -> output [..., d_out]."""
        y = matmul(f.astype(jnp.float32), self.W_dec) + self.b_dec
        if not self.config.needs_input:
            return y
        assert x is not None
        x, scale, shift = normalise(self.config.normalize, x.astype(jnp.float32))
        y = y + matmul(x, self.W_skip) if self.config.skip else y
        return y if scale is None else y * scale + shift

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x), x)


@struct.dataclass
class SAE:
    """A dictionary, or a stack of them over layers when the leaves lead with `L' = len(config.layers)`.

    Methods of a single dictionary take [..., D] or [..., F]; those of a stack take the same with `L'` in front. All
    are pure and work under jit, vmap, grad and scan (which slices a stack into single dictionaries).
    """

    params: Mapping[str, jax.Array]
    config: SAEConfig = struct.field(pytree_node=False)

    if TYPE_CHECKING:  # struct.dataclass adds it

        def replace(self, **changes: Any) -> Self: ...

    def __repr__(self) -> str:
        c = self.config
        kind = c.activation if c.k is None else f"{c.activation} with k={c.k:g}"
        widths = f"{c.d_in}" if c.d_in == c.d_out else f"{c.d_in} to {c.d_out}"
        place = c.site if c.site == c.site_out else f"{c.site} to {c.site_out}"
        single = ", single" if getattr(self.params["W_dec"], "ndim", None) == 2 else ""
        source = "" if c.source is None else f", from {reprs.described(c.source)}"
        return (
            f"SAE({place}, {reprs.layers(c.layers)}{single}: {c.d_sae:,} features of width "
            f"{widths}, {kind}, {reprs.memory(jax.tree.leaves(dict(self.params)))}{source})"
        )

    @property
    def stacked(self) -> bool:
        return self.params["W_dec"].ndim == 3

    def encode(self, x: jax.Array) -> jax.Array:
        """Raw activations [..., d_in] -> features [..., F]."""
        return self._apply("encode", x=(x, self.config.d_in))

    def centre(self, x: jax.Array) -> jax.Array:
        """Raw activations [..., d_in] -> what the encoder multiplies [..., d_in]: normalised, b_dec subtracted."""
        return self._apply("centre", x=(x, self.config.d_in))

    def encode_centred(self, x: jax.Array) -> jax.Array:
        """`centre(x)` [..., d_in] -> features [..., F]; for callers that encode in parts."""
        return self._apply("encode_centred", x=(x, self.config.d_in))

    def decode(self, f: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """Features [..., F] -> activations [..., d_out].

        x [..., d_in] are the activations that were encoded: needed, and used, by dictionaries with a skip term or a
        normalisation of each token.
        """
        if not self.config.needs_input:
            return self._apply("decode", f=(f, self.config.d_sae))
        if x is None:
            why = "has a skip term" if self.config.skip else f"normalises each token ({self.config.normalize})"
            raise ValueError(f"x: this dictionary {why}, so that decoding needs the activations: decode(f, x)")
        return self._apply("decode", f=(f, self.config.d_sae), x=(x, self.config.d_in))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The reconstruction of x, or what a transcoder makes of it."""
        return self._apply("__call__", x=(x, self.config.d_in))

    def at(self, layer: int) -> SAE:
        """The dictionary of the model's layer `layer`."""
        if layer not in self.config.layers:
            raise ValueError(f"layer: this stack has layers {self.config.layers}, got {layer}")
        if not self.stacked:
            return self
        row = self.config.layers.index(layer)
        config = dataclasses.replace(self.config, layers=(layer,), l0=(self.config.l0[row],))
        return SAE({name: leaf[row] for name, leaf in self.params.items()}, config)

    def as_stack(self) -> SAE:
        """A single dictionary as a stack of one; a stack as it is."""
        return self if self.stacked else SAE({name: leaf[None] for name, leaf in self.params.items()}, self.config)

    def _apply(self, method: str, **inputs: tuple[jax.Array, int]) -> jax.Array:
        """Applies `method` to arrays, by the caller's name for each, given with the width it should have."""
        lead = (self.params["W_dec"].shape[0],) if self.stacked else ()
        for name, (x, width) in inputs.items():
            if (shape := np.shape(x))[-1:] != (width,) or shape[:-1][: len(lead)] != lead:
                kind = f"a stack over {lead[0]} layers" if lead else "a single dictionary"
                expected = f"[{''.join(f'{n}, ' for n in lead)}..., {width}]"
                hint = "; one layer's dictionary is sae.at(layer)" if lead and shape[-1:] == (width,) else ""
                raise ValueError(f"{name}: {method} of {kind} expects {expected}, got shape {shape}{hint}")
        call = partial(SparseCoder(self.config).apply, method=method)

        def apply(params, *arrays):
            return call({"params": params}, *arrays)

        arrays = [jnp.asarray(x) for x, _ in inputs.values()]
        return jax.vmap(apply)(self.params, *arrays) if lead else apply(self.params, *arrays)


def make_sae(params: Mapping[str, Array], config: SAEConfig) -> SAE:
    """An SAE of `params`; all shape mismatches are reported at once.

    A config of one layer makes a single dictionary or, if the leaves lead with 1, a stack of one.
    """
    expected = param_shapes(config)
    lead = (len(config.layers),) if len(config.layers) > 1 or np.ndim(params.get("W_dec", 0)) == 3 else ()
    faults = [f"{name}: missing" for name in expected if name not in params]
    faults += [f"{name}: unknown" for name in params if name not in expected]
    for name in expected.keys() & params.keys():
        if (got := tuple(np.shape(params[name]))) != lead + expected[name]:
            faults.append(f"{name}: expected {lead + expected[name]}, got {got}")
    if faults:
        raise ValueError(f"parameters of a {config.activation} SAE: {'; '.join(sorted(faults))}")
    return SAE({name: jnp.asarray(params[name], jnp.float32) for name in expected}, config)


def stack_saes(saes: Sequence[SAE]) -> SAE:
    """Single dictionaries of different layers, otherwise alike, as one stack in the order given."""
    if not saes:
        raise ValueError("saes: expected at least one")
    if any(sae.stacked for sae in saes):
        raise ValueError("saes: expected single dictionaries, got a stack; split it with sae.at(layer)")
    comparable = [dataclasses.replace(sae.config, layers=(0,), l0=(), source=None) for sae in saes]
    for sae, config in zip(saes, comparable, strict=True):
        if config != comparable[0]:
            fields = [f.name for f in dataclasses.fields(config)]
            differing = [n for n in fields if getattr(config, n) != getattr(comparable[0], n)]
            raise ValueError(
                f"saes: layers {saes[0].config.layers[0]} and {sae.config.layers[0]} differ in {', '.join(differing)};"
                " dictionaries can be stacked only if nothing but the layer differs"
            )
    sources = {sae.config.source for sae in saes}
    config = dataclasses.replace(
        comparable[0],
        layers=tuple(sae.config.layers[0] for sae in saes),
        l0=tuple(sae.config.l0[0] for sae in saes),
        source=sources.pop() if len(sources) == 1 else "; ".join(str(s.config.source) for s in saes),
    )
    return SAE(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(dict(sae.params) for sae in saes)), config)
