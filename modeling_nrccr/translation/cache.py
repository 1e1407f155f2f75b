"""Answers of translation engines, kept on disk: what was translated once is not translated again."""

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from datasets_scripts.reading.debian import cache_folder

from .base import TranslationError, Translator
from .engines import load_translator, prepare_translator


FORMAT = 1  # of the file, as `PRAGMA user_version`
TEXTS_A_QUERY = 500  # older SQLite takes 999 parameters
SECONDS_BETWEEN_LOOKS = 2  # at what the other processes have finished


class TranslationCache:
    """
    One SQLite file of answers by (engine, version, source, target, text). Several processes may read and write it at
    once; a batch is stored whole or not at all, whatever is killed. No write-ahead log: it must work on the network
    folder that several machines share.

    Args:
        path (`str` or `Path`): the file; made, with its folder, when first needed.
        timeout (`float`, defaults to 60): seconds to wait for another process that writes.
    """

    def __init__(self, path: str | Path, timeout: float = 60):
        self.path, self.timeout = Path(path), timeout

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # opened for each batch: nothing is held over a fork, between threads, or while an engine works
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=self.timeout, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise OSError(
                f"{self.path}: the translation cache cannot be opened ({error}); name another file, or set NRCCR_CACHE"
            ) from error
        try:
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                self._create(connection)
            elif found != FORMAT:
                raise ValueError(
                    f"{self.path} is a translation cache of format {found}, this version reads {FORMAT}: name another"
                )
            yield connection
        except sqlite3.OperationalError as error:  # locked, full disk, read-only; an open transaction is rolled back
            raise OSError(f"{self.path}: the translation cache cannot be used ({error})") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no translation cache ({error}); move it away or name another") from error
        finally:
            connection.close()

    @staticmethod
    def _create(connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            connection.execute(
                "CREATE TABLE translations (engine TEXT, version TEXT, source TEXT, target TEXT, text TEXT, "
                "translation TEXT NOT NULL, PRIMARY KEY (engine, version, source, target, text)) WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        elif connection.execute("PRAGMA user_version").fetchone()[0] == 0:  # not: another process was faster
            raise sqlite3.DatabaseError("it holds other tables")
        connection.execute("COMMIT")

    def lookup(self, translator: Translator, source: str, target: str, texts: Iterable[str]) -> dict[str, str]:
        """Look up the answers that there are, by text; an empty one says that the engine had none."""
        keys = {text: _storable(text) for text in texts}
        wanted, found = list(dict.fromkeys(keys.values())), {}
        if not wanted:
            return found
        with self._connection() as connection:
            for start in range(0, len(wanted), TEXTS_A_QUERY):
                chunk = wanted[start : start + TEXTS_A_QUERY]
                found |= connection.execute(
                    "SELECT text, translation FROM translations WHERE engine = ? AND version = ? AND source = ? "
                    f"AND target = ? AND text IN ({', '.join('?' * len(chunk))})",
                    (translator.name, translator.version, source, target, *chunk),
                )
        return {text: found[key] for text, key in keys.items() if key in found}

    def store(
        self, translator: Translator, source: str, target: str, texts: Sequence[str], answers: Sequence[str]
    ) -> None:
        """
        Store a batch in one transaction. The first answer to a text stays, so that all processes see the same; an
        empty one gives way.
        """
        key = (translator.name, translator.version, source, target)
        rows = [(*key, _storable(text), _storable(answer)) for text, answer in zip(texts, answers, strict=True)]
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                "INSERT INTO translations VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "translation = excluded.translation WHERE translation = ''",
                rows,
            )
            connection.execute("COMMIT")


def _storable(text: str) -> str:
    """Make half a surrogate pair, which no file can hold, a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


class CachedTranslator(Translator):
    """
    A translator that asks its engine only for what the cache lacks, and stores each batch as soon as it is finished:
    whatever ends the process, the next one goes on from there.

    Args:
        translator (`Translator`): the engine.
        cache (`TranslationCache`, `str` or `Path`): where its answers are kept.
        state (`PartialState`, *optional*): of a launch of several processes, all of which make the same calls. Each
            translates its share of the texts, and gets all answers. `cache` must be one file for all of them.

    Attributes:
        num_translated, num_found (`int`): distinct texts that the engine translated in this process, and that the
            cache had.
    """

    def __init__(
        self, translator: Translator, cache: "TranslationCache | str | Path", state: PartialState | None = None
    ):
        self.translator, self.state = translator, state
        self.name, self.version = translator.name, translator.version
        self.leaves_untranslated = translator.leaves_untranslated
        self.cache = cache if isinstance(cache, TranslationCache) else TranslationCache(cache)
        self.num_translated = self.num_found = 0

    def supported_pairs(self) -> list[tuple[str, str]]:
        return self.translator.supported_pairs()

    def check_pair(self, source: str, target: str) -> tuple[str, str]:
        return self.translator.check_pair(source, target)

    def translate(
        self, texts: Sequence[str], source: str, target: str, show_progress: bool | None = None
    ) -> list[str]:
        if self.state is not None and not self.state.is_main_process:
            show_progress = False  # one bar for all
        return super().translate(texts, source, target, show_progress)

    def translate_batches(
        self, texts: Sequence[str], source: str, target: str
    ) -> Iterator[tuple[list[str], list[str]]]:
        return self._cached_batches(list(texts), *self.check_pair(source, target))

    def _found(self, texts: Iterable[str], source: str, target: str) -> dict[str, str]:
        """Return what an engine answered. Where it had no answer, it is asked again."""
        found = self.cache.lookup(self.translator, source, target, texts)
        return {text: answer for text, answer in found.items() if answer}

    def _cached_batches(self, texts: list[str], source: str, target: str) -> Iterator[tuple[list[str], list[str]]]:
        found = self._found(texts, source, target)
        self.num_found += len(found)
        yield list(found), list(found.values())
        rank, count = (0, 1) if self.state is None else (self.state.process_index, self.state.num_processes)
        # Dealt out by the place in the whole list, not among those that are wanting, which differ from one process to
        # the next when one is already at work. Every share has texts of every length, in order.
        mine = [text for text in texts[rank::count] if text not in found]
        others = {text for i, text in enumerate(texts) if i % count != rank and text not in found}
        looked = time.monotonic()
        for batch, answers in self.translator.translate_batches(mine, source, target):
            self.cache.store(self.translator, source, target, batch, answers)
            self.num_translated += len(batch)
            yield batch, answers
            if others and time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                found = self._found(others, source, target)
                others -= found.keys()
                yield list(found), list(found.values())
                looked = time.monotonic()
        if self.state is not None:
            self.state.wait_for_everyone()
        if others:
            found = self.cache.lookup(self.translator, source, target, others)
            if missing := others - found.keys():
                raise TranslationError(
                    f"{self.cache.path} lacks {len(missing):,} texts that other processes translated, such as "
                    f"{min(missing)!r}: it must lie in a folder that all machines of the launch share"
                )
            yield list(found), list(found.values())


def translation_cache_path() -> Path:
    """Return where all examples keep what was translated, whatever the data set."""
    return cache_folder() / "translations.sqlite"


def load_engine(
    spec: str,
    pairs: list[tuple[str, str]],
    data_dir: str | None = None,
    cache: str | Path | None = None,
    state: PartialState | None = None,
    needed: list[tuple[str, str]] | None = None,
    **options,
) -> CachedTranslator:
    """
    Load the engine of a spec, see [`load_translator`], behind the cache. What `apertium` and `dictionary` (without a
    name: that of the pair) need of Debian is fetched.

    Args:
        pairs: what is wanted, `(source, target)`; the way back comes last.
        cache: file of what was translated before; by default one for all data sets.
        state: of several processes that all make the same calls, see [`CachedTranslator`].
        needed: those of `pairs` that the engine must have; default: all.
        options: of the engines.

    Raises:
        ValueError: the engine lacks one of the pairs; before the first is translated.
    """
    target_language, source_language = pairs[-1]
    spec, root = prepare_translator(spec, source_language, target_language, data_dir)
    translator = load_translator(spec, **root, **options)
    for pair in pairs if needed is None else needed:
        translator.check_pair(*pair)
    return CachedTranslator(translator, cache or translation_cache_path(), state)
