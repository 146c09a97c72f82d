"""Tables and results of every stage, small and plausible, from the schemas that the stages write."""

import dataclasses
import re
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd

from jaxmech.behavior.altruism.altruism import LABELS
from jaxmech.behavior.altruism.altruism import altruism as build_altruism
from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.altruism.games import GAMES as PLAYED
from jaxmech.behavior.altruism.games import game_prompts
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.study.folder import Outcome

LAYERS, F, FAMILIES = (6, 8, 10, 12, 14, 16), 512, 16
CONTRASTS = ("poles", "heldout", "placebo", "valence", "number", "flipped", "unstanced", "other", "own_accounts")
GATING = ("placebo", "valence", "number")
GAMES = {
    "dictator_give": (1, "mean 28 %, 36 % give nothing (Engel 2011)"),
    "dictator_take": (1, "about 35 % left (Flage)"),
    "ultimatum_proposer": (1, "40 % offered, 16 % rejected (Oosterbeek 2004)"),
    "trust_returner": (1, "37 % returned (Johnson & Mislin 2011)"),
    "public_goods": (1, "35-55 % (Zelmer 2003)"),
}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """gate, rule: whether the behaviour and the features are there; effect: of interventions; defined: of the index."""

    gate: bool = True
    rule: bool = True
    effect: bool = True
    defined: bool = True
    usable: bool = True
    directions: int = 199


def behaviour(rng, scenario):
    shift = 26.8 if scenario.gate else 3.1
    rows = []
    for contrast in CONTRASTS:
        value = {"poles": shift, "heldout": 0.7 * shift, "own_accounts": 6.0}.get(contrast, rng.normal(0, 1.0))
        value = value if scenario.gate or contrast != "own_accounts" else 1.0
        half = rng.uniform(1.5, 4.0)
        rows.append(
            dict(
                contrast=contrast,
                families=FAMILIES,
                shift_pp=value,
                low_pp=value - half,
                high_pp=value + half,
                p=3e-5 if abs(value) > half else 0.4,
                d_z=value / (2 * half),
                mass=0.9,
                size_pp=abs(value) + 1,
                detectable_pp=1.4 * half,
                excess_pp=shift - value,
                excess_low_pp=shift - value - half,
                excess_high_pp=shift - value + half,
                excess_detectable_pp=1.4 * half,
            )
        )
    effects = pd.DataFrame(rows)
    shares, distributions = np.linspace(0, 1, 11), []
    for condition, centre in (("plus", 0.2 + shift / 100), ("minus", 0.2), ("neutral", 0.3), ("placebo:plus", 0.3)):
        weights = np.exp(-((shares - centre) ** 2) / 0.03) + 0.15 * (shares == 0.5) + 0.02
        for share, probability in zip(shares, weights / weights.sum(), strict=True):
            distributions.append(dict(condition=condition, share=share, probability=probability))
    stance = effects.iloc[0]
    results = {
        "words": altruism().said(),
        "mean_plus": 0.203 + shift / 100,
        "mean_minus": 0.203,
        "mean_neutral": 0.31,
        "shift_pp": shift,
        "ci": [stance.low_pp, stance.high_pp],
        "p": 3e-5,
        "detectable_pp": 5.0,
        "d_z": 2.1,
        "wasserstein": shift / 100,
        "parts": {
            "semantic": {"pp": 0.6 * shift, "ci": [0.4 * shift, 0.8 * shift], "p": 1e-3, "detectable_pp": 4.0},
            "mapping": {"pp": 0.4 * shift, "ci": [0.2 * shift, 0.6 * shift], "p": 1e-3, "detectable_pp": 4.0},
        },
        "controls": {
            row.contrast: {
                "shift_pp": row.shift_pp,
                "ci": [row.low_pp, row.high_pp],
                "size_pp": 2.0,
                "detectable_pp": row.detectable_pp,
                "excess_pp": row.excess_pp,
                "excess_ci": [row.excess_low_pp, row.excess_high_pp],
                "excess_detectable_pp": row.excess_detectable_pp,
                "gate": row.contrast in GATING,
            }
            for row in effects.iloc[1:].itertuples()
        },
        "mass": 0.89,
        "mass_plus": 0.9,
        "mass_minus": 0.88,
        "mass_difference": {"pp": 2.0, "ci": [0.5, 3.5]},
        "families": FAMILIES,
        "edges": {
            name: {"zero": 0.1 + 0.3 * (name == "minus"), "half": 0.3, "all": 0.02} for name in ("plus", "minus")
        },
        "excluded_pairs": 2,
        "sampling": {
            "samples": 128,
            **{
                name: {
                    "valid": 0.88,
                    "mean": mean,
                    "standard_error": 0.03,
                    "exact_mean": mean + 0.01,
                    "invalid": {"range": 3},
                }
                for name, mean in (("plus", 0.46), ("minus", 0.21))
            },
        },
    }
    exclusions = pd.DataFrame({"family": ["a", "b"], "reason": ["unequal length", "unequal length"]})
    by = [("stake", "10", 24.0), ("stake", "20", 21.0), ("form", "word", 26.0), ("form", "you", 19.0)]
    columns = ["factor", "level", "families", "shift_pp", "low_pp", "high_pp"]
    factors = pd.DataFrame([(*row[:2], FAMILIES, row[2], row[2] - 6, row[2] + 6) for row in by], columns=columns)
    tables = {
        "effects": effects,
        "factors": factors,
        "distributions": pd.DataFrame(distributions),
        "exclusions": exclusions,
    }
    return Outcome(results, tables | {"prompts": bank_prompts()})


