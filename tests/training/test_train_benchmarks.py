"""`examples/train.py` on each benchmark, from files in upstream's formats to the metrics, with the paper's recipes."""

import json

import numpy as np
import pytest
from PIL import Image

from modeling_nrccr.retrieval.evaluation import evaluate
from modeling_nrccr.training import run as train
from modeling_nrccr.training.extract_features import extract_features
from tests.support.upstream_formats import write_binary_features, write_lines, write_webp
from tests.training.test_recipes import RECIPES, WORDS, encoders  # noqa: F401


CAPTIONS = 2  # of an item
WITHOUT_CYCLE = "triplet=1,target_triplet=0.6,distillation=0.4,feature_distillation=0.1,adversarial=0.001"
FROZEN = "triplet=1,target_triplet=0.6,distillation=0.4,feature_distillation=0.1,back_translation=0.5"
SPLITS = {"train": 12, "val": 5, "test": 6}


def write_captions(folder, collection: str, language: str, item_name="{}{}") -> list[str]:
    """Caption files of the released layout, in words that the tiny encoder knows."""
    items = {split: [item_name.format(split, i) for i in range(count)] for split, count in SPLITS.items()}
    tags = {"train": {"": "enc"}, "val": {f"_{language}": language}, "test": {f"_{language}": language}}
    tags["train"] |= {f"_google_{tag}": tag for tag in (f"enc2{language}", f"enc2{language}2enc")}
    for split in ("val", "test"):
        tags[split] |= {"": "enc", f"_google_{language}2enc": f"{language}2enc"}
    generator = np.random.default_rng(0)
    for split, kinds in tags.items():
        for suffix, tag in kinds.items():
            ids = [f"{item}#{tag}#{k}" for item in items[split] for k in range(CAPTIONS)]
            lines = [f"{name} {' '.join(generator.choice(WORDS, 3))}" for name in ids]
            write_lines(folder / f"TextData/{collection}{split}{suffix}.caption.txt", lines)
    return [item for of_split in items.values() for item in of_split]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run(recipe: str, folder, encoders, **flags) -> dict:  # noqa: F811
    flags = {
        "recipe": RECIPES[recipe],
        "data_dir": folder,
        "text_encoder": encoders / "text",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "text_hidden_size": 24,
        "key_query_size": 16,
        "text_num_attention_heads": 4,
        "visual_num_attention_heads": 4,
        "projection_dim": 8,
        "output_dir": folder / "out",
        "disable_tqdm": True,
    } | flags
    train.train_recipe(**flags)
    return json.loads((folder / "out/metrics.json").read_text())


@pytest.mark.parametrize("name, collection", [("vatex", "vatex"), ("msrvtt_cn", "msrvtt10kcn")])
def test_video_features_with_the_papers_recipe(tmp_path, encoders, name, collection):  # noqa: F811
    items = write_captions(tmp_path, collection, "zh")
    write_binary_features(tmp_path / "FeatureData/i3d", {item: 1 + i % 4 for i, item in enumerate(items)}, dim=10)
    report = run(name, tmp_path, encoders, visual_feat_dim=10, visual_hidden_size=16)
    assert report["settings"]["translator"] == "google" and report["settings"]["media"] == "visual_feats"
    assert report["settings"]["pictures"] == {"train": 12, "validation": 5, "test": 6}
    assert "visual_feats=[torch.zeros(4, 10)]" in (tmp_path / "out/README.md").read_text()
    assert 0 <= report["test"]["t2v_recall@1"] <= report["test"]["t2v_recall@10"] == 100 and "test_fused" in report


def test_pictures_with_the_papers_recipe(tmp_path, encoders):  # noqa: F811
    for i, item in enumerate(write_captions(tmp_path, "mscoco", "ja", "COCO_{}2014_{:012}")):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (9 * i, 99, 250 - 9 * i)).save(tmp_path / f"images/{item}.png")
    report = run("mscoco", tmp_path, encoders, vision_encoder=encoders / "vision", language="ja")
    assert report["settings"]["media"] == "image" and report["settings"]["language"] == "ja"


@pytest.mark.parametrize("cached", [True, False])
def test_videos_as_pixels(tmp_path, encoders, cached):  # noqa: F811
    for i, item in enumerate(write_captions(tmp_path, "vatex", "zh")):
        write_webp(tmp_path / f"videos/{item}.webp", 1 + i % 5)
    flags = {
        "vision_encoder": encoders / "vision",
        "visual_encoder_output": "projected",
        "visual_feat_dim": 512,
        "num_frames": 3,
        "visual_hidden_size": 16,
        "search_page": "all",
    }
    if cached:  # both encoders frozen, their outputs computed once; the recipe trains layers and pools padding
        flags |= {"trained_text_layers": 0, "frozen_dropout": False, "losses": FROZEN}
        flags |= {"pool_padding": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "find_font", lambda data_dir: None)
        report = run("vatex", tmp_path, encoders, **flags)
    assert report["settings"]["media"] == "video" and (tmp_path / "out/search.png").exists()
    assert "videos=[[Image.new" in (tmp_path / "out/README.md").read_text()
    if cached:  # what it wrote gives the same numbers, from videos and from features of the same frames
        tower = {"vision_encoder": str(encoders / "vision"), "visual_encoder_output": "projected"}
        for features in ("none", "clip"):
            options = {
                "data_dir": str(tmp_path),
                "query_languages": ["zh"],
                "num_frames": 3,
                "visual_feature": features,
            }
            assert evaluate(str(tmp_path / "out"), "vatex", **options).report["test"] == pytest.approx(report["test"])
            if not (tmp_path / "FeatureData").exists():
                extract_features(tmp_path / "videos", tmp_path / "FeatureData/clip", num_frames=3, **tower)


def test_human_captions_need_no_engine_and_no_fusion(tmp_path, encoders):  # noqa: F811
    items = write_captions(tmp_path, "vatex", "zh")
    write_binary_features(tmp_path / "FeatureData/i3d", dict.fromkeys(items, 2), dim=10)
    text = tmp_path / "TextData"
    (text / "vatextrain_zh.caption.txt").write_text(
        (text / "vatextrain.caption.txt").read_text().replace("#enc#", "#zh#")
    )
    for name in ("train_google_enc2zh", "train_google_enc2zh2enc", "val_google_zh2enc", "test_google_zh2enc"):
        (text / f"vatex{name}.caption.txt").unlink()
    flags = {"visual_feat_dim": 10, "visual_hidden_size": 16, "target_captions": "human", "losses": WITHOUT_CYCLE}
    report = run("vatex", tmp_path, encoders, translator="none", eval_translation_weight=0, **flags)
    assert report["settings"]["translator"] == "human" and "test_fused" not in report
    with pytest.raises(ValueError, match="the paper used Google's translations, .* name one with --translator"):
        run("vatex", tmp_path, encoders, **flags)


def test_what_is_missing_is_said(tmp_path, encoders):  # noqa: F811
    write_captions(tmp_path, "vatex", "zh")
    with pytest.raises(ValueError, match="vatex, train: rows without video; put .*, videos into `videos`"):
        run("vatex", tmp_path, encoders, visual_feat_dim=10)
