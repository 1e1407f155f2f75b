"""Writes the folder that is the Space (model, index, clips, code), to be tried here and pushed as it is:

python examples/space/build_space.py
python outputs/space/app.py

By default Galician, Catalan and Spanish, as examples/add_language.py adds them to outputs/english (docs/languages.md).
Of one model as it is, such as that of `make demo`, or with other languages:

python examples/space/build_space.py --model outputs/demo
python examples/space/build_space.py --model outputs/english --language gl=outputs/gl
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoProcessor

import datasets_scripts
import modeling_nrccr
from datasets_scripts.animated_emoji import NPM_PACKAGE, fetch_clips
from datasets_scripts.cldr_emoji import from_code_points, reason_to_leave_out
from datasets_scripts.reading.splits import group_key, split_of
from datasets_scripts.reading.videos import read_frames

from ..cli.common import command
from ..media import load_image
from ..modeling_nrccr import NrccrModel
from ..retrieval.retriever import NrccrRetriever
from .gallery import Gallery


HERE = Path(__file__).resolve().parent
APP_FILES = (
    "app.py",
    "cards.py",
    "finder.py",
    "uploads.py",
    "gallery.py",
    "style.css",
    "README.md",
    "requirements.txt",
    "packages.txt",
)
MODEL, LANGUAGES = "outputs/english", tuple(f"{code}=outputs/gl-ca-es" for code in ("gl", "ca", "es"))
MODEL_FILES = ("*.json", "*.safetensors", "*.py", "*.model", "*.txt", "README.md")  # nothing pickled


@command()
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help=f"folder of a trained model; default: {MODEL}, with {', '.join(LANGUAGES)}")
    parser.add_argument("--language", action="append", default=[], help="CODE=FOLDER, a language added to the model")
    parser.add_argument("--output", default="outputs/space", help="replaced, if it is a Space already")
    parser.add_argument("--data_dir", help="folder with the contents of the Debian packages; by default fetched")
    parser.add_argument("--clips_dir", help="folder of animated emoji (1f600.webp); by default fetched with npm")
    parser.add_argument("--emoji_only", action="store_true", help="without Tux Paint's stamps")
    parser.add_argument("--no_clips", action="store_true", help="without animated emoji")
    args = parser.parse_args(argv)
    build_space(args)


def build_space(args: argparse.Namespace):
    model_dir, output, languages = Path(args.model or MODEL), Path(args.output), args.language
    if args.model is None and not languages:
        languages = list(LANGUAGES)
    if not (model_dir / "config.json").exists():
        raise ValueError(f"{model_dir} holds no model: --model outputs/demo takes that of `make demo`")
    if output.exists() and not (output / "app.py").exists():
        raise ValueError(f"{output} holds something else: name another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch, "space")
        folder.mkdir()
        for name in APP_FILES:
            shutil.copy(HERE / name, folder)
        for package in (modeling_nrccr, datasets_scripts):
            source = Path(package.__file__).parent
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        copy_model(model_dir, folder / "model")
        if languages:
            add_languages(model_dir, languages, folder / "model")
        (folder / "clips").mkdir()
        if not args.no_clips:
            copy_clips(Path(args.clips_dir) if args.clips_dir else fetch_clips(), folder / "clips")
        write_indexes(folder, args.data_dir, not args.emoji_only)
        if output.exists():
            shutil.rmtree(output)
        folder.replace(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"wrote {output} ({size / 1e6:.0f} MB); try it: python {output}/app.py")


def copy_model(source: Path, target: Path):
    target.mkdir()
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, target)


def add_languages(source: Path, languages: list[str], target: Path):
    """Saves the model with what `add_language.py` wrote, each file under its code. Raises ValueError for a file of
    another model."""
    model = NrccrModel.from_dual_encoder(str(source))
    for language in languages:
        code, _, folder = language.partition("=")
        if not folder:
            raise ValueError(f"--language {language}: name a code and a folder, gl=outputs/gl")
        model.load_language(code, folder)
    model.config.dual_encoder = None  # a path here
    model.save_pretrained(target)


def copy_clips(source: Path, target: Path):
    """What moves and shows a thing of its own, with a note of whose it is."""
    for file in sorted(source.glob("*.webp")):
        with Image.open(file) as image:
            moves = getattr(image, "n_frames", 1) > 1
        if moves and not reason_to_leave_out(from_code_points(file.stem)):
            shutil.copy(file, target)
    (target / "LICENSE.txt").write_text(
        f"Fluent Emoji by Microsoft, as animated WebP in the npm package {NPM_PACKAGE}: MIT licence.\n",
        encoding="utf-8",
    )


def write_indexes(folder: Path, data_dir: str | None, stamps: bool):
    """Pictures, clips (by all their frames together) and the single frames of clips."""
    model = NrccrModel.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    metrics = folder / "model/metrics.json"
    settings = json.loads(metrics.read_text(encoding="utf-8"))["settings"] if metrics.exists() else {}
    gallery, seed = Gallery(folder / "clips", data_dir), settings.get("split_seed", 0)

    def known(ids: list[str]) -> tuple[list[str], list[dict]]:
        """Those with an English name, and whether pictures of that name were in training."""
        ids = [id for id in ids if gallery.name(id, "en")]
        return ids, [{"seen": split_of(group_key(gallery.name(id, "en")), seed) == "train"} for id in ids]

    def write(name: str, ids: list[str], metadata: list[dict], **media):
        index = NrccrRetriever(model, processor)
        index.add(ids=ids, metadata=metadata, strict=True, show_progress=True, **media)
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


if __name__ == "__main__":
    main()
