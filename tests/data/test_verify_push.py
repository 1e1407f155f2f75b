"""`nrccr data check` and `nrccr data push`."""

import datasets
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from datasets_scripts.multi30k import Multi30k
from datasets_scripts.tools import push_to_hub, verify
from modeling_nrccr.cli.data import main
from tests.data.test_multi30k import folder, write  # noqa: F401


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def mine(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    for name, colour in (("fox", (9, 99, 9)), ("dog", (9, 9, 99))):
        Image.new("RGB", (40, 40), colour).save(root / f"{name}.png")
    lines = ["image,caption,target_caption,split", "fox.png,A fox.,Un raposo.,train", "dog.png,A dog.,Un can.,test"]
    (root / "captions.csv").write_text("\n".join(lines))
    return root


def test_every_builder_is_found_by_its_name():
    names = verify.builder_names()
    assert {"caption_files", "cldr_emoji", "multi30k", "tuxpaint", "xm3600"} <= set(names)
    for name in names:
        builder = verify.find_builder(name)
        assert issubclass(builder, datasets.GeneratorBasedBuilder)
        assert verify.where_and_terms(builder).count("\n") >= 1 or builder.__doc__
    with pytest.raises(ValueError, match="unknown data set 'columns': known are .*caption_files"):
        verify.find_builder("columns")


def test_counts_are_compared_with_the_expected_ones(folder, monkeypatch, capsys):  # noqa: F811
    expected = {
        "task1-cs": {"train": (9, 9), "validation": (3, 3), "test": (4, 4), "test_2018_flickr": (2, None)},
    }
    monkeypatch.setattr(Multi30k, "EXPECTED", expected)
    main(["check", "multi30k", "--data_dir", str(folder)])
    output = capsys.readouterr().out
    assert "9 of 9" in output and "all as expected" in output and "none" in output
    assert "From: https://github.com/multi30k/dataset" in output and "Terms: Captions: no licence is stated" in output
    for name in ("task1/image_splits/val.txt", "task1/raw/val.en.gz", "task1/raw/val.cs.gz"):
        write(folder / name, ["a.jpg", "b.jpg"])
    expected["task1-cs"]["test_2017_flickr"] = (5, 5)
    with pytest.raises(SystemExit, match="^4 things are not as expected"):
        main(["check", "multi30k", "--data_dir", str(folder)])
    output = capsys.readouterr().out
    for line in (
        "validation: 2 items, expected 3",
        "validation: 2 captions, expected 3",
        "test_2017_flickr: 0 items, expected 5",
    ):
        assert f"task1-cs: {line}" in output


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(folder, capsys):  # noqa: F811
    (folder / "task1/raw/train.de.gz").unlink()
    _, problems = verify.verify("multi30k", str(folder), ["task1-de", "task1-fr"])
    assert "lacks 1 of 18 files of task1-de, the first task1/raw/train.de.gz" in problems[0]
    assert any(line == "task1-fr: train: 9 items, expected 29000" for line in problems)
    with pytest.raises(ValueError, match="Multi30k has no option media_dir; it has "):
        verify.verify("multi30k", str(folder), media_dir="x")


def test_pictures_are_opened(mine, capsys):
    main(["check", "caption_files", "--data_dir", str(mine), "--decode"])
    output = capsys.readouterr().out
    assert "image" in output and "all readable; no counts are known" in output
    data = (mine / "fox.png").read_bytes()
    (mine / "fox.png").write_bytes(data[:-30])
    assert verify.verify("caption_files", str(mine))[1] == []  # it is there
    with pytest.raises(SystemExit, match="^1 things"):
        main(["check", "caption_files", "--data_dir", str(mine), "--decode"])
    assert "train: 1 pictures cannot be opened: pictures/fox.png (" in capsys.readouterr().out


def test_a_dry_run_holds_captions_and_ids_and_no_media(mine, tmp_path, capsys):
    target = tmp_path / "upload"
    main(["push", "caption_files", "--data_dir", str(mine), "--dry_run", str(target), "--license", "cc0-1.0"])
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == ["README.md", "default/test-00000-of-00001.parquet", "default/train-00000-of-00001.parquet"]
    assert "not uploaded" in capsys.readouterr().out
    assert (mine / "fox.png").read_bytes()[-40:] not in b"".join(path.read_bytes() for path in target.rglob("*.*"))
    loaded = datasets.load_dataset(str(target), "default")
    assert "image" not in loaded["train"].column_names and loaded["train"]["image_id"][:] == ["pictures/fox.png"]
    # human translations do not pass for machine translations
    assert loaded["train"]["target_caption"][:] == [None] and loaded["test"]["target_caption"][:] == ["Un can."]
    card = DatasetCard.load(target / "README.md")
    assert card.data.license == "cc0-1.0" and card.data.language == ["en", "gl"]
    assert "| default | test | 1 | 1 |" in card.text
    with pytest.raises(SystemExit, match="upload is there and not empty"):
        main(["push", "caption_files", "--data_dir", str(mine), "--dry_run", str(target)])


def test_a_failed_dry_run_leaves_nothing(folder, tmp_path):  # noqa: F811
    (folder / "task1/raw/val.fr.gz").write_bytes(b"\x1f\x8bx")
    with pytest.raises(SystemExit, match=r"error: .*val\.fr\.gz: damaged"):
        main(
            ["push", "multi30k", "--config", "task1-cs", "--config", "task1-fr", "--data_dir", str(folder)]
            + ["--dry_run", str(tmp_path / "upload")]
        )
    assert not [path for path in tmp_path.iterdir() if "upload" in path.name]


def test_several_configurations_are_uploaded_with_their_card(folder, monkeypatch, capsys):  # noqa: F811
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))
            return f"https://hub.example/datasets/{repo_id}"

        def upload_folder(self, folder_path, **options):
            paths = [path for path in folder_path.rglob("*") if path.is_file()]
            calls.append(({str(path.relative_to(folder_path)) for path in paths}, options))

    monkeypatch.setattr(push_to_hub, "HfApi", Api)
    flags = ["--config", "task1-cs", "--config", "task2-de", "--data_dir", str(folder), "--private"]
    main(["push", "multi30k", *flags, "--repo_id", "me/captions"])
    (repo, create), (files, upload) = calls
    assert repo == upload["repo_id"] == "me/captions" and create["private"] and create["repo_type"] == "dataset"
    assert {"README.md", "task1-cs/test_2018_flickr-00000-of-00001.parquet"} <= files and len(files) == 1 + 4 + 3
    assert "https://hub.example/datasets/me/captions" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--dry_run FOLDER"):
        main(["push", "multi30k", "--data_dir", str(folder)])
    assert len(calls) == 2
