"""The Space without its page: the folder that is pushed, search, explanations, and what visitors send."""

import importlib.util
import os
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml

from datasets_scripts import cldr_emoji
from datasets_scripts.reading.debian import FetchError
from modeling_nrccr import encode_texts
from modeling_nrccr.cli.space import main
from modeling_nrccr.space import build, cards, finder
from tests.data.test_datasets import packages  # noqa: F401
from tests.model.test_hub import PICKLED
from tests.retrieval.test_search_examples import checkpoint, picture  # noqa: F401
from tests.support import ROOT


@pytest.fixture
def space(checkpoint, packages, tmp_path, monkeypatch):  # noqa: F811
    """A Space of a random model over a few stand-ins: stamps, emoji, and a clip whose third frame is another."""
    monkeypatch.setattr(
        cldr_emoji, "draw_emoji", lambda emoji, font: None if emoji == "⁂" else picture(sum(map(ord, emoji)))
    )
    clips = tmp_path / "fetched"
    clips.mkdir()
    frames = [picture(number) for number in (2, 3, 5, 6)]
    frames[0].save(clips / "1f98a.webp", save_all=True, append_images=frames[1:], lossless=True)
    picture(1).save(clips / "1f3a4.webp")  # does not move
    (checkpoint / "optimizer.pt").touch()
    for _ in range(2):  # the second replaces the first
        build.build_space(tmp_path / "space", checkpoint, data_dir=packages, clips_dir=clips)
    return tmp_path / "space"


@pytest.fixture
def found(space, packages):  # noqa: F811
    return finder.Finder(space, ["gl", "en"], packages)


def test_the_folder_is_whole_and_holds_no_pickled_file(space):
    names = [path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith(PICKLED) or "__pycache__" in name]
    assert not [path for path in space.rglob("*") if path.is_file() and path.read_bytes()[:2] in (b"\x80\x02", b"PK")]
    assert {"app.py", "style.css", "model/model.safetensors", "modeling_nrccr/retrieval/retriever.py"} < set(names)
    assert {"clips/1f98a.webp", "clips/LICENSE.txt"} < set(names) and "clips/1f3a4.webp" not in names
    front = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio" and (space / front["app_file"]).exists() and len(front["short_description"]) <= 60
    assert [int(part) for part in front["python_version"].split(".")] >= [3, 11]


def test_requirements_are_those_of_the_package():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    lists = [
        re.search(rf"{name} ?= ?\[(.*?)\]", setup, re.DOTALL)[1] for name in ("install_requires", "RETRIEVAL", "LORA")
    ]
    required = {requirement for text in lists for requirement in re.findall(r'"(.+?)"', text)}
    assert required == set(Path(build.__file__).with_name("requirements.txt").read_text(encoding="utf-8").split())


def test_several_languages_in_one_space(checkpoint, packages, tmp_path, monkeypatch, capsys):  # noqa: F811
    from modeling_nrccr import NrccrModel

    monkeypatch.setattr(cldr_emoji, "draw_emoji", lambda emoji, font: picture(3))
    model = NrccrModel.from_dual_encoder(str(checkpoint))
    for code in ("ca", "es"):
        adapter = model.add_language(code)
        torch.nn.init.normal_(adapter.update.weight, std=0.3)
        model.save_language(code, tmp_path / code)
    arguments = [str(checkpoint), str(tmp_path / "space"), "--data_dir", str(packages)]
    arguments += ["--no_clips", "--language", f"ca={tmp_path}/ca", "--language", f"es={tmp_path}/es"]
    main(arguments)
    assert f"try it: python {tmp_path}/space/app.py" in capsys.readouterr().out
    app = pytest.importorskip("modeling_nrccr.space.app")
    assert app.spoken(tmp_path / "space/model", {"language": "gl"}) == ["ca", "es", "en"]
    found = finder.Finder(tmp_path / "space", ["ca", "es", "en"], packages)
    catalan, spanish, english = (found.embed_texts(["gato"], code)[0] for code in ("ca", "es", "en"))
    torch.testing.assert_close(english, encode_texts(model.set_language(None), ["gato"], found.processor)[0])
    assert not torch.allclose(catalan, english, atol=1e-3) and not torch.allclose(catalan, spanish, atol=1e-3)
    with pytest.raises(SystemExit, match="no adapter for the language 'gl'"):
        main([*arguments, "--language", "gl"])


