"""Progress bars: there in a terminal and in a notebook, nowhere else, one at a time, and gone when switched off."""

import contextlib
import io
import re
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rich import live
from rich.console import Console

import jaxmech as jm
from jaxmech.activations.text import sample_text
from jaxmech.interventions.attribution import residual_gradient
from jaxmech.io import progress as bars
from jaxmech.models import convert
from jaxmech.sae.training import SAETrainConfig

pytestmark = pytest.mark.slow

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def at_once(monkeypatch):
    """No wait before a bar, so that quick work shows one."""
    monkeypatch.setattr(bars, "_SECONDS_BEFORE_A_BAR", 0.0)
    monkeypatch.setattr(bars, "_SECONDS_BETWEEN_UPDATES", 0.0)


@pytest.fixture
def terminal(monkeypatch, at_once):
    """What is drawn on a terminal, as text."""
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    monkeypatch.setattr(bars, "console", lambda: Console(file=out, force_terminal=True, width=120))
    return lambda: ANSI.sub("", out.getvalue())


@pytest.fixture
def notebook(monkeypatch, at_once):
    """What a notebook's front end shows: a list of display areas, each with the texts that it was given in turn."""
    areas = []

    def display(bundle, *, raw, display_id):
        assert raw and display_id
        areas.append([bundle])
        return types.SimpleNamespace(update=lambda bundle, raw: areas[-1].append(bundle))

    module = types.ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(bars, "console", lambda: Console(file=io.StringIO(), force_jupyter=True))
    return areas


def work(steps=3, what="counting", **options):
    with bars.progress(what, steps, unit="sheep", **options) as advance:
        for _ in range(steps or 3):
            time.sleep(0.15)
            advance()


def test_a_terminal_shows_a_bar_with_rate_and_time_left_and_then_nothing(terminal):
    work()
    assert "counting" in terminal() and "2/3" in terminal() and "sheep/s" in terminal() and "0:00:0" in terminal()


def test_a_notebook_shows_the_bar_in_one_place_by_ipython_alone(notebook):
    work()
    [area] = notebook
    texts = [bundle["text/plain"] for bundle in area]
    assert "counting" in texts[0] and any("2/3" in text and "sheep/s" in text for text in texts)
    assert all(bundle["text/html"].startswith("<pre>") for bundle in area[:-1])
    assert texts[-1] == "" and area[-1]["text/html"] == ""
    assert not any("\x1b" in text for text in texts)


def test_elsewhere_there_is_no_bar(monkeypatch, at_once):
    out = io.StringIO()
    monkeypatch.setattr(bars, "console", lambda: Console(file=out, force_terminal=False, force_jupyter=False))
    work()
    assert out.getvalue() == ""
    monkeypatch.setattr(bars, "_SECONDS_BETWEEN_LINES", 0.2)
    work()
    work(None)
    assert "counting: 2 of 3, " in out.getvalue() and "s left" in out.getvalue() and "counting: 2, " in out.getvalue()


def test_it_can_be_switched_off(terminal, notebook):
    jm.show_progress(False)
    try:
        work()
        assert terminal() == "" and notebook == []
    finally:
        jm.show_progress(True)
    work()
    assert len(notebook) == 1


def test_quick_work_shows_nothing(terminal, monkeypatch):
    monkeypatch.setattr(bars, "_SECONDS_BEFORE_A_BAR", 30.0)
    work()
    assert terminal() == ""


def test_within_a_bar_there_is_no_other_one(terminal):
    with bars.progress("outer", 2) as advance:
        time.sleep(0.3)
        work(what="inner")
        advance()
    thread = threading.Thread(target=work, kwargs={"what": "another thread"})
    with bars.progress("outer", 2):
        thread.start()
        thread.join()
    assert "outer" in terminal() and "inner" not in terminal() and "another thread" not in terminal()


def test_an_error_ends_the_bar_and_leaves_room_for_the_next(terminal):
    with contextlib.suppress(KeyError), bars.progress("failing", 2):
        time.sleep(0.3)
        raise KeyError
    work(what="next")
    assert "next" in terminal()
    # rich tells its thread to end and does not wait for that; threads of other libraries come and go when they like.
    for thread in [t for t in threading.enumerate() if isinstance(t, threading.Timer | live._RefreshThread)]:
        thread.join(10)
        assert not thread.is_alive()


def test_work_of_unknown_length_shows_how_much_is_done(terminal):
    work(None)
    assert "2/?" in terminal()


def shown(monkeypatch, run):
    """Which bars a function opens, which of them are drawn, and how far they get."""
    seen, drawn = [], []

    @contextlib.contextmanager
    def draw(out, what, total):
        entry = [what, total, 0]
        drawn.append(what)
        seen.append(entry)

        def update(done, rate, note):
            entry[2] = done

        yield update

    monkeypatch.setattr(bars, "_in_lines", draw)
    monkeypatch.setattr(bars, "console", lambda: Console(file=io.StringIO(), force_terminal=False, force_jupyter=False))
    run()
    return [tuple(entry) for entry in seen]


