"""Translation of captions: a stand-in for Apertium in the fast tests, the real one as `network`."""

import sys
import time
import unicodedata

import datasets
import pytest

from modeling_nrccr.translation.apertium import ApertiumTranslator, debian_package
from modeling_nrccr.translation.base import TranslationError, Translator
from modeling_nrccr.translation.cache import CachedTranslator
from modeling_nrccr.translation.chain import ChainTranslator
from modeling_nrccr.translation.columns import add_translations
from modeling_nrccr.translation.engines import ENGINES, load_translator, split_spec
from modeling_nrccr.translation.language_codes import (
    closest_code,
    nearest_codes,
    standard_code,
    standard_codes,
)
from modeling_nrccr.translation.packages import apertium_root, prepare_translator


# Upper case is its translation. Words in the input make it misbehave; see the tests.
FAKE_APERTIUM = """
import os, sys, time
open(os.environ["FAKE_LOG"], "a").write(sys.argv[-1] + "\\n")
if sys.argv[-1] == "-l":
    print("  en-gl\\n  gl-en\\n  eng-cat\\n  eng-cat_valencia\\n  spa-eng")
    sys.exit()
text = sys.stdin.buffer.read().decode()
open(os.environ["FAKE_LOG"] + ".in", "a").write(text)
if "die" in text: sys.exit("lt-proc: cannot open " + sys.argv[-1] + ".bin")
if "silent" in text: sys.exit()
if "hang" in text:
    os.system("sleep 30 & echo $! > " + os.environ["FAKE_LOG"] + ".pid; sleep 30")
parts = text.split("\\n\\n")
parts = [part.upper().replace("SPLIT", "ONE\\n\\nTWO").replace("VANISH", "") for part in parts]
text = "\\n\\n".join(parts).replace("MERGE\\n\\n", "MERGE ")
text = text.encode()
if b"LATIN" in text: text = text.replace(b"LATIN", b"ni\\xf1a")
sys.stdout.buffer.write(text)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    script, log = tmp_path / "apertium", tmp_path / "log"
    script.write_text(f"#!{sys.executable} -SE\n{FAKE_APERTIUM}")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("FAKE_LOG", str(log))
    translator = ApertiumTranslator()
    translator.log = log
    return translator


def test_one_answer_a_caption_in_order(fake):
    assert fake.supported_pairs() == [("en", "ca"), ("en", "gl"), ("es", "en"), ("gl", "en")]
    assert fake.translate(["b c", "a", "b\n\n c\x00", " b \u2028c"], "en", "gl") == ["B C", "A", "B C", "B C"]
    assert (fake.log.parent / "log.in").read_text() == "a\n\nb c\n\n"  # equal captions once
    assert fake.translate([], "en", "gl") == []
    assert fake.translate(["niña \ud800"], "en", "ca") == ["NIÑA ?"]


@pytest.mark.parametrize("bad", ["x split y", "merge", "vanish a"])
def test_a_miscount_is_met_by_halving(fake, bad):
    captions = [f"caption {index}" for index in range(20)]
    captions[13] = bad
    expected = [caption.upper() for caption in captions]
    expected[13] = {"x split y": "X ONE TWO Y", "merge": "MERGE", "vanish a": "A"}[bad]
    assert fake.translate(captions, "en", "gl") == expected


def test_answers_in_another_encoding_are_refused(fake):
    with pytest.raises(
        TranslationError, match="apertium en-gl: the answer to 'a latin word' is not in UTF-8: 'A ni\ufffda"
    ):
        fake.translate(["a", "a latin word"], "en", "gl")
    assert fake.translate(["\ufffd"], "en", "gl") == ["\ufffd"]  # it stood in the caption


def test_long_captions_and_their_messages(fake):
    long = " ".join(["word"] * 2000)  # 10,000 characters
    assert fake.translate([long, "a"], "en", "gl") == [long.upper(), "A"]
    with pytest.raises(TranslationError, match="no answer to 'vanish") as error:
        fake.translate(["a", "vanish" * 2000], "en", "gl")
    assert len(str(error.value)) < 400


def test_no_answer_names_the_row(fake):
    with pytest.raises(TranslationError, match="apertium en-gl: row 1: no answer to 'vanish'"):
        fake.translate(["a", "vanish"], "en", "gl")


@pytest.mark.parametrize("empty", ["", " \n\t", "\x00", None, 3])
def test_empty_captions_are_named(fake, empty):
    with pytest.raises(ValueError, match="row 1: empty caption"):
        fake.translate(["a", empty], "en", "gl")


def test_unknown_pair(fake):
    with pytest.raises(
        ValueError, match="no pair en-eo here; it has: en-ca, en-gl, es-en, gl-en; install .*apertium-eo-en"
    ):
        fake.translate(["a"], "en", "eo")
    with pytest.raises(ValueError, match="no pair en-cs here.*apt-cache search"):
        fake.translate(["a"], "en", "cs")
    assert debian_package("gl", "en") == "apertium-en-gl"
    assert debian_package("gl", "es") == "apertium-es-gl" and debian_package("ca", "es") == "apertium-spa-cat"
    assert debian_package("nb", "nn") == "apertium-nno-nob" and debian_package("id", "ms") == "apertium-ind-zlm"
    with pytest.raises(ValueError, match="en-cs; known: ca-en, en-eo, en-es"):
        debian_package("en", "cs")


def test_death_names_pair_and_last_words(fake):
    with pytest.raises(
        TranslationError, match="apertium eng-cat ended with status 1 and said: lt-proc: cannot open eng-cat.bin"
    ):
        fake.translate(["die"], "en", "ca")
    with pytest.raises(TranslationError, match="apertium gl-en ended with status 0 and said: nothing"):
        fake.translate(["silent", "b"], "gl", "en")


def test_timeout_ends_the_whole_pipeline(fake):
    fake.timeout, start = 0.5, time.monotonic()
    with pytest.raises(TranslationError, match="apertium en-gl did not answer within 0.5 s"):
        fake.translate(["hang"], "en", "gl")
    assert time.monotonic() - start < 10  # not when the children end by themselves
    pid = (fake.log.parent / "log.pid").read_text().strip()
    for _ in range(50):
        try:
            state = open(f"/proc/{pid}/stat").read().split()[2]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("a child of the engine is still running")


def test_where_apertium_is_looked_for(fake, tmp_path):
    assert apertium_root([("en", "gl"), ("gl", "en")]) is None  # the one on the PATH has them
    (tmp_path / "mine/usr/bin").mkdir(parents=True)
    (tmp_path / "mine/usr/bin/apertium").touch()
    assert apertium_root([("en", "gl")], data_dir=tmp_path / "mine") == tmp_path / "mine"
    assert prepare_translator("apertium", "en", "gl") == ("apertium", {})
    spec = "apertium+es+apertium"
    assert prepare_translator(spec, "en", "gl", tmp_path / "mine") == (spec, {"root": tmp_path / "mine"})
    with pytest.raises(ValueError, match="en-cs"):
        apertium_root([("en", "cs")])


def test_no_apertium(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TranslationError, match="no apertium on the PATH: install the Debian packages"):
        load_translator("apertium")
    with pytest.raises(TranslationError, match="lacks usr/bin/apertium"):
        load_translator("apertium", root=tmp_path)


@pytest.mark.parametrize("folder", ["root", "it's a $root"])
def test_unpacked_root(tmp_path, folder):
    """Modes are aimed at the folder, wherever it is, and the folder itself is not written to."""
    root = tmp_path / folder
    data = root / "usr/share/apertium"
    (data / "modes").mkdir(parents=True)
    (data / "word").write_text("palabra")
    mode = data / "modes/en-gl.mode"
    mode.write_text("cat > /dev/null; cat '/usr/share/apertium/word'")
    script = root / "usr/bin/apertium"
    script.parent.mkdir(parents=True)
    script.write_text('#!/bin/sh\n[ "$3" = -l ] && ls "$2/modes" | sed s/.mode// || exec sh "$2/modes/$6.mode"\n')
    script.chmod(0o755)
    translator = load_translator("apertium", root=root)
    assert load_translator(translator) is translator
    assert translator.translate(["word"], "en", "gl") == ["palabra"]
    assert "'/usr/share" in mode.read_text()
    mode.write_text(
        f'cat > /dev/null; cat "{data}/word"'.replace("$", "\\$")
    )  # as the recipe leaves them: already aimed
    assert ApertiumTranslator(root).translate(["word"], "en", "gl") == ["palabra"]


def test_version_is_of_the_data_wherever_it_lies(tmp_path):
    versions = []
    for folder, word in (("a", "palabra"), ("b", "palabra"), ("c", "verba")):
        data = tmp_path / folder / "usr/share/apertium"
        (data / "modes").mkdir(parents=True)
        (data / "word").write_text(word)
        (data / "modes/en-gl.mode").write_text("cat '/usr/share/apertium/word'")
        script = tmp_path / folder / "usr/bin/apertium"
        script.parent.mkdir(parents=True)
        script.write_text("#!/bin/sh\necho en-gl\n")
        script.chmod(0o755)
        versions.append(load_translator("apertium", root=tmp_path / folder).version)
    assert versions[0] == versions[1] != versions[2]


# ------------------------------------------------------------------------------------------------- any engine


class Reverser(Translator):
    name = "reverser"

    def supported_pairs(self):
        return [("en", "gl"), ("gl", "en")]

    def _translate(self, texts, source, target):
        return [f"{text[::-1]} {target}" for text in texts]


def test_engines_get_composed_accents(tmp_path):
    """Files of macOS hold them as letters with marks, which engines know as other words."""
    seen = []

    class Engine(Reverser):
        def _translate(self, texts, source, target):
            seen.extend(texts)
            return [unicodedata.normalize("NFD", text) for text in texts]

    for engine in (Engine(), CachedTranslator(Engine(), tmp_path / "cache.sqlite")):
        decomposed = unicodedata.normalize("NFD", "unha árbore")
        assert engine.translate([decomposed, "unha árbore"], "gl", "en") == ["unha árbore"] * 2
    assert seen == ["unha árbore"] * 2


@pytest.fixture
def batches_of_two(monkeypatch):
    monkeypatch.setattr(Reverser, "batch_size", 2)


def test_finished_batches_are_handed_out_before_a_later_one_fails(batches_of_two):
    class Dying(Reverser):
        def _translate(self, texts, source, target):
            if "e" in texts:
                raise TranslationError("no power")
            return super()._translate(texts, source, target)

    done = []
    with pytest.raises(TranslationError, match="no power"):
        for batch, answers in Dying().translate_batches(["ab", "cd", "ef", "gh", "e", "ij"], "en", "gl"):
            done += zip(batch, answers)
    assert done == [("ab", "ba gl"), ("cd", "dc gl"), ("ef", "fe gl"), ("gh", "hg gl")]
    with pytest.raises(ValueError, match="no pair en-cs here"):
        Dying().translate_batches([], "en", "cs")  # not only when the first batch is asked for


@pytest.mark.parametrize(
    "answers, problem",
    [
        (["a"], "2 captions went in, 1 came out"),
        (["a", "b", "c"], "2 captions went in, 3 came out"),
        (["a", None], "the answer to 'd' is no text but None"),
        (["a", "b\ufffd"], "the answer to 'd' is not in UTF-8"),
    ],
)
def test_each_batch_is_counted(batches_of_two, answers, problem):
    class Wrong(Reverser):
        def _translate(self, texts, source, target):
            return answers if "c" in texts else super()._translate(texts, source, target)

    translator, done = Wrong(), []
    with pytest.raises(TranslationError, match=f"reverser en-gl: {problem}"):
        for batch, _ in translator.translate_batches(["a", "b", "c", "d"], "en", "gl"):
            done += batch
    assert done == ["a", "b"]
    with pytest.raises(TranslationError, match=problem):
        translator.translate(["d", "c", "b", "a"], "en", "gl")


@pytest.mark.parametrize(
    "batches, answered", [(["abc"], "3 answers came to 3"), (["abcd", "a"], "5 .* to 4"), (["abce"], "4 .* to 3")]
)
def test_lost_doubled_and_foreign_captions_are_noticed(batches, answered):
    class Wrong(Reverser):
        def _batches(self, texts, source, target):
            return map(list, batches)

    with pytest.raises(TranslationError, match=f"4 captions went in, {answered} of them"):
        Wrong().translate(["a", "b", "c", "d"], "en", "gl")


def test_batches_in_any_order_and_odd_white_space(batches_of_two):
    class Longest(Reverser):
        def _batches(self, texts, source, target):
            return super()._batches(sorted(texts, key=len, reverse=True), source, target)

        def _translate(self, texts, source, target):
            return [f" {text.upper()}\x00\n{target}" for text in texts]

    texts = ["a", "bbb", "cc", "a", "dddd", " bbb\n"]
    assert Longest().translate(texts, "en", "gl") == ["A gl", "BBB gl", "CC gl", "A gl", "DDDD gl", "BBB gl"]


def test_two_engines_in_a_row(monkeypatch):
    class Tagger(Translator):
        def __init__(self, *pairs):
            self.pairs, self.name, self.version = pairs, "-".join(pairs[0]), "1"

        def supported_pairs(self):
            return list(self.pairs)

        def _translate(self, texts, source, target):
            return [f"{text} {source}>{target}" for text in texts]

    one, two = Tagger(("en", "es"), ("es", "en"), ("ca", "es")), Tagger(("es", "gl"), ("gl", "es"))
    monkeypatch.setitem(ENGINES.entries, "one", lambda: one)
    monkeypatch.setitem(ENGINES.entries, "two", lambda name="two": two)
    chain = load_translator("one+es+two")
    assert chain.name == "en-es+es+es-gl" and chain.version == "1 | 1"
    assert chain.supported_pairs() == [("ca", "gl"), ("en", "gl"), ("gl", "en")]
    assert chain.translate(["b", "a"], "en", "gl") == ["b en>es es>gl", "a en>es es>gl"]
    assert chain.translate(["a"], "gl", "en") == ["a gl>es es>en"]  # the same way back
    assert load_translator("one+es+two", name="x").translate(["a"], "cat", "glg") == ["a ca>es es>gl"]
    with pytest.raises(ValueError, match=r"en-es\+es\+es-gl cannot translate en-cs: es-gl has no pair es-cs here"):
        chain.translate(["a"], "en", "cs")
    with pytest.raises(TypeError, match="no engine of 'one[+]es[+]two' takes root"):
        load_translator("one+es+two", root="x")
    with pytest.raises(ValueError, match="n engines have n - 1"):
        ChainTranslator([one, two], [])
    assert split_spec("a:x/y+zh-Hant+b:z+fr+c") == (["a:x/y", "b:z", "c"], ["zh-Hant", "fr"])


def test_unknown_specs_list_the_known():
    for spec in ("deepl", "deepl+es+apertium"):
        with pytest.raises(ValueError, match="unknown translation engine 'deepl': .*apertium, seq2seq:ID_OR_FOLDER, "):
            load_translator(spec)
    for spec in ("seq2seq", "file", "dictionary:"):
        with pytest.raises(ValueError, match=f"'{spec}' does not say which; known: .*dictionary:PAIR_OR_FILE"):
            load_translator(spec)


def test_language_codes():
    for code, standard in {
        "glg": "gl",
        "glg_Latn": "gl",
        "gl_ES": "gl",
        "zho_Hans": "zh",
        "zho_Hant": "zh-Hant",
        "en_XX": "en",
        "iw": "he",
        "ns": "nso",
        "zlm": "ms",
        "no words": "no words",
    }.items():
        assert standard_code(code) == standard
    codes = standard_codes(["zho_Hant", "zho_Hans", "glg_Latn", "ace_Arab", "ace_Latn", "aka_Latn", "twi_Latn"])
    assert codes == {
        "zh": "zho_Hans",
        "zh-Hant": "zho_Hant",
        "gl": "glg_Latn",
        "ace": "ace_Latn",
        "ace-Arab": "ace_Arab",
        "ak": "aka_Latn",
        "tw": "twi_Latn",
    }
    known = ["ca", "cs", "es", "gl", "nb", "pt", "sr", "zh", "zh-Hant"]
    for code, same in {
        "pt-BR": "pt",
        "glg": "gl",
        "zh-TW": "zh-Hant",
        "zh-CN": "zh",
        "no": "nb",
        "es-MX": "es",
        "cz": None,
        "sr-Latn": None,
        "da": None,
        "??": None,
        "Spanish": None,
    }.items():
        assert closest_code(code, known) == same
    assert nearest_codes("cz", known).startswith("cs, ") and nearest_codes("Spanish", known).startswith("sr")
    assert closest_code("zh-Hant", ["zh"]) is None  # another script is no detail


def captions(split, targets=(None, None), **changes):
    is_train = split == "train"
    columns = {
        "image_id": ["a", "b"],
        "caption_id": ["a#0", "b#0"],
        "source_caption": ["cat", "dog"] if is_train else [None, None],
        "target_caption": list(targets) if is_train else ["gato", "can"],
        "back_translation": [None, None],
        "source_language": ["en", "en"],
        "target_language": ["gl", "gl"],
        "target_origin": [target and "human" for target in targets] if is_train else ["human", "human"],
        "reference_source_caption": [None, None] if is_train else ["cat", "dog"],
        "number": [1, 2],
    } | changes
    features = {name: datasets.Value("int64" if name == "number" else "string") for name in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_add_translations():
    before = datasets.DatasetDict({split: captions(split) for split in ("train", "validation", "test")})
    after = add_translations(before, Reverser(), "en", "gl")
    assert isinstance(after, datasets.DatasetDict)
    train = after["train"]
    assert train["target_caption"][:] == ["tac gl", "god gl"] and set(train["target_origin"]) == {"reverser"}
    assert train["back_translation"][:] == ["lg cat en", "lg dog en"]
    for split in ("validation", "test"):
        assert after[split]["source_caption"][:] == ["otag en", "nac en"]
        assert after[split]["target_caption"][:] == ["gato", "can"] and set(after[split]["target_origin"]) == {"human"}
        assert after[split]["reference_source_caption"][:] == ["cat", "dog"]
    for split in before:
        assert after[split].features == before[split].features and after[split]["number"][:] == [1, 2]
        assert before[split]["back_translation"][:] == [None, None]  # what came in is as it was


def test_human_target_captions_stay():
    before = datasets.DatasetDict({"train": captions("train", ["gato", None])})
    train = add_translations(before, Reverser())["train"]
    assert train["target_caption"][:] == ["gato", "god gl"] and train["target_origin"][:] == ["human", "reverser"]
    assert train["back_translation"][:] == ["otag en", "lg dog en"]


def test_human_english_does_not_reach_query_fusion():
    test = captions("test", source_caption=["cat", "dog"])
    assert add_translations(datasets.DatasetDict(test=test), Reverser())["test"]["source_caption"][0] == "otag en"


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match=r"train, row 1 \(b#0\): source_caption is None; fill it"):
        add_translations({"train": captions("train", source_caption=["cat", None])}, Reverser())
    with pytest.raises(ValueError, match=r"test, row 0 \(a#0\): target_caption is '  '"):
        add_translations({"test": captions("test", target_caption=["  ", "can"])}, Reverser())
    with pytest.raises(ValueError, match="test has target_language {'gl'}, not 'ca' alone"):
        add_translations({"test": captions("test")}, Reverser(), target="ca")
    with pytest.raises(ValueError, match=r"test lacks the columns \['target_caption'\]"):
        add_translations({"test": captions("test").remove_columns("target_caption")}, Reverser())

    class Lossy(Reverser):
        def _translate(self, texts, source, target):
            return texts[1:]

    with pytest.raises(
        TranslationError, match="train, source_caption: reverser en-gl: 2 captions went in, 1 came out"
    ):
        add_translations({"train": captions("train")}, Lossy())


@pytest.mark.network
def test_real_pivots():
    for target, expected in (("gl", "Xeado"), ("ca", "Gelat")):
        spec, options = prepare_translator("apertium+es+apertium", "en", target)
        translator = load_translator(spec, **options)
        assert translator.translate(["ice cream"], "en", target) == [expected]
        assert translator.translate([expected], target, "en") == ["Ice cream"]


@pytest.mark.network
def test_real_apertium():
    languages = ("gl", "ca", "es", "eo")
    pairs = [pair for language in languages for pair in (("en", language), (language, "en"))]
    translator = load_translator("apertium", root=apertium_root(pairs))
    assert set(pairs) <= set(translator.supported_pairs())
    assert translator.translate(["ice cream"], "en", "gl") == ["Crema de xeo"]
    assert translator.translate(["Crema de xeo"], "gl", "en") == ["Believe it to me of ice"]
    odd = [
        "[a]",
        "^x$",
        "\\",
        "<b>hi</b>",
        "@",
        "~",
        "*",
        "😀",
        "(((",
        "...",
        "[",
        "]",
        "end\\",
        "{x}",
        "$5",
        "A dog. A cat.",
    ]
    many = [f"{text} number {index}" for index in range(70) for text in odd]
    for pair in pairs:
        answers = translator.translate(many, *pair)
        assert len(answers) == len(many) and translator.translate(many[::-1], *pair) == answers[::-1]
        assert all(str(index // len(odd)) in answer for index, answer in enumerate(answers))
