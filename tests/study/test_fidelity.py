"""Stage fidelity: what it leaves in the run folder, and that dictionaries that do not fit are said and stop nothing."""

import logging

import numpy as np
import pytest

from jaxmech.io.settings import build
from jaxmech.sae.formats import load_saes, save_saes
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import RunFolder
from jaxmech.study.run import run_study

pytestmark = pytest.mark.slow


def test_fidelity_is_measured_and_a_misfit_only_warned_of(small_study, tmp_path, caplog):
    folder = RunFolder(run_study(small_study, until="fidelity"))
    results, layers = folder.results("fidelity"), folder.table("fidelity", "layers")
    assert layers["layer"].tolist() == [0, 2] and {"fvu", "kl_spliced", "recovered_kl", "fvu_decision"} <= set(layers)
    histogram, density = folder.table("fidelity", "density"), folder.arrays("fidelity")["density"]
    assert histogram["features"].sum() == (density > 0).sum()
    assert results["check"]["dictionaries"] == 2 and len(folder.table("fidelity", "check")) == 2

    saes = load_saes(folder.path / "stages/dictionaries/saes")
    away = saes.replace(params={**saes.params, "b_dec": saes.params["b_dec"] + 1e3})
    save_saes(away, tmp_path / "away")
    caplog.clear()
    given = {"dictionaries": {"path": str(tmp_path / "away")}, "run_dir": str(tmp_path / "other")}
    other = build(StudyConfig, given, small_study)
    folder = RunFolder(run_study(other, until="fidelity"))
    warnings = folder.results("fidelity")["check"]["warnings"]
    assert len(warnings) == 2 and all("Likely cause" in warning for warning in warnings)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "jaxmech"] == warnings
    assert np.isfinite(folder.table("fidelity", "layers")["fvu"]).all()
