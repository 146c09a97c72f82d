"""The decoder: one Flax block scanned over stacked layers, edits in, taps out.

`B` denotes the batch, `T` tokens, `L` layers, `D` the residual width, `G` key/value heads, `h` the head width, `V` the
vocabulary, `S` cached tokens.

An edit is any pytree whose leaves lead with `L` and that offers, once sliced to one layer, `delta(x) -> like x`; it
names the `site` it belongs to (None: any) and the site it `reads` (None: its own); see `jaxmech.interventions.edits`. A
tap reads one site, reduced inside the scan. Nothing here knows what edits or taps mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxmech.io.reprs import short_repr
from jaxmech.models.block import Block, Norm, precision
from jaxmech.models.checks import check_edits, check_sites, check_tokens
from jaxmech.models.config import ModelConfig
from jaxmech.models.rope import rope_tables

Params = Mapping[str, Any]

_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
"""What a gradient keeps of a layer: the products with weights. Attention and everything between products take less time
to recompute than to write and read, and would take most of the memory."""


class KV(NamedTuple):
    """A segment of cached tokens. k, v [L,B,S,G,h]; positions [B,S] int32; mask [B,S], True on real tokens.

    `rows [B]` says which of the segment's rows each prompt reads, so that prompts may share one; None: its own.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    mask: jax.Array
    rows: jax.Array | None = None

    def __repr__(self) -> str:
        return short_repr(self)

    def of(self, array: jax.Array) -> jax.Array:
        """`array`, which leads with the segment's rows, as one row per prompt."""
        return array if self.rows is None else array[self.rows]


@struct.dataclass
class Tap:
    """Reads `site` at every layer and keeps `reduce(args_l, x)`; by default x itself.

    `args` is a pytree whose leaves lead with `L`; `reduce` receives its slice for the layer and x `[B,T,D]`, and what
    it returns is stacked over layers.
    """

    site: str = struct.field(pytree_node=False)
    reduce: Callable[[Any, jax.Array], Any] = struct.field(pytree_node=False, default=lambda _, x: x)
    args: Any = None

    __repr__ = short_repr


class Output(NamedTuple):
    """logits [B,V], [B,n,V] or None; taps: name -> stacked over layers; cache: this call's own tokens, or None; final
    [B,T,D], the residual stream after the last layer, before the final norm."""

    logits: jax.Array | None
    taps: dict[str, Any]
    cache: KV | None
    final: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


class Part(NamedTuple):
    """Rows of tokens on their way through the layers.

    x [B,T,D]; positions [B,T]; mask [B,T]; within [T,T] or [B,T,T], None for causal; cache: segments they look at; rows
    [B]: the row of the previous part that each row follows and looks at (second part only).
    """

    x: jax.Array
    positions: jax.Array
    mask: jax.Array
    within: jax.Array | None = None
    cache: tuple[KV, ...] = ()
    rows: jax.Array | None = None

    def __repr__(self) -> str:
        return short_repr(self)


