"""Plants mistakes into a copy of the package, one at a time: each must turn a test red that is named for it.

    python scripts/checks/check_mutations.py                     # some minutes on two cores
    python scripts/checks/check_mutations.py --only stance BH    # those whose names hold one of the words

Each is a mistake after which a study would still run and report. The test named for it states what is true by itself:
a formula, a plain loop, a planted organism. A test that crashes has not caught anything. Exit code 1 if a mutation is
missed, if its text is no longer in the source, or if a named test fails without any.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table

from jaxmech.io.progress import progress

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    """In the file `where` of the package `old`, which occurs once, becomes `new`; tests: node ids below tests/."""

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]

    def mutated(self) -> str:
        text = (ROOT / "jaxmech" / self.where).read_text()
        if (count := text.count(self.old)) != 1:
            sys.exit(f"{self.name}: its text is in jaxmech/{self.where} {count} times, expected once: {self.old!r}")
        return text.replace(self.old, self.new)


COUNTED_TWICE = """\
    from jaxmech.sae.collect import run_decision
    base = run_decision(config, params, prompts).resid
    shift = lambda code: donor_values(code, donor) - donor_values(code, base)
    edit = lambda chosen, code: edits.features(saes, chosen, gain=1.0, shift=shift(code), spans=spans)
    build = lambda chosen: {saes.config.site_out: (edit(chosen, edits.gather(saes, chosen)[0]),)}
    return sweep(config, params, prompts, build, selections, **options)
