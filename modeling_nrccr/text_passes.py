"""How texts pass through the text tower: padded alike, by language, by length, and with little memory in training."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .length_groups import length_groups, pad_right, pass_tokens, row_lengths, up_to_end_of_text


END_OF_TEXT = ("clip_text_model", "metaclip_2_text_model")  # they look for that token, and want no mask


class NrccrTextPassesMixin:
    """Turns the views of a caption into states of a `NrccrModel`'s text tower."""

    def encode_text(
        self,
        views: list[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]],
        languages: list[str | None],
    ) -> list[torch.Tensor]:
        """Run one pass of the text encoder for several views, each `(input_ids, attention_mask, boundary_states)` and
        each padded to its own length; returns the states of each, of shape `(batch_size, sequence_length,
        hidden_size)`. `languages`: of all rows of all views."""
        ids, masks, states = zip(*views)
        sizes = [mask.shape for mask in masks]
        longest = max(length for _, length in sizes)

        def stack(parts: tuple[torch.Tensor, ...], value: int = 0) -> torch.Tensor:
            padding = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
            return torch.cat([F.pad(part, pad, value=value) for part, pad in zip(parts, padding)])

        inputs = {}
        if states[0] is not None:
            inputs["boundary_states"] = stack(states)
        if ids[0] is not None:
            inputs["input_ids"] = stack(ids, self.pad_token_id)
        encoded = self.encode_by_language(inputs, stack(masks), languages)
        parts = encoded.split([batch for batch, _ in sizes])
        return [part[:, :length] for part, (_, length) in zip(parts, sizes)]

    def encode_by_language(
        self, inputs: dict[str, torch.Tensor], mask: torch.Tensor, languages: list[str | None]
    ) -> torch.Tensor:
        """Run [`encode_by_length`] once, or for the rows of each language that has LoRA inside the text tower."""
        inside = [language if self.has_lora(language) else None for language in languages]
        groups = {language: [i for i, of in enumerate(inside) if of == language] for language in dict.fromkeys(inside)}
        if len(groups) == 1:
            return self.encode_by_length(inputs, mask, inside[0])
        parts = []
        for language, rows in groups.items():
            at = torch.tensor(rows, device=mask.device)
            part = {name: value[at] for name, value in inputs.items()}
            parts.append(self.encode_by_length(part, mask[at], language))
        return torch.cat(parts)[torch.tensor(sum(groups.values(), [])).argsort()]

    def encode_by_length(
        self, inputs: dict[str, torch.Tensor], mask: torch.Tensor, language: str | None
    ) -> torch.Tensor:
        """Run the text tower over rows of like length, of shape `(batch_size, sequence_length, hidden_size)`; what it
        gives for cut-off padding is 0. `language`: whose LoRA is in it."""
        # published: states of padding are pooled, so none is cut off; nothing is computed from the boundary at k = 0;
        # a graph that is exported has no look at its values
        whole = self.config.pool_padding or torch.compiler.is_compiling()
        whole = whole or ("boundary_states" in inputs and self.text_tower.num_trained_layers == 0)
        if whole:
            return self.run_tower(inputs, mask, language)
        lengths = row_lengths(mask)
        recompute = self.recompute_passes and torch.is_grad_enabled()
        groups = length_groups(lengths, max_tokens=pass_tokens(mask.device) if recompute else None)
        if len(groups) < 2:
            return self.run_tower(inputs, mask, language)
        parts = []
        for rows in groups:
            length = max(1, int(lengths[rows].max()))
            part = {name: value[rows, :length] for name, value in inputs.items()}
            states = self.run_tower(part, mask[rows, :length], language)
            parts.append(F.pad(states, (0, 0, 0, mask.shape[1] - length)))
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def run_tower(self, inputs: dict[str, torch.Tensor], mask: torch.Tensor, language: str | None) -> torch.Tensor:
        """Run one pass of the text tower; with `recompute_passes` its states alone are kept for the backward pass,
        which computes the rest again with the same dropout."""

        def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            with self.lora(language), self.checkpointed_layers("boundary_states" in inputs, language):
                return self.text_tower(attention_mask=mask, **inputs)

        if self.recompute_passes and torch.is_grad_enabled():
            return checkpoint(run, inputs, use_reentrant=False)
        return run(inputs)

    @contextmanager
    def checkpointed_layers(self, resumed: bool, language: str | None) -> Iterator:
        """Keep of every `checkpoint_every`-th layer of the text tower its input alone: the backward pass computes the
        rest again, by this language's LoRA. (That of transformers would leave out layers that are frozen but for
        LoRA, and compute them again by whatever LoRA is in them then.) `resumed`: from the boundary."""
        layers, tower = [], self.text_tower
        if self.checkpoint_every and torch.is_grad_enabled():
            frozen = len(tower.layers()) - tower.num_trained_layers if resumed else 0
            layers = getattr(*tower.layer_list())[frozen :: self.checkpoint_every]

        def checkpointed(forward: Callable) -> Callable:
            def again(*args, **kwargs):
                with self.lora(language):
                    return forward(*args, **kwargs)

            return functools.partial(checkpoint, again, use_reentrant=False)

        for layer in layers:
            layer.forward = checkpointed(layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ):
        """Train in less memory from now on, and compute each layer twice, as in transformers. Raises ValueError for an
        option that would have no effect on the text tower."""
        if gradient_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}) or offload:
            given = (gradient_checkpointing_kwargs or {}) | {"offload": offload}
            raise ValueError(f"activation_checkpointing_kwargs {given}: every_n_layers alone has an effect here")
        self.checkpoint_every = every_n_layers
        tower = self.visual_tower
        if tower is not None and any(parameter.requires_grad for parameter in tower.parameters()):
            tower.encoder.activation_checkpointing_enable(every_n_layers=every_n_layers)

    def gradient_checkpointing_disable(self):
        """Keep all states of training again, as in transformers."""
        self.checkpoint_every = 0

    def text_inputs(
        self, ids: torch.Tensor | None, mask: torch.Tensor | None, states: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Return ids, mask and states as the text encoder reads them, each `(batch_size, sequence_length, ...)`:
        padded on the right, so that a text's positions are those that it has alone. Raises ValueError for neither ids
        nor states, and for more tokens than a model of fixed length reads."""
        if ids is None and states is None:
            raise ValueError("texts are read from input_ids (or, of frozen layers, boundary_states): got neither")
        if mask is None:
            of = states if ids is None else ids
            mask = torch.ones(of.shape[:2], dtype=torch.long, device=of.device)
            if ids is not None and self.config.text_config.model_type in END_OF_TEXT:
                mask = up_to_end_of_text(ids, self.config.text_config.eos_token_id)
        if ids is not None and not self.config.pool_padding:
            ids, mask = pad_right(ids, mask)
        length = self.config.text_length
        if length is None or ids is None:
            return ids, mask, states
        if ids.shape[1] > length:
            raise ValueError(f"{ids.shape[1]} tokens, but this model reads {length} (NrccrConfig.text_length)")
        if missing := length - ids.shape[1]:
            padding = ids[mask == 0]  # of the tokenizer, whose config often says another
            ids = F.pad(ids, (0, missing), value=int(padding[0]) if len(padding) else self.pad_token_id)
        return ids, torch.ones_like(ids), states

    @property
    def pad_token_id(self) -> int:
        return getattr(self.config.text_config, "pad_token_id", None) or 0
