"""The page's sections on behaviour, selection, classes and dictionaries; each reads its stage's tables and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from jaxmech.report import figures as fig
from jaxmech.report import formats as fm
from jaxmech.report.blocks import (
    Card,
    Cards,
    Figure,
    Prompt,
    Prompts,
    Section,
    Table,
    Text,
    cells,
    fixed,
    need,
    short_p,
    text,
)
from jaxmech.report.verdict import Claim, by_chance
from jaxmech.study.folder import RunFolder

CARDS = 12
ROWS = 60


def behaviour(folder: RunFolder, results: Mapping[str, Any]) -> Section:
    r = results["behavior"]
    shares = need(folder, "behavior", "distributions", ("condition", "share", "probability"))
    effects = need(folder, "behavior", "effects", ("contrast", "shift_pp", "low_pp", "high_pp", "p", "d_z", "mass"))
    asked = need(folder, "behavior", "prompts", ("family", "pair", "condition", "stance", "prefix", "query"))
    edges = r["edges"]
    blocks = [
        *stance_prompts(asked),
        Figure(
            "allocations",
            fig.distributions(shares),
            f"How much is given, by stance, over {fm.plural(r['families'], 'test family', 'test families')}. "
            "Nothing is given "
            f"with probability {fm.percent(edges['generous']['zero'])} when generous and "
            f"{fm.percent(edges['selfish']['zero'])} "
            f"when selfish, half with {fm.percent(edges['generous']['half'])} and "
            f"{fm.percent(edges['selfish']['half'])}.",
            "behavior/distributions",
        ),
        Figure(
            "shifts",
            fig.shifts(effects),
            "Each contrast's shift of the share given, with its 95 % interval over families. "
            + strongest_control(effects),
            "behavior/effects",
        ),
        Table(
            "The same in numbers. d_z is the mean over families divided by their spread; p is Wilcoxon's over "
            "family means, two-sided.",
            *cells(
                effects,
                {
                    "contrast": ("contrast", fm.name),
                    "families": ("families", text),
                    "shift_pp": ("shift, pp", fixed(1)),
                    "low_pp": ("low", fixed(1)),
                    "high_pp": ("high", fixed(1)),
                    "p": ("p", short_p),
                    "d_z": ("d_z", fixed(2)),
                    "mass": ("valid mass", fm.percent),
                },
            ),
        ),
    ]
    if rows := sampled(r.get("sampling", {})):
        columns = ("stance", "valid answers", "sampled mean", "exact mean")
        blocks.append(
            Table(
                "Cross-check: answers sampled at temperature 1 and parsed, never imputed, against the exact mean.",
                columns,
                rows,
            )
        )
    gate = "The gate is passed: " if r["gate"] else "The gate is not passed: "
    reasons = "; ".join(
        f"{reason.replace('>=', '≥').replace('<=', '≤').replace(' x ', ' × ')}: {'met' if met else 'NOT met'}"
        for reason, met in r["gate_reasons"].items()
    )  # noqa: E501
    return Section("behaviour", "Behaviour", f"{gate}{reasons}.", blocks)


def stance_prompts(asked: pd.DataFrame) -> list[Any]:
    """Both prompts of a pair, whole, and what is asked in every other condition of the same scenario."""
    generous, selfish = (first_prompt(asked, name) for name in ("generous", "selfish"))
    if generous is None or selfish is None:
        return []
    examples = generous["prefix"].count("\nA:")
    caption = (
        f"A pair of prompts, whole. Both begin with the same {examples} worked examples, which name stances in other "
        "words and answer by them, so that what is measured is what the model makes of these examples; the questions "
        "(bold) differ in the stance alone. Features are chosen on such pairs of other families; patching, attribution "
        "and nearness to the output use these pairs."
    )
    pair = [
        Prompt(f"{fm.name(row['condition'])}, in the word “{row['stance']}”", row["prefix"], row["query"])
        for row in (generous, selfish)
    ]
    rest = [name for name in asked["condition"].unique() if name not in ("generous", "selfish")]
    rows = [[fm.name(name), " ".join(first_prompt(asked, name)["query"].split())] for name in sorted(rest)]
    others = "What the other prompts ask, after worked examples too."
    return [Prompts(caption, pair, folded=False), Table(others, ("condition", "question"), rows, folded=True)]


def first_prompt(asked: pd.DataFrame, condition: str) -> dict[str, Any] | None:
    part = asked[asked["condition"] == condition].sort_values(["family", "pair"], kind="stable")
    return part.iloc[0].to_dict() if len(part) else None


def strongest_control(effects: pd.DataFrame) -> str:
    controls = effects[~effects["contrast"].isin(["stance", "heldout"])]
    if controls.empty:
        return "No control was played."
    top = controls.loc[controls["shift_pp"].abs().idxmax()]
    return f"The largest control shift is that of “{fm.name(top['contrast']).lower()}”, {fm.points(top['shift_pp'])}."


def sampled(sampling: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            condition,
            fm.percent(one["valid"]),
            f"{fm.percent(one['mean'], 1)} ± {fm.percent(one['standard_error'], 1)}",
            fm.percent(one["exact_mean"], 1),
        ]
        for condition, one in sampling.items()
        if isinstance(one, Mapping)
    ]


def selection(folder: RunFolder, results: Mapping[str, Any], config: Mapping[str, Any], claim: Claim) -> Section:
    r = results["contrast"]
    features = need(folder, "contrast", "features", ("layer", "feature", "live", "d_z", "p", "stability", "auroc"))
    used = need(
        folder,
        "contrast",
        "selected",
        ("layer", "feature", "dz", "d_z", "q", "auroc", "stability", "density", "placebo_d_z"),
    )
    criteria = need(folder, "contrast", "criteria", ("criterion", "alone", "remaining"))
    budgets = need(folder, "contrast", "budgets", ("share", "features", "smallest_t"))
    classes = need(folder, "dual_process", "classes", ("layer", "feature", "class"))
    layers = sorted(int(layer) for layer in features["layer"].unique())
    generous = int((used["dz"] > 0).sum())
    drawn = min(r["features_live"], fig.BACKGROUND_POINTS + len(used))
    thinned = f" {drawn:,} of {r['features_live']:,} live features are drawn." if drawn < r["features_live"] else ""
    stable = used["stability"].median()
    blocks = [
        Figure(
            "volcano",
            fig.volcano(features, used),
            f"All live features: how strongly and how surely they differ between the stances. The {len(used)} in use "
            f"have |d_z| from {fm.number(used['d_z'].abs().min(), 1)} to "
            f"{fm.number(used['d_z'].abs().max(), 1)}.{thinned}",
            "contrast/features",
        ),
        Figure(
            "layers",
            fig.layer_histogram(used, layers),
            f"Where the features in use lie. {generous} are more active when generous, {len(used) - generous} "
            "when selfish.",
            "contrast/selected",
        ),
        Figure(
            "funnel",
            fig.funnel(criteria),
            f"The rule, criterion by criterion: {r['features_total']:,} features, {r['features_live']:,} live, "
            f"{r['selected']:,} pass all. Relabelled at random, the rule passes {by_chance(r, config)}.",
            "contrast/criteria",
        ),
        Figure(
            "stability",
            fig.stability(features, used, needed=config["rule_half_splits"]),
            "Of the features that reach the last criterion: how well one alone separates the stances, and how "
            "often half "
            f"the families select it again (line: {fm.percent(config['rule_half_splits'])} needed)."
            + (f" The median of those in use is {fm.percent(stable)}." if fm.known(stable) else ""),
            "contrast/features",
        ),
        feature_table(used, classes),
        feature_cards(folder, used, classes),
        Table(
            "What other budgets would take: the labelled budget mode, for comparison.",
            *cells(
                budgets,
                {
                    "share": ("share of all features", lambda v: fm.percent(v, 4)),
                    "features": ("features", text),
                    "smallest_t": ("smallest |t|", fixed(1)),
                },
            ),
            folded=True,
        ),
    ]
    return Section("features", "Features", claim.sentence, blocks)


def feature_table(used: pd.DataFrame, classes: pd.DataFrame) -> Table:
    frame = used.merge(classes[["layer", "feature", "class"]], on=["layer", "feature"], how="left").head(ROWS)
    cut = f" The first {ROWS} of {len(used)}; the others are in contrast/selected.parquet." if len(used) > ROWS else ""
    columns = {
        "layer": ("layer", text),
        "feature": ("feature", text),
        "class": ("class", lambda v: fm.name(v) if v else fm.UNDEFINED),
        "d_z": ("d_z", fixed(2)),
        "q": ("q", short_p),
        "auroc": ("AUROC", fixed(2)),
        "stability": ("half-splits", fm.percent),
        "fires_generous": ("fires, generous", fm.percent),
        "fires_selfish": ("fires, selfish", fm.percent),
        "density": ("on neutral text", lambda v: fm.percent(v, 1)),
        "placebo_d_z": ("placebo d_z", fixed(2)),
        "correlation_generous": ("r with giving, generous", fixed(2)),
        "correlation_selfish": ("r with giving, selfish", fixed(2)),
    }
    columns = {key: value for key, value in columns.items() if key in frame}
    return Table(f"Features in use, strongest first.{cut}", *cells(frame, columns), folded=len(frame) > 12)


TEXT_COLUMNS = {
    "promoted": "promotes",
    "promoted_tokens": "promotes",
    "promotes": "promotes",
    "suppressed": "suppresses",
    "suppressed_tokens": "suppresses",
    "suppresses": "suppresses",
    "top_tokens": "fires on",
    "tokens": "fires on",
    "fires_on": "fires on",
    "top_contexts": "contexts",
    "contexts": "contexts",
}
"""Optional columns of the table `cards`, in whichever of these names it was written."""


def feature_cards(folder: RunFolder, used: pd.DataFrame, classes: pd.DataFrame) -> Cards:
    """The strongest features as cards; tokens and contexts only where the run has a table `cards`."""
    stage = next((s for s in ("contrast", "fidelity", "dual_process") if folder.has_table(s, "cards")), None)
    words = folder.table(stage, "cards") if stage else pd.DataFrame(columns=["layer", "feature"])
    frame = used.head(CARDS).merge(classes, on=["layer", "feature"], how="left", suffixes=("", "_class"))
    frame = frame.merge(
        words[[c for c in words if c in ("layer", "feature") or c in TEXT_COLUMNS]], on=["layer", "feature"], how="left"
    )
    cards = []
    for row in frame.to_dict("records"):
        kind = row.get("class")
        facts = [
            ("more active", "when generous" if row["dz"] > 0 else "when selfish"),
            ("d_z", fm.number(row["d_z"], 2)),
            ("AUROC", fm.number(row["auroc"], 2)),
            ("on neutral text", fm.percent(row["density"], 1)),
            ("class", fm.name(kind) if isinstance(kind, str) else fm.UNDEFINED),
        ]
        if row.get("lexical") is True:
            facts.append(("note", "lexical: fires on its trigger words anywhere"))
        texts = [
            (name, as_list(row[column]))
            for column, name in TEXT_COLUMNS.items()
            if column in row and len(as_list(row[column]))
        ]
        cards.append(Card(f"Layer {row['layer']}, feature {row['feature']}", facts, texts))
    caption = f"The {len(cards)} strongest features in use." if len(used) > len(cards) else "The features in use."
    return Cards(caption, cards)


def as_list(value: Any) -> Sequence[str]:
    """Tokens or contexts as strings, visible spaces included; a missing value is none."""
    if value is None or isinstance(value, float):
        return []
    items = [value] if isinstance(value, str) else list(value)
    return [str(item).replace("\n", "⏎") for item in items]


def classes(folder: RunFolder, results: Mapping[str, Any], config: Mapping[str, Any], claim: Claim) -> Section:
    r = results["dual_process"]
    table = need(
        folder,
        "dual_process",
        "classes",
        (
            "layer",
            "feature",
            "class",
            "demand",
            "demand_low",
            "demand_high",
            "instruction",
            "instruction_low",
            "instruction_high",
        ),
    )
    cuts = need(folder, "dual_process", "sensitivity", ("cut", "s1", "s2", "mixed", "neither", "silent"))
    counts = {kind: r[kind] for kind in ("s2", "s1", "mixed", "neither", "silent")}
    void = (
        ""
        if r["defined"]
        else " The index is undefined here, so that these counts carry no meaning; they are shown for the record."
    )
    facts = flat(r.get("behavior") or {})
    low, high = cuts.iloc[0], cuts.iloc[-1]
    lexical = int(table["lexical"].fillna(False).sum()) if "lexical" in table else 0
    blocks = [
        Figure(
            "classes",
            fig.class_counts(counts),
            f"Features in use by class, at the cut {config['index_cut']}.{void}"
            + (f" Lexical, firing on their trigger words in any text: {lexical}." if lexical else ""),
            "dual_process/classes",
        ),
        Figure(
            "sensitivity",
            fig.sensitivity(cuts, config["index_cut"]),
            f"How the counts depend on the cut: from {low['cut']:g} to {high['cut']:g}, System 2 goes from "
            f"{low['s2']:g} to "
            f"{high['s2']:g} and System 1 from {low['s1']:g} to {high['s1']:g} (line: the cut in use).",
            "dual_process/sensitivity",
        ),
        Figure(
            "arms",
            fig.arms(table),
            "The two arms of the index, with 95 % intervals. A feature is System 2 if both lie above 0, System 1 "
            "if both lie "
            "below; opposite sides make it mixed.",
            "dual_process/classes",
            wide=not facts,
        ),
    ]
    blocks += item_prompts(folder)
    if facts:
        blocks.append(
            Table(
                "The model itself on the reasoning items: without a lure effect or a cost of conflict, the index "
                "is undefined.",
                ("measure", "value"),
                facts,
                narrow=True,
            )
        )
    return Section("classes", "System 1 and System 2", claim.sentence, blocks)


def item_prompts(folder: RunFolder) -> list[Any]:
    """A reasoning item in all its conditions, whole."""
    items = folder.table("dual_process", "items") if folder.has_table("dual_process", "items") else pd.DataFrame()
    if not {"prefix", "query", "item", "condition"} <= set(items):
        return []
    part = items[items["item"] == items["item"].iloc[0]]
    prompts = [Prompt(fm.name(row.condition), row.prefix, row.query) for row in part.itertuples()]
    return [Prompts("A reasoning item, whole: in each of two arms a pair of prompts, after worked examples.", prompts)]


def flat(values: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested results as rows of name and value."""
    rows = []
    for key, value in values.items():
        label = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{label}, ")
        elif isinstance(value, list):
            rows.append([label, ", ".join(fm.significant(v) if isinstance(v, int | float) else text(v) for v in value)])
        elif isinstance(value, bool) or not isinstance(value, int | float):
            rows.append([label, {True: "yes", False: "no"}.get(value, text(value))])
        else:
            rows.append([label, fm.significant(value)])
    return rows


