"""How the adapter of a language is described: by its settings, of which one is its kind."""

import math
from collections.abc import Mapping
from typing import Any

from .registry import Registry


ADAPTERS = Registry(
    "kind of adapter",
    {
        "linear": ".language_adapters:linear",
        "bottleneck": ".language_adapters:bottleneck",
        "dynamic": ".language_adapters:DynamicUpdate",
        "lora": ".language_adapters:lora",
        "none": ".language_adapters:none",
    },
    __package__,
)
DEFAULTS = {"kind": "linear", "center": True, "noise": 0.0, "rank": 64, "layers": 2}


def check_adapter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return all the settings of an adapter: those that are given, and the defaults.

    Args:
        settings: as [`NrccrLanguageAdapter`] takes them.

    Raises:
        ValueError: for a name or a value that cannot be.
    """
    if unknown := settings.keys() - DEFAULTS.keys():
        raise ValueError(f"adapter: unknown {', '.join(sorted(unknown))}; its settings are {', '.join(DEFAULTS)}")
    checked = {name: settings.get(name, default) for name, default in DEFAULTS.items()}
    kind, center, noise, rank, layers = checked.values()
    if not isinstance(kind, str) or (kind not in ADAPTERS.entries and ":" not in kind):
        raise ValueError(f"kind={kind!r} of a language adapter: {ADAPTERS.describe(str(kind))}")
    if type(center) is not bool:
        raise ValueError(f"center={center!r} of a language adapter: true or false")
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise!r} of a language adapter: a number, 0 or more")
    for name, number, least in (("rank", rank, 1), ("layers", layers, -1)):
        if type(number) is not int or number < least:
            raise ValueError(f"{name}={number!r} of a language adapter: an integer, {least} or more")
    return checked
