"""Base of the benchmarks that a user fetches (MSR-VTT-CN, VATEX, MSCOCO): captions with features or media."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from .columns import CaptionBuilder, caption_columns
from .features import VisualFeats, open_features
from .picture_files import visible_files
from .released_layout import Captions, SplitCaptions, read_released
from .text_files import read_text_lines
from .videos import MOVING_SUFFIXES, VIDEO_SUFFIXES, picture_suffixes


_CAPTION_SUFFIXES = (".txt", ".json", ".csv", ".npy")
_FEATURE_FILES = ("feature.bin", "*.npy", "*.safetensors", "*.parquet")


@dataclass
class BenchmarkConfig(datasets.BuilderConfig):
    """
    BuilderConfig of the benchmarks; its name is the target language.

    Args:
        target (`str`, defaults to `"translated"`): `"translated"`, or `"human"` for the upper bound that trains on
            human target captions.
        visual_feature (`str`, *optional*): the folder of pre-extracted features, a path or a name in
            `data_dir/FeatureData`; by default the only one there; `"none"`: none.
        media_dir (`str`, *optional*): the folder of videos or pictures, named by item; by default `videos` or `images`
            in `data_dir`, if there are no features. Without either the column is None.
        max_frames (`int`, defaults to 64): of longer feature sequences, so many frames, sampled uniformly (released
            code: the first 64); 0: all.
        missing (`str`, defaults to `"error"`): `"skip"` leaves items without features or media out, and counts them.
        collection (`str`, *optional*), engine (`str`, *optional*): which caption files of the released layout, where a
            folder has several.
    """

    target: str = "translated"
    visual_feature: str | None = None
    media_dir: str | None = None
    max_frames: int = 64
    missing: str = "error"
    collection: str | None = None
    engine: str | None = None


class BenchmarkBuilder(CaptionBuilder):
    """
    Reads `data_dir`: the released layout if its English captions are there (`TextData/*.caption.txt`, or in `data_dir`
    itself), else the official files, for which a subclass has `_official`.
    """

    BUILDER_CONFIG_CLASS = BenchmarkConfig
    ITEM = "video"  # or "image"
    SUFFIXES = (*VIDEO_SUFFIXES, *MOVING_SUFFIXES)
    SOURCE: str  # what to put into data_dir, for messages

    def __init__(self, *args, data_dir: str | Path | None = None, **kwargs):
        if data_dir is None:
            raise ValueError(f"{type(self).__name__} needs data_dir, a folder with {self.SOURCE}")
        data_dir = Path(data_dir).expanduser().absolute()
        if not data_dir.is_dir():
            raise FileNotFoundError(f"{data_dir} is no folder; {type(self).__name__} needs {self.SOURCE}")
        features, media = self._find_media(data_dir, kwargs.get("visual_feature"), kwargs.get("media_dir"))
        kwargs |= {"visual_feature": str(features or "none"), "media_dir": media and str(media)}
        # datasets caches by options; the state of the files belongs to them.
        kwargs.setdefault("hash", fingerprint(data_dir, *filter(None, (features, media))))
        super().__init__(*args, data_dir=str(data_dir), **kwargs)

    @staticmethod
    def _find_media(data_dir: Path, feature: str | Path | None, media: str | Path | None) -> tuple:
        found = data_dir / "FeatureData"
        if feature is None and media is None:
            folders = [found, *sorted(found.iterdir())] if found.is_dir() else []
            folders = [folder for folder in folders if any(any(folder.glob(name)) for name in _FEATURE_FILES)]
            if len(folders) > 1:
                names = ", ".join(folder.name for folder in folders)
                raise ValueError(f"{found} has several features: {names}; choose one by visual_feature=")
            feature = folders[0] if folders else None
        elif feature not in (None, "none"):
            feature = Path(feature).expanduser()
            feature = (feature if feature.is_dir() else found / feature).absolute()
            if not feature.is_dir():
                raise FileNotFoundError(f"{feature} is no folder of features (visual_feature)")
        if feature not in (None, "none"):
            return feature, None
        if media is not None:
            media = Path(media).expanduser().absolute()
            if not media.is_dir():
                raise FileNotFoundError(f"{media} is no folder (media_dir)")
            return None, media
        return None, next((data_dir / name for name in ("videos", "images") if (data_dir / name).is_dir()), None)

    def _info(self) -> datasets.DatasetInfo:
        if self.config.visual_feature != "none":
            self.MEDIA = {"visual_feats": VisualFeats(max_frames=self.config.max_frames)}
        elif self.ITEM == "video":
            self.MEDIA = {"video": datasets.Video(decode=False)}
        return super()._info()

    @property
    def language(self) -> str:
        return self.config.name.split("-")[-1]

    def _official(self, folder: Path, released: dict[str, SplitCaptions]) -> dict[str, SplitCaptions]:
        """
        Read the captions by split out of the official files. `released`: the caption files that there are beside them.

        Raises:
            FileNotFoundError: a file is missing; names it.
        """
        raise NotImplementedError

    def _read(self) -> dict[str, SplitCaptions]:
        folder = Path(self.config.data_dir)
        captions = folder / "TextData" if (folder / "TextData").is_dir() else folder
        released = read_released(captions, self.language, self.config.collection, self.config.engine)
        is_released = "train" in released and released["train"].source is not None
        return released if is_released else self._official(folder, released)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        splits = self._read()
        media, left_out = self._media(splits)
        self._rows, sizes = {}, []
        for split in sorted(splits, key=[*self.SPLITS, *splits].index):
            rows = [row for row in self._rows_of(split, splits[split]) if row["image_id"] not in left_out]
            if not rows:
                raise ValueError(
                    f"{self.config.data_dir} has no {self.language} captions of the {split} {self.ITEM}s; "
                    f"{type(self).__name__} needs {self.SOURCE}"
                )
            ((column, _),) = self.MEDIA.items()
            self._rows[split] = [{**row, column: media.get(row["image_id"])} for row in rows]
            items = len({row["image_id"] for row in rows})
            sizes.append(f"{split} {items:,} {self.ITEM}s, {len(rows):,} captions")
            expected = self.EXPECTED.get(self.config.name, {}).get(split)
            if expected and expected[0] != items:
                sizes[-1] += f" (expected {expected[0]:,})"
        sizes += [f"no {split} split" for split in self.SPLITS if split not in splits]
        skipped = f"; left out, without {' or '.join(self.MEDIA)}: {len(left_out):,}" if left_out else ""
        print(f"{self.name} {self.config.name}: {'; '.join(sizes)}{skipped}", flush=True)
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": name}) for name in self._rows]

    # -------------------------------------------------------------------------------------------------- captions

    def _rows_of(self, split: str, captions: SplitCaptions) -> Iterable[dict]:
        """Yield a row for each English caption in training (with `target="human"`, each human one), else each human
        one."""
        language, target = self.language, self.config.target
        by_human = split != "train" or target == "human"
        main = captions.human if by_human else captions.source
        if main is None:
            raise ValueError(
                f"{self.config.data_dir} has no {language if by_human else 'English'} captions of {split}; "
                f"{type(self).__name__} needs {self.SOURCE}"
            )
        english = first_of_items(captions.source or {})
        for key, caption in main.items():
            item, k = key
            tag = language if by_human else "enc"
            source = (captions.source or {}).get(key, english.get(item)) if by_human else caption
            human = caption if by_human else None
            row = caption_columns(item, source, human, language, split, target, caption_id=f"{item}#{tag}#{k}")
            if split != "train":  # never human English, which is in reference_source_caption
                row["source_caption"] = None
                if captions.translated_query is not None:
                    row["source_caption"] = partner(captions.translated_query, main, key, f"{language}2enc")
            elif target != "human" and captions.translated is not None:
                row["target_caption"] = partner(captions.translated, main, key, f"enc2{language}")
                row["target_origin"] = captions.translated.engine
                if captions.back_translation is not None:
                    row["back_translation"] = partner(captions.back_translation, main, key, f"enc2{language}2enc")
            yield row

    # ----------------------------------------------------------------------------------------------------- media

    def _media(self, splits: Mapping[str, SplitCaptions]) -> tuple[dict[str, dict], set[str]]:
        """Return what the media column holds, by item, and the items that are left out for want of it."""
        places = {}  # item -> its first caption
        for captions in splits.values():
            for part in (captions.source, captions.human):
                for key in part or ():
                    places.setdefault(key[0], (part, key))
        if self.config.visual_feature != "none":
            reader = open_features(self.config.visual_feature)
            held, what, folder = reader, "features", reader.path
            media = {item: {"path": str(folder), "id": item} for item in places if item in reader}
        elif self.config.media_dir is not None:
            what, folder = self.ITEM, self.config.media_dir
            held = self._media_files(folder)
            media = {item: {"path": str(held[item]), "bytes": None} for item in places if item in held}
        else:
            return {}, set()
        missing = [item for item in places if item not in held]
        if missing and self.config.missing == "error":
            part, key = places[missing[0]]
            raise ValueError(
                f"{part.where(key)}: {missing[0]} has no {what} in {folder}, nor have {len(missing) - 1:,} others of "
                f"{len(places):,}; add them, or leave them out with missing='skip'"
            )
        if not media:
            raise ValueError(f"{folder} has no {what} of any of the {len(places):,} items, such as {missing[0]}")
        return media, set(missing)

    def _media_files(self, folder: str | Path) -> dict[str, Path]:
        return media_files(folder, self.SUFFIXES)


def partner(captions: Captions, main: Captions, key: tuple[str, str], tag: str) -> str:
    """Return the caption that belongs to one of `main`. Raises ValueError where there is none."""
    if key not in captions:
        raise ValueError(
            f"{captions.path} has no {key[0]}#{tag}#{key[1]}, which {main.where(key)} wants; fetch both files again"
        )
    return captions[key]


def first_of_items(captions: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Return the first caption of each item."""
    first = {}
    for (item, _), caption in captions.items():
        first.setdefault(item, caption)
    return first


