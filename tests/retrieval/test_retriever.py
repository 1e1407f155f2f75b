"""The retriever over a model that sees the mean colour of a picture and knows three colour words."""

import contextlib
import json
import os
import shutil
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from modeling_nrccr.media import list_images
from modeling_nrccr.retrieval.encoding import encode_images
from modeling_nrccr.retrieval.retriever import Hit, NrccrRetriever
from tests.support import WordProcessor, tiny_model, toy_rows


COLORS = {"vermello": (250, 10, 20), "verde": (10, 250, 20), "azul": (20, 10, 250)}


class ColorProcessor:
    def __init__(self):
        self.calls = 0

    def __call__(self, text=None, images=None, return_tensors="pt"):
        self.calls += 1
        if images is not None:
            pixels = [
                list(image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) for image in images
            ]
            return BatchFeature({"pixel_values": torch.tensor(pixels).float()})
        return BatchFeature({"input_ids": torch.tensor([COLORS[word] for word in text]).float()})


class ColorModel(torch.nn.Module):
    device = torch.device("cpu")

    def __init__(self, weight=None, scale=1.0):
        super().__init__()
        self.weight, self.scale = torch.eye(3) if weight is None else weight, scale
        self.config = types.SimpleNamespace(projection_dim=self.weight.shape[1])

    def embed(self, values):
        return types.SimpleNamespace(pooler_output=torch.nn.functional.normalize(values @ self.weight, dim=-1))

    def get_text_features(self, input_ids):
        return self.embed(input_ids * self.scale)

    def get_image_features(self, pixel_values):
        return self.embed(pixel_values)


@pytest.fixture
def retriever():
    return NrccrRetriever(ColorModel(), ColorProcessor())


