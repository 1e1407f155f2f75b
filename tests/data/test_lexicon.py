"""Words to train on beside captions: where they come from, which pairs are kept, and that they need no source view."""

import pytest
import torch

from datasets_scripts.reading.wordnet import common_words
from modeling_nrccr import NrccrTrainer, NrccrTrainingArguments
from modeling_nrccr.data import lexicon
from modeling_nrccr.data.collator import DataCollatorForCrossLingualRetrieval
from modeling_nrccr.data.lexicon import lexicon_rows
from modeling_nrccr.translation.base import Translator
from tests.support import WordProcessor, tiny_model, toy_rows


COUNTS = """cat%1:05:00:: 1 18
cat%1:18:01:: 2 3
be%2:42:00:: 1 9999
ice_cream%1:13:00:: 1 4
red%5:00:00:chromatic:00 1 29
1st%5:00:00:ordinal:00 1 50
bank%1:14:00:: 1 20
"""


class Engine(Translator):
    """`cat` <-> `gato`; a bank becomes a bench, and what it does not know stays."""

    name = version = "toy"
    WORDS = {"cat": "Gato", "red": "vermello", "bank": "banco"}
    BACK = {"gato": "Cat", "vermello": "Red", "banco": "Bench"}

    def supported_pairs(self):
        return [("en", "gl"), ("gl", "en")]

    def _translate(self, texts, source, target):
        known = self.WORDS if source == "en" else self.BACK
        return [known.get(text.rstrip("."), text.rstrip(".")) + "." for text in texts]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "usr/share/wordnet/cntlist.rev"
    path.parent.mkdir(parents=True)
    path.write_text(COUNTS)
    monkeypatch.setattr(lexicon, "load_engine", lambda *args, **kwargs: Engine())
    return tmp_path


def test_the_commonest_nouns_and_adjectives(folder):
    assert common_words(4, folder) == ["red", "cat", "bank", "ice cream"]
    with pytest.raises(ValueError, match="has 4 nouns and adjectives, fewer than 5"):
        common_words(5, folder)


def test_pairs_that_come_back_as_they_were_are_kept(folder):
    rows = lexicon_rows("wordnet:4", "en", "gl", "toy,toy", folder)
    assert [(row["source_caption"], row["target_caption"]) for row in rows] == [("red", "vermello"), ("cat", "gato")]
    (folder / "words.txt").write_text("cat\n\ncat\nzebra\n")
    assert len(lexicon_rows(str(folder / "words.txt"), "en", "gl", "toy", folder)) == 1
    (folder / "words.txt").write_text("zebra\n")
    with pytest.raises(ValueError, match="translates no word of .*words.txt there and back"):
        lexicon_rows(str(folder / "words.txt"), "en", "gl", "toy", folder)
    with pytest.raises(ValueError, match="is English, not 'de'"):
        lexicon_rows("wordnet:4", "de", "gl", "toy", folder)


def test_rows_that_bring_their_teacher_need_no_source_caption(tmp_path):
    rows = toy_rows(16)
    for row in rows:
        row["teacher_text_embeds"] = torch.ones(11) / 11**0.5
        row["source_caption"] = None
    model = tiny_model(text_head="pooling", visual_head="pooling", teacher_view="source")
    model.add_language("xx", kind="lora", layers=3, rank=2)
    args = NrccrTrainingArguments(
        output_dir=str(tmp_path),
        train_language="xx",
        text_only=True,
        losses={"feature_distillation": 1.0},
        max_steps=3,
        per_device_train_batch_size=8,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        learning_rate=0.05,
    )
    trainer = NrccrTrainer(model, args, rows, data_collator=DataCollatorForCrossLingualRetrieval(WordProcessor()))
    trainer.calibrate_language = lambda: None  # it reads source captions
    first = trainer.data_collator(rows[:2])
    assert not any(key in first for key in ("input_ids", "attention_mask")) and "target_input_ids" in first
    trainer.train()
    assert model.adapter("xx").update.weight.abs().max() > 0  # LoRA's Linear is trained too
    assert args.needed_views(taught=True) == ("target",) and args.needed_views() == ("source", "target")
