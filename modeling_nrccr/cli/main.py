"""The command `nrccr`: finds the module of a command's name, which parses, calls the package, and prints."""

import importlib
import os
import sys

from .common import command


# name -> module of this folder, and what it does; by what people do with it
COMMANDS = {
    "add-language": ("add_language", "add a language to a dual encoder that you have"),
    "train": ("train", "train a model by a recipe"),
    "translate": ("translate", "translate the captions of a data set"),
    "noise": ("noise", "measure what is wrong with translations"),
    "train-translator": ("train_translator", "train a small translation model"),
    "evaluate": ("evaluate", "test a model on human captions"),
    "mteb": ("mteb", "test a model on tasks of MTEB"),
    "index": ("index", "index a folder of pictures and videos"),
    "search": ("search", "search an index, or a folder of pictures"),
    "serve": ("serve", "answer queries over HTTP"),
    "export": ("export", "write a model for other applications"),
    "push": ("push", "publish a model or a language on the Hub"),
    "features": ("features", "extract features of pictures and videos"),
    "convert": ("convert", "read a checkpoint of the released code"),
    "space": ("space", "write a Space to try a model in a browser"),
    "data": ("data", "check a data set, or push it to the Hub"),
    "list": ("list", "list losses, engines, data sets, adapters, encoders, recipes, languages"),
    "env": ("env", "print versions, extras and devices, for a bug report"),
}


def usage() -> str:
    """Return what `nrccr --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nrccr COMMAND ...",
            "",
            "Add a language to the picture search that you have, and use it.",
            "",
            *lines,
            "",
            "`nrccr COMMAND --help` has the options. `--debug`, anywhere, shows where an error was raised.",
        ]
    )


@command()
def main(argv: list[str] | None = None):
    """
    Run a command.

    Args:
        argv: what stands after `nrccr`; default: of this process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in argv:
        argv.remove("--debug")
        os.environ["NRCCR_DEBUG"] = "1"
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        from .. import __version__

        print(__version__)
    elif name in COMMANDS:
        run(COMMANDS[name][0], argv[1:])
    else:
        from difflib import get_close_matches

        nearest = get_close_matches(name, COMMANDS, n=1)
        hint = f": do you mean nrccr {nearest[0]}?" if nearest else "; `nrccr --help` lists those that there are"
        print(f"error: nrccr has no command {name!r}{hint}", file=sys.stderr)
        sys.exit(2)


def run(module: str, argv: list[str]):
    """Run the command of a module, with what stands after its name."""
    importlib.import_module(f".{module}", __package__).main(argv)