@pytest.fixture
def gallery(tmp_path):
    folder = tmp_path / "gallery"
    (folder / "more").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    Image.new("RGB", (9, 5), COLORS["vermello"]).save(folder / "red.png")
    Image.new("RGB", (5, 9), COLORS["verde"]).save(folder / "more" / "GREEN.JPG", "JPEG")
    Image.new("RGB", (5, 9), COLORS["azul"]).save(folder / "more" / "blue.webp", lossless=True)
    Image.new("RGB", (5, 9), COLORS["azul"]).save(folder / ".thumbnails" / "blue.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_finds_the_picture_of_each_query(retriever, gallery):
    assert retriever.add(gallery) == [] and len(retriever) == 3
    for query, id in (("vermello", "red.png"), ("verde", "more/GREEN.JPG"), ("azul", "more/blue.webp")):
        hits = retriever.search(query, k=2)
        assert [hit.id for hit in hits][:1] == [id] and len(hits) == 2
        assert hits[0].score > 0.98 > hits[1].score and hits[0].metadata == {"path": str(gallery / id)}
    assert retriever.search(Image.new("RGB", (3, 3), COLORS["azul"]), k=1)[0].id == "more/blue.webp"
    assert retriever.search(torch.tensor([0.0, 1.0, 0.0]), k=1)[0].id == "more/GREEN.JPG"
    assert len(retriever.search("azul", k=99)) == 3
    for query in (torch.tensor([0, 7, 0]), np.array([0.0, 7.0, 0.0])):  # scores are cosines whatever its length
        (hit,) = retriever.search(query, k=np.int64(1))
        assert hit.id == "more/GREEN.JPG" and 0.98 < hit.score <= 1.0001
    with pytest.raises(ValueError, match="ColorModel has no languages to choose from, got 'gl'"):
        retriever.search("azul", language="gl")


def test_adds_pictures_with_ids_and_metadata_in_batches(retriever):
    images = [Image.new("RGB", (2, 2), color) for color in COLORS.values()]
    retriever.add(images, ids=[7, 8, 9], metadata=[{"title": name} for name in COLORS], batch_size=2)
    assert retriever.processor.calls == 2
    retriever.add(images)
    assert retriever.ids == [7, 8, 9, "3", "4", "5"]
    assert retriever.search("verde", k=1) == [Hit(8, pytest.approx(1.0), {"title": "verde"})]


@pytest.mark.parametrize(
    "images, settings, message",
    [
        ([Image.new("RGB", (1, 1))] * 2, {"ids": ["a", "a"]}, "Row 1: the id 'a' is in the gallery already"),
        ([Image.new("RGB", (1, 1))], {"ids": ["red.png"]}, "Row 0: the id 'red.png' is in the gallery already"),
        ([Image.new("RGB", (1, 1))] * 2, {"ids": ["a"]}, "2 pictures, 1 ids"),
        ([], {}, "None of 0 pictures can be read"),
    ],
)
def test_refused_pictures_leave_the_gallery_as_it_was(retriever, gallery, images, settings, message):
    retriever.add(gallery)
    with pytest.raises(ValueError, match=message):
        retriever.add(images, **settings)
    assert len(retriever) == 3 and retriever.search("azul", k=1)[0].id == "more/blue.webp"


def test_corrupt_pictures_are_skipped_and_listed(retriever, gallery):
    whole = (gallery / "red.png").read_bytes()
    (gallery / "cut.png").write_bytes(whole[:45])
    (gallery / "text.jpg").write_text("no picture at all")
    (gallery / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    skipped = retriever.add(gallery)
    assert sorted(s.id for s in skipped) == ["cut.png", "program.png", "text.jpg"] and all(s.reason for s in skipped)
    assert sorted(retriever.ids) == ["more/GREEN.JPG", "more/blue.webp", "red.png"]
    assert retriever.search("azul", k=1)[0].id == "more/blue.webp"
    with pytest.raises(ValueError, match="Row 0: cannot read the picture 'cut.png'"):
        NrccrRetriever(retriever.model, retriever.processor).add(gallery, strict=True)
    with pytest.raises(ValueError, match="None of 1 pictures can be read; the first, .*text.jpg"):
        retriever.add([gallery / "text.jpg"])


def test_one_bad_file_skips_itself_alone(retriever, gallery):
    """Its name, its processor or its embedding may be bad; what is there already counts."""
    latin = Path(os.fsdecode(os.fsencode(gallery) + b"/caf\xe9.png"))
    shutil.copy(gallery / "red.png", latin)
    (gallery / "deleted.png").symlink_to(gallery / "gone.png")
    Image.new("RGB", (2, 2), (1, 1, 1)).save(gallery / "odd.png")
    Image.new("RGB", (2, 2), (2, 2, 2)).save(gallery / "odd2.png")
    processor, model = ColorProcessor.__call__, ColorModel.get_image_features

    def picky(self, images=None, **options):
        if any(image.getpixel((0, 0)) == (1, 1, 1) for image in images):
            raise RuntimeError("of this picture")
        return processor(self, images=images, **options)

    def dizzy(self, pixel_values):
        return model(self, pixel_values.masked_fill(pixel_values == 2, torch.nan))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ColorProcessor, "__call__", picky)
        patched.setattr(ColorModel, "get_image_features", dizzy)
        skipped = dict(retriever.add(gallery))
        assert skipped.pop(r"caf\xe9.png").startswith("its name is not UTF-8: rename it")
        assert skipped == {
            "deleted.png": f"a broken link ({gallery / 'gone.png'})",
            "odd.png": "of this picture",
            "odd2.png": "its embedding is not finite; check the model's weights",
        }
        assert sorted(retriever.ids) == ["more/GREEN.JPG", "more/blue.webp", "red.png"]
        again = retriever.add(gallery, skip_existing=True)  # a nightly job: nothing new but what is broken
        assert {"odd.png", "odd2.png"} < {id for id, _ in again} and len(retriever) == 3
        for id, message in (("odd.png", "of this picture"), ("odd2.png", "not finite"), ("red.png", None)):
            with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
                retriever.add([gallery / id], ["new"], strict=True)
    assert retriever.search("azul", k=1)[0].id == "more/blue.webp"
    assert retriever.add([latin], ["café"], [{}]) == [] and "café" in retriever.ids
    for change in ({"ids": [latin.name]}, {"metadata": [{"path": str(latin)}]}):
        with pytest.raises(ValueError, match="Row 0: the (id|metadata) .*udce9.* cannot be stored"):
            retriever.add_embeds(**{"embeds": torch.eye(3)[:1], "ids": ["x"]} | change)
    with pytest.raises(ValueError, match="None of 1 pictures can be read; the first, .*caf.*name is not UTF-8"):
        NrccrRetriever(retriever.model, retriever.processor).add([latin])


def test_a_gallery_without_pictures_is_named(retriever, tmp_path):
    with pytest.raises(ValueError, match=f"No pictures under '{tmp_path}'.* .png, "):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="'nowhere' is not a folder"):
        retriever.add("nowhere")
    with pytest.raises(ValueError, match="gallery is empty"):
        retriever.search("azul")


