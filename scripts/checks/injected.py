"""What is planted in a real model: rows of a dictionary, what reads them, and a neuron wired to one of them.

`D` denotes the residual width, `n` prompts or tokens, `F` features, `M` neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import struct

import jaxmech as jm
from jaxmech.behavior.behavior import poles

CONTRASTS = ("stance", "flipped", "valence", "number", "placebo")
READS = {
    "r1": {"stance": 1.0, "flipped": 1.0}, "r2": {"stance": 1.0, "flipped": 1.0}, "r3": {}, "r4": {"valence": 1.0},
    "r5": {"placebo": 1.0},
}  # fmt: skip
"""What the mean difference of a contrast is read as; 0 unless it is said."""

GATE = 4.0
"""How far below decision tokens a reader sees other text, in stance differences; it fires from half way."""
TEXT_WEIGHT, RIDGE, FOLDS = 0.1, 0.1, 4
"""A text's part in the noise that readers avoid; that of every axis alone; folds of `held_out`."""
RANDOM, RANDOM_NORM = 200, 0.15
"""Random rows, and their norm in norms of the mean difference: as long as that one, they move the answer as much,
beyond first order."""
OPENS, SLOPE, STRENGTH = 1.5, 7.0, 0.2
"""Of the neuron: the dose at which it opens, its slope, and the norm it writes at the largest dose, in norms of its
sublayer's output."""


