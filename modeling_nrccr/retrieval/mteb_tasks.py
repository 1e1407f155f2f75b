"""Tasks of MTEB on a model, and tasks of the same type of a data set of this repository, whose R@k are those of
`nrccr evaluate`. Needs mteb (our extra `mteb`); mteb's own extra `image` is not needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from langcodes import Language

from ..data.load import load_caption_dataset
from ..data.trained_split import check_unseen, source_captions, split_seed
from ..loading.models import BASE, load_with_languages, read_by
from .encoding import encode_images, encode_texts, picture_rows
from .evaluation import languages_to_ask
from .metrics import RECALL_AT


try:
    import mteb
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
except ImportError as error:
    raise ImportError('MTEB\'s tasks need mteb: pip install "modeling_nrccr[mteb]"') from error


DIRECTIONS = {"t2i": "t2v", "i2t": "v2t"}  # mteb's names, and those of `compute_retrieval_metrics`


class NrccrEncoder(AbsEncoder):
    """A model and its processor as mteb asks for embeddings: https://embeddings-benchmark.github.io/mteb

    Args:
        model_name (`str`): Folder or hub id.
        revision (`str`, *optional*): Only recorded in the results.
        device, dtype (`str`, *optional*): Of the model, as for [`load_model`].
        languages (`list` of `str`): As `--language` takes them; which reads a text is what `read_by` says.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        languages: Sequence[str] = (),
        **kwargs,
    ):
        self.model, self.processor = load_with_languages(model_name, languages, device, dtype)
        self.languages, self.readers = languages, {}
        name = model_name if model_name.count("/") == 1 and not Path(model_name).exists() else Path(model_name).name
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name if "/" in name else f"local/{name}",
                "revision": revision or "unknown",
                "modalities": ["text", "image"] if self.model.visual_tower is not None else ["text"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": self.model.config.projection_dim,
                "n_parameters": self.model.num_parameters(),
                "framework": ["PyTorch", "Transformers"],
            }
        )

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> torch.Tensor:
        """Embed the texts or pictures of a DataLoader, float32, `(num_rows, projection_dim)`. mteb's prompts are left
        out: the processor puts the prefix before a text. Raises ValueError for rows of both."""
        columns = {"text", "image"} & set(inputs.dataset.features)
        if len(columns) != 1:
            found = " and ".join(sorted(columns)) or "neither text nor image"
            raise ValueError(f"{task_metadata.name} gives {found} in a row: this model embeds a text or a picture")
        if columns == {"text"}:
            texts = [text for batch in inputs for text in batch["text"]]
            reader = self.readers[hf_subset] = self.reader(task_metadata, hf_subset)
            return encode_texts(self.model, texts, self.processor, inputs.batch_size, languages=reader)
        parts = [encode_images(self.model, batch["image"], self.processor, inputs.batch_size) for batch in inputs]
        return torch.cat(parts)

    def reader(self, task_metadata: TaskMetadata, hf_subset: str) -> str | None:
        """Return which of the model's languages reads a subset: ours are called as the model's languages are, those of
        mteb say their language ("deu-Latn")."""
        reader = read_by(self.model, hf_subset, self.languages)
        spoken = task_metadata.hf_subsets_to_langscripts.get(hf_subset)
        if reader == hf_subset or not spoken:
            return reader
        return read_by(self.model, Language.get(spoken[0]).language, self.languages)


def language_code(language: str) -> str:
    """Return mteb's name of a language: "gl" is "glg-Latn"."""
    known = Language.get(language).maximize()
    return f"{known.to_alpha3()}-{known.script}"


def retrieval_data(rows: Dataset, category: str, caption_column: str = "target_caption") -> dict:
    """Return queries, corpus and relevant pairs of one split, as mteb's retrieval tasks hold them. `rows`: with
    `image_id`, `image` and captions, of which several may share a picture. `category`: "t2i" or "i2t"."""
    first_rows, owner = picture_rows(rows["image_id"])
    captions = Dataset.from_dict({"id": [f"caption-{i}" for i in range(len(rows))], "text": rows[caption_column]})
    pictures = rows.select(list(first_rows.values())).select_columns("image")
    pictures = pictures.add_column("id", [f"picture-{i}" for i in range(len(pictures))])
    relevant = {}
    for caption, picture in enumerate(owner.tolist()):
        pair = (f"caption-{caption}", f"picture-{picture}")
        query, found = pair if category == "t2i" else pair[::-1]
        relevant.setdefault(query, {})[found] = 1
    queries, corpus = (captions, pictures) if category == "t2i" else (pictures, captions)
    return {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}


