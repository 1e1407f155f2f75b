"""Frames of real, small, long, broken and hostile videos."""

import builtins
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_scripts.reading.videos import VIDEO_SUFFIXES, read_frames
from modeling_nrccr.media import to_rgb
from tests.support.upstream_formats import colours, greys, write_video, write_webp


av = pytest.importorskip("av", reason='needs PyAV: pip install "modeling_nrccr[video]"')

FIXTURES = Path(__file__).parents[1] / "fixtures" / "media"


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.mkv", "mpeg4")])
def test_frames_are_sampled_uniformly(tmp_path, name, codec):
    video = write_video(tmp_path / name, 50, codec=codec)
    assert greys(video, num_frames=5) == pytest.approx([255 * i / 49 for i in (5, 15, 25, 35, 45)], abs=6)
    assert greys(video.read_bytes(), num_frames=1) == pytest.approx([255 * 25 / 49], abs=6)
    assert len(greys({"path": str(video), "bytes": None}, num_frames=60)) == 50


def test_animated_webp_and_still_pictures(tmp_path):
    clip = write_webp(tmp_path / "a.webp", 11)
    assert greys(clip, num_frames=3) == [255 * i // 10 for i in (1, 5, 9)]
    (frame,) = read_frames(write_webp(tmp_path / "b.webp", 1))
    assert frame.size == (32, 24)
    frame.convert("RGB").save(tmp_path / "c.jpg")
    assert len(read_frames(tmp_path / "c.jpg")) == 1


@pytest.mark.parametrize("limit, what", [({"max_frames": 9}, "frames"), ({"max_pixels": 700}, "pixels a frame")])
def test_limits(tmp_path, limit, what):
    for file in (write_video(tmp_path / "a.mp4", 10), write_webp(tmp_path / "a.webp", 10)):
        assert len(read_frames(file)) == 8
        with pytest.raises(ValueError, match=rf"a\.\w+ has .* {what}, more than .* allowed: .*{next(iter(limit))}"):
            read_frames(file, **limit)
    with pytest.raises(ValueError, match="0.4 seconds, more than the 0.2 allowed"):
        read_frames(tmp_path / "a.mp4", max_seconds=0.2)


def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path):
    """`hflip.mp4` has its yellow square on the right; by other matrices it stands elsewhere."""
    content, one = (FIXTURES / "hflip.mp4").read_bytes(), 1 << 16
    at = content.index(b"tkhd") + 44
    corners = {
        (-one, 0, 0, one): (1, 0),
        (one, 0, 0, one): (0, 0),
        (one, 0, 0, -one): (0, 1),
        (-one, 0, 0, -one): (1, 1),
        (0, one, one, 0): (0, 0),
        (0, -one, -one, 0): (1, 1),
        (0, one, -one, 0): (1, 0),
        (0, -one, one, 0): (0, 1),
    }
    for (a, b, c, d), (right, low) in corners.items():
        matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        (tmp_path / "a.mp4").write_bytes(content[:at] + matrix + content[at + 36 :])
        frame = read_frames(tmp_path / "a.mp4", num_frames=1)[0]
        assert frame.size == ((160, 96) if a else (96, 160))
        blue = [
            (x, y)
            for x in (0, 1)
            for y in (0, 1)
            if frame.getpixel((10 + x * (frame.width - 21), 10 + y * (frame.height - 21)))[2] < 60
        ]
        assert blue == [(right, low)], (a, b, c, d)


def test_a_variable_rate_is_not_a_truncated_file(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for i, image in enumerate(colours(30)):
            frame = av.VideoFrame.from_image(image)
            frame.pts = 40 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.avi")) as container:
        assert container.streams.video[0].frames > 1000  # ticks
    assert len(read_frames(tmp_path / "a.avi", num_frames=40)) == 30
    content = write_video(tmp_path / "b.avi", 50).read_bytes()
    (tmp_path / "b.avi").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"b\.avi cannot be decoded"):
        read_frames(tmp_path / "b.avi")


