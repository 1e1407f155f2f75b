"""The translation cache: what is finished stays, once, whoever writes beside it and whatever is killed."""

import multiprocessing
import os
import random
import signal
import sqlite3
import time

import pytest

from modeling_nrccr.translation.base import TranslationError, Translator
from modeling_nrccr.translation.cache import CachedTranslator, TranslationCache


class Upper(Translator):
    """Upper case is its translation; fails at the text "die", has no answer to "mute"; remembers what it was asked."""

    name, version, batch_size = "upper", "1", 2

    def __init__(self, seconds: float = 0):
        self.asked, self.seconds = [], seconds

    def supported_pairs(self):
        return [("en", "gl"), ("gl", "en"), ("en", "ca"), ("ca", "gl")]

    def _translate(self, texts, source, target):
        time.sleep(self.seconds)
        if "die" in texts:
            raise TranslationError("upper died")
        self.asked += texts
        return ["" if text == "mute" else f"{text.upper()} {target}" for text in texts]


class Rank:
    """Stands in for accelerate's `PartialState`; `others` is what the other processes do meanwhile."""

    def __init__(self, process_index: int, num_processes: int, others=lambda: None):
        self.process_index, self.num_processes, self.wait_for_everyone = process_index, num_processes, others
        self.is_main_process = process_index == 0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "cache.sqlite"


def rows(path) -> list[tuple]:
    return sqlite3.connect(path).execute("SELECT * FROM translations").fetchall()


def test_what_was_translated_is_not_asked_again(path):
    first, second = Upper(), Upper()
    assert CachedTranslator(first, path).translate(["b", "a", "b"], "en", "gl") == ["B gl", "A gl", "B gl"]
    cached = CachedTranslator(second, path)
    assert cached.translate(["c", "a\n", "b"], "en", "gl") == ["C gl", "A gl", "B gl"]
    assert first.asked == ["a", "b"] and second.asked == ["c"]
    assert (cached.num_found, cached.num_translated, cached.name, cached.version) == (2, 1, "upper", "1")
    assert rows(path) == [("upper", "1", "en", "gl", text, f"{text.upper()} gl") for text in "abc"]


@pytest.mark.parametrize("changed", [{"name": "other"}, {"version": "2"}, ("en", "ca"), ("ca", "gl")])
def test_another_engine_version_or_pair_is_another_answer(path, changed):
    CachedTranslator(Upper(), path).translate(["a"], "en", "gl")
    engine, pair = Upper(), ("en", "gl")
    if isinstance(changed, dict):
        engine.__dict__.update(changed)
    else:
        pair = changed
    CachedTranslator(engine, path).translate(["a"], *pair)
    assert engine.asked == ["a"] and len(rows(path)) == 2


def test_finished_batches_outlive_a_failure(path):
    engine = Upper()
    with pytest.raises(TranslationError, match="upper died"):
        CachedTranslator(engine, path).translate(["a", "b", "c", "d", "die", "e"], "en", "gl")
    again = Upper()
    assert CachedTranslator(again, path).translate(list("abcdef"), "en", "gl")[-1] == "F gl"
    assert engine.asked == list("abcd") and again.asked == ["e", "f"]


def test_a_miscount_is_not_stored(path):
    class Lossy(Upper):
        def _translate(self, texts, source, target):
            return super()._translate(texts, source, target)[: 1 if "c" in texts else None]

    with pytest.raises(TranslationError, match="2 captions went in, 1 came out"):
        CachedTranslator(Lossy(), path).translate(list("abcd"), "en", "gl")
    assert [row[4] for row in rows(path)] == ["a", "b"]
    with pytest.raises(ValueError, match="shorter"):  # nor by way of the cache itself
        TranslationCache(path).store(Upper(), "en", "gl", ["x", "y"], ["X"])
    assert len(rows(path)) == 2


def test_no_answer_is_asked_for_again(path):
    engine = Upper()
    for _ in range(2):
        with pytest.raises(TranslationError, match="row 1: no answer to 'mute'"):
            CachedTranslator(engine, path).translate(["a", "mute"], "en", "gl")
    assert engine.asked == ["a", "mute", "mute"]
    cache = TranslationCache(path)
    cache.store(engine, "en", "gl", ["mute", "a"], ["M", "second answer"])  # an empty one gives way, another not
    assert cache.lookup(engine, "en", "gl", ["mute", "a", "b"]) == {"mute": "M", "a": "A gl"}


def test_bad_pairs_are_refused_before_the_cache_is_made(path):
    with pytest.raises(ValueError, match="upper has no pair en-cs here; it has: en-gl, gl-en, en-ca, ca-gl"):
        CachedTranslator(Upper(), path).translate(["a"], "en", "cs")
    assert not path.exists()


