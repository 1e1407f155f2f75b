"""Publishes a trained model, or a language: weights, processor, code and card, nothing pickled."""

import json
import logging
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from safetensors import safe_open
from safetensors.torch import save
from transformers import PreTrainedConfig

from ..data.trained_split import SPLIT_FILE
from ..files import write_file
from ..languages import LANGUAGE_FILE
from ..loading.models import load_with_languages
from ..loading.wheels import new_folder
from .card import hub_name, language_card
from .sentence_transformers_files import write_sentence_transformers_files
from .verdicts import STERN


logger = logging.getLogger(__name__)

CARD, REPORT, METRICS = "README.md", "report.json", "metrics.json"
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
REQUIRED = ("language", "license", "library_name", "pipeline_tag")  # of the card's metadata
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".tar")
STALE = ["*.safetensors", "*.safetensors.index.json", "*.py"]  # of an earlier push, where this one lacks them


def is_pickled(path: Path) -> bool:
    """Return whether a file is pickled, by its name or its content: protocol 2 or newer, or PyTorch's archive."""
    if path.name.endswith(PICKLED):
        return True
    if path.suffix == ".safetensors":  # its first bytes are a length, and may be any
        return False
    with path.open("rb") as stream:
        head = stream.read(2)
    if head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    return head == b"PK" and zipfile.is_zipfile(path)


def check_pickled(folder: Path):
    """Raise ValueError where a folder holds pickled files."""
    pickled = [
        str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file() and is_pickled(path)
    ]
    if pickled:
        raise ValueError(
            f"{folder} holds pickled files, which run code when they are read: remove {', '.join(pickled)}"
        )


def check_card(folder: Path):
    """Raise ValueError where a folder's card is not there, or lacks metadata that the Hub reads."""
    if not (folder / CARD).is_file():
        raise ValueError(
            f"{folder} has no {CARD}: `nrccr train` and `nrccr add-language` write one. For another model write it; "
            f"it begins with a line ---, then {', '.join(REQUIRED)}, each as `name: value` in a line, and a line ---"
        )
    metadata = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
    if missing := [name for name in REQUIRED if not metadata.get(name)]:
        raise ValueError(
            f"{folder / CARD} lacks {', '.join(missing)} in its metadata, the lines between --- at its top"
        )


def check_private(folder: Path):
    """Raise ValueError where a folder would publish a token, or a path of this machine."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".md", ".json") or path.name in ("tokenizer.json", "vocab.json"):
            continue
        text = path.read_text(encoding="utf-8")
        places = [str(place) for place in (Path.home(), Path.cwd()) if f"{place}/" in text and len(place.parts) > 1]
        if TOKEN.search(text) or places:
            raise ValueError(
                f"{path.name} holds {'a path of this machine, ' + places[0] if places else 'a token of the Hub'}: "
                "take it out of what was trained, and push again"
            )


def without_folders(text: str) -> str:
    """Cut absolute paths in a text down to their last part."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s/:'\",;]+/)+", "", text)


def without_paths(config: PreTrainedConfig):
    """Take folders of this machine out of a configuration."""
    for part in filter(None, (config.text_config, config.vision_config)):
        if part._name_or_path:
            part._name_or_path = hub_name(part._name_or_path)
    if config.dual_encoder is not None:
        config.dual_encoder = config.dual_encoder | {"name": hub_name(config.dual_encoder["name"])}


def renamed(card: ModelCard, name: str) -> str:
    """Return a card whose snippets load `name`, a hub id or a folder beside the reader."""
    card.data.model_name = name.split("/")[-1]
    return re.sub(r'(from_pretrained|SentenceTransformer)\("[^"]*"', rf'\1("{name}"', str(card)).rstrip() + "\n"


def read_report(folder: Path, base: str | None) -> dict:
    """Return what `nrccr add-language` reported, without folders of this machine. `base`: how its base is called.
    Raises ValueError where there is no report."""
    if not (folder / REPORT).is_file():
        raise ValueError(f"{folder} has no {REPORT}: name the folder that `nrccr add-language` wrote")
    report = json.loads(without_folders((folder / REPORT).read_text(encoding="utf-8")))
    original = json.loads((folder / REPORT).read_text(encoding="utf-8"))["base"]["name"]
    report["base"]["name"] = base or hub_name(original)
    if "/" not in report["base"]["name"]:
        logger.warning("the base is called %s, which is no hub id: name it, --base YOU/NAME", report["base"]["name"])
    return report


def write_language(source: Path, folder: Path, name: str, base: str | None):
    """Write what is uploaded of a language: its file, report and card, which name its base by a hub id."""
    report = read_report(source, base)
    with safe_open(source / LANGUAGE_FILE, "pt") as file:
        about = json.loads((file.metadata() or {})["about"])
        weights = {key: file.get_tensor(key) for key in file.keys()}
    about["model"]["name"] = report["base"]["name"]
    write_file(folder / LANGUAGE_FILE, save(weights, {"about": json.dumps(about)}))
    write_file(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / CARD, language_card(report, name))


