"""The mutations that scripts/checks/check_mutations.py plants fit the source, and the tests named for them exist."""

import ast
import importlib.util
from pathlib import Path

import pytest

from tests.study.test_claims import CHANGES, UNDECIDED

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_mutations", ROOT / "scripts/checks/check_mutations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutation_still_fits_the_source(script):
    names = [mutation.name for mutation in script.MUTATIONS]
    assert len(set(names)) == len(names)
    for mutation in script.MUTATIONS:
        text = (ROOT / "jaxmech" / mutation.where).read_text()
        assert text.count(mutation.old) == 1, mutation.name
        assert ast.dump(ast.parse(mutation.mutated())) != ast.dump(ast.parse(text)), mutation.name


def test_the_tests_named_for_them_exist(script):
    for mutation in script.MUTATIONS:
        assert mutation.tests, mutation.name
        for test in mutation.tests:
            file, _, name = test.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_every_condition_of_every_claim_is_taken_away_once(script):
    assert script.conditions() == sorted({name for _, name, _ in (*CHANGES, *UNDECIDED)})