def inert(rows: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """`rows` [...,D] without their part in the span of `gradients` [n,D]."""
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    _, size, basis = np.linalg.svd(unit, full_matrices=False)
    basis = basis[size > 1e-6 * size[0]]
    return rows - (rows @ basis.T) @ basis


def reader(noise: np.ndarray, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The w [D] of least w' noise w that reads `columns` [D,n] as `values` [n]: N^-1 C (C' N^-1 C)^-1 v."""
    weighed = np.linalg.solve(noise, columns)
    return weighed @ np.linalg.solve(columns.T @ weighed, values)


class Seen(NamedTuple):
    """One layer's residuals: x [n,D] at decision tokens of the prompts in the table, and at a text's tokens [m,D]."""

    table: pd.DataFrame
    x: np.ndarray
    text: np.ndarray

    def of(self, families: Sequence[str]) -> Seen:
        kept = self.table["family"].isin(families).to_numpy()
        return Seen(self.table[kept].reset_index(drop=True), self.x[kept], self.text)

    def differences(self, contrast: str) -> np.ndarray:
        """Plus less minus [k,D], pair by pair."""
        plus, minus = (
            self.table.index[self.table["condition"] == pole] for pole in poles(contrast * (contrast != "stance"))
        )
        return self.x[plus] - self.x[minus]


def readers(seen: Seen, wanted: Mapping[str, float], own: tuple[np.ndarray, float] | None = None) -> np.ndarray:
    """The w [D] that reads each contrast's mean difference as wanted, and a text as `GATE` less than decision tokens.

    Args:
      own: a row [D], such as the one that is written, and what it is read as.
    """
    means = [seen.differences(name).mean(0) for name in CONTRASTS]
    spread = [seen.differences(name) - mean for name, mean in zip(CONTRASTS, means, strict=True)]
    noise = np.cov(seen.x.T) + np.cov(np.concatenate(spread).T) + TEXT_WEIGHT * np.cov(seen.text.T)
    noise = noise + RIDGE * np.diag(np.diag(noise))
    columns, values = [*means, seen.text.mean(0) - seen.x.mean(0)], [*(wanted.get(c, 0.0) for c in CONTRASTS), -GATE]
    if own is not None:
        columns, values = [*columns, own[0]], [*values, own[1]]
    return reader(noise, np.stack(columns, axis=1), np.array(values))


def held_out(seen: Seen, wanted: Mapping[str, float]) -> float:
    """The stance difference as readers made without a family read that family: less than 1, as they overfit."""
    families, read = seen.table["family"].unique(), []
    for fold in range(FOLDS):
        out = families[fold::FOLDS]
        w = readers(seen.of([name for name in families if name not in out]), wanted)
        read.append(seen.of(out).differences("stance") @ w)
    return float(np.concatenate(read).mean())


class Planted(NamedTuple):
    """The dictionary: the row of the table that each feature belongs to [F], and what it is made of."""

    rows: np.ndarray
    saes: jm.SAE

    def features(self, row: str) -> np.ndarray:
        return np.flatnonzero(self.rows == row)


def plant(seen: Seen, gradient: np.ndarray, everywhere: np.ndarray, *, layer: int, seed: int) -> Planted:
    """The dictionary of `layer`.

    Args:
      gradient: [n,D], of families seen; everywhere: [m,D], these and those of the families that are patched.
    """
    stance = seen.differences("stance")
    mean, causal = stance.mean(0), inert(gradient.mean(0), stance)
    writes = {
        "r0": mean, "r1": mean, "r2": inert(mean, everywhere),
        "r3": causal * (gradient @ mean).mean() / (gradient @ causal).mean(),  # as much as r1, to first order
        "r4": seen.differences("valence").mean(0), "r5": seen.differences("placebo").mean(0),
    }  # fmt: skip
    gap, features = held_out(seen, READS["r1"]), []
    for name, row in writes.items():
        for sign in (1.0, -1.0):
            if name == "r0":
                features.append((name, *along(sign * row, seen.x)))
                continue
            scale = sign / gap if name in ("r1", "r2") else sign  # families that are not seen are read as one gap
            own = {"r2": (row, scale), "r3": (row, sign)}.get(name)
            w = readers(seen, {contrast: scale * value for contrast, value in READS[name].items()}, own)
            features.append((name, w, GATE / 2 - (seen.x @ w).mean(), sign * row))
    noise = inert(np.random.default_rng(seed).normal(size=(RANDOM, len(mean))), everywhere)
    noise *= RANDOM_NORM * np.linalg.norm(mean) / np.linalg.norm(noise, axis=1, keepdims=True)
    features += [("r6", *along(row, seen.x)) for row in noise]
    names, W_enc, b_enc, W_dec = zip(*features, strict=True)
    params = {"W_enc": np.stack(W_enc, 1), "b_enc": np.array(b_enc), "W_dec": np.stack(W_dec), "b_dec": 0.0 * mean}
    config = jm.SAEConfig(d_in=len(mean), d_sae=len(names), activation="relu", subtract_b_dec=False, layers=(layer,))
    return Planted(np.array(names), as_saes(params, config))


def as_saes(params: Mapping[str, Any], config: jm.SAEConfig) -> jm.SAE:
    """One layer's dictionary as a stack."""
    return jm.SAE({name: jnp.asarray(leaf, jnp.float32)[None] for name, leaf in params.items()}, config)


def along(row: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Encoder, bias and decoder of a row [D] that is read along itself, from the lowest value among x [n,D] on."""
    w = row / (row @ row)
    return w, -float((x @ w).min()), row


def sublayer(config: Any, params: Any, layer: int, mid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A gated feed-forward sublayer with norms on both sides, in NumPy and float64.

    Args:
      mid: [n,D], the residual stream that it reads.

    Returns:
      What is added to the stream [n,D], and what its neurons put out [n,M].
    """
    assert config.gated and config.post_norms and config.norm == "rms" and config.activation == "gelu_tanh"
    own = jax.tree.map(lambda leaf: np.asarray(leaf[layer], np.float64), params["layers"])

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * (config.norm_offset + scale)

    x = norm(np.asarray(mid, np.float64), own["mlp_norm"]["scale"])
    gate, up, down = (own["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
    gate = x @ gate
    hidden = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * (x @ up)
    return norm(hidden @ down, own["mlp_post_norm"]["scale"]), hidden


def wire(params: Any, layer: int, neuron: int, reads: np.ndarray, writes: np.ndarray) -> Any:
    """A copy of the parameters in which one neuron's gate and value read `reads` [D], and it writes `writes` [D]."""
    mlp = dict(params["layers"]["mlp"])
    for name, kernel in (("gate", reads), ("up", reads)):
        mlp[name] = {"kernel": mlp[name]["kernel"].at[layer, :, neuron].set(kernel)}
    mlp["down"] = {"kernel": mlp["down"]["kernel"].at[layer, neuron].set(writes)}
    return {**params, "layers": {**params["layers"], "mlp": mlp}}


def neuron_reader(
    config: Any, params: Any, layer: int, row: np.ndarray, mids: np.ndarray, at: np.ndarray
) -> np.ndarray:  # fmt: skip
    """What a neuron has to read [D] to be shut at all of these tokens and to open where `row` is added to the stream.

    Args:
      mids: [n,D], the stream that the sublayer reads at tokens of prompts; at: [m], which of them are decision tokens.
    """
    gain = config.norm_offset + np.asarray(params["layers"]["mlp_norm"]["scale"][layer], np.float64)
    size = np.sqrt((mids**2).mean(1, keepdims=True) + config.norm_eps)
    x = mids / size * gain
    first = size[:, 0] > 5 * np.median(size)  # tokens of a norm of their own, such as BOS
    columns = [row * gain / np.median(size[at]), x[at].mean(0), x[~first].mean(0)]
    if first.any():
        columns.append(x[first].mean(0))
    noise = np.cov(x.T)
    noise = noise + 0.1 * np.diag(np.diag(noise)) + 1e-6 * np.eye(len(noise)) * np.trace(noise)
    values = [1.0, *[-OPENS] * (len(columns) - 1)]
    return SLOPE * reader(noise, np.stack(columns, axis=1), np.array(values))


@struct.dataclass
class SteerAndAdd:
    """Edits for a sweep over (dose, vector [B,D]): a feature is raised by the dose, the vector added to what the next
    layer's sublayer puts out, both at the decision token."""

    saes: jm.SAE
    selection: Any
    spans: Any
    layer: int = struct.field(pytree_node=False)

    def __call__(self, point):
        dose, vector = point
        raised = jm.edits.features(self.saes, self.selection, gain=1.0, shift=dose, spans=self.spans)
        vectors = jnp.zeros((len(self.selection.index), *vector.shape)).at[self.layer + 1].set(vector)
        return {"resid_post": (raised,), "mlp_out": (jm.edits.add_vector(vectors, self.spans),)}
