"""Reads CLIP models of open_clip without open_clip: configuration, weights, tokenizer, and how pictures are cut.

A name is `open_clip:` and a folder or hub id with `open_clip_config.json` and `open_clip_model.safetensors`, as
open_clip's `push_to_hf_hub` writes them. Source: https://github.com/mlfoundations/open_clip, release 3.3.
"""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Regex, normalizers
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .weights import (
    OPEN_CLIP,
    OPEN_CLIP_CONFIG,
    check_name,
    check_numbers,
    check_shapes,
    find_file,
    read_shapes,
)


WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
BPE_FILE, NUM_MERGES = "bpe_simple_vocab_16e6.txt.gz", 49152 - 256 - 2
MODEL_KEYS = ("embed_dim", "quick_gelu", "force_quick_gelu", "vision_cfg", "text_cfg")
# Of open_clip's settings those that CLIP has, and of those that it has not the values that change nothing.
TEXT_KEYS = (
    "context_length",
    "vocab_size",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "eos_id",
    "pad_id",
    "tokenizer_kwargs",
    "hf_tokenizer_name",
    "output_tokens",
)
VISION_KEYS = (
    "image_size",
    "patch_size",
    "width",
    "layers",
    "head_width",
    "mlp_ratio",
    "patch_dropout",
    "output_tokens",
    "attn_pooler_queries",
    "attn_pooler_heads",
)
NEUTRAL = {
    "pool_type": ("argmax", "eos", "tok"),
    "proj_type": ("linear",),
    "pos_embed_type": ("learnable",),
    "block_type": ("default",),
}
RESIZE_MODES, INTERPOLATIONS = ("shortest", "longest", "squash"), {"bicubic": 3, "bilinear": 2, "random": 3}
PREPROCESS = {
    "mean": OPENAI_CLIP_MEAN,
    "std": OPENAI_CLIP_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
    "mode": "RGB",
}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
} | {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for kind in ("weight", "bias")
    for theirs, ours in (
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    )
}


def is_open_clip(name) -> bool:
    return str(name).startswith(OPEN_CLIP)


def folder_of(name: str) -> str:
    return str(name).removeprefix(OPEN_CLIP)


# -------------------------------------------------------------------------------------------------- configuration


def read_file(name: str, **hub) -> dict[str, Any]:
    """Reads `open_clip_config.json`. Raises ValueError where there is none, or it is not open_clip's."""
    folder = folder_of(name)
    check_name(folder, OPEN_CLIP_CONFIG, hub.get("subfolder"))
    path = find_file(folder, OPEN_CLIP_CONFIG, **hub)
    if path is None:
        raise ValueError(f"{folder} holds no {OPEN_CLIP_CONFIG}: it is no model of open_clip")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        model = content["model_cfg"]
        return {
            "model": model,
            "text": dict(model["text_cfg"]),
            "vision": dict(model["vision_cfg"]),
            "preprocess": dict(content.get("preprocess_cfg") or {}),
            "path": path,
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no config of open_clip ({type(error).__name__}: {error}): get it again"
        ) from error


def refuse_others(path: str, part: str, config: dict[str, Any], known: tuple[str, ...]):
    """Raise ValueError for a setting that CLIP does not have, and that changes what a model computes."""
    for key, value in config.items():
        if key not in known and value not in (None, False, 0, "", {}) and value not in NEUTRAL.get(key, ()):
            raise ValueError(
                f"{path}: {part}{key} = {json.dumps(value)} is not CLIP's. What is read of open_clip is the original "
                "architecture: a ViT with class token and projection, a causal text encoder that pools its end token, "
                "of any size, with GELU or QuickGELU (ViT-B-32, ViT-L-14, ...)"
            )


def one_side(path: str, key: str, value) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise ValueError(f"{path}: vision_cfg.{key} = {value} is no square, which CLIP's pictures and patches are")
    return sides.pop()


