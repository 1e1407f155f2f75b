import io
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import modeling_nrccr
from modeling_nrccr.media import to_rgb
from modeling_nrccr.processing_nrccr import NrccrProcessor, NrccrTextProcessor
from modeling_nrccr.training.feature_cache import processor_settings


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "query:", "a", "dog", "runs", "un", "can", "corre"]
WHITE = 255


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 20, "width": 20}, do_normalize=False, rescale_factor=1.0)


@pytest.fixture
def processor(tokenizer, image_processor) -> NrccrProcessor:
    return NrccrProcessor(tokenizer, image_processor, text_prefix="query: ", max_text_length=6, visual_feat_dim=3)


def ids(sentence: str) -> list[int]:
    return [WORDS.index(word) for word in sentence.split()]


def test_captions_get_the_prefix_and_are_padded_to_the_longest(processor):
    batch = processor(text=["a dog runs", "can"], return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [
        ids("<s> query: a dog runs </s>"),
        ids("<s> query: can </s> <pad> <pad>"),
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert processor.num_truncated == 0


@pytest.mark.parametrize("padding", ["longest", "max_length", False])
def test_long_captions_are_truncated_counted_and_warned_of_once(processor, padding, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batch = processor(text=["a dog runs a dog runs", "un can", "a dog runs runs"], padding=padding)
    assert batch["input_ids"][0] == batch["input_ids"][0][:5] + ids("</s>")
    assert max(map(len, batch["input_ids"])) == 6
    assert processor.num_truncated == 4
    assert sum("max_text_length=6" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("caption", ["", " \n\t", None, float("nan")])
def test_an_empty_caption_is_named(processor, caption):
    with pytest.raises(ValueError, match="text row 1 is "):
        processor(text=["a dog", caption])


def test_a_single_caption_and_a_single_picture_make_a_batch_of_one(processor):
    batch = processor(text="un can", images=Image.new("RGB", (8, 8)), return_tensors="pt")
    assert batch["input_ids"].shape == (1, 5)
    assert batch["pixel_values"].shape == (1, 3, 20, 20)


PIXELS = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True, "truncation": True, "max_length": 4},
        {"padding": "max_length", "truncation": True, "max_length": 9},
        {"padding": True, "truncation": False},
        {"padding": True, "truncation": "longest_first", "max_length": 3, "do_rescale": False},
        {"text_kwargs": {"padding": True, "padding_side": "left", "pad_to_multiple_of": 8}},
        {"padding": True, "add_special_tokens": False, "return_attention_mask": False},
        {"padding": True, "images_kwargs": {"do_normalize": False, "size": {"shortest_edge": 22}, "resample": 0}},
        {
            "common_kwargs": {"return_tensors": "pt"},
            "text_kwargs": {"padding": True},
            "audio_kwargs": {"padding": True},
        },
        {"padding": True, "images": [PIXELS.astype(np.float32) / 255], "do_rescale": False},
        {"padding": True, "images": torch.tensor(PIXELS).movedim(-1, 0)[None]},
        {"padding": True, "images": PIXELS[None]},
        {"padding": True, "images": PIXELS[:3], "input_data_format": "channels_last"},
    ],
    ids=str,
)
def test_what_clip_s_processor_is_asked_gives_the_same_here(tokenizer, options):
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=20)
    inputs = {"text": ["a dog runs", "can"], "images": Image.fromarray(PIXELS)} | options
    inputs |= {} if "common_kwargs" in options else {"return_tensors": "pt"}
    theirs = CLIPProcessor(image_processor, tokenizer)(**inputs)
    ours = NrccrProcessor(tokenizer, image_processor, pad_to_square=False)(**inputs)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert ours.keys() == theirs.keys() - {"token_type_ids"}
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_lenght": 4}, TypeError, "takes no 'max_lenght', only add_special_tokens, "),
        ({"stride": 4}, TypeError, "takes no 'stride'"),
        ({"text_kwargs": {"do_rescale": False}}, TypeError, "takes no 'do_rescale' in text_kwargs"),
        ({"images_kwargs": {"max_length": 4}}, TypeError, "takes no 'max_length' in images_kwargs"),
        ({"audio_kwargs": {"sampling_rate": 4}}, TypeError, "takes no 'sampling_rate' in audio_kwargs"),
        ({"do_convert_rgb": False}, TypeError, "takes no 'do_convert_rgb'"),
        ({"max_length": 4, "text_kwargs": {"max_length": 5}}, ValueError, "'max_length' is given twice"),
        ({"max_length": 2}, ValueError, "max_length=2: give a whole number above 2"),
        ({"max_length": "4"}, ValueError, "max_length='4'"),
        ({"truncation": "longest"}, ValueError, "truncation='longest': one of True, 'longest_first'"),
    ],
)
def test_an_option_without_effect_is_refused_by_name(processor, options, error, message):
    with pytest.raises(error, match=message):
        processor(text=["a dog"], **options)


