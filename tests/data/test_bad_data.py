"""Broken pictures, captions without one, ids twice, no frames, cut-off downloads: named, and nothing else is lost.
What concerns the cache of features alone is in test_feature_cache.py."""

import json
import multiprocessing
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PIL
from safetensors.numpy import save_file

from datasets_scripts.caption_files import CaptionFiles
from datasets_scripts.reading import debian
from datasets_scripts.reading.features import open_features
from datasets_scripts.reading.splits import check_ids
from datasets_scripts.tuxpaint import Tuxpaint
from modeling_nrccr import FeatureCache
from modeling_nrccr.cli import train as train_command
from modeling_nrccr.data.load import load_caption_dataset
from modeling_nrccr.training import experiment
from modeling_nrccr.training import run as train
from tests.data.test_datasets import fake_apt  # noqa: F401
from tests.support import tiny_model
from tests.training.test_train_example import Engine, encoders, toy_dataset  # noqa: F401


pytestmark = pytest.mark.usefixtures("no_bars")
FIXTURES = Path(__file__).parents[1] / "fixtures" / "media"


# ------------------------------------------------------------------------------------------------- broken pictures


@pytest.fixture
def broken_files(tmp_path, monkeypatch):
    """The data of train.py as files, of which three cannot be read: cut off, no picture, not there."""
    dataset, files = toy_dataset(), {}
    for split, rows in dataset.items():
        paths = [str(tmp_path / f"{split}{row}.png") for row in range(len(rows))]
        for path, image in zip(paths, rows["image"]):
            image.save(path)
        files[split] = paths
        dataset[split] = rows.remove_columns("image").add_column("image", paths).cast_column("image", Image())
    whole = (tmp_path / "train3.png").read_bytes()
    (tmp_path / "train3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train5.png").write_text("<html>not found</html>")
    (tmp_path / "test2.png").unlink()
    rows = dataset["test"].to_list()  # another caption of a broken picture
    rows.append(rows[2] | {"caption_id": "test2#1"})
    dataset["test"] = Dataset.from_list(rows, features=dataset["test"].features)
    monkeypatch.setattr(experiment, "load_translated_dataset", lambda *args, **kwargs: (dataset, Engine()))
    return dataset


def flags(encoders, output, **changes) -> list[str]:  # noqa: F811
    settings = {
        "text_encoder": encoders / "t",
        "vision_encoder": encoders / "v",
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 10,
        "projection_dim": 8,
        "disable_tqdm": True,
        "baselines": False,
        "search_page": "none",
        "use_cpu": True,
    }
    return [part for key, value in (settings | changes).items() for part in (f"--{key}", str(value))]


