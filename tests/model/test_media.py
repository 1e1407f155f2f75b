"""Pictures as files: damaged metadata, every kind that is read, sizes, and what a folder holds."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from modeling_nrccr import media
from modeling_nrccr.media import describe_others, is_clip, list_images, load_image, to_rgb, walk


FIXTURES = Path(__file__).parents[1] / "fixtures" / "media"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'


def picture(size=(40, 24)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    return Image.fromarray(noise).resize(size)


def encoded(format: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


# --------------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    "name, size",
    [
        ("exif_broken.jpg", (320, 200)),
        ("exif_zeros.jpg", (320, 200)),
        ("exif_broken.webp", (320, 200)),
        ("orient6_strtag.jpg", (200, 320)),
        ("rawprofile_broken.png", (320, 200)),
        ("textbomb.png", (320, 200)),
    ],
)
def test_damaged_metadata_cost_no_picture(name, size):
    image = load_image(FIXTURES / name)
    assert image.size == size and image.mode == "RGB"
    assert np.asarray(image).std() > 20  # not blank
    if size == (320, 200):
        assert np.abs(np.asarray(image)[5, 5].astype(int) - (135, 206, 235)).max() < 5  # its sky


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_metadata_of_any_bytes_leave_the_pixels_as_they_are(format):
    """What is written over: EXIF and XMP with all that is in them, and text."""
    if format == "HEIF":
        pytest.importorskip("pillow_heif", reason='needs pip install "modeling_nrccr[heic]"')
    exif = Image.Exif()
    exif[0x010F] = "Maker" * 9
    exif[0x0132] = "2020:01:01 00:00:00"
    exif.get_ifd(0x8825)[1] = "N"
    options = {"exif": exif if format == "TIFF" else exif.tobytes()} | ({"lossless": True} if format == "WEBP" else {})
    if format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("a", "".join(map(chr, range(32, 127))), zip=True)
        options |= {"pnginfo": text, "icc_profile": bytes(range(99))}
    content = encoded(format, **options)
    expected = np.asarray(load_image(content))
    assert np.abs(expected.astype(int) - np.asarray(picture())).mean() < 16
    # EXIF starts with the sign of its byte order; that of a TIFF is the file's own, with entries for these tags
    marks = {"PNG": [b"eXIf", b"zTXt", b"iCCP"], "TIFF": [b"\x0f\x01\x02\x00", b"\x32\x01\x02\x00"]}
    places = [content.index(mark) + (2 if format == "TIFF" else 4) for mark in marks.get(format, [b"\0\0MM\0*"])]
    random = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        at = int(random.choice(places))
        length = int(random.integers(1, 10 if format == "TIFF" else 50))
        damaged[at : at + length] = random.integers(0, 256, length, np.uint8).tobytes()
        found = np.asarray(load_image(bytes(damaged)))
        turned = [np.rot90(found, k) for k in range(4)]  # a tag may now say so
        if format != "TIFF":
            turned += [part[:, ::-1] for part in turned]
        assert any(np.array_equal(part, expected) for part in turned)


def test_chunks_with_a_wrong_checksum_and_too_much_text_are_passed_over():
    content = encoded("PNG", Image.new("RGB", (4, 4)), transparency=(0, 0, 0))
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))
    for extra in (chunk(b"tEXt", b"a\0b", 1), bomb, *[bomb * 40], chunk(b"tIME", b"x"), chunk(b"iCCP", b"a\0\0bad")):
        for at in (33, len(content) - 12):  # before the pixels, and after
            assert load_image(content[:at] + extra + content[at:]).getpixel((0, 0)) == (255, 255, 255)  # transparent


def test_the_orientation_is_read_from_exif_or_xmp_and_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (
        encoded("JPEG", exif=exif),
        encoded("TIFF", exif=exif),
        encoded("PNG", exif=exif),
        encoded("WEBP", exif=exif),
        encoded("AVIF", exif=exif),
        encoded("JPEG", xmp=XMP),
        encoded("WEBP", xmp=XMP),
    ):
        turned = load_image(content)
        assert turned.size == (24, 40) and to_rgb(turned).size == (24, 40)
        expected = np.rot90(np.asarray(picture()), -1).astype(int)
        assert np.abs(np.asarray(turned) - expected).mean() < 12


def test_truncated_pixels_are_errors():
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        content = encoded(format, picture((200, 100)))
        with pytest.raises((OSError, ValueError, SyntaxError)):
            load_image(content[: len(content) * 2 // 3])


# ------------------------------------------------------------------------------------------------------------ kinds


def test_content_decides_not_the_suffix(tmp_path):
    (tmp_path / "a.jpg").write_bytes((FIXTURES / "ref.avif").read_bytes())
    assert load_image(tmp_path / "a.jpg").size == (320, 200)
    for format in ("JPEG2000", "PPM", "TIFF", "GIF", "BMP"):
        assert load_image(encoded(format)).size == (40, 24)
    both = picture()
    stereo = encoded("MPO", save_all=True, append_images=[both])
    assert load_image(stereo).size == (40, 24)
    table = stereo.index(b"MPF\0")
    assert load_image(stereo[: table + 8] + b"\xff" * 20 + stereo[table + 28 :]).size == (40, 24)
    for content in (b"", b"\xff\xd8", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"text" * 9):
        with pytest.raises(UnidentifiedImageError, match="cannot identify image file in memory"):
            load_image(content)


def test_what_moves_is_a_video_whatever_its_name(tmp_path):
    frames = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(3)]
    several = {"save_all": True, "append_images": frames[1:]}
    expected = {}
    for format in ("WEBP", "GIF", "PNG", "AVIF", "TIFF", "MPO"):
        suffix = format.lower()
        (tmp_path / f"moving.{suffix}").write_bytes(encoded(format, frames[0], **several))
        (tmp_path / f"still.{suffix}").write_bytes(encoded(format, frames[0]))
        expected |= {f"moving.{suffix}": format not in ("TIFF", "MPO"), f"still.{suffix}": False}
    (tmp_path / "photo.mp4").write_bytes(encoded("JPEG"))
    (tmp_path / "clip.gif").write_bytes((FIXTURES / "hflip.mp4").read_bytes())
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video")
    expected |= {"photo.mp4": False, "clip.gif": True, "text.jpg": False, "text.mp4": True}
    assert {name: is_clip(tmp_path / name) for name in expected} == expected


def test_heic_is_read_or_its_remedy_named(tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif", reason='needs pip install "modeling_nrccr[heic]"')
    content = encoded("HEIF", picture((64, 48)))
    (tmp_path / "phone.jpg").write_bytes(content)
    (tmp_path / "a.heic").write_bytes(content)
    (tmp_path / "b.xyz").write_text("")
    assert load_image(tmp_path / "phone.jpg").size == (64, 48) and len(list_images(tmp_path)) == 2
    # as where it is not installed
    monkeypatch.setattr(media, "pillow_heif", None)
    monkeypatch.setattr(media, "IMAGE_FORMATS", tuple(name for name in media.IMAGE_FORMATS if name != "HEIF"))
    found = walk(tmp_path, (".jpg", ".png"))
    assert found.files == [tmp_path / "phone.jpg"]
    assert describe_others(found.others) == (
        '2 of kinds that are not read (.heic 1: pip install "modeling_nrccr[heic]", .xyz 1)'
    )
    with pytest.raises(UnidentifiedImageError, match="phone.jpg' is HEIC, which is not read here: pip install"):
        load_image(tmp_path / "phone.jpg")


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.full((9, 9), 0.2, np.float32), 51),
        (np.where(np.arange(81).reshape(9, 9) < 2, 40.0, 0.2).astype(np.float32), 51),  # a lamp, brighter than white
        (np.where(np.arange(81).reshape(9, 9) < 2, np.nan, 0.2).astype(np.float32), 51),
        (np.full((9, 9), 51, np.float32), 51),
        (np.full((9, 9), 13107, np.uint16), 51),
        (np.where(np.arange(81).reshape(9, 9) < 2, 2**31 - 1, 2**31 // 5).astype(np.int32), 51),
    ],
)
def test_16_bit_and_float_files(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif").getpixel((8, 8)) == (expected,) * 3
    if values.dtype == np.uint16:
        Image.fromarray(values).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").getpixel((8, 8)) == (expected,) * 3


# ------------------------------------------------------------------------------------------------------------ sizes


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header says so; the pixels end early."""
    at = max(jpeg.find(marker) for marker in (b"\xff\xc0\x00", b"\xff\xc2\x00"))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def test_photographs_are_read_at_a_fraction_and_bombs_refused():
    photograph = with_size(encoded("JPEG"), 16320, 12240)
    assert load_image(photograph).size == (2048, 1536)
    with pytest.raises(Image.DecompressionBombError, match="199,756,800 pixels, more than the 50,000,000 allowed"):
        load_image(photograph, max_pixels=50_000_000)
    png = encoded("PNG")
    png = png[:8] + chunk(b"IHDR", struct.pack(">II", 12000, 9000) + png[24:29]) + png[33:]
    with pytest.raises(Image.DecompressionBombError, match="108,000,000 pixels, which take 1.3 GB"):
        load_image(png)
    # a progressive one is kept in full before it is made smaller, and so is one whose components come one by one
    whole = encoded("JPEG", progressive=True)
    assert load_image(with_size(whole, 12000, 9000)).size == (2048, 1536)
    with pytest.raises(Image.DecompressionBombError, match="3,600,000,000 pixels"):
        load_image(with_size(whole, 60000, 60000))
    by_component = encoded("JPEG")
    at = by_component.index(b"\xff\xda")
    one = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + by_component[at + 14 :]
    with pytest.raises(Image.DecompressionBombError):
        load_image(with_size(by_component[:at] + one, 60000, 60000))
    Image.new("L", (3000, 30)).save(buffer := io.BytesIO(), "PNG")
    assert load_image(buffer).size == (2048, 20) and not buffer.closed


