"""What `forward` takes, checked: tokens of the vocabulary, edits of the right shapes at sites that exist.

`B` denotes the batch, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.models.block import SITES
from jaxmech.models.config import ModelConfig

if TYPE_CHECKING:
    from jaxmech.models.decoder import KV


def check_tokens(
    config: ModelConfig, tokens: Any, mask: Any = None, *, cache: Sequence[KV] = (), placed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B,T] as int32 and their mask as bools, all True by default.

    Slots that the mask leaves out may hold anything. Traced values cannot be checked.

    Args:
      cache: segments before the tokens; placed: whether their positions are given, rather than counted from the cache.

    Raises:
      ValueError: other shapes, tokens that are not integers or are outside the vocabulary, a mask of anything but bools
        (or the ones and zeros that tokenizers give), or more tokens than learned positions.
    """
    if not hasattr(tokens, "dtype"):
        tokens = np.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens: expected integers [B,T], token ids, got {tokens.dtype} of shape {tokens.shape}; texts become "
            "tokens by encode_prompts(lm, texts)"
        )
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected [B,T], got shape {tokens.shape}; add a batch axis with tokens[None]")
    if mask is None:
        mask = np.ones(tokens.shape, bool)
    elif not hasattr(mask, "dtype"):
        mask = np.asarray(mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask: expected the shape of tokens {tokens.shape}, got {mask.shape}")
    if mask.dtype != bool and _readable(mask) and not np.isin(np.asarray(mask), (0, 1)).all():
        raise ValueError("mask: expected bools, True on real tokens, or ones and zeros, got other numbers")
    if _readable(tokens) and _readable(mask):
        ids = np.asarray(tokens)
        wrong = ((ids < 0) | (ids >= config.vocab_size)) & np.asarray(mask, bool)
        if wrong.any():
            row, slot = np.argwhere(wrong)[0]
            raise ValueError(
                f"tokens: expected integers 0..{config.vocab_size - 1}, ids of the model's vocabulary, got "
                f"{ids[row, slot]} in row {row}, slot {slot}; slots that are no text are left out by the mask"
            )
    if not placed and (longest := longest_text(config, mask, cache)) > config.max_positions:
        raise ValueError(
            f"tokens: a text has {longest}, but the model learned only {config.max_positions} positions; shorten it"
        )
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool)


def _readable(array) -> bool:
    """Whether the values can be read: not while tracing, nor where other processes hold some of them."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def longest_text(config: ModelConfig, mask: jax.Array, cache: Sequence[KV] = ()) -> int:
    """Tokens of the longest text, those of `cache` included; 0 where the length does not matter or cannot be known:
    rotary positions are unbounded, and beyond traced learned ones the decoder returns NaN."""
    masks = [mask, *(segment.of(segment.mask) for segment in cache)]
    if not config.learned_positions or not all(map(_readable, masks)):
        return 0
    return int(sum(np.asarray(m, bool).sum(1) for m in masks).max())


def check_edits(config: ModelConfig, edits: Any, shape: tuple[int, ...]) -> None:
    """Refuses edits that cannot act on tokens of `shape` [B,T]: no groups, an unknown site, arrays of another size."""
    check_groups(edits)
    check_sites(set(edits or ()))
    for site, group in (edits or {}).items():
        for edit in group:
            check_place(site, edit)
            leaves, tree = jax.tree.flatten(edit)
            shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
            if {leaf.shape[:1] for leaf in shapes} - {(config.n_layers,)}:
                raise ValueError(f"edits[{site!r}]: every array leads with the model's {config.n_layers} layers, got "
                                 f"{_named_shapes(tree, shapes)}")  # fmt: skip
            x = (*shape, config.width(edit.reads or site))
            if not _fits(tree, shapes, x, (*shape, config.width(site))):
                raise ValueError(
                    f"edits[{site!r}]: {type(edit).__name__} does not fit the activations here, [B,T,D] = {list(x)}; "
                    f"its arrays, layers first, are {_named_shapes(tree, shapes)}. Vectors, donors and dictionaries "
                    f"have the width of their site, and an axis for prompts or tokens has as many as here, or 1"
                )


@lru_cache(maxsize=512)
def _fits(tree, shapes: tuple, x: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether an edit of arrays with `shapes` turns an x of one shape into a change of another."""

    def change(leaves, x):
        return jax.tree.unflatten(tree, leaves).delta(x)

    sliced = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in shapes]
    try:
        delta = jax.eval_shape(change, sliced, jax.ShapeDtypeStruct(x, jnp.float32))
        return np.broadcast_shapes(delta.shape, out) == out
    except (TypeError, ValueError):  # what JAX raises for incompatible shapes
        return False


def _named_shapes(tree, shapes: Sequence) -> str:
    named, _ = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(tree, shapes))
    return ", ".join(f"{jax.tree_util.keystr(path)[1:]} {list(leaf.shape)}" for path, leaf in named)


def check_sites(sites: set[str]) -> None:
    if unknown := sorted(sites - set(SITES)):
        raise ValueError(f"unknown site {', '.join(map(repr, unknown))}; the sites are {', '.join(SITES)}")


def check_groups(edits: Any) -> None:
    """Refuses anything but a mapping from sites to tuples of edits."""
    if edits is not None and not isinstance(edits, Mapping):
        raise ValueError(f"edits: expected {{site: (edit, ...)}}, got {type(edits).__name__}")
    if alone := [site for site, group in (edits or {}).items() if not isinstance(group, Sequence)]:
        raise ValueError(f"edits[{alone[0]!r}]: expected a tuple of edits, got one edit; write (edit,)")


def check_place(site: str, edit: Any) -> None:
    """Refuses an edit at a site other than its dictionary's, or one that would read what is not yet computed."""
    if edit.site not in (None, site):
        raise ValueError(f"edits[{site!r}]: this edit is made of dictionaries of {edit.site}; put it there")
    if site in SITES and edit.reads is not None and edit.reads not in SITES[: SITES.index(site) + 1]:
        raise ValueError(f"edits[{site!r}]: reads {edit.reads!r}, which a layer does not compute before {site}")