@pytest.mark.parametrize(
    "query, k, message",
    [
        ("  ", 1, "The query is '  ': a text that is not blank"),
        (None, 1, "The query is None"),
        ("azul \ud83d", 1, "The query holds '.ud83d' at character 5"),
        ("azul", 0, "at least 1, got 0"),
        ("azul", True, "at least 1, got True"),
        ("azul", 2.5, "at least 1, got 2.5"),
        (torch.ones(4), 1, r"shape \(4,\), the gallery's are \(3,\)"),
        (torch.tensor([0.0, float("nan"), 1.0]), 1, "embedding has the norm nan, so no direction"),
        (np.zeros(3), 1, "embedding has the norm 0"),
    ],
)
def test_bad_queries_are_named(retriever, gallery, query, k, message):
    retriever.add(gallery)
    with pytest.raises(ValueError, match=message):
        retriever.search(query, k)


def test_saves_and_loads(retriever, gallery, tmp_path):
    retriever.add(gallery)
    retriever.save(tmp_path / "index")
    retriever.add([Image.new("RGB", (2, 2), "white")], ids=["branco"])
    retriever.save(tmp_path / "index")
    assert len(list((tmp_path / "index").glob("[!.]*"))) == 3  # nothing is left of the first save
    loaded = NrccrRetriever.load(tmp_path / "index", retriever.model, retriever.processor)
    assert loaded.search("azul", k=4) == retriever.search("azul", k=4) and loaded.ids[-1] == "branco"


def test_a_crash_while_saving_leaves_the_index_that_was_there(retriever, gallery, tmp_path, monkeypatch):
    retriever.add(gallery)
    retriever.save(tmp_path / "index")
    retriever.remove(["red.png"])

    def crash(*_):
        raise OSError("no space left")

    for where, name in (
        ("modeling_nrccr.files.os", "replace"),
        ("modeling_nrccr.retrieval.index_faiss.pq", "write_table"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"{where}.{name}", crash)
            with pytest.raises(OSError, match="no space left"):
                retriever.save(tmp_path / "index")
        assert len(NrccrRetriever.load(tmp_path / "index", retriever.model, retriever.processor)) == 3
    retriever.save(tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 4  # with the lock


@pytest.mark.parametrize(
    "module, index, hint", [("faiss", None, "retrieval"), ("pymilvus", "http://localhost:1", "milvus")]
)
def test_a_missing_extra_is_named(monkeypatch, module, index, hint):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"modeling_nrccr.retrieval.index_{'milvus' if index else 'faiss'}", raising=False)
    with pytest.raises(ImportError, match=f"pip install 'modeling_nrccr.{hint}.'"):
        NrccrRetriever(ColorModel(), ColorProcessor(), index)


def test_an_index_of_another_model_is_refused_and_another_text_side_is_not(retriever, gallery, tmp_path):
    retriever.add(gallery)
    retriever.save(tmp_path)
    NrccrRetriever.load(tmp_path, ColorModel(scale=0.5), retriever.processor)
    other = ColorModel(weight=torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    with pytest.raises(ValueError, match="made by another model"):
        NrccrRetriever.load(tmp_path, other, retriever.processor)


def test_a_query_is_fused_with_its_translation(retriever, gallery):
    retriever.add(gallery)
    for weight, best in ((0.0, "more/blue.webp"), (0.4, "more/blue.webp"), (0.6, "red.png"), (1.0, "red.png")):
        assert retriever.search("azul", 1, translation="vermello", translation_weight=weight)[0].id == best
    both = {hit.id: hit.score for hit in retriever.search("azul", 3, translation="vermello")}
    assert both["red.png"] == pytest.approx(both["more/blue.webp"], abs=1e-5) and both["more/GREEN.JPG"] < 0.2
    with pytest.raises(ValueError, match="' ': a text that is not blank"):
        retriever.search("azul", translation=" ")


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, float("nan"), "a\nb", 1j])
def test_what_cannot_be_filtered_by_is_named(retriever, gallery, value):
    retriever.add(gallery)
    with pytest.raises(ValueError, match="Cannot filter by 'path': "):
        retriever.search("azul", filter={"path": value})


