"""The programs of a study, as a TPU slice would run them: only shapes and shardings, no weights.

`B` denotes prompts, `T` tokens, `L` layers, `D` the residual width, `F` dictionary features, `K` families, `N` choices,
`M` trie nodes, `R` rows of a training batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxmech.ahead.compile import Program
from jaxmech.answers.prompts import Prompts
from jaxmech.answers.trie import Trie
from jaxmech.contrast.moments import empty_moments
from jaxmech.interventions import edits
from jaxmech.interventions.attribution import attribute, path_gradient
from jaxmech.interventions.sweep import prepare, run_chunk
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Tap, forward, param_shapes
from jaxmech.models.sharding import MESH_AXES, param_shardings
from jaxmech.sae.collect import update_moments
from jaxmech.sae.module import SAE, SAEConfig
from jaxmech.sae.module import param_shapes as sae_shapes
from jaxmech.sae.sharding import sae_shardings
from jaxmech.sae.training import SAETrainConfig
from jaxmech.sae.training.step import batch_sharding, init_state, state_shardings, train_step


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the programs are.

    Attributes:
      features: of each layer's dictionary. prompts, tokens: of a batch; even, as collection takes pairs.
      families, choices, nodes: as in a study of the default games.
      points, window, selected: of a sweep: points at once, edited tokens of each prompt, selected features per layer.
      steps: of integrated gradients.
      rows: activations in a training batch. dtype: of the model's parameters.
    """

    features: int
    prompts: int = 32
    tokens: int = 384
    families: int = 32
    choices: int = 11
    nodes: int = 34
    points: int = 8
    window: int = 64
    selected: int = 8
    steps: int = 8
    rows: int = 2048
    dtype: Any = jnp.bfloat16


