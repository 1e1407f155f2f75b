"""Immich's search: the folder that its machine-learning service keeps of a model, texts in `textual`, pictures in
`visual`. A `textual` of another language beside the `visual` that a library was indexed with needs no new index.

200 texts and 20 pictures are read from the files as Immich reads them, and where an embedding is more than 1e-5 away
from the model's nothing is written.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, normalizers
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import SiglipTokenizer

from ..files import replacing_folder
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from ..processor_inputs import text_problem
from ..publishing.card import hub_name
from ..retrieval.encoding import encode_texts
from .onnx import export_side, load_onnx, quiet, trace
from .readme import find_report
from .sides import Side, list_sides, one_text_side
from .siglip_tokenizer import LOWER_CASE, convert_siglip


if TYPE_CHECKING:
    from .immich_client import ImmichClient

TOLERANCE = 1e-5  # of float32: the largest difference between two numbers of an embedding of length 1, or two pixels
NUM_TEXTS, NUM_PICTURES = 200, 20
PADDED = "The model was trained on pictures filled up to a square, which Immich does not do: expect less of it."
TITLE = "# For Immich: "  # of README.md, by which an earlier export is told from a model that Immich fetched
FILES = {
    "textual": {"model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"},
    "visual": {"model.onnx", "model.onnx.data", "preprocess_cfg.json"},
}
SENTENCES = (
    "a photo of a dog that runs on the beach",
    "Two old men playing chess under a tree, 1950s!",
    "un can corre pola praia ao solpor",
    "dúas nenas xogan coa neve; é inverno",
    "pes, který běží přes zelenou louku",
    "ein großer Hund läuft über die Straße",
    "une fille à l'ombre d'un chêne",
    "il gatto è sul tetto, di notte",
    "öğle vakti İstanbul'da bir kedi",
    "ΔΥΟ ΣΚΥΛΟΙ ΣΤΟΥΣ ΔΡΟΜΟΥΣ της πόλης",
    "красная лодка на берегу озера",
    "жовтий автобус біля школи",
    "طفل يلعب بالكرة في الحديقة",
    "ילדה קטנה עם בלון אדום",
    "पहाड़ों में बर्फ और एक छोटा घर",
    "แมวนอนอยู่บนโต๊ะ",
    "một con mèo đang ngủ trên ghế",
    "一只红色的猫坐在窗边",
    "夕方の海で走る犬",
    "눈 오는 날의 작은 집",
    "🐶 on a 🏖️ with my family 👨‍👩‍👧",
    "IMG_2034.jpg #summer @home 50% café",
    "“quotes” – dashes — and… ¿what? 3½ km²",
    "ﬁnal oﬃce ＡＢＣ １２３ ™",
)
SHORT = (".", "a", "!", "?", "_", "-", "0", "é", "猫", "👍", "❤️", "\t x \n", "…", "#", "'")


class ImmichText(nn.Module):
    """
    Reads texts as Immich gives them: tokens alone, padded to one length.

    Args:
        side: takes ids and mask.
        pad: the token that fills up.
        how: "all": padding is read too; "end": the first `pad` ends the text and is read; "words": no `pad` is.
    """

    def __init__(self, side: nn.Module, pad: int, how: str):
        super().__init__()
        self.side, self.pad, self.how = side, pad, how

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        ids = text.long()
        if self.how == "all":
            return self.side(ids, torch.ones_like(ids))
        # from the right, as a text may have that token inside it
        mask = ((ids != self.pad).long().flip(1).cumsum(1).flip(1) > 0).long()
        if self.how == "end":
            mask = F.pad(mask[:, :-1], (1, 0), value=1)
        else:
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)  # of an empty text something is read
        return self.side(ids, mask)


def make_tokenizer(processor: NrccrProcessor) -> Tokenizer:
    """Return the tokenizer with all that the processor does to a text before it. Raises ValueError where it cannot."""
    tokenizer = processor.tokenizer
    kind = type(tokenizer).__name__
    is_siglip = isinstance(tokenizer, SiglipTokenizer)
    if not (tokenizer.is_fast or is_siglip):
        raise ValueError(f"{kind} is written in Python, and Immich reads a tokenizer.json: this model has none")
    if tokenizer.pad_token is None:
        raise ValueError(f"{kind} has no pad token, with which Immich fills up a text: set its pad_token first")
    if tokenizer.truncation_side != "right":
        raise ValueError(f"{kind} keeps the end of a text that is too long, and Immich its beginning")
    made = convert_siglip(tokenizer) if is_siglip else Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.no_padding()
    made.no_truncation()
    steps = [normalizers.NFC()]
    if processor.lower_case:
        steps += LOWER_CASE
    if processor.text_prefix:
        steps.append(normalizers.Prepend(processor.text_prefix))
    made.normalizer = normalizers.Sequence([*steps, *filter(None, [made.normalizer])])
    return made


def context_length(model: NrccrModel, processor: NrccrProcessor) -> int:
    """Return how many tokens each text has. Raises ValueError for a model that reads texts otherwise."""
    if getattr(model.config, "pool_padding", False):
        raise ValueError("this model pools padding too (pool_padding), and Immich fills up every text")
    length, fixed = processor.max_text_length, model.config.text_length
    if fixed and length != fixed:
        raise ValueError(
            f"this model reads {fixed} tokens and its processor cuts after {length}: Immich has one number for both. "
            f"Set max_text_length to {fixed}"
        )
    return length


def text_side(side: Side, model: NrccrModel, processor: NrccrProcessor, length: int) -> Side:
    """Return the side of texts, for the input that Immich gives."""
    pad = processor.tokenizer.pad_token_id
    ends = pad in processor.tokenizer("a")["input_ids"]
    module = ImmichText(side.module, pad, "all" if model.config.text_length else "end" if ends else "words")

    def draw(size: int, _: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"text": side.draw(1, length, generator)["input_ids"].int()}

    return replace(side, name="textual/model", module=module, axes={"text": {}}, draw=draw)


def picture_side(side: Side) -> Side:
    """Return the side of pictures, for the input that Immich gives. Raises ValueError where it reads no pictures."""
    if set(side.axes) != {"pixel_values"}:
        raise ValueError(
            f"this model reads {', '.join(side.axes)}, features of frames, and Immich gives pictures: export its "
            "texts alone, --sides text"
        )

    def draw(size: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"image": side.draw(1, length, generator)["pixel_values"]}

    return replace(side, name="visual/model", axes={"image": {}}, draw=draw)


def picture_settings(processor: NrccrProcessor, shape: Sequence[int]) -> dict:
    """Return what stands in `preprocess_cfg.json`; `shape`: `(3, height, width)` of a prepared picture."""
    reads, (_, height, width) = processor.image_processor, shape
    if height != width:
        raise ValueError(f"this model reads pictures of {height} x {width}, and Immich makes squares: --sides text")
    normal = getattr(reads, "do_normalize", True)
    crops = getattr(reads, "do_center_crop", False) and not processor.pad_to_square
    return {
        "size": height,
        "mode": "RGB",
        "mean": list(reads.image_mean) if normal else [0.0] * 3,
        "std": list(reads.image_std) if normal else [1.0] * 3,
        "interpolation": Image.Resampling(int(reads.resample)).name.lower(),
        "resize_mode": "shortest" if crops and getattr(reads, "resize_mode", "shortest") != "squash" else "squash",
    }


def list_texts(processor: NrccrProcessor) -> list[str]:
    """Return `NUM_TEXTS` different ones: of many languages and scripts, in capitals, decomposed, cut, hardly anything,
    and of words that the tokenizer knows, which are those of its languages."""
    texts = [*SENTENCES, *SHORT, *map(str.upper, SENTENCES)]
    texts += [f"  {unicodedata.normalize('NFD', text).replace(' ', '   ')} " for text in SENTENCES]
    texts += [" ".join([text] * 40) for text in SENTENCES]
    tokenizer, rng = processor.tokenizer, np.random.default_rng(0)
    known = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    while len(texts) < NUM_TEXTS:
        ids = rng.choice(known, rng.integers(1, 40)).tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        texts.append(f"{rng.integers(1000)}" if text_problem(text) else text)
    return texts


def draw_pictures(size: int) -> list[Image.Image]:
    """Draw `NUM_PICTURES` of smooth colours: the first fourth is of `size` x `size`, others are wide or high."""
    rng, pictures = np.random.default_rng(0), []
    for number in range(NUM_PICTURES):
        colours = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        sides = (size, size) if number % 4 == 0 else tuple(rng.integers(size // 2 + 1, 3 * size, 2).tolist())
        pictures.append(colours.resize(sides, Image.Resampling.BICUBIC))
    return pictures


def check_texts_of(client: "ImmichClient", model: NrccrModel, processor: NrccrProcessor, batch_size: int) -> dict:
    """Compare texts. Raises ValueError that names the first one whose embedding differs."""
    texts, largest = list_texts(processor), 0.0
    with quiet():
        expected = encode_texts(model, texts, processor, batch_size).numpy()
    for text, ours in zip(tqdm(texts, "texts", leave=False), expected):
        difference = float(np.abs(client.embed_text(text) - ours).max())
        if not difference <= TOLERANCE:  # also where it is no number
            raise ValueError(
                f"textual/model.onnx reads {text[:60]!r} otherwise than the model, by {difference:.1e}, more than "
                f"{TOLERANCE}: nothing was written. Its tokenizer, or another version of torch or onnxruntime"
            )
        largest = max(largest, difference)
    return {"number": len(texts), "max_difference": largest}


@torch.no_grad()
def check_pictures(client: "ImmichClient", side: Side, processor: NrccrProcessor) -> dict:
    """
    Compare pictures: of the same pixels, and of what Immich makes of a file.

    Raises:
        ValueError: embeddings of the same pixels differ, or Immich prepares a picture of the model's size otherwise.
    """
    size = client.picture_settings["size"]
    largest, cosines = 0.0, []
    for picture in tqdm(draw_pictures(size), "pictures", leave=False):
        pixels = processor(images=[picture], return_tensors="pt")["pixel_values"]
        ours, given = side.embed({"pixel_values": pixels})[0].numpy(), client.read_picture(picture)
        if picture.size == (size, size) and not np.abs(given - pixels.numpy()).max() <= TOLERANCE:
            raise ValueError(
                f"{type(processor.image_processor).__name__} prepares a picture of {size} x {size} otherwise than "
                "Immich can, which resizes, cuts, and normalises by mean and std: export its texts alone, --sides text"
            )
        difference = float(np.abs(client.embed_pixels(pixels.numpy()) - ours).max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"visual/model.onnx differs by {difference:.1e} from the model, more than {TOLERANCE}: nothing was "
                "written; try another version of torch or onnxruntime"
            )
        largest = max(largest, difference)
        cosines.append(float(client.embed_pixels(given) @ ours))
    through = {"min_cosine": min(cosines), "mean_cosine": sum(cosines) / len(cosines)}
    found = {"number": len(cosines), "max_difference": largest, "through_immich": through}
    longest = getattr(processor.image_processor, "resize_mode", None) == "longest"  # of open_clip
    return found | {"padded": processor.pad_to_square or longest}


def is_exported(path: Path) -> bool:
    """Return whether a file or folder is of an earlier export, and not of a model that Immich fetched."""
    readme = path.with_name("README.md")
    if not readme.is_file() or not readme.read_text(encoding="utf-8", errors="replace").startswith(TITLE):
        return False
    if path.is_dir():
        return {file.name for file in path.iterdir()} <= FILES.get(path.name, set())
    return path.name in ("README.md", "config.json")


def write_readme(report: dict) -> str:
    """Return the page that goes with a folder."""
    model, language, base = report["model"], report["language"], report["base"]
    read = f"texts in `{language}`" if language else "texts"
    verdict = f" Tested on human captions: **{report['verdict']}**." if report["verdict"] else ""
    texts, pictures = report["texts"], report.get("pictures")
    parts = [f"{TITLE}{model}{f', {language}' if language else ''}\n"]
    parts.append(
        f"Written by `nrccr export --to immich`: it reads {read}, for libraries indexed by `{base}`.{verdict}\n"
    )
    place = (
        "Immich keeps a model in its cache as `clip/NAME/` (in the container `/cache`), by the names of its list; "
        "NAME is the one that the library was indexed with, under Machine Learning, Smart Search. "
    )
    if pictures is None:
        place += (
            "Keep a copy of what is there, take away its `textual` folder, put this `textual` and this `config.json` "
            "in its place, and start the machine-learning container again. `visual` stays, and so does the index: it "
            f"must be that of `{base}`, whatever Immich calls it."
        )
    else:
        place += (
            "Keep a copy of what is there, put this folder in its place, and start the machine-learning container "
            "again. Pictures are then embedded by this `visual`: let Smart Search run over all of them, unless it is "
            "the model of the index already."
        )
    parts.append(f"## Where to put it\n\n{place}\n")
    checks = [
        f"- {texts['number']} texts, read as Immich reads them: at most {texts['max_difference']:.0e} from the model "
        f"in any number of an embedding. A text has {report['context_length']} tokens; longer ones are cut."
    ]
    if pictures:
        through = pictures["through_immich"]
        checks.append(
            f"- {pictures['number']} pictures, of the same pixels: at most {pictures['max_difference']:.0e}. Resized "
            f"and cut by Immich and not by the model's own processor: cosine {through['mean_cosine']:.4f} on average, "
            f"{through['min_cosine']:.4f} at worst." + (f" {PADDED}" if pictures["padded"] else "")
        )
    parts.append("## What was compared\n\n" + "\n".join(checks) + "\n")
    return "\n".join(parts)


def export_immich(
    model: NrccrModel,
    processor: NrccrProcessor,
    folder: str | Path,
    name: str,
    sides: Sequence[str] = ("text", "image"),
    languages: Sequence[str] = (),
    batch_size: int = 32,
) -> dict:
    """
    Write the folder that Immich keeps of a model: `config.json`, `textual`, `visual`, `README.md`.

    Args:
        model: in float32, on the CPU; its active language reads the texts.
        name: of the model, as it was loaded.
        sides: of "text", "image"; "text" alone leaves out `visual`.
        languages: as they were loaded; where the report of one is found.
        batch_size: of texts that the model itself reads, to be compared with.

    Returns:
        What was compared, `summary` in a line.

    Raises:
        ValueError: Immich cannot read the model so, or the files give other embeddings than the model; or `folder`
            holds what is no such export.
    """
    load_onnx()
    from .immich_client import ImmichClient  # it needs onnxruntime

    if "text" not in sides:
        raise ValueError("Immich reads a model's texts: --sides text, or both")
    model, processor = one_text_side(model, processor, name)
    tokenizer, length = make_tokenizer(processor), context_length(model, processor)
    parts = {side.name: side for side in list_sides(model, processor, sides)}
    if missing := [side for side in sides if side not in parts]:
        raise ValueError(f"this model has no side of {', '.join(missing)}: export its texts alone, --sides text")
    made = [text_side(parts["text"], model, processor, length)]
    config = {"embed_dim": model.config.projection_dim, "text_cfg": {"context_length": length}}
    report = {
        "model": hub_name(name),
        "base": hub_name(model.made_for()["name"] or name),
        "language": model.language,
        "verdict": find_report(name, model.language, languages).get("verdict"),
        "context_length": length,
    }
    with replacing_folder(folder, is_exported, "an export for Immich") as work, model.lora(model.language):
        (work / "textual").mkdir()
        tokenizer.save(str(work / "textual/tokenizer.json"))
        write(work / "textual/tokenizer_config.json", {"pad_token": processor.tokenizer.pad_token})
        if "image" in parts:
            made.append(picture_side(parts["image"]))
            shape = made[1].draw(1, 1, torch.Generator())["image"].shape[1:]
            (work / "visual").mkdir()
            write(work / "visual/preprocess_cfg.json", picture_settings(processor, shape))
            config["vision_cfg"] = {"image_size": shape[-1]}
        write(work / "config.json", config)
        for side in made:
            export_side(side, trace(side), work)
        client = ImmichClient(work, torch.get_num_threads())
        report["texts"] = check_texts_of(client, model, processor, batch_size)
        if "image" in parts:
            report["pictures"] = check_pictures(client, parts["image"], processor)
        (work / "README.md").write_text(write_readme(report), encoding="utf-8")
    return report | {"summary": summarize(report)}


def write(path: Path, content: dict):
    """Write JSON into a folder that is not in place yet."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def summarize(report: dict) -> str:
    """Return what was compared, in a line."""
    texts, pictures = report["texts"], report.get("pictures")
    said = f"{texts['number']} texts as Immich reads them: at most {texts['max_difference']:.0e} from the model"
    if pictures:
        said += (
            f"; {pictures['number']} pictures: {pictures['max_difference']:.0e}, and as Immich resizes and cuts them "
            f"cosine {pictures['through_immich']['min_cosine']:.4f} or more"
            + (f". {PADDED}" if pictures["padded"] else "")
        )
    return said
