"""What an edit is: data that `forward` takes into its scan over layers; edits of the residual stream itself.

`B` denotes the batch, `T` tokens, `L` layers, `D` the width at the site.

Every leaf leads with `L`; the batch axis may be 1 where all rows share a value. An edit adds `delta(x)` to x where its
`Spans` say, so a neutral edit adds exact zeros. Cached tokens can no longer be edited. `Edits` maps a site to its
edits; a site that is absent costs nothing. Edits made of dictionaries are in `jaxmech.interventions.edits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from jaxmech.io.arguments import as_indices
from jaxmech.io.reprs import short_repr


@struct.dataclass
class Spans:
    """Where an edit acts: at which layers, and on which tokens of each row.

    prefix [L,B]: on worked examples given apart from the prompt (`Prefix`), None for nowhere, which keeps their pass
    out of a sweep; prompt [L,B,T]: on the prompt's tokens, a token axis of 1 meaning all of them; answer [L,B]: on the
    tokens that follow the prompt, generated or scored.
    """

    prefix: jax.Array | None
    prompt: jax.Array
    answer: jax.Array

    __repr__ = short_repr

    if TYPE_CHECKING:  # struct.dataclass adds it

        def replace(self, **changes: Any) -> Self: ...

    def from_slot(self, cut: int) -> Spans:
        """The same for a prompt without its first `cut` slots."""
        return self if self.prompt.shape[-1] == 1 else self.replace(prompt=self.prompt[..., cut:])

    def pad_prompt(self, front: int) -> Spans:
        """The same for a prompt with `front` slots of padding before it."""
        if self.prompt.shape[-1] == 1:  # every token; what becomes of padding is never read
            return self
        return self.replace(prompt=jnp.pad(self.prompt, ((0, 0), (0, 0), (front, 0))))

    def with_answers(self, prompt_length: int, answer_length: int) -> Spans:
        """The same for a pass over the prompt and the answers' tokens after it.

        Raises:
          ValueError: spans of prompts of another length.
        """
        layers, batch, slots = self.prompt.shape
        if slots not in (1, prompt_length):
            raise ValueError(
                f"spans: made for {slots} prompt tokens, but the prompts have {prompt_length}; give edits.at_last or "
                "at_positions prompts.tokens.shape[1] of them"
            )
        batch = max(batch, self.answer.shape[1])
        prompt = jnp.broadcast_to(self.prompt, (layers, batch, prompt_length))
        answer = jnp.broadcast_to(self.answer[..., None], (layers, batch, answer_length))
        return self.replace(prompt=jnp.concatenate([prompt, answer], axis=-1))


@struct.dataclass
class Edit:
    """What all kinds of edit share; a new kind is a `flax.struct.dataclass` with its own arrays and a method `change`.

    spans: where it acts; site: where it belongs (None: anywhere); reads: the site whose x it takes (None: its own). A
    kind names its arrays [L,B,...] in BY_ROW, and those [L,B,T,...] in BY_TOKEN too. In the latter T may be 1, for all
    tokens; of values per prompt token, the last one serves all tokens that follow the prompt.
    """

    BY_ROW: ClassVar[tuple[str, ...]] = ()
    BY_TOKEN: ClassVar[tuple[str, ...]] = ()
    spans: Spans
    site: str | None = struct.field(pytree_node=False, default=None, kw_only=True)
    reads: str | None = struct.field(pytree_node=False, default=None, kw_only=True)

    __repr__ = short_repr

    if TYPE_CHECKING:  # struct.dataclass adds it

        def replace(self, **changes: Any) -> Self: ...

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        # Otherwise the dataclass would generate one, which prints whole arrays.
        cls.__repr__ = short_repr  # type: ignore[method-assign, assignment]

    def change(self, x: jax.Array) -> jax.Array:
        """x' - x where the edit acts, float32 [B,T,D] or what broadcasts to it, from x [B,T,D] of one layer."""
        raise NotImplementedError

    def acts(self) -> jax.Array:
        """Layers [L] at which `change` may be other than zero; a kind that knows them saves a sweep work."""
        return jnp.ones(len(self.spans.prompt), bool)

    def delta(self, x: jax.Array) -> jax.Array:
        """What to add at the edit's site, once the leaves are sliced to one layer; x [B,T,D] of the site it reads."""
        return jnp.where(self.spans.prompt[..., None], self.change(x.astype(jnp.float32)), 0.0)

    def rows(self) -> int:
        """How many prompts it tells apart; 1 where all share its values."""
        leaves = *jax.tree.leaves(self.spans), *(getattr(self, name) for name in self.BY_ROW)
        return max(leaf.shape[1] for leaf in leaves)

    def for_prefix(self) -> Edit:
        """The same edit for a pass over the worked examples only."""
        if per_token := [name for name in self.BY_TOKEN if getattr(self, name).shape[2] != 1]:
            raise ValueError(
                f"edits.{type(self).__name__}: {per_token[0]} has a value per prompt token and none for the worked "
                "examples; use spans.replace(prefix=None), or give one value for all"
            )
        assert self.spans.prefix is not None  # `on_prefix` leaves others out
        return self.replace(spans=self.spans.replace(prompt=self.spans.prefix[..., None]))

    def for_answers(self) -> Edit:
        """The same edit for a pass over later tokens only."""
        return self._on(self.spans.replace(prompt=self.spans.answer[..., None]), lambda a: a[:, :, -1:])

    def from_slot(self, cut: int) -> Edit:
        """The same edit for a prompt without its first `cut` slots."""
        return self._on(self.spans.from_slot(cut), lambda a: a[:, :, cut:])

    def pad_prompt(self, front: int) -> Edit:
        """The same edit for a prompt with `front` slots of padding before it, where it does not act."""
        return self._on(self.spans.pad_prompt(front), lambda a: _pad_tokens(a, (front, 0)))

    def with_answers(self, prompt_length: int, answer_length: int) -> Edit:
        """The same edit for a pass over the prompt and `answer_length` tokens after it."""

        def longer(a):  # unless it has the answers' tokens already
            return _pad_tokens(a, (0, answer_length)) if a.shape[2] == prompt_length else a

        return self._on(self.spans.with_answers(prompt_length, answer_length), longer)

    def _on(self, spans: Spans, recut: Callable[[jax.Array], jax.Array]) -> Edit:
        """The same edit with other spans, each array that has a value per token recut to them."""
        arrays = {name: getattr(self, name) for name in self.BY_TOKEN}
        return self.replace(spans=spans, **{name: recut(a) for name, a in arrays.items() if a.shape[2] != 1})


