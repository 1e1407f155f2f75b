"""The examples of the Python API, run as a stranger runs them, on a small base."""

import subprocess
import sys

import pytest
from PIL import Image

from modeling_nrccr import load_translator
from modeling_nrccr.languages import LANGUAGE_FILE
from tests.support import ROOT
from tests.support.small_base import write_small_base


EXAMPLES = ("add_language", "search_folder", "own_loss", "own_engine", "own_data_set")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_small_base(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def on_the_path(tmp_path, monkeypatch):
    """As `python examples/NAME.py` begins: Python looks in the folder of the script first."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def test_a_language_is_added_and_two_are_searched(files, tmp_path):
    from add_language import add_and_ask
    from search_folder import search_folder

    options = {"num_train_epochs": 2, "min_steps": 0, "translator": f"file:{files}/translations", "disable_tqdm": True}
    queries = ["redo blueo bigo", "cato dogo"]
    texts, output = str(files / "captions.txt"), str(tmp_path / "gl")
    report, answers = add_and_ask(str(files / "base"), texts, str(files), queries, "gl", output, **options)
    assert report["verdict"] == "not tested" and report["steps"] > 0
    assert {query: len(hits) for query, hits in answers.items()} == dict.fromkeys(queries, 3)

    languages, ask = [f"gl={output}", f"ca={output}"], [("gl", queries[0]), ("ca", queries[1]), ("base", "red blue")]
    for _ in range(2):  # the second time from the index
        found = search_folder(str(files / "base"), str(files), languages, ask, index=str(tmp_path / "index"), k=3)
        assert [hits[:3] for hits in found[:2]] == list(answers.values())
    assert len(found) == 3 and found[2] != found[0]


def test_a_loss_of_ones_own(files, tmp_path):
    from own_loss import train

    lines = (files / "translations/forth.tsv").read_text().splitlines()[1:]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    trainer = train(str(files / "base"), str(tmp_path / "pairs.tsv"), "gl", str(tmp_path / "gl"), epochs=2)
    (logged,) = [entry for entry in trainer.state.log_history if "train_loss" in entry]
    assert (
        logged["train_loss"]
        and trainer.state.global_step == 2 * (250 // 64)
        and (tmp_path / "gl" / LANGUAGE_FILE).is_file()
    )
    assert trainer.nrccr_loss.settings.losses == {"feature_distillation": 1.0, "own_loss:Uniformity": 0.1}


def test_an_engine_of_ones_own(tmp_path):
    from own_engine import translate

    (tmp_path / "words.tsv").write_text("en\tgl\nred\tvermello\nboat\tbarco\n")
    assert translate("words.tsv", ["a red boat", "boat"], "en", "gl") == ["a vermello barco", "barco"]
    assert translate("words.tsv", ["barco vermello"], "gl", "en") == ["boat red"]
    before = load_translator("own_engine:Glossary:words.tsv").version
    (tmp_path / "words.tsv").write_text("en\tgl\nred\troxo\n")
    assert load_translator("own_engine:Glossary:words.tsv").version != before


def test_a_data_set_of_ones_own(tmp_path, monkeypatch, no_bars):
    from own_data_set import load

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(30):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.en.txt").write_text(f"the number {number}\n")
        (folder / f"{number:02}.gl.txt").write_text(f"o {number}\n")
    splits = load("pictures", "gl")
    assert sum(map(len, splits.values())) == 30 and all(map(len, splits.values()))
    assert set(splits["train"]["target_caption"]) == {None}
    row = splits["test"][0]
    number = int(row["image_id"])
    assert row["target_caption"] == f"o {number}" and row["image"].getpixel((0, 0)) == (number, 0, 0)
    (folder / "00.en.txt").write_text("nothing\n")
    changed = {text for split in load("pictures", "gl").values() for text in split["source_caption"]}
    changed |= {text for split in load("pictures", "gl").values() for text in split["reference_source_caption"]}
    assert "nothing" in changed  # not what was built before
    (folder / "01.gl.txt").unlink()
    with pytest.raises(FileNotFoundError, match="01.gl.txt"):
        load("pictures", "gl")


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_short_and_says_how_to_run_it(name, capsys, monkeypatch):
    module = __import__(name)
    lines = (ROOT / f"examples/{name}.py").read_text().splitlines()
    assert 30 <= len(lines) <= 60 and f"python examples/{name}.py " in module.__doc__
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not ended.value.code and module.__doc__.strip().splitlines()[0] in capsys.readouterr().out


@pytest.mark.slow
def test_it_runs_as_a_script(tmp_path):
    (tmp_path / "words.tsv").write_text("en\tgl\nred\tvermello\n")
    script = [sys.executable, str(ROOT / "examples/own_engine.py"), "words.tsv", "a red boat"]
    result = subprocess.run(script, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "a vermello boat\n", result.stderr
