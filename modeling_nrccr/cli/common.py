"""What all commands share: their options, and how one ends that cannot go on: with one line, which says what is kept
and how to go on, whatever stopped it. Nothing here is slow to import.

`--debug` (or `NRCCR_DEBUG=1`) shows where an error was raised. Exit codes: 2 for what a user can put right, 130 after
Ctrl+C, 141 where nobody reads the output any more.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path

from datasets_scripts.reading.debian import FetchError

from ..recipes.limits import number
from .launch import WORKER as WORKER


class Stopped(SystemExit):
    """Ends the script with an exit code; the line has been shown."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


def mistakes() -> tuple[type[Exception], ...]:
    """Return the errors whose message says what a user can put right."""
    translation = sys.modules.get("modeling_nrccr.translation.base")  # which takes long to import
    engines = () if translation is None else (translation.TranslationError,)
    return (ValueError, OSError, ImportError, FetchError, *engines)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options, as `command` does of everything else."""

    def error(self, message: str):
        raise ValueError(f"{message}; `{self.prog} --help` lists the options")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of examples as they are."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


class RecipeParser(Parser):
    """
    Reads what a command has beside the fields of its recipe, which `parse_fields` reads (`parse_known_args` leaves
    them); `--help` lists the fields of the dataclasses.
    """

    def __init__(self, name: str, doc: str, *classes: type, arguments: str = ""):
        description, examples = doc.split("\n\n", 1)
        super().__init__(
            prog=f"nrccr {name}",
            description=description,
            epilog=f"{examples}\nEach field of transformers.TrainingArguments is an option too: --help_all lists all.",
            usage=f"nrccr {name} {arguments}[options]",
            formatter_class=Help,
            allow_abbrev=False,
        )
        self.classes = classes
        self.add_argument("--help_all", action="store_true", help="list those of training too")

    def format_help(self) -> str:
        for part in self.classes:
            group = self.add_argument_group(part.__doc__.rstrip("."))
            for field in fields(part):
                if field.init:
                    default = argparse.SUPPRESS if field.default in (None, "") else field.default
                    text = field.metadata["help"].replace("%", "%%")
                    group.add_argument(f"--{field.name}", metavar=_kind(field.type), default=default, help=text)
        self.classes = ()
        return super().format_help()


def _kind(annotation: object) -> str:
    """Return how `--help` calls the values of a field."""
    names = {"bool": "true|false", "int": "N", "float": "X", "str": "TEXT"}
    return next(word for name, word in names.items() if name in str(annotation))


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
        formatter_class=Help,
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
            show_progress()
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
            except RuntimeError as error:
                if os.environ.get(WORKER) and "Connection closed by peer" in str(error):
                    sys.exit(1)  # the process that it waits for has said why it ended
                raise

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
    if sys.stderr and not os.environ.get(WORKER):
        print(line, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun shows last, and `start_processes` alone
        Path(report).write_text(json.dumps({"message": line}), encoding="utf-8")
    return Stopped(line, code)


def nobody_reads() -> bool:
    """Tell whether standard output is a pipe that was closed, as by `| head`; what is left goes nowhere then."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


class _Progress(logging.Handler):
    """Shows what the package says while it works, beside what a command prints: on standard error as it is now."""

    def emit(self, record: logging.LogRecord):
        if sys.stderr:
            print(self.format(record), file=sys.stderr, flush=True)


def show_progress():
    """Show what the package says, once in all processes of a run; its warnings are shown of each."""
    logger = logging.getLogger(__package__.partition(".")[0])
    logger.setLevel(logging.WARNING if int(os.environ.get("RANK", 0)) else logging.INFO)
    if not any(isinstance(handler, _Progress) for handler in logger.handlers):
        logger.addHandler(_Progress())


def show_what_can_be():
    """Show letters that the terminal does not have as question marks."""
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
