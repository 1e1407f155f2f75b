"""`nrccr push`: the folder that it writes is what is uploaded and what is loaded here."""

import json
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from modeling_nrccr.cli import push as push_command
from modeling_nrccr.publishing import push as push_to_hub
from tests.model.test_hub import PICKLED, publish
from tests.model.test_hub_by_name import CAPTIONS, embeds
from tests.support.hub_server import hub_server, use_hub


CARD = """---
language:
- en
- gl
license: apache-2.0
library_name: transformers
pipeline_tag: feature-extraction
model-index:
- name: demo
  results: []
---

# A model

```python
model = AutoModel.from_pretrained("demo", trust_remote_code=True)
model = SentenceTransformer("demo")
```
"""


@pytest.fixture
def trained(tmp_path):
    """A folder as `nrccr train` leaves it, with the paths of the machine that trained it, and what it gives."""
    folder = tmp_path / "demo"
    expected = publish(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "/home/me/.cache/nrccr/encoders/multilingual-e5-small"
    config["vision_config"]["_name_or_path"] = "/home/me/towers/tiny"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD)
    (folder / "metrics.json").write_text('{"settings": {}}')
    (folder / "search.html").write_text("<html>")
    return folder, load_file(expected)


def test_a_dry_run_writes_what_loads_and_nothing_pickled(trained, tmp_path, capsys):
    folder, expected = trained
    upload = tmp_path / "upload"
    push_command.main([str(folder), "--dry_run", str(upload)])
    assert "not uploaded" in capsys.readouterr().out
    names = {path.name for path in upload.rglob("*")}
    assert {
        "model.safetensors",
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "README.md",
        "metrics.json",
        "modeling_nrccr.py",
        "configuration_nrccr.py",
        "processing_nrccr.py",
        "modules.json",
        "sentence_bert_config.json",
    } <= names
    assert not [name for name in names if name.endswith(PICKLED)] and "search.html" not in names
    assert not [path for path in upload.rglob("*") if path.is_file() and push_to_hub.is_pickled(path)]
    model, processor = AutoModel.from_pretrained(upload).eval(), AutoProcessor.from_pretrained(upload)
    torch.testing.assert_close(embeds(model, processor), expected, atol=1e-6, rtol=0)
    sentences = torch.tensor(SentenceTransformer(str(upload), device="cpu").encode(CAPTIONS))
    torch.testing.assert_close(sentences, expected["text"], atol=1e-5, rtol=0)
    config = (upload / "config.json").read_text()
    assert "/home" not in config and "intfloat/multilingual-e5-small" in config
    card = ModelCard.load(upload / "README.md")
    assert 'from_pretrained("upload"' in card.text and 'SentenceTransformer("upload")' in card.text
    with pytest.raises(SystemExit, match="upload is there and not empty"):
        push_command.main([str(folder), "--dry_run", str(upload)])


def test_what_is_not_fit_is_refused_and_nothing_is_left(trained, tmp_path):
    folder, _ = trained
    upload = tmp_path / "upload"

    def refused(match: str):
        with pytest.raises(ValueError, match=match):
            push_to_hub.write_upload(folder, upload, "me/model")
        assert not [path for path in tmp_path.iterdir() if "upload" in path.name]

    for name, content in (("optimizer.pt", b""), ("notes.txt", pickle.dumps({"a": 1})), ("a/data.npy", b"x")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        refused(f"holds pickled files.*{name}")
        (folder / name).unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "weights.dat")
    refused("holds pickled files.*weights.dat")
    (folder / "weights.dat").unlink()
    (folder / "README.md").write_text(CARD.replace("license: apache-2.0\n", "").replace("library_name", "x"))
    refused("lacks license, library_name in its metadata")
    (folder / "README.md").write_text("# no metadata")
    refused("lacks language, license, library_name, pipeline_tag")
    (folder / "README.md").unlink()
    refused("has no README.md")
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").unlink()
    refused("holds no model")
    shutil.rmtree(folder)
    refused("holds no model")
    for arguments, reason in (
        ([], "name --repo_id, or a folder"),
        (["--dry_run", "x", "--private"], "--dry_run uploads nothing: leave out --private"),
        (["--model", "x"], "--model is now the first argument"),
        (["--base_model", "x"], "--base_model is now --base"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {reason}"):
            push_command.main([str(folder), *arguments])


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub that `push_to_hub` uploads to, by the LFS protocol: it does not speak Xet."""
    with hub_server() as server:
        monkeypatch.setattr(push_to_hub, "HfApi", lambda: HfApi(token=False))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        use_hub(monkeypatch, server)
        yield server


def test_what_was_pushed_is_loaded_by_its_id(trained, tmp_path, hub, capsys):
    folder, expected = trained
    push_command.main([str(folder), "--repo_id", "me/nrccr-gl", "--private"])
    assert f"{hub.endpoint}/me/nrccr-gl" in capsys.readouterr().out
    assert [(asked["name"], asked["visibility"]) for asked in hub.created] == [("nrccr-gl", "private")]
    first, last = hub.uploads
    assert last[1:] == ("main", "Upload the model card", ["README.md"])
    assert "README.md" not in first[3] and {"model.safetensors", "modeling_nrccr.py", "modules.json"} <= set(first[3])
    card = ModelCard(hub.commits[hub.branches["me/nrccr-gl"]["main"]]["README.md"].decode())
    assert 'AutoModel.from_pretrained("me/nrccr-gl"' in card.text and card.data.model_name in (None, "nrccr-gl")
    options = {"cache_dir": tmp_path / "cache"}
    model = AutoModel.from_pretrained("me/nrccr-gl", **options).eval()
    processor = AutoProcessor.from_pretrained("me/nrccr-gl", **options)
    torch.testing.assert_close(embeds(model, processor), expected, atol=1e-6, rtol=0)


def test_pushed_again_it_replaces_files_and_a_branch_leaves_main_alone(trained, hub):
    folder, _ = trained
    hub.serve_folder("me/nrccr-gl", folder)
    files = hub.commits[hub.branches["me/nrccr-gl"]["main"]]
    shard = "model-00001-of-00002.safetensors"
    main = hub.add_commit("me/nrccr-gl", "main", files | {shard: b"", "old.py": b"", "notes.txt": b"mine"})
    push_command.main([str(folder), "--repo_id", "me/nrccr-gl", "--revision", "v2"])
    branches = hub.branches["me/nrccr-gl"]
    pushed = hub.commits[branches["v2"]]
    assert branches["main"] == main and shard in hub.commits[main]
    assert shard not in pushed and "old.py" not in pushed and pushed["notes.txt"] == b"mine"
    push_command.main([str(folder), "--repo_id", "me/nrccr-gl"])
    assert shard not in hub.commits[branches["main"]] and not hub.created
