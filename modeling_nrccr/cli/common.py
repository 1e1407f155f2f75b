"""What all commands share: their options, and how one ends that cannot go on: with one line, which says what is kept
and how to go on, whatever stopped it. Nothing here is slow to import.

`--debug` (or `NRCCR_DEBUG=1`) shows where an error was raised. Exit codes: 2 for what a user can put right, 130 after
Ctrl+C, 141 where nobody reads the output any more.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from datasets_scripts.reading.debian import FetchError

from ..recipes.limits import number


class Stopped(SystemExit):
    """Ends the script with an exit code; the line has been shown."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


def mistakes() -> tuple[type[Exception], ...]:
    """The errors whose message says what a user can put right."""
    translation = sys.modules.get("modeling_nrccr.translation.base")  # which takes long to import
    engines = () if translation is None else (translation.TranslationError,)
    return (ValueError, OSError, ImportError, FetchError, *engines)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options, as `command` does of everything else."""

    def error(self, message: str):
        raise ValueError(f"{message}; `{self.prog} --help` lists the options")


class _Renamed(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise ValueError(f"{option_string} is now {self.const}")


def renamed(options: argparse.ArgumentParser, old: str, new: str):
    """Let an old flag answer in one line what it is called now: `renamed(options, "--gallery", "--folder")`."""
    options.add_argument(old, action=_Renamed, const=new, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of `nrccr name`; the default of each option is shown by `--help`."""
    return Parser(
        prog=f"nrccr {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def add_model_options(options: argparse.ArgumentParser, does: str, batch_size: int = 32):
    """
    Add `--language`, `--device`, `--batch_size` and `--dtype`, which every command has that loads a model; the first
    is what `load_with_languages` reads.

    Args:
        does: what the first language does, for `--help`.
    """
    options.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="CODE[=FOLDER]",
        help="a language of the model, or what `nrccr add-language` wrote (its folder or file), under this code; may "
        f'be given several times, and the first {does}; "base" is the model without a language',
    )
    options.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU where there is one")
    options.add_argument("--batch_size", type=number(1), default=batch_size, help="texts or pictures at once")
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as they were saved"
    )


def command(kept: str = "nothing was kept: run it again to begin anew") -> Callable[[Callable], Callable]:
    """Return a decorator of a script's main function, which ends as this module says. `kept`: what of it stays after
    Ctrl+C, and how to go on."""

    def decorate(main: Callable) -> Callable:
        @wraps(main)
        def wrapped(*args, **kwargs):
            sys.excepthook = sys.__excepthook__
            show_what_can_be()
            try:
                try:
                    return main(*args, **kwargs)
                finally:
                    if sys.stdout:
                        sys.stdout.flush()  # while a closed pipe can still be told of
            except (KeyboardInterrupt, *mistakes()) as error:
                if os.environ.get("NRCCR_DEBUG"):
                    raise
                raise stopped(error, kept) from None

        return wrapped

    return decorate


def stopped(error: BaseException, kept: str) -> Stopped:
    """Show the line for `error`, and return what ends the script."""
    if isinstance(error, KeyboardInterrupt):
        line, code = f"stopped by Ctrl+C; {kept}", 130
    elif isinstance(error, BrokenPipeError) and nobody_reads():
        line, code = f"stopped, because nobody reads the output any more; {kept}", 141
    else:
        line, code = f"error: {error}", 2
    if sys.stderr:
        print(line, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun shows last
        Path(report).write_text(json.dumps({"message": line}), encoding="utf-8")
    return Stopped(line, code)


def nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed, as by `| head`; what is left goes nowhere then."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def show_what_can_be():
    """Letters that the terminal does not have are shown as question marks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _while_importing(kind: type[BaseException], error: BaseException, trace):
    if os.environ.get("NRCCR_DEBUG") or not issubclass(kind, (KeyboardInterrupt, ImportError)):
        sys.__excepthook__(kind, error, trace)
    else:
        os._exit(stopped(error, "nothing had begun").code)


if Path(sys.argv[0] if sys.argv else "").stem in ("nrccr", "__main__", "train"):
    sys.excepthook = _while_importing  # until `command` does it
try:
    os.getcwd()
except FileNotFoundError:
    print("error: the working folder has been deleted: change to another one, such as `cd ~`", file=sys.stderr)
    os._exit(2)
