"""Rows of like length go through an encoder together: nothing is computed of padding that need not be."""

import torch


# On a CPU passes of this size for each thread are the fastest: their states stay in cache between one operation and
# the next, and matrices are large enough (benchmarks/NOTES.md).
TOKENS_A_THREAD = 512
TOKENS_ELSEWHERE = 16_384  # where memory alone limits a pass
PIXELS = 2**18  # of a pass of a vision tower on a CPU, for the same reason: 16 pictures of 128 x 128
MANY = 2**31


def pass_tokens(device: torch.device) -> int:
    """Return how many tokens, with padding, go through an encoder at a time."""
    return TOKENS_A_THREAD * torch.get_num_threads() if device.type == "cpu" else TOKENS_ELSEWHERE


def pass_pictures(pixel_values: torch.Tensor) -> int | None:
    """Return how many pictures, of a batch of shape `(batch_size, ...)`, go through a vision tower at a time, where no
    gradient is wanted. None: all of them, elsewhere than on a CPU, and in a graph that is exported."""
    if pixel_values.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return max(1, 3 * PIXELS // max(1, pixel_values[:1].numel()))


def length_groups(
    lengths: torch.Tensor, max_rows: int | None = None, max_tokens: int | None = None
) -> list[torch.Tensor]:
    """Return the row numbers of a batch in groups of like length, `(group_size,)` each, the longest first, so that
    short rows are not padded to the longest.

    Args:
        lengths: Tokens of each row, `(batch_size,)`.
        max_rows: Of a group; default: any number.
        max_tokens: Of a group, with its padding (a row that is longer has a group of its own). By default
            [`pass_tokens`] on a CPU; elsewhere any number, and without `max_rows` four groups, or one where that would
            save little.
    """
    on_cpu = lengths.device.type == "cpu"
    if not on_cpu and max_rows is None and max_tokens is None:
        if len(lengths) < 32 or lengths.max() <= 1.5 * lengths.float().mean():
            return [torch.arange(len(lengths), device=lengths.device)]
        return list(lengths.argsort(stable=True, descending=True).chunk(4))
    max_tokens = max_tokens or (pass_tokens(lengths.device) if on_cpu else MANY)
    order = lengths.argsort(stable=True, descending=True)
    ordered, sizes, start = lengths[order].tolist(), [], 0
    while start < len(ordered):
        fitting = max(1, max_tokens // max(1, ordered[start]))
        sizes.append(min(fitting, max_rows or MANY, len(ordered) - start))
        start += sizes[-1]
    return list(order.split(sizes))


def pad_right(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, each `(batch_size, sequence_length)`, with the padding before a row's first token moved
    behind its last: its positions, and its first token, are then those that it has alone."""
    if not torch.compiler.is_compiling() and mask[:, 0].all():
        return ids, mask
    start = mask.bool().int().argmax(1, keepdim=True)
    place = (torch.arange(mask.shape[1], device=mask.device) + start) % mask.shape[1]
    return ids.gather(1, place), mask.gather(1, place)


def up_to_end_of_text(ids: torch.Tensor, end: int | None) -> torch.Tensor:
    """Return the mask, `(batch_size, sequence_length)`, of ids that came without one: up to the first token `end` of
    each row, as CLIP looks for it (with 2 in its config, which was a mistake: the greatest id; see
    https://github.com/huggingface/transformers/pull/24773); of all where there is none."""
    last = ids.argmax(1) if end == 2 else (ids == end).int().argmax(1)
    found = torch.ones_like(last).bool() if end == 2 else (ids == end).any(1)
    last = torch.where(found, last, ids.shape[1])
    return (torch.arange(ids.shape[1], device=ids.device) <= last[:, None]).long()


def row_lengths(mask: torch.Tensor) -> torch.Tensor:
    """Return the place after each row's last token, `(batch_size,)`, wherever its padding is."""
    return (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
