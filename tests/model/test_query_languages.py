"""The language of a query is an argument: threads ask in different ones, and nothing of the model changes."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from torch.nn.init import normal_

from modeling_nrccr import FeatureCache, encode_images, encode_texts
from modeling_nrccr.retrieval.retriever import NrccrRetriever
from tests.support import WordProcessor, tiny_model


LANGUAGES = ("xx", "yy", None)  # linear, LoRA, the model's own text side
TEXTS = ["palabra1 palabra5 palabra7", "palabra2", "palabra3 palabra9", "word1 word2"]


@pytest.fixture
def model():
    model = tiny_model(text_head="pooling", teacher_view="source")
    for language, kind in (("xx", "linear"), ("yy", "lora")):
        model.add_language(language, kind=kind, rank=3, layers=2)
        for parameter in model.language_weights(language).values():
            normal_(parameter, std=0.3)
    return model


def state(model):
    return (
        model.language,
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


def test_each_text_is_read_by_its_own_language(model, word_processor):
    alone = {}
    for language in LANGUAGES:
        with model.using_language(language):
            alone[language] = encode_texts(model, TEXTS, word_processor)
        torch.testing.assert_close(encode_texts(model, TEXTS, word_processor, languages=language), alone[language])
    texts, spoken = TEXTS * 3, [language for language in LANGUAGES for _ in TEXTS]  # equal texts are not one
    expected = torch.cat(list(alone.values()))
    assert (expected[: len(TEXTS)] - expected[-len(TEXTS) :]).abs().max() > 0.05
    for size in (None, 5):
        found = encode_texts(model, iter(texts), word_processor, size, languages=spoken)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    model.set_language("xx")  # the default; None is not
    torch.testing.assert_close(encode_texts(model, TEXTS, word_processor), alone["xx"])
    torch.testing.assert_close(encode_texts(model, TEXTS, word_processor, languages=None), alone[None])

    model.text_tower.freeze_below(2)  # what LoRA is in comes after the boundary
    cache = FeatureCache(model, word_processor)
    cache.add_texts(TEXTS)
    found = encode_texts(model, texts, cache, languages=spoken)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "texts, languages, message",
    [
        ("can", "xx", "takes a list of texts, got 'can'"),
        (["can", None], "xx", "text row 1 is None"),
        (["can", " "], "xx", "text row 1 is ' '"),
        (["a much longer text", "\udc80"], "xx", r"text row 1 holds '\\udc80' at character 0"),
        (["can"], "zz", "no adapter for the language 'zz'"),
        (["can"], [None, "xx"], "2 languages for 1 texts"),
    ],
)
def test_bad_texts_and_languages_are_named(model, word_processor, texts, languages, message):
    with pytest.raises(ValueError, match=message):
        encode_texts(model, texts, word_processor, languages=languages)


def test_an_error_leaves_the_model_as_it_was(model, word_processor):
    model.train()
    model.text_head.eval()
    before = state(model)
    encode_texts(model, TEXTS, word_processor, languages="yy")
    assert state(model) == before
    with pytest.raises(RuntimeError):
        encode_images(model, [torch.zeros(13), torch.zeros(12)], WordProcessor())
    with pytest.raises(RuntimeError):
        encode_texts(model, ["word " * 99], word_processor, languages="xx")
    assert state(model) == before


def test_a_threaded_application_answers_each_in_its_language(model, word_processor):
    """A query alone, or beside its translation, which is asked of the model's own text side."""
    retriever = NrccrRetriever(model.set_language("xx").train(), word_processor)
    generator = np.random.default_rng(0)
    retriever.add_embeds(
        torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(40, 11))), dim=1), range(40)
    )

    class App(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps([(hit.id, hit.score) for hit in retriever.search(**asked)]).encode()
            self.send_response(200)
            self.send_header("Content-Length", len(answer))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    requests = []
    for number in range(120):
        requests.append({"query": TEXTS[number % 4], "k": 5, "language": LANGUAGES[number % 3]})
        if number % 2:
            requests[-1]["translation"] = TEXTS[-1]
        if number % 5 == 0:
            del requests[-1]["language"]  # the active one
    alone = [[[hit.id, pytest.approx(hit.score, abs=1e-5)] for hit in retriever.search(**asked)] for asked in requests]
    before = state(model)
    server = ThreadingHTTPServer(("127.0.0.1", 0), App)
    Thread(target=server.serve_forever, daemon=True).start()

    def ask(asked):
        url = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(url, json.dumps(asked).encode(), timeout=60) as answer:
            return json.load(answer)

    try:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, requests))
    finally:
        server.shutdown()
        server.server_close()
    wrong = [asked for asked, answer, expected in zip(requests, answers, alone) if answer != expected]
    assert not wrong and state(model) == before