def read_open_clip_config(name: str, **hub) -> CLIPConfig:
    """
    Reads the configuration of a CLIP model of open_clip.

    Raises:
        ValueError: for another architecture (a ResNet, a timm tower, a text encoder of the hub, CoCa, ...); it names
            the setting.
    """
    read = read_file(name, **hub)
    model, text, vision, path = (read[key] for key in ("model", "text", "vision", "path"))
    if vision.get("timm_model_name") is None:  # what else timm's towers are told has no effect then
        vision = {key: value for key, value in vision.items() if not key.startswith("timm_")}
    if text.get("hf_model_name") is None:
        text = {key: value for key, value in text.items() if not key.startswith("hf_") or key == "hf_tokenizer_name"}
    if vision.get("pool_type", "tok") == "tok":  # the norm of one token is the same before and after it is taken
        vision.pop("final_ln_after_pool", None)
    refuse_others(path, "", model, MODEL_KEYS)
    refuse_others(path, "text_cfg.", text, TEXT_KEYS)
    refuse_others(path, "vision_cfg.", vision, VISION_KEYS)
    if not isinstance(vision.get("layers", 12), int):
        raise ValueError(f"{path}: vision_cfg.layers = {vision['layers']} is a ResNet; read are ViT (ViT-B-32, ...)")
    act = "quick_gelu" if model.get("quick_gelu") or model.get("force_quick_gelu") else "gelu"
    size, width, vision_width = model["embed_dim"], text.get("width", 512), vision.get("width", 768)
    vocab_size = text.get("vocab_size", 49408)
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else vocab_size - 1  # argmax: the highest number
    text_config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        num_hidden_layers=text.get("layers", 12),
        num_attention_heads=text.get("heads", 8),
        hidden_act=act,
        max_position_embeddings=text.get("context_length", 77),
        projection_dim=size,
        pad_token_id=end,
        bos_token_id=end - 1,
        eos_token_id=end,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=int(vision_width * vision.get("mlp_ratio", 4.0)),
        num_hidden_layers=vision.get("layers", 12),
        hidden_act=act,
        projection_dim=size,
        num_attention_heads=vision_width // vision.get("head_width", 64),
        image_size=one_side(path, "image_size", vision.get("image_size", 224)),
        patch_size=one_side(path, "patch_size", vision.get("patch_size", 16)),
    )
    return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=size)


# -------------------------------------------------------------------------------------------------------- weights


