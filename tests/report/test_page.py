"""The page: whole, self-contained, with every section and verdict; strict about tables; atomic."""

import json
import re
from html.parser import HTMLParser
from io import StringIO

import plotly.graph_objects as go
import pytest
from markupsafe import escape
from rich.console import Console

from jaxmech.report import cards, print_summary, show, write_report
from jaxmech.report.formats import NBSP
from jaxmech.report.verdict import STAGES
from jaxmech.study.folder import Outcome, RunFolder, write_json

SECTIONS = (
    "verdict",
    "behaviour",
    "features",
    "classes",
    "patching",
    "proximity",
    "steering",
    "transfer",
    "fidelity",
    "methods",
)
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collects what a page loads, its elements' ids, its text outside scripts, and checks that tags close."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.loads, self.ids, self.words, self.json, self.stack = [], [], [], {}, []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.stack.append((tag, attrs))
        self.loads += [attrs["src"]] if "src" in attrs else []
        self.loads += [attrs["href"]] if tag == "link" else []
        self.ids += [attrs["id"]] if "id" in attrs else []

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        tag, attrs = self.stack[-1] if self.stack else ("", {})
        if attrs.get("type") == "application/json":
            self.json[attrs["data-plot"]] = data
        elif tag not in ("script", "style"):
            self.words.append(data)
        elif tag == "style":
            assert "url(" not in data and "@import" not in data


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.stack
    reader.text = re.sub(r"\s+", " ", " ".join(reader.words)).replace(NBSP, " ")
    return reader


@pytest.fixture(scope="module")
def page_of(run_of):
    made = {}

    def make(name):
        if name not in made:
            made[name] = read(write_report(*run_of(name)))
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finding", "null", "no_behaviour", "fallback", "coarse"])
def test_every_scenario_gives_a_whole_page_that_loads_nothing(page_of, run_of, name):
    page = page_of(name)
    assert [load for load in page.loads if load != "data:,"] == []
    assert [anchor for anchor in page.ids if anchor in SECTIONS] == list(SECTIONS)
    assert len(page.ids) == len(set(page.ids))
    assert (run_of(name)[0].path / "report.html").stat().st_size < 7e6
    assert "nan" not in page.text.lower().split() and "None" not in page.text.split()


def test_the_page_says_what_the_verdict_says(page_of, run_of):
    folder, manifest = run_of("finding")
    for claim in cards({stage: folder.results(stage) for stage in STAGES}, manifest["config"]):
        assert claim.title in page_of("finding").text
        assert claim.sentence.replace(NBSP, " ") in page_of("finding").text


def test_withheld_claims_are_shown_with_their_numbers(page_of):
    text = page_of("no_behaviour").text
    assert "Not shown: shift" in text
    assert text.count("Withheld: no behaviour is shown that features could carry") >= 5
    assert "the features recover 2 %" in text


def test_exploratory_and_undefined_are_said(page_of):
    assert "exploratory" in page_of("fallback").text
    assert "There is no usable range" in page_of("fallback").text
    assert "no feature is put into a class" in page_of("coarse").text
    assert "Features in use by class" in page_of("finding").text
    assert "Features in use by class" not in page_of("coarse").text  # nothing more is computed


def test_every_figure_is_valid_captioned_and_redrawable(page_of):
    page = page_of("finding")
    assert len(page.json) > 20
    for anchor, source in page.json.items():
        figure = go.Figure(json.loads(source))
        assert anchor in page.ids and figure.data and figure.layout.meta["phone"] > 100


def test_dictionaries_that_do_not_fit_are_said_in_page_and_terminal(page_of, run_of):
    text = page_of("fallback").text
    assert "1 of 6 may not" in text and text.count("layer 16 is <off>. Likely cause: scale.") == 2
    assert "Not all of them fit" in text and "Not all of them fit" not in page_of("finding").text
    folder, manifest = run_of("fallback")
    write_json(folder.path / "manifest.json", manifest)
    out = StringIO()
    show(folder.path, Console(file=out, width=2000))
    assert "Do the dictionaries fit the model?" in out.getvalue() and "Likely cause: scale." in out.getvalue()


def test_methods_hold_every_parameter_and_where_this_comes_from(page_of, run_of):
    text = page_of("finding").text
    for key, value in (run_of("finding")[1]["config"] | {"words": "words"}).items():
        assert all(f"{key}.{name}" in text for name in value) if isinstance(value, dict) else key in text
    assert "arXiv:2604.19260" in text and "independent implementation" in text and "Gemma Terms of Use" in text
    assert "unequal length" in text and "0000000000000003" in text


def test_page_and_terminal_say_what_the_instrument_said_where_the_truth_is_known(run_of):
    folder, manifest = run_of("finding")
    claims = {"behavior": {"said": "yes", "true": "yes"}, "cause": {"said": "cannot be told", "true": "yes"}}
    told = manifest | {"instrument": {"altruist": {"claims": claims}}}
    sentence = "run before this one. 1 of 2 answers are right."
    try:
        write_json(folder.path / "manifest.json", told)
        page = read(write_report(folder, told))
        assert sentence in page.text and "altruist cause cannot be told yes ✗" in " ".join(page.text.split())
        show(folder.path, Console(file=(out := StringIO()), width=200))
        assert sentence in out.getvalue()
    finally:
        write_json(folder.path / "manifest.json", manifest)


