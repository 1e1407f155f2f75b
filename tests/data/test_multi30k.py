"""Multi30K: the real text where it is (`../shared/data/multi30k`, or MULTI30K_DIR), and small files in its form."""

import gzip
import hashlib
import http.server
import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from datasets_scripts import multi30k
from datasets_scripts.multi30k import Multi30k
from datasets_scripts.reading.debian import FetchError
from datasets_scripts.tools.verify import verify
from modeling_nrccr.data.load import load_caption_dataset
from modeling_nrccr.training import run as train
from modeling_nrccr.translation.base import Translator
from modeling_nrccr.translation.engines import ENGINES
from tests.training.test_recipes import encoders  # noqa: F401
from tests.training.test_train_benchmarks import WITHOUT_CYCLE


ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("MULTI30K_DIR", ROOT.parent / "shared/data/multi30k"))
real = pytest.mark.skipif(
    not REAL.is_dir() and os.environ.get("CI") != "true",
    reason=f"no Multi30K text in {REAL}; name its folder by MULTI30K_DIR",
)
COUNTS = {"train": 9, "val": 3, "test_2016_flickr": 4, "test_2017_flickr": 2, "test_2018_flickr": 2}
TASK2 = {"train": "train", "val": "val", "test_2016_flickr": "test_2016"}


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, lines: list[str]):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path):
    """A small Multi30K in upstream's form, in all languages, without the test set of MSCOCO in Czech."""
    root = tmp_path / "multi30k"
    counts = COUNTS | {"test_2017_mscoco": 2}
    for name, count in counts.items():
        pictures = [f"{name.replace('_', '')}{i}.jpg" for i in range(count)]
        if name == "test_2017_mscoco":
            pictures = [f"COCO_val2014_{i}.jpg#{i + 100}" for i in range(count)]
        write(root / f"task1/image_splits/{name}.txt", pictures)
        for language in ("en", "de", "fr", "cs"):
            if not (language == "cs" and "2017" in name):
                lines = [f" red {language} {name} {i}" for i in range(count)]
                write(root / f"task1/raw/{name}.{language}.gz", lines)
        if name in TASK2:
            write(root / f"task2/image_splits/{TASK2[name]}_images.txt", pictures)
            for language in ("en", "de"):
                for k in range(1, 6):
                    lines = [f"{language} {name} {i}.{k}" for i in range(count)]
                    write(root / f"task2/raw/{TASK2[name]}.{k}.{language}.gz", lines)
    return root


def build(folder, config="task1-de", **options):
    builder = Multi30k(config_name=config, data_dir=folder, cache_dir=folder / "cache", **options)
    builder.download_and_prepare()
    return builder.as_dataset()


def test_task_1(folder):
    dataset = build(folder)
    assert {name: len(rows) for name, rows in dataset.items()} == {
        "train": 9,
        "validation": 3,
        "test": 4,
        "test_2017_flickr": 2,
        "test_2018_flickr": 2,
        "test_2017_mscoco": 2,
    }
    train_row, test_row = dataset["train"][2], dataset["test"][1]
    assert train_row == {
        "image_id": "flickr30k/train2",
        "caption_id": "flickr30k/train2#0",
        "source_caption": "red en train 2",
        "target_caption": None,
        "back_translation": None,
        "source_language": "en",
        "target_language": "de",
        "target_origin": None,
        "reference_source_caption": None,
        "image": None,
    }
    assert test_row["target_caption"] == "red de test_2016_flickr 1" and test_row["source_caption"] is None
    assert test_row["reference_source_caption"] == "red en test_2016_flickr 1" and test_row["target_origin"] == "human"
    assert dataset["test_2017_mscoco"][1]["image_id"] == "coco/COCO_val2014_1"
    assert list(build(folder, "task1-cs")) == ["train", "validation", "test", "test_2018_flickr"]


def test_human_captions_are_the_upper_bound_alone(folder):
    for config in ("task1-fr", "task2-de"):
        translated, human = build(folder, config), build(folder, config, target="human")
        assert set(translated["train"]["target_caption"]) == set(translated["test"]["source_caption"]) == {None}
        assert None not in human["train"]["target_caption"] and set(human["train"]["target_origin"]) == {"human"}
        assert translated["test"]["target_caption"][:] == human["test"]["target_caption"][:]
    with pytest.raises(ValueError, match="task2-fr has no human fr training captions.*task1-fr"):
        build(folder, "task2-fr", target="human")


