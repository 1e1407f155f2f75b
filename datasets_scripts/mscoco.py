"""
MSCOCO with captions in English, and in Chinese (COCO-CN) or Japanese (STAIR Captions).

    from datasets_scripts.mscoco import Mscoco
    builder = Mscoco(config_name="ja", data_dir="coco", media_dir="coco/train_and_val2014")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

from collections.abc import Iterable
from pathlib import Path

from .reading.builder import (
    BenchmarkBuilder,
    BenchmarkConfig,
    find_file,
    media_files,
    read_id_list,
    read_json,
    require_file,
    tell_left_out,
)
from .reading.released_layout import Captions, SplitCaptions, merged, read_caption_file
from .reading.videos import picture_suffixes


def read_coco(path: Path) -> Captions:
    """
    Read captions in COCO's JSON (`images`, `annotations`), STAIR's too. Items are named as the pictures of 2014
    (`COCO_val2014_000000000042`); number k is the k-th annotation of a picture by `id`.
    """
    data, captions = read_json(path), Captions(path)
    try:
        names = {image["id"]: Path(image["file_name"]).stem for image in data["images"]}
        found = [(a["image_id"], a["id"], i, a["caption"]) for i, a in enumerate(data["annotations"])]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has no {error}: images and annotations of COCO's form are read") from error
    ids, counts = {}, {}
    for image, number, i, text in sorted(found, key=lambda annotation: annotation[:3]):
        place = f"{path}, annotations[{i}]"
        if image not in names:
            raise ValueError(f"{place} is of picture {image}, which is not among the images")
        if (other := ids.setdefault(number, i)) != i:
            raise ValueError(f"{place}: id {number} is that of annotations[{other}] already")
        k = counts[image] = counts.get(image, -1) + 1
        captions.add((names[image], str(k)), text, place)
    return captions


class Mscoco(BenchmarkBuilder):
    """
    MSCOCO 2014 (Lin et al., 2014). `zh`: COCO-CN (Li et al., 2019), its own split. `ja`: STAIR Captions (Yoshikawa et
    al., 2017), Karpathy's split if `dataset_coco.json` is there; without it, the official train2014 and val2014, and
    no test split. No human caption is a translation of an English one.
    """

    BUILDER_CONFIGS = [BenchmarkConfig(name=name, version="1.0.0") for name in ("zh", "ja")]
    EXPECTED = {
        "zh": {"train": (18341, None), "validation": (1000, None), "test": (1000, 1053)},
        "ja": {"train": (113287, None), "validation": (5000, None), "test": (5000, None)},
    }
    ITEM = "image"
    SUFFIXES = picture_suffixes()
    SOURCE = (
        "captions_train2014.json and captions_val2014.json of COCO and, for zh, COCO-CN (coco-cn_train.txt, ..., "
        "imageid.human-written-caption.txt), for ja, STAIR (stair_captions_v1.2_train.json and _val.json) and "
        "Karpathy's dataset_coco.json; or the released caption files (TextData/mscocotrain_en.caption.txt, ...)"
    )
    HOMEPAGE = "https://cocodataset.org"
    LICENSE = (
        "English captions: CC BY 4.0. STAIR Captions: CC BY 4.0. COCO-CN: for research, no licence stated. Pictures: "
        "of Flickr, under their own licences; not to be published again."
    )
    CITATION = (
        "@inproceedings{lin2014coco, title={Microsoft COCO: Common Objects in Context}, author={Lin, Tsung-Yi and "
        "Maire, Michael and Belongie, Serge and others}, booktitle={ECCV}, year={2014}}"
    )

    def _official(self, folder: Path, released: dict[str, SplitCaptions]) -> dict[str, SplitCaptions]:
        english = self._coco(folder, "captions_{}2014.json")
        if self.language == "zh":
            human = read_caption_file(require_file(folder, "imageid.human-written-caption.txt"))
            lists = {"train": "train", "validation": "val", "test": "test"}
            splits = {
                split: read_id_list(require_file(folder, f"coco-cn_{name}.txt")).keys()
                for split, name in lists.items()
            }
        else:
            human = self._coco(folder, "stair_captions_v*_{}.json")
            splits = self._karpathy(folder, english)
        splits = {split: list(items) for split, items in splits.items()}
        tell_left_out(SplitCaptions(human=human), splits.values())
        whole = SplitCaptions(english, human)
        return {split: whole.of_items(items) for split, items in splits.items()}

    @staticmethod
    def _coco(folder: Path, name: str) -> Captions:
        return merged(read_coco(require_file(folder, name.format(part))) for part in ("train", "val"))

    @staticmethod
    def _karpathy(folder: Path, english: Captions) -> dict[str, Iterable[str]]:
        path = find_file(folder, "dataset_coco.json")
        if path is None:
            print(
                "mscoco: no dataset_coco.json (Karpathy's split): validation is all of val2014, there is no test split"
            )
            items = dict.fromkeys(item for item, _ in english)
            names = {"train": "_train2014_", "validation": "_val2014_"}
            return {split: [item for item in items if name in item] for split, name in names.items()}
        names = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
        splits = {split: [] for split in names.values()}
        try:
            for image in read_json(path)["images"]:
                splits[names[image["split"]]].append(Path(image["filename"]).stem)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has no {error}: images with split and filename are read") from error
        return splits

    def _media_files(self, folder: str | Path) -> dict[str, Path]:
        """Find the pictures of 2017 too, which are the same under shorter names (`000000000042.jpg`)."""
        files = media_files(folder, self.SUFFIXES)
        short = {item: files[item] for item in files if item.isdecimal()}
        return files | {f"COCO_{part}2014_{item}": path for item, path in short.items() for part in ("train", "val")}
