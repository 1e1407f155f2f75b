"""A dual encoder of twenty words, and files that a language is added to it from."""

import itertools
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_nrccr import NrccrProcessor

from . import tiny_model


WORDS = ("red", "blue", "big", "small", "old", "cat", "dog", "house", "tree", "boat")
TOWER = {"model_type": "efficientnet_lite", "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_size": 16}


def write_small_base(folder: Path) -> Path:
    """Write a dual encoder, English captions, their translations, and human captions of pictures; return the
    folder."""
    vocabulary = ["<pad>", "<unk>", *WORDS, *(f"{word}o" for word in WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    processor = NrccrProcessor(tokenizer, ViTImageProcessorPil(size={"height": 16, "width": 16}))
    model = tiny_model(vision_config=TOWER, visual_feat_dim=None, text_head="pooling", teacher_view="source")
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    captions = [" ".join(words) for words in itertools.permutations(WORDS, 3)][:300]
    (folder / "captions.txt").write_text("\n".join(captions))
    (folder / "translations").mkdir()
    target = ["o ".join(caption.split()) + "o" for caption in captions]
    pairs = list(zip(captions, target))
    (folder / "translations/forth.tsv").write_text("en\tgl\n" + "".join(f"{a}\t{b}\n" for a, b in pairs))
    (folder / "translations/back.tsv").write_text("gl\ten\n" + "".join(f"{b}\t{a}\n" for a, b in pairs))
    lines = ["image,target_caption,caption"]
    for number in range(24):
        Image.new("RGB", (20, 20), (number * 10, 255 - number * 10, 99)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{target[number * 12]},{captions[number * 12]}")
    (folder / "human.csv").write_text("\n".join(lines) + "\n")
    return folder
