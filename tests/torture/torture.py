"""Kills, full disks, second writers and readers, again and again, in what takes long or is kept:

    python -m tests.torture.torture --rounds 20 --seed 0

After each round there is what was there before or what was to come, never a third, and the next run goes on. One
process imports and loads what is needed; every run is a fork of it, on one model of random weights.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import torch
from accelerate import PartialState

from modeling_nrccr import FeatureCache
from modeling_nrccr.export import onnx as export_onnx
from modeling_nrccr.languages import LANGUAGE_FILE
from modeling_nrccr.retrieval import indexer
from modeling_nrccr.retrieval.index_faiss import FaissIndex
from modeling_nrccr.translation.cache import CachedTranslator
from tests.retrieval.test_retriever import ColorModel, ColorProcessor
from tests.support import WordProcessor, tiny_model
from tests.translation.test_translation_cache import Upper


ROOT = Path(__file__).parents[2]


ADDED = 6  # pictures, captions or texts a round
REFUSED, FAILED = 3, 1  # exit codes of a run: a line for the user, a traceback


def fork(run: Callable[[], object], log: Path, limit: int | None = None) -> int:
    """Starts a process that ends with 0, `REFUSED` or `FAILED`. `limit`: bytes that a file may have."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = FAILED
    try:
        with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                run()
                code = 0
            except (OSError, SystemExit) as error:
                text = str(error)
                code = REFUSED if text and "\n" not in text else FAILED
                with contextlib.suppress(OSError):
                    print(f"refused: {text}", flush=True)
            except BaseException:
                with contextlib.suppress(OSError):
                    traceback.print_exc(file=output)
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------------------------------------------ activities


class Activity:
    """What is done in a folder. `begin` gives it something new to do, `run` does it in a fork, and `look` says whether
    what is there is "old", "new", or "some": what is new, in whole parts."""

    def __init__(self, folder: Path, generator: random.Random):
        self.folder, self.generator = folder, generator
        folder.mkdir(parents=True)
        self.old, self.new = None, None

    def begin(self, number: int):
        raise NotImplementedError

    def run(self):
        raise NotImplementedError

    def state(self) -> object:
        raise NotImplementedError

    def look(self) -> str:
        state = self.state()
        assert state in (self.old, self.new), f"a third state: {state}\nold: {self.old}\nnew: {self.new}"
        return "new" if state == self.new else "old"

    def leftovers(self) -> list[str]:
        return [str(path) for path in self.folder.rglob("*.tmp")]


