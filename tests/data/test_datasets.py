"""Builders, group-wise splits, fetching Debian packages: small made-up packages here, the real ones as `network`."""

import collections
import concurrent.futures
import io
import itertools
import os
import re
import sys

import datasets
import pytest
from PIL import Image

from datasets_scripts import cldr_emoji
from datasets_scripts.cldr_emoji import CldrEmoji
from datasets_scripts.reading import debian
from datasets_scripts.reading.splits import DEFAULT_FRACTIONS, group_key, split_of
from datasets_scripts.tuxpaint import Tuxpaint, read_captions


STAMPS = {
    "animals/fox": "A fox.\ngl.utf8=Un raposo.\neo.utf8=Vulpo.\npt_BR.utf8=Uma raposa.\n",
    "animals/cat": "A cat.\ngl.utf8=Un gato.\nca.utf8=Un gat.\n",
    "people/fireman": "A fireman.\ngl.utf8=Un bombeiro.\nca.utf8=Un bomber.\n",
    "symbols/a": "The letter a.\ngl.utf8=A letra a.\n",
}
EMOJI = {
    "🦊": ("fox", "cara de raposo", ""),
    "🎤": ("microphone", "micrófono", ""),
    "🧑‍🎤": ("singer", "cantante", "Derived"),
    "👨‍🎤": ("man singer", "cantante home", "Derived"),
    "👩‍🎤": ("woman singer", None, "Derived"),
    "👨‍🚒": ("man firefighter", "bombeiro", "Derived"),
    "👋🏽": ("waving hand: medium skin tone", "man saudando: ton de pel medio", "Derived"),
    "🇬🇧": ("flag: United Kingdom", "bandeira: Reino Unido", "Derived"),
    "*": ("asterisk", "asterisco", ""),
    "⁂": ("asterism", "asterismo", ""),
}

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder as of unpacked packages: four stamps, ten emoji; the font is a stand-in that lacks ⁂."""
    root = tmp_path / "packages"
    for name, text in STAMPS.items():
        file = root / "usr/share/tuxpaint/stamps" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        Image.new("P" if "cat" in name else "RGBA", (7, 5), 1).save(file.with_suffix(".png"))
    for folder in ("annotations", "annotationsDerived"):
        for column, language in enumerate(("en", "gl")):
            lines = "".join(
                f'<annotation cp="{emoji}"/><annotation cp="{emoji}" type="tts">{row[column]}</annotation>'
                for emoji, row in EMOJI.items()
                if "annotations" + row[2] == folder and row[column]
            )
            file = root / f"usr/share/unicode/cldr/common/{folder}/{language}.xml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"<ldml><annotations>{lines}</annotations></ldml>", encoding="utf-8")
    font = root / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    font.parent.mkdir(parents=True)
    font.touch()
    monkeypatch.setattr(cldr_emoji, "enable_raqm", lambda data_dir: None)
    monkeypatch.setattr(cldr_emoji, "load_font", lambda path: None)
    picture = Image.new("RGBA", (6, 4), (9, 8, 7, 100))
    monkeypatch.setattr(cldr_emoji, "draw_emoji", lambda emoji, font: None if emoji == "⁂" else picture)
    return root


def build(builder, root, tmp_path, language="gl", **kwargs):
    made = builder(config_name=language, data_dir=root, cache_dir=tmp_path / "cache", **kwargs)
    made.download_and_prepare()
    return made.as_dataset()


def rows_by_id(dataset):
    return {row["image_id"]: {**row, "split": split} for split in dataset for row in dataset[split]}


def test_read_captions(tmp_path):
    file = tmp_path / "cat.txt"
    file.write_text(
        "\ufeffA  cat. \r\ngl.utf8= Un gato.\r\npt_BR.utf8=Gato\r\nes.utf8=\r\nnonsense\r\n", encoding="utf-8"
    )
    assert read_captions(file) == ("A cat.", {"gl": "Un gato.", "pt-BR": "Gato"})
    file.write_bytes(b"A cat.\ngl.utf8=caf\xe9\n")
    with pytest.raises(ValueError, match=r"cat\.txt is not UTF-8"):
        read_captions(file)


def test_tuxpaint(packages, tmp_path, capsys):
    rows = rows_by_id(build(Tuxpaint, packages, tmp_path))
    assert sorted(rows) == ["stamps/animals/cat", "stamps/animals/fox", "stamps/people/fireman"]  # no symbols
    assert all(row["caption_id"] == f"{image_id}#0" for image_id, row in rows.items())
    assert {row["image"].mode for row in rows.values()} == {"RGBA"}
    assert "3 pictures in 3 groups" in capsys.readouterr().out
    assert list(rows_by_id(build(Tuxpaint, packages, tmp_path, "eo"))) == ["stamps/animals/fox"]
    assert "left out, without a caption in eo: 2" in capsys.readouterr().out


def test_cldr_emoji(packages, tmp_path, capsys):
    rows = rows_by_id(build(CldrEmoji, packages, tmp_path))
    expected = [
        "emoji/1F3A4",
        "emoji/1F468-200D-1F3A4",
        "emoji/1F468-200D-1F692",
        "emoji/1F98A",
        "emoji/1F9D1-200D-1F3A4",
    ]
    assert sorted(rows) == expected
    assert {row["image"].getpixel((0, 0)) for row in rows.values()} == {(9, 8, 7, 100)}  # transparency is kept
    out = capsys.readouterr().out
    for reason in (
        "skin tones",
        "flags of places",
        "keycaps, components, ASCII",
        "not in the font",
        "without a name in gl",
    ):
        assert f"left out, {reason}: 1" in out


def test_names_are_found_with_and_without_variation_selector():
    assert cldr_emoji.find_name({"❤": "heart"}, "❤\ufe0f") == "heart"
    assert cldr_emoji.find_name({"❤\ufe0f": "red heart", "❤": "heart"}, "❤\ufe0f") == "red heart"
    assert cldr_emoji.find_name({"❤": "heart"}, "💙") is None


def test_inherited_names_are_no_names(tmp_path):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/pt_PT.xml"
    file.write_text(
        '<a><annotation cp="x" type="tts">↑↑↑</annotation><annotation cp="y" type="tts"> z </annotation></a>'
    )
    assert cldr_emoji.read_names(file.parent, "pt-PT") == {"y": "z"}
    file.write_text("<a><annotation")
    with pytest.raises(ValueError, match=r"pt_PT\.xml is not readable as XML"):
        cldr_emoji.read_names(file.parent, "pt-PT")


def test_translated_never_holds_human_translations_where_machine_ones_belong(packages, tmp_path):
    seen = set()
    for builder, seed in itertools.product((Tuxpaint, CldrEmoji), (6, 9)):
        human = rows_by_id(build(builder, packages, tmp_path, seed=seed, target="human"))
        for image_id, row in rows_by_id(build(builder, packages, tmp_path, seed=seed)).items():
            seen.add(row["split"])
            both = human[image_id]
            assert both["split"] == row["split"] and both["source_caption"] and both["target_caption"]
            if row["split"] == "train":
                assert row["source_caption"] == both["source_caption"]
                assert row["target_caption"] is None and row["target_origin"] is None
                assert row["reference_source_caption"] is None
            else:
                assert row["source_caption"] is None
                assert row["target_caption"] == both["target_caption"] and row["target_origin"] == "human"
                assert row["reference_source_caption"] == both["source_caption"]
            assert row["back_translation"] is None
            assert (row["source_language"], row["target_language"]) == ("en", "gl")
    assert seen == {"train", "validation", "test"}


def test_builders_can_be_joined(packages, tmp_path):
    stamps, emoji = (build(builder, packages, tmp_path) for builder in (Tuxpaint, CldrEmoji))
    assert stamps["train"].features == emoji["train"].features
    for split in ("train", "validation", "test"):  # an empty split is a split
        joined = datasets.concatenate_datasets([stamps[split], emoji[split]])
        assert len(joined) == len(stamps[split]) + len(emoji[split])


def test_changed_data_is_built_again(packages, tmp_path):
    assert len(rows_by_id(build(Tuxpaint, packages, tmp_path))) == 3
    stamps = packages / "usr/share/tuxpaint/stamps/animals"
    (stamps / "dog.txt").write_text("A dog.\ngl.utf8=Un can.\n")
    Image.new("RGB", (3, 3)).save(stamps / "dog.png")
    assert len(rows_by_id(build(Tuxpaint, packages, tmp_path))) == 4


def test_bad_input_is_named(packages, tmp_path):
    with pytest.raises(ValueError, match=r"'xx' not found. Available: \['gl', 'ca', 'es'"):
        Tuxpaint(config_name="xx", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="target must be one of translated, human, got 'humn'"):
        Tuxpaint(config_name="gl", target="humn", data_dir=packages, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"no 'cs' captions; it has: ca, eo, gl, pt-BR"):
        build(Tuxpaint, packages, tmp_path, "cs")
    with pytest.raises(ValueError, match=r"no 'cs' captions; it has: en, gl"):
        build(CldrEmoji, packages, tmp_path, "cs")
    with pytest.raises(FileNotFoundError, match="does not hold usr/share/tuxpaint/stamps.*tuxpaint-stamps-default"):
        build(Tuxpaint, tmp_path / "cache", tmp_path)
    picture = packages / "usr/share/tuxpaint/stamps/animals/cat.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"animals/cat\.png is not a readable picture .*remove it"):
        build(Tuxpaint, packages, tmp_path)


@pytest.mark.parametrize(
    "variants",
    [
        ["singer", "man singer", "Woman Singer"],
        ["health worker", "man health worker", "woman health worker"],
        ["person", "man", "woman", "boy", "girl", "child", "man: red hair", "person: beard", "woman: bald"],
        ["people holding hands", "woman and man holding hands", "women holding hands", "men holding hands"],
        ["family", "family: man, woman, boy", "family: adult, child"],
        ["merperson", "merman", "mermaid", "A mermaid."],
        ["prince", "princess", "person with crown"],
        ["Santa Claus", "Mrs. Claus", "mx claus"],
        ["older person", "old man", "old woman"],
        ["firefighter", "man firefighter", "A fireman."],
        ["man walking", "person walking facing right"],
        ["men’s room", "women's room"],
        ["fox", "A fox.", "The  FOX!"],
    ],
)
def test_variants_share_a_group(variants):
    assert len({group_key(variant) for variant in variants}) == 1


def test_different_things_do_not_share_a_group():
    captions = ["cat", "black cat", "snowman", "man", "kiss", "kiss mark", "…", "☺", "red heart", "human", "boot"]
    assert len({group_key(caption) for caption in captions}) == len(captions)
    assert all(group_key(caption) for caption in captions)


def test_splits_depend_on_seed_and_group_alone():
    groups = [f"group {index}" for index in range(4000)]
    first = [split_of(group, 0) for group in groups]
    assert [split_of(group, 0) for group in groups] == first
    of_groups = [split_of(f"group {index}", 0) for index in (2, 3, 7)]
    assert of_groups == ["train", "test", "validation"]  # the same in every process
    changed = sum(split_of(group, 1) != split for group, split in zip(groups, first)) / len(groups)
    assert 0.4 < changed < 0.6  # 1 - (0.65² + 0.10² + 0.25²) = 0.505
    shares = collections.Counter(first)
    for split, fraction in DEFAULT_FRACTIONS.items():
        assert abs(shares[split] / len(groups) - fraction) < 0.03
    with pytest.raises(ValueError, match="leave something for train"):
        split_of("x", 0, {"test": 0.6, "validation": 0.4})


def straddling(*builds):
    """Variants on two sides, found without `group_key`: equal captions; emoji alike but for gender and hair."""
    splits = collections.defaultdict(set)
    for dataset in builds:
        for image_id, row in rows_by_id(dataset.remove_columns("image")).items():
            splits[(row["source_caption"] or row["reference_source_caption"]).casefold()].add(row["split"])
            kind, _, sequence = image_id.partition("/")
            if kind == "emoji":
                neutral = re.sub(r"1F46[89]|1F9D1", "PERSON", sequence)
                neutral = re.sub(r"-200D-(2640|2642|1F9B[0-3])\b", "", neutral)
                splits[neutral].add(row["split"])
    return [variants for variants, of_variants in splits.items() if len(of_variants) > 1]


def test_variants_and_equal_captions_are_on_one_side_across_builders(packages, tmp_path):
    for seed in range(6):
        builds = [build(builder, packages, tmp_path, seed=seed) for builder in (Tuxpaint, CldrEmoji)]
        assert not straddling(*builds)
        splits = {image_id: row["split"] for dataset in builds for image_id, row in rows_by_id(dataset).items()}
        assert splits["stamps/animals/fox"] == splits["emoji/1F98A"]  # "A fox.", "fox"
        assert splits["stamps/people/fireman"] == splits["emoji/1F468-200D-1F692"]


@pytest.fixture
def fake_apt(tmp_path, monkeypatch):
    """apt-get, apt-cache and dpkg-deb that write down what they are asked, on a PATH with nothing else."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    scripts = {
        "apt-get": """
if "download" in sys.argv:
    for name in sys.argv[sys.argv.index("download") + 1:]:
        if name == "missing": sys.exit("E: Unable to locate package missing")
        open(f"{name}_1.0_all.deb", "w").write(name)
""",
        "apt-cache": """
print("engine\\n  Depends: libengine1\\n |Depends: first\\n  Depends: second\\n  Depends: <virtual>\\n    provider")
print("libengine1\\n  Depends: libc6\\n  PreDepends: libdeep\\nlibdeep\\nfirst\\nsecond\\nlibc6")
""",
        "dpkg-deb": """
import os
name = open(sys.argv[2]).read()
if name == "broken": sys.exit("dpkg-deb: error: no archive")
os.makedirs(sys.argv[3] + "/usr/share", exist_ok=True)
open(f"{sys.argv[3]}/usr/share/{name}", "w").write(name)
""",
    }
    for name, body in scripts.items():
        write = f"open({str(log)!r}, 'a').write(' '.join([{name!r}, *sys.argv[1:]]) + '\\n')"
        (tools / name).write_text(f"#!{sys.executable} -SE\nimport sys\n{write}{body}")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("NRCCR_CACHE", str(tmp_path / "packages cache"))
    return lambda: [line.split(" download ")[1] for line in log.read_text().splitlines() if " download " in line]


