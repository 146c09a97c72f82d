"""Do dictionaries fit the model they are used on? Measured L0 and FVU against the declared ones, and the likely fault.

`D` denotes the width at the site, `F` dictionary features, `L'` the dictionaries' layers, `L` the model's, `S` the
dictionaries that are tried together, `n` tokens.

A dictionary at the wrong site, with its input's scale folded in twice, or fed the BOS token it never saw, gives numbers
like any other. What gives it away is a thousand tokens of real text.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.activations.stream import after_first, finite_layers
from jaxmech.activations.text import Tokens, pack_texts
from jaxmech.io.arguments import strings, whole_number
from jaxmech.io.progress import counted, progress
from jaxmech.io.reprs import short_repr
from jaxmech.models.block import SITES
from jaxmech.models.chat import encode_chat
from jaxmech.models.decoder import forward
from jaxmech.sae.evaluate import evaluate_saes
from jaxmech.sae.module import SAE, SAEConfig

if TYPE_CHECKING:
    from jaxmech.models.language_model import LanguageModel

TEXT = Path(__file__).with_name("check_text.txt")
"""Prose, dialogue, numbers and code, written for this; passages are separated by two blank lines."""

FAR_BETTER, BETTER, EXPLAINS, EXACT = 0.7, 0.8, 0.9, 1e-4
L0_RATIO = 2.0
DOUBTFUL_FVU = 0.6
_PROBE_ROWS = 2
_STACK = 3
_SKIPS = (0, 1, 4)
# A logger and not `warnings`: a fault in a dictionary is no fault in the code that called, every check is reported
# (a warning from one line is shown once), and no filter that turns warnings into errors can stop a study.
_log = logging.getLogger("jaxmech")


class Check(NamedTuple):
    """What a check found.

    table: a row per dictionary: `layer`, `l0_declared` (NaN where nothing is declared), `l0`, `fvu` and
      `cosine_centred` as measured (see `evaluate_saes`), `tokens`, and `likely_cause`: empty without a
      warning, else "site", "layer", "site or layer", "scale", "BOS", "apply_b_dec_to_input" or "unknown".
    warnings: a sentence for each dictionary that seems not to fit.
    """

    table: pd.DataFrame
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return short_repr(self)


def check_sae(
    lm: LanguageModel, saes: SAE, texts: Sequence[str] | None = None, *, rows: int = 8, length: int = 128
) -> Check:
    """Runs dictionaries on real text; warns, on the logger "jaxmech", of those that do not fit, with the likely cause.

    A warning is due where L0 is more than twice or less than half of the declared one, FVU is 1 or more (worse than
    always giving the mean) or NaN, or the same dictionary does far better when read otherwise. Alternatives tried on
    the same text: `subtract_b_dec` flipped, every other site of the same width, and the adjacent layers; where FVU is
    over 0.6 or a warning is due, also every other layer and the input times any factor from 4^-7 to 4^7 (a scale
    folded twice, or never: sqrt(D) / the mean norm, or another); where one is due, other numbers of skipped tokens.

    Neighbouring sites of a residual stream are similar, so an alternative must be better by a margin. It counts if its
    FVU is under 0.9, both FVU and its median over dimensions (a few massive ones dominate FVU itself) are lower than
    as declared, and in addition
    - FVU is less than 0.7 times the declared one's; or
    - L0 was off, its ratio to the declared one shrinks to its square root or less, and FVU to less than 0.8 times; or
    - FVU is lower for each of at least three dictionaries, and by their geometric mean less than 0.8 times.
    None counts where the declared one's FVU is under 1e-4 and L0 is right: what is left is rounding. The one with the
    lowest FVU is named. Skipped tokens, across which FVU cannot be compared, come first: they are the
    cause if skipping more leaves nothing wrong, or if L0 alone was wrong and is right when fewer are skipped.

    Args:
      saes: a stack or a single dictionary.
      texts: by default a page of prose, dialogue, numbers and code that comes with jaxmech. Packed into rows that
        start with BOS; for dictionaries that skip more than that (Gemma Scope 2 IT: 4) and a model with a chat
        template, each text is a separate user message.
      rows, length: of the token array, at most; 8 of 128 are about 1,000 tokens.

    Returns:
      A `Check`.

    Raises:
      ValueError: the dictionaries' width, site or layers are not the model's, `texts` are one string or do not fill a
        row, or the model's activations on them are not finite.
    """
    _require_fit(lm, saes)
    saes = saes.as_stack()
    rows, length = whole_number("rows", rows, 1), whole_number("length", length)
    config, text = saes.config, _encode(lm, texts, saes.config.skip_first, rows, length)
    with progress("checking dictionaries", None, unit="readings") as advance:
        seen = _read(lm, text, {config.site, config.site_out})
        _require_finite(lm, config, seen)
        measured = _fit(saes, *seen.pair(config))
        faults = [_faults(*facts) for facts in zip(measured.fvu, measured.l0, config.l0, strict=True)]
        skipped, read = _by_skipping(saes, seen, measured), _by_reading(lm, saes, text, measured, advance)
        causes = [a or b for a, b in zip(skipped, read, strict=True)]
    table = pd.DataFrame({
        "layer": config.layers, "tokens": int(seen.kept(config.skip_first).sum()),
        "l0_declared": [np.nan if l0 is None else float(l0) for l0 in config.l0],
        "l0": measured.l0, "fvu": measured.fvu, "cosine_centred": measured.cosine,
        "likely_cause": [c[0] if c else "unknown" if f else "" for c, f in zip(causes, faults, strict=True)],
    })  # fmt: skip
    warnings = tuple(
        _sentence(config, row, fault, cause)
        for row, fault, cause in zip(table.itertuples(), faults, causes, strict=True)
        if fault or cause
    )
    for warning in warnings:
        _log.warning("%s", warning)
    return Check(table, warnings)


# Activations --------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """taps: site -> [L,N,T,D]; mask [N,T]."""

    taps: dict[str, jax.Array]
    mask: np.ndarray

    def kept(self, skip_first: int) -> np.ndarray:
        return after_first(self.mask, skip_first)

    def activations(self, site: str, layers: Sequence[int], skip_first: int) -> jax.Array:
        """[S,n,D]."""
        return _picked(self.taps[site], np.asarray(layers), *np.nonzero(self.kept(skip_first)))

    def pair(self, config: SAEConfig, *, layers=None, skip_first=None) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets of dictionaries, [S,n,D] each."""
        layers = config.layers if layers is None else layers
        skip_first = config.skip_first if skip_first is None else skip_first
        return self.activations(config.site, layers, skip_first), self.activations(config.site_out, layers, skip_first)