@cache
def altruism():
    tokenizer = lambda text, add_special_tokens=False: SimpleNamespace(input_ids=re.findall(r"\w+|\W", text))  # noqa: E731
    return build_altruism(BankConfig(selection=1, development=0, test=2), tokenizer)


def bank_prompts():
    """The prompts of two test families, as the bank words them."""
    prompts = altruism().prompts
    return prompts[prompts["split"] == "test"].reset_index(drop=True)


def feature_tables(rng, scenario):
    n = len(LAYERS) * F
    layer, live = np.repeat(LAYERS, F), rng.random(n) > 0.4
    d_z = np.where(live, rng.normal(0, 0.35, n), 0.0)
    strong = rng.choice(np.flatnonzero(live & (layer >= 10)), 24, replace=False)
    d_z[strong] = rng.choice([-1, 1], 24) * rng.uniform(1.6, 4.2, 24)
    t = d_z * np.sqrt(32)
    p = np.minimum(1.0, np.exp(-np.abs(t) * 1.9))
    stability = np.full(n, np.nan)
    stability[strong] = np.round(rng.uniform(0.6, 1.0, 24) * 20) / 20
    chosen = (np.nan_to_num(stability) >= 0.8) & scenario.rule
    budget = np.zeros(n, bool)
    budget[strong[:2]] = True
    features = pd.DataFrame(
        dict(
            layer=layer,
            feature=np.tile(np.arange(F), len(LAYERS)),
            live=live,
            dz=d_z * 3,
            strength=np.abs(d_z) * 3,
            t=t,
            p=p,
            q=np.minimum(1, p * 20),
            d_z=d_z,
            permutation_p=np.maximum(p, 0.001),
            p_max=np.minimum(1, np.maximum(p * 200, 0.001)),
            sign=0.95,
            sign_words=1.0,
            t_words=t / 2,
            min_f=t**2 / 5,
            flipped_sign=1.0,
            auroc=np.clip(0.5 + d_z / 5, 0, 1),
            fires_plus=rng.uniform(0.2, 1, n),
            fires_minus=rng.uniform(0.2, 1, n),
            density=rng.uniform(0, 0.1, n),
            control=np.where(live, "placebo", ""),
            control_d_z=np.abs(rng.normal(0, 0.2, n)),
            correlation_plus=rng.normal(0, 0.2, n),
            correlation_minus=rng.normal(0, 0.2, n),
            stability=stability,
            d_z_after=d_z / 2,
            selected=chosen,
            in_budget=budget,
        )
    )
    used = features[features["selected" if scenario.rule else "in_budget"]]
    return features, used.sort_values("t", key=np.abs, ascending=False).reset_index(drop=True)


