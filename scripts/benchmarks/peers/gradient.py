"""W5: the gradient of the expected amount with respect to the residual stream at every layer and position."""

from __future__ import annotations

import numpy as np
import torch

import jaxmech as jm
from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import lay_out
from jaxmech.interventions.attribution import residual_gradient
from peers.bench import ANSWERS, Bench, real_tokens, shared_flops, to_torch
from peers.flops import text_flops, unembed_flops
from peers.results import Row
from peers.timing import Peer, compare, relative

BATCH = 4
"""Prompts that autograd takes at a time: it keeps all that happens inside the layers, 1 GB a prompt."""
AMOUNTS = np.arange(len(ANSWERS), dtype=np.float32)


class Tree:
    """The prompts with all answers after them as one tree of tokens, as HF's model takes it."""

    def __init__(self, prompts: Prompts):
        tokens, mask, positions, within = (to_torch(np.asarray(a)) for a in lay_out(prompts))
        self.length = prompts.tokens.shape[1]
        self.tokens, self.positions = tokens.long(), positions.long()
        # Padding looks at itself, or its softmax would be over nothing.
        self.looks = (within & mask[:, None] | torch.eye(tokens.shape[1], dtype=torch.bool))[:, None]
        self.trie = [to_torch(np.asarray(a)) for a in prompts.trie]

    def expected(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """The expected amount, summed over prompts, from the logits [B,1+M,V] of the decision token and all nodes."""
        ids, _, parent, ancestors, continues, cells = (a[rows] for a in self.trie[:-1])
        whole, slots = logits.logsumexp(-1), torch.arange(logits.shape[1])
        at = torch.arange(len(ids))[:, None]
        step = logits[at, parent.long(), ids.long()] - whole[at, parent.long()]  # [B,M]
        path = torch.cat([torch.zeros(len(ids), 1), torch.einsum("bmn,bn->bm", ancestors.float(), step)], 1)
        # Numbers end where the tree is left with a token that does not go on with them.
        children = torch.where(parent[:, None] == slots[:, None], -torch.inf, 0.0)
        leaving = logits.scatter_add(2, ids.long()[:, None].expand(*logits.shape[:2], -1), children)
        ends = leaving.masked_fill((self.trie[-1] & continues[..., None]) != 0, -torch.inf).logsumexp(-1) - whole
        given = (path + ends)[:, None].masked_fill(~cells[:, :, 0], -torch.inf).logsumexp(-1)  # [B,N]
        return (given.softmax(-1) * to_torch(AMOUNTS)).sum()


def by_autograd(model, tree: Tree) -> torch.Tensor:
    """[L,B,T,D]: hooks keep every layer's output, the gradient is asked for with respect to them."""
    kept: list[torch.Tensor] = []

    def keep(_, __, out):
        kept.append(out if out.requires_grad else out.detach().requires_grad_())
        return kept[-1]

    parts = []
    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        for start in range(0, len(tree.tokens), BATCH):
            rows = slice(start, start + BATCH)
            looks = dict.fromkeys(("full_attention", "sliding_attention"), tree.looks[rows])
            kept.clear()
            final = model.model(
                tree.tokens[rows], attention_mask=looks, position_ids=tree.positions[rows], use_cache=False
            ).last_hidden_state
            logits = model.lm_head(final[:, tree.length - 1 :])
            slopes = torch.autograd.grad(tree.expected(logits, rows), kept)
            parts.append(torch.stack([slope[:, : tree.length] for slope in slopes]))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts, 1)


def gradient(bench: Bench) -> list[Row]:
    """W5."""
    lm, table = bench.lm, bench.table
    shared = jm.make_prompts(lm, list(table["query"]), list(ANSWERS), prefixes=list(table["prefix"]))
    alone = jm.make_prompts(lm, list(table["prefix"] + table["query"]), list(ANSWERS))
    tree = Tree(alone)
    if tree.tokens.shape[1] > lm.config.window:
        longest, window = tree.tokens.shape[1], lm.config.window
        raise ValueError(f"prompts: {longest} tokens with their answers; the peer's masks know no window ({window})")
    bench.hf.set_attn_implementation("sdpa")
    # Where the two sides have real tokens, which stand in the same order.
    real = real_tokens(shared)
    peer_real = np.asarray(alone.mask)

    def ours():
        return residual_gradient(lm.config, lm.params, shared, AMOUNTS, site="resid_post", everywhere=True)

    def difference(result, peer):
        return relative(np.asarray(result)[:, real], peer.numpy()[:, peer_real])

    return compare(
        "W5",
        f"gradient of the expected amount at {lm.config.n_layers} layers, {len(table)} prompts of "
        f"{int(np.median(peer_real.sum(1)))} tokens",
        ours,
        [Peer("HF autograd with hooks", lambda: by_autograd(bench.hf, tree), difference, 1.5, most=3,
              note=f"a tree of tokens in one pass for both; HF takes {BATCH} prompts at a time")],
        runs=bench.runs,
        flops=needed_flops(lm.config, shared),
    )  # fmt: skip


def needed_flops(config, prompts: Prompts) -> float:
    """Forward, a family's worked examples once, and as much backward for each prompt: weights have no gradient."""
    M, lengths = prompts.trie.tokens.shape[1], real_tokens(prompts).sum(1)
    whole = sum(text_flops(config, int(n) + M) for n in lengths)
    forward = whole - shared_flops(config, prompts)
    return forward + whole + 2 * len(lengths) * (1 + M) * unembed_flops(config)
