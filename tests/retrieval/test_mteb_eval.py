"""`nrccr mteb`: mteb's numbers of this model are this repository's."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader

from modeling_nrccr import NrccrModel
from modeling_nrccr.retrieval.evaluation import evaluate_dataset
from tests.model.test_hub import publish
from tests.publishing.test_sentence_transformers import caption_rows


mteb = pytest.importorskip("mteb", reason="needs the extra mteb")

from modeling_nrccr.cli import mteb as command  # noqa: E402
from modeling_nrccr.retrieval import mteb_tasks as mteb_eval  # noqa: E402


RECALLS = [f"{way}_recall@{k}" for way in ("t2v", "v2t") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mteb") / "model"
    publish(folder)
    return folder


@pytest.fixture
def encoder(folder, no_bars):
    return mteb_eval.NrccrEncoder(str(folder))


@pytest.fixture
def test_rows():
    return {"gl": caption_rows(0), "es": caption_rows(1)}


def ours(encoder, rows: Dataset) -> dict[str, float]:
    metrics = evaluate_dataset(encoder.model, encoder.processor, rows, show_progress=False)["all"]["metrics"]
    return {name: metrics[name] for name in (*RECALLS, "sum_recall")}


def test_its_numbers_are_ours(encoder, test_rows):
    tasks = [mteb_eval.caption_task("toys", category, test_rows) for category in ("t2i", "i2t")]
    scores = mteb_eval.run(encoder, tasks, batch_size=5, show_progress=False)
    assert set(scores) == {"toysT2IRetrieval", "toysI2TRetrieval"} and set(scores["toysT2IRetrieval"]) == {"gl", "es"}
    rows = mteb_eval.both_directions(scores)
    for language in ("gl", "es"):
        expected = ours(encoder, test_rows[language])
        assert rows[f"toys {language}"] == pytest.approx(expected, abs=0.006)  # mteb rounds to five digits
        assert 0 < expected["t2v_recall@10"] < 100
    # a caption has one picture, so its recall is its hit rate; a picture has two captions
    assert scores["toysT2IRetrieval"]["gl"]["recall_at_5"] == scores["toysT2IRetrieval"]["gl"]["hit_rate_at_5"]


@pytest.mark.parametrize("name", ["XM3600", "XFlickr30kCo", "Multi30k"])
def test_tasks_by_name_run_through_the_same_wrapper(encoder, test_rows, name):
    """With rows of ours in the place of what they fetch from the Hub."""
    tasks = []
    for way in ("T2I", "I2T"):
        task = mteb.get_task(f"{name}{way}Retrieval", languages=["deu"])
        assert task.metadata.type == mteb_eval.caption_task("toys", "t2i", test_rows).metadata.type
        (subset,) = task.hf_subsets
        data = mteb_eval.retrieval_data(test_rows["gl"], task.metadata.category)
        task.dataset, task.data_loaded = {subset: dict.fromkeys(task.eval_splits, data)}, True
        tasks.append(task)
    scores = mteb_eval.run(encoder, tasks, show_progress=False)
    found = mteb_eval.both_directions(scores)[f"{name} {subset}"]
    assert found == pytest.approx(ours(encoder, test_rows["gl"]), abs=0.006)


def test_from_the_command_line(folder, test_rows, monkeypatch, tmp_path, capsys):
    asked = []

    def load(name, language, seed, **options):
        asked.append((name, language, seed))
        return DatasetDict(test=test_rows[language])

    monkeypatch.setattr(mteb_eval, "load_caption_dataset", load)
    (folder / "metrics.json").write_text('{"settings": {"split_seed": 3}}')
    output = tmp_path / "mteb.json"
    languages = ["--query_language", "gl", "--query_language", "es"]
    command.main([str(folder), "--data", "toys", *languages, "--output", str(output)])
    assert asked == [("toys", "gl", 3), ("toys", "es", 3)]  # the split that the model was trained with
    assert "| toys gl | " in capsys.readouterr().out
    scores = json.loads(output.read_text())["scores"]
    assert scores["toysI2TRetrieval"]["es"]["languages"] == ["spa-Latn"]
    with pytest.raises(SystemExit, match="error: .*NoSuchTask"):
        command.main([str(folder), "--task", "NoSuchTask"])
    with pytest.raises(SystemExit, match="no such folder"):
        command.main([str(tmp_path / "none"), "--task", "XM3600T2IRetrieval"])


def test_what_is_measured_is_the_language_that_is_named(folder, test_rows, monkeypatch, tmp_path, no_bars):
    model = NrccrModel.from_pretrained(folder)
    torch.nn.init.normal_(model.add_language("gl").update.weight, std=2.0)
    model.save_language("gl", tmp_path / "gl")
    monkeypatch.setattr(mteb_eval, "load_caption_dataset", lambda *_, **options: DatasetDict(test=test_rows["gl"]))
    arguments = [
        str(folder),
        "--data",
        "toys",
        "--query_language",
        "gl",
        "--query_language",
        "es",
        "--output",
        str(tmp_path / "m.json"),
    ]
    command.main([*arguments, "--language", "base", "--language", f"gl={tmp_path / 'gl'}"])
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["settings"]["read_by"] == {"gl": "gl", "es": "base"}
    found = mteb_eval.both_directions(report["scores"])
    encoder = mteb_eval.NrccrEncoder(str(folder), languages=[f"gl={tmp_path / 'gl'}"])
    adapted = evaluate_dataset(encoder.model, encoder.processor, test_rows["gl"], show_progress=False, language="gl")
    plain = evaluate_dataset(encoder.model, encoder.processor, test_rows["gl"], show_progress=False, language=None)
    for code, expected in (("gl", adapted), ("es", plain)):
        metrics = expected["all"]["metrics"]
        assert found[f"toys {code}"]["sum_recall"] == pytest.approx(metrics["sum_recall"], abs=0.02)
    assert found["toys gl"] != found["toys es"]
    theirs = SimpleNamespace(hf_subsets_to_langscripts={"default": ["glg-Latn"], "fr": ["fra-Latn"]})
    encoder.languages = ["base", "gl"]
    assert encoder.reader(theirs, "default") == "gl" and encoder.reader(theirs, "fr") is None


def test_the_model_is_described_and_rows_of_both_kinds_are_refused(encoder, test_rows):
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.embed_dim, set(meta.modalities)) == ("local/model", 11, {"text", "image"})
    both = test_rows["gl"].rename_column("target_caption", "text")
    metadata = mteb_eval.caption_task("toys", "t2i", test_rows).metadata
    with pytest.raises(ValueError, match="toysT2IRetrieval gives image and text in a row"):
        encoder.encode(DataLoader(both), task_metadata=metadata, hf_split="test", hf_subset="gl")
    assert mteb_eval.language_code("cs") == "ces-Latn" and mteb_eval.language_code("uk") == "ukr-Cyrl"


def test_mteb_brings_no_torchvision():
    """Its extra `image` would, and transformers would then take other image processors."""
    from importlib.util import find_spec

    assert find_spec("torchvision") is None
