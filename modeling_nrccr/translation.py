"""Machine translation of captions: engines behind one call, and the pseudo-parallel columns made with them."""

import hashlib
import inspect
import os
import re
import shutil
import signal
import subprocess
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging

from .language_codes import closest_code, nearest_codes, standard_code


logger = logging.get_logger(__name__)

# Apertium's data in Debian: a package is named by its two languages.
_DEBIAN_PACKAGES = [
    f"apertium-{pair}"
    for pair in (
        "afr-nld arg-cat bel-rus br-fr cat-ita cat-srd en-gl eng-cat eng-spa eo-ca eo-en eo-es eo-fr es-gl es-pt "
        "es-ro eu-en eu-es fr-es fra-cat fra-frp hbs-eng hbs-mkd hbs-slv ind-zlm isl-eng isl-swe mkd-bul mkd-eng "
        "nno-nob oc-ca oc-es oci-fra pol-szl por-cat pt-gl rus-ukr spa-arg spa-ast spa-cat spa-ita srd-ita swe-dan "
        "urd-hin"
    ).split()
]
_PAIRS_SHOWN = 40  # in messages


class TranslationError(RuntimeError):
    """The engine is not to be had, died, or did not answer; the message names the pair and what the engine said."""


def debian_package(source: str, target: str) -> str:
    """The Debian package of an Apertium pair, given as ISO 639-1 codes."""
    packages = {frozenset(map(standard_code, name.split("-")[1:])): name for name in _DEBIAN_PACKAGES}
    pair = frozenset(map(standard_code, (source, target)))
    if pair not in packages:
        known = ", ".join(sorted("-".join(sorted(other)) for other in packages if other & pair)) or "none with either"
        raise ValueError(f"no Debian package of Apertium is known here for {source}-{target}; known: {known}")
    return packages[pair]


