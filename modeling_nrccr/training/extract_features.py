"""Features of pictures and videos by any vision tower, extracted once, for trainings that read them.

The shards are what the builders of `datasets_scripts` read (`visual_feature`). An item's id is its file's name without
suffix. Run again, it goes on where it was ended, and adds what is new in the folder.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.numpy import save
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor

from datasets_scripts.reading.builder import by_stem
from datasets_scripts.reading.features import ShardFeatures
from datasets_scripts.reading.videos import VIDEO_SUFFIXES, read_frames

from ..configuration_nrccr import NrccrConfig
from ..files import replacing, write_file
from ..loading.encoders import encoder_label, find_encoder
from ..media import IMAGE_SUFFIXES, describe_others, is_clip, load_image, to_rgb, walk
from ..processing_nrccr import to_square
from ..towers import NrccrVisualTower, load_encoder
from .feature_cache import fingerprint, load_media


ROWS_A_GROUP = 16  # of Parquet: what reading one item reads


class Extractor:
    """Turns pictures, by a vision tower and its image processor, into features of shape `(num_pictures, dim)`."""

    def __init__(self, vision_encoder: str, output: str = "pooled", pad_to_square: bool = True, device=None):
        folder = find_encoder(vision_encoder)
        config = NrccrConfig(vision_config=AutoConfig.from_pretrained(folder), visual_encoder_output=output)
        self.tower = NrccrVisualTower(config)
        load_encoder(self.tower, folder, config.vision_config)
        self.device = torch.device(device) if device else PartialState().device
        self.tower.eval().to(self.device)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.pad_to_square = pad_to_square
        self.settings = {
            "vision_encoder": encoder_label(folder),
            "fingerprint": fingerprint(self.tower, self.image_processor),
            "visual_encoder_output": output,
            "pad_to_square": pad_to_square,
        }

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        pictures = [to_square(to_rgb(picture)) if self.pad_to_square else to_rgb(picture) for picture in pictures]
        inputs = self.image_processor(pictures, return_tensors="pt").to(self.device)
        return self.tower(**inputs).squeeze(1).float().cpu()


def write_shard(path: Path, feats: dict[str, np.ndarray]):
    """Write a shard, at once or not at all. `feats`: by item, of shape `(num_frames, dim)`."""
    if path.suffix == ".safetensors":
        header = {
            "image_ids": json.dumps(list(feats)),
            "num_frames": json.dumps([len(part) for part in feats.values()]),
        }
        write_file(path, save({"visual_feats": np.concatenate(list(feats.values()))}, metadata=header))
    else:
        dim = next(iter(feats.values())).shape[1]
        columns = {
            "image_id": pa.array(list(feats)),
            "visual_feats": pa.array([part.tolist() for part in feats.values()], pa.list_(pa.list_(pa.float32()))),
        }
        table = pa.table(columns).replace_schema_metadata({"dim": str(dim)})
        with replacing(path) as file:
            pq.write_table(table, file, row_group_size=ROWS_A_GROUP)


def start(output: Path, settings: dict) -> ShardFeatures:
    """Return the shards that are there, once it is sure that they were made with the same settings. Raises ValueError
    for other ones."""
    state, record = PartialState(), output / "settings.json"
    with state.main_process_first():
        output.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            write_file(record, json.dumps(settings, indent=1) + "\n")
    found = json.loads(record.read_text(encoding="utf-8"))
    if other := [
        f"{key} {found.get(key)!r}, now {settings[key]!r}" for key in settings if found.get(key) != settings[key]
    ]:
        raise ValueError(f"{output} holds features made with {'; '.join(other)}: name another folder, or remove it")
    shards = sorted(file for file in output.glob("features-*") if file.suffix in (".safetensors", ".parquet"))
    done = ShardFeatures(output, shards)
    state.wait_for_everyone()  # all have listed the same shards before one is added
    if state.is_main_process:
        for leftover in output.glob("*.tmp"):  # of a run that was killed
            leftover.unlink()
    state.wait_for_everyone()
    return done


def extract(
    media: dict[str, Path],
    output: Path,
    extractor: Extractor,
    num_frames: int = 8,
    batch_size: int = 8,
    shard_size: int = 256,
    format: str = "safetensors",
    dtype: str = "float32",
    strict: bool = False,
) -> tuple[int, int, list[str]]:
    """
    Write features of every item that `output` lacks; each process extracts whole shards.

    Args:
        media: files by item, of `find_media`.
        num_frames: of each video, sampled uniformly.
        batch_size, shard_size: pictures or videos at a time, and a shard.
        format: of shards, safetensors or parquet.
        dtype: of the features in safetensors, float32 or float16.
        strict: refuse what cannot be read, instead of leaving it out.

    Returns:
        How many items this process extracted, how many were there, and what it left out, with the reason.

    Raises:
        ValueError: a picture or video cannot be read (if `strict`), or `output` has features of other
            settings.
    """
    state = PartialState()
    done = start(output, extractor.settings | {"num_frames": num_frames})
    new = [item for item in media if item not in done]
    first = max((int(file.stem.split("-")[1]) for file in done.files), default=-1) + 1
    shards = list(range(0, len(new), shard_size))[state.process_index :: state.num_processes]
    extracted, broken = 0, []
    with tqdm(total=len(new), desc="features", unit="item", disable=not state.is_main_process) as progress:
        for shard in shards:
            feats = {}
            chunk = new[shard : shard + shard_size]
            for begin in range(0, len(chunk), batch_size):
                frames = {}
                for item in chunk[begin : begin + batch_size]:
                    try:
                        frames[item] = load_media(str(media[item]), partial(frames_of, num_frames=num_frames))
                    except ValueError as error:
                        if strict:
                            raise
                        broken.append(str(error))
                feats |= features_of(frames, extractor, dtype)
                progress.update(state.num_processes * min(batch_size, len(chunk) - begin))
            if feats:
                write_shard(output / f"features-{first + shard // shard_size:05d}.{format}", feats)
            extracted += len(feats)
    return extracted, len(media) - len(new), broken


def frames_of(path: str, num_frames: int) -> list[Image.Image]:
    """Return sampled frames of a video, or a still picture alone."""
    return read_frames(path, num_frames) if is_clip(path) else [load_image(path)]


def find_media(folder: str) -> tuple[dict[str, Path], list[str]]:
    """
    Return pictures and videos by item, and what is left out, in words. A picture of a video's name is its cover.

    Raises:
        ValueError: there are none, or two of one name.
    """
    found = walk(folder, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    clips = {path for path in found.files if is_clip(path)}
    left_out = [describe_others(found.others)] if found.others else []
    left_out += [f"{name}: {reason}" for name, reason in found.left_out]
    if not found.files:
        raise ValueError("; ".join([f"{folder} holds no pictures or videos", *left_out]))
    return by_stem(path for path in found.files if path not in clips) | by_stem(sorted(clips)), left_out


def features_of(videos: dict[str, list[Image.Image]], extractor: Extractor, dtype: str) -> dict[str, np.ndarray]:
    """Return features by item, of shape `(num_frames, dim)`; all in one pass of the tower."""
    if not videos:
        return {}
    parts = extractor([frame for frames in videos.values() for frame in frames]).split(list(map(len, videos.values())))
    feats = {item: part.numpy().astype(dtype) for item, part in zip(videos, parts)}
    if wrong := next((item for item, part in feats.items() if not np.isfinite(part).all()), None):
        raise ValueError(
            f"the features of {wrong} are not finite in {dtype}: check the encoder's weights, or the dtype"
        )
    return feats


def extract_features(
    folder: str | Path,
    output: str | Path,
    vision_encoder: str = "efficientnet-lite0",
    visual_encoder_output: str = "pooled",
    pad_to_square: bool = True,
    device: str | None = None,
    **options,
) -> tuple[int, int, list[str]]:
    """
    Extract features of the pictures and videos of a folder; in every process of a launcher, each its share.

    Args:
        folder: of pictures and videos, read with its sub-folders.
        output: folder of the shards.
        vision_encoder: hub id, folder, or efficientnet-lite0.
        visual_encoder_output: pooled, cls, mean, or projected (CLIP's).
        pad_to_square: False as CLIP was trained.
        device: of the tower; default: a GPU where there is one.
        options: of `extract`.

    Returns:
        How many items this process extracted, how many were there, and what was left out, with the reason.

    Raises:
        ValueError: as `find_media` and `extract`.
    """
    media, left_out = find_media(str(folder))
    PartialState(cpu=not torch.accelerator.is_available())  # else accelerate makes no group of CPU processes
    extractor = Extractor(vision_encoder, visual_encoder_output, pad_to_square, device)
    extracted, found, broken = extract(media, Path(output), extractor, **options)
    return extracted, found, left_out + broken
