"""What the measurements share: their list, the two models, and how two values are shown."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from modeling_nrccr import NrccrConfig, NrccrModel


PUBLISHED = dict(
    pool_padding=True,
    attention_score_scale="hidden",
    projection_norm="batch_norm",
    projection_dropout=0.2,
    visual_head="attention",
)
TEXT = dict(vocab_size=99, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
BATCH, DIM = 128, 1536  # of the paper's runs

EFFECTS: dict[str, Callable[[], str | None]] = {}
COSTLY: set[str] = set()


def effect(row: str, costly: bool = False):
    """Registers the measurement of the table's row that begins with `row`."""

    def register(function):
        EFFECTS[row] = function
        if costly:
            COSTLY.add(row)
        return function

    return register


def models(**changes) -> tuple[NrccrModel, NrccrModel]:
    """Return the same weights with published and with repaired behaviour."""
    config = dict(text_config=TEXT, visual_feat_dim=64, projection_dim=64, visual_head="attention") | changes
    torch.manual_seed(0)
    repaired = NrccrModel(NrccrConfig(**config)).eval()
    published = NrccrModel(NrccrConfig(**(config | PUBLISHED))).eval()
    published.load_state_dict(repaired.state_dict(), strict=False)
    return published, repaired


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def arrow(published: float, repaired: float, digits: int = 2) -> str:
    return f"{published:.{digits}f} -> {repaired:.{digits}f}"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def caption(length: int, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, TEXT["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, length, dtype=torch.long)
    return F.pad(ids, (0, padded - length)), F.pad(mask, (0, padded - length))
