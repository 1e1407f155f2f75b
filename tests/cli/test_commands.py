"""How scripts end that cannot go on: one line, an exit code, and nothing lost."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainingArguments

from modeling_nrccr.cli.common import command
from modeling_nrccr.recipes.settings import as_flags, given_flags
from modeling_nrccr.training.experiment import ModelArguments, parse_arguments


ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from datasets_scripts.commands import command

@command("shards are kept: the same command goes on")
def main():
    print("begun", flush=True)
    {body}

main()
"""


def start(body: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(body=body)], env=environment, **pipes)


def test_each_way_to_end_is_one_line(tmp_path):
    """A mistake; Ctrl+C; a reader that goes; an engine that goes, which is an error; a terminal without letters."""
    running = {
        "mistake": start(
            "raise ValueError('rows.csv, line 3: no caption')", env={"TORCHELASTIC_ERROR_FILE": "e.json"}, cwd=tmp_path
        ),
        "ctrl_c": start("import time; time.sleep(60)"),
        "reader": start("\n    while True: print('hit')"),
        "engine": start("raise BrokenPipeError(32, 'engine died')"),
        "letters": start("print('árbore 木')", env={"PYTHONIOENCODING": "ascii"}),
        "debug": start("raise ValueError('rows.csv')", env={"NRCCR_DEBUG": "1"}),
        "bug": start("{}['key']"),
    }
    assert running["ctrl_c"].stdout.readline() == b"begun\n"
    running["ctrl_c"].send_signal(signal.SIGINT)
    running["reader"].stdout.readline()
    running["reader"].stdout.close()
    errors = {name: process.stderr.read().decode() for name, process in running.items()}
    codes = {name: process.wait(30) for name, process in running.items()}
    assert codes == {"mistake": 2, "ctrl_c": 130, "reader": 141, "engine": 2, "letters": 0, "debug": 1, "bug": 1}
    assert errors["mistake"] == "error: rows.csv, line 3: no caption\n"
    assert "error: rows.csv, line 3: no caption" in (tmp_path / "e.json").read_text()  # torchrun shows it last
    assert errors["ctrl_c"] == "stopped by Ctrl+C; shards are kept: the same command goes on\n"
    assert errors["reader"].startswith("stopped, because nobody reads") and errors["reader"].count("\n") == 1
    assert errors["engine"] == "error: [Errno 32] engine died\n"
    assert running["letters"].stdout.read() == b"begun\n?rbore ?\n"
    assert errors["debug"].startswith("Traceback") and errors["bug"].startswith("Traceback")


def test_a_main_function_that_is_called_raises_the_line(capsys):
    @command()
    def main():
        raise ValueError("no caption")

    with pytest.raises(SystemExit, match="error: no caption") as raised:
        main()
    assert raised.value.code == 2 and capsys.readouterr().err == "error: no caption\n"


def test_every_script_ends_so():
    scripts = [
        *ROOT.glob("examples/*.py"),
        ROOT / "examples/space/build_space.py",
        *ROOT.glob("datasets_scripts/*.py"),
    ]
    scripts = {path: text for path in scripts if '__name__ == "__main__"' in (text := path.read_text())}
    assert len(scripts) > 15
    for path, text in scripts.items():
        first = re.search(r"^(from|import) .*", text, re.MULTILINE).group()
        assert first.endswith("commands import command") and re.search(r"command\(.*\)(\(|\ndef )", text), path
        assert 'sys.exit(f"error' not in text, path  # there is one handler


@pytest.mark.slow
def test_while_a_script_is_being_imported(tmp_path):
    """Ctrl+C, and a working folder that has been deleted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    search = [sys.executable, str(ROOT / "examples/search.py"), "--gallery", "x", "--query", "y"]
    process = subprocess.Popen(search, env=environment, stderr=subprocess.PIPE)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert (
        process.communicate(timeout=60)[1] == b"stopped by Ctrl+C; nothing had begun\n" and process.returncode == 130
    )
    gone = ["sh", "-c", f"cd {tmp_path}/gone && rmdir ../gone && exec {sys.executable} {' '.join(search[1:])}"]
    (tmp_path / "gone").mkdir()
    result = subprocess.run(gone, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "has been deleted" in result.stderr


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--per_device_train_batch_size 0", "per_device_train_batch_size=0: it must be at least 1"),
        ("--projection_dim 0", "projection_dim=0"),
        ("--num_frames -1", "num_frames=-1"),
        ("--adapter_layers -2", "-2"),
        ("--head_dropout -0.1", "head_dropout=-0.1"),
        ("--human_captions -2", "human_captions=-2"),
    ],
)
def test_numbers_that_do_nothing_are_refused_when_parsed(flags, reason):
    with pytest.raises(ValueError, match=reason):
        parse_arguments(flags.split())


def test_flags_that_are_given_and_false_means_false():
    flags = "--per_device_train_batch_size=3 --max_steps 5 --target_language gl --report_to none --bf16_if_fast no"
    given = given_flags([TrainingArguments], flags.split())
    assert given == {"per_device_train_batch_size": 3, "max_steps": 5, "report_to": "none"}
    assert given_flags([TrainingArguments], as_flags(given)) == given
    for word, resumed in (("false", None), ("False", None), ("true", "true"), ("folder", "folder")):
        assert parse_arguments(["--resume_from_checkpoint", word])[2].resume_from_checkpoint == resumed
    assert isinstance(parse_arguments(["--adapter_layers", "-1"])[1], ModelArguments)
