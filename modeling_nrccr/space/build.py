"""Writes the folder that is the Space: model, index, clips, code, and a page that serves the folder it lies in."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

import datasets_scripts
import modeling_nrccr
from datasets_scripts.animated_emoji import NPM_PACKAGE, fetch_clips
from datasets_scripts.cldr_emoji import from_code_points, reason_to_leave_out
from datasets_scripts.reading.splits import group_key, split_of
from datasets_scripts.reading.videos import read_frames

from ..loading.models import load_model, load_with_languages
from ..media import load_image
from ..retrieval.retriever import NrccrRetriever
from .gallery import Gallery


TEMPLATES = ("README.md", "requirements.txt", "packages.txt", "style.css")
APP = '''"""The Space: `python app.py`, then http://127.0.0.1:7860"""

from pathlib import Path

from modeling_nrccr.space.app import serve


if __name__ == "__main__":
    serve(Path(__file__).resolve().parent)
'''
MODEL, LANGUAGES = "outputs/english", tuple(f"{code}=outputs/gl-ca-es" for code in ("gl", "ca", "es"))
MODEL_FILES = ("*.json", "*.safetensors", "*.py", "*.model", "*.txt", "README.md")  # nothing pickled


def build_space(
    folder: str | Path = "outputs/space",
    model: str | Path | None = None,
    languages: Sequence[str] = (),
    data_dir: str | None = None,
    clips_dir: str | None = None,
    stamps: bool = True,
    clips: bool = True,
    device: str | None = None,
    batch_size: int = 32,
    dtype: str | None = None,
) -> int:
    """
    Write the Space.

    Args:
        folder: replaced, if it is a Space already.
        model: folder of a trained model; default: `MODEL`, with `LANGUAGES` where no languages are given.
        languages: `CODE=FOLDER` of what `nrccr add-language` wrote, each saved with the model under its code.
        data_dir: folder with the contents of the Debian packages; by default as installed, or fetched.
        clips_dir: folder of animated emoji (1f600.webp); by default fetched with npm.
        stamps, clips: False leaves out Tux Paint's stamps, or animated emoji.
        device, batch_size: of encoding the pictures.
        dtype: of the model's weights; default: as they were saved.

    Returns:
        The bytes of the folder.

    Raises:
        ValueError: there is no model, `folder` holds something else, or a language is of another model.
    """
    if model is None and not languages:
        languages = LANGUAGES
    model, folder = Path(model or MODEL), Path(folder)
    if not (model / "config.json").exists():
        raise ValueError(f"{model} holds no model: `nrccr space outputs/demo` takes that of `make demo`")
    if folder.exists() and not (folder / "app.py").exists():
        raise ValueError(f"{folder} holds something else: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        work = Path(scratch, "space")
        work.mkdir()
        for name in TEMPLATES:
            shutil.copy(Path(__file__).with_name(name), work)
        (work / "app.py").write_text(APP, encoding="utf-8")
        for package in (modeling_nrccr, datasets_scripts):
            source = Path(package.__file__).parent
            shutil.copytree(source, work / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        copy_model(model, work / "model")
        if languages or dtype:
            save_model(model, languages, dtype, work / "model")
        (work / "clips").mkdir()
        if clips:
            copy_clips(Path(clips_dir) if clips_dir else fetch_clips(), work / "clips")
        write_indexes(work, data_dir, stamps, device, batch_size)
        if folder.exists():
            shutil.rmtree(folder)
        work.replace(folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def copy_model(source: Path, target: Path):
    """Copy what a model is loaded from, and nothing else."""
    target.mkdir()
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, target)


def save_model(source: Path, languages: Sequence[str], dtype: str | None, target: Path):
    """Save the model in `dtype`, with languages in it. Raises ValueError for one of another model."""
    model, _ = load_with_languages(str(source), languages, "cpu", dtype)
    model.config.dual_encoder = None  # a path here
    model.save_pretrained(target)


def copy_clips(source: Path, target: Path):
    """Copy what moves and shows a thing of its own, with a note of whose it is."""
    for file in sorted(source.glob("*.webp")):
        with Image.open(file) as image:
            moves = getattr(image, "n_frames", 1) > 1
        if moves and not reason_to_leave_out(from_code_points(file.stem)):
            shutil.copy(file, target)
    (target / "LICENSE.txt").write_text(
        f"Fluent Emoji by Microsoft, as animated WebP in the npm package {NPM_PACKAGE}: MIT licence.\n",
        encoding="utf-8",
    )


def write_indexes(folder: Path, data_dir: str | None, stamps: bool, device: str | None, batch_size: int):
    """Index pictures, clips (by all their frames together) and the single frames of clips."""
    model, processor = load_model(str(folder / "model"), device)
    metrics = folder / "model/metrics.json"
    settings = json.loads(metrics.read_text(encoding="utf-8"))["settings"] if metrics.exists() else {}
    gallery, seed = Gallery(folder / "clips", data_dir), settings.get("split_seed", 0)

    def known(ids: list[str]) -> tuple[list[str], list[dict]]:
        """Return those of `ids` with an English name, and whether pictures of that name were in training."""
        ids = [id for id in ids if gallery.name(id, "en")]
        return ids, [{"seen": split_of(group_key(gallery.name(id, "en")), seed) == "train"} for id in ids]

    def write(name: str, ids: list[str], metadata: list[dict], **media):
        index = NrccrRetriever(model, processor)
        index.add(ids=ids, metadata=metadata, strict=True, show_progress=True, batch_size=batch_size, **media)
        index.save(folder / "index" / name)

    ids, metadata = known(gallery.emoji_ids() + (gallery.stamp_ids() if stamps else []))
    write("pictures", ids, metadata, images=[gallery.picture(id) for id in tqdm(ids, desc="drawing")])
    ids, metadata = known(gallery.clip_ids())
    if not ids:
        return
    frames = {}
    (folder / "clips/frames").mkdir()
    for id in tqdm(ids, desc="frames"):
        for number, frame in enumerate(read_frames(gallery.clip_file(id))):
            file = gallery.frame_file(id.partition("/")[2], number)
            frame.save(file, quality=85)
            frames.setdefault(id, []).append(file)
    write("clips", ids, metadata, videos=ids, read_frames=lambda id: [load_image(file) for file in frames[id]])
    files = {f"{id}#{number}": file for id in ids for number, file in enumerate(frames[id])}
    write("frames", list(files), [{}] * len(files), images=list(files.values()))
