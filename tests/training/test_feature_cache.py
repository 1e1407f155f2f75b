import errno
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_nrccr import FeatureCache, encode_texts, files
from modeling_nrccr.training import feature_cache
from tests.support import WordProcessor, tiny_model


CAPTIONS = ["one", "two three", "four five six seven", "one"]


def cache_of(directory=None, seed: int = 0, **options) -> FeatureCache:
    return FeatureCache(tiny_model(seed).set_trained_layers(1), WordProcessor(), directory, **options)


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


@pytest.mark.parametrize("kept", [True, False])
def test_batches_are_the_sequences_padded_with_zeros(tmp_path, kept):
    cache = cache_of(tmp_path if kept else None)
    cache.add_texts(CAPTIONS[:1])
    cache.add_texts(CAPTIONS, batch_size=1)  # in several goes
    states, mask = cache.texts.batch(CAPTIONS)
    expected = [cache.boundary_states([caption])[0].detach() for caption in CAPTIONS]
    torch.testing.assert_close(states, torch.nn.utils.rnn.pad_sequence(expected, batch_first=True))
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    torch.testing.assert_close(cache.texts["two three"], expected[1])
    numbers = cache.texts.numbers(CAPTIONS)
    assert torch.equal(cache.texts.gather(numbers[1:2])[0], expected[1][None])