SHARES = {
    "dead": "dead features",
    "recovered_zero": "loss recovered, against zeros",
    "recovered_mean": "loss recovered, against the mean",
}
"""Shares by layer, under the names that results.json has."""


def fidelity(folder: RunFolder, fit: Claim) -> Section:
    layers = need(folder, "fidelity", "layers", ("layer", "fvu", "l0", "dense"))
    worst = layers.loc[layers["fvu"].idxmax()]
    lead = (
        f"The dictionaries leave {fm.percent(layers['fvu'].mean())} of the variance unexplained on average, at worst "
        f"{fm.percent(worst['fvu'])} in layer {worst['layer']:g}, with {fm.number(layers['l0'].mean(), 0)} "
        f"features active a token. {'' if fit.holds else 'Not all of them fit this model as they are declared.'}"
    )
    histogram = need(folder, "fidelity", "density", ("layer", "low", "high", "features"))
    names = {"fvu": "held-out text"} | ({"fvu_decision": "decision tokens"} if "fvu_decision" in layers else {})
    blocks = [
        Figure(
            "fvu",
            fig.by_layer(layers, names, y="variance unexplained, %", scale=100),
            "Fraction of variance unexplained (FVU) by layer. Interventions keep the error term, so that it is "
            "never lost, but what "
            "is in the error cannot be selected.",
            "fidelity/layers",
        ),
        Figure(
            "l0",
            fig.by_layer(
                layers,
                {"l0": "held-out text"} | ({"l0_decision": "decision tokens"} if "l0_decision" in layers else {}),
                y="features active a token",
            ),
            f"Sparsity (L0) by layer: from {fm.number(layers['l0'].min(), 0)} to "
            f"{fm.number(layers['l0'].max(), 0)} on held-out text.",
            "fidelity/layers",
        ),
    ]
    blocks.append(
        Figure(
            "density",
            fig.density(histogram),
            "How often features fire on held-out text, later layers darker: "
            f"{fm.percent(layers['dense'].mean(), 1)} fire on more than a tenth of the tokens. Dead ones are left out.",
            "fidelity/density",
        )
    )
    shares = {column: label for column, label in SHARES.items() if column in layers}
    if shares:
        says = [f"{fm.percent(layers[column].mean())} {label}" for column, label in shares.items()]
        blocks.append(
            Figure(
                "shares",
                fig.by_layer(layers, shares, y="share, %", scale=100),
                "Dead features, and the share of the model's loss recovered when a layer is replaced by its "
                "reconstruction, where zeros, or the layer's mean, in its place would lose all: on average "
                f"{fm.listing(says)}.",
                "fidelity/layers",
            )
        )
    if folder.has_table("dictionaries", "training"):
        history = folder.table("dictionaries", "training")
        if {"step", "fvu"} <= set(history):
            last = history[history["step"] == history["step"].max()]["fvu"].mean()
            blocks.append(
                Figure(
                    "training",
                    fig.training(history),
                    f"Training: the mean FVU ends at {fm.percent(last)} of the training tokens' variance.",
                    "dictionaries/training",
                )
            )
    columns = {column: (column.replace("_", " "), text if column == "layer" else fm.significant) for column in layers}
    blocks.append(Table("All measures by layer.", *cells(layers, columns), folded=True))
    blocks += checked(folder, folder.results("fidelity")["check"]["warnings"])
    return Section("fidelity", "Dictionaries", lead, blocks)


