"""Languages for dual encoders that are aligned already: tiny ones of every family, built in code."""

import random

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AltCLIPConfig,
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    EmbeddingGemma2Config,
    MetaClip2Config,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    SiglipConfig,
)

from modeling_nrccr import (
    DataCollatorForCrossLingualRetrieval,
    FeatureCache,
    NrccrConfig,
    NrccrModel,
    NrccrProcessor,
    NrccrRetriever,
    NrccrTrainer,
    NrccrTrainingArguments,
    encode_images,
    encode_texts,
)
from modeling_nrccr.publishing.sentence_transformers_files import write_sentence_transformers_files


SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
WORDS = SIZES | dict(vocab_size=41, max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=1)
PIXELS = SIZES | dict(image_size=8, patch_size=4)
END = 3
DUAL_ENCODERS = {
    "clip": CLIPConfig(text_config=WORDS, vision_config=PIXELS, projection_dim=11),
    "metaclip_2": MetaClip2Config(text_config=WORDS, vision_config=PIXELS, projection_dim=11),
    "altclip": AltCLIPConfig(
        text_config=WORDS | dict(max_position_embeddings=19, project_dim=13), vision_config=PIXELS, projection_dim=11
    ),
    "siglip": SiglipConfig(text_config=WORDS | dict(projection_size=24), vision_config=PIXELS),
    "siglip2": Siglip2Config(
        text_config=WORDS | dict(projection_size=24), vision_config=SIZES | dict(patch_size=4, num_patches=4)
    ),
    "embedding_gemma2": EmbeddingGemma2Config(
        text_config=dict(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            global_head_dim=6,
            intermediate_size=37,
            vocab_size=41,
            hidden_size_per_layer_input=8,
            embedding_dim=17,
            max_position_embeddings=64,
            sliding_window_pattern=2,
            pad_token_id=1,
        )
    ),
}
ADAPTERS = ("linear", "bottleneck", "dynamic", "lora")


