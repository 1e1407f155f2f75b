"""A folder as open_clip's `push_to_hf_hub` writes it: `local-dir:FOLDER` opens it."""

import json
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BaseImageProcessor, CLIPModel, PreTrainedTokenizerBase

from ..dual_encoders import read_dual_encoder
from ..files import replacing_folder, write_file, writing_weights
from ..modeling_nrccr import NrccrModel
from ..open_clip import (
    INTERPOLATIONS,
    LAYER,
    NAMES,
    WEIGHTS,
    OpenClipImageProcessor,
    is_open_clip,
    read_file,
    read_open_clip_config,
    read_open_clip_image_processor,
    read_open_clip_tokenizer,
)
from ..processing_nrccr import NrccrProcessor
from ..publishing.card import hub_name
from ..weights import OPEN_CLIP, OPEN_CLIP_CONFIG
from .check import compare_embeddings, summarize
from .fold import fold_language
from .processors import plain_tokenizer
from .readme import PICTURES, find_report, is_exported_folder, write_readme
from .transformers_folder import check_weights


OWN_BPE = ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407])  # by the merges that open_clip brings
SNIPPET = """
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
texts = model.encode_text(tokenizer(["..."]), normalize=True)
"""


def open_clip_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a `CLIPModel` by open_clip's names and in its shapes: what `convert_weights` undoes."""
    names, modules = ({ours: theirs for theirs, ours in table.items()} for table in (NAMES, LAYER))
    made = {}
    for name, value in weights.items():
        side, inside, rest = name.partition(".encoder.layers.")
        if not inside:
            theirs = names[name]  # projections stand on the right of the states
            made[theirs] = value.t() if theirs in ("visual.proj", "text_projection") else value
            continue
        number, _, part = rest.partition(".")
        module, _, kind = part.rpartition(".")
        layer = f"{'visual.' if side == 'vision_model' else ''}transformer.resblocks.{number}"
        if module in modules:
            made[f"{layer}.{modules[module]}.{kind}"] = value
        elif module == "self_attn.q_proj":
            thirds = [weights[name.replace("q_proj", f"{of}_proj")] for of in "qkv"]
            made[f"{layer}.attn.in_proj_{kind}"] = torch.cat(thirds)
    return {name: value.contiguous() for name, value in made.items()}


def preprocess_config(image_processor: BaseImageProcessor) -> dict[str, Any]:
    """
    Return open_clip's `preprocess_cfg` of an image processor of CLIP's.

    Raises:
        ValueError: where open_clip prepares no pictures so.
    """
    if isinstance(image_processor, OpenClipImageProcessor):
        mode = image_processor.resize_mode
    else:
        mode = "shortest" if image_processor.size.get("shortest_edge") else "squash"
    names = {number: name for name, number in INTERPOLATIONS.items() if name != "random"}
    crop = getattr(image_processor, "crop_size", None) or {}
    side = image_processor.size.get("shortest_edge") or image_processor.size.get("height")
    cut = mode != "shortest" or (image_processor.do_center_crop and (crop["height"], crop["width"]) == (side, side))
    if image_processor.resample not in names or not (
        image_processor.do_resize and image_processor.do_normalize and cut
    ):
        raise ValueError(
            f"open_clip prepares no pictures as this {type(image_processor).__name__} does: take --to transformers"
        )
    return {
        "size": side,
        "mode": "RGB",
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "interpolation": names[image_processor.resample],
        "resize_mode": mode,
        "fill_color": getattr(image_processor, "fill_color", 0),
    }


def ratio(inner: int, width: int) -> float:
    """Return open_clip's `mlp_ratio`, whose product with the width it cuts to a whole number."""
    return inner / width if int(inner / width * width) == inner else (inner + 0.5) / width


def open_clip_config(
    folded: CLIPModel, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor, base: str
) -> dict[str, Any]:
    """
    Return `open_clip_config.json` of a CLIP.

    Args:
        base: name of the model that the tokenizer is of.

    Raises:
        ValueError: for settings that open_clip's CLIP does not have.
    """
    text, vision = folded.config.text_config, folded.config.vision_config
    acts, norms = {text.hidden_act, vision.hidden_act}, {text.layer_norm_eps, vision.layer_norm_eps}
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"} or norms != {1e-5}:
        raise ValueError(
            f"open_clip has no CLIP of the activations {', '.join(sorted(acts))} and norms of {norms}: take --to "
            "transformers"
        )
    model = {
        "embed_dim": folded.config.projection_dim,
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": ratio(vision.intermediate_size, vision.hidden_size),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": ratio(text.intermediate_size, text.hidden_size),
        },
    }
    sample, ids = OWN_BPE
    if tokenizer(sample)["input_ids"] != ids:  # of a folder it reads the tokenizer that lies there, whatever the name
        model["text_cfg"]["hf_tokenizer_name"] = hub_name(base)
    if (end := tokenizer(sample)["input_ids"][-1]) != text.vocab_size - 1:
        model["text_cfg"] |= {"pool_type": "eos", "eos_id": end}
    return {"model_cfg": model, "preprocess_cfg": preprocess_config(image_processor)}


