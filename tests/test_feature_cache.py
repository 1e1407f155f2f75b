import pytest
import torch
from conftest import WordProcessor, tiny_model

from modeling_nrccr import FeatureCache, encode_texts


CAPTIONS = ["one", "two three", "four five six seven", "one"]


def test_cache_gives_what_the_processor_and_encoder_give(tmp_path):
    model = tiny_model().set_trained_layers(1)
    cache = FeatureCache(model, WordProcessor(), tmp_path)
    cache.add_texts([*CAPTIONS, None], batch_size=2)
    direct, cached = (encode_texts(model, CAPTIONS, p, batch_size=2) for p in (WordProcessor(), cache))
    torch.testing.assert_close(direct, cached, atol=1e-6, rtol=0)
    with pytest.raises(KeyError, match="'unknown' is not among the cached texts"):
        cache(text=["unknown"])


def test_cache_is_read_again_but_never_that_of_other_weights_or_cut(tmp_path):
    def rows(model, layers):
        cache = FeatureCache(model.set_trained_layers(layers), WordProcessor(), tmp_path)
        return cache, set(cache.texts.rows)

    model = tiny_model()
    cache, known = rows(model, 1)
    assert not known
    cache.add_texts(CAPTIONS)
    again, known = rows(model, 1)
    assert known == set(CAPTIONS)
    torch.testing.assert_close(again(text=CAPTIONS)["boundary_states"], cache(text=CAPTIONS)["boundary_states"])
    again.add_texts(["eight"])
    assert rows(model, 1)[1] == {*CAPTIONS, "eight"}
    assert not rows(model, 2)[1] and not rows(tiny_model(seed=1), 1)[1]
    assert not list(tmp_path.glob("*.tmp"))


def test_nan_names_the_caption():
    model = tiny_model().set_trained_layers(0)
    with torch.no_grad():
        model.text_tower.encoder.embeddings.word_embeddings.weight[2 + sum(map(ord, "bad")) % 35] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity for 'bad'"):
        FeatureCache(model, WordProcessor()).add_texts(["good one", "bad"])


def test_cached_videos_give_what_frames_give():
    from PIL import Image
    from transformers import BatchFeature

    tower = {"model_type": "efficientnet_lite", "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_size": 16}
    model = tiny_model(vision_config=tower, visual_feat_dim=None, visual_head="attention")
    clips = {"a": [Image.new("RGB", (32, 32), c) for c in ("red", "blue", "green")], "b": [Image.new("RGB", (32, 32))]}

    def processor(videos, **kwargs):
        frames = [
            torch.stack([torch.tensor(list(f.getdata())).view(32, 32, 3).permute(2, 0, 1) / 255 for f in v])
            for v in videos
        ]
        mask = [torch.ones(len(f), dtype=torch.long) for f in frames]
        pixels, mask = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (frames, mask))
        return BatchFeature({"pixel_values": pixels, "visual_attention_mask": mask})

    cache = FeatureCache(model, processor)
    cache.add_images(clips, clips.get)
    cached = cache(images=["b", "a"])
    assert cached["visual_attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    with torch.no_grad():
        expected = model.get_image_features(**processor([clips["b"], clips["a"]])).pooler_output
        torch.testing.assert_close(model.get_image_features(**cached).pooler_output, expected)