"""
# name, file below jaxmech/, old text, new text, test file below tests/ :: test
ROWS = [
    ("terminator dropped", "answers/score", "path[..., None] + leave - total", "path[..., None] + 0 * leave",
     "answers/test_score::of_answers_that_begin_alike_the_longer_takes_its_part"),
    ("stance labels swapped, prompts", "behavior/altruism/dictator", "zip(conditions, asked, strict=True)",
     "zip(conditions[::-1], asked, strict=True)",
     "behavior/altruism/test_dictator::words_and_stakes_are_crossed_with_families"),
    ("stance labels swapped, shift", "study/stages/behavior", "wide[plus] - wide[minus]", "wide[minus] - wide[plus]",
     "study/test_behavior_stage::shifts_excesses_and_sizes"),
    ("stance labels swapped, features", "study/stages/contrast", "keyed[high].to_numpy(), keyed[low].to_numpy()",
     "keyed[low].to_numpy(), keyed[high].to_numpy()",
     "study/test_planted::features_are_compared_within_pairs_and_averaged_within_families"),
    ("error term dropped, patches", "interventions/edits", "self.gain[:, None] * z + self.shift[:, None] - z)",
     "self.gain[:, None] * z + self.shift[:, None]) - x",
     "interventions/test_edits::feature_edits_keep_the_error_term"),
    ("error term dropped, doses", "interventions/edits", "self.target - self.encoder.encode(x))", "self.target) - x",
     "interventions/test_interventions::a_dose_sets_features_once_however_many_layers_see_them"),
    ("layer below read", "interventions/patching", "e.encode(x[:, None])[:, 0])(encoder, donor)",
     "e.encode(x[:, None])[:, 0])(encoder, jnp.roll(donor, 1, axis=0))",
     "interventions/test_interventions::sets_are_set_to_the_donor_after_upstream_patches"),
    ("upstream counted twice, patches", "interventions/patching",
     "    return sweep(config, params, prompts, PatchFeatures(saes, donor, spans), selections, **options)\n",
     COUNTED_TWICE, "interventions/test_interventions::sets_are_set_to_the_donor_after_upstream_patches"),
    ("upstream counted twice, norms", "interventions/controls", "edits={site: (upstream,)}", "edits={}",
     "interventions/test_interventions::what_an_edit_adds_is_what_it_adds_after_those_below"),
    ("steering summed over layers", "interventions/steering",
     "(set_features(self.saes, self.selection, target=target, spans=self.spans),)",
     "(add_vector(alpha * feature_direction(self.saes, self.selection, self.gap), self.spans),)",
     "interventions/test_interventions::a_dose_sets_features_once_however_many_layers_see_them"),
    ("donors rolled by one family", "study/stages/patching",
     "donor=patch.donor.resid,\n    )  # fmt: skip\n    return effects.sweep_sets",
     "donor=jnp.roll(patch.donor.resid, 1, axis=1),\n    )\n    return effects.sweep_sets",
     "study/test_planted::a_prompt_takes_the_values_of_its_own_familys_donor"),
    ("prompts as units, shift", "study/stages/behavior", 'pairs.groupby("family").mean()', "pairs",
     "study/test_behavior_stage::shifts_excesses_and_sizes"),
    ("prompts as units, features", "study/stages/contrast", 'family[:, None] == np.unique(table["family"])',
     "np.eye(len(plus), dtype=bool)",
     "study/test_planted::features_are_compared_within_pairs_and_averaged_within_families"),
    ("prompts as units, effects", "study/effects", "family_means(values, of.families)", "np.asarray(values)",
     "study/test_planted::a_family_with_two_prompts_is_one"),
    ("share reversed in keep and take, answers", "behavior/altruism/dictator",
     'self.stake(pair), self.frame != "give"', "self.stake(pair), False",
     "behavior/altruism/test_dictator::scores_are_what_the_other_side_gets"),
    ("share reversed in keep and take, examples", "behavior/altruism/dictator",
     "a if self.frame == 'give' else stake - a", "a",
     "behavior/altruism/test_dictator::prefix_is_shared_balanced_and_in_other_words"),
    ("share reversed in keep and take, samples", "behavior/altruism/altruism",
     'share if row["frame"] in ("give", "own_accounts") else 1 - share', "share",
     "behavior/altruism/test_dictator::a_sampled_answer_is_worth_what_the_other_side_gets"),
    ("density criterion removed", "contrast/selection", "s.density <= rule.density,", "s.density <= 1,",
     "contrast/test_selection::correlated_but_dense_or_rare_features_fail"),
    ("sign criterion removed", "contrast/selection", "tests.sign >= needed", "tests.sign >= 0",
     "contrast/test_selection::a_feature_that_often_goes_the_other_way_fails"),
    ("placebo criterion removed, its size", "contrast/selection", "    if oriented:\n", "    if True:\n",
     "contrast/test_selection::a_control_that_moves_a_feature_rejects_it"),
    ("placebo criterion removed, its use", "study/stages/contrast", "oriented=ctx.behavior.controls[name].oriented",
     "oriented=True", "study/test_planted::features_are_compared_with_what_every_control_moves"),
    ("valence criterion removed, its size", "contrast/selection", "rule.control_ratio * strongest_control(s)[1]",
     'rule.control_ratio * s.controls.get("placebo", 0 * mean)',
     "study/test_planted::valence_is_what_the_stance_words_have_too"),
    ("valence criterion removed, its use", "study/stages/contrast", "or not behavior.controls[name].moves]",
     "or not behavior.controls[name].oriented]",
     "study/test_planted::features_are_compared_with_what_every_control_moves"),
    ("BH over one layer only", "contrast/selection", "= benjamini_hochberg(paired_t(difference)[1][live])",
     "= np.concatenate([*map(benjamini_hochberg, np.array_split(paired_t(difference)[1][live], 2))])",
     "contrast/test_selection::q_is_adjusted_over_the_live_features_of_all_layers"),
    ("permutation p without the identity, flips", "contrast/flips", "np.maximum(np.concatenate(counts), 1) / flips",
     "(np.concatenate(counts) - 1) / flips", "contrast/test_selection::permutation_p_over_many_blocks"),
    ("permutation p without the identity, largest t", "contrast/flips", "np.maximum(larger, 1)", "larger - 1",
     "contrast/test_selection::the_largest_t_is_that_of_a_plain_loop"),
    ("permutation p without the identity, random sets", "contrast/statistics",
     "(1 + np.sum(~(null < observed))) / (1 + len(null))", "np.mean(~(null < observed))",
     "contrast/test_statistics::p_from_null_counts_ties_and_nan"),
    ("permutation p without the identity, relabelings", "study/stages/contrast",
     "(1 + (false >= selected).sum()) / (1 + R)", "(false >= selected).mean()",
     "study/test_planted::the_data_themselves_are_one_relabeling_of_their_null"),
    ("matched sets without rescaling, patches", "interventions/controls",
     "with_norm(self.direction(selection), self.norm)", "self.direction(selection)",
     "interventions/test_interventions::matched_sets_and_directions_have_the_norm_asked_for"),
    ("matched sets without rescaling, steering", "study/doses",
     "(np.asarray(controls.with_norm(directions, norm)) for norm in norms)", "(directions for norm in norms)",
     "study/test_planted::directions_are_added_with_the_norm_that_either_sign_has"),
]  # fmt: skip


def conditions() -> list[str]:
    """The names of the conditions of all claims, as they are written where claims are judged."""
    text = (ROOT / "jaxmech/study/claims.py").read_text()
    return sorted(set(re.findall(r'(?:Condition|off_zero|at_least)\("([^"]+)"', text)))


BLIND = "verdict blind to "
JUDGED = ("each_condition_alone_changes_its_claim", "what_could_not_have_been_found_is_not_denied")
ROWS += [
    (f"{BLIND}{name}", "study/claims", "tuple(table(results, config))",
     f"tuple(c for c in table(results, config) if c.name != {name!r})",
     *(f"study/test_claims::{test}" for test in JUDGED))
    for name in conditions()
]  # fmt: skip
MUTATIONS = [
    Mutation(name, f"{where}.py", old, new, tuple(test.replace("::", ".py::test_") for test in tests))
    for name, where, old, new, *tests in ROWS
]


class Outcome(NamedTuple):
    """answer: "caught", "MISSED", or what else went wrong; seconds that the tests took."""

    answer: str
    seconds: float


def plant(mutation: Mutation | None, tests: tuple[str, ...]) -> Outcome:
    """Runs the tests on a copy of the package that holds the mutation, or none. Programs are compiled once for all."""
    programs = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "programs")}
    programs["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        copy, begun = Path(folder), time.monotonic()
        for name in ("jaxmech", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("goldens", "*.pyc.*"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutation is not None:
            (copy / "jaxmech" / mutation.where).write_text(mutation.mutated())
        options = "-x -q -n0 -rfE --tb=line --color=no -p no:cacheprovider --basetemp=kept".split()
        command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
        env = os.environ | programs | {"PYTHONPATH": folder, "COLUMNS": "300"}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        seconds = time.monotonic() - begun
    if done.returncode == 0:
        return Outcome("MISSED", seconds)
    if done.returncode == 1 and re.search(r"^FAILED .* - (assert|AssertionError|Failed: DID NOT)", done.stdout, re.M):
        return Outcome("caught", seconds)
    return Outcome(f"CRASHED\n{done.stdout}{done.stderr}".strip(), seconds)


def show(outcomes: dict[Mutation, Outcome]) -> None:
    """One table, in which the verdict's conditions share a row."""
    table = Table("mutation", "where", "named check", "", Column("seconds", justify="right"))
    rows: dict[str, list[tuple[Mutation, Outcome]]] = {}
    for mutation, outcome in outcomes.items():
        name = f"{BLIND}one condition" if mutation.name.startswith(BLIND) else mutation.name
        rows.setdefault(name, []).append((mutation, outcome))
    for name, tried in rows.items():
        answers = [f"[red]{o.answer.splitlines()[0]}: {m.name}" for m, o in tried if o.answer != "caught"]
        if len(tried) > 1 or not answers:
            answers.insert(0, f"caught {len(tried) - len(answers)} of {len(tried)}" if len(tried) > 1 else "caught")
        checks = "\n".join(test.replace("::", "\n  ") for test in tried[0][0].tests)
        seconds = sum(outcome.seconds for _, outcome in tried)
        table.add_row(name, tried[0][0].where, checks, "\n".join(answers), f"{seconds:.0f}")
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="words of which a name holds one")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if any(part in m.name for part in options.only)]
    if not chosen:
        parser.error(f"--only: no name holds {' or '.join(options.only)}: {', '.join(m.name for m in MUTATIONS)}")
    for mutation in chosen:
        mutation.mutated()  # exits where its text is gone
    tests = tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    outcomes: dict[Mutation, Outcome] = {}
    with progress("mutations", 1 + len(chosen), unit="runs") as advance, ThreadPoolExecutor(options.jobs) as pool:
        without = plant(None, tests)
        advance()
        if without.answer != "MISSED":
            sys.exit(f"without any mutation, a named test fails\n{without.answer}")
        for mutation, outcome in zip(chosen, pool.map(lambda m: plant(m, m.tests), chosen), strict=True):
            outcomes[mutation] = outcome
            advance(note=mutation.name)
    show(outcomes)
    failed = {m: outcome.answer for m, outcome in outcomes.items() if outcome.answer != "caught"}
    if failed:
        sys.exit("\n".join(f"{mutation.name}: {answer}" for mutation, answer in failed.items()))
    print(f"{len(chosen)} mutations caught; without any, the {len(tests)} named tests pass in {without.seconds:.0f} s")


if __name__ == "__main__":
    main()