def _pad_tokens(a: jax.Array, padding: tuple[int, int]) -> jax.Array:
    return jnp.pad(a, ((0, 0), (0, 0), padding, *[(0, 0)] * (a.ndim - 3)), mode="edge")


Edits = dict[str, tuple[Edit, ...]]


@struct.dataclass
class Add(Edit):
    """x + vector: steering. vector [L,B,D]."""

    vector: jax.Array
    BY_ROW = ("vector",)

    def acts(self) -> jax.Array:
        return (self.vector != 0).any((1, 2))

    def change(self, x: jax.Array) -> jax.Array:
        return self.vector[:, None, :]


@struct.dataclass
class Replace(Edit):
    """x becomes the donor: patching a whole site, or freezing it. donor [L,B,T,D], T may be 1."""

    donor: jax.Array
    BY_ROW = BY_TOKEN = ("donor",)

    def change(self, x: jax.Array) -> jax.Array:
        return self.donor - x


def merge(*edits: Edits | None) -> Edits:
    """Several `Edits` joined, site by site."""
    out: Edits = {}
    for by_site in edits:
        for site, group in (by_site or {}).items():
            out[site] = out.get(site, ()) + tuple(group)
    return out


def with_answers(edits: Edits | None, prompt_length: int, answer_length: int) -> Edits:
    """`edits` for a pass over the prompt and the answers' tokens after it."""
    return {s: tuple(e.with_answers(prompt_length, answer_length) for e in g) for s, g in (edits or {}).items()}


