"""Finds a pretrained encoder: a folder, a hub id, or one of those that can be built from PyPI wheels."""

import os
from pathlib import Path

from pretrained_image_encoder import build_image_encoder
from pretrained_text_encoder import build_minilm, build_text_encoder
from transformers import AutoConfig
from wheels import cache_folder


BUILT = {
    "multilingual-e5-small": build_text_encoder,
    "all-MiniLM-L6-v2": build_minilm,
    "efficientnet-lite0": build_image_encoder,
}


def find_encoder(name: str) -> str:
    """`name` as it is where it is a folder or answers on the hub; else the folder that was built for it.

    Raises OSError where neither is to be had.
    """
    if os.path.isdir(name):
        return name
    build = BUILT.get(name.split("/")[-1])
    if build is None or "/" in name:
        try:
            AutoConfig.from_pretrained(name)
            return name
        except OSError:
            if build is None:
                raise
            print(f"no hub answers for {name}: building it from PyPI wheels instead")
    return str(build(cache_folder() / "encoders" / name.split("/")[-1]))


def encoder_label(path: str) -> str:
    """The name of an encoder for reports, without the path of this machine."""
    return Path(path).name if os.path.isdir(path) else path