def test_packages_are_fetched_once(fake_apt, tmp_path, capfd):
    root = debian.fetch_packages(["data", "other"])
    assert (root / "usr/share/data").exists() and tmp_path / "packages cache" in root.parents
    assert re.search(r"unpacked 2 packages \(0 MB\) in \d+\.\d s", capfd.readouterr().out)
    assert debian.fetch_packages(["other"]) == root
    assert debian.fetch_packages(["data", "third"]) == root
    assert fake_apt() == ["data other", "third"]


def test_dependencies(fake_apt):
    root = debian.fetch_packages(["engine"])
    assert sorted(os.listdir(root / "usr/share")) == ["engine"]
    debian.fetch_packages(
        ["engine"], dependencies=True
    )  # with a name that newer releases change, without a second libc
    assert sorted(os.listdir(root / "usr/share")) == ["engine", "first", "libdeep", "libengine1"]
    debian.fetch_packages(["engine"], dependencies=True)
    assert len(fake_apt()) == 2


def test_a_fetch_that_failed_is_done_again(fake_apt, tmp_path):
    with pytest.raises(debian.FetchError, match="dpkg-deb: error: no archive"):
        debian.fetch_packages(["broken"])
    with pytest.raises(debian.FetchError):
        debian.fetch_packages(["broken"])
    assert fake_apt() == ["broken", "broken"]
    with pytest.raises(
        debian.FetchError, match="^Cannot fetch missing: .*Unable to locate package missing.*data_dir"
    ) as error:
        debian.fetch_packages(["missing"])
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "packages cache").glob("*/download-*"))