def convert_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Map names and shapes of open_clip to those of `CLIPModel`; what has no name there keeps its own."""
    made = {}
    for name, value in weights.items():
        side, layers, rest = name.rpartition("transformer.resblocks.")
        if layers and side in ("", "visual."):
            number, _, part = rest.partition(".")
            layer = f"{'vision_model' if side else 'text_model'}.encoder.layers.{number}"
            module, _, kind = part.rpartition(".")
            if part.startswith("attn.in_proj_"):
                for of, third in zip("qkv", value.chunk(3)):
                    made[f"{layer}.self_attn.{of}_proj.{part.removeprefix('attn.in_proj_')}"] = third.contiguous()
            else:
                made[f"{layer}.{LAYER.get(module, module)}.{kind}"] = value
        elif name in ("visual.proj", "text_projection"):  # they stand on the right of the states
            made[NAMES[name]] = value.t().contiguous()
        else:
            made[NAMES.get(name, name)] = value.reshape(()) if name == "logit_scale" else value
    return made


def read_open_clip_model(
    name: str, config: CLIPConfig, dtype: str | torch.dtype = torch.float32, variant: None = None, **hub
) -> CLIPModel:
    """
    Reads the weights, as `dtype` ("auto": in the precision that they are stored in).

    Raises:
        ValueError: for a variant, which open_clip has none of, a folder without safetensors, and weights that are not
            whole, not finite, or not those of the config; it names the tensor.
    """
    folder = folder_of(name)
    if variant:
        raise ValueError(f"variant={variant!r}: open_clip's files have none")
    path = next((path for file in WEIGHTS if (path := find_file(folder, file, **hub))), None)
    if path is None:
        raise ValueError(
            f"{folder} holds no {WEIGHTS[0]}; pickled weights (open_clip_pytorch_model.bin) are not read, since they "
            "can run code: take a revision with safetensors, or write them by open_clip's push_to_hf_hub"
        )
    shapes = read_shapes(path)
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        shapes = {key: tuple(value.shape) for key, value in convert_weights(empty).items()}
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not of CLIP's architecture ({error})") from error
    check_shapes(CLIPModel, config, shapes, path)
    with torch.device("meta"):
        wanted = CLIPModel(config).state_dict().keys()
    if odd := sorted(wanted ^ shapes.keys()):
        raise ValueError(
            f"{path} and {OPEN_CLIP_CONFIG} are not of one CLIP model: {', '.join(odd[:5])} of {len(odd)} tensors are "
            "in one of them alone"
        )
    weights = convert_weights(load_file(path))
    model = CLIPModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    check_numbers(model, path)
    return model.eval()


# ------------------------------------------------------------------------------------------------------ tokenizer


def read_bpe(path: str | Path) -> CLIPTokenizer:
    """Builds CLIP's tokenizer from the list of merges that open_clip's package ships."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        merges = [tuple(line.split()) for line in lines.read().split("\n")[1 : NUM_MERGES + 1]]
    # GPT-2's order of bytes: those that print stand for themselves, the others for letters from 256 on
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printing] + [chr(256 + i) for i in range(256 - len(printing))]
    names = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges)


def find_bpe(folder: str, **hub) -> str | None:
    """Finds the list of merges in the folder, or in open_clip's package where it is installed."""
    if path := find_file(folder, BPE_FILE, **hub):
        return path
    package = find_spec("open_clip")
    path = Path(package.origin).parent / BPE_FILE if package and package.origin else None
    return str(path) if path and path.is_file() else None


def read_open_clip_tokenizer(name: str, config: PreTrainedConfig, **hub) -> PreTrainedTokenizerBase:
    """
    Reads the tokenizer that lies beside the weights, else builds CLIP's from open_clip's list of merges.

    Raises:
        ValueError: where there is none of these, or where it is not the one that the text encoder was trained with.
    """
    folder, text = folder_of(name), read_file(name, **hub)["text"]
    of_hub = text.get("hf_tokenizer_name")
    files = {file for file in ("tokenizer.json", "vocab.json", "merges.txt") if find_file(folder, file, **hub)}
    if of_hub and "tokenizer.json" in files:
        tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
    elif not of_hub and ("tokenizer.json" in files or len(files) == 2):
        tokenizer = CLIPTokenizer.from_pretrained(folder, **hub)
    elif not of_hub and (path := find_bpe(folder, **hub)):
        tokenizer = read_bpe(path)
    else:
        source = of_hub or "openai/clip-vit-large-patch14"
        also = "" if of_hub else f", or {BPE_FILE} of the package open_clip_torch"
        raise ValueError(
            f"{folder} holds no tokenizer: copy tokenizer.json and tokenizer_config.json of {source}{also} into it"
        )
    kwargs = dict(text.get("tokenizer_kwargs") or {})
    clean = kwargs.pop("clean", "whitespace" if of_hub else "lower")
    if kwargs or clean not in ("lower", "canonicalize", "whitespace") or (clean == "whitespace" and not of_hub):
        raise ValueError(
            f"{folder}: text_cfg.tokenizer_kwargs = {json.dumps(text['tokenizer_kwargs'])} is not known; read is "
            "clean: lower, or canonicalize"
        )
    steps = []
    if clean == "canonicalize":  # of big_vision: ASCII punctuation goes
        steps = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    elif clean == "lower" and of_hub:  # CLIP's own lower-cases anyway
        steps = [normalizers.Lowercase()]
    if steps:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
        # of no model's own class, which would build its normalizer anew when it is loaded
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)
    ids, end = tokenizer("a")["input_ids"], config.text_config.eos_token_id
    if ids[-1] != end or len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} ends a text by {ids[-1]} and has {len(tokenizer):,} tokens; the text encoder "
            f"knows {end} and {config.text_config.vocab_size:,}: copy the tokenizer that it was trained with"
        )
    return tokenizer