class Indexing(Activity):
    """`nrccr index`: what the index holds of each file."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gallery, self.index, self.drawn = self.folder / "gallery", self.folder / "index", 0
        self.gallery.mkdir()

    def begin(self, number: int):
        self.old = self.state()
        for _ in range(ADDED):
            self.drawn += 1
            write_picture(self.gallery / f"{self.drawn}.png", self.drawn)
        write_picture(self.gallery / "1.png", 10**6 + number)  # changed
        self.new = {path.name: indexer.content_hash(path) for path in self.gallery.iterdir()}

    def run(self):
        indexer.index_folder("colours", self.gallery, self.index, shard_size=3, batch_size=2)

    def state(self) -> dict[str, str] | None:
        if not (self.index / "index.json").exists():
            return None
        index = FaissIndex.load(self.index)
        return {id: json.loads(text)["content_hash"] for ids, texts, _ in index.rows() for id, text in zip(ids, texts)}

    def leftovers(self) -> list[str]:
        named = json.loads((self.index / "index.json").read_text())["files"] if self.old else {}
        return super().leftovers() + [
            path.name for path in self.index.glob("*-*.*") if self.look() == "old" and path.name not in named
        ]


class Translating(Activity):
    """`CachedTranslator`: whole batches of right answers."""

    def begin(self, number: int):
        self.old = self.state()
        self.texts = [f"text {number} {i} x{'x' * self.generator.randrange(2000)}" for i in range(4 * ADDED)]
        self.new = self.old | set(self.texts)

    def run(self):
        CachedTranslator(Upper(), self.folder / "cache.sqlite").translate(self.texts, "en", "gl", show_progress=False)

    def state(self) -> set[str]:
        path = self.folder / "cache.sqlite"
        if not path.exists():
            return set()
        # as the cache opens it: what a killed process left half done is rolled back
        with contextlib.closing(sqlite3.connect(path)) as connection:
            if not connection.execute("PRAGMA user_version").fetchone()[0]:
                return set()
            assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            rows = connection.execute("SELECT text, translation FROM translations").fetchall()
        assert all(answer == f"{text.upper()} gl" for text, answer in rows)
        return {text for text, _ in rows}

    def look(self) -> str:
        state = self.state()
        assert self.old <= state <= self.new and not (len(state) - len(self.old)) % Upper.batch_size, (
            len(self.old - state),
            len(state - self.new),
            len(state),
            len(self.old),
        )
        return "old" if state == self.old else "new" if state == self.new else "some"


class Training(Activity):
    """What training a language keeps: the cache of frozen states, and the language file."""

    def __init__(self, *args):
        super().__init__(*args)
        self.model = tiny_model().set_trained_layers(1)
        self.model.add_language("gl")
        self.captions = []

    def cache(self) -> FeatureCache:
        return FeatureCache(self.model, WordProcessor(), self.folder / "cache")

    def begin(self, number: int):
        self.old = self.state()
        with torch.no_grad():
            self.model.language_adapters["gl"].update.weight.fill_(1 / (number + 7))
        self.model.save_language("gl", self.folder.with_name("expected"))
        self.captions += [f"caption {number} {'word ' * i}" for i in range(ADDED)]
        self.new = (frozenset(self.captions), self.folder.with_name("expected").joinpath(LANGUAGE_FILE).read_bytes())

    def run(self):
        self.cache().add_texts(self.captions)
        self.model.save_language("gl", self.folder / "gl")

    def state(self) -> tuple[frozenset, bytes | None]:
        path = self.folder / "gl" / LANGUAGE_FILE
        if path.exists():
            self.model.load_language("found", path.parent)
            self.model.remove_language("found")
        return frozenset(self.cache().texts.rows), path.read_bytes() if path.exists() else None

    def look(self) -> str:
        captions, content = self.state()
        assert captions in (self.old[0], self.new[0]) and content in (self.old[1], self.new[1])
        assert content == self.old[1] or captions == self.new[0]
        return "old" if captions == self.old[0] else "new" if content == self.new[1] else "some"


class Exporting(Activity):
    """`write_onnx`: the files of one export."""

    def __init__(self, *args):
        super().__init__(*args)
        self.output, self.number = self.folder / "onnx", None
        self.model = tiny_model()
        self.sides = [SimpleNamespace(name=name) for name in ("text", "image")]

    def begin(self, number: int):
        self.old, self.number = self.state(), number
        self.new = {f"{side.name}.onnx": self.content(side) for side in self.sides}
        self.new["processor.txt"] = f"{number}".encode()

    def content(self, side) -> bytes:
        return random.Random(f"{self.number} {side.name}").randbytes(30_000)

    def run(self):
        def export_side(side, program, work):
            Path(work, f"{side.name}.onnx").write_bytes(self.content(side))

        export_onnx.load_onnx = export_onnx.trace = lambda *_: None
        export_onnx.OnnxModel = lambda *_: SimpleNamespace(embed=None)
        export_onnx.export_side, export_onnx.compare = export_side, lambda *_: (0.0, 1.0)
        processor = SimpleNamespace(
            save_pretrained=lambda work: Path(work, "processor.txt").write_text(f"{self.number}")
        )
        export_onnx.write_onnx(self.model, processor, self.sides, self.output)

    def state(self) -> dict[str, bytes] | None:
        if not self.output.exists():
            return None
        return {path.name: path.read_bytes() for path in self.output.iterdir() if path.is_file()} or None


ACTIVITIES = {"indexing": Indexing, "translating": Translating, "training": Training, "exporting": Exporting}


def write_picture(path: Path, number: int):
    from PIL import Image

    Image.new("RGB", (8, 6), (number % 256, number // 256 % 256, number // 65536)).save(path)


# ---------------------------------------------------------------------------------------------------------- rounds


def go_on(activity: Activity, log: Path):
    """The next run, which nothing disturbs, has to end in the new state."""
    code = wait(fork(activity.run, log))
    assert code == 0, f"the next run ended with {code}: {log.read_text()[-2000:]}"
    assert activity.look() == "new"


def kill_rounds(activity: Activity, rounds: int, log: Path) -> Counter:
    """SIGKILL at a random moment of a run."""
    found = Counter()
    activity.begin(-1)
    started = time.perf_counter()
    go_on(activity, log)
    seconds = time.perf_counter() - started
    for number in range(rounds):
        activity.begin(number)
        pid = fork(activity.run, log)
        time.sleep(activity.generator.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        assert (code := wait(pid)) in (0, -signal.SIGKILL), f"{code}: {log.read_text()[-2000:]}"
        found[activity.look()] += 1
        go_on(activity, log)
    return found


def disk_rounds(activity: Activity, rounds: int, log: Path) -> Counter:
    """A disk that takes no more of a file after a random byte: said in a line, and nothing is left behind."""
    found = Counter()
    activity.begin(-1)
    go_on(activity, log)
    for number in range(rounds):
        activity.begin(number)
        largest = max(path.stat().st_size for path in activity.folder.rglob("*") if path.is_file())
        code = wait(fork(activity.run, log, activity.generator.randrange(3 * largest // 2)))
        look = activity.look()
        assert code == REFUSED or (code, look) == (0, "new"), f"{code}: {log.read_text()[-2000:]}"
        assert not activity.leftovers()
        found[look] += 1
        go_on(activity, log)
    return found


def drawn_index(name: str, count: int) -> FaissIndex:
    index = FaissIndex(8)
    embeds = np.random.default_rng(count).standard_normal((count, 8)).astype(np.float32)
    index.upsert([f"{name} {i}" for i in range(count)], embeds, ["{}"] * count)
    return index


def writer_rounds(folder: Path, generator: random.Random, rounds: int, log: Path) -> Counter:
    """Two processes that save into one index folder, and two runs of `nrccr index` on one index."""
    found = Counter()
    indexing = Indexing(folder / "gallery", generator)
    for number in range(rounds):
        counts = {name: generator.randrange(5, 400) for name in "ab"}

        def save(name: str, counts=counts):
            index = drawn_index(name, counts[name])
            for _ in range(4):
                index.save(folder / "index")

        codes = [wait(pid) for pid in [fork(lambda name=name: save(name), log) for name in "ab"]]
        assert codes == [0, 0], f"{codes}: {log.read_text()[-2000:]}"
        held = sorted(FaissIndex.load(folder / "index").numbers)
        winner = held[0][0]
        assert held == sorted(drawn_index(winner, counts[winner]).numbers)
        assert len(list((folder / "index").iterdir())) == 4  # vectors, metadata, index.json, the lock
        indexing.begin(number)
        codes = [wait(pid) for pid in [fork(indexing.run, log) for _ in range(2)]]
        assert sorted(codes) in ([0, 0], [0, REFUSED]), f"{codes}: {log.read_text()[-2000:]}"
        assert indexing.look() == "new" and not indexing.leftovers()
        found["one was refused" if REFUSED in codes else "one after the other"] += 1
    return found


def reader_rounds(folder: Path, generator: random.Random, rounds: int, log: Path) -> Counter:
    """Reads an index that another process saves all the time."""
    found = Counter()
    for _ in range(rounds):
        states = [drawn_index(name, generator.randrange(5, 400)) for name in "ab"]
        states[0].save(folder / "index")

        def save(states=states):
            until = time.perf_counter() + 0.25
            while time.perf_counter() < until:
                for state in states:
                    state.save(folder / "index")

        pid = fork(save, log)
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            loaded = FaissIndex.load(folder / "index")
            assert any(loaded.numbers.keys() == state.numbers.keys() for state in states)
            found["reads"] += 1
        assert ended[1] == 0, log.read_text()[-2000:]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="what to run: part of its name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    PartialState(cpu=True)
    model, processor = ColorModel(), ColorProcessor()
    indexer.load_with_languages = lambda *_: (model, processor)
    ok = True
    with tempfile.TemporaryDirectory() as work:
        work, log = Path(work), Path(work, "log")
        os.environ["NRCCR_CACHE"] = str(work / "cache")
        calls = {
            "two writers on one index": lambda generator: writer_rounds(work / "two", generator, args.rounds, log),
            "a reader beside a writer": lambda generator: reader_rounds(work / "read", generator, args.rounds, log),
        }
        for name, kind in ACTIVITIES.items():
            for fault, rounds in (("a full disk", disk_rounds), ("kill -9", kill_rounds)):
                calls[f"{fault} while {name}"] = lambda generator, rounds=rounds, kind=kind, fault=fault: rounds(
                    kind(work / fault / kind.__name__, generator), args.rounds, log
                )
        for name, call in calls.items():
            if args.only not in name:
                continue
            started = time.perf_counter()
            try:
                found = call(random.Random(f"{args.seed} {name}"))
                counts = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
                seconds = time.perf_counter() - started
                print(f"{name}: survived {args.rounds} of {args.rounds} ({counts}; {seconds:.0f} s)")
            except Exception:
                ok = False
                print(f"{name}: NOT survived\n{traceback.format_exc()}")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
