"""
Multi30K: pictures of Flickr30K with captions in English, German, French and Czech.

    from datasets_scripts.multi30k import Multi30k
    builder = Multi30k(config_name="task1-de", data_dir="multi30k", image_dir="flickr30k-images")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets

from .reading.columns import caption_columns
from .reading.debian import FetchError
from .reading.text_files import TextFilesBuilder, TextFilesConfig, check_aligned, read_captions


# split -> name upstream in task 1, name in task 2, pictures
SPLITS = {
    "train": ("train", "train", 29000),
    "validation": ("val", "val", 1014),
    "test": ("test_2016_flickr", "test_2016", 1000),
    "test_2017_flickr": ("test_2017_flickr", None, 1000),
    "test_2018_flickr": ("test_2018_flickr", None, 1071),
    "test_2017_mscoco": ("test_2017_mscoco", None, 461),
}
NOT_IN_CZECH = ("test_2017_flickr", "test_2017_mscoco")
CAPTIONS_A_PICTURE = 5  # in task 2
CHECKSUMS = Path(__file__).with_suffix(".sha256")  # of all files upstream, as `sha256sum` writes and checks them


@dataclass
class Multi30kConfig(TextFilesConfig):
    """
    BuilderConfig of Multi30K; its name is task and target language.

    Args:
        base_url (`str`): where the files are downloaded from if there is no `data_dir`; their checksums are known.
    """

    base_url: str = "https://raw.githubusercontent.com/multi30k/dataset/master/data"


class Multi30k(TextFilesBuilder):
    """
    Multi30K (Elliott et al., 2016). Task 1: one English caption a picture with its translation by people. Task 2: five
    captions a picture, written independently in English and German; French and Czech are tested on those of task 1.
    `data_dir`: the folder that holds `task1` and `task2`, or the upstream repository, which has them in `data`.
    """

    BUILDER_CONFIG_CLASS = Multi30kConfig
    BUILDER_CONFIGS = [
        Multi30kConfig(name=f"task{task}-{language}", version="1.0.0")
        for task in (1, 2)
        for language in ("de", "fr", "cs")
    ]
    HOMEPAGE = "https://github.com/multi30k/dataset"
    LICENSE = (
        "Captions: no licence is stated in the upstream repository; published for research by the WMT shared tasks on "
        "multimodal translation. Pictures: on request from their owners (Flickr30K: non-commercial research and "
        "education, Flickr's terms of use; 2017 and 2018 test sets: the shared tasks' pages; MSCOCO: train2014 and "
        "val2014); not to be published again."
    )
    CITATION = (
        "@inproceedings{elliott2016multi30k, title={Multi30K: Multilingual English-German Image Descriptions}, "
        "author={Elliott, Desmond and Frank, Stella and Sima'an, Khalil and Specia, Lucia}, booktitle={5th Workshop "
        "on Vision and Language}, pages={70--74}, year={2016}}"
    )

    @staticmethod
    def _state_files(data_dir: Path, options: dict) -> Iterable[str]:
        return "task1", "task2", "data/task1", "data/task2"

    def _read(self, dl_manager) -> dict[str, list[dict]]:
        task, language = self.config.name.removeprefix("task").split("-")
        parts = {split: self._files(split, int(task), language) for split in expected_splits(self.config.name)}
        if self.config.data_dir:
            parts, find = self._local(parts)
        else:
            names = [name for pictures, source, human in parts.values() for name in (pictures, *source, *human)]
            find = self._download(names, dl_manager)
        return {split: self._rows_of(split, language, *files, find) for split, files in parts.items()}

    def _files(self, split: str, task: int, language: str) -> tuple[str, list[str], list[str]]:
        """Return the list of pictures, the English files and the human ones, by their names upstream."""
        in_task1, in_task2, _ = SPLITS[split]
        human = [f"task1/raw/{in_task1}.{language}.gz"]
        if task == 1 or (language != "de" and split != "train"):
            return f"task1/image_splits/{in_task1}.txt", [f"task1/raw/{in_task1}.en.gz"], human
        numbers = range(1, CAPTIONS_A_PICTURE + 1)
        pictures, source = (
            f"task2/image_splits/{in_task2}_images.txt",
            [f"task2/raw/{in_task2}.{i}.en.gz" for i in numbers],
        )
        if language == "de":
            return pictures, source, [f"task2/raw/{in_task2}.{i}.de.gz" for i in numbers]
        if self.config.target == "human":
            raise ValueError(
                f"{self.config.name} has no human {language} training captions, so no target='human': that upper "
                f"bound is in task1-{language} (one caption a picture) and task2-de"
            )
        return pictures, source, []

    def _local(self, parts: dict[str, tuple]) -> tuple[dict[str, tuple], Callable[[str], Path]]:
        """Return the splits that the folder has any captions of, and what finds their files. Raises FileNotFoundError
        where their other files are not there too."""
        root = Path(self.config.data_dir)
        root = root if (root / "task1").is_dir() or (root / "task2").is_dir() else root / "data"
        held = {
            split: (pictures, source, human)
            for split, (pictures, source, human) in parts.items()
            if any((root / name).is_file() for name in (*source, *human))
        }
        names = [name for pictures, *others in (held or parts).values() for name in (pictures, *sum(others, []))]
        if missing := [name for name in names if not (root / name).is_file()]:
            raise FileNotFoundError(
                f"{self.config.data_dir} lacks {len(missing)} of {len(names)} files of {self.config.name}, the first "
                f"{missing[0]}: name the folder that holds task1 and task2 (upstream: {self.HOMEPAGE})"
            )
        return held, lambda name: root / name

    def _download(self, names: list[str], dl_manager) -> Callable[[str], Path]:
        if (
            dl_manager.is_streaming
        ):  # it would give addresses; these few megabytes are fetched, and checked, all the same
            dl_manager = datasets.DownloadManager(dataset_name=self.name)
        checksums = dict(line.split()[::-1] for line in CHECKSUMS.read_text(encoding="utf-8").splitlines())
        try:
            paths = dl_manager.download({name: f"{self.config.base_url}/{name}" for name in names})
        except (OSError, ConnectionError) as error:
            raise FetchError(
                f"Cannot download Multi30K from {self.config.base_url} ({type(error).__name__}: {error}). Is the "
                f"network there? Otherwise clone {self.HOMEPAGE} elsewhere and name its folder (data_dir)."
            ) from error
        for name, path in paths.items():
            found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            if found != checksums[name]:
                Path(path).unlink()
                raise FetchError(
                    f"{self.config.base_url}/{name} has sha256 {found}, expected {checksums[name]}: the server gave "
                    f"another file, which is thrown away. Try again, or clone {self.HOMEPAGE} and name its folder "
                    "(data_dir)."
                )
        return lambda name: Path(paths[name])

    def _rows_of(
        self, split: str, language: str, pictures: str, source: list[str], human: list[str], find
    ) -> list[dict]:
        files = {find(name): read_captions(find(name)) for name in (pictures, *source, *human)}
        check_aligned(files)
        seen, rows = {}, []
        for line, name in enumerate(files[find(pictures)]):
            name, _, _ = name.partition("#")  # MSCOCO's have the number of the caption after it
            if name in seen:
                raise ValueError(f"{find(pictures)}, line {line + 1}: {name} is in line {seen[name]} already")
            seen[name] = line + 1
            image_id = f"{'coco' if name.startswith('COCO_') else 'flickr30k'}/{Path(name).stem}"
            for k, source_file in enumerate(source):
                row = caption_columns(
                    image_id,
                    files[find(source_file)][line],
                    files[find(human[k])][line] if human else None,
                    language,
                    split,
                    self.config.target,
                    caption_id=f"{image_id}#{k}",
                )
                rows.append({**row, "picture": name})
        return rows


def expected_splits(config: str) -> dict[str, tuple[int, int]]:
    """Return pictures and captions of each split of a configuration."""
    task, language = config.removeprefix("task").split("-")
    result = {}
    for split, (_, in_task2, pictures) in SPLITS.items():
        if (language == "cs" and split in NOT_IN_CZECH) or (config == "task2-de" and in_task2 is None):
            continue
        five = task == "2" and (language == "de" or split == "train")
        result[split] = (pictures, pictures * (CAPTIONS_A_PICTURE if five else 1))
    return result


Multi30k.EXPECTED = {config.name: expected_splits(config.name) for config in Multi30k.BUILDER_CONFIGS}
