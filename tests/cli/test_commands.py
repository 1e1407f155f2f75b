"""How commands end that cannot go on: one line, an exit code, and nothing lost."""

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import TrainingArguments

from modeling_nrccr.cli.common import command, parser, renamed
from modeling_nrccr.cli.main import COMMANDS
from modeling_nrccr.cli.main import main as cli
from modeling_nrccr.recipes.fields import ModelArguments
from modeling_nrccr.recipes.settings import as_flags, given_flags
from modeling_nrccr.training.run import parse_arguments
from tests.support import ROOT


SCRIPT = """
import sys
sys.argv[0] = "nrccr"  # which imports what it needs and no more
from modeling_nrccr.cli.common import command

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


def commands() -> dict[str, str]:
    """Of each command that is there, its module."""
    folder = ROOT / "modeling_nrccr/cli"
    return {name: module for name, (module, _) in COMMANDS.items() if (folder / f"{module}.py").is_file()}


@pytest.mark.parametrize("name", commands())
def test_every_command_ends_so(name, capsys):
    main = importlib.import_module(f"modeling_nrccr.cli.{commands()[name]}").main
    assert hasattr(main, "__wrapped__")  # by `command`
    with pytest.raises(SystemExit) as raised:
        main(["--no_such_option"])
    error = capsys.readouterr().err
    assert raised.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_help_waits_for_nothing():
    """`nrccr --help` and that of each command, in a process that has imported nothing else."""
    script = (
        "import sys; sys.argv = ['nrccr']\n"
        "from modeling_nrccr.cli.main import main\n"
        f"for words in {[[], *([name] for name in commands())]}:\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as ended: assert not ended.code, words\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: nrccr") == len(commands()) + 1
    assert all(name in result.stdout for name in COMMANDS)


def test_a_command_that_is_not_there_gets_the_nearest(capsys):
    for word, hint in (("trian", "do you mean nrccr train?"), ("zzz", "`nrccr --help` lists")):
        with pytest.raises(SystemExit) as raised:
            cli([word])
        assert raised.value.code == 2 and hint in capsys.readouterr().err


def test_debug_shows_where_it_was(monkeypatch):
    def run(module, argv):
        raise ValueError(f"{module} {argv}")

    monkeypatch.setattr("modeling_nrccr.cli.main.run", run)
    for arguments in (["train", "--debug", "--recipe", "demo"], ["--debug", "train", "--recipe", "demo"]):
        monkeypatch.setenv("NRCCR_DEBUG", "")
        with pytest.raises(ValueError, match="train .'--recipe', 'demo'."):
            cli(arguments)


def test_an_old_flag_says_its_new_name(capsys):
    options = parser("toy", "A toy.")
    options.add_argument("--data", required=True)
    renamed(options, "--dataset", "--data")
    for arguments in (["--dataset", "tuxpaint"], ["--dataset=tuxpaint"], ["--dataset"]):
        with pytest.raises(ValueError, match="^--dataset is now --data$"):
            options.parse_args(arguments)
    assert (
        "dataset" not in vars(options.parse_args(["--data", "tuxpaint"])) and "--dataset" not in options.format_help()
    )


@pytest.mark.slow
def test_while_a_command_is_being_imported(tmp_path):
    """Ctrl+C, and a working folder that has been deleted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    train = [sys.executable, "-m", "modeling_nrccr", "train", "--data", "no-such-data"]
    process = subprocess.Popen(train, env=environment, stderr=subprocess.PIPE)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert error.startswith(b"stopped by Ctrl+C; ") and error.count(b"\n") == 1
    # Python may end itself by the signal, if that came while a library ran code of its own: 130 to a shell as well
    assert process.returncode in (130, -signal.SIGINT)
    gone = ["sh", "-c", f"cd {tmp_path}/gone && rmdir ../gone && exec {' '.join(train)}"]
    (tmp_path / "gone").mkdir()
    result = subprocess.run(gone, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "has been deleted" in result.stderr


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--per_device_train_batch_size 0", "per_device_train_batch_size=0: it must be at least 1"),
        ("--projection_dim 0", "projection_dim=0"),
        ("--num_frames -1", "num_frames=-1"),
        ("--adapter layers=-2", "layers=-2"),
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
    assert isinstance(parse_arguments(["--adapter", "layers=-1"])[1], ModelArguments)
