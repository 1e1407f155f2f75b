"""Search any folder of pictures, or an index of one, with a sentence in any language:

python examples/search.py --model outputs/demo --gallery DIR --query "un gato durmindo" --output sheet.png
python examples/search.py --model outputs/demo --index outputs/gallery --query "un gato" --translation "a cat"
python examples/search.py --model outputs/english --language gl=outputs/gl --index outputs/gallery --query "un gato"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor

from datasets_scripts.reading.videos import read_frames

from ..cli.common import command
from ..configuration_nrccr import NrccrConfig
from ..dual_encoders import read_config
from ..files import printable
from ..languages import LANGUAGE_FILE
from ..loading.encoders import find_encoder
from ..media import load_image
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from ..processor_inputs import text_problem
from ..publishing.search_page import QueryRow, Result, draw_sheet, save_png
from ..recipes.limits import number
from .index import is_milvus
from .retriever import Hit, NrccrRetriever


BASE = "base"  # in the place of a language: no adapter, the model's own text side


@command()
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="outputs/demo", help="folder or hub id of a trained model")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gallery", help="folder of pictures, searched with its sub-folders")
    where.add_argument("--index", help="what index_gallery.py made: folder, NAME.db, or the URI of a Milvus server")
    parser.add_argument("--collection", default="gallery", help="name of the gallery within Milvus")
    parser.add_argument("--query", required=True, action="append", help="may be given several times")
    add_language_option(parser, "reads the queries")
    parser.add_argument("--translation", action="append", help="of each query, in English: both are asked")
    parser.add_argument(
        "--source_query_weight", type=number(0, 1, float), default=0.5, help="of the translation, from 0 to 1"
    )
    parser.add_argument("--k", type=number(1), default=5, help="pictures for each query")
    parser.add_argument("--output", help="also draw the results to this PNG file")
    parser.add_argument("--batch_size", type=number(1), default=32)
    parser.add_argument("--strict", action="store_true", help="stop at a corrupt picture rather than skip it")
    args = parser.parse_args(argv)
    search(args)


def load_model(name: str) -> tuple[NrccrModel, NrccrProcessor]:
    """A trained model, or another dual encoder (see `from_dual_encoder`), ready to encode, and its processor. Raises
    ValueError where there is none."""
    try:
        name = find_encoder(name)
        if read_config(name).model_type != NrccrConfig.model_type:  # CLIP, SigLIP 2, ...
            return NrccrModel.from_dual_encoder(name).eval(), NrccrProcessor.from_dual_encoder(name)
        return NrccrModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = "" if Path(name).is_dir() else " (`make demo` trains outputs/demo)"
        raise ValueError(f"Cannot load the model {name!r}: {str(error).splitlines()[0]}{hint}") from error


def add_language_option(parser: argparse.ArgumentParser, does: str):
    """`--language`, which `load_with_languages` reads; `does`: what the first one does."""
    parser.add_argument(
        "--language", action="append", default=[], metavar="CODE[=FOLDER]",
        help="a language of the model, or what add_language.py wrote (its folder or file), under this code; may be "
        f'given several times, and the first {does}; "{BASE}" is the model without a language',
    )  # fmt: skip


def language_code(spec: str) -> str | None:
    """Of what `--language` takes, as the model knows it."""
    code = spec.partition("=")[0]
    return None if code == BASE else code


def load_with_languages(name: str, languages: Sequence[str]) -> tuple[NrccrModel, NrccrProcessor]:
    """
    As `load_model`; the first of `languages` is the active one.

    Args:
        languages: as `--language` takes them: `CODE=FOLDER` or `CODE=FILE` of what `save_language` wrote, `CODE` of
            what the model has.

    Raises:
        ValueError: where there is no model, for a language that is not there, or was made for another model.
    """
    model, processor = load_model(name)
    for spec in reversed(languages):
        code, named, source = spec.partition("=")
        if not code or bool(named) != bool(source):
            raise ValueError(f"--language {spec!r}: give CODE of what the model has, or CODE=FOLDER")
        if source:
            path = Path(source)
            model.load_language(code, path.parent if path.name == LANGUAGE_FILE and path.is_file() else source)
        model.set_language(language_code(spec))
    return model, processor


def read_by(model: NrccrModel, target: str, languages: Sequence[str]) -> str | None:
    """Which of the model's languages reads texts in `target`: of those that `--language` gave the one of that code,
    else the first; where none was given, the model's of that code, else the active one."""
    given = [language_code(spec) for spec in languages]
    if given:
        return target if target in given else given[0]
    return target if target in model.language_adapters else model.language


def read_hit(hit: Hit) -> Image.Image:
    """The picture, or the frame of a video that is most like the whole; a grey field where the file is gone, or cannot
    be read any more, which is said."""
    if "path" not in hit.metadata:
        raise ValueError(f"The gallery does not say which file {hit.id!r} is: leave out --output.")
    path, num_frames = hit.metadata["path"], hit.metadata.get("num_frames")
    try:
        return load_image(path) if num_frames is None else read_frames(path, num_frames)[hit.metadata["frame"]]
    except Exception as error:  # decoders of broken files raise anything
        print(f"cannot show {printable(path)}: {printable(str(error))}")
        return Image.new("RGB", (64, 64), "lightgrey")


def search(args: argparse.Namespace):
    translations = args.translation or [None] * len(args.query)
    if len(translations) != len(args.query):
        raise ValueError(f"Got {len(args.query)} queries and {len(translations)} translations: give each query one.")
    for option, texts in (("--query", args.query), ("--translation", args.translation or ())):
        for text in texts:  # before the gallery is encoded
            if problem := text_problem(text):
                raise ValueError(f"{option} {problem}")
    model, processor = load_with_languages(args.model, args.language)
    if args.index:
        options = {"collection": args.collection} if is_milvus(args.index) else {}
        retriever, skipped = NrccrRetriever.load(args.index, model, processor, **options), []
    else:
        retriever = NrccrRetriever(model, processor)
        skipped = retriever.add(args.gallery, strict=args.strict, batch_size=args.batch_size, show_progress=True)
    size = len(retriever)
    print(f"{size} pictures in {args.index or args.gallery}" + (f", {len(skipped)} skipped" if skipped else ""))
    rows = []
    for query, translation in zip(args.query, translations):
        hits = retriever.search(query, args.k, None, translation, args.source_query_weight)
        print(
            f"\n{printable(query)}",
            *(f"{i:4d}  {hit.score:.3f}  {printable(str(hit.id))}" for i, hit in enumerate(hits, 1)),
            sep="\n",
        )
        if args.output:
            rows.append(QueryRow(query, translation, [Result(read_hit(hit), hit.id, hit.score) for hit in hits]))
    if args.output:
        save_png(draw_sheet(f"{size} pictures", rows), args.output)
        print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
