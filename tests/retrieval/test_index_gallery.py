"""Indexing a folder with a tiny model: what is encoded, what is not encoded again, kills, and videos."""

import csv
import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image

from datasets_scripts.reading.videos import read_frames
from modeling_nrccr import NrccrRetriever
from modeling_nrccr.cli import index as index_command
from modeling_nrccr.cli import search
from modeling_nrccr.files import writing
from modeling_nrccr.loading.models import load_model
from modeling_nrccr.media import Found
from modeling_nrccr.retrieval import indexer as index_gallery
from modeling_nrccr.retrieval.gallery_media import Skipped
from tests.retrieval.test_search_examples import checkpoint, picture  # noqa: F401
from tests.support import ROOT


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
    index_command.main([str(checkpoint), str(gallery), str(index), *more])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["index", "index.db"])
def test_nothing_is_encoded_twice(checkpoint, gallery, tmp_path, capsys, name):  # noqa: F811
    index = tmp_path / name
    model, processor = load_model(str(checkpoint))
    lines = run(checkpoint, gallery, index, capsys, "--num_frames", "3")
    assert lines[0].startswith("skipped broken.jpg: ") and lines[2].startswith(f"{index} has 6: search it by nrccr ")
    assert lines[1].startswith("6 encoded; left out: 1 broken; see ") and lines[1].endswith("left_out.csv")
    (gallery / "broken.jpg").unlink()
    assert run(checkpoint, gallery, index, capsys)[-2] == "0 encoded; nothing left out"

    (gallery / "more" / "0.png").rename(gallery / "moved.png")  # known by its content
    picture(0).save(gallery / "copy.png")
    picture(12).save(gallery / "more" / "1.png")  # changed
    (gallery / "more" / "2.png").unlink()
    assert run(checkpoint, gallery, index, capsys, "--remove_missing")[-2].startswith("1 encoded; nothing left out")
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
    lines = run(checkpoint, gallery, copied, capsys, "--copy_from", str(index))
    assert lines[0].startswith("0 encoded") and lines[1].startswith(f"{copied} has 6: ")
    arguments = ["gato", "--translation", "can", "--k", "6"]
    (gallery / "copy.png").unlink()
    search.main([str(copied), *arguments, "--output", str(tmp_path / "sheet.png")])
    out = capsys.readouterr().out
    assert f"6 pictures in {copied}" in out and (tmp_path / "sheet.png").exists()
    assert out.count("cannot show") == 1 and f"cannot show {gallery / 'copy.png'}: " in out


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
    assert run(checkpoint, gallery, tmp_path / "index", capsys)[-2].startswith("0 encoded; left out: 1 broken")
    assert len(NrccrRetriever.load(tmp_path / "index", *load_model(str(checkpoint)))) == 6


def left_out(index) -> dict[str, list[str]]:
    with open(index / "left_out.csv", newline="") as file:
        return {row["file"]: [row["kind"], row["reason"]] for row in csv.DictReader(file)}