# ------------------------------------------------------------------------------------------------------- pictures


class OpenClipImageProcessor(CLIPImageProcessorPil):
    r"""
    Prepares pictures as open_clip does, to the pixel (CLIP's own processor cuts odd margins elsewhere).

    Args:
        resize_mode (`str`): "shortest" side to the size, then the centre; "longest" side, then filled up; "squash".
        fill_color (`int`): Of "longest".
    """

    resize_mode, fill_color = "shortest", 0
    valid_kwargs = CLIPImageProcessorPil.valid_kwargs

    def __init__(self, resize_mode: str = "shortest", fill_color: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.resize_mode, self.fill_color = resize_mode, fill_color

    def resize(self, image: np.ndarray, size, resample=None, **kwargs) -> np.ndarray:
        """Map `(3, height, width)` to the same of other sides."""
        height, width = image.shape[1:]
        sides = size.height, size.width
        if self.resize_mode == "shortest":  # torchvision's rounding
            short = min(height, width)
            sides = (int(size.height * height / short), int(size.width * width / short))
        elif self.resize_mode == "longest":
            ratio = max(height / size.height, width / size.width)
            sides = (round(height / ratio), round(width / ratio))
        picture = Image.fromarray(np.moveaxis(image, 0, -1)).resize(sides[::-1], resample)
        return np.moveaxis(np.asarray(picture), -1, 0)

    def center_crop(self, image: np.ndarray, size, **kwargs) -> np.ndarray:
        """Return the middle of `(3, height, width)`, filled up where it is too small."""
        missing = [max(0, side - have) for side, have in zip((size.height, size.width), image.shape[1:])]
        if any(missing):
            padding = [(0, 0), *((part // 2, (part + 1) // 2) for part in missing)]
            image = np.pad(image, padding, constant_values=self.fill_color)
        top, left = (round((have - side) / 2) for side, have in zip((size.height, size.width), image.shape[1:]))
        return image[:, top : top + size.height, left : left + size.width]


def read_open_clip_image_processor(name: str, config: CLIPConfig, **hub) -> OpenClipImageProcessor:
    """Reads `preprocess_cfg`. Raises ValueError for a value that open_clip does not know."""
    read = read_file(name, **hub)
    preprocess = PREPROCESS | {key: value for key, value in read["preprocess"].items() if value is not None}
    side = config.vision_config.image_size  # as open_clip does, whatever the file says
    known = {"resize_mode": RESIZE_MODES, "interpolation": INTERPOLATIONS, "mode": ("RGB",)}
    for key, values in known.items():
        if preprocess[key] not in values:
            raise ValueError(
                f"{read['path']}: preprocess_cfg.{key} = {preprocess[key]!r}; known is {', '.join(values)}"
            )
    sides = {"height": side, "width": side}
    mean, std = (
        value if isinstance(value, (list, tuple)) else [value] * 3 for value in (preprocess["mean"], preprocess["std"])
    )
    return OpenClipImageProcessor(
        resize_mode=preprocess["resize_mode"],
        fill_color=preprocess["fill_color"],
        size=sides,
        crop_size=sides,
        resample=INTERPOLATIONS[preprocess["interpolation"]],
        image_mean=list(mean),
        image_std=list(std),
    )


OpenClipImageProcessor.register_for_auto_class()
# by its name alone: no config type is its own
AutoImageProcessor.register(
    OpenClipImageProcessor, image_processor_classes={"pil": OpenClipImageProcessor}, exist_ok=True
)
