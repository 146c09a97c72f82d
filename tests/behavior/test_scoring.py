"""Prompt tables with shared prefixes give what scoring every whole prompt alone gives."""

import numpy as np
import pandas as pd
import pytest

from jaxmech.answers.score import choice_distribution
from jaxmech.behavior import scoring


@pytest.fixture(scope="module")
def table():
    rows = []
    for prefix, stake, reverse in [("q: a kind one? $5\n", 10, False), ("q: a mean person has ten. $3\n", 4, True)]:
        amounts = [stake * i // 2 for i in range(3)]
        score = [1 - a / stake if reverse else a / stake for a in amounts]
        for query in ("q: generous? $", "q: the selfish one? $"):
            rows.append(dict(prefix=prefix, query=query, answers=[str(a) for a in amounts], score=score))
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_shared_prefixes_equal_whole_prompts(lm, table):
    encoded = scoring.encode_table(lm, table, batch=2)
    scored = scoring.allocate(lm, table, encoded, batch=3)
    for row in scored.itertuples():
        whole = choice_distribution(lm, [row.prefix + row.query], row.answers)
        np.testing.assert_allclose(row.logprobs, whole.logprobs[0], atol=1e-4)
        probs = np.asarray(whole.probs[0])
        assert row.g == pytest.approx(float((probs * row.score).sum()), abs=1e-5)
        assert row.p_all == pytest.approx(float(probs[row.score.index(1.0)]), abs=1e-5)


def test_prompts_may_differ_in_their_number_of_answers(lm, table):
    mixed = table.assign(
        answers=[["0", "10"], ["0", "5", "10"], ["0", "4"], ["0", "2", "4"]],
        score=[[0.0, 1.0], [0.0, 0.5, 1.0], [1.0, 0.0], [1.0, 0.5, 0.0]],
    )
    scored = scoring.allocate(lm, mixed, scoring.encode_table(lm, mixed))
    assert np.isneginf(scored["logprobs"].iloc[0][-1]) and np.isfinite(scored["g"]).all()


def test_nan_is_named(table):
    with pytest.raises(ValueError, match="prompt 2"):
        scoring.with_outcomes(table, np.where(np.arange(4)[:, None] == 2, np.nan, np.zeros((4, 3))), np.zeros((4, 3)))