def tell_left_out(captions: SplitCaptions, splits: Iterable[Iterable[str]]):
    """Print how many items have captions and are in none of the splits, which are lists of items."""
    known = {item for split in splits for item in split}
    items = dict.fromkeys(item for part in (captions.source, captions.human) for item, _ in part or ())
    if unknown := [item for item in items if item not in known]:
        path = (captions.human or captions.source).path
        count = f"{len(unknown):,} of {len(items):,} items"
        print(f"{path.parent}: {count} are in no split and left out, such as {unknown[0]}", flush=True)


def media_files(folder: str | Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Return the files in and below a folder by their name without suffix. Raises ValueError where two have the
    same."""
    paths = map(Path, visible_files(folder))
    return by_stem(path for path in paths if path.suffix.lower() in suffixes and path.is_file())


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Return files by their name without suffix. Raises ValueError where two have the same."""
    files = {}
    for path in paths:
        if (other := files.setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path} are both {path.stem!r}: rename or remove one")
    return files


def fingerprint(data_dir: Path, *folders: Path) -> str:
    """Return what tells one state of the captions, and of the features or media, from another: names, sizes and
    times."""
    files = [
        path for folder in (data_dir, data_dir / "TextData", data_dir / "annotations") for path in folder.glob("*")
    ]
    files = [path for path in files if path.suffix in _CAPTION_SUFFIXES]
    digest = hashlib.sha256()
    for path in sorted(files) + sorted(path for folder in folders for path in folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def read_json(path: Path):
    """Read a JSON file. Raises ValueError for what is no UTF-8 JSON; names file and line."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error}); fetch the file again") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: no JSON ({error.msg}); fetch the file again") from error


def find_file(folder: Path, *names: str) -> Path | None:
    """Find the first of several names (glob patterns) in a folder or in its `annotations` or `TextData`."""
    for name in names:
        for place in (folder, folder / "annotations", folder / "TextData"):
            if found := sorted(place.glob(name)):
                return found[0]
    return None


def require_file(folder: Path, *names: str) -> Path:
    if (path := find_file(folder, *names)) is None:
        raise FileNotFoundError(f"{folder} has no {' or '.join(names)}, nor its annotations or TextData")
    return path


def read_id_list(path: Path) -> dict[str, int]:
    """Read a list of items, one a line, or an array of names (`.npy`): numbers of lines or rows by item."""
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(
                f"{path} is not readable as an array of names ({error}); save it as a text file"
            ) from error
        lines = enumerate(map(str, array.reshape(-1)), 1)
    else:
        lines = read_text_lines(path)
    items = {}
    for number, line in lines:
        item = line.strip()
        if Path(item).suffix.lower() in (*VIDEO_SUFFIXES, *picture_suffixes()):
            item = item.removesuffix(Path(item).suffix)
        if not item:
            raise ValueError(f"{path}, line {number}: no id")
        if item in items:
            raise ValueError(f"{path}, line {number}: {item} is in line {items[item]} already")
        items[item] = number
    return items