# --------------------------------------------------------------------------------------------------------- a folder


def test_a_walk_says_what_it_leaves_out(tmp_path):
    gallery, elsewhere = tmp_path / "gallery", tmp_path / "elsewhere"
    for folder in (gallery / "a" / "b", gallery / ".git", elsewhere / "deep"):
        folder.mkdir(parents=True)
    for name in ("gallery/a/b/1.png", "gallery/.git/2.png", "elsewhere/3.JPG", "elsewhere/deep/4.jfif"):
        (tmp_path / name).touch()
    for name in ("._1.png", ".DS_Store", "a.raw", "b.RAW", "c.xcf", "README"):
        (gallery / name).touch()
    (gallery / "link").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(gallery)
    (gallery / "again").symlink_to(gallery / "a")
    (gallery / "twice").symlink_to(elsewhere / "deep")
    (gallery / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(gallery / "pipe.png")
    Path(os.fsdecode(os.fsencode(gallery) + b"/caf\xe9.png")).touch()

    found = walk(gallery)
    assert [path.relative_to(gallery).as_posix() for path in found.files] == [
        "a/b/1.png",
        "link/3.JPG",
        "link/deep/4.jfif",
    ]
    assert found.others == {".raw": 2, ".xcf": 1, "without a suffix": 1}
    assert describe_others(found.others).startswith("4 of kinds that are not read (.raw 2, ")
    reasons = dict(found.left_out)
    assert reasons.keys() == {"again", "twice", "link/deep/back", "gone.png", "pipe.png", "caf\\xe9.png"}
    assert "not UTF-8" in reasons["caf\\xe9.png"] and "broken link" in reasons["gone.png"]
    assert "no regular file" in reasons["pipe.png"] and "its own place" in reasons["again"]


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
        for read in (load_image, is_clip):
            with pytest.raises(ValueError, match=f"{path} is no regular file"):
                read(path)


def test_without_a_picture_the_error_says_what_there_is(tmp_path):
    (tmp_path / "a.raw").touch()
    with pytest.raises(
        ValueError, match=r"No pictures under .*\.png, .*it holds 1 of kinds that are not read \(\.raw 1\)"
    ):
        list_images(tmp_path)
    assert media.IMAGE_SUFFIXES == tuple(sorted(media.IMAGE_SUFFIXES))
    assert {".avif", ".jfif", ".jpe", ".jpg", ".webp", ".tiff"} <= set(media.IMAGE_SUFFIXES)
    assert not {".eps", ".mp4", ".pdf", ".mpg"} & set(media.IMAGE_SUFFIXES)