@pytest.fixture(scope="module", params=DUAL_ENCODERS)
def dual(request, tmp_path_factory):
    """A dual encoder with weights that do something, and the folder that holds it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(DUAL_ENCODERS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def texts(length: int = 9, size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Begin, words, end, padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (size,), generator=generator)
    lengths[0] = length
    ids = torch.randint(4, 41, (size, length), generator=generator)
    place = torch.arange(length)
    ids = torch.where(place < lengths[:, None] - 1, ids, END).masked_fill(place >= lengths[:, None], 1)
    ids[:, 0] = 2
    return ids, (place < lengths[:, None]).long()


def pictures(model, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type != "siglip2":
        return {"pixel_values": torch.randn(size, 3, 8, 8, generator=generator)}
    mask = torch.ones(size, 4, dtype=torch.long)
    mask[0, 2:] = 0
    shapes = torch.tensor([[1, 2]] + [[2, 2]] * (size - 1))
    patches = torch.randn(size, 4, 48, generator=generator)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


@torch.no_grad()
def own_text_embeds(model, ids, mask) -> torch.Tensor:
    """By the dual encoder's own code, padded as its documentation says."""
    if model.config.model_type == "embedding_gemma2":
        states = model.language_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize((states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    if model.config.model_type.startswith("siglip"):
        ids = F.pad(ids, (0, model.config.text_config.max_position_embeddings - ids.shape[1]), value=1)
        mask = None
    return F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)


@torch.no_grad()
def test_at_first_the_similarities_are_its_own(dual):
    theirs, folder = dual
    ours = NrccrModel.from_dual_encoder(str(folder))
    ids, mask = texts()
    own = own_text_embeds(theirs, ids, mask)
    torch.testing.assert_close(ours.get_text_features(ids, mask).pooler_output, own, atol=1e-5, rtol=0)
    for kind in ADAPTERS:
        ours.add_language(kind, kind=kind, rank=3, layers=1)
        embeds = ours.get_text_features(ids, mask, languages=kind).pooler_output
        torch.testing.assert_close(embeds, own, atol=1e-5, rtol=0)
    if theirs.config.model_type == "embedding_gemma2":
        return  # its pictures are embedded by itself
    inputs = pictures(theirs)
    images = F.normalize(theirs.get_image_features(**inputs).pooler_output, dim=-1)
    torch.testing.assert_close(ours.get_image_features(**inputs).pooler_output, images, atol=1e-5, rtol=0)
    scores = ours(ids, mask, languages="linear", **inputs).logits_per_text
    expected = theirs.logit_scale.exp() * own @ images.t() + getattr(theirs, "logit_bias", 0)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_an_embedding_never_depends_on_its_batch(dual):
    theirs, folder = dual
    ours = NrccrModel.from_dual_encoder(str(folder))
    ids, mask = texts()
    together = ours.get_text_features(ids, mask).pooler_output
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = ours.get_text_features(ids[row : row + 1, :length], mask[row : row + 1, :length]).pooler_output
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


@torch.no_grad()
def test_siglip_itself_changes_an_embedding_with_its_batch_mates():
    """What `text_length` is for: the last position is pooled, so padding to the longest moves it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(DUAL_ENCODERS["siglip"]).eval()
    ids = torch.tensor([[2, 7, 9, 3, 1, 1, 1, 1]])
    short, padded = (model.get_text_features(input_ids=part).pooler_output for part in (ids[:, :4], ids))
    assert F.cosine_similarity(short, padded).item() < 0.95


def rows(size: int = 24) -> list[dict]:
    generator = random.Random(0)
    names = ["cat", "dog", "red", "blue", "on", "house"]
    made = []
    for number in range(size):
        words = generator.sample(names, 3)
        source = " ".join(words)
        target = " ".join(f"{word}o" for word in words)
        made.append({"image_id": str(number), "source_caption": source, "target_caption": target})
    return made


def save_processor_parts(theirs, folder):
    """A tokenizer and an image processor beside the weights, as a hub repository has them."""
    names = ["<pad>", "<unk>", "<s>", "</s>"] + [
        word + end for word in ("cat", "dog", "red", "blue", "on", "house") for end in ("", "o")
    ]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8)
    if theirs.config.model_type == "siglip2":
        image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=4)
    image_processor.save_pretrained(folder)


def test_a_language_is_trained_saved_and_opened_while_the_index_stays(dual, tmp_path):
    theirs, folder = dual
    save_processor_parts(theirs, folder)
    model, processor = NrccrModel.from_dual_encoder(str(folder)), NrccrProcessor.from_dual_encoder(str(folder))
    shades = [Image.new("RGB", (9, 7), (40 * i, 90, 255 - 40 * i)) for i in range(4)]
    has_pictures = model.visual_tower is not None
    if has_pictures:
        images = encode_images(model, shades, processor)
        index = NrccrRetriever(model, processor)
        index.add(shades)
        index.save(tmp_path / "index")
    english = encode_texts(model, ["cat on house", "red"], processor)
    model.add_language("xx", center=False)
    args = NrccrTrainingArguments(
        output_dir=str(tmp_path / "run"),
        train_language="xx",
        text_only=True,
        losses={"distillation": 0.1, "feature_distillation": 1},
        max_steps=8,
        learning_rate=1e-2,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    cache = FeatureCache(model.train_language("xx"), processor)
    cache.add_texts(row[column] for row in rows() for column in ("source_caption", "target_caption"))
    collator = DataCollatorForCrossLingualRetrieval(cache)
    NrccrTrainer(model, args, rows(), data_collator=collator).train()
    assert torch.equal(encode_texts(model.set_language(None), ["cat on house", "red"], processor), english)
    target = encode_texts(model.set_language("xx"), ["cato ono houseo", "redo"], processor)
    assert (target * encode_texts(model.set_language(None), ["cato ono houseo", "redo"], processor)).sum(
        1
    ).max() < 0.9999
    model.save_language("xx", tmp_path / "xx")

    fresh = NrccrModel.from_dual_encoder(str(folder))
    fresh.load_language("xx", tmp_path / "xx")
    torch.testing.assert_close(
        encode_texts(fresh.set_language("xx"), ["cato ono houseo", "redo"], processor), target, atol=1e-6, rtol=0
    )
    if has_pictures:
        assert torch.equal(encode_images(model, shades, processor), images)
        found = NrccrRetriever.load(tmp_path / "index", fresh, processor).search("cato ono houseo", k=4)
        assert sorted(hit.score for hit in found) == pytest.approx(sorted((images @ target[0]).tolist()), abs=1e-5)

    model.set_language("xx").save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    write_sentence_transformers_files(tmp_path / "full", has_pictures)
    opened = SentenceTransformer(str(tmp_path / "full"), device="cpu")
    spoken = ["cato", "cato ono houseo redo blueo"]
    expected = encode_texts(model, spoken, processor)
    together = torch.tensor(opened.encode(spoken))
    alone = torch.cat([torch.tensor(opened.encode([text])) for text in spoken])
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
    if has_pictures:
        torch.testing.assert_close(torch.tensor(opened.encode(shades)), images, atol=1e-5, rtol=0)


def test_another_text_encoder_lands_in_the_same_space(dual, tmp_path):
    theirs, folder = dual
    BertModel(BertConfig(**WORDS | {"vocab_size": 37})).save_pretrained(tmp_path / "bert")
    model = NrccrModel.from_dual_encoder(str(folder), text_encoder=str(tmp_path / "bert"))
    ids, mask = texts(seed=1)
    embeds = model.get_text_features(ids.clamp(max=36), mask).pooler_output
    assert embeds.shape == (6, own_text_embeds(theirs, ids, mask).shape[1])
    if model.visual_tower is not None:
        inputs = pictures(theirs)
        images = F.normalize(theirs.get_image_features(**inputs).pooler_output, dim=-1)
        torch.testing.assert_close(model.get_image_features(**inputs).pooler_output, images, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "full")
    loaded = NrccrModel.from_pretrained(tmp_path / "full")
    assert torch.equal(loaded.get_text_features(ids.clamp(max=36), mask).pooler_output, embeds)


def test_what_is_no_dual_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text_config is that of siglip, which reads pictures too"):
        NrccrConfig(text_config=DUAL_ENCODERS["siglip"])
    BertConfig(**WORDS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' is no dual encoder"):
        NrccrModel.from_dual_encoder(str(tmp_path))


@pytest.mark.network
@torch.no_grad()
def test_the_real_siglip2():
    name = "google/siglip2-base-patch16-224"
    try:
        AutoConfig.from_pretrained(name)
    except OSError as error:
        pytest.skip(f"no hub to be had here: {str(error).splitlines()[0]}")
    theirs, ours = AutoModel.from_pretrained(name).eval(), NrccrModel.from_dual_encoder(name)
    processor = NrccrProcessor.from_dual_encoder(name)
    captions = ["A photo of a cat.", "un gato"]
    inputs = AutoProcessor.from_pretrained(name)(
        text=[caption.lower() for caption in captions], padding="max_length", max_length=64, return_tensors="pt"
    )
    own = F.normalize(theirs.get_text_features(input_ids=inputs["input_ids"]).pooler_output, dim=-1)
    torch.testing.assert_close(encode_texts(ours, captions, processor), own, atol=1e-5, rtol=0)
    picture = Image.linear_gradient("L").convert("RGB")
    pixels = AutoProcessor.from_pretrained(name)(images=picture, return_tensors="pt")
    own = F.normalize(theirs.get_image_features(**pixels).pooler_output, dim=-1)
    torch.testing.assert_close(encode_images(ours, [picture], processor), own, atol=1e-5, rtol=0)
