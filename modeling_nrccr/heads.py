"""What is made of the states of words and frames: pooling, attention, projection into the common space."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_nrccr import NrccrConfig


def clip_loss(logits: torch.Tensor, mean: Callable[[torch.Tensor], torch.Tensor] = torch.mean) -> torch.Tensor:
    """Return the symmetric cross-entropy of a square matrix of logits, positives on the diagonal (CLIP, arXiv
    2103.00020). `mean`: of the values of all pairs, `(batch_size,)`."""
    labels = torch.arange(len(logits), device=logits.device)
    return sum(mean(F.cross_entropy(matrix, labels, reduction="none")) for matrix in (logits, logits.t())) / 2


def pool(states: torch.Tensor, mask: torch.Tensor | None, how: str) -> torch.Tensor:
    """Pool `(batch_size, length, width)` and its mask `(batch_size, length)` to `(batch_size, width)`; no mask:
    all."""
    if how == "first":  # texts are padded on the right
        return states[:, 0]
    if mask is None:
        mask = states.new_ones(states.shape[:2])
    if how == "last":
        last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
    mask = mask.unsqueeze(-1).to(states.dtype)
    if how == "max":
        return states.masked_fill(mask == 0, torch.finfo(states.dtype).min).amax(1)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)  # of a row that is all padding: 0


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes in their order, `(world_size * batch_size, ...)`, with gradient."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))


class GatheredBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the whole batch of all processes (`torch.nn.SyncBatchNorm` refuses CPU tensors)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed and torch.distributed.get_world_size() > 1):
            return super().forward(hidden_states)
        rank, size = torch.distributed.get_rank(), len(hidden_states)
        return super().forward(gather_rows(hidden_states))[rank * size : (rank + 1) * size]


class NrccrProjection(nn.Module):
    """Linear, optional BatchNorm, dropout, L2 norm: into the common space (paper, section 3.1)."""

    def __init__(self, input_size: int, config: NrccrConfig, kind: str = "linear"):
        super().__init__()
        self.dense = nn.Linear(input_size, config.projection_dim) if kind == "linear" else None
        self.norm = GatheredBatchNorm1d(config.projection_dim) if config.projection_norm == "batch_norm" else None
        self.dropout = nn.Dropout(config.projection_dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected = features if self.dense is None else self.dense(features)
        if self.norm is not None:
            if self.training and len(projected) < 2:
                raise ValueError("a training batch of one has no BatchNorm statistics: use at least 2 rows a batch")
            projected = self.norm(projected)
        return F.normalize(self.dropout(projected), dim=-1)


class NrccrAttention(nn.Module):
    """The attention block that all views share: multi-head attention, Linear, dropout, LayerNorm (paper, eq. 1-3)."""

    def __init__(self, hidden_size: int, num_heads: int, config: NrccrConfig):
        super().__init__()
        self.num_heads = num_heads
        width = config.key_query_size if config.attention_score_scale == "head" else hidden_size
        self.scale = (width / num_heads) ** -0.5
        self.pool_padding = config.pool_padding
        self.query = nn.Linear(hidden_size, config.key_query_size)
        self.key = nn.Linear(hidden_size, config.key_query_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.layer_norm = nn.LayerNorm(hidden_size)

    def attention_mask(self, query_mask: torch.Tensor, key_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a mask, boolean over keys; published: a bias, the same for every key where the query row is
        padding."""
        if not self.pool_padding:
            return key_mask[:, None, None, :].bool()
        return (1 - query_mask[:, None, :, None].to(dtype) * key_mask[:, None, None, :].to(dtype)) * -10000.0

    def context(
        self, queries: torch.Tensor, query_mask: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor
    ) -> torch.Tensor:
        """Return what each query row reads from the keys' states, `(batch_size, query_length, hidden_size)`."""
        heads = [
            layer(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, queries), (self.key, keys), (self.value, keys))
        ]
        mask = self.attention_mask(query_mask, key_mask, queries.dtype)
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=self.scale).transpose(1, 2).flatten(2)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Apply self-attention with a residual, `(batch_size, length, hidden_size)` to the same shape."""
        return self.layer_norm(self.dropout(self.dense(self.context(states, mask, states, mask))) + states)

    def cross(
        self, queries: torch.Tensor, query_mask: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor
    ) -> torch.Tensor:
        """Attend from one view to another, without the residual, of shape `(batch_size, query_length,
        hidden_size)`."""
        return self.layer_norm(self.dropout(self.dense(self.context(queries, query_mask, keys, key_mask))))


class NrccrAttentionHead(nn.Module):
    """Linear and ReLU, learned positions, one attention block, pooling: for words and for frames alike."""

    def __init__(
        self, input_size: int, hidden_size: int, num_heads: int, max_positions: int, pooling: str, config: NrccrConfig
    ):
        super().__init__()
        self.pooling, self.pool_padding = pooling, config.pool_padding
        self.output_size = hidden_size
        self.input_norm = nn.LayerNorm(input_size)
        self.input_dense = nn.Linear(input_size, hidden_size)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.position_norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.attention = NrccrAttention(hidden_size, num_heads, config)

    def embed(self, states: torch.Tensor) -> torch.Tensor:
        """Map encoder states `(batch_size, length, input_size)`, with positions, to `(batch_size, length,
        hidden_size)`. Raises ValueError for more positions than the head has."""
        length, limit = states.shape[1], self.position_embeddings.num_embeddings
        if length > limit:
            raise ValueError(f"{length} positions, but this head has {limit}: truncate the input to {limit}")
        hidden = F.relu(self.input_dense(self.dropout(self.input_norm(states))))
        positions = self.position_embeddings(torch.arange(length, device=states.device))
        return self.dropout(self.position_norm(hidden + positions))

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return pool(hidden, None if self.pool_padding else mask, self.pooling)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.read(self.embed(states), mask)

    def read(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Apply self-attention and pooling to what `embed` returned, of shape `(batch_size, hidden_size)`."""
        return self.pool(self.attention(hidden, mask), mask)

    def cross(
        self, source: torch.Tensor, source_mask: torch.Tensor, target: torch.Tensor, target_mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the teacher (paper, section 3.3), `(batch_size, hidden_size)`: source words attend to the target's,
        and are pooled beside the target's states."""
        read = self.attention.cross(source, source_mask, target, target_mask)
        return self.pool(torch.cat([read, target], 1), torch.cat([source_mask, target_mask], 1))


class NrccrPoolingHead(nn.Module):
    """Pooling over tokens or frames; with `dense=True` a Linear after it, and a ReLU (published for pictures)."""

    def __init__(
        self, input_size: int, pooling: str, dropout: float, config: NrccrConfig, dense: bool, relu: bool = True
    ):
        super().__init__()
        self.pooling, self.pool_padding = pooling, config.pool_padding
        self.output_size = input_size
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(input_size, input_size) if dense else None
        self.relu = relu

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pooled = self.dropout(pool(states, None if self.pool_padding else mask, self.pooling))
        if self.dense is None:
            return pooled
        return F.relu(self.dense(pooled)) if self.relu else self.dense(pooled)
