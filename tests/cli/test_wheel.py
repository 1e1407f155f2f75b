"""The wheel has all that a user does: a language is added, searched, served and exported by `nrccr` alone, where there
is no checkout."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

import pytest
from PIL import Image

from tests.support import ROOT
from tests.training.test_add_language import files  # noqa: F401  (a small base, captions, their translations)


pytestmark = pytest.mark.slow

SOURCES = ("modeling_nrccr", "datasets_scripts", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Installed:
    """A virtual environment with the wheel and the libraries of this one, and an empty folder to work in."""

    def __init__(self, folder: Path):
        self.bin, self.work = folder / "venv/bin", folder / "work"
        self.work.mkdir()
        source = folder / "source"
        source.mkdir()
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "wheels", source]
        subprocess.run([*pip, *build], check=True, capture_output=True)
        shutil.rmtree(source)
        venv.create(folder / "venv", with_pip=False)
        (wheel,) = (folder / "wheels").glob("*.whl")
        install = ["--python", self.bin / "python", "install", "--no-deps", "--no-index", wheel]
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        subprocess.run([*pip, *install], check=True, capture_output=True, env=kept)  # else it is there already
        site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
        Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # an editable install is none
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
        self.environment = kept | offline | {"OMP_NUM_THREADS": "1"}

    def start(self, command: str, *arguments, **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        run = [self.bin / command, *map(str, arguments)]
        return subprocess.Popen(run, cwd=self.work, env=self.environment, **pipes | options)

    def run(self, *arguments, command: str = "nrccr") -> str:
        process = self.start(command, *arguments)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
        return output


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def language(installed, files) -> Path:  # noqa: F811
    """A language that was added to a small base, from a CSV with ready translations."""
    captions = (files / "captions.txt").read_text().splitlines()
    (installed.work / "captions.csv").write_text("\n".join(["caption", *captions]) + "\n")
    short = ["--num_train_epochs", 1, "--per_device_train_batch_size", 64, "--use_cpu", "true", "--min_steps", 0]
    data = ["--data", "captions.csv", "--test", files / "human.csv", "--translator", f"file:{files}/translations"]
    output = installed.run("add-language", files / "base", "--language", "gl", "--output_dir", "gl", *data, *short)
    assert "this language" in output
    return installed.work / "gl"


def test_it_is_the_wheel_that_runs(installed):
    code = "import datasets_scripts, modeling_nrccr; print(datasets_scripts.__file__, modeling_nrccr.__file__)"
    for path in installed.run("-c", code, command="python").split():
        assert Path(path).is_relative_to(installed.bin.parent)
    assert "apertium" in installed.run("list", "engines")
    assert "torch" in installed.run("env")
    assert {"recommended", "demo"} <= set(installed.run("list", "recipes").split())


def test_a_language_is_written(language):
    assert {"language_adapter.safetensors", "report.json", "README.md"} <= {path.name for path in language.iterdir()}
    report = json.loads((language / "report.json").read_text())
    assert report["captions"] == 300 and report["found"]


def test_an_index_is_searched_and_served(installed, language, files):  # noqa: F811
    pictures = installed.work / "pictures"
    pictures.mkdir()
    for number in range(5):
        Image.new("RGB", (20, 20), (number * 40, 200, 99)).save(pictures / f"{number}.png")
    spoken = ["--language", f"gl={language}"]
    installed.run("index", files / "base", "pictures", "gallery", *spoken)
    assert installed.run("search", "gallery", "redo cato").count(".png") == 5

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = installed.start("nrccr", "serve", files / "base", "--index", "gallery", "--port", port, *spoken)
    try:
        ask = urllib.request.Request(
            f"http://127.0.0.1:{port}/search",
            json.dumps({"text": "redo cato", "k": 2}).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(300):
            try:
                answer = json.load(urllib.request.urlopen(ask, timeout=30))
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, server.stdout.read()[-3000:]
                time.sleep(0.2)
        assert [Path(hit["id"]).suffix for hit in answer["hits"]] == [".png", ".png"]
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_a_language_is_exported(installed, language, files):  # noqa: F811
    spoken = ["--language", f"gl={language}", "--sides", "text"]
    output = installed.run("export", files / "base", "onnx", "--to", "onnx", *spoken)
    assert "onnx: onnx" in output and (installed.work / "onnx/text.onnx").is_file()