def test_any_text_comes_back(path):
    odd = ["'; DROP TABLE translations; --", "\U0001f600 ñ", "half \ud800", "half ?", "x" * 10_000, "%_*?"]
    odd += [f"number {i}" for i in range(1200)]
    for _ in range(2):
        engine = Upper()
        engine.batch_size = 1000
        answers = CachedTranslator(engine, path).translate(odd, "en", "gl")
        assert [answer.replace("\ud800", "?") for answer in answers] == [
            f"{text.upper()} gl".replace("\ud800", "?") for text in odd
        ]
    assert engine.asked == []


def test_each_process_translates_its_share(path):
    texts = [f"{'long ' * (i % 5)}text {i}" for i in range(23)]
    engines = [Upper(), Upper(), Upper()]
    expected = [f"{text.upper()} gl" for text in texts]
    results = []

    def run(rank: int):  # the next process does its share, and all that come after, while this one waits
        others = (lambda: run(rank + 1)) if rank < 2 else (lambda: None)
        cached = CachedTranslator(engines[rank], path, Rank(rank, 3, others))
        results.append(cached.translate(texts, "en", "gl"))

    run(0)
    assert results == [expected] * 3
    asked = [text for engine in engines for text in engine.asked]
    assert sorted(asked) == sorted(texts) and {len(engine.asked) for engine in engines} == {7, 8}


def test_processes_that_do_not_share_the_cache_are_told(path):
    with pytest.raises(TranslationError, match="cache.sqlite lacks 1 texts that other processes translated.*'b'"):
        CachedTranslator(Upper(), path, Rank(0, 2)).translate(["a", "b", "c"], "en", "gl")


def test_one_bar_for_all(path, capfd):
    for rank, bar in ((1, False), (0, True)):
        state = Rank(rank, 2, lambda: CachedTranslator(Upper(), path).translate(list("abcd"), "en", "gl", False))
        CachedTranslator(Upper(), path, state).translate(list("abcd"), "en", "gl", show_progress=True)
        assert ("upper en-gl" in capfd.readouterr().err) == bar


def test_files_that_are_no_cache(tmp_path):
    def error_of(path):
        with pytest.raises((ValueError, OSError)) as error:
            CachedTranslator(Upper(), path).translate(["a"], "en", "gl")
        return str(error.value)

    (tmp_path / "text").write_text("a text file, long enough to be told from a data base" * 20)
    assert "text is no translation cache" in error_of(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE notes (note)")
    assert "other is no translation cache (it holds other tables)" in error_of(tmp_path / "other")
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 7")
    assert "newer is a translation cache of format 7, this version reads 1" in error_of(tmp_path / "newer")
    assert "cannot be opened" in error_of(tmp_path)
    assert "cannot be opened" in error_of(tmp_path / "text" / "below")


def test_a_full_disk_or_a_busy_file_leaves_what_was_there(path, monkeypatch):
    cache = TranslationCache(path, timeout=0.1)
    cache.store(Upper(), "en", "gl", ["a"], ["A"])
    with sqlite3.connect(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="cache.sqlite: the translation cache cannot be used .database is locked"):
            cache.store(Upper(), "en", "gl", ["b"], ["B"])
        other.rollback()
    connect = sqlite3.connect

    def small_disk(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA max_page_count = 3")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small_disk)
    with pytest.raises(OSError, match="full"):
        cache.store(Upper(), "en", "gl", ["b", "c" * 100_000], ["B", "C"])
    assert cache.lookup(Upper(), "en", "gl", ["a", "b"]) == {"a": "A"}


def write_for_ever(path, seed: int):
    cache, generator = TranslationCache(path), random.Random(seed)
    while True:
        texts = [f"text {generator.randrange(5000)}" for _ in range(40)]
        cache.store(Upper(), "en", "gl", texts, [text.upper() for text in texts])


@pytest.mark.slow
def test_writers_are_killed_and_the_file_stays_whole(path):
    """Three at once, killed at random moments, thirty times."""
    context, generator = multiprocessing.get_context("fork"), random.Random(0)
    before = 0
    for round in range(10):
        writers = [context.Process(target=write_for_ever, args=(path, 3 * round + i)) for i in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            time.sleep(generator.uniform(0.05, 0.2))
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        found = TranslationCache(path).lookup(Upper(), "en", "gl", [f"text {i}" for i in range(5000)])
        assert all(answer == text.upper() for text, answer in found.items()) and len(found) >= before
        before = len(found)
    assert before > 1000
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert len(rows(path)) == before
