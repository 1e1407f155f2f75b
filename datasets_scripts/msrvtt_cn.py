"""
MSR-VTT-CN: the 10,000 videos of MSR-VTT with captions in English and Chinese.

    from datasets_scripts.msrvtt_cn import MsrvttCn
    builder = MsrvttCn(config_name="zh", data_dir="msrvtt10kcn")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

import csv
import io
from collections.abc import Iterable, Mapping
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
from .reading.released_layout import Captions, Key, SplitCaptions, merged
from .reading.text_files import read_text_lines


SPLITS = {"train": "train", "validate": "validation", "test": "test"}
INFO_FILES = ("*videodatainfo*.json", "MSRVTT_data.json")
TEST_LISTS = ("MSRVTT_JSFUSION_test.csv", "*jsfusion*test*", "val_list_jsfusion.txt")
TRAIN_LISTS = ("MSRVTT_train.*.csv", "train_list_jsfusion.txt")


def read_videodatainfo(path: Path) -> tuple[Captions, dict[str, str]]:
    """Read English captions (a video's k-th sentence by `sen_id` has number k), and the official split of each
    video."""
    info, captions = read_json(path), Captions(path)
    try:
        splits = {video["video_id"]: SPLITS[video["split"]] for video in info["videos"]}
        sentences = [(s["video_id"], int(s["sen_id"]), i, s["caption"]) for i, s in enumerate(info["sentences"])]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no videodatainfo with videos (video_id, split) and sentences (video_id, sen_id, caption): "
            f"{error!r}"
        ) from error
    places, counts = {}, {}
    for video, number, i, text in sorted(sentences, key=lambda sentence: sentence[:3]):
        place = f"{path}, sentences[{i}]"
        if video not in splits:
            raise ValueError(f"{place} is of {video}, which is not among the videos")
        if (other := places.setdefault((video, number), i)) != i:
            raise ValueError(f"{place}: sen_id {number} of {video} is that of sentences[{other}] already")
        k = counts[video] = counts.get(video, -1) + 1
        captions.add((video, str(k)), text, place)
    return captions, splits


class MsrvttCn(BenchmarkBuilder):
    """
    MSR-VTT (Xu et al., 2016) with Chinese captions, as released with the method. `zh`: the official split;
    `1ka-zh`: the 1,000 test videos of Yu et al. (2018), with the one caption each that their list names.
    """

    BUILDER_CONFIGS = [BenchmarkConfig(name=name, version="1.0.0") for name in ("zh", "1ka-zh")]
    EXPECTED = {
        "zh": {"train": (6513, 130260), "validation": (497, 9940), "test": (2990, 59800)},
        "1ka-zh": {"test": (1000, 1000)},
    }
    SOURCE = (
        "the released caption files (TextData/msrvtt10kcn{train,val,test}*.caption.txt), or the official "
        "videodatainfo JSON with the released Chinese files (*_zh.caption.txt)"
    )
    HOMEPAGE = (
        "https://www.microsoft.com/en-us/research/publication/"
        "msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/"
    )
    LICENSE = (
        "Captions and videos: for research, by Microsoft's terms; the videos are excerpts of YouTube videos, whose "
        "rights are their owners'. No licence is stated for the Chinese captions. Not to be published again."
    )
    CITATION = (
        "@inproceedings{xu2016msrvtt, title={MSR-VTT: A Large Video Description Dataset for Bridging Video and "
        "Language}, author={Xu, Jun and Mei, Tao and Yao, Ting and Rui, Yong}, booktitle={CVPR}, year={2016}}"
    )

    def _official(self, folder: Path, released: dict[str, SplitCaptions]) -> dict[str, SplitCaptions]:
        paths = {path for name in INFO_FILES for place in ("", "annotations") for path in (folder / place).glob(name)}
        if not paths:
            raise FileNotFoundError(f"{folder} has no captions; {type(self).__name__} needs {self.SOURCE}")
        english, split_of = zip(*map(read_videodatainfo, sorted(paths)))
        split_of = {video: split for of_file in split_of for video, split in of_file.items()}
        everything = joined(released.values())
        everything.source = merged(english)
        if everything.human is None:
            raise FileNotFoundError(
                f"{folder} has no Chinese captions (*train_zh.caption.txt, *val_zh..., *test_zh...): they are not in "
                "the official files, but in those released with the method"
            )
        tell_left_out(everything, [split_of])
        return {
            split: everything.of_items(video for video, of in split_of.items() if of == split)
            for split in dict.fromkeys(SPLITS.values())
            if split in split_of.values()
        }

    def _read(self) -> dict[str, SplitCaptions]:
        splits = super()._read()
        if self.config.name != "1ka-zh":
            return splits
        return self._split_1ka(Path(self.config.data_dir), splits)

    def _split_1ka(self, folder: Path, splits: Mapping[str, SplitCaptions]) -> dict[str, SplitCaptions]:
        """
        Split by Yu et al.'s test list. Training: their list if it is there, else the official training videos;
        validation: what is left of the official one (with the list of 9,000 nothing is).
        """
        everything = joined(splits.values())
        test_list = require_file(folder, *TEST_LISTS)
        sentences = read_list(test_list)
        test = everything.of_items(sentences)
        if any(sentences.values()):
            keep = chosen_captions(test_list, sentences, test.source)
            test = test.only(keep.__contains__)
        train_list = find_file(folder, *TRAIN_LISTS)
        train = read_list(train_list) if train_list else dict.fromkeys(item for item, _ in splits["train"].source)
        if both := next((item for item in train if item in sentences), None):
            raise ValueError(f"{train_list or 'the training split'}: {both} is in {test_list} too")
        validation = splits.get("validation", SplitCaptions())
        left = {item for item, _ in validation.human or ()} - train.keys() - sentences.keys()
        parts = {"train": everything.of_items(train), "test": test}
        return parts | ({"validation": validation.of_items(left)} if left else {})


def joined(splits: Iterable[SplitCaptions]) -> SplitCaptions:
    """Join the captions of all splits."""
    splits = list(splits)
    return SplitCaptions(
        **{field: merged(getattr(split, field) for split in splits) for field in vars(SplitCaptions())}
    )


def read_list(path: Path) -> dict[str, str | None]:
    """Read the videos of a list, each with its caption where the list (CSV with `video_id` and `sentence`) names
    one."""
    if path.suffix != ".csv":
        return dict.fromkeys(read_id_list(path))
    text = "\n".join(line for _, line in read_text_lines(path))
    rows = csv.DictReader(io.StringIO(text))
    if "video_id" not in (rows.fieldnames or ()):
        raise ValueError(f"{path}, line 1: no column video_id, but {', '.join(rows.fieldnames or ()) or 'nothing'}")
    videos = {}
    for row in rows:
        if row["video_id"] in videos:
            raise ValueError(f"{path}, line {rows.line_num}: {row['video_id']} is there already")
        videos[row["video_id"]] = row.get("sentence")
    return videos


def chosen_captions(path: Path, sentences: Mapping[str, str], captions: Captions) -> set[Key]:
    """Return which of a video's captions the list names, by its English text."""
    of_item = {}
    for (item, k), caption in captions.items():
        of_item.setdefault(item, {}).setdefault(plain(caption), (item, k))
    chosen = set()
    for video, sentence in sentences.items():
        if plain(sentence) not in of_item.get(video, {}):
            raise ValueError(f"{path}: the caption {sentence!r} of {video} is none of its captions in {captions.path}")
        chosen.add(of_item[video][plain(sentence)])
    return chosen


def plain(caption: str) -> str:
    """Return a caption's letters and digits in lower case: the released files differ in punctuation and spaces."""
    return "".join(character for character in caption.casefold() if character.isalnum())
