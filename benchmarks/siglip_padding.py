"""What padding does to a text encoder that pools the last position: a tiny random SigLIP, opened by
sentence-transformers as it is, and as a model of this package.

    python -m benchmarks.siglip_padding
"""

import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipProcessor

from modeling_nrccr import NrccrModel, NrccrProcessor
from modeling_nrccr.publishing.sentence_transformers_files import write_sentence_transformers_files


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
CAPTIONS = ["a cat", "an old boat at the shore of a lake in the evening"]


def main():
    torch.manual_seed(0)
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["</s>", "<pad>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    text = SIZES | dict(vocab_size=len(vocabulary), projection_size=32, pad_token_id=1, bos_token_id=0, eos_token_id=0)
    config = SiglipConfig(text_config=text, vision_config=SIZES | dict(image_size=16, patch_size=8))
    with tempfile.TemporaryDirectory() as folder:
        raw, ours = Path(folder, "siglip"), Path(folder, "ours")
        SiglipModel(config).save_pretrained(raw)
        SiglipProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(raw)
        NrccrModel.from_dual_encoder(str(raw)).save_pretrained(ours)
        NrccrProcessor.from_dual_encoder(str(raw)).save_pretrained(ours)
        write_sentence_transformers_files(ours)
        for name, path in (("as it is", raw), ("of this package", ours)):
            model = SentenceTransformer(str(path), device="cpu")
            alone, together = (torch.tensor(model.encode(texts))[0] for texts in (CAPTIONS[:1], CAPTIONS))
            cosine = torch.cosine_similarity(alone, together, dim=0)
            print(f"{name}: the caption {CAPTIONS[0]!r} alone and beside a longer one has cosine {cosine:.4f}")


if __name__ == "__main__":
    main()
