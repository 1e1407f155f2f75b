"""Machine translation of captions: engines behind one call, and the pseudo-parallel columns made with them."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging


logger = logging.get_logger(__name__)

# ISO 639-1 codes, as used everywhere else, and the ISO 639-3 codes that newer Apertium modes are named by.
_ISO_639_3 = dict(
    pair.split(":")
    for pair in (
        "af:afr an:arg be:bel bg:bul br:bre ca:cat cy:cym da:dan en:eng eo:epo es:spa eu:eus fr:fra gl:glg hi:hin "
        "id:ind is:isl it:ita mk:mkd ms:zlm nb:nob nl:nld nn:nno oc:oci pl:pol pt:por ro:ron ru:rus sc:srd sl:slv "
        "sv:swe uk:ukr ur:urd"
    ).split()
)
_ISO_639_1 = {long: short for short, long in _ISO_639_3.items()}
_DEBIAN_PACKAGES = {  # by the language that is paired with English
    "ca": "apertium-eng-cat",
    "eo": "apertium-eo-en",
    "es": "apertium-eng-spa",
    "eu": "apertium-eu-en",
    "gl": "apertium-en-gl",
    "is": "apertium-isl-eng",
    "mk": "apertium-mkd-eng",
}
_BATCH_SIZE = 1000


class TranslationError(RuntimeError):
    """The engine is not to be had, died, or did not answer; the message names the pair and what the engine said."""


def debian_package(source: str, target: str) -> str:
    """The Debian package of an Apertium pair, given as ISO 639-1 codes."""
    other = target if source == "en" else source
    if "en" not in (source, target) or other not in _DEBIAN_PACKAGES:
        known = ", ".join(f"en-{language}" for language in _DEBIAN_PACKAGES)
        raise ValueError(f"no Debian package of Apertium is known here for {source}-{target}; known: {known}")
    return _DEBIAN_PACKAGES[other]


class Translator:
    """
    Base class of the engines. A subclass sets `name`, which becomes the captions' `target_origin`, and implements
    `supported_pairs` and `_translate`.
    """

    name: str

    def supported_pairs(self) -> list[tuple[str, str]]:
        """The pairs `(source, target)` of language codes that this installation has."""
        raise NotImplementedError

    def _translate(self, texts: list[str], source: str, target: str) -> list[str]:
        """Translate distinct, non-empty, one-line texts of a supported pair."""
        raise NotImplementedError

    def _how_to_add(self, source: str, target: str) -> str:
        return ""

    def translate(self, texts: Sequence[str], source: str, target: str) -> list[str]:
        """
        Translate texts, one answer each, in order. Line breaks inside a text become spaces; equal texts are translated
        once.

        Args:
            texts (`Sequence[str]`): the captions, none of them empty.
            source (`str`), target (`str`): ISO 639-1 codes.

        Raises:
            ValueError: a text is empty or None (its row is named), or the pair is not installed.
            TranslationError: the engine failed.
        """
        pairs = self.supported_pairs()
        if (source, target) not in pairs:
            known = ", ".join(f"{a}-{b}" for a, b in pairs) or "none"
            raise ValueError(
                f"{self.name} has no pair {source}-{target} here; it has: {known}{self._how_to_add(source, target)}"
            )
        lines = []
        for row, text in enumerate(texts):
            line = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split()) if isinstance(text, str) else ""
            if not line:
                raise ValueError(f"row {row}: empty caption {text!r}, nothing to translate; leave it out")
            lines.append(line)
        distinct = sorted(set(lines))  # an engine may remember what it read: the order of rows must not matter
        answers = [" ".join(answer.split()) for answer in self._translate(distinct, source, target)]
        if len(answers) != len(distinct):
            raise TranslationError(
                f"{self.name} {source}-{target}: {len(distinct)} captions went in, {len(answers)} came out"
            )
        translated = dict(zip(distinct, answers))
        for row, line in enumerate(lines):
            if not translated[line]:
                raise TranslationError(f"{self.name} {source}-{target}: row {row}: no answer to {line!r}")
        return [translated[line] for line in lines]


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
                    f"{_DEBIAN_PACKAGES['gl']}), or pass root=, the folder into which they are unpacked"
                )
        else:
            self._command = self._use_root(Path(root).resolve())
        self._modes = [mode for mode in self._run(["-l"]).split() if re.fullmatch(r"[a-z]{2,3}-[a-z]{2,3}", mode)]

    def _use_root(self, root: Path) -> list[str]:
        """Aim an unpacked Apertium at itself: its modes name files below `/usr`, which are elsewhere here."""
        data = root / "usr/share/apertium"
        if not (data / "modes").is_dir() or not (root / "usr/bin/apertium").is_file():
            raise TranslationError(
                f"{root} lacks usr/bin/apertium or usr/share/apertium/modes: unpack apertium and a pair into it "
                f"(`dpkg-deb -x {_DEBIAN_PACKAGES['gl']}_*.deb {root}`)"
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
        pairs = (mode.split("-") for mode in self._modes)
        return sorted({(_ISO_639_1.get(a, a), _ISO_639_1.get(b, b)) for a, b in pairs})

    def _how_to_add(self, source: str, target: str) -> str:
        try:
            return f"; install the Debian package {debian_package(source, target)}"
        except ValueError:
            return "; `apt-cache search ^apertium-` lists the Debian packages of other pairs"

    def _translate(self, texts: list[str], source: str, target: str) -> list[str]:
        names = [(source, _ISO_639_3.get(source)), (target, _ISO_639_3.get(target))]
        mode = next(mode for mode in self._modes if all(code in name for code, name in zip(mode.split("-"), names)))
        answers = []
        with tqdm(total=len(texts), desc=f"apertium {mode}", disable=len(texts) <= _BATCH_SIZE) as progress:
            for start in range(0, len(texts), _BATCH_SIZE):
                answers += self._translate_batch(texts[start : start + _BATCH_SIZE], mode)
                progress.update(len(answers) - progress.n)
        return answers

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


_TRANSLATORS = {"apertium": ApertiumTranslator}


def load_translator(spec: "str | Translator", **kwargs) -> Translator:
    """A translator by name, `"apertium"`, with its arguments (`root=...`); one that is already made is returned."""
    if isinstance(spec, Translator):
        return spec
    if spec not in _TRANSLATORS:
        raise ValueError(f"unknown translator {spec!r}; known: {', '.join(_TRANSLATORS)}")
    return _TRANSLATORS[spec](**kwargs)


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
