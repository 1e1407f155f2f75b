"""Text encoders of many kinds: cached states give what a full pass gives, and a text's padding never counts."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from modeling_nrccr import FeatureCache, NrccrConfig, NrccrModel
from tests.support import WordProcessor


WORDS = dict(
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=37,
    vocab_size=41,
    max_position_embeddings=40,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=3,
)
SLIDING = dict(num_key_value_heads=2, sliding_window=3)
ENCODER = dict(
    d_model=24,
    encoder_layers=4,
    encoder_attention_heads=4,
    encoder_ffn_dim=37,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=37,
)
KINDS = {
    # no inputs_embeds
    "clip_text_model": {},
    "siglip_text_model": {},
    "longformer": dict(attention_window=[4] * 4),
    # layers that differ by their number
    "gemma2": SLIDING | dict(head_dim=6, query_pre_attn_scalar=6),
    "gemma3_text": SLIDING | dict(head_dim=6, layer_types=["sliding_attention", "full_attention"] * 2),
    "qwen3": SLIDING | dict(head_dim=6, use_sliding_window=True, max_window_layers=2),
    "deberta-v2": dict(conv_kernel_size=3, relative_attention=True, pos_att_type=["c2p", "p2c"], conv_act="gelu"),
    "embedding_gemma2_text": SLIDING
    | dict(head_dim=6, global_head_dim=6, hidden_size_per_layer_input=8, embedding_dim=17, sliding_window_pattern=2),
    "bart": ENCODER,
}
# layers that hand on more than states: cached, they would give something else
NOT_EXACT = {
    "xlm": dict(emb_dim=24, n_layers=4, n_heads=4),
    "t5": dict(d_model=24, d_ff=37, num_layers=4, num_heads=4, d_kv=6),
    "xlnet": dict(d_model=24, n_layer=4, n_head=4, d_inner=37),
}


def model_of(kind: str, pooling: str = "last", **config) -> NrccrModel:
    torch.manual_seed(0)
    words = {name: value for name, value in WORDS.items() if (kind, name) != ("xlnet", "max_position_embeddings")}
    text = CONFIG_MAPPING[kind](**words | (KINDS | NOT_EXACT)[kind])
    config = {"text_head": "pooling", "teacher_view": "source", "text_pooling": pooling} | config
    model = NrccrModel(NrccrConfig(text_config=text, projection_dim=11, visual_feat_dim=13, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def captions(size: int = 6, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, the end of the text, padding on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, length + 1, (size,), generator=generator)
    place = torch.arange(length)
    ids = torch.randint(4, 41, (size, length), generator=generator)
    ids = torch.where(place == lengths[:, None] - 1, 3, ids)
    return ids.masked_fill(place >= lengths[:, None], 1), (place < lengths[:, None]).long()


def on_the_left(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shifts = mask.shape[1] - mask.sum(1)
    return tuple(torch.stack([row.roll(int(n)) for row, n in zip(part, shifts)]) for part in (ids, mask))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_states_give_what_a_full_pass_gives(kind):
    model = model_of(kind)
    ids, mask = captions()
    full = model.get_text_features(ids, mask).pooler_output
    for trained in (1, 2, 4):
        model.set_trained_layers(trained)
        states = model.text_tower.at_boundary(ids, mask) * mask[..., None]  # a cache keeps no padding
        resumed = model.get_text_features(ids, mask, states).pooler_output
        torch.testing.assert_close(resumed, full, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="need the input_ids"):
        model.get_text_features(attention_mask=mask, boundary_states=states)


@pytest.mark.parametrize("kind", NOT_EXACT)
@torch.no_grad()
def test_what_does_not_go_on_from_cached_states_is_not_cached(kind, caplog):
    model = model_of(kind).set_trained_layers(2)
    cache, texts = FeatureCache(model, WordProcessor()), ["one", "two three", "four five six"]
    cache.add_texts(texts)
    assert "does not go on from cached states" in caplog.text
    inputs = cache(text=texts, return_tensors="pt")
    assert "boundary_states" not in inputs
    full = model.get_text_features(**WordProcessor()(text=texts)).pooler_output
    torch.testing.assert_close(model.get_text_features(**inputs).pooler_output, full)


@pytest.mark.parametrize("head, pooling", [("pooling", "first"), ("pooling", "last"), ("attention", "mean")])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "clip_text_model"])
@torch.no_grad()
def test_padding_on_the_left_is_padding(kind, head, pooling):
    """Decoders' tokenizers pad there: an embedding is still what its text has alone."""
    model = model_of(kind, pooling, text_head=head, key_query_size=16)
    ids, mask = captions()
    alone = [
        model.get_text_features(row[None, :n], part[None, :n]).pooler_output[0]
        for row, part, n in zip(ids, mask, mask.sum(1))
    ]
    for inputs in ((ids, mask), on_the_left(ids, mask)):
        torch.testing.assert_close(
            model.get_text_features(*inputs).pooler_output, torch.stack(alone), atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_clip_without_a_mask_ends_at_the_end_of_the_text():
    model = model_of("clip_text_model")
    ids, mask = captions()
    expected = model.get_text_features(ids, mask).pooler_output
    torch.testing.assert_close(model.get_text_features(ids).pooler_output, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["bart", "t5"])
@torch.no_grad()
def test_of_an_encoder_decoder_the_encoder_reads(kind, tmp_path):
    theirs = AutoModel.from_config(AutoConfig.for_model(kind, **WORDS | (KINDS | NOT_EXACT)[kind])).eval()
    theirs.save_pretrained(tmp_path / "text")
    model = NrccrModel.from_encoders(
        str(tmp_path / "text"), visual_feat_dim=13, text_head="pooling", teacher_view="source"
    ).eval()
    ids, mask = captions()
    expected = theirs.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    kept = mask.bool()
    torch.testing.assert_close(model.text_tower(ids, mask)[kept], expected[kept])
    model.save_pretrained(tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(
        again.get_text_features(ids, mask).pooler_output, model.get_text_features(ids, mask).pooler_output
    )


@torch.no_grad()
def test_the_text_side_is_exported_and_compiled_whole():
    model = model_of("clip_text_model")

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model.get_text_features(ids, mask, languages=[None] * len(ids)).pooler_output

    inputs = captions()
    expected = Text()(*inputs)
    exported = torch.export.export(Text(), inputs, strict=False).module()
    torch.testing.assert_close(exported(*inputs), expected, atol=1e-5, rtol=0)
    compiled = torch.compile(Text(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected, atol=1e-5, rtol=0)