def test_the_file_is_mapped_and_of_half_the_size_in_bfloat16(tmp_path):
    maps = Path("/proc/self/maps")
    caches = {dtype: cache_of(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, cache in caches.items():
        cache.add_texts(CAPTIONS)
        assert load_file(cache.texts.path)["vectors"].dtype == cache.texts.matrix.dtype == dtype
        if maps.exists():  # Linux
            lines = [line.split() for line in maps.read_text().splitlines() if line.endswith(cache.texts.path.name)]
            spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
            assert any(start < cache.texts.matrix.data_ptr() < end for start, end in spans)
        assert cache(text=CAPTIONS)["boundary_states"].dtype == torch.float32
    full, half = (cache(text=CAPTIONS)["boundary_states"] for cache in caches.values())
    assert torch.equal(full.bfloat16().float(), half)
    with pytest.raises(ValueError, match="dtype must be one of torch.float32, .*, got torch.int8"):
        cache_of(dtype=torch.int8)


def test_what_is_stored_is_finite_in_its_dtype():
    model = tiny_model().set_trained_layers(0)
    with torch.no_grad():
        for parameter in model.text_tower.encoder.encoder.layer[-1].output.LayerNorm.parameters():
            parameter.fill_(1e6)
    with pytest.raises(ValueError, match="infinity for 'one' in torch.float16"):
        FeatureCache(model, WordProcessor(), dtype=torch.float16).add_texts(["one"])


def test_what_was_computed_before_an_error_is_kept(tmp_path):
    cache = cache_of(tmp_path)
    own = cache.boundary_states

    def interrupted(captions):
        if "four five six seven" in captions:
            raise KeyboardInterrupt
        return own(captions)

    cache.is_exact = True  # already compared with a full pass
    cache.boundary_states = interrupted
    cache.model.train()
    with pytest.raises(KeyboardInterrupt):
        cache.add_texts(CAPTIONS, batch_size=1)
    assert cache.model.training
    for held in (cache, cache_of(tmp_path)):
        assert list(held.texts.rows) == ["one", "two three"]
        assert held(text=CAPTIONS[:2])["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_another_encoders_file_is_refused_whatever_its_name(tmp_path):
    cache, other = cache_of(tmp_path), cache_of(tmp_path, seed=1)
    cache.add_texts(CAPTIONS)
    shutil.copy(cache.texts.path, other.texts.path)
    message = f"{other.texts.path} holds texts of another encoder .*fingerprint .*remove it, or name another directory"
    with pytest.raises(ValueError, match=message):
        cache_of(tmp_path, seed=1)
    with pytest.raises(ValueError, match=message):
        other.add_texts(["eight"])  # copied since


@pytest.mark.parametrize("damage", ["torn", "not safetensors", "index"])
def test_a_damaged_file_is_named(tmp_path, damage):
    cache = cache_of(tmp_path)
    cache.add_texts(CAPTIONS)
    path, content = cache.texts.path, cache.texts.path.read_bytes()
    damaged = {"torn": content[:-9], "not safetensors": b"PNG" * 9, "index": content[:-3] + b"!!!"}
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"{path} is damaged .*: remove it, and it is computed again"):
        cache_of(tmp_path)


class FullDisk:
    """A file on a disk that has so many bytes left."""

    def __init__(self, file, left: int):
        self.file, self.left = file, left

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.left -= memoryview(data).nbytes
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("left", [0, 300, 1000])
def test_a_full_disk_leaves_the_cache_as_it_was(tmp_path, monkeypatch, left):
    cache = cache_of(tmp_path)
    cache.add_texts(CAPTIONS)
    before = cache.texts.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda *args: FullDisk(open(*args), left), raising=False)
        with pytest.raises(OSError, match="safetensors cannot be written .No space.*make room") as raised:
            cache.add_texts(["eight nine ten", "eleven"], batch_size=1)
    assert raised.value.errno == errno.ENOSPC
    assert cache.texts.path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    for held in (cache, cache_of(tmp_path)):
        assert held(text=CAPTIONS)["attention_mask"].sum() == 8
    cache.add_texts(["eight nine ten", "eleven"])  # there is room again
    assert set(cache_of(tmp_path).texts.rows) == {*CAPTIONS, "eight nine ten", "eleven"}


def test_a_removed_file_is_written_again_with_what_is_held(tmp_path):
    cache, other = cache_of(tmp_path), cache_of(tmp_path)
    cache.add_texts(CAPTIONS)
    cache.texts.path.unlink()
    other.add_texts(["eight nine"])
    cache.add_texts(["ten"])
    for held in (cache, cache_of(tmp_path)):
        assert set(held.texts.rows) == {*CAPTIONS, "eight nine", "ten"}
        torch.testing.assert_close(held.texts["two three"], other.boundary_states(["two three"])[0].detach())


def add_in_parts(directory, captions, computed):
    torch.set_num_threads(1)
    cache = cache_of(directory)
    own, cache.is_exact = cache.boundary_states, True  # already compared with a full pass
    cache.boundary_states = lambda chunk: computed.extend(chunk) or own(chunk)
    for start in range(0, len(captions), 5):
        cache.add_texts(captions[start : start + 5], batch_size=2)


def test_two_processes_fill_one_cache(tmp_path):
    """Neither loses a row of the other, and none is computed twice."""
    captions = [f"caption number {'x ' * (i % 9)}{i}" for i in range(60)]
    context = multiprocessing.get_context("fork")  # a new interpreter would take longer than the test
    with context.Manager() as manager:
        computed = manager.list()
        parts = (captions[:40], captions[:19:-1])
        processes = [context.Process(target=add_in_parts, args=(tmp_path, part, computed)) for part in parts]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):  # whole at any moment
            assert set(cache_of(tmp_path).texts.rows) <= set(captions)
            time.sleep(0.01)
        assert [process.exitcode for process in processes] == [0, 0]
        assert sorted(computed) == sorted(captions)
    cache = cache_of(tmp_path)
    assert set(cache.texts.rows) == set(captions)
    for caption in captions[::7]:
        torch.testing.assert_close(cache.texts[caption], cache.boundary_states([caption])[0].detach())


def test_where_nothing_is_new_nothing_is_written(tmp_path):
    cache = cache_of(tmp_path)
    cache.images.fill(["a"], lambda ids: {"a": torch.ones(1, 13)}, 9, cache.model)
    state = feature_cache.file_state(cache.images.path)
    broken = cache.add_images(["a", "b"], {}.__getitem__, strict=False)
    assert broken == {"b": "b cannot be read ('b'): repair it, or leave it out"}
    assert feature_cache.file_state(cache.images.path) == state and cache(images=["a"])["visual_feats"].sum() == 13


def test_ids_may_be_numbers(tmp_path):
    cache = cache_of(tmp_path)
    cache.images.fill(
        [5, "5"], lambda ids: {i: torch.full((1, 13), float(type(i) is int)) for i in ids}, 9, cache.model
    )
    assert cache_of(tmp_path)(images=[5, "5"])["visual_feats"][:, 0, 0].tolist() == [1, 0]
