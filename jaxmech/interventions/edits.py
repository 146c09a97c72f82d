"""Edits made of dictionaries, and with them all kinds of edits under one name.

`B` denotes the batch, `T` tokens, `L` layers, `D` the width at the site, `F` dictionary features, `K` selected ones.

An edit that is made of a dictionary knows the site it belongs to, and may read another site of the same layer: a
transcoder's features are read at the feed-forward sublayer's input and written at its output. What all edits have
in common is described in `jaxmech.models.edits`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmech.io.arguments import Array
from jaxmech.io.reprs import short_repr
from jaxmech.models.edits import Add as Add
from jaxmech.models.edits import Edit as Edit
from jaxmech.models.edits import Edits as Edits
from jaxmech.models.edits import Replace as Replace
from jaxmech.models.edits import Spans as Spans
from jaxmech.models.edits import _checked
from jaxmech.models.edits import add_vector as add_vector
from jaxmech.models.edits import at_last as at_last
from jaxmech.models.edits import at_positions as at_positions
from jaxmech.models.edits import everywhere as everywhere
from jaxmech.models.edits import from_slot as from_slot
from jaxmech.models.edits import merge as merge
from jaxmech.models.edits import on_prefix as on_prefix
from jaxmech.models.edits import with_answers as with_answers
from jaxmech.sae.module import SAE, normalise
from jaxmech.sae.selection import Selection, check_selection
from jaxmech.sae.selection import select as select
from jaxmech.sae.selection import select_sets as select_sets

_PRECISION = jax.lax.Precision.HIGHEST


@struct.dataclass
class Gathered:
    """Encodes the chosen features alone: exact for ReLU (threshold 0), JumpReLU and linear (threshold -inf) codes.

    W_enc [L,D,K], b_enc [L,K] (a subtracted b_dec folded in), threshold [L,K]; normalize as in `SAEConfig`.
    """

    W_enc: jax.Array
    b_enc: jax.Array
    threshold: jax.Array
    normalize: str = struct.field(pytree_node=False, default="none")

    __repr__ = short_repr

    def encode(self, x: jax.Array) -> jax.Array:
        x, *_ = normalise(self.normalize, x)
        pre = jnp.einsum("btd,dk->btk", x, self.W_enc, precision=_PRECISION) + self.b_enc
        return jnp.where(pre <= self.threshold, 0.0, pre)  # this comparison keeps NaN


@struct.dataclass
class Full:
    """Encodes the whole dictionary, then takes the chosen features: the exact path for TopK kinds.

    sae: stacked over all L layers; index [L,K].
    """

    sae: SAE
    index: jax.Array

    __repr__ = short_repr

    @property
    def normalize(self) -> str:
        return self.sae.config.normalize

    def encode(self, x: jax.Array) -> jax.Array:
        return self.sae.encode(x)[..., self.index]


@struct.dataclass
class Features(Edit):
    """Chosen features z become gain * z + shift, in delta form: x + (z' - z) @ W_dec.

    What the dictionary does not explain of x is kept by construction. gain = 0 sets, gain = 1 adds, shift = 0
    scales; gain = 1 with shift = 0 is neutral. W_dec [L,K,D]; gain, shift [L,B,K].
    """

    encoder: Gathered | Full
    W_dec: jax.Array
    gain: jax.Array
    shift: jax.Array
    BY_ROW = ("gain", "shift")

    def acts(self) -> jax.Array:
        return (self.W_dec != 0).any((1, 2))

    def change(self, x: jax.Array) -> jax.Array:
        z = self.encoder.encode(x)
        return _decoded(self, x, self.gain[:, None] * z + self.shift[:, None] - z)


@struct.dataclass
class SetFeatures(Edit):
    """Chosen features take given values, in delta form: x + (target - z) @ W_dec.

    W_dec [L,K,D]; target [L,B,T,K], T may be 1. Where an edit upstream has moved z already, less is left to add.
    """

    encoder: Gathered | Full
    W_dec: jax.Array
    target: jax.Array
    BY_ROW = BY_TOKEN = ("target",)

    def acts(self) -> jax.Array:
        return (self.W_dec != 0).any((1, 2))

    def change(self, x: jax.Array) -> jax.Array:
        return _decoded(self, x, self.target - self.encoder.encode(x))


@struct.dataclass
class Splice(Edit):
    """x becomes its reconstruction. sae: stacked over all L layers (see `over_layers`), of one site."""

    sae: SAE

    def change(self, x: jax.Array) -> jax.Array:
        return self.sae(x) - x


@struct.dataclass
class PatchParts(Edit):
    """x moves towards the donor by a share of the whole difference and a share of what the dictionary explains of it.

    x + whole * (donor - x) + explained * (r(donor) - r(x)), r the reconstruction. (1, 0) replaces the residual, (0, 1)
    all features, (1, -1) the error alone. sae: stacked over all L layers; donor [L,B,D], one token; whole and
    explained [L].
    """

    sae: SAE
    donor: jax.Array
    whole: jax.Array
    explained: jax.Array
    BY_ROW = ("donor",)

    def change(self, x: jax.Array) -> jax.Array:
        donor = self.donor[:, None]
        return self.whole * (donor - x) + self.explained * (self.sae(donor) - self.sae(x))


def _decoded(edit: Features | SetFeatures, x: jax.Array, difference: jax.Array) -> jax.Array:
    """What differences of the chosen features [B,T,K] add to x [B,T,D]."""
    change = jnp.einsum("btk,kd->btd", difference, edit.W_dec, precision=_PRECISION)
    _, scale, _ = normalise(edit.encoder.normalize, x)
    return change if scale is None else change * scale


def gather(saes: SAE, selection: Selection) -> tuple[Gathered | Full, jax.Array]:
    """Encoder and decoder rows [L,K,D] of the chosen features; all zero where nothing is chosen.

    The features are encoded alone where that is exact (`gather_features`), otherwise the dictionary in full.

    Raises:
      ValueError: a "batchtopk" dictionary, or a selection, unless traced, of features that do not exist.
    """
    _refuse_batch_ranks(saes.config)
    if not saes.config.by_rank:
        return gather_features(saes, selection)
    saes = saes.as_stack()
    check_selection(saes.config, selection)
    rows = _rows(saes, selection)
    W_dec = rows.of(saes.params["W_dec"][rows.slot[:, None], selection.index])
    return Full(over_layers(saes, len(selection.index)), selection.index), W_dec


def gather_features(saes: SAE, selection: Selection) -> tuple[Gathered, jax.Array]:
    """The chosen features as a dictionary of their own, and its decoder rows [L,K,D]; zero where nothing is chosen.

    Args:
      saes: a stack over `saes.config.layers`, which need not be all layers, or one dictionary.
      selection: may be traced, so that one program serves every choice.

    Raises:
      ValueError: a dictionary of a TopK kind, or a selection, unless traced, of features that do not exist.
    """
    if saes.config.by_rank:
        raise ValueError(
            f"saes: a {saes.config.activation} code depends on all features at once, so that none can be encoded alone;"
            " edits.gather and edits.features encode in full, and exactly; outside of edits: sae.encode(x)[..., index]"
        )
    saes = saes.as_stack()
    check_selection(saes.config, selection)
    p, config = saes.params, saes.config
    rows = _rows(saes, selection)
    place = rows.slot[:, None], selection.index
    W_enc, W_dec = rows.of(p["W_enc"][place[0], :, place[1]]), rows.of(p["W_dec"][place])  # [L,K,D]
    b_enc = rows.of(p["b_enc"][place])
    if config.subtract_b_dec:
        b_enc = b_enc - jnp.einsum("lkd,ld->lk", W_enc, p["b_dec"][rows.slot], precision=_PRECISION)
    # JumpReLU is relu(pre) where pre > threshold, so that a negative threshold counts as zero.
    threshold = (
        jnp.maximum(rows.of(p["threshold"][place]), 0.0) if config.activation == "jumprelu" else jnp.zeros_like(b_enc)
    )
    threshold = jnp.where(rows.valid, threshold, jnp.inf)
    return Gathered(jnp.moveaxis(W_enc, 1, 2), b_enc, threshold, config.normalize), W_dec


class _Rows(NamedTuple):
    """Where chosen features are: each layer's slot in the stack [L]; which are chosen, which of those exist [L,K]."""

    slot: np.ndarray
    valid: jax.Array
    exists: jax.Array

    def of(self, rows: jax.Array) -> jax.Array:
        """Rows [L,K,...] with 0 where nothing is chosen, and NaN for those that do not exist."""
        spread = (..., *[None] * (rows.ndim - 2))
        return jnp.where(self.valid[spread], jnp.where(self.exists[spread], rows, jnp.nan), 0.0)


def _rows(saes: SAE, selection: Selection) -> _Rows:
    layers, (index, valid) = np.asarray(saes.config.layers), selection
    _require_layers(saes, len(index))
    slot = np.zeros(len(index), int)
    slot[layers] = np.arange(len(layers))
    has = jnp.zeros(len(index), bool).at[layers].set(True)
    exists = has[:, None] & (index >= 0) & (index < saes.config.d_sae)
    same = (index[:, :, None] == index[:, None]) & valid[:, None]  # a traced feature listed twice would act twice
    exists &= ~jnp.tril(same, -1).any(-1)
    return _Rows(slot, valid, exists)


def _require_layers(saes: SAE, n_layers: int) -> None:
    if (last := max(saes.config.layers)) >= n_layers:
        raise ValueError(f"saes: a dictionary of layer {last}, yet there are layers 0..{n_layers - 1}; it belongs to "
                         "another model, or the number of layers is wrong")  # fmt: skip


def _refuse_batch_ranks(config) -> None:
    if config.activation == "batchtopk":
        raise ValueError(
            "saes: as trained, a batchtopk dictionary ranks all tokens of a call, padding included, so"
            " that no edit of one prompt is defined; load it with its threshold (batch_topk=False)"
        )


def _refuse_transcoders(config, way_out: str) -> None:
    if config.site != config.site_out:
        raise ValueError(f"saes: reads {config.site} and writes {config.site_out}; {way_out}")


def _placed(config) -> dict[str, str | None]:
    """Where an edit made of such a dictionary belongs and what it reads, as keyword arguments."""
    return {"site": config.site_out, "reads": None if config.site == config.site_out else config.site}


def features(saes: SAE, selection: Selection, *, gain: Array | float, shift: Array | float, spans: Spans) -> Features:
    """Chosen features become gain * z + shift; gain, shift broadcast to [L,B,K]."""
    encoder, W_dec = gather(saes, selection)
    smallest = (W_dec.shape[0], 1, W_dec.shape[1])
    gain, shift = (_over_features(name, value, smallest) for name, value in (("gain", gain), ("shift", shift)))
    return Features(encoder=encoder, W_dec=W_dec, gain=gain, shift=shift, **_placed(saes.config), spans=_checked(spans))


def set_features(saes: SAE, selection: Selection, *, target: jax.Array, spans: Spans) -> SetFeatures:
    """Chosen features take the values `target` [L,B,T,K], T being 1 where all tokens take the same.

    Raises:
      ValueError: as `features`.
    """
    encoder, W_dec = gather(saes, selection)
    L, K = W_dec.shape[:2]
    if jnp.ndim(target) != 4 or target.shape[0] != L or target.shape[3] != K:
        raise ValueError(f"target: expected [L,B,T,K] with {L} layers and {K} features each, got {jnp.shape(target)}")
    return SetFeatures(encoder=encoder, W_dec=W_dec, target=target, **_placed(saes.config), spans=_checked(spans))


def _over_features(name: str, value, smallest: tuple[int, int, int]) -> jax.Array:
    """A value for each layer, prompt and chosen feature."""
    L, _, K = smallest
    shape = (1,) * (3 - jnp.ndim(value)) + jnp.shape(value)
    if len(shape) != 3 or shape[0] not in (1, L) or shape[2] not in (1, K):
        raise ValueError(f"{name}: expected a number, or [L,B,K] with {L} layers and {K} features each, got shape "
                         f"{jnp.shape(value)}")  # fmt: skip
    return jnp.broadcast_to(value, (L, shape[1], K))


def project(direction: jax.Array, *, shift: Array | float, spans: Spans) -> Features:
    """The component of x along unit vectors [L,D] is set to shift [L,B]: a one-feature linear dictionary."""
    direction = jnp.asarray(direction)
    if direction.ndim != 2:
        raise ValueError(f"direction: expected unit vectors [L,D], got shape {direction.shape}")
    zeros = jnp.zeros(direction.shape[:1] + (1,))
    encoder = Gathered(direction[..., None], zeros, jnp.full_like(zeros, -jnp.inf))
    shift = jnp.asarray(shift)[..., None]
    return Features(
        encoder=encoder, W_dec=direction[:, None], gain=jnp.zeros_like(shift), shift=shift, spans=_checked(spans)
    )


def splice(saes: SAE, n_layers: int, *, spans: Spans) -> Splice:
    """x becomes its reconstruction at the layers of `spans`.

    Raises:
      ValueError: transcoders, whose output belongs to another site than their input; "batchtopk" dictionaries.
    """
    _refuse_batch_ranks(saes.config)
    _refuse_transcoders(saes.config, "insert its output with edits.Replace")
    return Splice(sae=over_layers(saes, n_layers), site=saes.config.site, spans=_checked(spans))


def patch_parts(saes: SAE, donor: jax.Array, *, whole: jax.Array, explained: jax.Array, spans: Spans) -> PatchParts:
    """Shares of the donor [L,B,D] and of what dictionaries explain of it, [L] each: see `PatchParts`.

    Raises:
      ValueError: as `splice`.
    """
    _refuse_batch_ranks(saes.config)
    _refuse_transcoders(saes.config, "its output is no part of its input")
    stack = over_layers(saes, len(donor))
    return PatchParts(
        sae=stack, donor=donor, whole=whole, explained=explained, site=saes.config.site, spans=_checked(spans)
    )


def over_layers(saes: SAE, n_layers: int) -> SAE:
    """A stack over some layers (or one dictionary) as one over all, with zeros where there is no dictionary."""
    _require_layers(saes, n_layers)
    saes = saes.as_stack()
    layers = np.asarray(saes.config.layers)
    return jax.tree.map(lambda a: jnp.zeros((n_layers, *a.shape[1:]), a.dtype).at[layers].set(a), saes)
