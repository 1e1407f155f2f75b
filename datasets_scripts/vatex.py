"""
VATEX: videos of 10 seconds with ten English and ten Chinese captions each.

    from datasets_scripts.vatex import Vatex
    builder = Vatex(config_name="zh", data_dir="vatex")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

from pathlib import Path

from .reading.builder import (
    BenchmarkBuilder,
    BenchmarkConfig,
    find_file,
    read_id_list,
    read_json,
    require_file,
    tell_left_out,
)
from .reading.columns import caption_texts
from .reading.released_layout import Captions, SplitCaptions


# id lists of the official 3,000 validation videos' halves: as text, or as Chen et al. (HGR, 2020) published them
ID_LISTS = {
    "validation": ("validation_ids.txt", "val_ids.txt", "val_names.npy"),
    "test": ("test_ids.txt", "tst_names.npy"),
}


def read_vatex(path: Path) -> SplitCaptions:
    """Read an official JSON: a list of `{"videoID", "enCap": [...], "chCap": [...]}`."""
    split = SplitCaptions(Captions(path), Captions(path))
    videos = read_json(path)
    if not isinstance(videos, list):
        raise ValueError(f"{path} is no list of videos")
    for i, video in enumerate(videos):
        place = f"{path}, [{i}]"
        try:
            item, english, chinese = video["videoID"], video["enCap"], video["chCap"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place} has no {error}: videoID, enCap and chCap are read") from error
        if (item, "0") in split.source:
            raise ValueError(f"{place}: {item} is there already")
        for captions, texts, name in ((split.source, english, "enCap"), (split.human, chinese, "chCap")):
            for k, text in enumerate(caption_texts(texts, f"{place}, {name}")):
                captions.add((item, str(k)), text, place)
    return split


class Vatex(BenchmarkBuilder):
    """
    VATEX (Wang et al., 2019). The last five English and Chinese captions of a video are translations of each other,
    the first five are not. Validation and test are halves of the official 3,000 validation videos, by the id lists of
    Chen et al. (2020); without them all 3,000 are validation, and there is no test split.
    """

    BUILDER_CONFIGS = [BenchmarkConfig(name="zh", version="1.0.0")]
    EXPECTED = {"zh": {"train": (25991, 259910), "validation": (1500, 15000), "test": (1500, 15000)}}
    SOURCE = (
        "the released caption files (TextData/vatex{train,val,test}*.caption.txt), or the official "
        "vatex_training_v1.0.json and vatex_validation_v1.0.json (and validation_ids.txt and test_ids.txt, or "
        "val_names.npy and tst_names.npy)"
    )
    LICENSE_ID = "cc-by-4.0"
    HOMEPAGE = "https://eric-xw.github.io/vatex-website/"
    LICENSE = (
        "Captions: CC BY 4.0. Videos: of YouTube (Kinetics-600), whose rights are their owners'; not to be published "
        "again."
    )
    CITATION = (
        "@inproceedings{wang2019vatex, title={VATEX: A Large-Scale, High-Quality Multilingual Dataset for "
        "Video-and-Language Research}, author={Wang, Xin and Wu, Jiawei and Chen, Junkun and Li, Lei and Wang, "
        "Yuan-Fang and Wang, William Yang}, booktitle={ICCV}, year={2019}}"
    )

    def _official(self, folder: Path, released: dict[str, SplitCaptions]) -> dict[str, SplitCaptions]:
        train = read_vatex(require_file(folder, "vatex_training*.json"))
        held_out = read_vatex(require_file(folder, "vatex_validation*.json"))
        lists = {split: find_file(folder, *names) for split, names in ID_LISTS.items()}
        if not all(lists.values()):
            print("vatex: no id lists of validation and test, so all official validation videos are validation")
            return {"train": train, "validation": held_out}
        videos = {item for item, _ in held_out.source}
        ids = {split: read_id_list(path) for split, path in lists.items()}
        for split, numbers in ids.items():
            for item, number in numbers.items():
                if item not in videos:
                    raise ValueError(f"{lists[split]}, line {number}: {item} is not in {held_out.source.path}")
                if split == "test" and item in ids["validation"]:
                    raise ValueError(f"{lists[split]}, line {number}: {item} is in {lists['validation']} too")
        tell_left_out(held_out, ids.values())
        return {"train": train} | {split: held_out.of_items(items) for split, items in ids.items()}
