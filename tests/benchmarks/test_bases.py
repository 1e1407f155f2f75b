"""The bench of bases: each family's own classes, kind of tokenizer and image processor, small."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from benchmarks.bases import build as bases
from benchmarks.bases import table
from modeling_nrccr import FeatureCache, NrccrModel, NrccrProcessor, encode_images, encode_texts
from modeling_nrccr.dual_encoders import FAMILIES
from tests.support import ROOT


CAPTIONS = [
    f"{article} {colour} {animal}{place}."
    for article, colour, animal, place in itertools.product(
        ("A", "The"), ("red", "blue", "small"), ("cat", "dog", "woman’s hat"), ("", " in the house", ", running")
    )
]
# letters that the captions do not have, capitals, longer than any family reads
ASKED = ["A cat.", "O ñandú está á beira do RÍO", "γάτα 猫", " ".join(["the small red dog,"] * 40), "blue"]


@pytest.fixture(scope="module", params=bases.BASES)
def folder(request, tmp_path_factory) -> Path:
    """Untrained, with weights that do something."""
    folder = tmp_path_factory.mktemp(request.param)
    model = bases.save_untrained(bases.BASES[request.param], CAPTIONS, folder, bases.TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def test_every_family_has_a_base():
    assert bases.BASES.keys() == FAMILIES.keys()


@torch.no_grad()
def test_texts_and_pictures_are_embedded_as_by_the_familys_own_code(folder):
    theirs, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours, processor = NrccrModel.from_dual_encoder(str(folder)), NrccrProcessor.from_dual_encoder(str(folder))
    inputs = bases.text_inputs(tokenizer, theirs, ASKED)
    assert tokenizer(ASKED[0])["input_ids"][-1] == tokenizer.eos_token_id
    own = bases.text_embeds(theirs, **inputs)
    assert (own @ own.T).triu(1).max() < 0.9999  # the texts are told apart
    torch.testing.assert_close(encode_texts(ours, ASKED, processor), own, atol=1e-5, rtol=0)
    if not FAMILIES[theirs.config.model_type].vision_model:
        return
    pictures = [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((64, 48), (30, 90))]
    own = bases.picture_embeds(theirs, **AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt"))
    torch.testing.assert_close(encode_images(ours, pictures, processor), own, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_embedding_depends_on_nothing_but_its_text(folder):
    model, processor = NrccrModel.from_dual_encoder(str(folder)), NrccrProcessor.from_dual_encoder(str(folder))
    together = encode_texts(model, ASKED, processor)
    alone = torch.cat([encode_texts(model, [text], processor) for text in ASKED])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    for layers in (0, 2, 4):  # of EmbeddingGemma 2, both kinds of attention lie below and above 2
        cache = FeatureCache(model.set_trained_layers(layers, False).eval(), processor)
        cache.add_texts(ASKED)
        assert cache.is_exact
        torch.testing.assert_close(encode_texts(model, ASKED, cache), together, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_base_was_really_trained():
    """Its English finds far more than chance among pictures that were held out; `benchmarks/bases/table.py` asks all,
    which takes ten minutes."""
    record = bases.read_record(bases.base_folder("clip"))
    assert record["sum_recall"] > bases.FAR * record["chance"]


def test_a_walk_of_one_base_keeps_what_is_known_of_others():
    def of_base(recall: float, **steps) -> dict:
        return {"training": {"sum_recall": recall}, "steps": steps}

    before = {"siglip": of_base(7, linear=1), "clip": of_base(5, lora=2, linear=1)}
    assert list(table.merged(before, {"altclip": of_base(3)})) == ["clip", "altclip", "siglip"]
    found = table.merged(before, {"clip": of_base(5, lora=9)})
    assert found == {"clip": of_base(5, linear=1, lora=9), "siglip": before["siglip"]}
    assert list(found["clip"]["steps"]) == ["linear", "lora"]
    # trained anew: what was added to the old one says nothing of it
    assert table.merged(before, {"clip": of_base(6, lora=9)})["clip"] == of_base(6, lora=9)


def test_the_page_of_bases_is_written_from_the_committed_report(monkeypatch, tmp_path):
    page = tmp_path / "bases.md"
    page.write_bytes(table.PAGE.read_bytes())
    monkeypatch.setattr(table, "PAGE", page)
    table.main(["--page"])
    assert page.read_bytes() == (ROOT / "docs/bases.md").read_bytes()
