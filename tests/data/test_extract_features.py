"""`nrccr features`: its shards are what builders read; kills, processes and formats leave no trace."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from datasets_scripts.reading.features import open_features
from datasets_scripts.reading.videos import read_frames
from modeling_nrccr import EfficientNetLiteConfig, EfficientNetLiteModel
from modeling_nrccr.cli import features as command
from modeling_nrccr.training import extract_features
from tests.support import ROOT
from tests.support.upstream_formats import colours, write_webp


FIXTURES = Path(__file__).parents[1] / "fixtures" / "media"


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_size=16)
    EfficientNetLiteModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    for i in range(5):
        write_webp(folder / "clips" / f"clip{i}.webp", i + 1)
    colours(1)[0].save(folder / "still.png")
    return folder


def extract(media, output, tower, *flags):
    command.main([str(media), str(output), "--vision_encoder", str(tower), "--num_frames", "3", *flags])


def all_features(folder) -> dict[str, np.ndarray]:
    files = sorted(Path(folder).glob("features-*"))  # not open_features, which opens a folder once: this one grows
    reader = extract_features.ShardFeatures(Path(folder), files)
    return {item: reader[item] for item in sorted(reader.ids())}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for item in expected:
        np.testing.assert_allclose(found[item], expected[item], rtol=1e-5, atol=1e-6)


def test_features_are_those_of_the_tower(media, tower, tmp_path, capsys):
    extract(media, tmp_path / "f", tower, "--shard_size", "4", "--batch_size", "3")
    assert "6 extracted, 0 were there, 0 left out" in capsys.readouterr().out
    features = open_features(tmp_path / "f")
    assert {item: features[item].shape for item in features.ids()} == {
        "still": (1, 16),
        "clip0": (1, 16),
        "clip1": (2, 16),
        "clip2": (3, 16),
        "clip3": (3, 16),
        "clip4": (3, 16),
    }
    extractor = extract_features.Extractor(str(tower))
    expected = extractor(read_frames(media / "clips/clip3.webp", 3))
    np.testing.assert_allclose(features["clip3"], expected, rtol=1e-5, atol=1e-6)
    assert sorted(os.listdir(tmp_path / "f")) == [
        "features-00000.safetensors",
        "features-00001.safetensors",
        "settings.json",
    ]


def test_parquet_and_half_precision_hold_the_same(media, tower, tmp_path):
    extract(media, tmp_path / "f", tower)
    extract(media, tmp_path / "p", tower, "--format", "parquet", "--shard_size", "2")
    extract(media, tmp_path / "h", tower, "--feature_dtype", "float16")
    whole = all_features(tmp_path / "f")
    assert_equal(all_features(tmp_path / "p"), whole)
    for item, feats in all_features(tmp_path / "h").items():
        assert feats.dtype == np.float32
        np.testing.assert_allclose(feats, whole[item], rtol=1e-3, atol=1e-3)


def test_what_is_there_is_skipped_and_what_is_new_is_added(media, tower, tmp_path, capsys):
    extract(media, tmp_path / "f", tower, "--shard_size", "4")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "f").iterdir()}
    write_webp(media / "new.webp", 2)
    (tmp_path / "f/features-00002.safetensors.123.tmp").write_bytes(b"half a sha")
    extract(media, tmp_path / "f", tower, "--shard_size", "4")
    assert "1 extracted, 6 were there" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == then for file, then in times.items())
    assert "new" in all_features(tmp_path / "f") and not list((tmp_path / "f").glob("*.tmp"))


def test_other_settings_and_broken_media_are_refused(media, tower, tmp_path, capsys):
    extract(media, tmp_path / "f", tower)
    with pytest.raises(SystemExit, match="holds features made with pad_to_square True, now False"):
        extract(media, tmp_path / "f", tower, "--no_pad")
    (media / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=r"error: .*broken\.mp4 cannot be decoded"):
        extract(media, tmp_path / "g", tower, "--strict")
    extract(media, tmp_path / "g", tower)
    out = capsys.readouterr().out
    assert "6 extracted, 0 were there, 1 left out" in out and "broken.mp4 cannot be decoded" in out
    write_webp(media / "clip1.webp", 2)
    with pytest.raises(SystemExit, match=r"clip1\.webp and .*clip1\.webp are both 'clip1'"):
        extract(media, tmp_path / "g", tower)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no pictures or videos"):
        extract(tmp_path / "empty", tmp_path / "g", tower)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "-m"],
        [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "0",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            "-m",
        ],
    ],
    ids=["accelerate", "two processes"],
)
def test_kill_in_the_middle_and_go_on(media, tower, tmp_path, launcher):
    for i in range(60):
        write_webp(media / f"more{i}.webp", 3, (96, 96))
    extract(media, tmp_path / "whole", tower)
    flags = ["--vision_encoder", tower, "--shard_size", "2", "--num_frames", "3"]
    run = [sys.executable, *launcher, "modeling_nrccr", "features", *map(str, [media, tmp_path / "f", *flags])]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        run, env=environ, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    shards = []
    while len(shards) < 5:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
        shards = list((tmp_path / "f").glob("features-*.safetensors"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = all_features(tmp_path / "f")
    assert 0 < len(before) < 66
    subprocess.run(run, env=environ, check=True, capture_output=True)
    assert_equal(all_features(tmp_path / "f"), all_features(tmp_path / "whole"))


def test_pictures_are_read_as_pictures(media, tower, tmp_path, capsys):
    """Of any size, depth and kind, whatever is wrong beside their pixels; what is not read is counted."""
    Image.new("RGB", (4200, 2800), (200, 30, 90)).save(media / "photo.jpg")  # more than a video may have
    Image.fromarray(np.full((40, 40), 13107, np.uint16)).save(media / "deep.png")
    Image.new("L", (40, 40), 51).save(media / "plain.png")
    for name in ("exif_broken.webp", "textbomb.png", "ref.avif"):
        (media / name).write_bytes((FIXTURES / name).read_bytes())
    (media / "cover.webp").write_bytes((media / "clips/clip4.webp").read_bytes())
    colours(1)[0].save(media / "cover.jpg")  # of that video
    (media / "._clip0.mp4").touch()
    (media / "a.raw").touch()
    extract(media, tmp_path / "f", tower)
    out = capsys.readouterr().out
    assert "13 extracted" in out and "left out: 1 of kinds that are not read (.raw 1)\n" in out
    features = open_features(tmp_path / "f")
    assert features["cover"].shape == (3, 16)
    assert {features[name].shape for name in ("photo", "deep", "exif_broken", "textbomb", "ref")} == {(1, 16)}
    np.testing.assert_allclose(features["deep"], features["plain"], rtol=1e-5, atol=1e-6)


def test_your_own_videos_are_a_data_set(media, tower, tmp_path):
    """As docs/datasets.md says: a CSV beside a folder of videos, and features of these in `FeatureData`."""
    from datasets_scripts.caption_files import CaptionFiles

    lines = ["image,caption,split"] + [f"clip{i}.webp,clip number {i},{'test' if i else 'train'}" for i in range(3)]
    (media / "captions.csv").write_text("\n".join(lines) + "\n")
    extract(media / "clips", media / "FeatureData", tower)
    builder = CaptionFiles(data_dir=media, cache_dir=tmp_path / "cache")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
    assert [row["visual_feats"].shape for row in dataset["test"]] == [(2, 16), (3, 16)]
    np.testing.assert_array_equal(dataset["train"][0]["visual_feats"], open_features(media / "FeatureData")["clip0"])