def test_task_2(folder):
    german, french = build(folder, "task2-de"), build(folder, "task2-fr")
    assert list(german) == ["train", "validation", "test"] and len(german["train"]) == 45 and len(german["test"]) == 20
    assert german["train"]["source_caption"][:] == french["train"]["source_caption"][:]
    assert german["train"][7]["caption_id"] == "flickr30k/train1#2"
    assert german["train"][7]["source_caption"] == "en train 1.3"
    assert german["test"][7]["target_caption"] == "de test_2016_flickr 1.3"
    assert french["test"]["target_caption"][:] == build(folder, "task1-fr")["test"]["target_caption"][:]
    assert french["test"]["image_id"][:] == list(dict.fromkeys(german["test"]["image_id"]))


def test_pictures(folder, tmp_path, capsys):
    for name in COUNTS.keys() - {"test_2018_flickr"}:
        for picture in (folder / f"task1/image_splits/{name}.txt").read_text().split():
            path = tmp_path / ("pictures/later" if "2017" in name else "pictures") / picture
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (len(picture), 7)).save(path)
    dataset = build(folder, image_dir=tmp_path / "pictures")
    assert dataset["train"][2]["image"].size == (len("train2.jpg"), 7)
    assert dataset["test_2017_flickr"][0]["image"].size[1] == 7  # in a folder below
    assert "test_2017_mscoco" not in dataset and "test_2018_flickr" not in dataset
    assert "test_2018_flickr is left out: " in capsys.readouterr().out
    (tmp_path / "pictures" / "val1.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"pictures has no pictures of val1\.jpg, nor of 0 others of 16; add them"
    ):
        build(folder, image_dir=tmp_path / "pictures")
    shutil.copytree(tmp_path / "pictures", tmp_path / "pictures" / "twice")
    (tmp_path / "pictures" / "train0.jpg").rename(tmp_path / "pictures" / "later" / "train0.jpg")
    with pytest.raises(ValueError, match=r"train0\.jpg is both .* and .*: name it by its path, or remove one"):
        build(folder, image_dir=tmp_path / "pictures")


def write_features(folder, target, without=()):
    """As an array with an id file, of the pictures of task 2; the array."""
    lists = [folder / f"task2/image_splits/{name}_images.txt" for name in ("train", "val", "test_2016")]
    pictures = [name if name not in without else "x" for path in lists for name in path.read_text().split()]
    target.mkdir()
    feats = np.arange(3 * len(pictures), dtype=np.float32).reshape(-1, 3)
    np.save(target / "all.npy", feats)
    (target / "all.id.txt").write_text(" ".join(pictures))
    return feats


def test_features_in_place_of_pictures(folder, tmp_path):
    feats = write_features(folder, tmp_path / "features")
    dataset = build(folder, visual_feature=tmp_path / "features")
    assert list(dataset) == ["train", "validation", "test"] and "image" not in dataset["train"].column_names
    assert np.array_equal(dataset["test"][1]["visual_feats"], feats[[13]])
    write_features(folder, tmp_path / "other", without=["train0.jpg"])
    with pytest.raises(FileNotFoundError, match=r"other has no features of train0\.jpg, nor of 0 others of 16"):
        build(folder, visual_feature=tmp_path / "other")


def test_it_streams_and_writes_parquet(folder):
    builder = Multi30k(config_name="task2-fr", data_dir=folder, cache_dir=folder / "cache")
    streamed = {split: list(rows) for split, rows in builder.as_streaming_dataset().items()}
    builder.download_and_prepare(folder / "out", file_format="parquet")
    written = datasets.load_dataset("parquet", data_files=str(folder / "out/*train*.parquet"), cache_dir=folder / "c")
    assert written["train"].to_list() == streamed["train"] and len(streamed["test"]) == 4