def test_p_values_are_called_what_they_are(page_of):
    text = page_of("finding").text
    assert "one more draw from the normal distribution" in text and "one-sided: the side towards the donor" in text
    assert "of classes' directness and of steering are two-sided" in text and "(p = 0.005)" in text
    assert "(two-sided p = 0.005 against feature sets, which reach 100 % of the norm" in text
    assert "not public" not in text and "worked from the abstract" in text


def test_loss_recovered_is_what_results_json_has_and_names_its_baseline(page_of, run_of):
    text, layers = page_of("finding").text, run_of("finding")[0].table("fidelity", "layers")
    zero, mean = (f"{100 * layers[name].mean():.0f} % loss recovered" for name in ("recovered_zero", "recovered_mean"))
    assert f"{zero}, against zeros" in text and f"{mean}, against the mean" in text


def test_whole_prompts_are_shown_of_both_stances_and_of_every_stage_that_asks(page_of, run_of):
    folder, text = run_of("finding")[0], page_of("finding").text
    asked = folder.table("behavior", "prompts").sort_values(["family", "pair"])
    shown = [
        asked[asked["condition"] == name].iloc[0]
        for name in ("plus", "minus", "flipped:plus", "unstanced:plus", "neutral", "keep:neutral", "take:neutral")
    ]
    shown += [row for _, row in folder.table("transfer", "prompts").iterrows()]
    shown += [row for _, row in folder.table("dual_process", "items").head(2).iterrows()]
    for row in shown:
        assert re.sub(r"\s+", " ", row["prefix"] + row["query"]).strip() in re.sub(r"\s+", " ", text.replace("  ", " "))
    assert "The text before them is the same for both" in text and "very generous" in text


def test_prompts_stand_on_the_page_letter_by_letter(run_of, page_of):
    page_of("finding")
    raw = (run_of("finding")[0].path / "report.html").read_text()
    rows = run_of("finding")[0].table("behavior", "prompts").sort_values(["family", "pair"])
    row = rows.query("condition == 'minus'").iloc[0]
    inside = f'<span class="examples">{escape(row["prefix"])}</span><strong>{escape(row["query"])}</strong></pre>'
    assert inside in raw


def test_tokens_from_a_model_cannot_become_markup(page_of, run_of):
    raw = (run_of("finding")[0].path / "report.html").read_text()
    assert "&lt;b&gt;half&lt;/b&gt;" in raw and "<b>half</b>" not in raw
    assert "<b>half</b> of it" in page_of("finding").text


@pytest.mark.slow
def test_optional_tables_may_be_missing_named_ones_may_not(run_of, tmp_path):
    folder, manifest = run_of("finding")
    copy = RunFolder(tmp_path / "copy")
    for stage in folder.path.glob("stages/*"):
        names = [file.stem for file in stage.glob("*.parquet") if file.stem not in ("cards", "training", "exclusions")]
        tables = {name: folder.table(stage.name, name) for name in names}
        copy.save(stage.name, Outcome(folder.results(stage.name), tables), {"key": "0", "seconds": 1.0, "peak_gb": 1.0})
    page = write_report(copy, manifest)
    before = page.read_text()
    (copy.stage("patching") / "bars.parquet").unlink()
    with pytest.raises(ValueError, match="no table stages/patching/bars.parquet"):
        write_report(copy, manifest)
    assert page.read_text() == before and [file.name for file in copy.path.glob(".report*")] == []


def test_a_table_of_another_version_is_named(run_of, tmp_path):
    folder, manifest = run_of("finding")
    copy = RunFolder(tmp_path / "copy")
    for stage in folder.path.glob("stages/*"):
        tables = {file.stem: folder.table(stage.name, file.stem) for file in stage.glob("*.parquet")}
        outcome = Outcome(folder.results(stage.name), tables)
        copy.save(stage.name, outcome, {"key": "0", "seconds": 1.0, "peak_gb": 1.0})
    without = folder.table("steering", "dose").drop(columns="kl")
    with pytest.raises(ValueError, match="stage steering: table dose lacks the declared column kl"):
        copy.save("steering", Outcome({}, {"dose": without}), {})
    with pytest.raises(ValueError, match="stage steering: table doses is not declared"):
        copy.save("steering", Outcome({}, {"doses": without}), {})
    without.to_parquet(copy.stage("steering") / "dose.parquet")
    with pytest.raises(ValueError, match=r"steering/dose.parquet lacks the column kl"):
        write_report(copy, manifest)


def test_the_terminal_says_the_same(run_of):
    folder, manifest = run_of("no_behaviour")
    claims = cards({stage: folder.results(stage) for stage in STAGES}, manifest["config"])
    out = StringIO()
    print_summary(claims, Console(file=out, width=2000))
    for claim in claims:
        for text in (claim.title, claim.answer, claim.sentence, *(f"{f.label}: {f.text}" for f in claim.facts)):
            assert text in out.getvalue()


def test_show_needs_a_finished_run(run_of, tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        show(tmp_path)
    folder, manifest = run_of("finding")
    write_json(folder.path / "manifest.json", manifest)
    out = StringIO()
    show(folder.path, Console(file=out, width=2000))
    assert "report.html" in out.getvalue() and "Is there a behaviour?" in out.getvalue()