def write_model(
    source: Path, folder: Path, name: str, languages: Sequence[str], base: str | None, dtype: str | None = None
):
    """Write what is uploaded of a model: weights, processor, code and card; with `languages` in it. Raises ValueError
    where there is no model."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no model: name what `nrccr train` wrote (make demo: outputs/demo)")
    if not languages:
        check_card(source)
    model, processor = load_with_languages(str(source), list(languages), "cpu", dtype)
    without_paths(model.config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_sentence_transformers_files(folder, model.visual_tower is not None)
    if not languages:
        if (source / METRICS).is_file():
            write_file(folder / METRICS, (source / METRICS).read_bytes())
        write_file(folder / CARD, renamed(ModelCard.load(source / CARD), name))
        return
    reports = [read_report(Path(spec.partition("=")[2]), base) for spec in languages]
    codes = [spec.partition("=")[0] for spec in languages]
    known = ModelCard.load(source / CARD, ignore_metadata_errors=True).data if (source / CARD).is_file() else {}
    # one report a file: several languages of one adapter share theirs
    parts = {json.dumps(report): (report, []) for report in reports}
    for code, report in zip(codes, reports):
        parts[json.dumps(report)][1].append(code)
    merged = merge_cards([report | {"language": ",".join(own)} for report, own in parts.values()])
    write_file(folder / REPORT, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / CARD, language_card(merged, name, whole=True, license=known.get("license")))


def merge_cards(reports: list[dict]) -> dict:
    """Return the reports of a model's languages as one: the first's, and what each says of its own."""
    if len(reports) == 1:
        return reports[0]
    found, reasons, tokenizer = {}, [], {}
    for report in reports:
        found |= {f"{report['language']}: {row}": metrics for row, metrics in report["found"].items()}
        reasons += [f"{report['language']}: {report['verdict']}", *report["reasons"]]
        tokenizer |= report["tokenizer"]
    return reports[0] | {
        "language": ",".join(report["language"] for report in reports),
        "found": found,
        "reasons": reasons,
        "tokenizer": tokenizer,
        "verdict": min((report["verdict"] for report in reports), key=STERN.index),
        "queries": sum(report["queries"] for report in reports),
    }


def write_upload(
    source: Path,
    folder: Path,
    name: str,
    languages: Sequence[str] = (),
    base: str | None = None,
    dtype: str | None = None,
) -> Path:
    """
    Write a folder as it is uploaded; it appears whole, or not at all.

    Args:
        source: What `nrccr train` or `nrccr add-language` wrote.
        folder: New.
        name: Under which the card's snippets load it.
        languages: `CODE=FOLDER` of what `nrccr add-language` wrote, to be published in the model; the first is active.
        base: Hub id of the model that a language was added to, where that was a folder.
        dtype: Of a model's weights; default: as they were saved.

    Raises:
        ValueError: It holds pickled files, or has no card; `folder` is there and not empty; there is no model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: name a new folder")
    for place in (source, *(Path(spec.partition("=")[2]) for spec in languages if "=" in spec)):
        check_pickled(place)
    if without := [spec for spec in languages if "=" not in spec]:
        raise ValueError(f"--language {without[0]}: name a code and a folder, gl=outputs/gl")
    split = source
    if (source / LANGUAGE_FILE).is_file() and not (source / "config.json").is_file():
        if (source / "model/config.json").is_file():  # with a text encoder of its own: it goes with no other model
            codes = json.loads((source / REPORT).read_text(encoding="utf-8"))["language"].split(",")
            source, languages = source / "model", [f"{code.strip()}={source}" for code in codes]
    elif languages:
        split = Path(languages[0].partition("=")[2])
    with new_folder(folder) as unfinished:
        if (source / LANGUAGE_FILE).is_file() and not languages:
            if dtype is not None:
                raise ValueError(f"{source} holds a language, which is published as it is: leave out --dtype")
            write_language(source, unfinished, name, base)
        else:
            write_model(source, unfinished, name, languages, base, dtype)
        if (split / SPLIT_FILE).is_file():
            write_file(unfinished / SPLIT_FILE, (split / SPLIT_FILE).read_bytes())
        check_pickled(unfinished)
        check_card(unfinished)
        check_private(unfinished)
    return folder


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Upload a folder of [`write_upload`] and return its address. The card comes last, so that what it describes is
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


def publish(
    model: str | Path,
    repo_id: str | None = None,
    dry_run: str | Path | None = None,
    languages: Sequence[str] = (),
    base: str | None = None,
    dtype: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> tuple[list[tuple[str, int]], str]:
    """
    Write what is uploaded, and upload it.

    Args:
        model, languages, base, dtype: as of `write_upload`.
        repo_id: where to, such as YOU/nrccr-gl; also how the card calls it.
        dry_run: a new folder, which is written, and nothing is uploaded.
        private, revision: as of `push`.

    Returns:
        Each file and its bytes, and where they are: the folder, or the address on the Hub.

    Raises:
        ValueError: as `write_upload`, or where neither `repo_id` nor `dry_run` is given.
    """
    if not (repo_id or dry_run):
        raise ValueError("name --repo_id, or a folder to look at first: --dry_run FOLDER")
    if dry_run and (private or revision):
        raise ValueError("--dry_run uploads nothing: leave out --private and --revision")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(dry_run or Path(scratch, "upload"))
        write_upload(Path(model), folder, repo_id or folder.name, languages, base, dtype)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
        return sizes, str(dry_run or push(folder, repo_id, private, revision))
