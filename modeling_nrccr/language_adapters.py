"""What a language adds to a text side that stays as it is: a small residual that starts as the identity."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .adapter_settings import ADAPTERS, DEFAULTS, check_adapter


class NrccrLanguageAdapter(nn.Module):
    r"""
    `x + shift + update(x + shift)`, on pooled states of the text encoder. At first `shift` and `update` are zero.

    Args:
        width (`int`): Of the pooled states.
        kind (`str`): Of those in `ADAPTERS`, by default "linear"; or one of your own, `my_module:MyUpdate`: an
            `nn.Module` that is built as `MyUpdate(width, rank)` and maps `(batch_size, width)` to the same. At first
            its last Linear is zero, or what its method `reset` makes so. A file that names it is read where
            `my_module` has been imported, and nowhere else.
        center (`bool`): Training begins by moving the language's mean state to the base language's.
        noise (`float`): In training, Gaussian noise on the states, in units of their standard deviation.
        rank (`int`): Width of the bottleneck, of the dynamic matrix, or rank of LoRA.
        layers (`int`): How many of the encoder's top layers have LoRA; -1: all.
    """

    def __init__(self, width: int, **settings: Any):
        super().__init__()
        for name, value in check_adapter(settings).items():
            setattr(self, name, value)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("deviation", torch.zeros(width))
        self.update = make_update(self.kind, width, self.rank)

    def settings(self) -> dict[str, Any]:
        """Return what builds it again."""
        return {name: getattr(self, name) for name in DEFAULTS}

    def reset(self):
        """Make it the identity again."""
        init.zeros_(self.shift)
        init.zeros_(self.deviation)
        if hasattr(self.update, "reset"):
            self.update.reset()
        elif self.update is not None:
            last = linears(self.update)[-1]
            init.zeros_(last.weight)
            init.zeros_(last.bias)

    @torch.no_grad()
    def calibrate(self, base: torch.Tensor, states: torch.Tensor):
        """Set the shift and the size of the noise by pooled states of captions in the base language and in this one,
        each `(num_captions, width)`."""
        if self.center:
            self.shift.copy_(base.mean(0) - states.mean(0))
        self.deviation.copy_(states.std(0))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map pooled states of shape `(batch_size, width)`, to the same shape."""
        if self.training and self.noise:
            states = states + self.noise * self.deviation * torch.randn_like(states)
        states = states + self.shift
        return states if self.update is None else states + self.update(states)


def make_update(kind: str, width: int, rank: int) -> nn.Module | None:
    """
    Return what is added to the states.

    Raises:
        ImportError: for one of others whose module nobody has imported: a file must not choose what is.
        ValueError: for what cannot be an update.
    """
    module = kind.partition(":")[0]
    if kind not in ADAPTERS.entries and module not in sys.modules:
        raise ImportError(
            f"the adapter is of the kind {kind!r}, which others wrote: import {module} first, if you trust it"
        )
    build = ADAPTERS[kind]
    if kind in ADAPTERS.entries:
        return build(width, rank)
    if not (isinstance(build, type) and issubclass(build, nn.Module)):
        raise ValueError(f"kind={kind!r} of a language adapter: no subclass of nn.Module")
    update = build(width, rank)
    if not hasattr(update, "reset") and not linears(update):
        raise ValueError(f"kind={kind!r} of a language adapter: it has no Linear, so it needs a method reset")
    return update


def linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def linear(width: int, rank: int) -> nn.Module:
    """Return one Linear, which can do all that another projection could."""
    return nn.Linear(width, width)


def bottleneck(width: int, rank: int) -> nn.Module:
    """Return two Linears, `rank` wide between, with a GELU (arXiv 1902.00751)."""
    return nn.Sequential(nn.Linear(width, rank), nn.GELU(), nn.Linear(rank, width))


def lora(width: int, rank: int) -> nn.Module:
    """Return one Linear, beside low-rank updates inside the text encoder's layers (arXiv 2106.09685, by `peft`)."""
    return nn.Linear(width, width)


def none(width: int, rank: int) -> None:
    """Return None: the shift alone."""


class DynamicUpdate(nn.Module):
    """`Up(ReLU(W Down(x)))`, in which the square matrix `W` is made for each caption from two features of it, one for
    what it says and one for how (DASD, arXiv 2412.13510, without the losses that hold the two apart)."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(width, rank)
        self.semantic, self.style = nn.Linear(width, rank), nn.Linear(width, rank)
        self.matrix = nn.Linear(2 * rank, rank * rank)
        self.up = nn.Linear(rank, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        made_from = F.relu(torch.cat([self.semantic(states), self.style(states)], -1))
        matrix = self.matrix(made_from).unflatten(-1, (self.rank, self.rank)) / self.rank**0.5
        return self.up(F.relu(torch.einsum("...ij,...j->...i", matrix, self.down(states))))
