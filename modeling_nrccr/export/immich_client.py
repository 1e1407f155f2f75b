"""Reads a folder as Immich's machine-learning service does: onnxruntime, tokenizers, numpy and Pillow alone. Nothing
of this package is imported, so that the file also runs where the package is not installed."""

import json
import string
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ImmichClient:
    """
    Embeds texts and pictures by the files of a folder.

    Args:
        folder: with `config.json`, `textual` and, for pictures, `visual`.
        threads: of a session; 0: onnxruntime's choice.
    """

    def __init__(self, folder: str | Path, threads: int = 0):
        self.folder, self.options = Path(folder), onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads

    def read(self, file: str) -> dict:
        return json.loads((self.folder / file).read_text(encoding="utf-8"))

    def session(self, side: str) -> onnxruntime.InferenceSession:
        path = self.folder / side / "model.onnx"
        return onnxruntime.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])

    @cached_property
    def textual(self) -> onnxruntime.InferenceSession:
        return self.session("textual")

    @cached_property
    def visual(self) -> onnxruntime.InferenceSession:
        return self.session("visual")

    @cached_property
    def text_settings(self) -> dict:
        return self.read("config.json")["text_cfg"]

    @cached_property
    def picture_settings(self) -> dict:
        return self.read("visual/preprocess_cfg.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_file(str(self.folder / "textual/tokenizer.json"))
        pad = self.read("textual/tokenizer_config.json")["pad_token"]
        length = self.text_settings.get("context_length", 77)
        tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
        tokenizer.enable_truncation(max_length=length)
        return tokenizer

    def read_text(self, text: str) -> np.ndarray:
        """Return the tokens of a text, int32, `(1, context_length)`."""
        text = " ".join(text.split())
        if (self.text_settings.get("tokenizer_kwargs") or {}).get("clean") == "canonicalize":
            text = text.translate(NO_PUNCTUATION).lower()
        return np.array([self.tokenizer.encode(text).ids], dtype=np.int32)

    def read_picture(self, picture: Image.Image) -> np.ndarray:
        """Return the pixels of a picture, float32, `(1, 3, size, size)`."""
        settings, size = self.picture_settings, self.picture_settings["size"]
        size = size[0] if isinstance(size, list) else size
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        resample = Image.Resampling[settings["interpolation"].upper()]
        mode = settings.get("resize_mode", "shortest")
        if mode == "squash":
            picture = picture.resize((size, size), resample)
        elif mode == "shortest":
            short = min(picture.size)
            picture = picture.resize([int(side / short * size) for side in picture.size], resample)
            left, top = (int(side / 2 - size / 2) for side in picture.size)
            picture = picture.crop((left, top, left + size, top + size))
        else:
            raise ValueError(f"resize_mode {mode!r}: Immich knows shortest and squash")
        mean, std = (np.array(settings[name], dtype=np.float32) for name in ("mean", "std"))
        pixels = np.asarray(picture, dtype=np.float32) / 255.0
        return ((pixels - mean) / std).transpose(2, 0, 1)[None]

    def embed_text(self, text: str) -> np.ndarray:
        """Return the embedding of a text, `(dim,)`."""
        return self.textual.run(None, {"text": self.read_text(text)})[0][0]

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Return the embedding of what `read_picture` gives, `(dim,)`."""
        return self.visual.run(None, {"image": pixels})[0][0]

    def embed_picture(self, picture: Image.Image) -> np.ndarray:
        """Return the embedding of a picture, `(dim,)`."""
        return self.embed_pixels(self.read_picture(picture))
