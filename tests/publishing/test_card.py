"""The model card: what it says comes from the run, and its snippets run."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_nrccr.publishing import card
from modeling_nrccr.training.run import report_rows
from tests.training.test_train_example import encoders, picture, published  # noqa: F401


ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo() -> dict:
    """`metrics.json` of the committed run of `make demo`."""
    return json.loads((ROOT / "docs/demo.json").read_text())


def fill(folder: Path, report: dict, query: str = "un can", **config) -> ModelCard:
    folder.mkdir(exist_ok=True)
    heads = {"text_head": "pooling", "visual_head": "pooling", "projection_dim": 1024}
    (folder / "config.json").write_text(json.dumps(heads | config))
    card.write_model_card(folder, report, report_rows(report), query)
    return ModelCard.load(folder / "README.md")


def test_metadata_are_what_the_hub_reads(demo, tmp_path):
    data = fill(tmp_path / "nrccr-gl", demo).data
    assert data.language == ["en", "gl"] and data.license == "apache-2.0" and data.library_name == "transformers"
    assert data.base_model == ["intfloat/multilingual-e5-small"]  # the vision tower has no hub id
    assert data.datasets is None and data.model_name == "nrccr-gl"
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    names = [f"{way}_recall@{k}" for way in ("t2v", "v2t") for k in (1, 5, 10)] + ["sum_recall"]
    assert found == {name: round(demo["test"][name], 2) for name in names}
    assert {result.dataset_config for result in data.eval_results} == {"en-gl"}

    demo["settings"] |= {"data": "multi30k:task1", "vision_encoder": "google/vit-base-patch16-224"}
    data = fill(tmp_path / "nrccr-gl", demo).data
    assert data.datasets == ["romrawinjp/multi30k"] and data.base_model[1] == "google/vit-base-patch16-224"


def test_the_first_line_names_the_translator(demo, tmp_path):
    first = fill(tmp_path / "a", demo).text.strip().splitlines()[0]
    assert (
        first
        == "# Picture search in Galician and English, trained on machine translation by apertium, apertium+es+apertium"
    )
    demo["settings"] |= {"target_captions": "human"}
    human = fill(tmp_path / "a", demo).text
    assert human.strip().splitlines()[0].endswith("trained on captions that people wrote")
    assert "Gender" not in human and "No translator was at work" in human


def test_baselines_stand_beside_the_model_and_nothing_is_invented(demo, tmp_path, monkeypatch):
    run = card.study_run(row="human", language="gl", split_seed=0, seed=0, condition="", point=None)
    study = run["test"]["target"]["all"]["sum_recall"]
    text = fill(tmp_path / "a", demo).text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    for row, metrics in {
        "en-only model, gl query": demo["baselines"]["english_only"],
        "en-only model, gl query translated to en": demo["baselines"]["translated_query"],
        "NRCCR, gl query": demo["test"],
    }.items():
        assert rows[row].endswith(f"{metrics['sum_recall']:.1f} |")
    assert rows["a new model, trained on human gl captions"].endswith(f"{study:.1f} |")
    assert "not measured in this run" in text and "Not measured beside" not in text

    # another recipe, or no study at hand: the row is left out, and the card says so
    for change, config in (
        ({"seed": 7}, {}),
        ({"language": "eu"}, {}),
        ({"trained_text_layers": 2}, {}),
        ({"data": "caption_files"}, {}),
        ({}, {"projection_dim": 512}),
    ):
        other = copy.deepcopy(demo)
        other["settings"] |= change
        text = fill(tmp_path / "a", other, **config).text
        assert "trained on human" not in text
        assert "Not measured beside this model: " in text and "captions that people wrote, in training." in text
    monkeypatch.setattr(card, "STUDIES", [tmp_path / "none.jsonl"])
    other = demo | {"baselines": {}}
    text = fill(tmp_path / "a", other).text
    assert "Not measured beside this model: a model of English captions alone, asked in Galician; the same" in text


def test_noise_is_told_where_it_was_measured(demo, tmp_path, monkeypatch):
    assert re.search(r"chrF 43\.\d and BLEU 19\.\d against captions", fill(tmp_path / "a", demo).text)
    other = copy.deepcopy(demo)
    other["settings"]["translator"] = "chat:some-model"
    assert "were not measured" in fill(tmp_path / "a", other).text
    monkeypatch.setattr(card, "NOISE", tmp_path / "translation.json")  # as from a wheel
    assert "were not measured" in fill(tmp_path / "a", demo).text


def test_the_losses_of_a_run_are_named(published):  # noqa: F811
    training = json.loads((published / "metrics.json").read_text())["settings"]["training"]
    assert training["losses"]["contrastive"] == 1 and "discriminator" not in training["losses"]
    text = ModelCard.load(published / "README.md").text
    assert "contrastive 1, " in text and f"Up to {training['duration']}, batches of 10" in text


def test_a_quote_in_a_query_breaks_no_snippet(demo, tmp_path):
    for media in ("image", "video", "visual_feats"):
        demo["settings"]["media"] = media
        text = fill(tmp_path / "a", demo, query='o "can" \\ {{corre}}').text
        for snippet in (part.split("```")[0] for part in text.split("```python\n")[1:]):
            compile(snippet, "card", "exec")
        assert "o 'can'  {{corre}}" in text and text.count("```python") == 2


def test_both_snippets_run(published, tmp_path):  # noqa: F811
    import random

    (published.parent / "pictures").mkdir()
    for colour in ("red", "green", "blue"):
        picture(colour, "left", random.Random(0)).save(published.parent / f"pictures/{colour}.png")
    first, second = (part.split("```")[0] for part in (published / "README.md").read_text().split("```python\n")[1:])
    # in one process: each import of the libraries takes seconds
    (tmp_path / "snippets.py").write_text(f"{first}\n{second}")
    command = [sys.executable, str(tmp_path / "snippets.py")]
    result = subprocess.run(command, cwd=published.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    similarity, *found = result.stdout.strip().splitlines()[-4:]
    assert -1 <= float(similarity) <= 1
    scores = [float(line.split()[0]) for line in found]
    assert scores == sorted(scores, reverse=True)
    assert {line.split()[1] for line in found} == {f"pictures/{name}.png" for name in ("red", "green", "blue")}