def forward_program(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> Program:
    """Next-token logits, and the residual of every layer at the last token."""
    params, tokens = _params(config, mesh, sizes), _spread(mesh, (sizes.prompts, sizes.tokens), jnp.int32)
    run = jax.jit(partial(_forward, config))
    return Program("forward", run, (params, tokens), {"model": params}, (config.n_layers,))


def _forward(config, params, tokens):
    out = forward(config, params, tokens, taps={"resid": Tap("resid_post", _last)})
    return out.logits, out.taps["resid"]


def _last(_, x):
    return x[:, -1]


def sweep_program(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> Program:
    """A chunk of sweep points: selected features of every layer moved by a coefficient, at a window of tokens; those
    before it are cached. It starts at the first layer, the most that a chunk can take."""
    params, prompts = _params(config, mesh, sizes), _prompts(config, mesh, sizes)
    shared = jax.eval_shape(partial(prepare, config, cut=sizes.tokens - sizes.window), params, prompts)
    shared = jax.tree.map(lambda leaf: _put(leaf, _place_shared(leaf, config, mesh)), shared)
    L, K, D = config.n_layers, sizes.selected, config.d_model
    shapes = {"W_enc": (L, D, K), "b_enc": (L, K), "threshold": (L, K), "W_dec": (L, K, D), "shift": (L, K)}
    chosen = {name: _spread(mesh, shape, spec=PartitionSpec()) for name, shape in shapes.items()}
    start = _spread(mesh, (), jnp.int32, PartitionSpec())
    args = (config, params, shared, start, Partial(_move_features, chosen), _spread(mesh, (sizes.points,)))
    return Program("sweep", run_chunk, args, {"model": params}, (L,), trips=L)


def _move_features(chosen, coefficient) -> edits.Edits:
    encoder = edits.Gathered(chosen["W_enc"], chosen["b_enc"], chosen["threshold"])
    shift = coefficient * chosen["shift"][:, None]  # [L,1,K]
    spans = edits.everywhere(len(shift)).replace(prefix=None)
    moved = edits.Features(encoder=encoder, W_dec=chosen["W_dec"], gain=jnp.ones_like(shift), shift=shift, spans=spans)
    return {"resid_post": (moved,)}


def _place_shared(leaf, config: ModelConfig, mesh: Mesh) -> NamedSharding:
    """Keys and values [L,B,S,G,h] with their heads over the mesh's model axis, where it divides them."""
    heads = MESH_AXES["kv"] if config.n_kv_heads % mesh.shape[MESH_AXES["kv"]] == 0 else None
    is_cache = leaf.ndim == 5 and leaf.shape[::4] == (config.n_layers, config.head_dim)
    return NamedSharding(mesh, PartitionSpec(None, None, None, heads) if is_cache else PartitionSpec())


def collection_program(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> Program:
    """Moments of every feature of every layer, folded in from a batch of pairs."""
    params, saes = _params(config, mesh, sizes), _saes(config, mesh, sizes)
    prompts, values = _prompts(config, mesh, sizes), _spread(mesh, (sizes.prompts, sizes.choices))
    member = _spread(mesh, (sizes.prompts // 2, sizes.families))
    moments = jax.eval_shape(partial(empty_moments, config.n_layers, sizes.families, sizes.features))
    moments = jax.tree.map(lambda m: _spread(mesh, m.shape, m.dtype, _by_feature(m.shape, sizes, mesh)), moments)
    options = {"saes": saes, "values": values, "member": member, "moments": moments}
    parameters = {"model": params, "dictionaries": saes.params}
    return Program(
        "collection", update_moments, (config, params, prompts), parameters, (config.n_layers,), options=options
    )


def attribution_program(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> Program:
    """Integrated gradients of the expected amount with respect to every feature of every layer, layers recomputed in
    the backward pass."""
    params, saes = _params(config, mesh, sizes), _saes(config, mesh, sizes)
    prompts, values = _prompts(config, mesh, sizes), _spread(mesh, (sizes.prompts, sizes.choices))
    rows = PartitionSpec(None, MESH_AXES["batch"])
    base = _spread(mesh, (config.n_layers, sizes.prompts, config.d_model), spec=rows)
    points = _spread(mesh, (sizes.steps,), spec=PartitionSpec())
    run = jax.jit(partial(_attribution, config))
    args = (params, prompts, values, saes, base, base, points)
    return Program("attribution", run, args, {"model": params, "dictionaries": saes.params}, (config.n_layers,))


def _attribution(config, params, prompts, values, saes, base, donor, points):
    gradient = path_gradient(
        config, params, prompts, values, saes=saes, base=base, donor=donor, points=points, remat=True
    )
    return attribute(saes, gradient, base=base, donor=donor)


def training_program(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> Program:
    """A step of training a dictionary for every layer at once."""
    train = SAETrainConfig(d_sae=sizes.features, sparsity=64, init="random")
    shape = (config.n_layers, sizes.rows, config.d_model)

    def start(x):
        still = np.zeros((config.n_layers, config.d_model), np.float32)
        stream: Any = SimpleNamespace(layers=range(config.n_layers), d_in=config.d_model, batch_size=sizes.rows,
                                 statistics=lambda: (still, still + 1), batch=lambda _: x)  # fmt: skip
        return init_state(train, stream, jax.random.key(0))

    state = jax.eval_shape(start, jax.ShapeDtypeStruct(shape, jnp.float32))
    state = jax.tree.map(_put, state, state_shardings(train, state, mesh))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
    lead = (1, config.n_layers)
    return Program("training", train_step, (train, state, x, mesh), {"dictionaries": state.params}, lead)


PROGRAMS: Mapping[str, Callable[[ModelConfig, Mesh, Sizes], Program]] = {
    "forward": forward_program,
    "sweep": sweep_program,
    "collection": collection_program,
    "attribution": attribution_program,
    "training": training_program,
}


def _put(leaf, sharding: NamedSharding) -> Any:
    """The shape that stands in for an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _spread(mesh: Mesh, shape, dtype=jnp.float32, spec: PartitionSpec | None = None) -> Any:
    """The shape that stands in for an array; by default the rows of a batch over the mesh's data axis."""
    spec = PartitionSpec(MESH_AXES["batch"]) if spec is None else spec
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _by_feature(shape, sizes: Sizes, mesh: Mesh) -> PartitionSpec:
    """Statistics [..., F] with their features over the mesh's model axis."""
    last = MESH_AXES["feature"] if shape[-1:] == (sizes.features,) and len(shape) > 2 else None
    return PartitionSpec(*[None] * (len(shape) - 1), last)


def _params(config: ModelConfig, mesh: Mesh, sizes: Sizes):
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, sizes.dtype), param_shapes(config))
    return jax.tree.map(_put, shapes, param_shardings(config, mesh))


def _saes(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> SAE:
    """JumpReLU dictionaries of all layers, in float32."""
    facts = SAEConfig(config.d_model, sizes.features, layers=tuple(range(config.n_layers)))
    leaves: dict[str, Any] = {
        n: jax.ShapeDtypeStruct((config.n_layers, *s), jnp.float32) for n, s in sae_shapes(facts).items()
    }
    saes = SAE(leaves, facts)
    return jax.tree.map(_put, saes, sae_shardings(saes, mesh))


def _prompts(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> Prompts:
    (B, T), M = (sizes.prompts, sizes.tokens), sizes.nodes
    rows, ints = partial(_spread, mesh), jnp.int32
    trie = Trie(
        tokens=rows((B, M), ints), depth=rows((B, M), ints), parent=rows((B, M), ints),
        ancestors=rows((B, M, M), bool), continues=rows((B, M + 1), jnp.uint8),
        cells=rows((B, sizes.choices, 2, M + 1), bool),
        kinds=_spread(mesh, (config.vocab_size,), jnp.uint8, PartitionSpec()),
    )  # fmt: skip
    return Prompts(tokens=rows((B, T), ints), mask=rows((B, T), bool), trie=trie)