@jax.jit
def _picked(tap: jax.Array, layers: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """[S,n,D] of n tokens."""
    return tap[layers[:, None], rows, tokens].astype(jnp.float32)


def _read(lm: LanguageModel, text: Tokens, sites) -> _Seen:
    tokens, mask = jnp.asarray(text.tokens), jnp.asarray(text.mask)
    taps = forward(lm.config, lm.params, tokens, mask=mask, taps=tuple(sorted(sites)), logits="none").taps
    return _Seen(taps, np.asarray(text.mask, bool))


def _encode(lm: LanguageModel, texts: Sequence[str] | None, skip_first: int, rows: int, length: int) -> Tokens:
    """At most `rows` rows of at most `length` tokens."""
    passages = TEXT.read_text(encoding="utf-8").split("\n\n\n") if texts is None else list(strings("texts", texts))
    if skip_first > 1 and getattr(lm.tokenizer, "chat_template", None):
        tokens, mask = encode_chat(lm, [[{"role": "user", "content": text.strip()}] for text in passages[:rows]])
        return Tokens(np.asarray(tokens), np.asarray(mask))
    return pack_texts(lm, ["\n\n".join(passages)], length=min(length, lm.config.max_positions), limit=rows)


def _require_fit(lm: LanguageModel, saes: SAE) -> None:
    c, faults = saes.config, []
    if unknown := [site for site in dict.fromkeys((c.site, c.site_out)) if site not in SITES]:
        faults.append(f"site: the model's are {', '.join(SITES)}, got {', '.join(unknown)}")
    else:
        for name, site, width in (("d_in", c.site, c.d_in), ("d_out", c.site_out, c.d_out)):
            if width != lm.config.width(site):
                faults.append(f"{name}: {width}, but {site} of {lm.name} is {lm.config.width(site)} wide")
    if wrong := [layer for layer in c.layers if not 0 <= layer < lm.config.n_layers]:
        faults.append(f"layers: {lm.name} has 0..{lm.config.n_layers - 1}, got {wrong}")
    if faults:
        raise ValueError(f"saes: these dictionaries do not belong to this model: {'; '.join(faults)}")


def _require_finite(lm: LanguageModel, config: SAEConfig, seen: _Seen) -> None:
    for site in dict.fromkeys((config.site, config.site_out)):
        finite = np.asarray(finite_layers(seen.activations(site, config.layers, config.skip_first)))
        if wrong := [layer for layer, good in zip(config.layers, finite, strict=True) if not good]:
            raise ValueError(f"lm: {site} of layer {', '.join(map(str, wrong))} of {lm.name} is not finite on these "
                             "texts; check the model's weights and dtype")  # fmt: skip


# Measures -----------------------------------------------------------------------------------------------------------


class _Fit(NamedTuple):
    """[S] each."""

    fvu: np.ndarray
    median: np.ndarray
    l0: np.ndarray
    cosine: np.ndarray


def _fit(saes: SAE, x: jax.Array, target: jax.Array) -> _Fit:
    """NaN where activations are not finite, as may happen in a layer that was not asked for."""
    finite = finite_layers(x) & finite_layers(target)
    x, target = (jnp.where(finite[:, None, None], a, 0.0) for a in (x, target))
    table = evaluate_saes(saes, [(x, target)]).table
    columns = (table[name].to_numpy() for name in ("fvu", "fvu_median", "l0", "cosine_centred"))
    return _Fit(*(np.where(finite, column, np.nan) for column in columns))


def _faults(fvu: float, l0: float, declared: float | None) -> list[str]:
    """What is wrong with the measurements themselves, in words."""
    faults = []
    if not fvu < 1:
        faults.append("FVU is NaN" if np.isnan(fvu) else f"FVU is {fvu:.3g}, worse than giving the mean")
    if _off(l0, declared):
        faults.append(f"L0 is {l0:.3g}, declared is {declared:.3g}")
    return faults


def _off(l0: float, declared: float | None) -> bool:
    return declared is not None and not declared / L0_RATIO <= l0 <= declared * L0_RATIO


def _sentence(config: SAEConfig, row, faults: list[str], cause: tuple[str, str] | None) -> str:
    place = config.site if config.site == config.site_out else f"{config.site} to {config.site_out}"
    symptoms = " and ".join(faults) or f"FVU is {row.fvu:.2g}"
    if cause is None and row.fvu < 1:
        hint = f"FVU is {row.fvu:.2g}: it may have been trained on too little text, or on other text than this"
        cause = ("unknown", hint)
    if cause is None:
        cause = ("unknown", "no other site of that width, layer, scale, b_dec or number of skipped tokens explains it")
    return f"Dictionary of layer {row.layer} ({place}): {symptoms}. Likely cause: {cause[0]}; {cause[1]}."


# Alternatives -------------------------------------------------------------------------------------------------------

_Cause = tuple[str, str]
"""Its name in the table, and what was seen."""


class _Trial(NamedTuple):
    """Dictionaries read otherwise than declared. where: a description for each of S; possible [S]."""

    cause: str
    where: Sequence[str]
    saes: SAE
    x: jax.Array
    target: jax.Array
    possible: np.ndarray | bool = True


def _by_skipping(saes: SAE, seen: _Seen, measured: _Fit) -> list[_Cause | None]:
    """The number of skipped first tokens, for each dictionary that it explains."""
    config = saes.config
    causes: list[_Cause | None] = [None] * len(config.layers)
    faulty = [_faults(*facts) for facts in zip(measured.fvu, measured.l0, config.l0, strict=True)]
    if not any(faulty):
        return causes
    for skip in _SKIPS:
        if skip == config.skip_first or not seen.kept(skip).any():
            continue
        fit = _fit(saes, *seen.pair(config, skip_first=skip))
        for i, declared in enumerate(config.l0):
            if skip > config.skip_first:
                explains = faulty[i] and not _faults(fit.fvu[i], fit.l0[i], declared)
            else:  # a massive first token dwarfs all others, so FVU would say nothing
                explains = _off(measured.l0[i], declared) and measured.fvu[i] < 1 and not _off(fit.l0[i], declared)
            if explains and causes[i] is None:
                causes[i] = ("BOS", f"with skip_first={skip} instead of {config.skip_first}, {_numbers(fit, i)}")
    return causes


def _by_reading(lm: LanguageModel, saes: SAE, text: Tokens, measured: _Fit, advance) -> list[_Cause | None]:
    """For each dictionary, the site, layer, scale or b_dec with which it does far better."""
    c = saes.config
    width = lm.config.width
    sites = [s for s in SITES if width(s) in (width(c.site), width(c.site_out))]
    seen = _read(lm, Tokens(*(a[:_PROBE_ROWS] for a in text)), sites)
    base = _fit(saes, *seen.pair(c))
    tried = [(trial, _outcome(trial)) for trial in counted(_near(saes, seen), advance)]
    causes = [_best(base, tried, c.l0, i) for i in range(len(c.layers))]
    doubtful = [
        i
        for i in range(len(c.layers))
        if _faults(measured.fvu[i], measured.l0[i], c.l0[i]) or not measured.fvu[i] < DOUBTFUL_FVU or causes[i]
    ]
    if doubtful:
        rows = np.array(doubtful)
        subset, base = _take(saes, rows), _Fit(*(a[rows] for a in base))
        tried = [
            (_Trial(t.cause, [t.where[i] for i in rows], *t[2:]), _Fit(*(a[rows] for a in fit))) for t, fit in tried
        ]
        tried += [(trial, _outcome(trial)) for trial in counted(_far(subset, seen), advance)]
        for row, i in enumerate(doubtful):
            causes[i] = _best(base, tried, subset.config.l0, row)
    return causes


def _near(saes: SAE, seen: _Seen) -> Iterator[_Trial]:
    """`subtract_b_dec` flipped, other sites of the same width, and the adjacent layers."""
    c, n = saes.config, len(saes.config.layers)
    x, target = seen.pair(c)
    if c.d_in == c.d_out:
        subtract = not c.subtract_b_dec
        flipped = saes.replace(config=dataclasses.replace(c, subtract_b_dec=subtract))
        yield _Trial("apply_b_dec_to_input", [f"with subtract_b_dec={subtract}"] * n, flipped, x, target)
    for site in seen.taps:
        acts = seen.activations(site, c.layers, c.skip_first)
        if c.site == c.site_out:
            if site != c.site:
                yield _Trial("site", [f"{site} of layer {layer}" for layer in c.layers], saes, acts, acts)
            continue
        if site != c.site and acts.shape == x.shape:
            yield _Trial("site", [f"{site} read instead of {c.site}"] * n, saes, acts, target)
        if site != c.site_out and acts.shape == target.shape:
            yield _Trial("site", [f"{site} written instead of {c.site_out}"] * n, saes, x, acts)
    yield from (_shifted(saes, seen, shift) for shift in (-1, 1))


def _far(saes: SAE, seen: _Seen) -> Iterator[_Trial]:
    """All other layers, and other scales."""
    c = saes.config
    x, target = seen.pair(c)
    last = len(seen.taps[c.site]) - 1
    yield from (_shifted(saes, seen, s) for s in range(-max(c.layers), last - min(c.layers) + 1) if abs(s) > 1)
    if c.normalize == "none":  # the others normalise the input's scale away anyway
        factors = _best_scale(saes, x, target)
        where = [f"with its input times {factor:.3g}, and its output divided by it" for factor in factors]
        yield _Trial("scale", where, _scaled(saes, factors), x, target, factors != 1)


def _shifted(saes: SAE, seen: _Seen, shift: int) -> _Trial:
    c = saes.config
    layers, last = np.array(c.layers) + shift, len(seen.taps[c.site]) - 1
    inside = np.clip(layers, 0, last)
    where = [f"{c.site} of layer {layer}" for layer in layers]
    return _Trial("layer", where, saes, *seen.pair(c, layers=inside), layers == inside)


def _take(saes: SAE, rows: np.ndarray) -> SAE:
    """Some dictionaries of a stack, as a stack."""
    c = saes.config
    config = dataclasses.replace(c, layers=tuple(c.layers[i] for i in rows), l0=tuple(c.l0[i] for i in rows))
    return SAE({name: leaf[rows] for name, leaf in saes.params.items()}, config)


def _scaled(saes: SAE, factor: np.ndarray) -> SAE:
    """sae(x * factor) / factor: the dictionary as if its input's scale had been folded once more."""
    p, s = dict(saes.params), jnp.asarray(factor, jnp.float32)
    folded = {"W_enc": p["W_enc"] * s[:, None, None], "W_dec": p["W_dec"] / s[:, None, None]}
    return saes.replace(params=p | folded | {"b_dec": p["b_dec"] / s[:, None]})


def _best_scale(saes: SAE, x: jax.Array, target: jax.Array) -> np.ndarray:
    """The factor [S] of lowest FVU: the best power of 4 from 4^-7 to 4^7, refined by halving steps to 5 percent."""
    factor = np.ones(len(saes.config.layers))
    lowest = np.full(len(factor), np.inf)
    steps = [np.arange(-14, 15, 2), *(np.array([-step, step]) for step in (1, 0.5, 0.25, 0.125, 0.0625))]
    for exponents in steps:
        start = factor
        for exponent in exponents:
            fvu = _fit(_scaled(saes, start * 2.0**exponent), x, target).fvu
            better = fvu < lowest
            factor, lowest = np.where(better, start * 2.0**exponent, factor), np.where(better, fvu, lowest)
    return factor


def _outcome(trial: _Trial) -> _Fit:
    """NaN where the trial is not possible."""
    return _Fit(*(np.where(trial.possible, a, np.nan) for a in _fit(trial.saes, trial.x, trial.target)))


def _best(base: _Fit, tried: Sequence[tuple[_Trial, _Fit]], declared, i: int) -> _Cause | None:
    """The alternative with the lowest FVU of those that count for dictionary i (see `check_sae`)."""
    better = [(trial, fit) for trial, fit in tried if _counts(base, fit, declared, i)]
    if not better:
        return None
    lowest = min(fit.fvu[i] for _, fit in better)
    best = [(trial, fit) for trial, fit in better if fit.fvu[i] == lowest]  # resid_pre is the layer below's resid_post
    names = " or ".join(dict.fromkeys(trial.cause for trial, _ in best))
    places = ", that is ".join(trial.where[i] for trial, _ in best)
    return names, f"{places}: {_numbers(best[0][1], i)} (as declared {_numbers(base, i)}, on the same tokens)"


def _counts(base: _Fit, alternative: _Fit, declared, i: int) -> bool:
    ratio, lower = _ratio(base, alternative)
    if not (alternative.fvu[i] < EXPLAINS and alternative.l0[i] > 0 and lower[i]):
        return False
    if base.fvu[i] < EXACT and not _off(base.l0[i], declared[i]):
        return False
    nearer = False
    if _off(base.l0[i], declared[i]):
        before, after = (abs(np.log(max(fit.l0[i], 1e-6) / declared[i])) for fit in (base, alternative))
        nearer = after <= before / 2 and ratio[i] < BETTER
    possible = ~np.isnan(alternative.l0)
    everywhere = possible.sum() >= _STACK and lower[possible].all()
    together = everywhere and np.exp(np.mean(np.log(ratio[possible]))) < BETTER
    return bool(ratio[i] < FAR_BETTER or nearer or together)


def _ratio(base: _Fit, alternative: _Fit) -> tuple[np.ndarray, np.ndarray]:
    """FVU relative to the declared one's, and whether it and the median are lower; any number is below NaN."""
    before, median = (np.where(np.isnan(a), np.inf, a) for a in (base.fvu, base.median))
    ratio = np.maximum(alternative.fvu / before, 1e-12)
    return ratio, (ratio < 1) & (alternative.median < median)


def _numbers(fit: _Fit, i: int) -> str:
    return f"FVU is {fit.fvu[i]:.3g} and L0 {fit.l0[i]:.3g}"