def test_another_folder_is_left_alone(checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "thesis").mkdir()
    for arguments, reason in (
        ([str(checkpoint), str(tmp_path / "thesis")], "holds something else"),
        ([str(tmp_path)], "holds no model"),
        (["--model", str(checkpoint)], "--model is now the first argument"),
    ):
        with pytest.raises(SystemExit, match=reason):
            main(arguments)
    assert build.LANGUAGES == tuple(f"{code}=outputs/gl-ca-es" for code in ("gl", "ca", "es"))


def test_search_explains_itself(found):
    query = found.query(" gato  can ", "gl")
    assert query.text == "gato can" and query.picture is None
    hits = found.search(query.embed, found.pictures, k=3)
    assert len(found.pictures) == 9 and len(hits) == 3  # of six emoji and three stamps
    names = {found.gallery.name(hit.id, "en") for hit in found.search(query.embed, found.pictures, k=99)}
    assert {"fox", "A cat."} < names and found.gallery.name("emoji/1F98A", "gl") == "cara de raposo"
    unseen = found.search(query.embed, found.pictures, k=99, unseen=True)
    assert 0 < len(unseen) < 9 and not any(hit.metadata["seen"] for hit in unseen)

    weights = dict(found.word_weights(query, found.pictures, hits))
    left = encode_texts(found.model, ["can"], found.processor)[0]
    scores = {hit.id: hit.score for hit in found.pictures.search(left, k=99)}
    assert weights["gato"] == pytest.approx([hit.score - scores[hit.id] for hit in hits], abs=1e-5)
    alone = found.query("gato", "gl")
    assert found.word_weights(alone, found.pictures, hits) == [("gato", [hit.score for hit in hits])]

    both = found.query("gato", "gl", picture(3))
    assert both.picture.startswith("data:image/webp;base64,")
    assert both.embed.norm() == pytest.approx(1) and not torch.allclose(both.embed, alone.embed, atol=1e-3)
    for text in ("", "x" * 201, "gato \ud83d"):
        with pytest.raises(ValueError, match="Type what|201 characters|The query holds '.ud83d' at character 5"):
            found.query(text, "gl")


def test_a_clip_is_found_and_its_best_frame_shown(found):
    query = found.query("", "gl", picture(5))
    (clip,) = found.search(query.embed, found.clips, k=5)
    assert clip.id == "clips/1f98a" and found.best_frames(query.embed, [clip]) == {clip.id: "clips/1f98a#2"}
    frame = found.gallery.picture("clips/1f98a#2")
    assert frame.size == picture(5).size
    assert found.gallery.name(clip.id, "gl") == "cara de raposo"


def test_translation_is_missed_gracefully(found, monkeypatch):
    class Translator:
        name = "stand-in"

        def check_pair(self, source, target):
            return source, target

        def translate(self, texts, source, target, show_progress):
            return [f"{text} from {source} to {target}" for text in texts]

    def nothing(*args):
        raise FetchError("no network")

    monkeypatch.setattr(finder, "prepare_translator", nothing)
    assert found.translate("gato", "gl") is None
    found.translators = {("en", "gl"): Translator()}
    assert found.translate("cat", "en") == ("cat from en to gl", "stand-in")


