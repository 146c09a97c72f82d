"""Stage fidelity: how much of the residual stream the dictionaries explain, on held-out text and where it matters."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxmech.activations.stream import ActivationStream
from jaxmech.behavior.behavior import poles
from jaxmech.behavior.scoring import take
from jaxmech.sae.check import check_sae
from jaxmech.sae.collect import run_decision
from jaxmech.sae.evaluate import density_histogram, evaluate_saes, loss_recovered
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Fidelity on held-out text and at the decision tokens of the test families; whether the dictionaries fit at all.

    The check warns, and the study continues: its findings are in the results, the manifest and the report.
    """
    lm, saes, text = ctx.lm, ctx.saes, ctx.folder.arrays("text")
    check = check_sae(lm, saes)
    tokens, mask = text["heldout_tokens"], text["heldout_mask"].astype(bool)
    stream = ActivationStream(
        lm.config,
        lm.params,
        tokens,
        mask=mask,
        layers=saes.config.layers,
        site=saes.config.site,
        batch_size=1,
        skip_first=saes.config.skip_first,
        key=ctx.key("fidelity.order"),
    )
    measured = evaluate_saes(saes, stream.chunks())
    n = ctx.config.fidelity.rows
    recovered = loss_recovered(lm.config, lm.params, tokens[:n], saes=saes, mask=mask[:n], batch=min(n, 4))
    table = measured.table.merge(recovered.drop(columns="tokens"), on="layer")
    table["fvu_decision"], table["l0_decision"] = decision_fidelity(ctx)
    columns = ("fvu", "fvu_decision", "l0", "dead", "recovered_zero", "recovered_mean")
    results = {
        name: {"mean": table[name].mean(), "worst": table[name].min() if "recovered" in name else table[name].max()}
        for name in columns
    }
    results["check"] = {"dictionaries": len(check.table), "warnings": list(check.warnings)}
    tables = {"layers": table, "density": density_histogram(measured), "check": check.table}
    arrays = {"density": measured.density}
    if ctx.saes_again is not None:
        arrays["density_again"] = evaluate_saes(ctx.saes_again, stream.chunks()).density
    return Outcome(results, tables, {name: array.astype(np.float32) for name, array in arrays.items()})


def decision_fidelity(ctx: Context) -> tuple[np.ndarray, np.ndarray]:
    """FVU and L0 [L'] at the decision token of the test families' pairs, where the study intervenes."""
    saes, resid = ctx.saes, []
    rows = np.concatenate([ctx.rows(name) for name in poles()])
    batch = ctx.config.batch
    for start in range(0, len(rows), batch):
        part = rows[np.minimum(np.arange(start, start + batch), len(rows) - 1)]
        x = run_decision(ctx.lm.config, ctx.lm.params, take(ctx.encoded[1], part)[0], site=saes.config.site).resid
        resid.append(np.asarray(x)[:, : len(rows) - start])
    x = jnp.asarray(np.concatenate(resid, axis=1))[jnp.asarray(saes.config.layers)]
    code = saes.encode(x)
    error, spread = x - saes.decode(code, x), x - x.mean(1, keepdims=True)
    return np.asarray((error**2).sum((1, 2)) / (spread**2).sum((1, 2))), np.asarray((code != 0).sum(2).mean(1))