def contrast(features, used, scenario):
    found = int(features["selected"].sum())
    criteria = pd.DataFrame(
        [
            ("max_t", 90, 90), ("q", 420, 90), ("d_z", 300, 88), ("sign", 260, 80), ("words", 240, 78),
            ("fires", 900, 70), ("density", 1500, 68), ("control", 800, 50), ("flipped", 700, 45),
            ("permutation", 410, 45), ("auroc", 60, 24), ("half_splits", found, found),
        ],
        columns=["criterion", "alone", "remaining"],
    )  # fmt: skip
    budgets = pd.DataFrame(dict(share=[0.00006, 0.00024, 0.00048], features=[1, 2, 4], smallest_t=[20.0, 18.0, 15.0]))
    results = {
        "features_total": len(features),
        "features_live": int(features["live"].sum()),
        "selected": found,
        "share": found / len(features),
        "expected_false": 0.04,
        "expected_false_max": 1,
        "relabelings": 200,
        "null_p": 1 / 201 if found else 1.0,
        "null_share": 0.03,
        "null_upper": 0.06,
        "positions": {"decision": found, "after": found // 2},
        "density_tokens": 640,
        "compared_with": ["placebo", "valence", "number"],
        "flipped": True,
        "word_pairs": 6,
        "fdr": 0.04 / found if found else None,
        "mode": "rule" if scenario.rule else "budget",
        "used": len(used),
        "budget": 2,
        "budget_and_rule": min(found, 2),
        "by_layer": used["layer"].value_counts().sort_index().to_dict(),
    }
    cards = used[["layer", "feature"]].assign(
        promoted=[[" generous", " share", "50"]] * len(used),
        contexts=[["A <generous> player has $10", "<b>half</b> of it &\n the rest"]] * len(used),
    )
    return Outcome(
        results, {"features": features, "selected": used, "criteria": criteria, "budgets": budgets, "cards": cards}
    )


def dual_process(rng, used, scenario):
    kinds = rng.choice(["s2", "s1", "mixed", "neither", "silent"], len(used), p=[0.3, 0.25, 0.1, 0.25, 0.1])
    sign = pd.Series(kinds).map({"s2": 1, "s1": -1, "mixed": 0.2, "neither": 0, "silent": 0}).to_numpy(float)
    arms = {}
    for arm, flip in (("demand", 1), ("instruction", np.where(kinds == "mixed", -1, 1))):
        value = sign * flip * 0.6 + rng.normal(0, 0.1, len(used))
        arms |= {arm: value, f"{arm}_low": value - 0.2, f"{arm}_high": value + 0.2}
    classes = used[["layer", "feature"]].assign(
        **{"class": kinds},
        index=(arms["demand"] + arms["instruction"]) / 2,
        **arms,
        silent_share=0.1,
        anchor=arms["demand"],
        arithmetic_slope=0.2 * sign,
        arithmetic_slope_low=0.2 * sign - 0.1,
        arithmetic_slope_high=0.2 * sign + 0.1,
        lexical=np.arange(len(used)) == 1,
    )
    counts = {kind: int((kinds == kind).sum()) for kind in ("s1", "s2", "mixed", "neither", "silent")}
    cuts = pd.DataFrame(
        [
            dict(cut=cut, **{k: max(v + 2 - i, 0) if k in ("s1", "s2") else v for k, v in counts.items()})
            for i, cut in enumerate((0.1, 0.2, 0.3, 0.4, 0.5))
        ]
    )
    reason = "" if scenario.defined else "accuracy without conflict 0.31 is not above chance"
    accuracy = 0.62 if scenario.defined else 0.31
    conditions = {
        "accuracy": {"value": accuracy, "ci": [accuracy - 0.08, accuracy + 0.08], "met": scenario.defined},
        "lure_cost": {"value": 0.18, "ci": [0.1, 0.26], "met": True},
        "instruction_gain": {"value": 0.03, "ci": [0.01, 0.05], "met": True},
    }
    behaviour = {"accuracy_no_conflict": accuracy, "conflict_cost": 0.18, "instruction_gain": 0.03}
    if not scenario.defined:  # nothing more is computed
        kept = ["layer", "feature", "lexical"]
        classes = classes[kept].reindex(columns=classes.columns).assign(**{"class": "undefined"})
        counts, cuts = dict.fromkeys(counts), cuts.head(0)
    items = build_items(per_generator=1).drop(columns="text").assign(
        p_correct=0.6, log_mass=-0.5, tokens=40, log_likelihood=-3.0
    )  # fmt: skip
    return Outcome(
        counts
        | dict(defined=scenario.defined, reason=reason, conditions=conditions, behavior=behaviour)
        | dict(arms=["demand", "instruction"], lexical=int(classes["lexical"].sum()), items=11, cut=0.3),
        {"classes": classes, "sensitivity": cuts, "items": items},
    )


def patching(rng, used, scenario):
    names = (
        ("selected features", "effect", 0.41 if scenario.effect else 0.02),
        ("control-selected features", "control", 0.03),
        ("whole residual", "reference", 1.0),
        ("all features", "reference", 0.72),
        ("reconstruction error only", "reference", 0.24),
        ("mean-difference direction", "reference", 0.55),
        ("sham donor, same stance", "control", -0.01),
    )
    bars, null, results = [], [], {}
    for direction in ("to_plus", "to_minus"):
        draws = rng.normal(0.02, 0.03, (2, 199))
        for name, kind, value in names:
            bars.append(
                dict(
                    direction=direction,
                    name=name,
                    kind=kind,
                    recovered=value,
                    low=value - 0.07,
                    high=value + 0.07,
                    change_pp=26.8 * value,
                )
            )
        for kind, drawn in zip(("matched sets", "random directions"), draws, strict=True):
            null.append(pd.DataFrame(dict(direction=direction, null=kind, recovered=drawn)))
        value = names[0][2]
        results |= {
            f"recovered_{direction}": value,
            f"recovered_{direction}_ci": [value - 0.07, value + 0.07],
            f"p_random_{direction}": 0.005 if scenario.effect else 0.62,
            f"random_{direction}": float(draws[0].mean()),
            f"random_ratio_{direction}": 1.0,
            f"p_directions_{direction}": 0.01 if scenario.effect else 0.4,
            f"bars_{direction}": {name: share for name, kind, share in names if kind == "reference"},
        }
    singles = used[["layer", "feature"]].assign(p=0.01, p_holm=0.04)
    singles["change_pp"] = np.where(np.arange(len(used)) % 3, 2.5, 0.05)
    singles = singles.assign(low_pp=singles["change_pp"] - 0.4, high_pp=singles["change_pp"] + 0.4)
    singles["passenger"] = singles["change_pp"] < 0.5
    share = lambda v: {"value": v, "ci": [v - 0.1, v + 0.1]}  # noqa: E731
    excess = {"excess_pp": 9.0, "excess_ci": [5.0, 13.0]}
    results |= {
        "p_random": 0.005 if scenario.effect else 0.62, "random_sets": 199, "families": FAMILIES,
        "random_directions": 99,
        "movers": int((~singles["passenger"]).sum()), "passengers": int(singles["passenger"].sum()),
        "held_out": {"heldout": share(names[0][2]), "unstanced": share(names[0][2])},
        "cross": {
            "valence": {"own": share(0.05), "poles": share(0.2)} | excess,
            "number": {"own": share(0.02), "poles": share(0.2)} | excess,
        },
    }  # fmt: skip
    tables = {"bars": pd.DataFrame(bars), "null": pd.concat(null, ignore_index=True), "singles": singles}
    return Outcome(results, tables)


def attribution(rng, features):
    frame = features[["layer", "feature", "selected", "live"]].assign(attribution=rng.normal(0, 1e-4, len(features)))
    top = frame.sample(40, random_state=0).assign(group="top")
    top["attribution"] = rng.normal(0, 0.01, 40)
    rest = frame.sample(40, random_state=1).assign(group="random")
    audit = pd.concat([top, rest], ignore_index=True)
    audit["patched"] = 0.8 * audit["attribution"] + rng.normal(0, 1e-3, len(audit))
    results = {
        "audited": {"top": 40, "random": 40},
        "spearman": {"top": 0.93, "random": 0.2, "all": 0.8},
        "spearman_integrated": {"top": 0.96, "random": 0.3},
        "sign_agreement": {"top": 0.9, "random": 0.55},
        "families": 4,
        "selected_share_of_top": 0.2,
    }
    return Outcome(results, {"attribution": frame, "audit": audit})


def proximity(rng, used, scenario):
    total = 11.0 if scenario.effect else 0.4
    rows = []
    for name, share in (("all", 0.4), ("s1", 0.2), ("s2", 0.6)):
        size = total * {"all": 1.0, "s1": 0.4, "s2": 0.5}[name]
        pi = (
            dict(pi=share, pi_low=share - 0.1, pi_high=share + 0.1)
            if scenario.effect
            else dict(pi=None, pi_low=None, pi_high=None)
        )
        rows.append(
            dict(
                set=name,
                features=5,
                total_pp=size,
                total_low=size - 2,
                total_high=size + 2,
                direct_pp=share * size,
                indirect_pp=(1 - share) * size,
            )
            | pi
        )
    effects = rng.normal(0, 0.01, len(used))
    share = rng.uniform(0, 1, len(used))
    share[0] = 7.0  # outside the drawn range
    each = used[["layer", "feature"]].assign(
        **{"class": rng.choice(["s1", "s2", "neither"], len(used))},
        total=effects,
        direct=effects * share,
        proximity=share,
    )
    sets = pd.DataFrame(rows)
    inside = {"difference": 0.21, "p": 0.012, "layers": 3, "verdict": "identified within layers"}
    if not scenario.effect:
        inside = {
            "difference": None,
            "p": None,
            "layers": 0,
            "verdict": "not identifiable beyond depth: no layer holds both classes",
        }
    results = {
        "sets": {row["set"]: {k: v for k, v in row.items() if k != "set"} for row in rows},
        "total_pp": total,
        "direct_pp": 0.4 * total,
        "pi": rows[0]["pi"],
        "effect_weighted_depth": {"s1": 11.2, "s2": 13.4},
        "s2_minus_s1_within_layers": inside,
        "mediation": {
            "s1_through_s2": {"share": 0.3, "ci": [0.1, 0.5]},
            "s2_through_s1": {"share": 0.05, "ci": [-0.1, 0.2]},
        },
    }
    return Outcome(results, {"sets": sets, "features": each})


RANDOM = ("random directions", "random directions, same KL")


def steering(rng, scenario):
    alphas = np.array([-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4])
    slope = 0.05 if scenario.effect else 0.001
    g = 0.31 + 0.28 * np.tanh(alphas * slope / 0.28)
    size = alphas**2 * (1.0 if scenario.usable else 9.0)
    usable = size <= 4
    dose = pd.DataFrame(
        dict(
            alpha=alphas,
            g=g,
            g_low=g - 0.02,
            g_high=g + 0.02,
            mass=0.9 - 0.004 * size,
            p_zero=np.clip(0.2 - alphas * slope, 0, 1),
            p_half=0.25,
            p_all=np.clip(0.03 + alphas * slope / 4, 0, 1),
            perplexity=12 * (1 + 0.02 * size),
            kl=0.015 * size,
            accuracy=1 - 0.004 * (size > 4) * size,
            cost=size / 4,
            usable=usable,
        )
    )
    low, high = (-2.0, 2.0) if scenario.usable else (0.0, 0.0)
    rows = [
        ("selected features", "effect", 100 * slope),
        ("mean difference", "comparator", 120 * slope),
        ("weighted by effect alone", "comparator", 110 * slope),
        ("S1 features only", "comparator", 1.1),
    ]
    rows += [("S2 features only", "comparator", 2.4)]
    rows += [("matched random features", "null", v) for v in rng.normal(0, 0.5, 199)]
    rows += [(name, "null", v) for name in RANDOM for v in rng.normal(0, 0.3, 100)]
    p = 0.005 if scenario.effect else 0.71
    results = {
        "steered": ["neutral"],
        "at_one_pp": 100 * slope,
        "at_one_ci": [100 * slope - 0.9, 100 * slope + 0.9],
        "at_one_p": p,
        "detectable_pp": 1.3,
        "slope_pp": 100 * slope,
        "slope_ci": [100 * slope - 0.9, 100 * slope + 0.9],
        "usable_range": [low, high],
        "effect_in_range_pp": 400 * slope,
        "dose_response": {"slope": slope, "spearman": 0.99, "isotonic_r2": 0.98, "asymmetry": 0.02}
        if scenario.usable
        else None,
        "slope_at_one_pp": 100 * slope,
        "p_random": p,
        "random_ratio": 1.0,
        "p_random_directions": p,
        "random_sets": 199,
        "random_directions": 99,
        "p_random_kl": p,
        "comparators_pp": {"mean difference": 6.0},
        "specificity": {
            name: {
                "slope_pp": value,
                "ci": [value - 1, value + 1],
                "families": FAMILIES,
                "detectable_pp": 1.5,
                "ci90": [value - 0.8, value + 0.8],
                "margin_pp": 100 * slope / 3,
                "equivalent": abs(value) + 0.8 <= 100 * slope / 3,
            }
            for name, value in (("keep", 90 * slope), ("take", 70 * slope), ("own_accounts", 0.3))
        },
        "families": FAMILIES,
        "norm_share": 0.12,
        "window": {"layers": [8, 9], "at_one_pp": 80 * slope, "at_one_ci": [80 * slope - 1, 80 * slope + 1]},
    }
    tables = {"dose": dose, "comparators": pd.DataFrame(rows, columns=["name", "kind", "slope_pp"])}
    return Outcome(results, tables | {"ways": ways(slope)})


def ways(slope):
    moved = [("how", name, share) for name, share in (("set", 1.0), ("add", 1.6), ("multiply", 0.1))]
    moved += [("layers", name, share) for name, share in (("layer 8", 0.5), ("layers 8 to 9", 0.8))]
    moved += [
        ("tokens", name, share) for name, share in (("decision token", 1.6), ("question", 0.9), ("everywhere", 0.2))
    ]
    return pd.DataFrame([
        dict(kind=kind, name=name, layers=[8, 9], change_pp=100 * slope * share, low_pp=100 * slope * share - 1,
             high_pp=100 * slope * share + 1, mass=0.88 if name != "everywhere" else 0.31,
             development_pp=90 * slope * share if kind == "layers" else None, chosen=name == "layers 8 to 9")
        for kind, name, share in moved
    ])  # fmt: skip


def transfer(rng, scenario):
    rows, curves, results = [], [], {}
    for number, (name, (sign, people)) in enumerate(GAMES.items()):
        slope = (5.0 - number) if scenario.effect else rng.normal(0, 0.3)
        p_holm = max(0.005 * len(GAMES), len(GAMES) / (scenario.directions + 1)) if scenario.effect else 1.0
        rows.append(
            dict(
                task=name,
                label=LABELS.get(name, ""),
                home=name == "dictator_give",
                kind="",
                stance_pp=slope + 1,
                expected_sign=sign,
                families=6,
                baseline=0.3 + 0.05 * number,
                slope_pp=slope,
                low_pp=slope - 0.8,
                high_pp=slope + 0.8,
                p=0.03,
                p_random=p_holm / 5,
                null_sd_pp=0.4,
                detectable_pp=1.1,
                mass=0.85,
                human=people,
                p_holm=p_holm,
            )
        )
        alphas = np.array([-1.0, 0.0, 1.0])
        curves.append(
            pd.DataFrame(dict(task=name, alpha=alphas, score=0.3 + 0.05 * number + alphas * slope / 100, mass=0.85))
        )
        results[name] = {
            "slope": slope,
            "ci": [slope - 0.8, slope + 0.8],
            "p_random": p_holm / 5,
            "p_holm": p_holm,
            "baseline": 0.3,
            "mass": 0.85,
            "expected_sign": sign,
            "label": LABELS.get(name, ""),
            "kind": "",
            "stance_pp": slope + 1,
            "home": name == "dictator_give",
            "families": 6,
            "detectable_pp": 1.1,
            "random_directions": scenario.directions,
        }
    prompts = pd.concat([game_prompts(PLAYED[name], families=1).assign(task=name) for name in GAMES])
    tables = {"tasks": pd.DataFrame(rows), "curves": pd.concat(curves, ignore_index=True), "prompts": prompts}
    return Outcome(results, tables)


def dictionaries(rng):
    steps = np.arange(10, 401, 10)
    history = pd.DataFrame(
        [
            dict(
                step=step,
                layer=layer,
                fvu=0.2 + 0.7 * np.exp(-step / 90) + 0.01 * i + rng.normal(0, 0.01),
                l0=32.0,
                dead=0.1,
                aux=0.0,
            )
            for step in steps
            for i, layer in enumerate(LAYERS)
        ]
    )
    return Outcome({"layers": list(LAYERS), "trained": False}, {"training": history})


def fidelity(rng, scenario):
    n = len(LAYERS)
    table = pd.DataFrame(
        dict(
            layer=LAYERS,
            tokens=1500,
            fvu=np.linspace(0.22, 0.34, n),
            fvu_scaled=0.3,
            cosine=0.99,
            cosine_centred=0.88,
            norm_ratio=0.92,
            l0=rng.uniform(28, 36, n),
            dead=np.linspace(0.2, 0.05, n),
            dense=0.02,
            recovered_zero=np.linspace(0.97, 0.9, n),
            recovered_mean=np.linspace(0.94, 0.85, n),
            fvu_decision=np.linspace(0.15, 0.3, n),
            l0_decision=30.0,
        )
    )
    low = np.arange(-3, 0, 0.5)
    density = pd.concat(
        [pd.DataFrame(dict(layer=layer, low=low, high=low + 0.5, features=rng.integers(0, 200, 6))) for layer in LAYERS]
    )
    causes = [""] * (n - 1) + ([""] if scenario.usable else ["scale"])
    check = pd.DataFrame(
        dict(layer=LAYERS, tokens=1016, l0_declared=[np.nan] + [32.0] * (n - 1), l0=31.0, fvu=0.3, cosine_centred=0.8)
    ).assign(likely_cause=causes)
    warnings = [f"Dictionary of layer {LAYERS[-1]} is <off>. Likely cause: scale."] if not scenario.usable else []
    results = {"fvu": {"mean": 0.28, "worst": 0.34}, "check": {"dictionaries": n, "warnings": warnings}}
    return Outcome(results, {"layers": table, "density": density, "check": check})
