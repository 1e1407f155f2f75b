"""Caption files as they come from users and upstream: read whole and checked, each error with its file and line."""

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from .columns import CaptionBuilder, clean_caption
from .debian import data_fingerprint
from .features import VisualFeats, open_features
from .picture_files import find_pictures, shown, spellings


CONVERT = "convert the file, such as by `iconv -f LATIN1 -t UTF-8` (or -f UTF-16)"


def read_text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, plain or gzip, numbered from 1, without their ends; blank ones too. It is in
    UTF-8, or in UTF-16 and says so by its first bytes."""
    path, number = Path(path), 0
    try:
        with open_text(path) as file:
            start = file.peek(2)[:2]
            if start in (b"\xff\xfe", b"\xfe\xff"):
                lines = (line.encode() for line in io.TextIOWrapper(file, "utf-16", newline="\n"))
            else:
                lines = file
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in text:
                    raise ValueError(f"{path}, line {number}: not UTF-8, but UTF-16, or no text at all; {CONVERT}")
                yield number, text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        number += error.encoding.startswith("utf-16")  # which is decoded before the line is counted
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error}); {CONVERT}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged after line {number} ({error}); fetch the file again") from error


def open_text(path: Path) -> io.BufferedReader:
    """Open a file whose content, not its name, tells whether it is packed: a downloaded file has no suffix, and a
    browser unpacks what stays called `.gz`."""
    file = path.open("rb")
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    file.close()
    return io.BufferedReader(gzip.open(path))


def read_captions(path: str | Path) -> list[str]:
    """Read one caption a line, with single spaces. Raises ValueError for a line without text."""
    captions = []
    for number, line in read_text_lines(path):
        captions.append(clean_caption(line))
        if not captions[-1]:
            raise ValueError(f"{path}, line {number}: no text; the files of other languages count on this line")
    return captions


def check_aligned(files: dict[Path, Sequence[str]]):
    """Raise ValueError where one file is shorter than another: line i of each belongs to line i of the others."""
    shortest, longest = min(files, key=lambda path: len(files[path])), max(files, key=lambda path: len(files[path]))
    if len(files[shortest]) < len(files[longest]):
        raise ValueError(
            f"{shortest} ends after line {len(files[shortest])}, but {longest} has {len(files[longest])}: their lines "
            "belong together; fetch both again"
        )


@dataclass
class TextFilesConfig(datasets.BuilderConfig):
    """
    BuilderConfig of builders over caption files.

    Args:
        target (`str`, defaults to `"translated"`): `"translated"`, or `"human"` for the upper bound that trains on
            human target captions.
        image_dir (`str`, *optional*): the folder of the pictures; `images` in `data_dir` if that is there. Without
            pictures `image` is None.
        visual_feature (`str`, *optional*): the folder of pre-extracted features, which take the place of pictures;
            `FeatureData` in `data_dir` if that is there and `image_dir` is not given.
        missing (`str`, defaults to `"error"`): `"skip"` leaves captions without picture or features out, and lists
            them.
    """

    target: str = "translated"
    image_dir: str | None = None
    visual_feature: str | None = None
    missing: str = "error"


class TextFilesBuilder(CaptionBuilder):
    """
    Base of the builders over caption files in `data_dir`. A subclass reads its rows; pictures, or features in their
    place, are found here.
    """

    BUILDER_CONFIG_CLASS = TextFilesConfig

    def __init__(
        self,
        *args,
        data_dir: str | Path | None = None,
        image_dir: str | Path | None = None,
        visual_feature: str | Path | None = None,
        **kwargs,
    ):
        # datasets caches by options; the state of the files belongs to them.
        state = []
        if data_dir is not None:
            data_dir = Path(data_dir).expanduser().absolute()
            if visual_feature is None and image_dir is None and (data_dir / "FeatureData").is_dir():
                visual_feature = data_dir / "FeatureData"
            if image_dir is None and (data_dir / "images").is_dir():
                image_dir = data_dir / "images"
            state.append(data_fingerprint(dict(enumerate(self._state_files(data_dir, kwargs))), data_dir))
            kwargs["data_dir"] = str(data_dir)
        if visual_feature is not None:
            visual_feature = Path(visual_feature).expanduser().absolute()
            state.append(data_fingerprint({"": ""}, visual_feature))
            kwargs["visual_feature"] = str(visual_feature)
        if image_dir is not None:
            image_dir = Path(image_dir).expanduser().absolute()
            state.append(data_fingerprint({"": ""}, image_dir))
            kwargs["image_dir"] = str(image_dir)
        if state:
            kwargs.setdefault("hash", "-".join(state))
        super().__init__(*args, **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        if self.config.visual_feature is not None:
            self.MEDIA = {"visual_feats": VisualFeats()}
        return super()._info()

    @staticmethod
    def _state_files(data_dir: Path, options: dict) -> Iterable[str]:
        """List the caption files, or folders of them, that a build reads, below `data_dir`."""
        raise NotImplementedError

    def _read(self, dl_manager) -> dict[str, list[dict]]:
        """Read rows by split: the columns of captions, and `picture`, a file's name."""
        raise NotImplementedError

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        ((column, _),) = self.MEDIA.items()
        self._rows = self._read(dl_manager)
        others = [split for split in self._rows if split not in self.SPLITS]
        for splits in ([split for split in self._rows if split in self.SPLITS], *([split] for split in others)):
            rows = [row for split in splits for row in self._rows[split]]
            try:
                media = self._media({row["picture"]: row["image_id"] for row in rows})
            except FileNotFoundError as error:
                if splits[0] in self.SPLITS:
                    raise
                print(f"{splits[0]} is left out: {error}", flush=True)  # another collection, which few have
                del self._rows[splits[0]]
                continue
            for split in splits:
                self._rows[split] = [row for row in self._rows[split] if row["picture"] in media]
            for row in rows:
                row[column] = media.get(row.pop("picture"))
        sizes = ", ".join(f"{name} {len(split)}" for name, split in self._rows.items())
        print(f"{self.name} {self.config.name}: captions {sizes}", flush=True)
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": name}) for name, r in self._rows.items() if r]

    def _media(self, names: dict[str, str]) -> dict[str, dict | None]:
        """Return what the media column holds, by picture name. `names`: picture name -> `image_id`."""
        folders = self._picture_folders()
        if self.config.visual_feature is not None:
            folders, what, option = [self.config.visual_feature], "features", "visual_feature"
            reader = open_features(self.config.visual_feature)
            ids = {name: (image_id, name, Path(name).stem) for name, image_id in names.items()}
            ids = {name: [key for given in keys for key in spellings(given)] for name, keys in ids.items()}
            ids = {name: next((key for key in keys if key in reader), None) for name, keys in ids.items()}
            media = {name: {"path": str(reader.path), "id": key} for name, key in ids.items() if key is not None}
        elif folders:
            what, option = "pictures", "image_dir"
            media = {name: {"path": path, "bytes": None} for name, path in self._find_pictures(names).items()}
        else:
            return dict.fromkeys(names)
        missing = [name for name in names if name not in media]
        if missing and (self.config.missing == "error" or not media):
            raise FileNotFoundError(
                f"{self._place(missing[0])}{' and '.join(folders)} has no {what} of {shown(missing[0])}, nor of "
                f"{len(missing) - 1:,} others of {len(names):,}; add them, name the folder that has them ({option}), "
                "or leave them out with missing='skip'"
            )
        if missing:
            places = "".join(f"\n  {self._place(name)}{shown(name)}" for name in missing)
            print(f"{self.name}: left out, without {what}: {len(missing):,} of {len(names):,}{places}", flush=True)
        return media

    def _picture_folders(self) -> list[str]:
        return [self.config.image_dir] if self.config.image_dir else []

    def _find_pictures(self, names: Iterable[str]) -> dict[str, str]:
        """Find the path of each picture that there is."""
        return find_pictures(self._picture_folders(), names, self._place)

    def _place(self, name: str) -> str:
        """Return where a picture is named, for messages."""
        return ""