def from_slot(edits: Edits, cut: int) -> Edits:
    """`edits` for prompts without their first `cut` slots."""
    return {site: tuple(e.from_slot(cut) for e in group) for site, group in edits.items()}


def on_prefix(edits: Edits | None) -> Edits:
    """`edits` for a pass over the worked examples before the prompt: those that may act there."""
    acting = {s: [e for e in group if e.spans.prefix is not None] for s, group in (edits or {}).items()}
    return {site: tuple(edit.for_prefix() for edit in group) for site, group in acting.items() if group}


def everywhere(n_layers: int, layers: Sequence[int] | jax.Array | None = None) -> Spans:
    """Every token, worked examples and answers included, at `layers` (all by default).

    Args:
      layers: integers are indices, bools a mask [L], which may be traced.

    Raises:
      ValueError: a layer that does not exist, or `layers` of another kind.
    """
    active = _layer_mask(n_layers, layers)
    return Spans(active[:, None], active[:, None, None], active[:, None])


def at_last(n_layers: int, length: int, layers: Sequence[int] | jax.Array | None = None) -> Spans:
    """The last of `length` prompt tokens alone, `prompts.tokens.shape[1]` of them (left-padded prompts: the decision
    token)."""
    return at_positions(n_layers, jnp.arange(length) == length - 1, layers)


def at_positions(n_layers: int, positions: jax.Array, layers: Sequence[int] | jax.Array | None = None) -> Spans:
    """The prompt tokens where `positions` [T] or [B,T] is True, and no others.

    Raises:
      ValueError: positions that are not bools, or `layers` as for `everywhere`.
    """
    active, positions = _layer_mask(n_layers, layers), jnp.asarray(positions)
    if positions.dtype != bool or positions.ndim not in (1, 2):
        raise ValueError(
            f"positions: expected bools [T] or [B,T], True where to act, got {positions.dtype}{list(positions.shape)}; "
            "for token 5 of T write np.arange(T) == 5"
        )
    prompt = active[:, None, None] & (positions if positions.ndim == 2 else positions[None])
    return Spans(None, prompt, jnp.zeros((n_layers, 1), bool))


def add_vector(vector: jax.Array, spans: Spans) -> Add:
    """Steering by `vector` [L,D] or [L,B,D].

    Raises:
      ValueError: no spans, or a vector of other axes.
    """
    vector = jnp.asarray(vector)
    if vector.ndim not in (2, 3):
        raise ValueError(f"vector: expected [L,D] or [L,B,D], got shape {vector.shape}; zeros at the layers left alone")
    return Add(vector=vector if vector.ndim == 3 else vector[:, None], spans=_checked(spans))


def _checked(spans: Spans) -> Spans:
    """The same spans; refuses anything else."""
    if not isinstance(spans, Spans):
        raise ValueError(
            "spans: an edit has to know where it acts; give it edits.everywhere(L), edits.at_last(L, T) or "
            f"edits.at_positions(L, positions), got {type(spans).__name__}"
        )
    return spans


def _layer_mask(n_layers: int, layers) -> jax.Array:
    if layers is None:
        return jnp.ones(n_layers, bool)
    if isinstance(layers, jax.core.Tracer) and layers.dtype == bool and layers.shape == (n_layers,):
        return layers
    if isinstance(layers, jax.core.Tracer):
        raise ValueError(f"layers: when traced, expected {n_layers} bools, got {layers.dtype}{layers.shape}")
    return jnp.zeros(n_layers, bool).at[as_indices("layers", layers, n_layers)].set(True)
