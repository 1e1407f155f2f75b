"""A published model is loaded by its id, from a stand-in for the Hub: with this package and in a venv without it."""

import json
import os
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

from modeling_nrccr import NrccrModel, NrccrProcessor
from modeling_nrccr.publishing.sentence_transformers_files import write_sentence_transformers_files
from tests.model.test_hub import FRESH, publish
from tests.support.hub_server import hub_server, use_hub


ID = "someone/nrccr-cs"
CAPTIONS = ["un can corre", "can"]
PICTURE = Image.new("RGB", (24, 24), (200, 30, 90))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with all that is published, and the embeddings that it gives."""
    folder = tmp_path_factory.mktemp("published") / "model"
    expected = publish(folder)
    write_sentence_transformers_files(folder)
    return folder, expected


@pytest.fixture(scope="module")
def hub(published):
    """It at `ID`: whole on `main`, in shards on the branch `sharded`, with other weights on `old`."""
    folder, _ = published
    with hub_server() as server:
        server.serve_folder(ID, folder)
        model = NrccrModel.from_pretrained(folder)
        model.save_pretrained(folder.parent / "sharded", max_shard_size="40KB")
        server.serve_folder(ID, folder.parent / "sharded", "sharded")
        with torch.no_grad():
            model.text_projection.dense.bias.add_(1)
        model.save_pretrained(folder.parent / "old")
        server.serve_folder(ID, folder.parent / "old", "old")
        yield server


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """This process downloads from the stand-in, into an empty cache; gives what `from_pretrained` needs for that."""
    use_hub(monkeypatch, hub)
    hub.log.clear()
    return {"cache_dir": tmp_path / "cache"}


@torch.no_grad()
def embeds(model, processor) -> dict[str, torch.Tensor]:
    texts, images = processor(text=CAPTIONS, return_tensors="pt"), processor(images=[PICTURE], return_tensors="pt")
    return {
        "text": model.get_text_features(**texts).pooler_output.float(),
        "image": model.get_image_features(**images).pooler_output.float(),
    }


def test_by_its_id_where_the_package_is(published, hub, here):
    assert AutoConfig.from_pretrained(ID, **here).model_type == "nrccr"
    model, processor = AutoModel.from_pretrained(ID, **here).eval(), AutoProcessor.from_pretrained(ID, **here)
    assert type(model) is NrccrModel and type(processor) is NrccrProcessor
    torch.testing.assert_close(embeds(model, processor), load_file(published[1]), atol=1e-6, rtol=0)
    assert f"GET /api/models/{ID}" in hub.log and not [line for line in hub.log if ".bin" in line]
    asked = len(hub.log)
    AutoModel.from_pretrained(ID, **here, local_files_only=True)
    assert len(hub.log) == asked


def test_shards_are_put_together(published, here, hub):
    shards = [line for line in hub.commits[hub.branches[ID]["sharded"]] if line.endswith(".safetensors")]
    assert len(shards) > 3
    model = AutoModel.from_pretrained(ID, revision="sharded", **here).eval()
    processor = AutoProcessor.from_pretrained(ID, **here)
    torch.testing.assert_close(embeds(model, processor), load_file(published[1]), atol=1e-6, rtol=0)


def test_a_revision_is_pinned_by_branch_or_commit(published, here, hub):
    weights = {}
    for revision in (None, "old", hub.branches[ID]["old"], hub.branches[ID]["main"]):
        options = {"revision": revision} if revision else {}
        model = AutoModel.from_pretrained(ID, **options, **here)
        weights[revision] = model.text_projection.dense.bias
    main, by_branch, by_commit, main_by_commit = weights.values()
    assert torch.equal(by_branch, by_commit) and torch.equal(main, main_by_commit)
    torch.testing.assert_close(by_branch, main + 1)
    with pytest.raises(OSError, match="no-such-branch"):
        AutoModel.from_pretrained(ID, revision="no-such-branch", **here)
    with pytest.raises(OSError, match="someone/else"):
        AutoModel.from_pretrained("someone/else", **here)


def test_dtype_and_device_map(published, here):
    processor, expected = AutoProcessor.from_pretrained(ID, **here), load_file(published[1])
    half = AutoModel.from_pretrained(ID, dtype=torch.bfloat16, **here).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(embeds(half, processor), expected, atol=0.02, rtol=0)
    with torch.no_grad():
        scores = half(**processor(text=CAPTIONS, images=[PICTURE], return_tensors="pt")).logits_per_text
    assert scores.dtype == torch.bfloat16 and scores.isfinite().all()
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        model = AutoModel.from_pretrained(ID, device_map=device_map, **here).eval()
        torch.testing.assert_close(embeds(model, processor), expected, atol=1e-6, rtol=0)


def test_pipelines_take_the_processor(published, here):
    """By the model's name alone a pipeline loads the bare tokenizer and image processor, which put no prefix before a
    text and do not pad a picture to a square; so the processor stands in the place of both."""
    model, processor = AutoModel.from_pretrained(ID, **here).eval(), AutoProcessor.from_pretrained(ID, **here)
    pictures = [PICTURE, Image.linear_gradient("L").convert("RGB").crop((0, 0, 90, 256))]
    labels = ["un can corre", "dog", "a"]
    classify = pipeline(
        "zero-shot-image-classification", model=model, tokenizer=processor, image_processor=processor, device="cpu"
    )
    with torch.no_grad():
        logits = model(**processor(text=labels, images=pictures, return_tensors="pt")).logits_per_image
    for batch_size in (1, 2):
        found = classify(pictures, candidate_labels=labels, hypothesis_template="{}", batch_size=batch_size)
        for row, probabilities in zip(found, logits.softmax(-1).tolist()):
            scores = {part["label"]: part["score"] for part in row}
            assert scores == pytest.approx(dict(zip(labels, probabilities)), abs=1e-5)
            assert [part["score"] for part in row] == sorted(scores.values(), reverse=True)
    extract = pipeline("feature-extraction", model=model, tokenizer=processor, device="cpu")
    found = torch.cat(extract(CAPTIONS, return_tensors=True))
    torch.testing.assert_close(found, load_file(published[1])["text"], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="AutoModelForZeroShotImageClassification"):
        pipeline("zero-shot-image-classification", model=str(published[0]), device="cpu")


def test_the_stand_in_gives_ranges(hub):
    content = hub.commits[hub.branches[ID]["main"]]["model.safetensors"]
    request = urllib.request.Request(f"{hub.endpoint}/{ID}/resolve/main/model.safetensors")
    for asked, part in (("bytes=7-11", content[7:12]), ("bytes=100-", content[100:])):
        request.add_header("Range", asked)
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 206 and answer.read() == part
            assert answer.headers["Content-Range"].endswith(f"/{len(content)}")


# --------------------------------------------------------------------------------------------- other environments


EVERY_WAY = """
import json, sys
import torch
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, pipeline

