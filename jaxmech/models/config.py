"""What a decoder is, as static data: frozen, hashable, and therefore a valid `jit` static argument."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer type.

    `scaling` is HF's `rope_scaling` dictionary as sorted pairs (empty for plain RoPE), for example
    `(("factor", 8.0), ("rope_type", "linear"))`; lists are tuples.
    """

    theta: float
    scaling: tuple[tuple[str, float | str | tuple[float, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The structure of one decoder. Per-layer facts are tuples of length `n_layers`.

    Attributes:
      family: the conversion table's name ("llama", "gemma3", ...).
      n_kv_heads: key/value heads; each serves `n_heads // n_kv_heads` query heads.
      d_mlp: hidden width of the feed-forward sublayer.
      activation: "silu", "gelu_tanh" or "gelu" (the exact, erf form).
      gated: the feed-forward sublayer multiplies its activation with a second projection.
      norm: "rms" (RMSNorm) or "layer" (LayerNorm, with a bias).
      norm_offset: added to every stored RMSNorm weight (1 for Gemma, whose norms compute `1 + w`).
      qk_norm: RMSNorm of queries and keys before RoPE: None, "head" (each head by itself) or "full" (over all heads).
      pre_norms: a norm on what each sublayer reads (all families but OLMo 2).
      post_norms: a norm on what each sublayer writes to the residual stream (Gemma 2 and 3, OLMo 2).
      parallel: both sublayers read the layer's input (GPT-NeoX), so that attention does not reach its own layer's MLP.
      attention_bias: biases on q, k and v; output_bias: a bias on the attention output; mlp_bias: on all of the MLP.
      tied: the unembedding is the embedding transposed.
      embed_scale: factor on token embeddings (Gemma's sqrt(D)), rounded to the parameters' dtype when applied.
      query_scale: factor on attention scores; score_scales: [L], each layer's further factor, None without.
      learned_positions: position embeddings are parameters (GPT-2) and the longest text is `max_positions`.
      window: positions a local layer may look back, itself included; None when no layer is local.
      is_local: [L], True on sliding-window layers.
      rope: rotary embedding of global layers, None without one; rope_local: of local layers, None when the same.
      rotary_dim: leading dimensions of a head that are rotated, None for all.
      max_positions: the longest sequence the model was made for.
      bos_id: the token that every text starts with, None where the model's tokenizer adds none.
      eos_ids: tokens that end a generation.
    """

    family: str
    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    activation: str
    norm_eps: float
    rope: Rope | None
    query_scale: float
    max_positions: int
    is_local: tuple[bool, ...]
    window: int | None = None
    rope_local: Rope | None = None
    rotary_dim: int | None = None
    learned_positions: bool = False
    norm: str = "rms"
    norm_offset: float = 0.0
    qk_norm: str | None = None
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    gated: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    score_scales: tuple[float, ...] | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if len(self.is_local) != self.n_layers:
            raise ValueError(f"is_local: expected {self.n_layers} entries, one per layer, got {len(self.is_local)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if any(self.is_local) and self.window is None:
            raise ValueError("window: layers are marked local, so the sliding window needs a length")

    def width(self, site: str) -> int:
        """Size of the last axis at `site`: all heads side by side at attn_z, `d_model` elsewhere."""
        return self.n_heads * self.head_dim if site == "attn_z" else self.d_model
