"""The writer of files and folders: whole or not at all, readable by whom the umask lets, names that can be shown."""

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel

from modeling_nrccr import files
from modeling_nrccr.files import is_leftover, is_utf8, printable, replacing_folder, write_file
from modeling_nrccr.retrieval.index_faiss import FaissIndex
from tests.support import tiny_model


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_is_readable_by_whom_the_umask_lets(tmp_path):
    mask = os.umask(0o027)
    try:
        (tmp_path / "plain").touch()
        write_file(tmp_path / "text", "é")
        model = tiny_model()
        model.add_language("gl")
        model.save_pretrained(tmp_path / "model")
        model.save_language("gl", tmp_path / "gl")
        FaissIndex(3).save(tmp_path / "index")
        with replacing_folder(tmp_path / "export", lambda path: False, "an export") as folder:
            write_file(folder / "a", b"a")
    finally:
        os.umask(mask)
    assert (tmp_path / "text").read_bytes() == "é".encode()
    paths = [path for path in tmp_path.rglob("*") if path.name != ".lock"]
    assert sum(path.suffix == ".safetensors" for path in paths) == 2
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o750}


def test_a_full_disk_is_an_os_error_with_a_remedy(tmp_path, monkeypatch):
    def fails(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails)
    with pytest.raises(OSError, match=f"{tmp_path}/model cannot be written .*No space left.*: make room"):
        tiny_model().save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "RENAME_EXCHANGE", 1 << 30)  # the system refuses it
    folder = tmp_path / "out"
    for content in ("old", "new"):
        with replacing_folder(folder, lambda path: path.suffix == ".onnx", "an export") as work:
            write_file(work / f"{content}.onnx", content)
        assert names(folder) == {f"{content}.onnx"} and names(tmp_path) == {"out"}
    with pytest.raises(RuntimeError), replacing_folder(folder, lambda path: True, "an export") as work:
        (work / "half.onnx").touch()
        raise RuntimeError
    (folder / "mine.txt").touch()
    with (
        pytest.raises(ValueError, match="out holds mine.txt, which is no part of an export"),
        replacing_folder(folder, lambda path: path.suffix == ".onnx", "an export"),
    ):
        pass
    assert names(folder) == {"new.onnx", "mine.txt"} and names(tmp_path) == {"out"}


def test_what_a_killed_run_left_goes_with_the_next_run_and_what_another_writes_stays(tmp_path):
    (tmp_path / ".out-0123abcd.tmp/data").mkdir(parents=True)
    with replacing_folder(tmp_path / "out", lambda path: False, "an export") as beside:
        assert names(tmp_path) == {beside.name}
        with replacing_folder(tmp_path / "out", lambda path: False, "an export") as work:
            (work / "a").touch()
        assert names(tmp_path) == {beside.name, "out"}
        (beside / "b").touch()
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"b"}


def test_only_what_is_a_day_old_is_left_over(tmp_path):
    (tmp_path / "a").touch()
    assert not is_leftover(tmp_path / "a") and not is_leftover(tmp_path / "gone")
    os.utime(tmp_path / "a", (0, 0))
    assert is_leftover(tmp_path / "a")


def test_names_are_shown_so_that_a_terminal_and_a_csv_can_hold_them():
    name = os.fsdecode(b"caf\xe9\n\x1b[31m.jpg")
    assert printable(name) == r"caf\xe9\n\x1b[31m.jpg" and not is_utf8(name)
    assert printable("ñ 猫 😀.png") == "ñ 猫 😀.png" and is_utf8("ñ 猫 😀.png")
