"""Animated emoji from a folder as of unpacked packages; the real ones are `network`."""

import datasets
import pytest

from datasets_scripts import animated_emoji
from datasets_scripts.animated_emoji import CLIPS, AnimatedEmoji, fetch_clips
from datasets_scripts.reading.debian import FetchError
from tests.support.upstream_formats import greys, write_webp


NAMES = {
    "1f98a": ("fox", "cara de raposo"),
    "1f3a4": ("microphone", "micrófono"),
    "1f9d1-200d-1f3a4": ("singer", None),
    "1f44b-1f3fd": ("waving hand: medium skin tone", "man"),
}


def character(points: str) -> str:
    return "".join(chr(int(point, 16)) for point in points.split("-"))


@pytest.fixture
def packages(tmp_path):
    datasets.disable_progress_bars()
    root = tmp_path / "packages"
    for column, language in enumerate(("en", "gl")):
        named = {character(points): names[column] for points, names in NAMES.items() if names[column]}
        lines = "".join(f'<annotation cp="{cp}" type="tts">{name}</annotation>' for cp, name in named.items())
        file = root / f"usr/share/unicode/cldr/common/annotations/{language}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<ldml>{lines}</ldml>", encoding="utf-8")
    for i, points in enumerate(NAMES):
        write_webp(root / CLIPS / f"{points}.webp", 3 if i else 1)
    yield root
    datasets.enable_progress_bars()


def build(root, tmp_path):
    builder = AnimatedEmoji(config_name="gl", data_dir=root, cache_dir=tmp_path / "cache")
    builder.download_and_prepare()
    return [row for rows in builder.as_dataset().values() for row in rows]


def test_clips_have_names_and_frames(packages, tmp_path, capsys):
    rows = {row["image_id"]: row for row in build(packages, tmp_path)}
    assert sorted(rows) == ["animated/1F3A4", "still/1F98A"]
    out = capsys.readouterr().out
    assert "left out, skin tones: 1" in out and "left out, without a name in en or gl: 1" in out
    assert len(greys(rows["animated/1F3A4"]["video"])) == 3 and len(greys(rows["still/1F98A"]["video"])) == 1
    write_webp(packages / CLIPS / "1f98a.webp", 2)  # the state of the folder decides, not an earlier run
    assert {row["image_id"] for row in build(packages, tmp_path)} == {"animated/1F3A4", "animated/1F98A"}


def test_what_is_no_clip_is_named(packages, tmp_path):
    (packages / CLIPS / "smile.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"smile\.webp is no clip named by its code points"):
        build(packages, tmp_path)
    (packages / CLIPS).rename(packages / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has no package/assets: unpack `npm pack @lobehub"):
        build(packages, tmp_path)


def test_without_npm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(animated_emoji.shutil, "which", lambda name: None)
    with pytest.raises(FetchError, match=r"no npm to fetch @lobehub.*name the folder \(data_dir"):
        fetch_clips(tmp_path)


def test_another_file_of_the_registry_is_refused(tmp_path, monkeypatch):
    def pack(command, cwd, **kwargs):
        (type(tmp_path)(cwd) / "other.tgz").write_bytes(b"another file")
        return animated_emoji.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(animated_emoji.shutil, "which", lambda name: name)
    monkeypatch.setattr(animated_emoji.subprocess, "run", pack)
    with pytest.raises(FetchError, match="the registry gave another file"):
        fetch_clips(tmp_path / "cache")
    assert not list((tmp_path / "cache/npm").glob("@*"))


@pytest.mark.network
def test_the_real_clips():
    builder = AnimatedEmoji(config_name="gl")
    builder.download_and_prepare()
    sizes = {split: len(rows) for split, rows in builder.as_dataset().items()}
    assert sizes == {"train": 230, "validation": 32, "test": 88}