def test_several_fetch_at_once(fake_apt):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        roots = list(pool.map(lambda _: debian.fetch_packages(["data"]), range(4)))
    assert len(set(roots)) == 1 and fake_apt() == ["data"]


def test_no_apt_get_names_the_two_ways_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(debian.FetchError, match=r"no apt-get.*data_dir.*or run in a Debian container\.$") as error:
        debian.fetch_packages(["tuxpaint-stamps-default"], cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_cache_folder(monkeypatch, tmp_path, fake_apt):
    monkeypatch.delenv("NRCCR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tmp_path / "xdg/nrccr" in debian.fetch_packages(["data"]).parents
    assert tmp_path / "mine" in debian.fetch_packages(["data"], cache_dir=tmp_path / "mine").parents
    (tmp_path / "file").touch()
    with pytest.raises(debian.FetchError, match="cannot be written.*NRCCR_CACHE"):
        debian.fetch_packages(["data"], cache_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="'-o' is no Debian package name"):
        debian.fetch_packages(["-o"])


@pytest.mark.network
def test_real_packages(tmp_path):
    for language in ("gl", "ca", "es"):
        builds = {}
        for builder in (Tuxpaint, CldrEmoji):
            for seed in (0, 1):
                made = builder(config_name=language, seed=seed, cache_dir=tmp_path)
                made.download_and_prepare()
                builds[builder.__name__, seed] = made.as_dataset()
        pictures = {name: sum(builds[name, 0].num_rows.values()) for name in ("Tuxpaint", "CldrEmoji")}
        assert pictures["Tuxpaint"] >= 538 and pictures["CldrEmoji"] >= 1576
        for seed in (0, 1):
            assert not straddling(builds["Tuxpaint", seed], builds["CldrEmoji", seed])
        tests = [set(builds["CldrEmoji", seed]["test"]["image_id"]) for seed in (0, 1)]
        assert 0.15 < len(tests[0]) / pictures["CldrEmoji"] < 0.35 and tests[0] != tests[1]
    # Sequences are one picture, not their parts beside each other.
    singer = rows_by_id(builds["CldrEmoji", 0])["emoji/1F9D1-200D-1F3A4"]
    assert singer["image"].size == (136, 128) and singer["image"].getbbox()
    assert isinstance(singer["image"].getextrema()[3], tuple) and singer["image"].mode == "RGBA"


@pytest.mark.network
def test_sequences_are_drawn_whole_or_not_at_all():
    cldr_emoji.enable_raqm()
    (font_file,) = debian.find_data({"fonts-noto-color-emoji": CldrEmoji.PACKAGES["fonts-noto-color-emoji"]})
    font = cldr_emoji.load_font(font_file)
    assert cldr_emoji.draw_emoji("👩‍🎤", font).size == cldr_emoji.PICTURE_SIZE
    assert cldr_emoji.draw_emoji("🦊\u200d🎤", font) is None  # no such emoji: its parts would stand side by side
    assert cldr_emoji.draw_emoji("⁂", font) is None
    png = cldr_emoji.png_bytes(cldr_emoji.draw_emoji("🦊", font))
    assert Image.open(io.BytesIO(png)).mode == "RGBA"