def open_folder(folder: Path):
    """Return what embeds texts, what embeds pictures, and the name of whoever does: open_clip where it is installed,
    else our own reader of its files."""
    if find_spec("open_clip") is not None:
        import open_clip

        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        return (
            lambda texts: model.eval().encode_text(tokenizer(texts)),
            lambda pictures: model.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures])),
            f"open_clip {open_clip.__version__}",
        )
    name = f"{OPEN_CLIP}{folder}"
    config = read_open_clip_config(name)
    model, tokenizer = read_dual_encoder(name, config), read_open_clip_tokenizer(name, config)
    image_processor = read_open_clip_image_processor(name, config)
    options = {"padding": True, "truncation": True, "max_length": config.text_config.max_position_embeddings}

    def embed_texts(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, return_tensors="pt", return_token_type_ids=False, **options)
        return model.get_text_features(**inputs).pooler_output

    def embed_pictures(pictures: list[Image.Image]) -> torch.Tensor:
        return model.get_image_features(**image_processor(pictures, return_tensors="pt")).pooler_output

    return embed_texts, embed_pictures, "our reader of open_clip's files (open_clip is not installed here)"


def write_open_clip(
    model: NrccrModel,
    processor: NrccrProcessor,
    folder: str | Path,
    name: str,
    languages: Sequence[str] = (),
    batch_size: int = 32,
) -> dict:
    """
    Write a CLIP with the active language in it in open_clip's files, or nothing. Of a base that came from there the
    config stays as it is.

    Args:
        model: in float32, on the CPU.
        name: of the model, as it was loaded.
        languages: as they were loaded; where the report of one is found.

    Returns:
        As `write_transformers`.

    Raises:
        ValueError: for a model that is no CLIP or cannot be folded, and where the folder reads anything otherwise than
            the model.
    """
    folder, report = Path(folder), find_report(name, model.language, languages)
    folded = fold_language(model)
    if not isinstance(folded, CLIPModel):
        raise ValueError(
            f"in these files open_clip has CLIP's architecture alone, not {type(folded).__name__}: take --to "
            "transformers"
        )
    if processor.text_prefix:
        raise ValueError(
            f"open_clip has no place for {processor.text_prefix!r} before a text: take --to sentence-transformers"
        )
    base, notes = model.config.dual_encoder["name"], [PICTURES]
    if is_open_clip(base):
        revision = model.config.dual_encoder.get("revision")
        read = read_file(base, **({"revision": revision} if revision else {}))
        config, tokenizer = {"model_cfg": read["model"], "preprocess_cfg": read["preprocess"]}, processor.tokenizer
    else:
        tokenizer = plain_tokenizer(processor)
        config = open_clip_config(folded, tokenizer, processor.image_processor, base)
    if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        notes.append("the tokenizer beside the weights is read by transformers, which open_clip then needs")
    else:
        notes.append("before it reads a text open_clip mends its encoding and straightens quotes (ftfy)")
    with replacing_folder(folder, partial(is_exported_folder, folder), "an export") as work:
        write_file(work / OPEN_CLIP_CONFIG, json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(work)
        with writing_weights(work):
            save_file(open_clip_weights(folded.state_dict()), work / WEIGHTS[0], {"format": "pt"})
        written = f"{OPEN_CLIP}{work}"
        check_weights(folded, read_dual_encoder(written, read_open_clip_config(written)))
        embed_texts, embed_pictures, who = open_folder(work)
        found = compare_embeddings(who, model, processor, embed_texts, embed_pictures, batch_size)
        snippet, notes = SNIPPET.replace("FOLDER", str(folder)), [f"opened by {who}", *notes]
        write_readme(work, "open_clip", model, base, found, report, snippet, notes)
    return {
        "model": name,
        "language": model.language,
        "verdict": report.get("verdict"),
        "compared": found,
        "summary": summarize(found),
    }
