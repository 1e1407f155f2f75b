"""Apertium: rules, one pair of languages after the other, in a process of its own."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path

from .base import TranslationError, Translator, file_fingerprint
from .language_codes import standard_code
from .pairs import APERTIUM


def debian_package(source: str, target: str) -> str:
    """Return the Debian package of an Apertium pair, given as ISO 639-1 codes. Raises ValueError where none is
    known."""
    packages = {frozenset(map(standard_code, pair.split("-"))): f"apertium-{pair}" for pair in APERTIUM}
    pair = frozenset(map(standard_code, (source, target)))
    if pair not in packages:
        known = ", ".join(sorted("-".join(sorted(other)) for other in packages if other & pair)) or "none with either"
        raise ValueError(f"no Debian package of Apertium is known here for {source}-{target}; known: {known}")
    return packages[pair]


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
