"""A base reads its own language, bit for bit, and another text encoder the languages: one model, one index."""

import onnxruntime
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, PreTrainedTokenizerFast

from modeling_nrccr import (
    FeatureCache,
    NrccrModel,
    NrccrProcessor,
    NrccrRetriever,
    encode_texts,
    join_text_sides,
)
from modeling_nrccr.cli import export
from modeling_nrccr.publishing.sentence_transformers_files import write_sentence_transformers_files
from tests.model.test_dual_encoders import DUAL_ENCODERS, WORDS, save_processor_parts


SOURCE, TARGET = ["cat on house", "red", "blue dog"], ["cato ono houseo", "redo dogo", "blueo"]


@pytest.fixture(scope="module", params=["clip", "siglip", "embedding_gemma2"])
def sides(request, tmp_path_factory):
    """A base with its processor, and the model of two text sides that was made of it."""
    torch.manual_seed(0)
    folder, other = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("text")
    dual = AutoModel.from_config(DUAL_ENCODERS[request.param]).eval()
    with torch.no_grad():
        for parameter in dual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    dual.save_pretrained(folder)
    save_processor_parts(dual, folder)
    names = ["[PAD]", "[UNK]", "dogo", "cato", "redo", "blueo", "ono", "houseo"]  # in another order, padded by 0
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(other)
    BertModel(BertConfig(**WORDS | {"vocab_size": 8, "pad_token_id": 0})).save_pretrained(other)

    base, processor = NrccrModel.from_dual_encoder(str(folder)), NrccrProcessor.from_dual_encoder(str(folder))
    model = NrccrModel.from_dual_encoder(str(folder), text_encoder=str(other))
    language_processor = processor.with_tokenizer(str(other))
    model.add_language("xx", kind="lora", rank=3, layers=1)
    with torch.no_grad():
        for weights in model.language_weights("xx").values():
            weights.add_(0.3 * torch.randn_like(weights))
    alone = encode_texts(model, TARGET, language_processor, languages="xx")
    model.with_source_text_side(base)
    return base, processor, model, join_text_sides(language_processor, processor), alone


def test_each_text_is_read_by_its_side(sides):
    base, processor, model, joined, alone = sides
    english = encode_texts(base, SOURCE, processor)
    assert torch.equal(encode_texts(model, SOURCE, joined, languages=None), english)
    torch.testing.assert_close(encode_texts(model, TARGET, joined, languages="xx"), alone, atol=1e-6, rtol=0)
    mixed = encode_texts(model, [SOURCE[0], TARGET[0], SOURCE[1], TARGET[1]], joined, languages=[None, "xx"] * 2)
    expected = torch.stack([english[0], alone[0], english[1], alone[1]])
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=0)
    # the idiom of transformers: what a processor gives goes into the model
    with torch.no_grad():
        inputs = joined(text=[TARGET[1], SOURCE[1]], languages=["xx", None], return_tensors="pt")
        torch.testing.assert_close(
            model.get_text_features(**inputs).pooler_output, torch.stack([alone[1], english[1]]), atol=1e-6, rtol=0
        )
        inputs = joined(text=SOURCE, return_tensors="pt")
        torch.testing.assert_close(model(**inputs).text_embeds, english, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="2 languages for 3 texts"):
        joined(text=SOURCE, languages=["xx", None])
    with pytest.raises(TypeError, match="languages"):
        processor(text=SOURCE, languages="xx")


def test_both_sides_are_saved_and_found_by_the_index_of_the_base(sides, tmp_path):
    base, processor, model, joined, alone = sides
    model.save_language("xx", tmp_path / "xx")
    model.save_pretrained(tmp_path / "model")
    joined.save_pretrained(tmp_path / "model")
    loaded, again = (
        AutoModel.from_pretrained(tmp_path / "model").eval(),
        AutoProcessor.from_pretrained(tmp_path / "model"),
    )
    assert type(again) is type(joined)
    for languages, texts in ((None, SOURCE), ("xx", TARGET)):
        expected = encode_texts(model, texts, joined, languages=languages)
        torch.testing.assert_close(
            encode_texts(loaded, texts, again, languages=languages), expected, atol=1e-6, rtol=0
        )
    loaded.load_language("yy", tmp_path / "xx")
    torch.testing.assert_close(encode_texts(loaded, TARGET, again, languages="yy"), alone, atol=1e-6, rtol=0)
    if base.visual_tower is None:
        return
    index = NrccrRetriever(base, processor)
    index.add([Image.new("RGB", (9, 7), (40 * i, 90, 255 - 40 * i)) for i in range(4)])
    index.save(tmp_path / "index")
    retriever = NrccrRetriever.load(tmp_path / "index", loaded, again)
    own = index.search(SOURCE[0], k=4)
    assert [
        (hit.id, pytest.approx(hit.score, abs=1e-6)) for hit in retriever.search(SOURCE[0], k=4, language=None)
    ] == [(hit.id, hit.score) for hit in own]
    expected = sorted((encode_texts(model, TARGET[:1], joined, languages="xx") @ index_embeds(index).T)[0].tolist())
    assert sorted(hit.score for hit in retriever.search(TARGET[0], k=4, language="xx")) == pytest.approx(
        expected, abs=1e-5
    )

    loaded.set_language("xx").save_pretrained(tmp_path / "full")
    again.save_pretrained(tmp_path / "full")
    write_sentence_transformers_files(tmp_path / "full", True)
    opened = SentenceTransformer(str(tmp_path / "full"), device="cpu")
    torch.testing.assert_close(torch.tensor(opened.encode(TARGET)), alone, atol=1e-5, rtol=0)


def index_embeds(retriever) -> torch.Tensor:
    return torch.cat([torch.as_tensor(embeds) for _, _, embeds in retriever.index.rows(embeds=True)])


def test_what_is_trained_is_the_side_of_the_languages(sides):
    base, _, model, joined, _ = sides
    with pytest.raises(ValueError, match="language_side"):
        FeatureCache(model, joined)
    inputs = joined(text=SOURCE, return_tensors="pt")
    with pytest.raises(ValueError, match="language_side"):
        model(**inputs, target_input_ids=inputs["input_ids"])
    side = model.language_side()
    assert side.source_text_side is None and side.text_tower is model.text_tower
    assert model.source_text_side is not None and model.source_text_side.text_tower is base.text_tower
    base.add_language("zz", kind="lora", rank=2, layers=1)
    with pytest.raises(ValueError, match="zz inside its text tower"):
        side.with_source_text_side(base)
    base.remove_language("zz")


@pytest.mark.slow
def test_the_side_of_a_language_is_exported(sides, tmp_path):
    base, processor, model, joined, alone = sides
    if base.visual_tower is None:
        return
    model.save_pretrained(tmp_path / "model")
    joined.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(tmp_path / "onnx"), "--sides", "text"]
    with pytest.raises(SystemExit, match="export that base, or name the language"):
        export.main(arguments)
    export.main([*arguments, "--language", "xx"])
    exported = onnxruntime.InferenceSession(tmp_path / "onnx/text.onnx")
    inputs = NrccrProcessor.from_pretrained(tmp_path / "onnx")(text=TARGET, return_tensors="np")
    (embeds,) = exported.run(None, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    torch.testing.assert_close(torch.tensor(embeds), alone, atol=1e-4, rtol=0)