def caption_task(name: str, category: str, splits: Mapping[str, Dataset]) -> AbsTaskRetrieval:
    """Return a task of the type of XM3600 and xFlickr&CO over test splits by language (see [`retrieval_data`])."""
    metadata = TaskMetadata(
        name=name + {"t2i": "T2IRetrieval", "i2t": "I2TRetrieval"}[category],
        description=f"Captions that people wrote and pictures of {name}.",
        dataset={"path": name, "revision": "local"},
        type="Any2AnyMultilingualRetrieval",
        category=category,
        modalities=["text", "image"],
        eval_langs={language: [language_code(language)] for language in splits},
        main_score="hit_rate_at_1",
    )

    def load_data(self, num_proc: int | None = None, **kwargs):
        self.dataset = {language: {"test": retrieval_data(rows, category)} for language, rows in splits.items()}
        self.data_loaded = True

    return type(metadata.name, (AbsTaskRetrieval,), {"metadata": metadata, "load_data": load_data})()


def own_tasks(model: str, dataset: str, languages: list[str], data_dir: str | None = None) -> list[AbsTaskRetrieval]:
    """Return both directions of a data set's test split: of the split that the model was trained with."""
    seed = split_seed(model, None, dataset)
    splits = {language: load_caption_dataset(dataset, language, seed, data_dir=data_dir) for language in languages}
    tests = {language: parts["test"] for language, parts in splits.items()}
    for rows in tests.values():
        check_unseen(model, source_captions(rows), f"the test of {dataset}, seed {seed}")
    return [caption_task(dataset, category, tests) for category in DIRECTIONS]


def run(
    encoder: NrccrEncoder, tasks: list[AbsTaskRetrieval], batch_size: int = 64, show_progress: bool = True
) -> dict:
    """Run the tasks. Return `{task: {language: scores}}`, with mteb's names of the scores."""
    # cache=None: mteb would keep results under the model's name, which a folder that is trained again keeps too
    result = mteb.evaluate(
        encoder,
        tasks,
        cache=None,
        co2_tracker=False,
        num_proc=1,
        show_progress_bar=show_progress,
        encode_kwargs={"batch_size": batch_size},
    )
    return {
        task.task_name: {row["hf_subset"]: row for rows in task.scores.values() for row in rows}
        for task in result.task_results
    }


def both_directions(scores: dict) -> dict[str, dict[str, float]]:
    """Return rows for [`format_markdown`] of tasks that were run in both directions: R@k in percent, and their sum.
    They are those of [`compute_retrieval_metrics`], but for equal scores: mteb ranks them by their ids, we at their
    middle."""
    names = {"t2i": "T2I", "i2t": "I2T"}
    rows = {}
    for task, languages in scores.items():
        pair = {category: task.replace("T2I", name).replace("I2T", name) for category, name in names.items()}
        if task != pair["t2i"] or pair["i2t"] not in scores:
            continue
        for language in languages:
            recalls = {
                f"{DIRECTIONS[category]}_recall@{k}": 100 * scores[other][language][f"hit_rate_at_{k}"]
                for category, other in pair.items()
                for k in RECALL_AT
            }
            row = f"{task.replace('T2I', '').removesuffix('Retrieval')} {language}"
            rows[row] = recalls | {"sum_recall": sum(recalls.values())}
    return rows


def evaluate_tasks(
    model: str,
    tasks: Sequence[str] = (),
    data: str | None = None,
    *,
    languages: Sequence[str] = (),
    task_languages: Sequence[str] | None = None,
    query_languages: Sequence[str] = (),
    data_dir: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """
    Run tasks of MTEB, or both directions of a data set of this repository.

    Args:
        model: folder or hub id.
        tasks: names of MTEB's.
        data: in their place, data sets joined by "+".
        languages: as `--language` takes them; which reads a text is what [`read_by`] says.
        task_languages: of `tasks`, as mteb names them (spa); default: all.
        query_languages: of `data`, as for [`evaluate`].
        data_dir: of `data`.

    Returns:
        `settings`, and `scores`: by task and language, with mteb's names.

    Raises:
        ValueError: there is no such task, or nothing says in which language to ask.
    """
    if bool(tasks) == (data is not None):
        raise ValueError("Name either tasks of MTEB or a data set.")
    if tasks:
        try:
            found = [mteb.get_task(name, languages=task_languages) for name in tasks]
        except KeyError as error:
            raise ValueError(f"mteb: {error}") from error
    encoder = NrccrEncoder(model, device=device, dtype=dtype, languages=languages)
    if data is not None:
        found = own_tasks(model, data, languages_to_ask(data, query_languages, languages, encoder.model), data_dir)
    scores = run(encoder, found, batch_size)
    settings = {"model": model, "language": list(languages), "mteb": mteb.__version__, "batch_size": batch_size}
    settings["read_by"] = {subset: reader or BASE for subset, reader in encoder.readers.items()}
    return {"settings": settings, "scores": scores}
