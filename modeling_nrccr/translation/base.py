"""Machine translation of captions: engines behind one call, and the pseudo-parallel columns made with them."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging

from .language_codes import closest_code, nearest_codes


logger = logging.get_logger(__name__)

_PAIRS_SHOWN = 40  # in messages


class TranslationError(RuntimeError):
    """The engine is not to be had, died, or did not answer; the message names the pair and what the engine said."""


def one_line(text: str) -> str:
    """Return a text as engines get it and caches know it: accents composed (NFC), control characters and line breaks
    single spaces."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", unicodedata.normalize("NFC", text)).split())


def file_fingerprint(paths: Iterable[str | Path]) -> str:
    """Return a fingerprint of the names and contents of files, wherever they lie; for `version`."""
    digest = hashlib.blake2b(digest_size=8)
    for path in map(Path, paths):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[:length] + "..."


class Translator:
    """
    Base class of the engines. A subclass sets `name` and `version` and implements `supported_pairs` and `_translate`;
    one that cuts its batches itself (by length, say) also overrides `_batches`. Rows are checked, made distinct, put
    back in order and counted here and nowhere else.

    What is finished stays finished: [`~Translator.translate_batches`] hands out each batch as soon as it is done, so
    that a cache can store it before a later one fails:

        for batch, answers in translator.translate_batches(texts, "en", "gl"):
            store(batch, answers)

    An engine that wraps another one (a cache) is a `Translator` too: it overrides `translate_batches`, looks up what
    it has, passes the rest to the other's `translate_batches`, and takes over its `name`, `version` and
    `supported_pairs`; `translate` works unchanged on top.

    Attributes:
        name (`str`): becomes the captions' `target_origin`; no path of this machine.
        version (`str`): all else that decides an answer, for the keys of caches: the revision or fingerprint of a
            model or its data, and settings such as beams.
        batch_size (`int`): texts in a batch, unless `_batches` cuts them otherwise.
        leaves_untranslated (`bool`): a text without an answer stays as it is, and is counted; default: an error. Where
            more than half are without one it is an error too. A cache asks for such texts again.
    """

    name: str
    version: str = ""
    batch_size: int = 1000
    leaves_untranslated: bool = False

    def supported_pairs(self) -> list[tuple[str, str]]:
        """Return the pairs `(source, target)` of language codes that this installation has."""
        raise NotImplementedError

    def _batches(self, texts: list[str], source: str, target: str) -> Iterable[list[str]]:
        """Cut distinct texts into the batches that `_translate` gets: each text once, in any order."""
        return (texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size))

    def _translate(self, texts: list[str], source: str, target: str) -> list[str]:
        """Translate a batch of distinct, non-empty, one-line texts of a supported pair: one answer each, in order."""
        raise NotImplementedError

    def _how_to_add(self, source: str, target: str) -> str:
        return ""

    def check_pair(self, source: str, target: str) -> tuple[str, str]:
        """
        Return the supported pair that is meant: `pt-BR` is `pt` where there is but one Portuguese, `glg` is `gl`.

        Raises:
            ValueError: there is none; the message lists what there is, or the codes nearest to a wrong one.
        """
        pairs = self.supported_pairs()
        if (source, target) in pairs:
            return source, target
        sources = sorted({pair[0] for pair in pairs})
        first = closest_code(source, sources)
        targets = sorted({pair[1] for pair in pairs if first is None or pair[0] == first})
        second = closest_code(target, targets)
        if first and second:
            return first, second
        if len(pairs) <= _PAIRS_SHOWN:
            known = f"it has: {', '.join('-'.join(pair) for pair in pairs) or 'none'}"
        else:
            wrong = [(source, "source", sources)] if not first else []
            wrong += [(target, "target", targets)] if not second else []
            known = "; ".join(
                f"{code} is none of its {len(codes)} {side} languages, the nearest are {nearest_codes(code, codes)}"
                for code, side, codes in wrong
            )
        raise ValueError(f"{self.name} has no pair {source}-{target} here; {known}{self._how_to_add(source, target)}")

    def translate_batches(
        self, texts: Sequence[str], source: str, target: str
    ) -> Iterator[tuple[list[str], list[str]]]:
        """
        Translate distinct texts, each as [`one_line`] leaves it and not empty; yields `(texts, answers)` of a batch as
        soon as it is done. Batches come in the engine's order, every text in exactly one of them. An answer may be
        empty: `translate` refuses it, at the end.

        Raises:
            ValueError: the pair is not installed (at once, before the first batch is asked for).
            TranslationError: the engine failed. Batches that were handed out are good.
        """
        return self._checked_batches(list(texts), *self.check_pair(source, target))

    def _checked_batches(self, texts: list[str], source: str, target: str) -> Iterator[tuple[list[str], list[str]]]:
        where = f"{self.name} {source}-{target}"
        for batch in self._batches(texts, source, target):
            answers = self._translate(batch, source, target)
            if len(answers) != len(batch):
                raise TranslationError(f"{where}: {len(batch)} captions went in, {len(answers)} came out")
            for text, answer in zip(batch, answers):
                if not isinstance(answer, str):
                    raise TranslationError(f"{where}: the answer to {_shorten(text)!r} is no text but {answer!r}")
                if "\ufffd" in answer and "\ufffd" not in text:
                    raise TranslationError(
                        f"{where}: the answer to {_shorten(text)!r} is not in UTF-8: {_shorten(answer)!r}"
                    )
            yield batch, [one_line(answer) for answer in answers]

    def translate(
        self, texts: Sequence[str], source: str, target: str, show_progress: bool | None = None
    ) -> list[str]:
        """
        Translate texts, one answer each, in order. Line breaks inside a text become spaces; equal texts are translated
        once.

        Args:
            texts (`Sequence[str]`): the captions, none of them empty.
            source (`str`), target (`str`): ISO 639-1 codes, or BCP 47.
            show_progress (`bool`, *optional*): a bar of distinct texts; by default one that appears after two seconds.

        Raises:
            ValueError: a text is empty or None (its row is named), or the pair is not installed.
            TranslationError: the engine failed.
        """
        source, target = self.check_pair(source, target)
        lines = [one_line(text) if isinstance(text, str) else "" for text in texts]
        for row, line in enumerate(lines):
            if not line:
                raise ValueError(f"row {row}: empty caption {texts[row]!r}, nothing to translate; leave it out")
        distinct = sorted(set(lines))  # an engine may remember what it read: the order of rows must not matter
        translated: dict[str, str] = {}
        count = 0
        bar = {"desc": f"{self.name} {source}-{target}", "unit": "caption", "delay": 0 if show_progress else 2}
        with tqdm(total=len(distinct), disable=show_progress is False, **bar) as progress:
            for batch, answers in self.translate_batches(distinct, source, target):
                translated.update(zip(batch, answers))
                count += len(batch)
                progress.update(len(batch))
        if translated.keys() != set(distinct) or count != len(distinct):
            raise TranslationError(
                f"{self.name} {source}-{target}: {len(distinct)} captions went in, {count} answers came to "
                f"{len(translated.keys() & set(distinct))} of them"
            )
        silent = [row for row, line in enumerate(lines) if not translated[line]]
        if silent:
            first = f"row {silent[0]}: no answer to {_shorten(lines[silent[0]])!r}"
            if not self.leaves_untranslated or 2 * len(silent) > len(lines):
                raise TranslationError(
                    f"{self.name} {source}-{target}: {first} ({len(silent)} of {len(lines)} rows); leave it out"
                )
            logger.warning(
                f"{self.name} {source}-{target}: {len(silent)} of {len(lines)} captions stay as they are: {first}"
            )
        return [translated[line] or line for line in lines]
