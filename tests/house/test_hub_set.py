"""Directly in `modeling_nrccr/` stands what a published model carries, and nothing else."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_nrccr import NrccrTextProcessor, encode_texts, join_text_sides
from modeling_nrccr.open_clip import OpenClipImageProcessor
from tests.support import ROOT, tiny_model


TEXTS = ["un can corre", "a dog"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of two text sides with a language, its processor, an image processor of open_clip; what `gl` reads."""
    folder = tmp_path_factory.mktemp("saved")
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "dog", "un", "can", "corre"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizers = [PreTrainedTokenizerFast(tokenizer_object=backend, **special) for _ in range(3)]
    *processors, alone = (NrccrTextProcessor(tokenizer, max_text_length=16) for tokenizer in tokenizers)
    model, processor = tiny_model(seed=1), join_text_sides(*processors)
    torch.nn.init.normal_(model.add_language("gl").update.weight)
    model.with_source_text_side(tiny_model())
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    alone.save_pretrained(folder / "text")
    OpenClipImageProcessor().save_pretrained(folder / "pictures")
    return folder, encode_texts(model, TEXTS, processor, languages="gl")


def test_the_root_files_are_those_that_are_saved(saved):
    written = {path.name for path in saved[0].rglob("*.py")}
    there = {path.name for path in (ROOT / "modeling_nrccr").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not there - written, f"no model carries {there - written}: move them into a sub-package"
    assert written <= there
    for path in saved[0].rglob("*.py"):
        assert path.read_bytes() == (ROOT / "modeling_nrccr" / path.name).read_bytes()


@pytest.mark.slow
def test_what_is_saved_loads_where_the_package_is_hidden(saved, tmp_path):
    folder, expected = saved
    code = (
        "import json, sys; sys.modules['modeling_nrccr'] = sys.modules['datasets_scripts'] = None\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "options = {'trust_remote_code': True}\n"
        "model = AutoModel.from_pretrained(sys.argv[1], **options).eval()\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], **options)\n"
        "batch = processor(text=sys.argv[2:], languages=['gl', 'gl'], return_tensors='pt')\n"
        "print(json.dumps(model.get_text_features(**batch).pooler_output.tolist()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, folder / "model", *TEXTS],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.tensor(json.loads(result.stdout.strip().splitlines()[-1]))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