def checked(folder: RunFolder, warnings: Sequence[str]) -> list[Any]:
    """The check of the dictionaries against the model: its warnings, and its numbers."""
    table = need(folder, "fidelity", "check", ("layer", "l0_declared", "l0", "fvu", "likely_cause"))
    columns = {
        "layer": ("layer", text),
        "l0_declared": ("L0 declared", fm.significant),
        "l0": ("L0", fm.significant),
        "fvu": ("FVU", fm.significant),
        "cosine_centred": ("cosine, centred", fixed(2)),
        "likely_cause": ("likely cause", lambda value: value or "fits"),
    }
    caption = f"Checked on {table['tokens'].iloc[0]:,} tokens of general text: do the dictionaries fit as declared?"
    numbers = Table(caption, *cells(table, columns), folded=not warnings)
    return [Text(warnings), numbers] if warnings else [numbers]


def methods(
    folder: RunFolder, results: Mapping[str, Any], manifest: Mapping[str, Any], statement: Sequence[str]
) -> Section:
    """Every parameter, version, hash, second and exclusion."""
    environment = manifest["environment"]
    stages = [
        [name, fm.number(record["seconds"], 1), fm.number(record.get("peak_gb"), 2), str(record["key"])]
        for name, record in manifest["stages"].items()
    ]
    packages = [[name, str(version)] for name, version in environment["packages"].items()]
    packages = [
        ["python", environment["python"]],
        ["platform", environment["platform"]],
        ["devices", ", ".join(environment["devices"])],
        *packages,
    ]
    settings = [
        [key, ", ".join(map(str, value)) if isinstance(value, list) else "not set" if value is None else str(value)]
        for key, value in manifest["config"].items()
    ]
    blocks: list[Any] = [
        Text(statement),
        Table("Every parameter of the study.", ("parameter", "value"), settings, folded=True),
    ]
    blocks.append(
        Table(
            "Stages: seconds, the process's peak memory so far in GB, and the hash of all that each depends on.",
            ("stage", "seconds", "peak GB", "hash"),
            stages,
        )
    )
    blocks.append(Table("Versions and devices.", ("what", "version"), packages, folded=True))
    blocks.append(exclusions(folder, results["behavior"]["excluded_pairs"]))
    total = sum(record["seconds"] for record in manifest["stages"].values())
    lead = (
        f"Study {manifest['study']}: {fm.number(total, 0)} seconds of computation, seed {manifest['config']['seed']}."
    )
    return Section("methods", "Methods", lead, blocks)


def exclusions(folder: RunFolder, count: int) -> Table:
    """Pairs left out, by reason."""
    caption = f"Prompt pairs left out by the checks after tokenisation: {count}."
    if count and folder.has_table("behavior", "exclusions"):
        table = folder.table("behavior", "exclusions")
        if "reason" in table:
            by = table["reason"].value_counts()
            return Table(caption, ("reason", "pairs"), [[str(reason), str(n)] for reason, n in by.items()])
    return Table(caption, ("reason", "pairs"), [["any", str(count)]])