def test_an_interrupted_call_is_repeated(retriever, gallery):
    retriever.add(gallery / "more")
    calls = retriever.processor.calls
    files = list_images(gallery)
    ids = [path.name if path.parent.name == "more" else f"new/{path.name}" for path in files]
    assert retriever.add(files, ids, skip_existing=True) == retriever.add(files, ids, skip_existing=True) == []
    assert sorted(retriever.ids) == ["GREEN.JPG", "blue.webp", "new/red.png"]
    assert retriever.processor.calls == calls + 1 and retriever.search("vermello", 1)[0].id == "new/red.png"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids": ["a", 2.5]}, "Row 1: an id is a text or an integer, got 2.5"),
        ({"metadata": [{}, {"a": {1}}]}, "Row 1: the metadata .* cannot be stored as JSON"),
        ({"metadata": [{}, {"a": float("nan")}]}, "Row 1: the metadata .* cannot be stored as JSON"),
        ({"metadata": [{}, None]}, "Row 1: the metadata None cannot be stored as JSON: it is not a dict"),
        ({"ids": ["a"]}, "2 embeddings, 1 ids and 2 metadata"),
    ],
)
def test_bad_rows_are_named(retriever, change, message):
    arguments = {"embeds": torch.eye(3)[:2], "ids": ["a", "b"], "metadata": [{}, {}]} | change
    with pytest.raises(ValueError, match=message):
        retriever.add_embeds(**arguments)
    assert len(retriever) == 0


def test_data_sets_are_added_by_picture(retriever, gallery):
    paths = [str(path) for path in list_images(gallery)]
    columns = {
        "image_id": ["green", "green", "blue", "red", "gone"],
        "image": [paths[0], paths[0], paths[1], paths[2], None],
        "target_caption": ["verde", "verde!", "azul", "vermello", None],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    assert [skipped.id for skipped in retriever.add(dataset)] == ["gone"]
    assert retriever.search("azul", 1) == [Hit("blue", pytest.approx(1.0, abs=0.01), {"target_caption": "azul"})]
    assert len(retriever) == 3
    with pytest.raises(
        ValueError, match="has the columns a: it needs image_id, and one of image, video, visual_feats"
    ):
        retriever.add(datasets.Dataset.from_dict({"a": [1]}))


def test_features_are_added_and_told_apart_by_model(tmp_path):
    rows = toy_rows(5)
    dataset = datasets.Dataset.from_dict(
        {"image_id": [row["image_id"] for row in rows], "visual_feats": [[row["image"]] for row in rows]}
    )
    retriever = NrccrRetriever(tiny_model(), WordProcessor())
    retriever.add(dataset, batch_size=2)
    retriever.save(tmp_path)
    query = encode_images(retriever.model, [rows[3]["image"]], WordProcessor())[0]
    loaded = NrccrRetriever.load(tmp_path, tiny_model(), WordProcessor())
    assert loaded.search(query, 1) == [Hit("toy/3", pytest.approx(1.0), {})]
    with pytest.raises(ValueError, match="made by another model"):
        NrccrRetriever.load(tmp_path, tiny_model(seed=1), WordProcessor())


def test_a_broken_index_is_named(retriever, gallery, tmp_path):
    with pytest.raises(ValueError, match="Cannot read the index .*index.json"):
        NrccrRetriever.load(tmp_path / "none", retriever.model, retriever.processor)
    retriever.add(gallery)
    retriever.save(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    for change, message in (({"version": 1}, "format 1, this version reads 2"), ({"dim": 4}, ""), ({"files": 3}, "")):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=f"Cannot read the index .*{message}"):
            NrccrRetriever.load(tmp_path, retriever.model, retriever.processor)
    (tmp_path / "index.json").write_text(json.dumps(index))
    for name in index["files"]:
        whole = (tmp_path / name).read_bytes()
        for broken in (whole[:-9], whole[:40] + b"x" + whole[41:], b""):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(ValueError, match=f"Cannot read the index .*{name} is not the file that was written"):
                NrccrRetriever.load(tmp_path, retriever.model, retriever.processor)
        (tmp_path / name).write_bytes(whole)
    assert len(NrccrRetriever.load(tmp_path, retriever.model, retriever.processor)) == 3
