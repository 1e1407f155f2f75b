"""What a language adds to a text side that stays as it is: a small residual that starts as the identity."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


class NrccrLanguageAdapter(nn.Module):
    r"""
    `x + shift + update(x + shift)`, on pooled states of the text encoder. At first `shift` and `update` are zero.

    Args:
        width (`int`): Of the pooled states.
        kind (`str`):
            "linear": one Linear, which can do all that another projection could;
            "bottleneck": two with a GELU between (arXiv 1902.00751);
            "dynamic": DASD's, whose middle matrix is made for each caption (see [`DynamicUpdate`]);
            "lora": low-rank updates (arXiv 2106.09685, by `peft`) inside the text encoder's layers, and the Linear;
            "none": the shift alone.
        center (`bool`): Training begins by moving the language's mean state to the base language's.
        noise (`float`): In training, Gaussian noise on the states, in units of their standard deviation.
        rank (`int`): Width of the bottleneck, of the dynamic matrix, or rank of LoRA.
        layers (`int`): How many of the encoder's top layers have LoRA; -1: all.
    """

    SETTINGS = ("kind", "center", "noise", "rank", "layers")
    KINDS = ("linear", "bottleneck", "dynamic", "lora", "none")

    def __init__(
        self,
        width: int,
        kind: str = "linear",
        center: bool = True,
        noise: float = 0.0,
        rank: int = 64,
        layers: int = 2,
    ):
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"kind={kind!r} of a language adapter: one of {', '.join(self.KINDS)}")
        for name, number, least in (("rank", rank, 1), ("layers", layers, -1)):
            if type(number) is not int or number < least:
                raise ValueError(f"{name}={number!r} of a language adapter: an integer, {least} or more")
        if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
            raise ValueError(f"noise={noise!r} of a language adapter: a number, 0 or more")
        if type(center) is not bool:
            raise ValueError(f"center={center!r} of a language adapter: true or false")
        self.kind, self.center, self.noise, self.rank, self.layers = kind, center, noise, rank, layers
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("deviation", torch.zeros(width))
        self.update = None
        if kind in ("linear", "lora"):
            self.update = nn.Linear(width, width)
        elif kind == "bottleneck":
            self.update = nn.Sequential(nn.Linear(width, rank), nn.GELU(), nn.Linear(rank, width))
        elif kind == "dynamic":
            self.update = DynamicUpdate(width, rank)

    def settings(self) -> dict[str, Any]:
        """What builds it again."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def reset(self):
        """The identity again."""
        init.zeros_(self.shift)
        init.zeros_(self.deviation)
        if self.update is not None:
            last = [module for module in self.update.modules() if isinstance(module, nn.Linear)][-1]
            init.zeros_(last.weight)
            init.zeros_(last.bias)

    @torch.no_grad()
    def calibrate(self, base: torch.Tensor, states: torch.Tensor):
        """From pooled states of captions in the base language and in this one, each `(num_captions, width)`."""
        if self.center:
            self.shift.copy_(base.mean(0) - states.mean(0))
        self.deviation.copy_(states.std(0))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Of shape `(batch_size, width)`, to the same shape."""
        if self.training and self.noise:
            states = states + self.noise * self.deviation * torch.randn_like(states)
        states = states + self.shift
        return states if self.update is None else states + self.update(states)


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