def _init(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, each leaf boxed with its logical axis names."""
    c, x = config, jnp.zeros((1, 1, config.d_model))
    keys = jax.random.split(key, 3)
    table, masks = jnp.zeros((1, 1, 1, (c.rotary_dim or c.head_dim) // 2)), [jnp.ones((1, 1, 1), bool)]

    def block(k):
        return Block(c).init(k, x, [], (table, table), masks, True, lambda _, y: y)["params"]

    def leaf(k, shape, axes):
        return nn.LogicallyPartitioned(0.02 * jax.random.normal(k, shape), axes)

    layers = jax.vmap(block)(jax.random.split(keys[0], c.n_layers))
    params = {
        "embed": {"embedding": leaf(keys[1], (c.vocab_size, c.d_model), ("vocab", "embed"))},
        "layers": nn.meta.add_axis(layers, 0, {nn.PARTITION_NAME: "layers"}),
        "final_norm": Norm(c).init(keys[2], x)["params"],
    }
    if c.learned_positions:
        params["positions"] = {
            "embedding": leaf(jax.random.fold_in(key, 3), (c.max_positions, c.d_model), (None, "embed"))
        }
    if not c.tied:
        params["unembed"] = {"kernel": leaf(keys[2], (c.d_model, c.vocab_size), ("embed", "vocab"))}
    return params


@partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters, for tests and for training from scratch."""
    return nn.meta.unbox(_init(config, key))


def param_shapes(config: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: what a conversion has to fill."""
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


def param_axes(config: ModelConfig) -> Params:
    """The parameter tree with each leaf's logical axis names, as `PartitionSpec`s."""
    return nn.get_partition_spec(jax.eval_shape(partial(_init, config), jax.random.key(0)))


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    mask: jax.Array | None = None,
    edits: Mapping[str, Sequence[Any]] | None = None,
    taps: Sequence[str] | Mapping[str, Tap] = (),
    logits: str | int = "last",
    cache: Sequence[KV] = (),
    positions: jax.Array | None = None,
    within: jax.Array | None = None,
    return_cache: bool = False,
    remat: bool = False,
    ends_apart: bool = False,
) -> Output:
    """Runs the decoder.

    Args:
      config: static structure.
      params: the tree of `param_shapes(config)`; its dtype is the dtype of the computation.
      tokens: [B,T] int.
      mask: [B,T] bool, True on real tokens; padding may be on either side. All real by default.
      edits: site -> edits, whose leaves lead with `L`. All edits at a site read the same x and their deltas add up.
      taps: names of sites, or name -> `Tap`.
      logits: "last" (of each row's last real token, [B,V]), "all" ([B,T,V]), "none", or n (the last n slots, [B,n,V]).
      cache: segments of earlier tokens, oldest first, as returned under `return_cache`.
      positions: [B,T] int; by default the number of real tokens before, those of `cache` included.
      within: [T,T] or [B,T,T] bool, which of this call's tokens may look at which; causal by default. Tokens at
        later positions are never looked at.
      return_cache: whether to return keys and values of this call's tokens.
      remat: whether a gradient recomputes each layer instead of keeping its products with weights.
      ends_apart: whether the first and the last layer are kept out of the loop over layers, so that a gradient passes
        through no more of them than it needs. Takes longer to compile.

    Returns:
      An `Output`.

    Raises:
      ValueError: tokens as `check_tokens` refuses them, an unknown site, a bad shape, or a bad `logits`.
    """
    tokens, mask = check_tokens(config, tokens, mask, cache=cache, placed=positions is not None)
    if isinstance(taps, str):
        raise ValueError(f"taps: expected names of sites in a tuple, such as ({taps!r},), got a string")
    check_edits(config, edits, tokens.shape)
    if not isinstance(taps, Mapping):
        taps = {name: Tap(name) for name in taps}
    check_sites({t.site for t in taps.values()})
    if logits not in ("last", "all", "none") and not (isinstance(logits, int) and 0 < logits <= tokens.shape[1]):
        raise ValueError(f"logits: expected 'last', 'all', 'none' or 1..{tokens.shape[1]}, got {logits!r}")
    return _forward(
        config,
        params,
        tokens,
        mask,
        dict(edits or {}),
        dict(taps),
        tuple(cache),
        positions,
        within,
        logits,
        return_cache,
        remat,
        ends_apart,
    )


@partial(jax.jit, static_argnames=("config", "logits", "return_cache", "remat", "ends_apart"))
def _forward(
    config, params, tokens, mask, edits, taps, cache, positions, within, logits, return_cache, remat, ends_apart
):
    if positions is None:
        positions = next_positions(mask, cache)
    part = Part(embed(config, params, tokens, positions, mask), positions.astype(jnp.int32), mask, within, cache)
    tables, last = _position_tables(config, part), config.n_layers - 1

    def layer(x, inputs):
        params_l, facts, cached, edits_l, tap_args = inputs
        seen = {}

        def keep(site, x):
            seen.update({n: t.reduce(tap_args[n], x) for n, t in taps.items() if t.site == site})

        x, kv = _run_block(config, params_l, facts, part._replace(x=x), cached, tables, edits_l, keep)
        return x, (seen, kv if return_cache else None)

    def indexed(x, inputs):  # a slice of the stacked parameters would be a copy of them
        return layer(x, (_at_layer(params["layers"], inputs[0]), *inputs[1]))

    # A scan's own barrier keeps the recomputation separate, so checkpoint need not.
    sparing = partial(jax.checkpoint, prevent_cse=False, policy=None if remat else _PRODUCTS)
    tap_args = {name: tap.args for name, tap in taps.items()}
    xs = (_facts(config), _keys_and_values(cache), edits, tap_args)
    if ends_apart and last:
        first, middle, end = (
            jax.tree.map(lambda a, s=s: a[s], (jnp.arange(last + 1), xs)) for s in (0, slice(1, last), last)
        )
        run_layer = sparing(indexed)
        x, out_first = run_layer(part.x, first)
        x, out_middle = jax.lax.scan(run_layer, x, middle)
        x, out_end = run_layer(x, end)
        join = lambda a, many, b: jnp.concatenate([a[None], many, b[None]])  # noqa: E731
        seen, kv = jax.tree.map(join, out_first, out_middle, out_end)
    else:
        x, (seen, kv) = jax.lax.scan(sparing(layer), part.x, (params["layers"], *xs))
    out = _read_out(config, params, x, mask, logits)
    return Output(out, seen, KV(kv[0], kv[1], part.positions, mask) if return_cache else None, x)


def _at_layer(stacked, index):
    """The slices for layer `index` of arrays that lead with `L`."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)


def run_layers(
    config: ModelConfig,
    params: Params,
    parts: Sequence[Part],
    edits: Sequence[Mapping[str, Sequence[Any]]],
    *,
    start: int | jax.Array = 0,
    stop: int | jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Takes one part, or two side by side, through the layers from `start` up to `stop`, both of which may be traced.

    A part's tokens look at its cache, at the rows they follow of the part before it, and at each other. Keys and values
    of a part live for a layer only, so that nothing grows with the number of layers.

    Args:
      parts: one, or two of which the second follows the first.
      edits: of each part, leaves leading with `L`.

    Returns:
      Each part's x [B,T,D] before layer `stop` (after the last layer by default). Not differentiable in reverse
      while `start` or `stop` is traced.
    """
    tables = [_position_tables(config, part, parts[:i]) for i, part in enumerate(parts)]
    stacked = (params["layers"], _facts(config), [_keys_and_values(p.cache) for p in parts], list(edits))

    def layer(index, xs):
        params_l, facts, cached, edits_l = _at_layer(stacked, index)
        out: list[jax.Array] = []
        earlier: list[tuple[jax.Array, jax.Array]] = []
        for i, part in enumerate(parts):
            before = [(k[part.rows], v[part.rows]) for k, v in earlier]
            part = part._replace(x=xs[i])
            x, kv = _run_block(config, params_l, facts, part, cached[i], tables[i], edits_l[i], before=before)
            out.append(x)
            earlier.append(kv)
        return tuple(out)

    return jax.lax.fori_loop(start, config.n_layers if stop is None else stop, layer, tuple(p.x for p in parts))


def _facts(config: ModelConfig):
    """What differs between layers besides their parameters: arrays [L], None where it does not differ."""
    scales = config.score_scales
    return jnp.asarray(config.is_local), None if scales is None else jnp.asarray(scales, jnp.float32)


def _run_block(config, params_l, facts, part, cached, tables, edits_l, keep=lambda site, x: None, before=()):
    """One layer over one part: edits where they act; `keep(site, x)` receives each site's x, edited."""
    (is_local, scale), values = facts, {}

    def visit(site, x):
        values[site] = x  # what edits at this site read; those at later sites read it edited
        if edits_l.get(site):
            x = values[site] = x + sum(e.delta(values[e.reads or site]) for e in edits_l[site]).astype(x.dtype)
        keep(site, x)
        return x

    (cos_sin, masks), *local = tables
    if local:
        choose = partial(jax.tree.map, lambda full, local: jnp.where(is_local, local, full))
        cos_sin, masks = choose((cos_sin, masks), local[0])
    looks_at = [(segment.of(k), segment.of(v)) for segment, (k, v) in zip(part.cache, cached, strict=True)]
    return Block(config).apply(
        {"params": params_l}, part.x, [*looks_at, *before], cos_sin, masks, part.within is None, visit, scale
    )


def _keys_and_values(cache: Sequence[KV]) -> list[tuple[jax.Array, jax.Array]]:
    return [(segment.k, segment.v) for segment in cache]


def next_positions(mask: jax.Array, cache: Sequence[KV]) -> jax.Array:
    """Positions [B,T] of tokens that follow those of `cache`: the number of real tokens before each."""
    seen = sum(segment.of(segment.mask).sum(1, keepdims=True) for segment in cache)
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + seen


def embed(config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """What the first layer reads: x [B,T,D] of tokens [B,T] at positions [B,T]; NaN where the mask has a token that is
    outside the vocabulary, which only traced tokens can be."""
    x = params["embed"]["embedding"][tokens]
    known = (tokens >= 0) & (tokens < config.vocab_size)
    x = jnp.where((known | ~mask)[..., None], x, jnp.asarray(jnp.nan, x.dtype))
    if x.dtype == jnp.float16:  # which Gemma's residual stream exceeds: only parameters are kept in it
        x = x.astype(jnp.float32)
    if config.embed_scale != 1.0:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if config.learned_positions:  # beyond the last one: NaN, rather than the last one again
        x = x + jnp.take(params["positions"]["embedding"], positions, axis=0, mode="fill", fill_value=jnp.nan)
    return x


def _position_tables(config: ModelConfig, part: Part, before: Sequence[Part] = ()):
    """Pairs of RoPE tables and attention masks, for global layers and, where the model has any, for local ones."""
    T, positions = part.x.shape[1], part.positions
    within = jnp.tril(jnp.ones((T, T), bool)) if part.within is None else part.within
    keys = [(s.of(s.positions), s.of(s.mask)) for s in part.cache]
    keys += [(earlier.positions[part.rows], earlier.mask[part.rows]) for earlier in before]
    distances = [positions[:, :, None] - key[:, None] for key, _ in (*keys, (positions, None))]
    looks = [mask[:, None] for _, mask in keys] + [part.mask[:, None] & within]
    full = tuple(look & (d >= 0) for look, d in zip(looks, distances, strict=True))
    width = config.rotary_dim or config.head_dim
    tables = [(rope_tables(config.rope, width, positions), full)]
    if any(config.is_local):
        assert config.window is not None  # ModelConfig refuses it
        near = tuple(m & (d < config.window) for m, d in zip(full, distances, strict=True))
        tables.append((rope_tables(config.rope_local or config.rope, width, positions), near))
    return tables


def _read_out(config: ModelConfig, params: Params, x, mask, logits: str | int):
    """Logits of the requested slots, float32."""
    if logits == "none":
        return None
    if logits == "last":
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    elif isinstance(logits, int):
        x = x[:, -logits:]
    out = unembed(config, params, x)
    return out[:, 0] if logits == "last" else out


_FEW_ROWS = 96
"""Up to this many residuals, an unembedding takes less time with the vocabulary as its rows."""


def unembed(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Logits [...,V], float32, of residuals [...,D] after the last layer: final norm, unembedding, softcap."""
    x = cast(jax.Array, Norm(config).apply({"params": params["final_norm"]}, x))
    kernel = params["embed"]["embedding"] if config.tied else params["unembed"]["kernel"]
    product = partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
    if not config.tied:
        out = product("...d,dv->...v", x, kernel)
    elif (n_rows := math.prod(x.shape[:-1])) > _FEW_ROWS:
        out = product("...d,vd->...v", x, kernel)
    else:  # so that a CPU reads the long matrix as it lies; the barrier keeps the transpose out of the product
        out = jax.lax.optimization_barrier(product("vd,rd->vr", kernel, x.reshape(n_rows, -1)))
        out = out.T.reshape(*x.shape[:-1], -1)
    if config.final_softcap is not None:
        out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    return out
