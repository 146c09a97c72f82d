"""What an edit is: data that `forward` takes into its scan over layers; edits of the residual stream itself.

`B` denotes the batch, `T` tokens, `L` layers, `D` the width at the site.

Every leaf leads with `L`; the batch axis may be 1 where all rows share a value. An edit adds `delta(x)` to x where
`where` holds, so a neutral edit adds exact zeros. `where [L,B,T]` says at which layers, rows and prompt tokens it acts
(a token axis of 1 means every token), `after [L,B]` whether it acts on the tokens that follow the prompt, generated or
scored, and `before [L,B]` whether it acts on worked examples that are given apart from the prompt (`Prefix`). What a
cache holds is past editing. `Edits` maps a site to its edits; a site that is absent costs nothing. Edits made of
dictionaries are in `jaxmech.interventions.edits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxmech.io.arguments import as_indices
from jaxmech.io.reprs import short_repr


@struct.dataclass
class Edit:
    """What all kinds share; a new kind is a `flax.struct.dataclass` with arrays of its own and a method `change`.

    where, after, before (None: nowhere): see above; site: where it belongs (None: anywhere); reads: whose x it wants
    (None: its site's). BY_ROW names a kind's arrays whose second axis is the batch.
    """

    BY_ROW: ClassVar[tuple[str, ...]] = ()
    where: jax.Array
    after: jax.Array
    before: jax.Array | None = struct.field(default=None, kw_only=True)
    site: str | None = struct.field(pytree_node=False, default=None, kw_only=True)
    reads: str | None = struct.field(pytree_node=False, default=None, kw_only=True)

    __repr__ = short_repr

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.__repr__ = short_repr  # or the dataclass would make one of its own, which prints whole arrays

    def change(self, x: jax.Array) -> jax.Array:
        """x' - x where the edit acts, float32 [B,T,D] or what broadcasts to it, from x [B,T,D] of one layer."""
        raise NotImplementedError

    def delta(self, x: jax.Array) -> jax.Array:
        """What to add at the edit's site, once the leaves are sliced to one layer; x [B,T,D] of the site it reads."""
        change = self.change(x.astype(jnp.float32))
        return jnp.where(self.where[..., None], change, 0.0)

    def for_answers(self) -> Edit:
        """The same edit for a pass over later tokens only."""
        return self.replace(where=self.after[..., None])

    def for_prefix(self) -> Edit:
        """The same edit for a pass over the worked examples only."""
        return self.replace(where=self.before[..., None])

    def rows(self) -> int:
        """How many prompts it tells apart; 1 where all share its values."""
        leaves = self.where, self.after, self.before, *(getattr(self, name) for name in self.BY_ROW)
        return max(leaf.shape[1] for leaf in leaves if leaf is not None)

    def acts(self) -> jax.Array:
        """Layers [L] at which it may change anything where it acts: what it says in vain costs nothing."""
        return jnp.ones(len(self.where), bool)

    def from_slot(self, cut: int) -> Edit:
        """The same edit for a prompt without its first `cut` slots."""
        return self if self.where.shape[-1] == 1 else self.replace(where=self.where[..., cut:])

    def pad_prompt(self, front: int) -> Edit:
        """The same edit for a prompt with `front` slots of padding before it, where it does not act."""
        if self.where.shape[-1] == 1:  # every token; nobody reads what becomes of padding
            return self
        return self.replace(where=jnp.pad(self.where, ((0, 0), (0, 0), (front, 0))))

    def with_answers(self, prompt_length: int, answer_length: int) -> Edit:
        """The same edit for a pass over the prompt and `answer_length` tokens behind it."""
        layers, batch, slots = self.where.shape
        if slots not in (1, prompt_length):
            raise ValueError(
                f"{type(self).__name__}: `where` speaks of {slots} prompt tokens, the prompts have {prompt_length}; "
                "give edits.at_last or at_positions prompts.tokens.shape[1] of them"
            )
        batch = max(batch, self.after.shape[1])
        prompt = jnp.broadcast_to(self.where, (layers, batch, prompt_length))
        answer = jnp.broadcast_to(self.after[..., None], (layers, batch, answer_length))
        return self.replace(where=jnp.concatenate([prompt, answer], axis=-1))


Edits = dict[str, tuple[Edit, ...]]


@struct.dataclass
class Add(Edit):
    """x + vector: steering. vector [L,B,D]."""

    vector: jax.Array
    BY_ROW = ("vector",)

    def acts(self) -> jax.Array:
        return (self.vector != 0).any((1, 2))

    def change(self, x):
        return self.vector[:, None, :]


@struct.dataclass
class Replace(Edit):
    """x becomes the donor: patching a whole site, or freezing it. donor [L,B,T,D], T may be 1.

    Of a donor that speaks of each prompt token, the last one serves all generated tokens, where the edit acts on them.
    """

    donor: jax.Array
    BY_ROW = ("donor",)

    def for_prefix(self) -> Replace:
        if self.donor.shape[2] != 1:
            raise ValueError(
                f"edits.Replace: a donor of {self.donor.shape[2]} tokens says nothing of the worked examples in front "
                "of the prompt; leave out `before`, or give one donor for all tokens"
            )
        return super().for_prefix()

    def from_slot(self, cut: int) -> Replace:
        donor = self.donor if self.donor.shape[2] == 1 else self.donor[:, :, cut:]
        return super().from_slot(cut).replace(donor=donor)

    def for_answers(self) -> Replace:
        return super().for_answers().replace(donor=self.donor[:, :, -1:])

    def with_answers(self, prompt_length: int, answer_length: int) -> Replace:
        longer = super().with_answers(prompt_length, answer_length)
        if self.donor.shape[2] != prompt_length or prompt_length == 1:  # one for all tokens, or one that has them all
            return longer
        return longer.replace(donor=jnp.pad(self.donor, ((0, 0), (0, 0), (0, answer_length), (0, 0)), mode="edge"))

    def pad_prompt(self, front: int) -> Replace:
        padded = super().pad_prompt(front)
        if self.donor.shape[2] == 1:
            return padded
        return padded.replace(donor=jnp.pad(self.donor, ((0, 0), (0, 0), (front, 0), (0, 0))))

    def change(self, x):
        return self.donor - x


def merge(*edits: Edits | None) -> Edits:
    """All edits of several, site by site."""
    out: Edits = {}
    for each in edits:
        for site, group in (each or {}).items():
            out[site] = out.get(site, ()) + tuple(group)
    return out


def with_answers(edits: Edits | None, prompt_length: int, answer_length: int) -> Edits:
    """`edits` for a pass over the prompt and the answers' tokens behind it."""
    return {s: tuple(e.with_answers(prompt_length, answer_length) for e in g) for s, g in (edits or {}).items()}


def from_slot(edits: Edits, cut: int) -> Edits:
    """`edits` for prompts without their first `cut` slots."""
    return {site: tuple(e.from_slot(cut) for e in group) for site, group in edits.items()}


def on_prefix(edits: Edits | None) -> Edits:
    """`edits` for a pass over the worked examples before the prompt: those that may act there."""
    out = {site: tuple(e.for_prefix() for e in group if e.before is not None) for site, group in (edits or {}).items()}
    return {site: group for site, group in out.items() if group}


def everywhere(n_layers: int, layers: Sequence[int] | jax.Array | None = None) -> dict[str, jax.Array]:
    """`where`, `after` and `before` for every token at `layers` (all by default), as keyword arguments of an edit.

    Args:
      layers: integers are indices, bools a mask [L], which may be traced.

    Raises:
      ValueError: a layer that does not exist, or something else.
    """
    active = _layer_mask(n_layers, layers)
    return {"where": active[:, None, None], "after": active[:, None], "before": active[:, None]}


def at_last(n_layers: int, length: int, layers: Sequence[int] | jax.Array | None = None) -> dict[str, jax.Array]:
    """`where` and `after` for the last of `length` prompt tokens alone, `prompts.tokens.shape[1]` of them (left-padded
    prompts: the decision token)."""
    return at_positions(n_layers, jnp.arange(length) == length - 1, layers)


def at_positions(
    n_layers: int, positions: jax.Array, layers: Sequence[int] | jax.Array | None = None
) -> dict[str, jax.Array]:
    """`where` and `after` for the prompt tokens where `positions` [T] or [B,T] is True, and no others.

    Raises:
      ValueError: positions that are no bools, or `layers` as for `everywhere`.
    """
    active, positions = _layer_mask(n_layers, layers), jnp.asarray(positions)
    if positions.dtype != bool or positions.ndim not in (1, 2):
        raise ValueError(
            f"positions: expected bools [T] or [B,T], True where to act, got {positions.dtype}{list(positions.shape)}; "
            "for token 5 of T write np.arange(T) == 5"
        )
    where = active[:, None, None] & (positions if positions.ndim == 2 else positions[None])
    return {"where": where, "after": jnp.zeros((n_layers, 1), bool)}


def add_vector(vector: jax.Array, **spans: jax.Array) -> Add:
    """Steering by `vector` [L,D] or [L,B,D]; `spans` as `everywhere` or `at_last` give them.

    Raises:
      ValueError: no spans, or a vector of other axes.
    """
    vector = jnp.asarray(vector)
    if vector.ndim not in (2, 3):
        raise ValueError(f"vector: expected [L,D] or [L,B,D], got shape {vector.shape}; zeros at the layers left alone")
    return Add(vector=vector if vector.ndim == 3 else vector[:, None], **_checked(spans))


def _checked(spans: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same spans, if they say where an edit acts."""
    if not {"where", "after"} <= spans.keys() <= {"where", "after", "before"}:
        raise ValueError(
            f"spans: an edit has to know where it acts; give it **edits.everywhere(L), **edits.at_last(L, T) or "
            f"**edits.at_positions(L, positions), got {sorted(spans) or 'nothing'}"
        )
    return spans


def _layer_mask(n_layers: int, layers) -> jax.Array:
    if layers is None:
        return jnp.ones(n_layers, bool)
    if isinstance(layers, jax.core.Tracer) and layers.dtype == bool and layers.shape == (n_layers,):
        return layers
    if isinstance(layers, jax.core.Tracer):
        raise ValueError(f"layers: traced, it has to be a mask of {n_layers} bools, got {layers.dtype}{layers.shape}")
    return jnp.zeros(n_layers, bool).at[as_indices("layers", layers, n_layers)].set(True)
