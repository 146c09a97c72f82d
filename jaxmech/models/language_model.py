"""A model as the rest of the library takes it: configuration, parameters and tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxmech.io.reprs import memory
from jaxmech.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model ready to run.

    Attributes:
      name: what it was loaded as.
      config: static structure.
      params: tree of arrays, as `param_shapes(config)`.
      tokenizer: a transformers fast tokenizer; `jaxmech.models.chat` encodes texts and conversations with it. None for
        a model that was loaded without one, which takes tokens only.
    """

    name: str
    config: ModelConfig
    params: Mapping[str, Any]
    tokenizer: Any

    def __repr__(self) -> str:
        c, leaves = self.config, jax.tree.leaves(self.params)
        devices = sorted({str(d) for leaf in leaves for d in getattr(leaf, "devices", set)()})
        return (
            f"LanguageModel({self.name!r}: {c.family}, {c.n_layers} layers of width {c.d_model}, vocabulary of "
            f"{c.vocab_size:,}, {memory(leaves)}{', on ' if devices else ''}{', '.join(devices)})"
        )