def test_the_folder_may_be_the_upstream_repository(folder, tmp_path):
    (tmp_path / "repository").mkdir()
    folder.rename(tmp_path / "repository/data")
    assert len(build(tmp_path / "repository")["train"]) == 9
    (tmp_path / "repository/data/task1/raw/val.de.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 18 files of task1-de, the first task1/raw/val\.de\.gz"):
        build(tmp_path / "repository")


def test_a_folder_of_one_test_set_alone(folder, tmp_path):
    for path in [*folder.glob("task1/raw/*"), *folder.glob("task1/image_splits/*")]:
        if not path.name.startswith("test_2016"):
            path.unlink()
    assert {name: len(rows) for name, rows in build(folder).items() if len(rows)} == {"test": 4}
    found = load_caption_dataset("multi30k:task1", "de", data_dir=str(folder))
    assert len(found["train"]) == 0 and found["test"]["target_caption"][1] == "red de test_2016_flickr 1"
    (folder / "task1/image_splits/test_2016_flickr.txt").unlink()  # of a split that is there in part
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 files of task1-de, the first task1/image_splits/test"):
        build(folder)
    for path in folder.glob("task1/raw/*.gz"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 18 of 18 files of task1-de"):
        build(folder)


def broken_caption_files():
    whole = gzip.compress("".join(f"eins {i}\n" for i in range(9)).encode(), mtime=0)
    yield "truncated", whole[:-12], r"train\.de\.gz: damaged after line \d"
    yield "noise", b"\x1f\x8beins", r"train\.de\.gz: damaged after line 0 .*fetch the file again"
    yield "misaligned", gzip.compress(b"eins\n" * 8), r"train\.de\.gz ends after line 8, but .* has 9"
    yield "blank", gzip.compress(b"eins\n" * 4 + b" \n" + b"eins\n" * 4), r"train\.de\.gz, line 5: no text"
    yield "Latin-1", gzip.compress(b"eins\n" * 5 + b"f\xfcnf\n" * 4), r"train\.de\.gz, line 6: not UTF-8 .*0xfc"


@pytest.mark.parametrize("case, data, message", [pytest.param(*case, id=case[0]) for case in broken_caption_files()])
def test_broken_files_are_named_with_their_line(folder, case, data, message):
    (folder / "task1/raw/train.de.gz").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        build(folder)


def test_a_picture_named_twice_is_an_error(folder):
    write(folder / "task1/image_splits/val.txt", ["val0.jpg", "val1.jpg", "val0.jpg"])
    with pytest.raises(ValueError, match=r"val\.txt, line 3: val0\.jpg is in line 1 already"):
        build(folder)


@pytest.fixture
def server(folder, monkeypatch):
    """Stands in for upstream; its address and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    sums = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in folder.glob("task*/*/*")
    )
    (folder / "sums").write_text(sums)
    monkeypatch.setattr(multi30k, "CHECKSUMS", folder / "sums")
    yield f"http://127.0.0.1:{served.server_port}", asked
    served.shutdown()
    served.server_close()


def download(url, tmp_path, config="task1-cs"):
    config = datasets.DownloadConfig(cache_dir=tmp_path / "downloads", max_retries=0), config
    builder = Multi30k(config_name=config[1], base_url=url, cache_dir=tmp_path / "cache")
    builder.download_and_prepare(download_config=config[0], download_mode="reuse_cache_if_exists")
    return builder.as_dataset()


def test_it_downloads_what_it_needs_and_checks_it(folder, server, tmp_path, monkeypatch):
    url, asked = server
    assert Multi30k(config_name="task1-cs").config.base_url.startswith("https://")
    raw = folder / "task1/raw/val.cs.gz"
    good = raw.read_bytes()
    raw.write_bytes(gzip.compress(b"jeden\n" * 3))
    with pytest.raises(FetchError, match=r"val\.cs\.gz has sha256 .*, expected .* thrown away.*data_dir"):
        download(url, tmp_path)
    raw.write_bytes(good)
    dataset = download(url, tmp_path)  # the bad copy is not kept
    assert dataset["validation"]["target_caption"][:] == build(folder, "task1-cs")["validation"]["target_caption"][:]
    assert asked and not [path for path in asked if ".de." in path or "task2" in path]
    count = len(asked)
    streamed = Multi30k(config_name="task1-cs", base_url=url, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    assert next(iter(streamed.as_streaming_dataset()["train"]))["source_caption"] == "red en train 0"
    assert len(asked) == count  # they are there


def test_no_network_names_the_other_way(folder, server, tmp_path):
    url, _ = server
    (folder / "task1/raw/train.en.gz").unlink()
    for address in (url, "http://127.0.0.1:9"):
        with pytest.raises(FetchError, match=f"^Cannot download Multi30K from {address} .*data_dir"):
            download(address, tmp_path)


class Reverser(Translator):
    name = "reverser"

    def __init__(self, root=None):
        pass

    def supported_pairs(self):
        return [("en", "de"), ("de", "en")]

    def _translate(self, texts, source, target):
        return [text[::-1] for text in texts]


def run_recipe(name, folder, towers, tmp_path, monkeypatch, **changes):
    monkeypatch.setitem(ENGINES.entries, "reverser", Reverser)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = {
        "recipe": ROOT / f"modeling_nrccr/recipes/paper/{name}.yaml",
        "data_dir": folder,
        "translator": "reverser",
        "text_encoder": towers / "text",
        "output_dir": tmp_path / "out",
        "num_train_epochs": 1,
        "use_cpu": True,
        "per_device_train_batch_size": 5,
        "projection_dim": 8,
        "disable_tqdm": True,
        **changes,
    }
    train.train_recipe(**flags)
    return json.loads((tmp_path / "out/metrics.json").read_text())


def test_the_papers_recipe_trains_on_pictures(folder, encoders, tmp_path, monkeypatch):  # noqa: F811
    (folder / "images").mkdir()
    for path in (folder / "task1/image_splits").glob("*.txt"):
        for name in path.read_text().split():
            Image.new("RGB", (9, 7), (len(name) * 9, 40, 40)).save(folder / "images" / name.partition("#")[0])
    options = {"vision_encoder": encoders / "vision"}
    report = run_recipe("multi30k_task1", folder, encoders, tmp_path, monkeypatch, **options)
    assert report["settings"]["pictures"]["test"] == 4 and report["settings"]["translator"] == "reverser"
    shutil.rmtree(folder / "images")
    with pytest.raises(ValueError, match="multi30k:task1, train: rows without image; put pictures into"):
        run_recipe("multi30k_task1", folder, encoders, tmp_path / "2", monkeypatch, **options)


def test_the_papers_recipe_trains_on_features(folder, encoders, tmp_path, monkeypatch):  # noqa: F811
    write_features(folder, folder / "FeatureData")
    options = {"vision_encoder": "none", "visual_feat_dim": 3, "visual_head": "linear"}
    # the upper bound, which needs no engine
    options |= {"target_captions": "human", "translator": "none", "losses": WITHOUT_CYCLE}
    report = run_recipe("multi30k_task2", folder, encoders, tmp_path, monkeypatch, **options)
    assert report["settings"]["pictures"]["test"] == 4 and report["settings"]["target_captions"] == "human"


def test_the_numbers_in_the_docs_are_those_of_the_run():
    from benchmarks.translation.multi30k_text import BLOCK, tables

    report = json.loads((ROOT / "docs/multi30k_text.json").read_text())
    assert tables(report) in BLOCK.search((ROOT / "docs/datasets.md").read_text())[0]


@real
def test_the_real_text():
    table, problems = verify("multi30k", str(REAL), ["task1-cs"])
    assert not problems and "29000 of 29000    29000 of 29000" in "\n".join(table)
    row = next(iter(Multi30k(config_name="task1-cs", data_dir=REAL).as_streaming_dataset()["test"]))
    assert row["image_id"] == "flickr30k/1007129816" and row["source_caption"] is None
    assert row["target_caption"] == "Muž v oranžovém klobouku na něco zírá."
    assert row["reference_source_caption"] == "A man in an orange hat starring at something."


@real
def test_the_checksums_are_those_of_the_real_files():
    lines = multi30k.CHECKSUMS.read_text().splitlines()
    assert len(lines) == 62
    for line in lines:
        digest, name = line.split()
        assert hashlib.sha256((REAL / name).read_bytes()).hexdigest() == digest, name


@real
@pytest.mark.slow
def test_all_of_the_real_text():
    assert not verify("multi30k", str(REAL))[1]
