"""`nrccr translate`: one answer a caption, whatever ends it; what it writes is a data set.

    torchrun --standalone --nproc_per_node 2 tests/data/test_translate_example.py FLAGS

is what the tests start: the command, with engines of this file.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
from PIL import Image

from modeling_nrccr.cli import translate as nrccr_translate
from modeling_nrccr.data import load as data
from modeling_nrccr.data import translate
from modeling_nrccr.translation import cache, engines
from modeling_nrccr.translation.base import TranslationError, Translator
from modeling_nrccr.translation.cache import CachedTranslator
from tests.support import ROOT


# ---------------------------------------------------------------------------- also in the processes that are killed


class Slow(Translator):
    """Answers with what it was asked, turned round, and the language; every batch takes its time and is logged."""

    version, batch_size = "1", 8

    def __init__(self, name: str = "slow"):
        self.name, self.seconds = name, float(os.environ.get("ENGINE_SECONDS", 0))

    def supported_pairs(self):
        return [("en", "cs"), ("cs", "en")]

    def _translate(self, texts, source, target):
        time.sleep(self.seconds)
        if any(os.environ.get("ENGINE_DIES_AT", "\0") in text for text in texts):
            raise TranslationError(f"{self.name} died")
        if log := os.environ.get("ENGINE_LOG"):
            with open(log, "a") as file:  # one write: lines of several processes do not mix
                file.write("".join(f"{source} {text}\n" for text in texts))
        return [answer(text, target, self.name) for text in texts]


def answer(text: str, target: str, engine: str = "slow") -> str:
    return f"{text[::-1]} {target}{'' if engine == 'slow' else ' ' + engine}"


def engine_of_this_file(spec, pairs, data_dir=None, cache=None, state=None, **options):
    return CachedTranslator(Slow(spec), cache, state)


def run(flags: list[str]):
    translate.load_engine = engine_of_this_file
    nrccr_translate.main(flags)


def run_logged(flags: list[str], log: Path, environ: dict[str, str]):
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.environ |= environ
    datasets.config.HF_DATASETS_CACHE = environ["HF_DATASETS_CACHE"]  # the variable is read by who imports
    run(flags)


# ---------------------------------------------------------------------------------------------------- in the tests

COUNTS = {"train": 150, "validation": 20, "test": 40}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Captions of all lengths, every third of them twice, the validation's and test's in two languages."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, generator = tmp_path / "pictures", random.Random(0)
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption,target_caption,split"]
    for split, count in COUNTS.items():
        for i in range(count):
            words = [f"word{generator.randrange(99)}" for _ in range(generator.randrange(1, 9))]
            caption = f"{split} {i - i % 3 // 2} {' '.join(words) if i % 3 == 0 else ''}"
            human = "" if split == "train" else f"popisek {caption}"
            lines.append(f"{split}{i % 4}.png,{caption.strip()},{human.strip()},{split}")
        for i in range(4):
            Image.new("RGB", (4, 4), (i, 20, len(split))).save(folder / "images" / f"{split}{i}.png")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def flags_of(pictures: Path, *more: str) -> list[str]:
    names = {
        "data": "caption_files",
        "data_dir": pictures,
        "language": "cs",
        "translator": "slow",
        "output_dir": pictures.parent / "out",
        "cache": pictures.parent / "translations.sqlite",
    }
    return [part for key, value in names.items() for part in (f"--{key}", str(value))] + list(more)


@pytest.fixture
def slow(monkeypatch, no_bars):
    monkeypatch.setattr(translate, "load_engine", engine_of_this_file)


def assert_right(pictures: Path, output: Path, engine: str = "slow"):
    """Row by row against the file of captions: nothing lost, doubled or shifted."""
    before = data.load_caption_dataset("caption_files", "cs", data_dir=str(pictures))
    after = datasets.load_dataset("parquet", data_dir=str(output))
    assert {split: len(rows) for split, rows in after.items()} == COUNTS
    for split, rows in after.items():
        assert rows["caption_id"][:] == before[split]["caption_id"][:]
        assert rows.features == before[split].features
        if split == "train":
            assert rows["source_caption"][:] == before[split]["source_caption"][:]
            assert rows["target_caption"][:] == [answer(text, "cs") for text in rows["source_caption"]]
            assert rows["back_translation"][:] == [answer(text, "en") for text in rows["target_caption"]]
            assert set(rows["target_origin"]) == {engine}
        else:
            assert rows["target_caption"][:] == before[split]["target_caption"][:]
            assert rows["source_caption"][:] == [answer(text, "en") for text in rows["target_caption"]]
            assert rows["back_translation"][:] == [None] * len(rows)
            assert rows["reference_source_caption"][:] == before[split]["reference_source_caption"][:]
            assert set(rows["target_origin"]) == {"human"}


def test_what_it_writes_is_a_data_set(pictures, slow, capsys):
    output = pictures.parent / "out"
    nrccr_translate.main(flags_of(pictures))
    assert_right(pictures, output)
    count = 2 * 100 + 14 + 27  # distinct: both ways, and the human captions of validation and test back
    assert f"slow: {count} distinct texts translated, 0 found" in capsys.readouterr().out
    assert json.loads((output / "translation.json").read_text()) == {
        "data": "caption_files",
        "source_language": "en",
        "language": "cs",
        "split_seed": 0,
        "rows": COUNTS,
        "engines": [{"name": "slow", "version": "1"}],
    }
    assert sorted(path.name for path in output.iterdir()) == ["data", "translation.json"]
    assert not list(pictures.parent.glob(".out*"))
    loaded, engine = data.load_translated_dataset("parquet", "en", "cs", 0, "translated", "apertium", str(output))
    assert engine.name == "slow" and loaded["test"][5]["image"].getpixel((0, 0)) == (1, 20, 4)

    with pytest.raises(SystemExit, match="holds translations already: name another --output_dir, or --overwrite"):
        nrccr_translate.main(flags_of(pictures))
    nrccr_translate.main(flags_of(pictures, "--overwrite"))
    assert f"slow: 0 distinct texts translated, {count} found" in capsys.readouterr().out
    assert_right(pictures, output)


def test_several_engines_have_columns_of_their_own(pictures, slow):
    nrccr_translate.main(flags_of(pictures, "--translator", "slow,other"))
    result = datasets.load_dataset("parquet", data_dir=str(pictures.parent / "out"))
    train, test = result["train"], result["test"]
    assert train["target_caption"][:] == train["target_caption_slow"][:]
    assert train["back_translation"][:] == train["back_translation_slow"][:]
    assert set(train["target_origin"]) == {"slow"}
    expected = [answer(text, "cs", "other") for text in train["source_caption"]]
    assert train["target_caption_other"][:] == expected
    assert train["back_translation_other"][:] == [answer(text, "en", "other") for text in expected]
    assert test["source_caption"][:] == test["source_caption_slow"][:]
    assert test["source_caption_other"][:] == [answer(text, "en", "other") for text in test["target_caption"]]
    none = [None] * len(test)
    assert test["target_caption_slow"][:] == test["target_caption_other"][:] == none
    assert train["source_caption_slow"][:] == [None] * len(train)
    with pytest.raises(SystemExit, match="engines of one name have no columns of their own: slow, slow"):
        nrccr_translate.main(flags_of(pictures, "--translator", "slow,slow", "--overwrite"))


def test_an_engine_that_dies_leaves_what_it_finished(pictures, slow, monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("ENGINE_DIES_AT", "train 97")
    with pytest.raises(SystemExit, match="error: train, source_caption: slow died"):
        nrccr_translate.main(flags_of(pictures))
    assert not (pictures.parent / "out").exists()
    asked = (tmp_path / "log").read_text().splitlines()
    assert 50 < len(asked) < 100
    monkeypatch.delenv("ENGINE_DIES_AT")
    nrccr_translate.main(flags_of(pictures))
    assert_right(pictures, pictures.parent / "out")
    asked = (tmp_path / "log").read_text().splitlines()
    assert len(asked) == len(set(asked))  # nothing twice


def test_a_shifted_column_is_noticed(pictures, slow):
    nrccr_translate.main(flags_of(pictures))
    before = data.load_caption_dataset("caption_files", "cs", data_dir=str(pictures))
    engine = engine_of_this_file("slow", [], cache=pictures.parent / "translations.sqlite")
    good = translate.translate(before, [engine], "en", "cs")
    translate.check(before, good, [engine], ("en", "cs"))
    for split, column in (("train", "target_caption"), ("train", "back_translation"), ("test", "source_caption")):
        rows = good[split]
        texts = rows[column][:]
        last = len(rows) - 1
        for wrong, row in (
            (texts[1:] + texts[:1], 0),
            (texts[:-1] + texts[:1], last),
            (texts[:-1] + [None], last),
        ):
            changed = rows.remove_columns(column).add_column(column, wrong)
            with pytest.raises(
                TranslationError, match=rf"{split}, row {row} \(.*others: {column} is .*slow translated"
            ):
                translate.check(before, datasets.DatasetDict(good | {split: changed}), [engine], ("en", "cs"))
    for wrong in (good["train"].select(range(149)), good["train"].select([*range(149), 148])):
        with pytest.raises(TranslationError, match="train: 150 captions came in, 1[45][90] others came out"):
            translate.check(before, datasets.DatasetDict(good | {"train": wrong}), [engine], ("en", "cs"))


def test_a_folder_of_something_else_is_refused(pictures, slow, monkeypatch):
    with pytest.raises(SystemExit, match="pictures is there and was not written by `nrccr translate`"):
        nrccr_translate.main(flags_of(pictures, "--output_dir", str(pictures), "--overwrite"))
    (pictures.parent / "empty").mkdir()
    monkeypatch.setattr(datasets.Dataset, "to_parquet", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    for _ in range(2):
        with pytest.raises(SystemExit, match="error: disk full"):
            nrccr_translate.main(flags_of(pictures, "--output_dir", str(pictures.parent / "empty")))
    assert not list((pictures.parent / "empty").iterdir())
    monkeypatch.undo()
    assert not list(pictures.parent.glob(".empty*"))


def test_translated_data_that_does_not_fit_is_refused(pictures, slow):
    output = str(pictures.parent / "out")
    nrccr_translate.main(flags_of(pictures))
    for match, options in (
        ("target_language is cs, not gl", {"language": "gl"}),
        ("was split by seed 0, not 3: --split_seed 0", {"split_seed": 3}),
        ("is translated; human captions are in the data", {"target_captions": "human"}),
        ("parquet needs data_dir.*has no data/", {"data_dir": str(pictures)}),
        ("parquet needs data_dir", {"data_dir": None}),
    ):
        with pytest.raises(ValueError, match=match):
            data.load_caption_dataset("parquet", **({"language": "cs", "data_dir": output} | options))
    with pytest.raises(SystemExit, match="out came with translations by slow: nothing is wanting"):
        nrccr_translate.main(flags_of(pictures, "--data", output, "--output_dir", output + "2"))


def test_training_translates_by_the_same_cache(pictures, monkeypatch, no_bars, tmp_path):
    monkeypatch.setenv("NRCCR_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("ENGINE_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(cache, "load_translator", lambda spec: Slow(spec))
    for _ in range(2):
        dataset, engine = data.load_translated_dataset(
            "caption_files", "en", "cs", 0, "translated", "slow", str(pictures)
        )
        assert dataset["train"]["target_caption"][:] == [answer(t, "cs") for t in dataset["train"]["source_caption"]]
        assert engine.name == "slow"
    asked = (tmp_path / "log").read_text().splitlines()
    assert len(asked) == len(set(asked)) == 241 and (tmp_path / "home/translations.sqlite").exists()
    nrccr_translate.main([*flags_of(pictures)[:-2], "--output_dir", str(tmp_path / "out")])
    assert len((tmp_path / "log").read_text().splitlines()) == 241


def test_what_engines_need_is_fetched_and_pairs_are_checked_first(monkeypatch, tmp_path):
    specs, wanted = [], []
    monkeypatch.setattr(engines, "apertium_root", lambda pairs, *folders: wanted.append(pairs) or "root")
    monkeypatch.setattr(cache, "load_translator", lambda spec, **options: specs.append((spec, options)) or Slow())
    pairs = [("en", "cs"), ("cs", "en")]
    index = tmp_path / "usr/share/dictd/freedict-eng-ces.index"
    index.parent.mkdir(parents=True)
    index.touch()
    cache.load_engine("dictionary", pairs, str(tmp_path), num_beams=2)
    cache.load_engine("dictionary:deu-ces", pairs[1:])
    cache.load_engine("apertium+es+dictionary:x", pairs)
    cache.load_engine("apertium", pairs[1:])
    assert specs == [
        (f"dictionary:{index}", {"num_beams": 2}),
        ("dictionary:deu-ces", {}),
        ("apertium+es+dictionary:x", {"root": "root"}),
        ("apertium", {"root": "root"}),
    ]
    assert wanted == [[("en", "es"), ("es", "en")], [("en", "cs"), ("cs", "en")]]
    with pytest.raises(ValueError, match="slow has no pair en-gl here"):
        cache.load_engine("slow", [("en", "gl"), ("cs", "en")])


# ------------------------------------------------------------------------------------------------------ kill -9


def environ_of(**changes: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | changes


@pytest.mark.slow
def test_kill_at_ten_random_moments_and_go_on(pictures, tmp_path, monkeypatch):
    environ = environ_of(ENGINE_SECONDS="0.03", ENGINE_LOG=str(tmp_path / "asked"))
    monkeypatch.setenv("PYTHONPATH", environ["PYTHONPATH"])
    context = multiprocessing.get_context("forkserver")  # imports once, for all that are killed
    context.set_forkserver_preload([__name__])
    output, cache, generator = pictures.parent / "out", pictures.parent / "translations.sqlite", random.Random(0)

    def start():
        process = context.Process(target=run_logged, args=(flags_of(pictures), tmp_path / "output", environ))
        process.start()
        return process

    def finish(process) -> list[str]:
        """What the engine was asked since the cache was empty, which it is again."""
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "output").read_text()[-2000:]
        assert_right(pictures, output)
        shutil.rmtree(output)
        cache.unlink()
        asked = (tmp_path / "asked").read_text().splitlines()
        (tmp_path / "asked").write_text("")
        return asked

    finish(start())  # the forkserver is up, the data set built
    begun = time.monotonic()
    whole = finish(start())
    seconds, moments, kills = time.monotonic() - begun, [], 0
    assert len(whole) == len(set(whole))
    while len(moments) < 10 or kills:
        process = start()
        process.join(generator.uniform(0, seconds) if len(moments) < 10 else None)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            moments.append(count_rows(cache))
        if output.exists() or process.exitcode != -signal.SIGKILL:  # one that was killed may have just finished
            asked = finish(process)
            assert set(asked) == set(whole) and len(asked) - len(whole) <= kills * Slow.batch_size
            kills = 0
    assert len(set(moments)) > 5, moments  # really at different moments
    assert not list(pictures.parent.glob(".out*"))


def count_rows(cache: Path) -> int:
    try:
        return sqlite3.connect(cache).execute("SELECT count(*) FROM translations").fetchone()[0]
    except sqlite3.OperationalError:
        return 0  # it is not made yet


def kill_at(rows: int, command: list[str], environ: dict[str, str], cache: Path):
    """Start a command, and kill it and all that it started when the cache has so many rows."""
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while count_rows(cache) < rows:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # an engine ends with what reads it
            member.kill()  # SIGKILL; workers of torchrun are in sessions of their own
    psutil.wait_procs(family)
    process.wait()


@pytest.mark.slow
def test_two_processes_share_the_work_and_are_killed(pictures, tmp_path):
    environ = environ_of(ENGINE_SECONDS="0.05", ENGINE_LOG=str(tmp_path / "asked"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    command += flags_of(pictures)
    cache = pictures.parent / "translations.sqlite"
    for wanted in (40, 150):  # in the first pass, in the second
        kill_at(wanted, command, environ, cache)
    result = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_right(pictures, pictures.parent / "out")
    assert "process 0: slow" in result.stdout and "process 1: slow" in result.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) - len(set(asked)) <= 2 * 2 * Slow.batch_size


@pytest.mark.network
def test_real_apertium_is_killed_and_gives_the_same(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "modeling_nrccr", "translate", "--language", "gl", "--translator", "apertium"]

    def flags(name: str) -> list[str]:
        return ["--cache", str(tmp_path / f"{name}.sqlite"), "--output_dir", str(tmp_path / name)]

    subprocess.run([*command, *flags("whole")], env=environ_of(), check=True, capture_output=True)
    kill_at(1000, [*command, *flags("killed")], environ_of(), tmp_path / "killed.sqlite")
    assert not (tmp_path / "killed").exists()
    result = subprocess.run([*command, *flags("killed")], env=environ_of(), check=True, capture_output=True, text=True)
    assert re.search(r"apertium: 2,\d{3} distinct texts translated, 1,\d{3} found", result.stdout), result.stdout
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    whole, killed = (datasets.load_dataset("parquet", data_dir=str(tmp_path / name)) for name in ("whole", "killed"))
    for split, rows in whole.items():
        assert rows.remove_columns("image").to_dict() == killed[split].remove_columns("image").to_dict()
    assert "Unha ra." in whole["train"]["target_caption"]


if __name__ == "__main__":
    run(sys.argv[1:])
