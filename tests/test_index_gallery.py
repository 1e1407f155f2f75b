"""Indexing a folder with a tiny model: what is encoded, what is not encoded again, kills, and videos."""

import subprocess
import sys
import time
from pathlib import Path

import index_gallery
import psutil
import pytest
import search
from PIL import Image
from search import load_model
from test_search_examples import checkpoint, picture  # noqa: F401

from datasets_scripts.videos import read_frames
from modeling_nrccr import NrccrRetriever
from modeling_nrccr.retriever import Skipped


EXAMPLES = Path(index_gallery.__file__).parent


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    monkeypatch.setenv("NRCCR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gallery"
    (folder / "more").mkdir(parents=True)
    for i in range(5):
        picture(i).save(folder / "more" / f"{i}.png")
    frames = [picture(i, (30, 30)) for i in (7, 8, 9)]
    frames[0].save(folder / "clip.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8cut")
    return folder


def run(checkpoint, gallery, index, capsys, *more):  # noqa: F811
    index_gallery.main(["--model", str(checkpoint), "--gallery", str(gallery), "--index", str(index), *more])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["index", "index.db"])
def test_nothing_is_encoded_twice(checkpoint, gallery, tmp_path, capsys, name):  # noqa: F811
    index = tmp_path / name
    model, processor = load_model(str(checkpoint))
    lines = run(checkpoint, gallery, index, capsys, "--num_frames", "3")
    assert lines[0].startswith("skipped broken.jpg: ") and lines[1].startswith("6 encoded, 1 skipped")
    (gallery / "broken.jpg").unlink()
    assert run(checkpoint, gallery, index, capsys)[0].startswith("0 encoded, 0 skipped")

    (gallery / "more" / "0.png").rename(gallery / "moved.png")  # known by its content
    picture(0).save(gallery / "copy.png")
    picture(12).save(gallery / "more" / "1.png")  # changed
    (gallery / "more" / "2.png").unlink()
    assert run(checkpoint, gallery, index, capsys, "--remove_missing")[0].startswith("1 encoded, 0 skipped")
    retriever = NrccrRetriever.load(index, model, processor)
    found = {hit.id: hit for hit in retriever.search(picture(12), k=99)}
    assert set(found) == {"clip.webp", "copy.png", "moved.png", "more/1.png", "more/3.png", "more/4.png"}
    assert found["more/1.png"].score == pytest.approx(1.0, abs=1e-5)
    assert found["moved.png"].score == pytest.approx(found["copy.png"].score)
    assert found["moved.png"].metadata["path"] == str(gallery / "moved.png")
    assert not list((tmp_path / "cache" / "gallery").iterdir())

    clip = found["clip.webp"].metadata
    assert clip["num_frames"] == 3
    frames = read_frames(gallery / "clip.webp", 3)
    encoder = NrccrRetriever(model, processor)
    encoder.add(frames, ids=range(3))
    encoder.add(videos=[frames], ids=["clip"])
    embed = next(embeds[ids.index("clip")] for ids, _, embeds in encoder.index.rows(embeds=True) if "clip" in ids)
    hits = encoder.search(retriever.encode_query("gato").new_tensor(embed), k=4)
    assert hits[0].id == "clip" and hits[1].id == clip["frame"] == hits[0].metadata["frame"]

    copied = tmp_path / f"copied-{name}"
    line = run(checkpoint, gallery, copied, capsys, "--copy_from", str(index))[0]
    assert line.startswith("0 encoded") and line.endswith(f"{copied} has 6")
    arguments = ["--model", str(checkpoint), "--query", "gato", "--translation", "can", "--k", "2"]
    search.main([*arguments, "--index", str(copied), "--output", str(tmp_path / "sheet.png")])
    assert f"6 pictures in {copied}" in capsys.readouterr().out and (tmp_path / "sheet.png").exists()


def test_a_run_that_could_not_store_encodes_nothing_again(checkpoint, gallery, tmp_path, capsys, monkeypatch):  # noqa: F811
    def fails(self, *_):
        raise ConnectionError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(NrccrRetriever, "add_embeds", fails)
        with pytest.raises(SystemExit, match="error: gone"):
            run(checkpoint, gallery, tmp_path / "index", capsys)
    shards = list((tmp_path / "cache" / "gallery").glob("*/*.safetensors"))
    assert len(shards) == 1
    shards[0].with_name("cut.safetensors").write_bytes(shards[0].read_bytes()[:200])
    assert run(checkpoint, gallery, tmp_path / "index", capsys)[-1].startswith("0 encoded, 1 skipped")
    assert len(NrccrRetriever.load(tmp_path / "index", *load_model(str(checkpoint)))) == 6


def test_what_is_wrong_is_said_in_a_line(checkpoint, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    for folder, message in (("none", "is not a folder"), ("empty", "No pictures or videos under")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            run(checkpoint, tmp_path / folder, tmp_path / "index", capsys)


def test_videos_need_a_reader(checkpoint):  # noqa: F811
    retriever = NrccrRetriever(*load_model(str(checkpoint)))
    with pytest.raises(
        ValueError, match="None of 1 videos can be read; the first, 'a.mp4': name what reads its frames"
    ):
        retriever.add(videos=["a.mp4"])
    with pytest.raises(ValueError, match="either images or videos"):
        retriever.add()
    assert retriever.add(videos=[[picture(1)], []]) == [Skipped("1", "it has no frames")]


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill(checkpoint, gallery, tmp_path):  # noqa: F811
    for i in range(600):
        Image.new("RGB", (40, 30), (i % 256, i // 256, 99)).save(gallery / f"{i}.png")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(EXAMPLES / "index_gallery.py"), "--model", str(checkpoint), "--gallery", str(gallery)]
    command += ["--index", str(tmp_path / "index"), "--shard_size", "4", "--batch_size", "1"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    shards = tmp_path / "cache" / "gallery"
    deadline = time.monotonic() + 240
    while len(list(shards.glob("*/*.safetensors"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    launcher = psutil.Process(process.pid)
    for each in [launcher, *launcher.children(recursive=True)]:  # the workers have sessions of their own
        each.kill()
    process.wait()
    time.sleep(0.2)
    known = 4 * len(list(shards.glob("*/*.safetensors")))
    assert 20 <= known < 606

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    encoded = int(done.stdout.splitlines()[-1].split()[0])
    assert 0 < encoded <= 606 - known + 4  # a shard may be of a broken file, and smaller
    retriever = NrccrRetriever.load(tmp_path / "index", *load_model(str(checkpoint)))
    assert len(retriever) == 606
    assert retriever.search(Image.open(gallery / "567.png"), k=1)[0].score == pytest.approx(1.0, abs=1e-4)
