"""A checkpoint loads anywhere: in a process that cannot import this package, from another folder, with no cache."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_nrccr.processing_nrccr import NrccrProcessor, NrccrTextProcessor
from tests.support import tiny_model


TOWER = {"model_type": "efficientnet_lite", "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_size": 16}
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")

FRESH = """
import json, sys
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

package = "modeling_nrccr"
if "import_first" in sys.argv:
    import modeling_nrccr
    options = {}
else:
    try:
        import modeling_nrccr
        sys.exit("the package is importable here: this test would prove nothing")
    except ImportError:
        options = {"trust_remote_code": True}
folder = sys.argv[1]
assert AutoConfig.from_pretrained(folder, **options).model_type == "nrccr"
model = AutoModel.from_pretrained(folder, **options).eval()
processor = AutoProcessor.from_pretrained(folder, **options)
expected = load_file(sys.argv[2])
picture = Image.new("RGB", (24, 24), (200, 30, 90))
with torch.no_grad():
    text = model.get_text_features(**processor(text=["un can corre", "can"], return_tensors="pt")).pooler_output
    image = model.get_image_features(**processor(images=[picture], return_tensors="pt")).pooler_output
print(json.dumps([(text - expected["text"]).abs().max().item(), (image - expected["image"]).abs().max().item()]))
"""


def publish(folder: Path) -> Path:
    """A tiny model and processor in `folder`, and beside it what they give."""
    from PIL import Image

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "dog", "un", "can", "corre"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    processor = NrccrProcessor(tokenizer, ViTImageProcessorPil(size={"height": 32, "width": 32}))
    model = tiny_model(vision_config=TOWER, visual_feat_dim=None)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with torch.no_grad():
        text = model.get_text_features(**processor(text=["un can corre", "can"], return_tensors="pt")).pooler_output
        pixels = processor(images=[Image.new("RGB", (24, 24), (200, 30, 90))], return_tensors="pt")
        image = model.get_image_features(**pixels).pooler_output
    expected = folder.with_suffix(".expected.safetensors")
    save_file({"text": text, "image": image}, expected)
    return expected


def test_what_is_published_holds_code_and_no_pickled_file(tmp_path):
    publish(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").rglob("*")}
    assert {
        "modeling_nrccr.py",
        "configuration_nrccr.py",
        "processing_nrccr.py",
        "modeling_efficientnet_lite.py",
    } <= names
    assert not [name for name in names if name.endswith(PICKLED)]
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_nrccr.NrccrConfig", "AutoModel": "modeling_nrccr.NrccrModel"}
    assert "model.safetensors" in names and load_file(tmp_path / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["trust_remote_code", "import_first"])
def test_loads_in_another_environment(tmp_path, way):
    expected = publish(tmp_path / "model")
    moved = Path(shutil.move(tmp_path / "model", tmp_path / "elsewhere"))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    python, arguments = sys.executable, ["import_first"]
    if way == "trust_remote_code":
        # a venv of its own with this one's installed libraries; an editable install is not inherited by a .pth file
        venv.create(tmp_path / "venv", with_pip=False)
        python, arguments = str(tmp_path / "venv/bin/python"), []
        site = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
        Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    result = subprocess.run(
        [python, str(script), str(moved), str(expected), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert max(json.loads(result.stdout.strip().splitlines()[-1])) < 1e-6


def test_import_first_finds_each_processor_by_its_name(tmp_path):
    from transformers import AutoProcessor

    publish(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert type(processor) is NrccrProcessor
    NrccrTextProcessor(processor.tokenizer).save_pretrained(tmp_path / "text")
    tiny_model().config.save_pretrained(tmp_path / "text")
    text_only = AutoProcessor.from_pretrained(tmp_path / "text")
    assert type(text_only) is NrccrTextProcessor
    with pytest.raises(ValueError, match="no image processor"):
        text_only(images=["a.png"])
