"""Things that are chosen by a name, each imported when it is asked for; those of others are named `module:Class`."""

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any


class Registry(Mapping):
    """
    Maps names to what they stand for. `my_module:MyClass`, which Python can import, names a thing of one's own, so
    that a new one needs no line here.

    Args:
        what: is named, in the singular, for messages: "translation engine".
        entries: names, and `module:attribute` of each, or the thing itself.
        package: relative modules (`.apertium:ApertiumTranslator`) are in it.
    """

    def __init__(self, what: str, entries: Mapping[str, Any], package: str | None = None):
        self.what, self.entries, self.package = what, dict(entries), package

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Any:
        if name in self.entries:
            entry = self.entries[name]
        elif ":" in name and name.partition(":")[0].replace(".", "").isidentifier():
            entry = name
        else:
            raise UnknownName(self.describe(name))
        return self.load(entry) if isinstance(entry, str) else entry

    def split(self, spec: str) -> tuple[str, str]:
        """Return the name of `name:argument`, or `my_module:MyClass` of `my_module:MyClass:argument`; and the
        argument, which may be empty."""
        name, _, argument = spec.partition(":")
        attribute, _, rest = argument.partition(":")
        if name not in self.entries and attribute.isidentifier():
            return f"{name}:{attribute}", rest
        return name, argument

    def load(self, entry: str) -> Any:
        """Import what `module:attribute` names. Raises UnknownName where there is none."""
        module, _, attribute = entry.partition(":")
        try:
            return getattr(importlib.import_module(module, self.package), attribute)
        except ModuleNotFoundError as error:
            if error.name != module:  # a library that the module needs is missing, which its own message says
                raise
            raise UnknownName(f"{self.describe(entry)}; there is no module {module!r} on Python's path") from error
        except AttributeError as error:
            raise UnknownName(f"{self.describe(entry)}; {module} has no {attribute!r}") from error

    def describe(self, name: str) -> str:
        """Return the message for a name that is not known: the nearest ones, and all."""
        nearest = difflib.get_close_matches(name, self.entries, n=1)
        hint = f" (do you mean {nearest[0]}?)" if nearest else ""
        return f"unknown {self.what} {name!r}{hint}: there are {', '.join(self.entries)}, and your own as module:Class"


class UnknownName(ValueError, KeyError):
    """Is raised for a name that a registry does not have."""

    __str__ = ValueError.__str__
