"""How dictionaries are trained: every setting, checked all at once, and the schedules that follow from them."""

from __future__ import annotations

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import optax

from jaxmech.io.arguments import plain, plain_numbers

SELECTING = ("topk", "batchtopk", "matryoshka")
"""Kinds whose sparsity is k, the number of features kept; the others' is the coefficient of a penalty."""
KINDS = (*SELECTING, "jumprelu", "gated", "standard")
SCHEDULES = ("constant", "linear", "cosine")
INITS = ("data", "random")
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class SAETrainConfig:
    """How dictionaries are trained. The batch size belongs to the stream.

    Losses are in the papers' units: of activations centred and scaled to a mean squared norm of 1.

    Attributes:
      d_sae: features of each layer's dictionary.
      sparsity: k for the kinds of `SELECTING`, features active per token (on average, for "batchtopk" and
        "matryoshka", or exactly, for "topk"); for the others the coefficient of the penalty: on L0 for "jumprelu", on
        the L1 norm for "gated" and "standard". Several values train as many dictionaries of each layer at once.
      kind: one of `KINDS`, see `jaxmech.sae.training.objectives`. "batchtopk", "matryoshka" and "gated" are exported
        as JumpReLU, so that a few features can later be encoded alone.
      steps: batches.
      lr: Adam's step size, after `warmup` steps of linear rise.
      schedule: how it falls to 0 in the last `decay` share of the steps: "linear", "cosine" or "constant" (not at all).
      sparsity_warmup: steps in which a coefficient rises from 0, or k falls from `k_start` times its value.
      compute_dtype: of the matrix products' inputs. Sums, parameters and Adam's state are float32 either way.
      b1, b2: Adam's decay rates.
      max_spread: dimensions that vary more than this many times the median dimension are scaled down to it for
        training: a few massive dimensions of a residual stream would otherwise be all that is learnt.
      max_norm: activations whose centred norm is more than this many times the typical one (attention sinks) are
        shortened to it for training; otherwise they would take every place in a batch.
      init: decoder rows start as "data" (centred activations of the first batches) or "random" directions.
      start_l0: features active per token before the first step, for the kinds with a penalty.
      prefixes: "matryoshka" alone: sizes of the nested dictionaries, ascending; d_sae itself is added. By default
        d_sae / 16, / 8, / 4 and / 2.
      bandwidth: "jumprelu" alone: width of the kernel that estimates the thresholds' gradient, as a share of the
        typical norm of an activation.
      threshold_speed: "jumprelu" alone: how many times as fast as `lr` the logarithms of thresholds move. An encoder's
        many entries move a pre-activation together; in few steps thresholds, at 1, cannot keep up with it.
      dead_after: steps without firing that make a feature dead.
      aux_features: dead features, drawn anew each step, that reconstruct what the others left over (AuxK).
      aux_coefficient: weight of that loss.
      threshold_rate: rate of the running means of L0 and of a batch's smallest kept pre-activation (SAELens'
        `topk_threshold_lr`; corrected for the start, as short trainings need).
      log_every, checkpoint_every: steps.
    """

    d_sae: int
    sparsity: float | tuple[float, ...]
    kind: str = "batchtopk"
    steps: int = 1000
    lr: float = 3e-3
    warmup: int = 20
    schedule: str = "linear"
    decay: float = 0.3
    sparsity_warmup: int = 0
    k_start: float = 1.0
    compute_dtype: str = "float32"
    b1: float = 0.9
    b2: float = 0.999
    max_spread: float = 4.0
    max_norm: float = 3.0
    init: str = "data"
    start_l0: int = 128
    prefixes: tuple[int, ...] = ()
    bandwidth: float = 0.002
    threshold_speed: float = 10.0
    dead_after: int = 50
    aux_features: int = 256
    aux_coefficient: float = 1 / 32
    threshold_rate: float = 0.05
    log_every: int = 10
    checkpoint_every: int = 200

    def __post_init__(self):
        object.__setattr__(self, "sparsity", plain(self.sparsity))
        # Only numbers can be compared with their bounds.
        faults = plain_numbers(self) or [*self._number_faults(), *self._sparsity_faults()]
        if faults := [*self._choice_faults(), *faults]:
            raise ValueError("; ".join(faults))

    @property
    def sparsities(self) -> tuple[float, ...]:
        return self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)

    @property
    def selects(self) -> bool:
        return self.kind in SELECTING

    @property
    def widths(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries, d_sae last."""
        if self.kind != "matryoshka":
            return (self.d_sae,)
        inner = self.prefixes or [size for share in (16, 8, 4, 2) if (size := self.d_sae // share)]
        return (*(size for size in inner if size < self.d_sae), self.d_sae)

    def _choice_faults(self):
        allowed = {"kind": KINDS, "schedule": SCHEDULES, "init": INITS, "compute_dtype": COMPUTE_DTYPES}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                yield f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}"

    def _number_faults(self):
        least = dict.fromkeys(("d_sae", "steps", "start_l0", "dead_after", "log_every", "checkpoint_every"), 1)
        least |= dict.fromkeys(("warmup", "sparsity_warmup", "decay", "aux_features", "aux_coefficient"), 0)
        least |= {"k_start": 1}
        for name, value in least.items():
            if not getattr(self, name) >= value:
                yield f"{name}: expected at least {value}, got {getattr(self, name)}"
        for name in ("lr", "bandwidth", "threshold_speed", "threshold_rate", "max_spread", "max_norm"):
            most = math.inf if name.startswith("max_") else sys.float_info.max
            if not 0 < getattr(self, name) <= most:
                yield f"{name}: expected a positive number, got {getattr(self, name)}"
        for name in ("decay", "threshold_rate"):
            if getattr(self, name) > 1:
                yield f"{name}: expected a share of at most 1, got {getattr(self, name)}"
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}: expected a rate from 0 to below 1, got {getattr(self, name)}"
        if self.sparsity_warmup and self.sparsity_warmup >= self.steps:
            yield f"sparsity_warmup: expected fewer than the {self.steps} steps, got {self.sparsity_warmup}"
        if self.k_start != 1 and not (self.selects and self.sparsity_warmup):
            yield f"k_start: goes with {', '.join(SELECTING)} and a sparsity_warmup, got {self.k_start}"
        inner = self.prefixes
        if inner and self.kind != "matryoshka":
            yield f"prefixes: goes with matryoshka, got {inner} for {self.kind}"
        if list(inner) != sorted(set(inner)) or any(not 0 < size <= self.d_sae for size in inner):
            yield f"prefixes: expected ascending sizes of 1..d_sae={self.d_sae}, got {inner}"

    def _sparsity_faults(self):
        values = self.sparsities
        if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, int | float)]:
            yield f"sparsity: expected a number or several, got {wrong[0]!r}"
            return
        if not values or len(set(values)) != len(values):
            yield f"sparsity: expected a number or several different ones, got {self.sparsity}"
        for value in values:
            if self.selects and not 0 < value <= self.d_sae:
                yield f"sparsity: {self.kind} keeps k features of each token, 0 < k <= d_sae={self.d_sae}, got {value}"
            elif self.kind == "topk" and value != int(value):
                yield f"sparsity: topk keeps a whole number of features, got {value}"
            elif not self.selects and not 0 <= value < float("inf"):
                yield f"sparsity: {self.kind} has a coefficient of at least 0, got {value}"


def largest_k(config: SAETrainConfig) -> int:
    """The most features that a token can be asked to keep, on any lane at any step."""
    return min(config.d_sae, math.ceil(max(config.sparsities) * (config.k_start if config.sparsity_warmup else 1)))


def sparsity_at(config: SAETrainConfig, sparsity: jax.Array, step: jax.Array) -> jax.Array:
    """k or the coefficient at a step, counted from 0, on its way to `sparsity`."""
    left = jnp.maximum(1 - jnp.float32(step) / config.sparsity_warmup, 0.0) if config.sparsity_warmup else 0.0
    if config.selects:
        return jnp.minimum(sparsity * (1 + (config.k_start - 1) * left), config.d_sae)
    return sparsity * (1 - left)


def optimizer(config: SAETrainConfig) -> optax.GradientTransformation:
    """Adam, its step size as `lr`, `warmup`, `schedule` and `decay` say."""
    fall = int(round(config.decay * config.steps))
    falls = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, max(fall, 1)),
        "cosine": optax.cosine_decay_schedule(config.lr, max(fall, 1)),
    }
    rise = optax.linear_schedule(config.lr / max(config.warmup, 1), config.lr, max(config.warmup - 1, 1))
    schedule = optax.join_schedules([rise, falls[config.schedule]], [config.steps - fall])
    return optax.adam(schedule, b1=config.b1, b2=config.b2)