@pytest.mark.parametrize("name, codec", [("a.3gp", "mpeg4"), ("a.mts", "mpeg2video"), ("a.flv", "flv")])
def test_other_kinds_of_videos(tmp_path, name, codec):
    assert Path(name).suffix in VIDEO_SUFFIXES
    video = write_video(tmp_path / name, 9, (176, 144), codec)
    assert len(read_frames(video)) == 8


def test_still_pictures_have_no_limits_of_videos(tmp_path):
    Image.fromarray(np.full((40, 50), 13107, np.uint16)).save(tmp_path / "a.png")
    (frame,) = read_frames(tmp_path / "a.png", max_pixels=100)
    assert to_rgb(frame).getpixel((0, 0)) == (51, 51, 51)
    (frame,) = read_frames(FIXTURES / "ref.avif")
    assert frame.size == (320, 200)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=r"pipe\.mp4 is no regular file"):
        read_frames(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=r"svg\.mp4 cannot be decoded .*it is .*svg.*no decoder"):
        read_frames(FIXTURES / "svg.mp4")


def test_what_is_no_video_names_the_file(tmp_path):
    whole = write_video(tmp_path / "a.mp4", 30).read_bytes()
    clip = write_webp(tmp_path / "a.webp", 10).read_bytes()
    broken = {
        "half.mp4": whole[: len(whole) // 2],
        "empty.mp4": b"",
        "text.mp4": b"no video" * 99,
        "half.webp": clip[: len(clip) // 2],
        "head.webp": clip[:30],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be decoded"):
            read_frames(tmp_path / name)
    with pytest.raises(ValueError, match=r"none\.mp4 cannot be opened: No such file"):
        read_frames(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="num_frames must be at least 1"):
        read_frames(tmp_path / "a.mp4", num_frames=0)


def test_a_video_without_frames(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="stereo", samples=1024)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"sound\.mkv cannot be decoded .*no video stream"):
        read_frames(tmp_path / "sound.mkv")
    # frames that the container counts, but does not hold
    data = write_video(tmp_path / "a.avi", 20).read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: data.index(b"movi") + 4 + 300])
    with pytest.raises(ValueError, match=r"cut\.avi (cannot be decoded|has no video frames)"):
        read_frames(tmp_path / "cut.avi")


def test_playlists_are_not_followed(tmp_path):
    write_video(tmp_path / "a.mp4", 3)
    for target in ("a.mp4", str(tmp_path / "a.mp4"), f"file://{tmp_path}/a.mp4"):
        (tmp_path / "list.m3u8").write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n"
        )
        (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile '{target}'\n")
        for name in ("list.m3u8", "list.txt"):
            with pytest.raises(ValueError, match=f"{name} cannot be decoded"):
                read_frames(tmp_path / name)


def test_without_pyav_the_message_says_what_to_install(tmp_path, monkeypatch):
    def no_av(name, *args, real=builtins.__import__, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    video, clip = write_video(tmp_path / "a.mp4", 3), write_webp(tmp_path / "a.webp", 3)
    monkeypatch.setattr(builtins, "__import__", no_av)
    assert len(read_frames(clip)) == 3
    with pytest.raises(ImportError, match=r"PyAV is needed to read .*a\.mp4: `pip install"):
        read_frames(Path(video))


@pytest.mark.network
def test_real_clips():
    """Of the PyPI wheel of gradio, which is downloaded and not installed."""
    from modeling_nrccr.loading.wheels import fetch_wheel, read_member

    wheel = fetch_wheel("gradio==6.31.0", "7b50b9b6a2d23cd02851ad4c8b1c8312c88d8b911d1f29c93f9761c98348a64a")
    sizes = {"a.mp4": (1920, 1080), "b.mp4": (480, 270), "b.avi": (480, 270), "world.mp4": (480, 270)}
    for name, size in sizes.items():
        video = read_member(wheel, f"gradio/media_assets/videos/{name}")
        frames = read_frames(video, num_frames=8)
        assert [frame.size for frame in frames] == [size] * 8, name
        assert len({frame.tobytes() for frame in frames}) == 8, name
    one, other = (greys(read_member(wheel, f"gradio/media_assets/videos/b.{end}")) for end in ("mp4", "avi"))
    assert one == pytest.approx(other, abs=4)  # the same clip in two containers and codecs
