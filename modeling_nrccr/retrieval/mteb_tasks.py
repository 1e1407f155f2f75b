"""Measures a model by `mteb`, the Massive (Multilingual, Image) Text Embedding Benchmark: tasks by name, or your data:

    python examples/mteb_eval.py --model outputs/demo --task XM3600T2IRetrieval --task XM3600I2TRetrieval \
        --task_language spa --output mteb.json
    python examples/mteb_eval.py --model outputs/demo --dataset tuxpaint+cldr_emoji --target gl --output mteb.json
    python examples/mteb_eval.py --model outputs/english --language gl=outputs/gl --dataset tuxpaint+cldr_emoji

The first fetches its task from the Hub (so do Multi30kT2IRetrieval, XFlickr30kCoT2IRetrieval, ...); the second makes a
task of the same type of a data set of this repository, and gives the R@k of `evaluate_retrieval.py`. Needs
`pip install "modeling_nrccr[mteb]"`; mteb's own extra `image` is not needed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mteb
import torch
from datasets import Dataset
from langcodes import Language
from mteb import TaskMetadata
from mteb.abstasks import AbsTaskRetrieval
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from ..cli.common import command
from ..data.load import dataset_languages, load_caption_dataset
from ..data.trained_split import check_unseen, source_captions, split_seed
from ..files import write_file
from ..loading.models import BASE, load_with_languages, read_by
from ..publishing.tables import format_markdown
from ..recipes.limits import number
from .encoding import encode_images, encode_texts, picture_rows
from .metrics import RECALL_AT
from .search import add_language_option


DIRECTIONS = {"t2i": "t2v", "i2t": "v2t"}  # mteb's names, and those of `compute_retrieval_metrics`


class NrccrEncoder(AbsEncoder):
    """A model and its processor as mteb asks for embeddings: https://embeddings-benchmark.github.io/mteb

    Args:
        model_name (`str`): Folder or hub id.
        revision (`str`, *optional*): Only recorded in the results.
        device (`str`, *optional*): Where to encode; default: where transformers puts the model.
        languages (`list` of `str`): As `--language` takes them; which reads a text is what `read_by` says.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        languages: Sequence[str] = (),
        **kwargs,
    ):
        self.model, self.processor = load_with_languages(model_name, languages)
        self.languages, self.readers = languages, {}
        if device is not None:
            self.model.to(device)
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
        """Embeddings of the texts or pictures of a DataLoader, float32, `(num_rows, projection_dim)`. mteb's prompts
        are left out: the processor puts the prefix before a text. Raises ValueError for rows of both."""
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
        """Which of the model's languages reads a subset: ours are called as the model's languages are, those of mteb
        say their language ("deu-Latn")."""
        reader = read_by(self.model, hf_subset, self.languages)
        spoken = task_metadata.hf_subsets_to_langscripts.get(hf_subset)
        if reader == hf_subset or not spoken:
            return reader
        return read_by(self.model, Language.get(spoken[0]).language, self.languages)


def language_code(language: str) -> str:
    """mteb's name of a language: "gl" is "glg-Latn"."""
    known = Language.get(language).maximize()
    return f"{known.to_alpha3()}-{known.script}"


def retrieval_data(rows: Dataset, category: str, caption_column: str = "target_caption") -> dict:
    """Queries, corpus and relevant pairs of one split, as mteb's retrieval tasks hold them. `rows`: with `image_id`,
    `image` and captions, of which several may share a picture. `category`: "t2i" or "i2t"."""
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
    """A task of the type of XM3600 and xFlickr&CO over test splits by language (see [`retrieval_data`])."""
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
    """Both directions of a data set's test split: of the split that the model was trained with."""
    seed = split_seed(model, None, dataset)
    splits = {language: load_caption_dataset(dataset, language, seed, data_dir=data_dir) for language in languages}
    tests = {language: parts["test"] for language, parts in splits.items()}
    for rows in tests.values():
        check_unseen(model, source_captions(rows), f"the test of {dataset}, seed {seed}")
    return [caption_task(dataset, category, tests) for category in DIRECTIONS]


def run(
    encoder: NrccrEncoder, tasks: list[AbsTaskRetrieval], batch_size: int = 64, show_progress: bool = True
) -> dict:
    """`{task: {language: scores}}`, with mteb's names of the scores."""
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
    """Rows for [`format_markdown`] of tasks that were run in both directions: R@k in percent, and their sum. They are
    those of [`compute_retrieval_metrics`], but for equal scores: mteb ranks them by their ids, we at their middle."""
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


@command()
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="outputs/demo", help="folder or hub id of a trained model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", action="append", help="name of a task of mteb; may be given several times")
    what.add_argument("--dataset", help='builders of this repository, joined by "+"')
    add_language_option(parser, "reads texts that have none of their own")
    parser.add_argument("--task_language", action="append", help="of --task, as mteb names it (spa); default: all")
    parser.add_argument("--target", default="gl", help="of --dataset: languages, joined by commas; or all")
    parser.add_argument("--data_dir", help="folder of the data; fetched where not given")
    parser.add_argument("--batch_size", type=number(1), default=64)
    parser.add_argument("--output", help="write all scores to this JSON file")
    args = parser.parse_args(argv)
    evaluate(args)


def evaluate(args: argparse.Namespace):
    if args.task:
        try:
            tasks = [mteb.get_task(name, languages=args.task_language) for name in args.task]
        except KeyError as error:
            raise ValueError(f"mteb: {error}") from error
    else:
        languages = dataset_languages(args.dataset) if args.target == "all" else args.target.split(",")
        if not languages:
            raise ValueError(f"{args.dataset} does not say which languages it has: name them, --target de,fr.")
        tasks = own_tasks(args.model, args.dataset, languages, args.data_dir)
    encoder = NrccrEncoder(args.model, languages=args.language)
    scores = run(encoder, tasks, args.batch_size)
    for task, languages in scores.items():
        for language, row in languages.items():
            print(f"{task}, {language}: " + ", ".join(f"{k} {row[k]:.4f}" for k in ("main_score", "ndcg_at_10")))
    if rows := both_directions(scores):
        print(f"\n{format_markdown(rows)}")
    if args.output:
        settings = {"model": args.model, "language": args.language, "mteb": mteb.__version__}
        settings |= {"batch_size": args.batch_size}
        settings["read_by"] = {subset: reader or BASE for subset, reader in encoder.readers.items()}
        write_file(args.output, json.dumps({"settings": settings, "scores": scores}, indent=1) + "\n")
        print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
