"""Checks that a finished run holds every number a study promises, and prints them: check_run.py RUN_DIR."""

import json
import sys
from pathlib import Path

PROMISED = {
    "behavior": ("words", "mean_plus", "mean_minus", "shift_pp", "ci", "controls", "mass", "parts"),
    "selection": ("features_total", "features_live", "selected", "share", "expected_false"),
    "dual_process": ("s1", "s2", "mixed", "neither", "silent", "defined"),
    "patching": ("recovered_to_plus", "recovered_to_minus", "p_random"),
    "steering": ("at_one_pp", "at_one_ci", "usable_range", "p_random"),
    "proximity": ("total_pp", "direct_pp", "pi"),
    "claims": ("behavior", "features", "cause", "transfer", "dual_process", "proximity"),
    "stages": (),
}


def main(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    missing = [f"{s}.{k}" for s, keys in PROMISED.items() for k in keys if k not in results.get(s, {})]
    missing += [f"transfer.{name}" for name, task in results["transfer"].items() if not {"slope", "ci"} <= set(task)]
    missing += [name for name in ("report.html", "manifest.json") if not (folder / name).is_file()]
    if missing:
        sys.exit(f"{folder} lacks: {', '.join(missing)}")
    for section, keys in PROMISED.items():
        for key in keys:
            value = results[section][key]
            print(f"{section}.{key}: {value['answer'] if section == 'claims' else value}")
    for name, task in results["transfer"].items():
        print(f"transfer.{name}: {task['slope']:.2f} {task['ci']}")
    manifest = json.loads((folder / "manifest.json").read_text())
    wrong = [
        f"{organism}, {claim}: said {answer['said']}, is {answer['true']}"
        for organism, score in results["instrument"].items()
        for claim, answer in score["claims"].items()
        if answer["said"] != answer["true"]
    ]
    if wrong or set(results["instrument"]) != set(manifest["config"]["instrument"]):
        sys.exit(f"the instrument is wrong where the truth is known: {'; '.join(wrong) or 'not run'}")
    for name, record in manifest["stages"].items():
        peak = "unknown" if record["peak_gb"] is None else f"{record['peak_gb']:.1f} GB"
        print(f"{name}: {record['seconds']:.1f} s, peak {peak}")
    print(f"all stages: {sum(r['seconds'] for r in manifest['stages'].values()):.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