name, expected, old = sys.argv[1], load_file(sys.argv[2]), sys.argv[3]
options = {"trust_remote_code": True}
captions, picture = ["un can corre", "can"], Image.new("RGB", (24, 24), (200, 30, 90))
processor = AutoProcessor.from_pretrained(name, **options)

def distance(**more):
    model = AutoModel.from_pretrained(name, **options, **more).eval()
    with torch.no_grad():
        text = model.get_text_features(**processor(text=captions, return_tensors="pt")).pooler_output
        image = model.get_image_features(**processor(images=[picture], return_tensors="pt")).pooler_output
    return max((text.float() - expected["text"]).abs().max().item(), (image - expected["image"]).abs().max().item())

model = AutoModel.from_pretrained(name, **options).eval()
classify = pipeline("zero-shot-image-classification", model=model, tokenizer=processor, image_processor=processor,
                    device="cpu")
found = classify(picture, candidate_labels=captions, hypothesis_template="{}")
scores = {part["label"]: part["score"] for part in found}
with torch.no_grad():
    logits = model(**processor(text=captions, images=[picture], return_tensors="pt")).logits_per_image
sentences = SentenceTransformer(name, device="cpu", **options)
print(json.dumps({
    "main": distance(),
    "sharded": distance(revision="sharded"),
    "old": distance(revision=old),
    "half": distance(dtype=torch.bfloat16),
    "device_map": distance(device_map="cpu"),
    "pipeline": max(abs(scores[label] - p) for label, p in zip(captions, logits.softmax(-1)[0].tolist())),
    "sentence_transformers": (torch.tensor(sentences.encode(captions)) - expected["text"]).abs().max().item(),
}))
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The interpreter of a venv with this one's libraries and without this package: a .pth file does not pass an
    editable install on."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False)
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(folder / "bin/python")


def run(python: str, code: str, arguments: list[str], hub, tmp_path: Path) -> str:
    """Standard output of a process that knows the Hub by `HF_ENDPOINT` alone."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "OMP_NUM_THREADS": "1"}
    script = tmp_path / "script.py"
    script.write_text(code)
    result = subprocess.run(
        [python, str(script), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["trust_remote_code", "import_first"])
def test_by_its_id_in_another_environment(published, hub, bare_python, tmp_path, way):
    python, flags = (bare_python, []) if way == "trust_remote_code" else (sys.executable, ["import_first"])
    distances = json.loads(run(python, FRESH, [ID, str(published[1]), *flags], hub, tmp_path))
    assert max(distances) < 1e-6


@pytest.mark.slow
def test_every_way_of_loading_without_the_package(published, hub, bare_python, tmp_path):
    found = json.loads(run(bare_python, EVERY_WAY, [ID, str(published[1]), hub.branches[ID]["old"]], hub, tmp_path))
    old, half = found.pop("old"), found.pop("half")
    assert old > 0.1 and 0 < half < 0.02
    assert max(found.values()) < 1e-5, found