def test_training_leaves_out_pictures_that_cannot_be_read_and_lists_them(broken_files, encoders, tmp_path, capsys):  # noqa: F811
    train_command.main(flags(encoders, tmp_path / "out"))
    printed, out = capsys.readouterr()
    assert f"wrote {tmp_path / 'out'}; next: nrccr evaluate" in printed.splitlines()[-1]
    assert "left out: 3 of 66 images with 4 captions\n" in out
    for image_id, row, name, reason in (
        ("emoji/train3", 3, "train3.png", "image file is truncated"),  # which does not name the file
        ("emoji/train5", 5, "train5.png", "cannot identify image file"),
        ("stamps/test2", 2, "test2.png", "[Errno 2] No such file"),
    ):
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {image_id} cannot be read (")]
        assert f"row {row}, file {tmp_path / name}: {reason}" in line and line.endswith("repair it, or leave it out")
    pictures = json.loads((tmp_path / "out/metrics.json").read_text())["settings"]["pictures"]
    assert pictures == {"train": 38, "validation": 12, "test": 13}


def test_strict_training_names_the_first_that_cannot_be_read(broken_files, encoders, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"train3 cannot be read \(train, row 3, file .*train3.png: .*truncated"):
        train.run(*train.parse_arguments(flags(encoders, tmp_path / "out", strict=True)))


def test_a_split_without_any_readable_picture_is_an_error(broken_files, encoders, tmp_path):  # noqa: F811
    for path in tmp_path.glob("validation*.png"):
        path.write_text("")
    with pytest.raises(ValueError, match="validation: none of its pictures can be read, such as .*train3"):
        train.run(*train.parse_arguments(flags(encoders, tmp_path / "out")))


def test_the_cache_keeps_what_can_be_read(tmp_path):
    model = tiny_model(
        vision_config={
            "model_type": "efficientnet_lite",
            "width_coefficient": 0.25,
            "depth_coefficient": 0.3,
            "hidden_size": 16,
        },
        visual_feat_dim=None,
    )
    pictures = {name: PIL.new("RGB", (32, 32), name) for name in ("red", "blue", "green")} | {
        "none": None,
        "empty": [],
    }

    def processor(images, **kwargs):
        from transformers import BatchFeature

        arrays = np.stack([np.asarray(image, dtype=np.float32) for image in images]).transpose(0, 3, 1, 2)
        return BatchFeature({"pixel_values": torch.from_numpy(arrays / 255)})

    def load(name):
        if name == "blue":
            raise OSError
        return pictures[name]

    cache = FeatureCache(model, processor, tmp_path)
    with pytest.raises(ValueError, match=r"^blue cannot be read \(OSError\): repair it, or leave it out$"):
        cache.add_images(pictures, load, batch_size=1)
    assert list(cache.images.rows) == ["red"]  # what came before stays
    broken = cache.add_images(pictures, load, batch_size=2, strict=False)
    assert list(broken) == ["blue", "none", "empty"]
    assert broken["none"] == "none is no picture: leave it out"
    assert broken["empty"] == "empty is a video of no frames: leave it out"
    for held in (cache, FeatureCache(model, processor, tmp_path)):
        assert held(images=["green", "red"])["visual_feats"].shape == (2, 1, 16)
        with pytest.raises(KeyError, match="'blue' is not among the cached images: call add_images first"):
            held(images=["red", "blue"])

    def without_pyav(name):
        raise ImportError("PyAV is needed")

    with pytest.raises(ImportError, match="PyAV"):  # of every video: none is left out for it
        cache.add_images(["clip"], without_pyav, strict=False)


# ------------------------------------------------------------------------------------------ captions without a picture


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mine"
    (root / "images").mkdir(parents=True)
    for i in range(6):
        PIL.new("RGB", (4, 4), (i, 0, 0)).save(root / "images" / f"{i}.png")
    return root


def write_captions(folder, *lines: str):
    (folder / "captions.csv").write_text("\n".join(("image,caption,split", *lines)))


SPLITS = ("0.png,a,train", "1.png,b,train", "2.png,c,validation", "3.png,d,test")


def test_a_caption_without_picture_is_named_or_left_out_and_listed(folder, capsys):
    write_captions(folder, *SPLITS, "7.png,e,train", "7.png,f,train", "8.png,g,test")
    message = r"captions.csv, line 6: .*7\.png, nor of 1 others of 6; add them.*skip"
    with pytest.raises(FileNotFoundError, match=message):
        load_caption_dataset("caption_files", data_dir=str(folder))
    dataset = load_caption_dataset("caption_files", data_dir=str(folder), strict=False)
    assert {split: rows["caption_id"][:] for split, rows in dataset.items()} == {
        "train": ["pictures/0.png#0", "pictures/1.png#0"],
        "validation": ["pictures/2.png#0"],
        "test": ["pictures/3.png#0"],
    }
    places = [f"{folder / 'captions.csv'}, line {line}: {name}" for line, name in ((6, "7.png"), (8, "8.png"))]
    assert "left out, without pictures: 2 of 6\n  " + "\n  ".join(places) + "\n" in capsys.readouterr().out
    write_captions(folder, "7.png,e,train")
    with pytest.raises(FileNotFoundError, match=r"line 2: .* has no pictures of 7\.png"):  # a wrong folder
        load_caption_dataset("caption_files", data_dir=str(folder), strict=False)
    write_captions(folder, *SPLITS, ",e,train")
    with pytest.raises(ValueError, match=r"captions.csv, line 6: image is empty; fill it or leave the line out"):
        load_caption_dataset("caption_files", data_dir=str(folder))
    with pytest.raises(ValueError, match="missing must be error or skip, got 'ignore'"):
        CaptionFiles(data_dir=folder, missing="ignore")


@pytest.mark.parametrize("name", ["exif_broken.webp", "orient6_strtag.jpg", "textbomb.png", "rawprofile_broken.png"])
def test_a_picture_with_damaged_metadata_is_trained_on(folder, name):
    (folder / "images" / name).write_bytes((FIXTURES / name).read_bytes())
    write_captions(folder, *SPLITS, f"{name},e,train")
    dataset = load_caption_dataset("caption_files", data_dir=str(folder))
    size = (200, 320) if name.startswith("orient6") else (320, 200)
    assert dataset["train"][2]["image"].size == size
    assert dataset["train"].select([2, 0]).map(lambda row: {"n": 1})[0]["image"].size == size


def test_a_folder_with_brackets_in_its_name_is_no_pattern(folder):
    write_captions(folder, *SPLITS)
    dataset = load_caption_dataset("caption_files", data_dir=str(folder))
    written = folder / "mine [2024] *"
    for split, rows in dataset.items():
        (written / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(written / "data" / f"{split}-00000-of-00001.parquet")
    again = load_caption_dataset("parquet", data_dir=str(written))
    assert {split: rows["caption_id"][:] for split, rows in again.items()} == {
        split: rows["caption_id"][:] for split, rows in dataset.items()
    }


def test_equal_pictures_of_two_splits_are_told(folder, capsys):
    columns = {"caption_id": ["a"], "image": [str(folder / "images/0.png")]}
    (folder / "copy.png").write_bytes((folder / "images/0.png").read_bytes())
    dataset = {
        "train": Dataset.from_dict(columns | {"image_id": ["x/0"]}).cast_column("image", Image()),
        "test": Dataset.from_dict(columns | {"image_id": ["y/0"], "image": [str(folder / "copy.png")]}),
    }
    dataset["test"] = dataset["test"].cast_column("image", Image())
    check_ids(dataset)
    assert (
        "1 pictures of one split equal one of another, such as x/0 of train and y/0 of test" in capsys.readouterr().out
    )


# ------------------------------------------------------------------------------------------------ ids that are twice


def test_ids_that_occur_twice_are_named(folder, monkeypatch, tmp_path):
    write_captions(folder, *SPLITS)
    with pytest.raises(ValueError, match=r"train, row 2: the caption_id pictures/0\.png#0 is that of row 0 already"):
        load_caption_dataset("caption_files+caption_files", data_dir=str(folder))
    rows = {"train": ["a", "b", "a"], "validation": ["c"], "test": ["d", "b"], "test_other": ["a"]}
    dataset = {
        split: {"image_id": ids, "caption_id": [f"{split}{row}" for row in range(len(ids))]}
        for split, ids in rows.items()
    }
    with pytest.raises(ValueError, match=r"test, row 1: the picture b is in row 1 of train too; all captions"):
        check_ids(dataset)
    dataset["test"]["image_id"] = ["d", "d"]
    check_ids(dataset)
    monkeypatch.setattr(Tuxpaint, "_paths", lambda self: [])
    monkeypatch.setattr(
        Tuxpaint, "_pictures", lambda *_: iter([("stamps/a", "A fox.", "R", b""), ("stamps/a", "Fox", "R", b"")])
    )
    with pytest.raises(ValueError, match="tuxpaint gl: stamps/a is there twice, as 'A fox.' and 'Fox'; remove one"):
        Tuxpaint(config_name="gl", hash="x", cache_dir=tmp_path).download_and_prepare()


# ---------------------------------------------------------------------------------------------------------- no frames


def test_features_of_no_frames_are_named(tmp_path):
    header = {"image_ids": json.dumps(["a", "b"]), "num_frames": json.dumps([2, 0])}
    save_file({"visual_feats": np.ones((2, 3), np.float32)}, tmp_path / "features-0.safetensors", metadata=header)
    features = open_features(tmp_path)
    assert features["a"].shape == (2, 3)
    with pytest.raises(ValueError, match=f"{tmp_path}: 'b' has no frames; extract its features again, or leave it"):
        features["b"]


# ------------------------------------------------------------------------------------------------- cut-off downloads

HALF = """
if sys.argv[1:2] != ["update"] and "download" in sys.argv:
    import os, signal
    open("data_1.0_all.deb", "w").write("da")
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(1)
"""
HALF_UNPACKED = """
import os, signal
os.makedirs(sys.argv[3] + "/usr/share", exist_ok=True)
open(sys.argv[3] + "/usr/share/data", "w").write("da")
os.kill(os.getppid(), signal.SIGKILL)
sys.exit(1)
"""


@pytest.mark.parametrize("tool, body", [("apt-get", HALF), ("dpkg-deb", HALF_UNPACKED)])
def test_a_killed_download_is_started_again(fake_apt, tmp_path, tool, body):  # noqa: F811
    script = tmp_path / "tools" / tool
    whole = script.read_text()
    head, _, _ = whole.partition("import sys\n")
    script.write_text(f"{head}import sys\n{body}")
    process = multiprocessing.get_context("fork").Process(target=debian.fetch_packages, args=(["data"],))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    (base,) = (tmp_path / "packages cache").iterdir()
    assert list(base.glob("download-*")) and not list((base / "stamps").iterdir())
    script.write_text(whole)
    root = debian.fetch_packages(["data"])
    assert (root / "usr/share/data").read_text() == "data" and not list(base.glob("download-*"))


def test_a_full_disk_is_named(fake_apt, tmp_path, monkeypatch):  # noqa: F811
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(debian.tempfile, "TemporaryDirectory", full)
        with pytest.raises(debian.FetchError, match="cannot be written .*No space left on device.*make room, or set"):
            debian.fetch_packages(["data"])
    assert (debian.fetch_packages(["data"]) / "usr/share/data").exists()
