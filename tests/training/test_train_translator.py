"""`nrccr train-translator`: a toy world in Multi30K's form becomes an engine for both directions."""

import gzip
import json
import random
import shutil

import datasets
import pytest
import torch
from transformers import MarianMTModel, MarianTokenizer

from modeling_nrccr.training import translator as train_translator
from modeling_nrccr.training.checkpoints import MARKER, mark_complete
from modeling_nrccr.translation.seq2seq import Seq2SeqTranslator


WORDS = {
    "dog": "pes",
    "man": "muž",
    "boy": "chlapec",
    "runs": "běží",
    "sits": "sedí",
    "sleeps": "spí",
    "here": "tady",
    "outside": "venku",
    "alone": "sám",
    "today": "dnes",
}
SUBJECTS, VERBS, PLACES = ("dog", "man", "boy"), ("runs", "sits", "sleeps"), ("here", "outside", "alone", "today")
TINY = {
    "vocab_size": 38,
    "d_model": 32,
    "layers": 1,
    "ffn_dim": 48,
    "attention_heads": 2,
    "dropout": 0,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 12,
    "warmup_steps": 3,
    "bf16": "false",
    "label_smoothing_factor": 0.1,
    "also_test_on": "",
    "disable_tqdm": "true",
}


def toy_pairs(count: int) -> list[tuple[str, str]]:
    """English word by word in Czech, with a capital and a full stop."""
    generator = random.Random(0)
    chosen = [[generator.choice(of_kind) for of_kind in (SUBJECTS, VERBS, PLACES)] for _ in range(count)]
    return [(" ".join(ws).capitalize() + ".", " ".join(WORDS[w] for w in ws).capitalize() + ".") for ws in chosen]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 pairs to train on, in the files of Multi30K's task 1."""
    root = tmp_path_factory.mktemp("multi30k")
    (root / "task1/raw").mkdir(parents=True)
    (root / "task1/image_splits").mkdir()
    for name, count in {"train": 60, "val": 6, "test_2016_flickr": 5, "test_2018_flickr": 4}.items():
        pairs = toy_pairs(count)
        pictures = [f"{name.replace('_', '')}{i}.jpg" for i in range(count)]
        (root / f"task1/image_splits/{name}.txt").write_text("\n".join(pictures) + "\n")
        for language, captions in zip(("en", "cs"), zip(*pairs)):
            text = "".join(f"{caption}\n" for caption in captions)
            (root / f"task1/raw/{name}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, no_bars):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def run(folder, output_dir, **flags) -> dict:
    flags = TINY | {"data_dir": folder, "output_dir": output_dir} | flags
    report = train_translator.train_translator(**flags)
    assert report == json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    return report


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folder of an engine that has learned the toy world, and its report."""
    output_dir = tmp_path_factory.mktemp("out") / "engine"
    datasets.disable_progress_bars()
    return output_dir, run(folder, output_dir, num_train_epochs=15, learning_rate=1e-2)


def weights(folder) -> dict[str, torch.Tensor]:
    return MarianMTModel.from_pretrained(folder).state_dict()


def test_the_engine_translates_both_ways(trained):
    output_dir, report = trained
    assert report["scores"].keys() == {"en-cs", "cs-en"}
    for of_sets in report["scores"].values():
        assert of_sets.keys() == {"validation", "test", "test_2018_flickr"}
        assert of_sets["test"]["greedy"]["captions"] == 5 and of_sets["test"]["beam_4"]["bleu"] > 50
    engine = Seq2SeqTranslator(output_dir)
    assert set(engine.supported_pairs()) == {("en", "cs"), ("cs", "en")}
    assert engine.translate(["Dog runs here."], "en", "cs") == ["Pes běží tady."]
    assert report["parameters"] == sum(parameter.numel() for parameter in engine.model.parameters())
    assert report["pairs"]["train"] == 60 and report["training"]["steps"] == 150


def test_the_folder_is_laid_out_as_opus_mt_is(trained):
    output_dir, report = trained
    tokenizer, model = MarianTokenizer.from_pretrained(output_dir), MarianMTModel.from_pretrained(output_dir)
    assert tokenizer.supported_language_codes == [">>cs<<", ">>en<<"]
    vocabulary = json.loads((output_dir / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary["</s>"] == 0 and vocabulary["<unk>"] == 1 and vocabulary["<pad>"] == len(vocabulary) - 1
    tag, *_, end = tokenizer(">>cs<< Dog runs.")["input_ids"]
    assert (tag, end) == (vocabulary[">>cs<<"], 0)
    pad = model.config.decoder_start_token_id
    assert pad == vocabulary["<pad>"] and not model.get_input_embeddings().weight[pad].any()  # nor was it trained
    samples = report["samples"]["cs-en"]["test"]
    batch = tokenizer([f">>en<< {row['source']}" for row in samples], return_tensors="pt", padding=True)
    answers = tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)
    assert answers == [row["translation"] for row in samples] and len(set(answers)) > 1


def test_what_is_trained_already_is_only_tested(trained, folder, tmp_path):
    output_dir, report = trained
    shutil.copytree(output_dir, tmp_path / "copy")
    (tmp_path / "copy/metrics.json").unlink()
    assert run(folder, tmp_path / "copy", do_train="false") == report
    with pytest.raises(ValueError, match="elsewhere holds no training.json"):
        run(folder, tmp_path / "elsewhere", do_train="false")


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(folder, tmp_path):
    flags = {"both_directions": "false", "num_train_epochs": 3, "dropout": 0.1}
    whole = run(folder, tmp_path / "whole", **flags)
    checkpoints = tmp_path / "killed-checkpoints"
    shutil.copytree(tmp_path / "whole-checkpoints", checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-15"]
    (checkpoints / "checkpoint-15" / MARKER).unlink()  # killed while it was written
    costs = {"wall": 6000.0, "cpu": 5400.0}
    (checkpoints / "checkpoint-10" / train_translator.COSTS).write_text(json.dumps(costs))
    mark_complete(checkpoints / "checkpoint-10")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run: --resume_from_checkpoint true"):
        run(folder, tmp_path / "killed", **flags)
    resumed = run(folder, tmp_path / "killed", **flags, resume_from_checkpoint="true")
    spent = resumed["training"]
    assert spent["resumed_from_step"] == 10 and 100 <= spent["minutes"] < 101 and 90 <= spent["cpu_minutes"] < 91
    assert resumed["scores"] == whole["scores"]
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "killed").items())


def test_an_engine_of_one_direction_has_no_tags(folder, tmp_path):
    run(folder, tmp_path / "engine", both_directions="false", num_train_epochs=1)
    assert MarianTokenizer.from_pretrained(tmp_path / "engine").supported_language_codes == []
    assert Seq2SeqTranslator(tmp_path / "engine").supported_pairs() == [("en", "cs")]


def test_the_source_begins_with_the_target_language():
    script, _ = train_translator.parse_arguments(["--output_dir", "out"])
    assert train_translator.directed([("A dog.", "Pes.")], script) == [
        (">>cs<< A dog.", "Pes."),
        (">>en<< Pes.", "A dog."),
    ]


def test_plain_forms_are_plain_on_both_sides():
    pairs = [("A dog.", "Pes.")] * 200 + [("A", ".")]
    plain = train_translator.with_plain_forms(pairs, 0.25, seed=0)
    assert set(plain[:200]) == {("A dog.", "Pes."), ("a dog", "pes")}
    assert 30 < plain.count(("a dog", "pes")) < 70
    assert train_translator.with_plain_forms(pairs, 0.25, seed=0) == plain != pairs
    assert train_translator.with_plain_forms(pairs, 0, seed=0) == pairs
    assert train_translator.plain_caption(".") == "."  # never nothing


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=5000 does not fit 120 captions: .*<= \d+"):
        run(folder, tmp_path / "out", vocab_size=5000)
    (tmp_path / "wrong.yaml").write_text("vocab_sise: 60\n")
    with pytest.raises(ValueError, match="wrong.yaml: vocab_sise is no field .do you mean vocab_size"):
        train_translator.train_translator(tmp_path / "wrong.yaml")


def test_only_pairs_that_people_wrote_are_learned(monkeypatch, tmp_path):
    rows = {"source_caption": ["A dog.", "A cat."], "target_caption": ["Pes.", "Kočka."]}
    rows["target_origin"] = ["human", "apertium"]
    dataset = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    monkeypatch.setattr(train_translator, "load_caption_dataset", lambda *args, **kwargs: dataset)
    script, _ = train_translator.parse_arguments(["--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match=r"toys, train, row 1: 'A cat.' -> 'Kočka.' \(by apertium\) is no pair"):
        train_translator.caption_pairs("toys", script, None)