def test_uploads_are_bounded_and_found(found, tmp_path, monkeypatch):
    target = picture(4, (700, 500))
    target.save(tmp_path / "<i>mine.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (tmp_path / "page.svg").write_text("<svg/>")
    picture(1, (900, 900)).save(tmp_path / "bomb.png")
    (tmp_path / "large.jpg").write_bytes(bytes(finder.MAX_BYTES + 1))
    monkeypatch.setattr(finder, "MAX_PIXELS", 800 * 800)
    files = [tmp_path / name for name in ("<i>mine.png", "broken.png", "page.svg", "bomb.png", "large.jpg")]
    own, refused = found.add_own(None, files)
    assert [line.partition(":")[0] for line in refused] == ["broken.png", "page.svg", "bomb.png", "large.jpg"]
    assert "larger than 8 MB" in refused[3] and "known kind" in refused[1]

    picture(9).save(tmp_path / "second.png")
    own, refused = found.add_own(own, [tmp_path / "second.png"])
    query = found.query("", "gl", target)
    assert not refused and [hit.id for hit in found.search(query.embed, own.index, k=2, unseen=True)] == [
        "own/0",
        "own/1",
    ]
    own, refused = found.add_own(own, [tmp_path / "second.png"] * finder.MAX_OWN)
    assert len(own.pictures) == len(own.index) == finder.MAX_OWN and len(refused) == 2
    assert found.add_own(None, [tmp_path / "page.svg"])[0] is None


def test_output_is_escaped():
    evil = '"><script>alert(1)</script>'
    card = cards.Card(cards.data_uri(picture(1)), evil, evil + "2", 0.5, True, f"a'){evil}")
    pages = [
        cards.results([card], evil, None, evil),
        cards.why([(evil, [0.1]), ("b", [-0.2])], [card]),
        cards.noise([(evil, evil, {cards.plain(evil)}, [card])]),
        cards.note(evil),
    ]
    for page in pages:
        assert "<script" not in page and "&lt;script&gt;" in page
        assert not re.search(r'="[^"]*"&gt;|alert\(1\)[^<&]*"', page)
    assert cards.plain("¿Casiñas?") == "casiñas"


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")
def test_the_page_serves_the_folder_that_it_lies_in(space, monkeypatch):
    from modeling_nrccr.space import app

    served = []
    monkeypatch.setattr(app, "serve", served.append)
    runpy.run_path(str(space / "app.py"), run_name="__main__")
    assert served == [space.resolve()]


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")
def test_the_page_answers_and_deletes_what_was_sent(found, tmp_path, monkeypatch):
    from modeling_nrccr.space import app

    uploads = tmp_path / "uploads"
    uploads.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    monkeypatch.setattr(found, "translate", lambda text, source: ("a gato & pato", "apertium"))
    page = app.Page(found, 0.7)
    app.build(found)

    picture(4).save(uploads / "a.png")
    query, box, problem = page.ask({"text": "", "files": [str(uploads / "a.png")]}, "gl")
    assert box == {"text": "", "files": []} and not problem and not list(uploads.iterdir())
    assert page.results(query, app.PICTURES, True, None).count("<li>") == len(
        found.search(query.embed, found.pictures, 10, unseen=True)
    )
    assert "gradio_api/file=" in page.results(query, app.CLIPS, False, None)
    assert page.ask({"text": "  ", "files": []}, "gl")[0] is None

    query, _, _ = page.ask({"text": "gato can", "files": []}, "gl")
    assert page.why(query, app.PICTURES, False, None).count("class=words") == app.EXPLAINED
    noise = page.noise(query, app.PICTURES, False, None)
    assert noise.count("<article>") == 3 and "<u " in noise and "&amp;" in noise
    assert "no pictures yet" in page.results(query, app.OWN, False, None)

    picture(4).save(uploads / "b.png")
    outside = tmp_path / "kept.png"
    picture(4).save(outside)
    own, _, said, cleared = page.add([str(uploads / "b.png"), str(outside)], None)
    assert len(own.pictures) == 2 and cleared is None and "data:image" in said
    assert not list(uploads.iterdir()) and outside.exists()
    assert page.results(query, app.OWN, False, own).count("<li>") == 2

    picture(4).save(uploads / "c.png")  # beside half of a character, which cannot be sent back
    query, box, problem = page.ask({"text": "gato \udc80", "files": [str(uploads / "c.png")]}, "gl")
    assert query is None and "udc80" in problem and box["text"].isascii() and not list(uploads.iterdir())


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")
def test_what_is_uploaded_and_never_submitted_is_bounded(found, tmp_path, monkeypatch):
    from gradio.routes import App
    from starlette.middleware import Middleware
    from starlette.testclient import TestClient

    from modeling_nrccr.space import app, uploads

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    demo = app.build(found)
    demo.max_file_size = finder.MAX_BYTES
    limit = Middleware(uploads.UploadLimit, folder=str(tmp_path / "uploads"))
    client = TestClient(App.create_app(demo, app_kwargs={"middleware": [limit]}))

    def upload(size: int, count: int = 1):
        files = [("files", (f"{number}.png", os.urandom(size), "image/png")) for number in range(count)]
        return client.post("/gradio_api/upload", files=files).status_code

    def kept():
        return sorted(path for path in (tmp_path / "uploads").rglob("*") if path.is_file())

    assert upload(1000, 2) == 200 and len(kept()) == 2
    monkeypatch.setattr(uploads, "MAX_TOTAL", 2000)
    assert upload(1000) == 503 and len(kept()) == 2
    old = kept()[0]
    os.utime(old, (0, 0))  # waited too long
    assert upload(500) == 200 and old not in kept() and len(kept()) == 2
    monkeypatch.setattr(uploads, "MAX_FILES", 2)
    assert upload(10) == 503 and len(kept()) == 2
    monkeypatch.setattr(uploads, "MAX_FILES", 3)
    monkeypatch.setattr(uploads, "MAX_REQUEST", 100_000)
    monkeypatch.setattr(uploads, "MAX_TOTAL", 10**9)
    assert upload(400_000) == 413
