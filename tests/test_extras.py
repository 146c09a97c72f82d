"""Models, edits and sweeps work without what studies need, and what does need it says so."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys

MISSING = {"pandas", "plotly", "omegaconf", "pyarrow", "typer"}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
import jaxmech as jm

needing = set()
for name in jm.__all__:
    try:
        getattr(jm, name)
    except ModuleNotFoundError as error:
        assert f"jaxmech.{name} needs pandas" in str(error) and "pip install 'jaxmech[study]'" in str(error)
        needing.add(name)
assert needing == {"behavior", "check_sae", "evaluate_saes", "loss_recovered", "SAETrainConfig", "train_saes"}, needing
try:
    import jaxmech.cli
except SystemExit as ended:
    assert "pip install 'jaxmech[study]'" in str(ended)
else:
    raise AssertionError("the command started")
"""


@pytest.mark.slow
def test_without_the_extra_of_studies():
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_every_public_name_is_there():
    import jaxmech as jm

    assert all(getattr(jm, name) is not None for name in jm.__all__)
    assert not hasattr(jm, "no_such_name")
