"""What open_clip itself computes: writes tests/fixtures/open_clip.json, which the fast suite is compared with.

    pip install --no-deps --target WHEELS open_clip_torch==3.3.0 torchvision==0.28.0 timm ftfy wcwidth
    PYTHONPATH=WHEELS python tests/open_clip_reference.py tests/fixtures/open_clip.json

Weights, texts and pictures come from formulas, so the file holds the answers alone. Of torchvision only what is
written in Python is used: its compiled part need not fit the torch that is installed.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file


TEXT = {"context_length": 14, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 24, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
MODELS = {
    "quickgelu": {
        "model_cfg": {"embed_dim": 12, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
    },
    "gelu": {
        "model_cfg": {
            "embed_dim": 10,
            "vision_cfg": VISION | {"mlp_ratio": 3.0, "patch_size": 6, "head_width": 16},
            "text_cfg": TEXT | {"layers": 3, "context_length": 12, "mlp_ratio": 2.0},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
    },
    "longest": {
        "model_cfg": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"resize_mode": "longest", "fill_color": 99},
    },
}
TEXTS = ["A photo of a cat.", "two DOGS  on the beach, isn't it?", "unha cidade á noite, 1998", "again " * 20]
SIZES = [(64, 64), (37, 53), (90, 41), (31, 24), (25, 60), (10, 13)]


def weights_of(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights that a formula gives, of the names and shapes of open_clip's model."""
    made = {"logit_scale": torch.tensor(2.5)}
    for number, (name, shape) in enumerate(shapes.items()):
        if name not in made:
            mixed = np.sin(np.arange(int(np.prod(shape))) * 12.9898 + number) * 43758.5453
            scale = 0.5 if "embedding" in name or "bias" in name else 2.0 * shape[-1] ** -0.5
            values = (mixed % 1 - 0.5) * scale + ("ln_" in name and "weight" in name)
            made[name] = torch.tensor(values, dtype=torch.float32).reshape(shape)
    return made


def pictures() -> list[Image.Image]:
    made = []
    for number, (width, height) in enumerate(SIZES):
        row, column, channel = np.ogrid[:height, :width, :3]
        values = 128 + 127 * np.sin(0.2 * (number + 1) * row + 0.31 * column * (channel + 1) + 2 * number)
        made.append(Image.fromarray(values.astype(np.uint8)))
    return made


def write_model(folder: Path, config: dict, shapes: dict[str, list[int]]):
    """A folder as open_clip writes it, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights_of(shapes), folder / "open_clip_model.safetensors")


def stand_in(name: str):
    """The package without its `__init__.py`, which loads the compiled part."""
    spec = importlib.util.find_spec(name)
    module = sys.modules[name] = types.ModuleType(name)
    module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations)


def main(out: Path, folder: Path):
    stand_in("torchvision")
    stand_in("torchvision.ops")
    import open_clip

    found = {}
    for name, config in MODELS.items():
        shapes = {key: list(value.shape) for key, value in open_clip.CLIP(**config["model_cfg"]).state_dict().items()}
        write_model(folder / name, config, shapes)
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder / name}")
        tokens = open_clip.get_tokenizer(f"local-dir:{folder / name}")(TEXTS)
        with torch.no_grad():
            images = model.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures()]), True)
            texts = model.encode_text(tokens, True)
            logits = model.logit_scale.exp() * texts @ images.t()
        found[name] = {
            "shapes": shapes,
            "ids": tokens.tolist(),
            "text_embeds": texts.tolist(),
            "image_embeds": images.tolist(),
            "logits_per_text": logits.tolist(),
        }
    lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in found.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]), Path(scratch))
