"""The server with a tiny model: equal embeddings whatever shares a batch, every bound, and 50 clients at once."""

import asyncio
import base64
import gzip
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import psutil
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from modeling_nrccr import NrccrModel, NrccrProcessor, NrccrRetriever, encode_images, encode_texts
from modeling_nrccr.cli import serve as command
from modeling_nrccr.loading.models import load_with_languages
from modeling_nrccr.serving import service as serve
from tests.model.test_hub import publish
from tests.support import ROOT


COLORS = {"red.png": (200, 30, 30), "green.png": (20, 220, 40), "blue.png": (30, 40, 210)}
TEXTS = ["dog", "a dog", "un can corre", "un can", "can can can can can", "corre a dog un can"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a language, and `index`, a gallery of three pictures."""
    folder = tmp_path_factory.mktemp("serve")
    publish(folder / "model")
    model, processor = NrccrModel.from_pretrained(folder / "model").eval(), load_processor(folder)
    adapter = model.add_language("gl")
    torch.nn.init.normal_(adapter.update.weight)
    model.save_pretrained(folder / "model")
    model.save_language("gl", folder / "gl")
    index = NrccrRetriever(model, processor)
    pictures = [Image.new("RGB", (40, 30), color) for color in COLORS.values()]
    index.add(pictures, ids=list(COLORS), metadata=[{"album": album} for album in ("warm", "cold", "cold")])
    index.save(folder / "index")
    return folder


def load_processor(folder):
    return NrccrProcessor.from_dual_encoder(str(folder / "model"))


@pytest.fixture(scope="module")
def parts(folder):
    return NrccrModel.from_pretrained(folder / "model").eval(), load_processor(folder)


@pytest.fixture
def start(folder, parts):
    """Starts a service with some limits, and gives a client of it."""

    @contextmanager
    def start(index=True, **limits):
        gallery = NrccrRetriever.load(folder / "index", *parts) if index else None
        service = serve.Service("tiny", *parts, gallery, serve.Limits(**limits), ["album"])
        with TestClient(serve.build_app(service)) as client:
            client.service = service
            yield client

    return start


def picture_file(color=(200, 30, 30), size=(40, 30)) -> str:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_embeddings_are_the_models(start, parts):
    model, processor = parts
    pictures = list(map(picture_file, COLORS.values()))
    with start() as client:
        answer = client.post("/embed", json={"texts": TEXTS, "images": pictures}).json()
        health = client.get("/health").json()
    torch.testing.assert_close(torch.tensor(answer["text_embeds"]), encode_texts(model, TEXTS, processor))
    images = [Image.new("RGB", (40, 30), color) for color in COLORS.values()]
    torch.testing.assert_close(torch.tensor(answer["image_embeds"]), encode_images(model, images, processor))
    assert health == {
        "status": "ready",
        "model": "tiny",
        "projection_dim": 11,
        "languages": ["gl"],
        "language": "base",
        "index": health["index"] | {"size": 3},
        "waiting": 0,
        "served": {
            "texts": {"encoded": 6, "batches": 1, "largest_batch": 6},
            "images": {"encoded": 3, "batches": 1, "largest_batch": 3},
        },
    }


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_what_shares_a_batch_changes_nothing(start, parts, batch_size):
    model, processor = parts
    with start(batch_size=batch_size, max_wait_ms=500) as client, ThreadPoolExecutor(12) as pool:
        requests = [{"texts": [text], "language": language} for text in TEXTS for language in ("gl", "base")]
        answers = list(pool.map(lambda request: client.post("/embed", json=request).json(), requests))
        assert client.service.texts.encoded == 12
        assert (client.service.texts.batches < 12) == (batch_size > 1) and client.service.texts.largest <= batch_size
    for request, answer in zip(requests, answers):
        with model.using_language("gl" if request["language"] == "gl" else None):
            expected = encode_texts(model, request["texts"], processor)
        torch.testing.assert_close(torch.tensor(answer["text_embeds"]), expected, atol=1e-5, rtol=0)


def test_the_default_language_is_the_models(start, parts):
    model, _ = parts
    with start() as client, model.using_language("gl"):
        embeds = {
            language: client.post("/embed", json={"texts": ["can"], "language": language}).json()["text_embeds"]
            for language in (None, "gl", "base")
        }
        assert client.get("/health").json()["language"] == "gl"
    assert embeds[None] == embeds["gl"] != embeds["base"]


def test_search(start, parts, folder):
    retriever = NrccrRetriever.load(folder / "index", *parts)
    with start() as client:

        def ask(**request):
            return [tuple(hit.values()) for hit in client.post("/search", json=request).json()["hits"]]

        def expected(*arguments, **options):
            hits = retriever.search(*arguments, **options)
            return [(hit.id, pytest.approx(hit.score, abs=1e-5), hit.metadata) for hit in hits]

        assert ask(text="un can", k=2) == expected("un can", 2)
        assert ask(text="un can", translation="a dog", translation_weight=0.3) == expected(
            "un can", 10, translation="a dog", translation_weight=0.3
        )
        assert ask(text="dog", filter={"album": "cold"}) == expected("dog", 10, {"album": "cold"})
        with parts[0].using_language("gl"):
            adapted = expected("un can", translation="a dog")
        assert ask(text="un can", translation="a dog", language="gl") == adapted
        assert ask(image=picture_file(COLORS["green.png"]), k=1)[0][:2] == ("green.png", pytest.approx(1, abs=1e-4))


BROKEN = base64.b64encode(base64.b64decode(picture_file())[:50]).decode()
BAD = [
    ("embed", {}, 422, "texts and images are both empty"),
    ("embed", [], 422, "the body: .* got \\[\\]"),
    ("embed", {"text": ["a"]}, 422, "text: Extra inputs are not permitted"),
    ("embed", {"texts": "a"}, 422, "texts: .* valid list, got 'a'"),
    ("embed", {"texts": ["a", 5]}, 422, "texts\\[1\\]: .* valid string, got 5"),
    ("embed", {"texts": ["a", " \n"]}, 422, "texts\\[1\\] is ' .n': a text that is not blank"),
    ("embed", {"texts": ["a" * 101]}, 422, "texts\\[0\\] has 101 characters: 100 are taken"),
    ("embed", {"texts": ["a"] * 9}, 422, "texts has 9 entries: 8 are taken"),
    ("embed", {"texts": ["a", "b\ud800"]}, 422, r"texts\[1\] holds '.ud800' at character 1, half of a UTF-16 pair"),
    ("embed", {"texts": ["a"], "language": "x" * 2900}, 422, "language 'xxx.{,30}xxx' is not here"),
    ("embed", {"texts": ["a"], "x" * 2900: 1}, 422, "^x{40}: Extra inputs"),
    ("embed", {"texts": ["a"], "\udc80": 1}, 422, "the body: .* got '.udc80'"),
    ("embed", {"texts": ["a"], "language": "pt"}, 422, "language 'pt' is not here \\(base, gl\\)"),
    ("embed", {"images": [picture_file()] * 3}, 422, "images has 3 entries: 2 are taken"),
    ("embed", {"images": ["data:image/png,abc"]}, 422, "images\\[0\\] is no base64"),
    ("embed", {"images": ["data:image/png;base64,"]}, 422, "images\\[0\\] is no picture of a known kind"),
    ("embed", {"images": [base64.b64encode(b"hello").decode()]}, 422, "images\\[0\\] is no picture .* BMP, GIF"),
    ("embed", {"images": [picture_file(), BROKEN]}, 422, "images\\[1\\] cannot be read as a picture"),
    ("embed", {"images": [picture_file(size=(101, 100))]}, 422, "images.0.: 10100 pixels in all, 10000 are taken"),
    ("embed", {"images": [picture_file(size=(60, 99))] * 2}, 422, "images.1.: 11880 pixels in all, 10000 are taken"),
    ("embed", {"images": [base64.b64encode(bytes(1001)).decode()]}, 413, "images\\[0\\] has 1001 bytes: 1000 are"),
    ("embed", {"texts": ["a" * 4000]}, 413, "the request is larger than 3000 bytes"),
    ("search", {}, 422, "give either text or image"),
    ("search", {"text": "a", "image": picture_file()}, 422, "give either text or image"),
    ("search", {"text": " "}, 422, "text is ' '"),
    ("search", {"text": "a", "translation": ""}, 422, "translation is ''"),
    ("search", {"text": "a", "k": 0}, 422, "k is 0: from 1 to 100"),
    ("search", {"text": "a", "k": "3"}, 422, "k: .* valid integer, got '3'"),
    ("search", {"text": "a", "translation_weight": float("nan")}, 422, "translation_weight is nan: from 0 to 1"),
    ("search", {"text": "a", "source_query_weight": 0.5}, 422, "source_query_weight is now translation_weight"),
    ("search", {"text": "a", "filter": {"path": "x"}}, 422, "filter by 'path' is not served \\(album\\)"),
    ("search", {"text": "a", "filter": {"album": "a\nb"}}, 422, "Cannot filter by 'album'"),
    ("search", {"image": "@"}, 422, "image is no base64"),
    ("nowhere", {}, 404, "Not Found"),
]


def test_what_is_wrong_is_named(start):
    limits = {"max_texts": 8, "max_characters": 100, "max_images": 2, "max_image_bytes": 1000, "max_pixels": 10_000}
    with start(max_body_bytes=3000, **limits) as client:
        for path, request, status, reason in BAD:
            answer = client.post(f"/{path}", content=json.dumps(request), headers={"Content-Type": "application/json"})
            assert answer.status_code == status, (request, answer.text)
            assert re.search(reason, answer.json()["detail"]), answer.text
        for body, headers, status, reason in (
            (b'{"texts": [', {}, 422, "no JSON: .* at character 11"),
            (b'{"texts": ["a"]}', {"Content-Type": "text/plain"}, 422, "the body must be JSON"),
            (b'{"texts": ["\xff"]}', {}, 400, "cannot be read .*can't decode byte 0xff in position 12.*JSON in UTF-8"),
            (gzip.compress(b'{"texts": ["a"]}'), {"Content-Encoding": "gzip"}, 400, "Content-Encoding 'gzip' is not"),
            (b'{"texts": [' + b"9" * 2900, {}, 422, "no JSON"),
            (b"[" * 2900, {}, 400, "cannot be read .maximum recursion"),
        ):
            answer = client.post("/embed", content=body, headers={"Content-Type": "application/json"} | headers)
            assert answer.status_code == status and re.search(reason, answer.json()["detail"]), answer.text
            assert len(answer.json()["detail"]) < 600
        assert client.post("/embed", json={"texts": ["dog"]}).status_code == 200
        assert client.service.accepted == 0
    with start(index=False) as client:
        answer = client.post("/search", json={"text": "dog"})
        assert answer.status_code == 404 and "--index" in answer.json()["detail"]
        assert client.get("/health").json()["index"] is None


def test_pictures_come_as_browsers_and_mail_have_them(start):
    with start() as client:
        plain = picture_file()
        lines = base64.encodebytes(base64.b64decode(plain)).decode().replace("\n", "\r\n")
        images = [plain, f"data:image/png;base64,{plain}", lines, f"DATA:image/png;charset=utf-8;base64,{lines}"]
        embeds = client.post("/embed", json={"images": images}).json()["image_embeds"]
        assert embeds == [embeds[0]] * 4
        head = client.head("/health")
        assert head.status_code == 200 and int(head.headers["Content-Length"]) > 100 and not head.content


def test_other_sites_pages_cannot_ask_by_a_name_of_theirs(start):
    with start() as client:
        app = serve.build_app(client.service, serve.LOCAL)
        with TestClient(app) as named:
            for host, status in (
                ("localhost:8000", 200),
                ("127.0.0.1", 200),
                ("[::1]:8000", 200),
                ("evil.example", 400),
                ("", 400),
            ):
                assert named.get("/health", headers={"Host": host}).status_code == status, host


def test_what_clients_that_left_had_asked_is_not_done(start, monkeypatch):
    """One picture and one text are under way; those of the clients that leave meanwhile are never begun."""
    reading, encoding, go, read = Event(), Event(), Event(), []

    async def requests(service):
        app = serve.build_app(service)
        read_image, encode = service.read_image, service.texts.encode

        def slow_image(field, content):
            reading.set()
            assert go.wait(30)
            read.append(field)
            return read_image(field, content)

        def slow_text(items):
            encoding.set()
            assert go.wait(30)
            return encode(items)

        monkeypatch.setattr(service, "read_image", slow_image)
        monkeypatch.setattr(service.texts, "encode", slow_text)

        async def ask(body, leaves=None):
            sent, messages = [], [{"type": "http.request", "body": json.dumps(body).encode()}]
            headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
            scope = {"type": "http", "method": "POST", "path": "/embed", "query_string": b"", "headers": headers}

            async def receive():
                if messages:
                    return messages.pop()
                await (leaves or asyncio.Event()).wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            await app(scope, receive, send)
            return sent[0]["status"]

        async with service.running():
            stay = [asyncio.create_task(ask(body)) for body in ({"texts": ["dog"]}, {"images": [picture_file()]})]
            await asyncio.to_thread(lambda: reading.wait(30) and encoding.wait(30))
            leaves = asyncio.Event()
            left = [asyncio.create_task(ask({"texts": ["can"] * 5}, leaves)) for _ in range(3)]
            left += [asyncio.create_task(ask({"images": [picture_file()] * 3}, leaves)) for _ in range(3)]
            while service.accepted < 2 + 3 * 5 + 3 * 3:
                await asyncio.sleep(0.001)
            leaves.set()
            assert await asyncio.gather(*left) == [499] * 6 and service.accepted == 2
            go.set()
            assert await asyncio.gather(*stay) == [200] * 2
            assert await ask({"texts": ["can"]}) == 200
        assert service.texts.encoded == 2 and read == ["images[0]"] and service.accepted == 0

    with start(batch_size=1) as client:
        asyncio.run(requests(serve.Service("tiny", client.service.model, client.service.processor)))


def test_a_full_queue_refuses_and_keeps_what_it_accepted(start, monkeypatch):
    begun, go = Event(), Event()
    with start(max_waiting=6, max_texts=4, max_images=2, batch_size=2) as client, ThreadPoolExecutor(3) as pool:
        encode_texts = client.service.texts.encode

        def slow(items):
            begun.set()
            assert go.wait(30)
            return encode_texts(items)

        monkeypatch.setattr(client.service.texts, "encode", slow)
        accepted = [pool.submit(client.post, "/embed", json={"texts": ["dog", "can"]}) for _ in range(3)]
        deadline = time.monotonic() + 30
        while client.service.accepted < 6 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert begun.wait(30) and client.get("/health").json()["waiting"] == 6
        refused = client.post("/embed", json={"texts": ["dog"]})
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert refused.json()["detail"] == "6 texts and pictures wait already: ask again"
        go.set()
        assert [future.result().status_code for future in accepted] == [200] * 3
        assert client.post("/embed", json={"texts": ["dog"]}).status_code == 200


def test_one_bad_item_does_not_fail_its_batch(start, monkeypatch):
    with start(max_wait_ms=500) as client, ThreadPoolExecutor(3) as pool:
        encode_texts = client.service.texts.encode

        def fails(items):
            if any(text == "un" for text, _ in items):
                raise RuntimeError("odd")
            return encode_texts(items)

        monkeypatch.setattr(client.service.texts, "encode", fails)
        answers = [pool.submit(client.post, "/embed", json={"texts": [text]}) for text in ("dog", "un", "can")]
        assert answers[0].result().status_code == answers[2].result().status_code == 200
        with pytest.raises(RuntimeError, match="odd"):
            answers[1].result()


def test_a_gallery_that_does_not_answer_is_503(start, monkeypatch):
    def gone(*_):
        raise ConnectionError("gone")

    with start() as client:
        monkeypatch.setattr(client.service.index, "search", gone)
        answer = client.post("/search", json={"text": "dog"})
        assert answer.status_code == 503 and answer.json()["detail"] == "the gallery does not answer: gone"


@pytest.mark.parametrize("limits, status", [({"max_body_seconds": 0.05}, 408), ({"max_held_bytes": 20}, 503)])
def test_bodies_are_bounded_as_they_arrive(limits, status):
    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    async def chunks():
        await asyncio.sleep(0)
        return {"type": "http.request", "body": bytes(15), "more_body": True}

    async def never():
        await asyncio.sleep(10)

    bounded = serve.BodyLimit(app, serve.Limits(**limits))
    with pytest.raises(serve.HTTPException) as raised:
        asyncio.run(bounded({"type": "http"}, never if "max_body_seconds" in limits else chunks, None))
    assert raised.value.status_code == status and bounded.held == 0


def test_loads_languages_and_says_what_is_wrong(folder, capsys):
    model, _ = load_with_languages(str(folder / "model"), [f"gl={folder / 'gl'}"])
    assert model.language == "gl"
    file = folder / "gl/language_adapter.safetensors"
    model, _ = load_with_languages(str(folder / "model"), ["base", f"pt={file}"])
    assert model.language is None and set(model.language_adapters) == {"gl", "pt"}
    for arguments, reason in (
        (["--max_k", "0"], "max_k is 0: it must be at least 1"),
        (["--max_waiting", "10"], "max_waiting=10 is less than one request may hold"),
        (["--index", "nowhere"], "Cannot read the index"),
        (["--language", "pt"], "no adapter for the language 'pt'"),
        (["--language", "pt="], "--language 'pt=': give CODE"),
        (["--max_batch", "8"], "--max_batch is now --batch_size"),
        (["--allowed_host", "a*.org"], "the host 'a.*.org': a star stands for a whole name"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{reason}"):
            command.main([str(folder / "model"), *arguments])


# ------------------------------------------------------------------------------------------------------ real process


def ask(url: str, request: dict, timeout: float = 60) -> dict:
    """POSTs JSON; the server may say "ask again" as often as it likes."""
    message = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(message, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(float(error.headers["Retry-After"]))


@contextmanager
def server(log: Path, *arguments: str):
    """A real process on a free port, which writes to `log`; gives its URL and the process."""
    command = [sys.executable, "-m", "modeling_nrccr", "serve", *arguments, "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"running on (http://\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[1], process
    finally:
        process.kill()
        process.wait()


def health(url: str) -> dict:
    with urllib.request.urlopen(f"{url}/health") as answer:
        return json.load(answer)


def load(url: str, requests: list[tuple[str, dict]], clients: int = 50) -> list[dict]:
    """The answers, in their order, to requests (path and body) that so many clients ask."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda request: ask(url + request[0], request[1]), requests))


@pytest.mark.slow
def test_fifty_clients_lose_nothing_and_memory_is_flat(folder, parts, tmp_path):
    model, processor = parts
    pictures = list(map(picture_file, COLORS.values()))
    requests, expected = [], []
    texts = encode_texts(model, TEXTS, processor)
    images = encode_images(model, [Image.new("RGB", (40, 30), color) for color in COLORS.values()], processor)
    retriever = NrccrRetriever.load(folder / "index", *parts)
    for number in range(600):
        row, other = number % len(TEXTS), number % len(pictures)
        if number % 3 == 0:
            requests.append(("/search", {"text": TEXTS[row], "k": 2}))
            expected.append([hit.id for hit in retriever.search(texts[row], 2)])
        elif number % 3 == 1:
            requests.append(("/embed", {"texts": [TEXTS[row]] * (1 + number % 5)}))
            expected.append(texts[row].expand(1 + number % 5, -1))
        else:
            requests.append(("/embed", {"images": [pictures[other]]}))
            expected.append(images[other : other + 1])
    arguments = [str(folder / "model"), "--index", str(folder / "index"), "--max_waiting", "72"]
    with server(tmp_path / "log", *arguments) as (url, process):
        resident = []
        for _ in range(3):
            for answer, wanted in zip(load(url, requests), expected):
                if "hits" in answer:
                    assert [hit["id"] for hit in answer["hits"]] == wanted
                else:
                    (embeds,) = answer.values()
                    torch.testing.assert_close(torch.tensor(embeds), wanted, atol=1e-5, rtol=0)
            resident.append(psutil.Process(process.pid).memory_info().rss)
        assert resident[2] < 1.03 * resident[1] and resident[1] < 1.05 * resident[0], resident
        assert health(url)["waiting"] == 0 and health(url)["served"]["texts"]["largest_batch"] > 4


@pytest.mark.slow
def test_what_was_accepted_is_answered_before_it_stops(folder, parts, tmp_path):
    expected = encode_texts(parts[0], TEXTS, parts[1])
    with server(tmp_path / "log", str(folder / "model"), "--max_wait_ms", "2000") as (url, process):
        with ThreadPoolExecutor(len(TEXTS)) as pool:
            answers = [pool.submit(ask, f"{url}/embed", {"texts": [text]}) for text in TEXTS]
            while health(url)["waiting"] < len(TEXTS):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            embeds = [answer.result()["text_embeds"][0] for answer in answers]
        torch.testing.assert_close(torch.tensor(embeds), expected, atol=1e-5, rtol=0)
        assert process.wait(30) in (0, -signal.SIGTERM)
    with pytest.raises(urllib.error.URLError):
        health(url)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "modeling_nrccr.serving.service")
    with pytest.raises(ImportError, match='pip install "modeling_nrccr.serve."'):
        importlib.import_module("modeling_nrccr.serving.service")