def test_a_model_of_features_has_no_options_of_pictures(tokenizer):
    with pytest.raises(TypeError, match="NrccrTextProcessor takes no 'do_rescale'"):
        NrccrTextProcessor(tokenizer)(text=["a dog"], do_rescale=False)


def test_a_fixed_length_is_kept_where_words_are_cut_before(tokenizer):
    fixed = NrccrTextProcessor(tokenizer, max_text_length=6, text_padding="max_length")
    batch = fixed(text=["a dog runs", "can"], padding=True, truncation=True, max_length=4)
    assert batch["input_ids"] == [ids("<s> a dog </s> <pad> <pad>"), ids("<s> can </s> <pad> <pad> <pad>")]
    assert batch["attention_mask"] == [[1] * 6] * 2
    assert fixed(text=["can"], max_length=6) == fixed(text=["can"])
    with pytest.raises(ValueError, match="max_length=7, but this model reads 6 tokens"):
        fixed(text=["can"], max_length=7)


def test_the_length_is_the_tokenizer_s_where_that_was_set(tokenizer, tmp_path):
    """Where sentence-transformers reads and sets it; another processor of the same tokenizer keeps its own."""
    processor, other = NrccrTextProcessor(tokenizer, max_text_length=6), NrccrTextProcessor(tokenizer)
    assert processor.tokenizer.model_max_length == 6 and other.max_text_length == 64
    for length in (4, 9):
        processor.tokenizer.model_max_length = length
        assert len(processor(text="a dog runs a dog runs a dog runs")["input_ids"][0]) == length
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).max_text_length == 9
    assert AutoProcessor.from_pretrained(tmp_path, model_max_length=5).max_text_length == 5


@pytest.mark.parametrize("text", ["un  canciño", " un canciño ", "un\u00a0canciño\n", "un canc\u0069n\u0303o"])
def test_texts_are_read_as_captions_were_written(processor, text):
    tokens = [*WORDS, "canciño"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # every other blank is a letter to it
    plain = NrccrTextProcessor(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>"))
    assert plain(text=text)["input_ids"] == [[tokens.index("un"), tokens.index("canciño")]]


@pytest.mark.parametrize("text", ["can \ud83d", "\udc80", 5, b"can"])
def test_what_no_text_encoder_should_read_is_named(processor, text):
    with pytest.raises(ValueError, match=r"text row 1 (is|holds) .*(ud83d' at character 4|udc80|5|b'can')"):
        processor(text=iter(["a dog", text]))


@pytest.mark.parametrize(
    "array, message",
    [
        (PIXELS / 255 - 0.5, "its values are -0.5 to 0.5"),
        (PIXELS * np.float32("nan"), "its values are nan to nan"),
        (PIXELS * 300.0, "its values are 0 to 76500"),
        (torch.zeros(9, 9, 5), r"it has shape \(9, 9, 5\)"),
        (np.zeros((0, 9, 3)), r"it has shape \(0, 9, 3\)"),
        (np.array("a"), "ndarray is no picture, path or array of numbers"),
        (5j, "complex is no picture"),
    ],
)
def test_arrays_that_are_no_picture_are_named(processor, array, message):
    with pytest.raises(ValueError, match=f"picture in row 1 .*cannot be read: .*{message}"):
        processor(images=[PIXELS, array])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_composited_on_white(processor, mode):
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 10, 20))
    if mode == "P":  # as a GIF stores it: one index of the palette is transparent
        picture = Image.new("P", (20, 20), 1)
        picture.putpalette([0, 0, 0] * 256)
        picture.paste(0, (0, 0, 10, 20))
        picture.info["transparency"] = 1
    else:
        picture = picture.convert(mode)
    pixel_values = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    assert pixel_values[:, :, :9].eq(0).all()
    assert pixel_values[:, :, 11:].eq(WHITE).all()


