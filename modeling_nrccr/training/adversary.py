"""Which language do these hidden states come from? The text encoder learns to leave that open (paper, section 3.4)."""

import torch
from torch import nn
from torch.nn import functional as F

from .losses import LossTerm


KINDS = ("weak", "not-so-weak", "strong")
SOURCE, TARGET = 1, 0  # "real" is the source language


class Adversarial(LossTerm):
    """How far target captions' hidden states are from passing for source ones, to a discriminator that learns too."""

    reads = ("source", "target")
    by_trainer = True


class ResidualConvolution(nn.Module):
    """Two convolutions over time, kernel 5, their output scaled by 0.3 before the residual sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 5, padding=2)
        self.conv2 = nn.Conv1d(channels, channels, 5, padding=2)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = F.relu(states)  # of the shortcut too: the released ReLU works in place
        hidden = self.conv1(states * mask)
        return states + 0.3 * self.conv2(F.relu(hidden) * mask)


class LanguageDiscriminator(nn.Module):
    """Two logits from a text encoder's hidden states, averaged over time; each says how sure it is of the source.

    Args:
        input_size: Width of the hidden states.
        kind: "weak" (Linear), "not-so-weak" (MLP 256-128 with tanh) or "strong" (residual convolutions).
        pool_padding: True averages padding too, as released.
    """

    def __init__(self, input_size: int, kind: str = "not-so-weak", pool_padding: bool = False):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown discriminator {kind!r}: one of {', '.join(KINDS)}")
        self.kind, self.pool_padding = kind, pool_padding
        self.convolve = None
        if kind == "weak":
            self.classify = nn.Linear(input_size, 2)
        elif kind == "not-so-weak":
            layers = [nn.Linear(input_size, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 2)]
            self.classify = nn.Sequential(*layers)
        else:
            self.convolve = nn.ModuleList(
                [nn.Conv1d(input_size, 128, 1), *(ResidualConvolution(128) for _ in range(3))]
            )
            self.classify = nn.Linear(128, 2)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, sequence_length, input_size)` and its mask to logits of shape `(batch_size, 2)`."""
        if self.pool_padding:
            attention_mask = torch.ones_like(attention_mask)
        mask = attention_mask.unsqueeze(1).to(hidden_states.dtype)
        states = hidden_states.transpose(1, 2)
        if self.convolve is not None:
            states = self.convolve[0](states)
            for block in self.convolve[1:]:
                states = block(states, mask)
        return self.classify((states * mask).sum(-1) / mask.sum(-1))


def discriminator_loss(source_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Return how wrong it is about both, the mean of the two binary cross-entropies; logits of shape `(batch_size,
    2)`."""
    return (language_loss(source_logits, SOURCE) + language_loss(target_logits, TARGET)) / 2


def adversarial_loss(target_logits: torch.Tensor) -> torch.Tensor:
    """Return how far the target's states are from passing for the source language."""
    return language_loss(target_logits, SOURCE)


def language_loss(logits: torch.Tensor, language: int) -> torch.Tensor:
    # as released: both logits are binary decisions with the same label, not two classes that compete
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, language))