def steered(alpha, vector, spans):
    return {"resid_post": (jm.edits.add_vector(alpha * vector, spans),)}


def test_a_sweep_has_a_bar_and_none_where_its_caller_has_one(lm, monkeypatch):
    prompts = jm.make_prompts(lm, ["one ", "two "], ["1", "2"])
    L = lm.config.n_layers
    vector = jnp.ones((L, lm.config.d_model))
    build = Partial(steered, vector=vector, spans=jm.edits.everywhere(L))
    arguments = (lm.config, lm.params, prompts, build, np.linspace(0, 1, 5, dtype=np.float32))
    assert shown(monkeypatch, lambda: jm.sweep(*arguments, chunk=2)) == [("sweep", 5, 5)]
    told = []
    assert shown(monkeypatch, lambda: jm.sweep(*arguments, chunk=2, advance=told.append)) == [] and sum(told) == 5


def test_dictionaries_are_evaluated_checked_and_spliced_with_a_bar(lm, saes, tokens, monkeypatch, tmp_path):
    stream = jm.ActivationStream(lm.config, lm.params, tokens, layers=saes.config.layers, batch_size=4)
    rows = [x for x in stream.chunks(8)]
    assert shown(monkeypatch, lambda: jm.evaluate_saes(saes, rows)) == [("evaluating", len(rows), len(rows))]
    assert shown(monkeypatch, lambda: jm.evaluate_saes(saes, iter(rows))) == [("evaluating", None, len(rows))]
    recovered = shown(monkeypatch, lambda: jm.loss_recovered(lm.config, lm.params, tokens, saes=saes, batch=2))
    assert recovered == [("loss recovered", 4, 4)]  # two batches, two layers
    [(name, total, done)] = shown(
        monkeypatch, lambda: jm.check_sae(lm, saes, ["one two three " * 40], rows=2, length=32)
    )
    assert (name, total) == ("checking dictionaries", None) and done > 3
    jm.save_saes(saes, tmp_path / "saes")
    assert shown(monkeypatch, lambda: jm.load_saes(tmp_path / "saes")) == [("reading dictionaries", 2, 2)]


def test_activations_and_training_have_a_bar(lm, tokens, monkeypatch, tmp_path):
    keep = lambda: jm.save_activations(lm.config, lm.params, tokens, mask=None, folder=tmp_path / "kept", layers=[1])  # noqa: E731
    assert shown(monkeypatch, keep) == [("activations", 3, 3)]
    stream = jm.ActivationStream(lm.config, lm.params, tokens, layers=(1,), batch_size=8)
    config = SAETrainConfig(d_sae=16, sparsity=2, kind="topk", steps=3, log_every=1)
    assert shown(monkeypatch, lambda: jm.train_saes(config, stream, key=jax.random.key(0))) == [("training SAEs", 3, 3)]


def test_conversion_has_a_bar_that_counts_tensors(monkeypatch):
    class Source:
        name = "memory"
        tensors = {"embed": np.ones((5, 3), np.float32)} | {f"layer.{i}": np.ones(3, np.float32) for i in range(4)}  # noqa: RUF012

        def names(self):
            return list(self.tensors)

        def shape(self, name):
            return self.tensors[name].shape

        def kind(self, name):
            return "F32"

        def read(self, name):
            return self.tensors[name]

    table = convert.Table((convert.Rule("embed", "embed"), convert.Rule(r"layer\.(?P<layer>\d+)", "layers/scale")))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        "embed": jax.ShapeDtypeStruct((5, 3), jnp.float32, sharding=sharding),
        "layers": {"scale": jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=sharding)},
    }
    assert shown(monkeypatch, lambda: convert.convert(Source(), table, target)) == [("converting", 5, 5)]


def test_gradients_at_every_token_and_sampled_text_have_a_bar(lm, monkeypatch):
    texts, prefixes = ["one ", "two ", "ten "], ["a: 1\n", "b: 2\n", "a: 1\n"]
    prompts = jm.make_prompts(lm, texts, ["1", "2"], prefixes=prefixes)
    values = jnp.arange(2.0)
    slope = lambda: residual_gradient(lm.config, lm.params, prompts, values, everywhere=True, chunk=1)  # noqa: E731
    assert shown(monkeypatch, slope) == [("gradients", 2, 2)]
    draw = lambda: sample_text(lm, 3, 5, key=jax.random.key(0), batch=2)  # noqa: E731
    assert shown(monkeypatch, draw) == [("sampling text", 3, 3)]
