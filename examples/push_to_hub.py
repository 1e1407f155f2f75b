"""Publishes a trained model: weights, processor, code and card, nothing pickled. Look at the folder first:

    python examples/push_to_hub.py --model outputs/demo --dry_run outputs/upload
    python examples/push_to_hub.py --model outputs/demo --repo_id YOU/nrccr-gl --private

The second needs `hf auth login`. Pushed again, it replaces what it wrote before.
"""

import argparse
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from card import HUB_IDS
from huggingface_hub import HfApi, ModelCard
from search import load_model
from transformers import PreTrainedConfig
from wheels import new_folder

from modeling_nrccr.files import write_file
from modeling_nrccr.sentence_transformers_files import write_sentence_transformers_files


CARD = "README.md"
REQUIRED = ("language", "license", "library_name", "pipeline_tag")  # of the card's metadata
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".tar")
STALE = ["*.safetensors", "*.safetensors.index.json", "*.py"]  # of an earlier push, where this one lacks them


def is_pickled(path: Path) -> bool:
    """By its name, or by its content: a pickle of protocol 2 or newer, or PyTorch's archive of one."""
    if path.name.endswith(PICKLED):
        return True
    if path.suffix == ".safetensors":  # its first bytes are a length, and may be any
        return False
    with path.open("rb") as stream:
        head = stream.read(2)
    if head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    return head == b"PK" and zipfile.is_zipfile(path)


def check_folder(folder: Path):
    """Raises ValueError where a folder is not fit to be published: pickled files, or a card that is not there or lacks
    metadata that the Hub reads."""
    pickled = [
        str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file() and is_pickled(path)
    ]
    if pickled:
        raise ValueError(
            f"{folder} holds pickled files, which run code when they are read: remove {', '.join(pickled)}"
        )
    if not (folder / CARD).is_file():
        raise ValueError(
            f"{folder} has no {CARD}: examples/train.py writes one; fill in model_card.md for other models"
        )
    metadata = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
    if missing := [name for name in REQUIRED if not metadata.get(name)]:
        raise ValueError(
            f"{folder / CARD} lacks {', '.join(missing)} in its metadata, the lines between --- at its top"
        )


def without_paths(config: PreTrainedConfig):
    """Takes folders of this machine out of a configuration: the hub id of what is in them, or their last name."""
    parts = [config.text_config, config.vision_config]
    for part in filter(None, parts):
        if os.path.isabs(part._name_or_path):
            name = Path(part._name_or_path).name
            part._name_or_path = HUB_IDS.get(name, name)
    if config.dual_encoder is not None and os.path.isabs(config.dual_encoder["name"]):
        config.dual_encoder = config.dual_encoder | {"name": Path(config.dual_encoder["name"]).name}


def renamed(card: ModelCard, name: str) -> str:
    """A card whose snippets load `name`, a hub id or a folder beside the reader."""
    card.data.model_name = name.split("/")[-1]
    return re.sub(r'(from_pretrained|SentenceTransformer)\("[^"]*"', rf'\1("{name}"', str(card)).rstrip() + "\n"


def write_upload(model_folder: Path, folder: Path, name: str) -> Path:
    """
    A folder as it is uploaded; it appears whole, or not at all.

    Args:
        model_folder: What `examples/train.py` wrote.
        folder: New.
        name: Under which the card's snippets load the model.

    Raises:
        ValueError: As [`check_folder`] of both folders; `folder` is there and not empty; there is no model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: name a new folder")
    if not (model_folder / "config.json").is_file():
        raise ValueError(f"{model_folder} holds no model: name what examples/train.py wrote (make demo: outputs/demo)")
    check_folder(model_folder)
    model, processor = load_model(str(model_folder))
    without_paths(model.config)
    with new_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        write_sentence_transformers_files(unfinished, model.visual_tower is not None)
        if (model_folder / "metrics.json").is_file():
            write_file(unfinished / "metrics.json", (model_folder / "metrics.json").read_bytes())
        write_file(unfinished / CARD, renamed(ModelCard.load(model_folder / CARD), name))
        check_folder(unfinished)
    return folder


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads a folder of [`write_upload`] and returns its address. The card comes last, so that what it describes is
    there when it is read, and nothing written before it (such as `Trainer.push_to_hub`'s own card) stays."""
    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    where = {"repo_id": repo_id, "revision": revision}
    message = "Upload model, processor and code"
    api.upload_folder(
        folder_path=folder, ignore_patterns=[CARD], delete_patterns=STALE, commit_message=message, **where
    )
    api.upload_file(
        path_or_fileobj=str(folder / CARD), path_in_repo=CARD, commit_message="Upload the model card", **where
    )
    return str(url)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("outputs/demo"), help="folder that examples/train.py wrote")
    parser.add_argument("--repo_id", help="where to, such as YOU/nrccr-gl")
    parser.add_argument("--private", action="store_true", help="of a new repository: nobody else sees it")
    parser.add_argument("--revision", help="branch to push to; made where it is not there; default: main")
    parser.add_argument("--dry_run", metavar="FOLDER", type=Path, help="write what would be uploaded, and stop")
    args = parser.parse_args(argv)
    if not (args.repo_id or args.dry_run):
        parser.error("name --repo_id, or a folder to look at first: --dry_run FOLDER")
    try:
        if args.dry_run:
            folder = write_upload(args.model, args.dry_run, args.repo_id or args.dry_run.name)
            report(folder, f"written to {folder}, not uploaded")
        else:
            with tempfile.TemporaryDirectory() as scratch:
                folder = write_upload(args.model, Path(scratch, "upload"), args.repo_id)
                report(folder, push(folder, args.repo_id, args.private, args.revision))
    except (ValueError, OSError) as error:  # what a user can put right, the Hub's answers among them
        sys.exit(f"error: {error}")


def report(folder: Path, where: str):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.relative_to(folder)}  {path.stat().st_size:,} bytes")
    print(f"{len(files)} files: {where}")


if __name__ == "__main__":
    main()