def test_what_is_left_out_is_remembered_and_tried_again(checkpoint, gallery, tmp_path, capsys, monkeypatch):  # noqa: F811
    index = tmp_path / "index"
    (gallery / "photo.TGX").write_bytes(b"x")
    (gallery / "more" / "a,b.raw").write_bytes(b"x")
    (gallery / "more" / "b.raw").write_bytes(b"x")
    (gallery / "copy.jpg").write_bytes((gallery / "broken.jpg").read_bytes())
    os.mkdir(os.fsencode(gallery) + b"/\xe9t\xe9")
    picture(3).save(os.fsdecode(os.fsencode(gallery) + b"/\xe9t\xe9/1.png"))
    lines = run(checkpoint, gallery, index, capsys)
    assert lines[-2] == (
        "6 encoded; left out: 2 broken, 1 passed over, 3 of kinds that are not read (.raw 2, .tgx 1); "
        f"see {index / 'left_out.csv'}"
    )
    found = left_out(index)
    kind, reason = found[r"\xe9t\xe9/1.png"]
    assert kind == "passed over" and reason.startswith("its name is not UTF-8: rename it")
    assert found["*.raw"] == ["of a kind that is not read", "2 files"] and found["copy.jpg"] == found["broken.jpg"]
    assert set(found) == {r"\xe9t\xe9/1.png", "*.raw", "*.tgx", "broken.jpg", "copy.jpg"}

    # a picture that a broken file takes the place of is found no longer; one that cannot be looked at still is
    (gallery / "more" / "1.png").write_bytes(b"\x89PNG no more")
    content_hash = index_gallery.content_hash

    def refuses(path):
        if path.name == "2.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return content_hash(path)

    tried = []
    encode_media = NrccrRetriever.encode_media

    def watched(self, kind, media, names, *more):
        media = list(media)
        tried.extend(names[row] for row, _ in media)
        return encode_media(self, kind, media, names, *more)

    monkeypatch.setattr(NrccrRetriever, "encode_media", watched)
    with monkeypatch.context() as patched:
        patched.setattr(index_gallery, "content_hash", refuses)
        lines = run(checkpoint, gallery, index, capsys, "--remove_missing")
    assert tried == ["more/1.png"]  # those that were broken have not changed
    assert [line.split(":")[0] for line in lines[:-2]] == ["skipped more/2.png", "skipped more/1.png"]
    assert left_out(index)["more/2.png"] == ["broken", "Permission denied"] and "more/1.png" in left_out(index)
    retriever = NrccrRetriever.load(index, *load_model(str(checkpoint)))
    assert set(retriever.ids) == {"clip.webp", *(f"more/{i}.png" for i in (0, 2, 3, 4))}

    tried.clear()
    picture(9).save(gallery / "more" / "1.png")
    with monkeypatch.context() as patched:  # a folder that cannot be looked into has not gone
        files = [gallery / "clip.webp", gallery / "copy.jpg"]
        patched.setattr(index_gallery, "walk", lambda *_: Found(files, {}, [("more", "")]))
        run(checkpoint, gallery, index, capsys, "--remove_missing")
    lines = run(checkpoint, gallery, index, capsys, "--retry")
    assert sorted(tried) == ["broken.jpg", "more/1.png"] and lines[-2].startswith(
        "1 encoded; left out: 2 broken, 1 passed"
    )
    assert set(left_out(index)) == set(found)
    (index / "left_out.csv").write_text("changed,by\nhand,x\n")
    assert run(checkpoint, gallery, index, capsys)[-2].startswith("0 encoded; left out: 2 broken, 1 passed")


def test_a_second_run_on_an_index_is_refused_at_once(checkpoint, gallery, tmp_path, capsys):  # noqa: F811
    index = tmp_path / "index"
    with ThreadPoolExecutor(1) as other:  # a lock is a thread's
        hold = writing(index)
        other.submit(hold.__enter__).result()
        with pytest.raises(SystemExit, match=f"error: another run is writing {index}: wait until it has ended"):
            run(checkpoint, gallery, index, capsys)
        other.submit(hold.__exit__, None, None, None).result()
    assert run(checkpoint, gallery, index, capsys)[-2].startswith("6 encoded")


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
    command += ["-m", "modeling_nrccr", "index", str(checkpoint), str(gallery), str(tmp_path / "index")]
    command += ["--shard_size", "4", "--batch_size", "1"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
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

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    encoded = int(done.stdout.splitlines()[-2].split()[0])
    assert 0 < encoded <= 606 - known + 4  # a shard may be of a broken file, and smaller
    retriever = NrccrRetriever.load(tmp_path / "index", *load_model(str(checkpoint)))
    assert len(retriever) == 606
    assert retriever.search(Image.open(gallery / "567.png"), k=1)[0].score == pytest.approx(1.0, abs=1e-4)