@pytest.mark.parametrize(
    "picture, expected",
    [
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (4, 4), (128, 128, 128)), (128, 128, 128)),
        (Image.fromarray(np.full((4, 4), 65535 // 5, np.uint16)), (51, 51, 51)),
        (Image.fromarray(np.full((4, 4), 200, np.uint16)), (0, 0, 0)),
        (Image.fromarray(np.full((4, 4), 65535 // 5, np.int32)), (51, 51, 51)),
        (Image.fromarray(np.full((4, 4), 77, np.int32)), (77, 77, 77)),
        (Image.fromarray(np.full((4, 4), 0.2, np.float32)), (51, 51, 51)),
    ],
    ids=["1-bit", "grey", "cmyk", "ycbcr", "16-bit", "dark 16-bit", "32-bit of 16", "32-bit of 8", "float"],
)
def test_any_kind_of_picture_becomes_rgb(picture, expected):
    assert to_rgb(picture).getpixel((0, 0)) == expected


def test_the_camera_s_orientation_is_applied():
    picture = Image.new("RGB", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn right
    stored = io.BytesIO()
    picture.save(stored, "JPEG", exif=exif)
    assert to_rgb(Image.open(stored)).size == (2, 4)


def test_pictures_are_padded_to_a_square_with_white(processor, tokenizer, image_processor):
    wide = Image.new("RGB", (20, 10), "black")
    padded = processor(images=[wide], return_tensors="pt")["pixel_values"][0, 0]
    assert padded[:4].eq(WHITE).all() and padded[6:14].eq(0).all() and padded[16:].eq(WHITE).all()
    squashing = NrccrProcessor(tokenizer, image_processor, pad_to_square=False)
    assert squashing(images=[wide], return_tensors="pt")["pixel_values"].eq(0).all()


def test_an_image_processor_that_crops_keeps_the_whole_picture(tokenizer):
    cropping = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=20, do_normalize=False)
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("red", (0, 0, 4, 20))  # the left edge, which a centre crop would lose
    pixel_values = NrccrProcessor(tokenizer, cropping)(images=picture, return_tensors="pt")["pixel_values"]
    assert pixel_values[0, :, 10, 0].tolist() == [1, 0, 0]


def test_paths_and_arrays_are_pictures_too(processor, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    pixels = np.asarray(picture)
    pictures = [picture, pixels, tmp_path / "picture.png", str(tmp_path / "picture.png")]
    pictures += [pixels.transpose(2, 0, 1), pixels / 255, torch.tensor(pixels / 255).movedim(-1, 0), pixels * 1.0]
    pictures += [pixels.astype(np.int64), pixels.astype(np.uint16) * 257]
    pixel_values = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert all(row.equal(pixel_values[0]) for row in pixel_values)


def test_a_broken_picture_is_named_by_row_and_file(processor, tmp_path):
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    good = Image.new("RGB", (8, 8))
    for broken in (path, Image.open(path)):
        with pytest.raises(ValueError, match=r"picture in row 1 \(.*broken\.png\) cannot be read"):
            processor(images=[good, broken])
    with pytest.raises(ValueError, match="picture in row 0 .*missing.png"):
        processor(images=[tmp_path / "missing.png"])


def test_visual_feats_are_padded_and_masked(processor):
    batch = processor(visual_feats=[np.ones((2, 3)), torch.full((3,), 2.0), [[3, 3, 3]] * 4], return_tensors="pt")
    assert batch["visual_feats"].shape == (3, 4, 3) and batch["visual_feats"].dtype == torch.float32
    assert batch["visual_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["visual_feats"].sum(dim=(1, 2)).tolist() == [6, 6, 36]


@pytest.mark.parametrize(
    "feats, message",
    [
        (np.ones((2, 4)), r"visual_feats row 1 has shape \(2, 4\), not \(num_frames, 3\)"),
        (np.ones((0, 3)), r"visual_feats row 1 has shape \(0, 3\)"),
        (np.ones((1, 2, 3)), r"visual_feats row 1 has shape \(1, 2, 3\)"),
        (np.array([[1, 1, 1], [1, np.nan, 1]]), "visual_feats row 1 is nan at frame 1, column 1"),
        (np.array([[np.inf, 1, 1]]), "visual_feats row 1 is inf at frame 0, column 0"),
        (None, "visual_feats row 1 is not an array of numbers"),
        ([[1, 2, 3], [1]], "visual_feats row 1 is not an array of numbers"),
    ],
)
def test_bad_visual_feats_are_named(processor, feats, message):
    with pytest.raises(ValueError, match=message):
        processor(visual_feats=[np.ones((1, 3)), feats])


@pytest.mark.parametrize("inputs", [{}, {"text": []}, {"text": ["a dog"], "images": []}, {"visual_feats": []}])
def test_nothing_given_is_an_error(processor, inputs):
    with pytest.raises(ValueError, match="needs text, images, videos or visual_feats, of at least one row"):
        processor(**inputs)


def test_videos_are_frames_padded_and_masked(processor):
    red, white, small = (Image.new("RGB", (30, 30), colour) for colour in ("red", "white", "black"))
    batch = processor(videos=[[red], (white, small, white)], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 3, 20, 20)
    assert batch["visual_attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    alone = processor(images=[red, white, small], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][0, 0], alone[0]) and torch.equal(batch["pixel_values"][1, 1], alone[2])
    assert not batch["pixel_values"][0, 1:].any()


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"videos": [[Image.new("RGB", (9, 9))], []]}, "video in row 1 has no frames"),
        ({"videos": [["nowhere.png"]]}, "nowhere.png"),
        (
            {"videos": [[Image.new("RGB", (9, 9))]], "images": ["a.png"]},
            "takes one of images, videos and visual_feats",
        ),
    ],
)
def test_bad_videos_are_named(processor, inputs, message):
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def test_a_model_of_features_refuses_videos(tokenizer):
    with pytest.raises(ValueError, match="has no image processor"):
        NrccrTextProcessor(tokenizer)(videos=[[Image.new("RGB", (9, 9))]])


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert modeling_nrccr.__file__  # its import registers the classes
    for loaded in (NrccrProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is NrccrProcessor
        assert (loaded.text_prefix, loaded.max_text_length, loaded.visual_feat_dim) == ("query: ", 6, 3)
        inputs = {"text": ["a dog"], "images": [Image.new("LA", (9, 5), (3, 99))]}
        for key, value in processor(**inputs, return_tensors="pt").items():
            assert value.equal(loaded(**inputs, return_tensors="pt")[key])
        assert processor_settings(loaded) == processor_settings(processor)  # what caches tell encoders apart by
        loaded.text_prefix = ""
        assert processor_settings(loaded) != processor_settings(processor)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_nrccr.NrccrProcessor"}
    assert "num_truncated" not in saved


def test_a_processor_without_pictures(tokenizer, tmp_path):
    NrccrTextProcessor(tokenizer, text_prefix="query: ", visual_feat_dim=3).save_pretrained(tmp_path)
    for loaded in (NrccrTextProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is NrccrTextProcessor and loaded.text_prefix == "query: " and loaded.visual_feat_dim == 3
        batch = loaded(text=["a dog"], visual_feats=np.ones((1, 2, 3)), return_tensors="pt")
        assert batch["input_ids"].shape == (1, 5) and batch["visual_feats"].shape == (1, 2, 3)
        with pytest.raises(ValueError, match="has no image processor.*pass them as visual_feats"):
            loaded(images=[Image.new("RGB", (8, 8))])


def test_the_saved_code_stands_by_itself(processor, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    processor.save_pretrained(tmp_path / "saved")
    remote = get_class_from_dynamic_module("processing_nrccr.NrccrProcessor", tmp_path / "saved")
    assert remote is not NrccrProcessor and remote.__module__.startswith("transformers_modules")
    loaded = remote.from_pretrained(tmp_path / "saved")
    assert loaded(text="a dog")["input_ids"] == processor(text="a dog")["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NrccrProcessor", "NrccrTextProcessor"])
def test_auto_processor_where_the_package_is_not_importable(name, processor, tokenizer, tmp_path):
    saved = processor if name == "NrccrProcessor" else NrccrTextProcessor(tokenizer, text_prefix="query: ")
    saved.save_pretrained(tmp_path / "saved")
    code = (
        "import sys; sys.modules['modeling_nrccr'] = None\n"
        "from transformers import AutoProcessor\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(processor).__name__, processor(text='a dog')['input_ids'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "saved"],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == f"{name} {[ids('<s> query: a dog </s>')]}"
