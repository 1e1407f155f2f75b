"""What others write, each in a file of its own outside of the package, named `my_module:MyClass`, used for real. The
files are the snippets of CONTRIBUTING.md."""

import re
import sys

import numpy as np
import pytest
import torch

from modeling_nrccr import NrccrRetriever, load_translator
from modeling_nrccr.data.load import load_caption_dataset
from modeling_nrccr.language_adapters import NrccrLanguageAdapter
from modeling_nrccr.loading.encoders import find_encoder
from tests.support import ROOT, WordProcessor, tiny_model
from tests.training.test_trainer import trainer_of


def snippet(name: str) -> str:
    """Return the block of CONTRIBUTING.md that has a class of this name."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    (block,) = [block for block in blocks if f"class {name}" in block]
    assert len([line for line in block.splitlines() if line]) <= 10, block
    return block


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes `my_module.py` where Python finds it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    yield lambda text: (folder / "my_module.py").write_text(text, encoding="utf-8")
    sys.modules.pop("my_module", None)


def test_a_loss(module, tmp_path):
    module(snippet("Uniformity"))
    trainer = trainer_of(tmp_path / "run", losses="target_contrastive=1,my_module:Uniformity=0.1")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert trainer.data_collator.views == ("source", "target")
    weighted = logged["target_contrastive_loss"] + 0.1 * logged["my_module:Uniformity"]
    assert logged["my_module:Uniformity"] < 0 and logged["loss"] == pytest.approx(weighted, rel=1e-4)


def test_an_engine(module):
    module(snippet("Reverser"))
    assert load_translator("my_module:Reverser").translate(["can"], "gl", "en") == ["nac"]
    assert load_translator("my_module:Reverser:!").translate(["can"], "gl", "en") == ["nac!"]


def test_a_kind_of_adapter(module, tmp_path, monkeypatch):
    module(snippet("Scale"))
    kind, heads = "my_module:Scale", {"text_head": "pooling", "teacher_view": "source"}
    model = tiny_model(**heads)
    model.add_language("xx", kind=kind)
    texts = {"input_ids": torch.arange(2, 10).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    before = model.get_text_features(**texts, languages="xx").pooler_output
    torch.testing.assert_close(before, model.get_text_features(**texts).pooler_output)
    losses = {"feature_distillation": 1.0}
    trainer = trainer_of(tmp_path / "run", model, train_language="xx", text_only=True, losses=losses)
    trainer.train()
    after = model.eval().get_text_features(**texts, languages="xx").pooler_output
    assert not torch.allclose(before, after) and model.adapter("xx").update.factors.abs().sum() > 0

    model.save_language("xx", tmp_path / "xx")
    model.save_pretrained(tmp_path / "model")
    other = tiny_model(**heads)
    other.load_language("yy", tmp_path / "xx")
    torch.testing.assert_close(other.get_text_features(**texts, languages="yy").pooler_output, after)
    loaded = type(model).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded.get_text_features(**texts, languages="xx").pooler_output, after)
    # a file chooses no module that is imported
    monkeypatch.delitem(sys.modules, "my_module")
    refused = "of the kind 'my_module:Scale', which others wrote: import my_module first"
    with pytest.raises(ImportError, match=refused):
        tiny_model(**heads).load_language("yy", tmp_path / "xx")
    with pytest.raises(ImportError, match=refused):
        type(model).from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no subclass of nn.Module"):
        NrccrLanguageAdapter(4, kind="collections:OrderedDict")


def test_a_data_set(module, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    module(snippet("Numbers"))
    dataset = load_caption_dataset("my_module:Numbers", "gl")
    assert sum(map(len, dataset.values())) == 40 and all(map(len, dataset.values()))
    row = dataset["test"][0]
    number = int(row["image_id"].removeprefix("numbers/"))
    assert row["target_caption"] == f"o {number}" and row["image"].getpixel((0, 0))[0] == number


def test_any_builder_of_datasets(module, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    module('''
import datasets

from datasets_scripts.reading.columns import caption_columns, CAPTION_FEATURES


class Numbers(datasets.GeneratorBasedBuilder):
    """Numbers in two languages."""

    BUILDER_CONFIGS = [datasets.BuilderConfig("gl")]

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features(CAPTION_FEATURES | {"image": datasets.Image()}))

    def _split_generators(self, dl_manager):
        names = {"train": range(8), "validation": range(8, 12), "test": range(12, 16)}
        return [datasets.SplitGenerator(name=name, gen_kwargs={"numbers": rows}) for name, rows in names.items()]

    def _generate_examples(self, numbers):
        from PIL import Image

        for number in numbers:
            row = dict.fromkeys(CAPTION_FEATURES) | {
                "image_id": f"numbers/{number}",
                "caption_id": f"numbers/{number}#0",
                "source_caption": f"the number {number}",
                "target_caption": f"o {number}",
                "source_language": "en",
                "target_language": "gl",
            }
            yield number, row | {"image": Image.new("RGB", (4, 4), (number, 0, 0))}
''')
    dataset = load_caption_dataset("my_module:Numbers", "gl")
    assert {name: len(rows) for name, rows in dataset.items()} == {"train": 8, "validation": 4, "test": 4}
    assert dataset["test"][0]["target_caption"] == "o 12" and dataset["test"][0]["image"].size == (4, 4)


def test_an_encoder(module, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module('''
def build(folder):
    """A folder with a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder
''')
    assert find_encoder("my_module:build").endswith("my_module.build")


def test_an_index(module):
    module(snippet("Plain"))
    model = tiny_model(text_head="pooling", visual_head="pooling", teacher_view="source")
    retriever = NrccrRetriever(model, WordProcessor(), "my_module:Plain:here")
    embeds = np.eye(11, dtype=np.float32)
    retriever.add_embeds(torch.from_numpy(embeds), ids=list(range(11)))
    assert retriever.index.location == "here" and len(retriever) == 11
    assert [hit.id for hit in retriever.search(torch.from_numpy(embeds[3]), k=1)] == [3]


@pytest.mark.parametrize("spec", ["my_module:Missing", "no_module:Class"])
def test_what_is_not_there_is_said(spec, module):
    module("")
    with pytest.raises(ValueError, match="has no 'Missing'|there is no module 'no_module'"):
        load_translator(spec)