def one_line(text: str) -> str:
    """A text as engines get it and caches know it: accents composed (NFC), control characters and line breaks single
    spaces."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", unicodedata.normalize("NFC", text)).split())


def file_fingerprint(paths: Iterable[str | Path]) -> str:
    """Of the names and contents of files, wherever they lie; for `version`."""
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
        """The pairs `(source, target)` of language codes that this installation has."""
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
        The supported pair that is meant: `pt-BR` is `pt` where there is but one Portuguese, `glg` is `gl`.

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


class ApertiumTranslator(Translator):
    """
    Rule-based translation by [Apertium](https://apertium.org), on one CPU. The same captions give the same answers,
    but its taggers learn words as they read: an answer can depend a little on what else is in the same call.

    Args:
        root (`str` or `Path`, *optional*): a folder into which Apertium's Debian packages are unpacked (it holds
            `usr/`); without it, the `apertium` on the PATH.
        timeout (`float`, defaults to 300): seconds for a batch of up to 1,000 captions.
    """

    name = "apertium"

    def __init__(self, root: str | Path | None = None, timeout: float = 300):
        self.timeout = timeout
        self._environ = {**os.environ, "LC_ALL": "C.UTF-8"}
        if root is None:
            self._command = [shutil.which("apertium") or ""]
            if not self._command[0]:
                raise TranslationError(
                    "no apertium on the PATH: install the Debian packages apertium and the pair's (such as "
                    "apertium-en-gl), or pass root=, the folder into which they are unpacked"
                )
            default = Path(self._command[0]).resolve().parent.parent / "share/apertium"
            self._data = Path(os.environ.get("APERTIUM_DATADIR") or default)
        else:
            self._data = Path(root).resolve() / "usr/share/apertium"
            self._command = self._use_root(Path(root).resolve(), self._data)
        names = [mode for mode in self._run(["-l"]).split() if re.fullmatch(r"[a-z]{2,3}-[a-z]{2,3}", mode)]
        codes = [mode.split("-") for mode in reversed(names)]  # the first mode of a pair stays
        self._modes = {(standard_code(a), standard_code(b)): f"{a}-{b}" for a, b in codes}

    @cached_property
    def version(self) -> str:
        """Of the data of all pairs together."""
        return file_fingerprint(sorted(file for file in self._data.rglob("*") if file.is_file()))

    def _use_root(self, root: Path, data: Path) -> list[str]:
        """Aim an unpacked Apertium at itself: its modes name files below `/usr`, which are elsewhere here."""
        if not (data / "modes").is_dir() or not (root / "usr/bin/apertium").is_file():
            raise TranslationError(
                f"{root} lacks usr/bin/apertium or usr/share/apertium/modes: unpack apertium and a pair into it "
                f"(`dpkg-deb -x apertium-en-gl_*.deb {root}`)"
            )
        self._modes_dir = tempfile.TemporaryDirectory(prefix="apertium-modes-")  # root may be read-only
        modes = Path(self._modes_dir.name, "modes")
        modes.mkdir()
        quoted = str(data).replace("'", "'\\''")  # modes are shell text with paths in single quotes
        for mode in (data / "modes").glob("*.mode"):
            text = re.sub(r"(?<![\w./-])/usr/share/apertium", lambda _: quoted, mode.read_text(encoding="utf-8"))
            (modes / mode.name).write_text(text, encoding="utf-8")
        libraries = [str(folder) for top in ("usr/lib", "lib") for folder in (root / top).glob("*-linux-*")]
        binaries = str(root / "usr/bin")
        for variable, folders in (("PATH", [binaries]), ("LD_LIBRARY_PATH", libraries)):
            old = os.environ.get(variable)
            self._environ[variable] = os.pathsep.join(folders + ([old] if old else []))
        self._environ |= {"APERTIUM_PATH": binaries, "APERTIUM_DATADIR": str(data)}
        return [f"{binaries}/apertium", "-d", self._modes_dir.name]

    def _run(self, arguments: list[str], text: str = "") -> str:
        command = [*self._command, *arguments]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environ,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # apertium is a shell pipeline: the whole group is ended, not the shell alone
        )
        label = f"apertium {arguments[-1]}"
        try:
            output, errors = process.communicate(text, timeout=self.timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TranslationError(f"{label} did not answer within {self.timeout:g} s") from error
            raise
        if process.returncode or (text.strip() and not output.strip()):
            says = " ".join(errors.split())[-500:] or "nothing"
            raise TranslationError(f"{label} ended with status {process.returncode} and said: {says}")
        return output

    def supported_pairs(self) -> list[tuple[str, str]]:
        return sorted(self._modes)

    def _how_to_add(self, source: str, target: str) -> str:
        try:
            return f"; install the Debian package {debian_package(source, target)}"
        except ValueError:
            return "; `apt-cache search ^apertium-` lists the Debian packages of other pairs"

    def _translate(self, texts: list[str], source: str, target: str) -> list[str]:
        return self._translate_batch(texts, self._modes[source, target])

    def _translate_batch(self, texts: list[str], mode: str) -> list[str]:
        # A blank line ends a paragraph, and so a sentence: neighbours do not mix. -u hides the marks of unknown words.
        output = self._run(["-u", "-f", "txt", mode], "\n\n".join(texts) + "\n\n")
        answers = output.removesuffix("\n\n").split("\n\n")
        if len(answers) == len(texts):
            return answers
        if len(texts) == 1:
            return [output]
        half = len(texts) // 2
        return self._translate_batch(texts[:half], mode) + self._translate_batch(texts[half:], mode)


def _seq2seq() -> type[Translator]:
    from .translation_seq2seq import Seq2SeqTranslator

    return Seq2SeqTranslator


def _ctranslate2() -> type[Translator]:
    from .translation_ctranslate2 import CTranslate2Translator

    return CTranslate2Translator


def _dictionary() -> type[Translator]:
    from .translation_dictionary import DictionaryTranslator

    return DictionaryTranslator


def _chat() -> type[Translator]:
    from .translation_chat import ChatTranslator

    return ChatTranslator


def _file() -> type[Translator]:
    from .translation_file import FileTranslator

    return FileTranslator


# Classes, or functions that import one when it is asked for: each has its own libraries.
_TRANSLATORS = {
    "apertium": ApertiumTranslator, "seq2seq": _seq2seq, "ctranslate2": _ctranslate2, "dictionary": _dictionary,
    "chat": _chat, "file": _file,
}  # fmt: skip
_FORMS = (
    "apertium, seq2seq:ID_OR_FOLDER, ctranslate2:FOLDER, dictionary:PAIR_OR_FILE, chat:MODEL@URL, file:PATH, and "
    'A+es+B for two in a row; what holds a "," or "+es+" of its own is put in double quotes: file:"a,b.tsv"'
)
_QUOTED = r'"[^"]*"'
_PIVOT = re.compile(rf"({_QUOTED})|\+([a-z]{{2,3}}(?:-[A-Za-z0-9]+)*)\+")


def split_engines(specs: str) -> list[str]:
    """The specs of several engines, joined by ','; not at one that stands in double quotes, as in
    `apertium,file:"a,b.tsv"`. Raises ValueError for a quotation mark without its second."""
    if specs.count('"') % 2:
        raise ValueError(f"{specs!r} has an odd number of quotation marks: each opens or closes a path")
    return [part.strip() for part in re.findall(rf"(?:{_QUOTED}|[^,\"])+", specs) if part.strip()]


def split_spec(spec: str) -> tuple[list[str], list[str]]:
    """The engines of a spec and the languages between them: `apertium+es+apertium`, one engine twice by way of es.
    Nothing is split within double quotes, which stay."""
    engines, pivots, start = [], [], 0
    for match in _PIVOT.finditer(spec):
        if match[2]:
            engines.append(spec[start : match.start()])
            pivots.append(match[2])
            start = match.end()
    return [*engines, spec[start:]], pivots


def load_translator(spec: "str | Translator", **kwargs) -> Translator:
    """
    A translator by its description; one that is already made is returned.

    - `apertium`, `apertium:ROOT`: rules, on the PATH or below a folder.
    - `seq2seq:Helsinki-NLP/opus-mt-en-gl`, `seq2seq:FOLDER`: a Transformers model.
    - `ctranslate2:FOLDER`: the same, converted, faster on a CPU.
    - `dictionary:eng-ces`, `dictionary:FILE.index`: word by word, below `root=`.
    - `chat:MODEL@URL`: a chat-completion server, such as `chat:qwen3@http://localhost:8000/v1`.
    - `file:PATH`: ready translations, TSV, JSONL or Parquet.
    - `A+es+B`: two engines in a row by way of Spanish (`apertium+es+apertium`); more are possible.
    - `file:"a,b.tsv"`: a path with what parts engines stands in double quotes.

    Args:
        kwargs: for the engine; of several in a row each gets those that it knows.

    Raises:
        ValueError: no engine is called so; the message lists them.
        TranslationError: the engine is not to be had.
        ImportError: its library is not installed; the message has the `pip` command.
    """
    if isinstance(spec, Translator):
        return spec
    parts, pivots = split_spec(spec)
    engines: dict[str, Translator] = {}
    unused = set(kwargs)
    for part in parts:
        if part.partition(":")[0] not in _TRANSLATORS:
            raise ValueError(f"unknown translator {part!r}; known: {_FORMS}")
    for part in dict.fromkeys(parts):
        kind, _, argument = part.partition(":")
        argument = argument.replace('"', "")
        engine = _TRANSLATORS[kind]
        engine = engine if isinstance(engine, type) else engine()
        parameters = inspect.signature(engine).parameters
        if not argument and any(parameter.default is parameter.empty for parameter in list(parameters.values())[:1]):
            raise ValueError(f"{part!r} does not say which; known: {_FORMS}")
        accepted = kwargs.keys() & parameters if len(parts) > 1 else kwargs.keys()
        unused -= accepted
        engines[part] = engine(*filter(None, [argument]), **{key: kwargs[key] for key in accepted})
    if unused:
        raise TypeError(f"no engine of {spec!r} takes {', '.join(sorted(unused))}")
    if len(parts) == 1:
        return engines[spec]
    from .translation_chain import ChainTranslator

    return ChainTranslator([engines[part] for part in parts], pivots)


def _translate_column(split_name, dataset, column: str, translator: Translator, source: str, target: str) -> list[str]:
    texts = list(dataset[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            where = f"{split_name}, row {row} ({dataset['caption_id'][row]})"
            raise ValueError(f"{where}: {column} is {text!r}; fill it or leave the row out")
    try:
        return translator.translate(texts, source, target)
    except (ValueError, TranslationError) as error:
        raise type(error)(f"{split_name}, {column}: {error}") from error


def _replace_columns(dataset, columns: dict[str, list]):
    """Replace columns without rewriting the others (pictures); names, order and features stay."""
    order, features = dataset.column_names, dataset.features
    dataset = dataset.remove_columns(list(columns))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values, feature=features[name])
    return dataset.select_columns(order)


def add_translations(dataset_dict, translator: Translator, source: str = "en", target: str = "gl"):
    """
    Fill what machine translation has to fill in a `DatasetDict` with the columns of the builders.

    - `train`: `target_caption`, where there is none, from `source_caption`, with the engine's name as
      `target_origin`; `back_translation` from `target_caption`.
    - every other split: `source_caption` from the human `target_caption`, for query fusion. What was there is
      replaced: human English belongs in `reference_source_caption`. Where there is no human `target_caption`, the
      translation of `reference_source_caption` stands in, with the engine's name as `target_origin`, and a warning.

    Returns:
        `DatasetDict`: new, with the same columns, rows and pictures.
    """
    needed = ("caption_id", "source_caption", "target_caption", "back_translation", "target_origin", "target_language")
    result = {}
    for name, dataset in dataset_dict.items():
        missing = [column for column in needed if column not in dataset.column_names]
        if missing:
            raise ValueError(f"{name} lacks the columns {missing}; it has {dataset.column_names}")
        languages = set(dataset["target_language"])
        if languages - {target}:
            raise ValueError(f"{name} has target_language {languages}, not {target!r} alone")
        if not len(dataset):
            result[name] = dataset
        else:
            column = "source_caption" if name == "train" else "reference_source_caption"
            captions, origins = list(dataset["target_caption"]), list(dataset["target_origin"])
            rows = [row for row, caption in enumerate(captions) if caption is None]
            if rows and column in dataset.column_names:
                if name != "train":
                    logger.warning(
                        f"{name}: {len(rows)} of {len(captions)} rows have no human {target} caption; translations by "
                        f"{translator.name} stand in, so results on them are not results on human queries"
                    )
                subset = dataset.select_columns(["caption_id", column]).select(rows)
                made = _translate_column(name, subset, column, translator, source, target)
                for row, caption in zip(rows, made):
                    captions[row], origins[row] = caption, translator.name
                dataset = _replace_columns(dataset, {"target_caption": captions, "target_origin": origins})
            back = _translate_column(name, dataset, "target_caption", translator, target, source)
            filled = "back_translation" if name == "train" else "source_caption"
            result[name] = _replace_columns(dataset, {filled: back})
    return type(dataset_dict)(result)
