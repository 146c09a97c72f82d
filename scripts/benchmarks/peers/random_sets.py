"""W7: matched random feature sets patched into prompts as one sweep, against one set after another."""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice

import jax
import jax.numpy as jnp
import numpy as np

import jaxmech as jm
from jaxmech.answers.score import before_last
from jaxmech.interventions import edits
from jaxmech.interventions.controls import matched_sets
from jaxmech.interventions.patching import patch_edit, patch_features
from peers.bench import ANSWERS, Bench
from peers.flops import attention_flops, layer_flops, unembed_flops
from peers.results import Row
from peers.timing import Peer, compare

LAYER, PROMPTS, FEATURES = 10, 2, 4
TOLERANCE = 5e-3
"""Of log probabilities, absolute."""


@partial(jax.jit, static_argnums=0)
def one_set(
    config, params, prompts: jm.Prompts, saes: jm.SAE, selection: edits.Selection, resid: jax.Array
) -> jax.Array:
    """log s(a) [B,N] with one feature set [L,K] patched in from donors with residuals [L,B,D]."""
    edit = patch_edit(saes, selection, donor=resid, spans=edits.at_last(config.n_layers, prompts.tokens.shape[1]))
    return jm.score(config, params, prompts, edits=edit)[0].logprobs


def random_sets(bench: Bench) -> list[Row]:
    """W7."""
    lm, sizes = bench.lm, bench.sizes
    config, params = lm.config, lm.params
    texts = list(bench.table["prefix"] + bench.table["query"])[:PROMPTS]
    prompts = jm.make_prompts(lm, texts, list(ANSWERS))
    length, saes = prompts.tokens.shape[1], bench.saes.at(LAYER).as_stack()
    resid = jm.score(config, params, prompts, taps=("resid_post",))[1].taps["resid_post"][:, :, length - 1]
    resid = jnp.roll(resid, 1, axis=1)  # donors: each prompt's neighbour
    rng = np.random.default_rng(0)
    sets = matched_sets(
        [(LAYER, feature) for feature in range(FEATURES)],
        fires=rng.uniform(0.1, 1, (1, sizes.features)),
        strength=rng.uniform(0, 1, (1, sizes.features)),
        layers=(LAYER,),
        sets=sizes.sets,
        key=jax.random.key(0),
        neighbours=min(500, sizes.features - FEATURES),
    )
    selections = [edits.select(chosen, config.n_layers, FEATURES) for chosen in sets]
    points = jax.tree.map(lambda *leaves: jnp.stack(leaves), *selections)
    kept = jax.block_until_ready(before_last(config, params, prompts))

    def loop(prompts, order, count):
        chosen = list(islice(order, count))
        return [(s, np.asarray(one_set(config, params, prompts, saes, selections[s], resid))) for s in chosen]

    def peer(name, prompts, required, least):
        count = sizes.sets if bench.full else min(least, sizes.sets)
        note = "" if count == sizes.sets else f"{count} of {sizes.sets} sets timed"
        run = partial(loop, prompts, cycle(range(sizes.sets)), count)
        return Peer(name, run, furthest, required, sizes.sets / count, most=3, note=note)

    T, M = float(np.asarray(prompts.mask).sum(1).mean()), prompts.trie.tokens.shape[1]
    behind, slot = config.n_layers - LAYER - 1, layer_flops(config) + attention_flops(config, T)
    each = (1 + M) * (behind * slot + unembed_flops(config))
    shared = config.n_layers * T * (layer_flops(config) + attention_flops(config, T / 2)) + (1 + M) * LAYER * slot
    return compare(
        "W7",
        f"{sizes.sets:,} sets of {FEATURES} features at layer {LAYER}, {PROMPTS} prompts of {T:.0f} tokens",
        lambda: patch_features(config, params, prompts, points, saes=saes, donor=resid).logprobs,
        [
            peer("jaxmech, one set after another", prompts, 8, sizes.sampled),
            peer("the same, the prompts' cache kept", kept, None, 8 * sizes.sampled),
        ],
        runs=min(bench.runs, 3),
        flops=PROMPTS * (shared + sizes.sets * each),
        tolerance=TOLERANCE,
    )


def furthest(ours: np.ndarray, sets: list[tuple[int, np.ndarray]]) -> float:
    """The largest difference of log probabilities [S,B,N] at the sets that the loop computed."""
    return max(float(np.abs(ours[s] - logprobs).max()) for s, logprobs in sets)
