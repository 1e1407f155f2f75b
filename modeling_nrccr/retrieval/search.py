"""Search any folder of pictures, or an index of one, with a sentence in any language:

python examples/search.py --model outputs/demo --gallery DIR --query "un gato durmindo" --output sheet.png
python examples/search.py --model outputs/demo --index outputs/gallery --query "un gato" --translation "a cat"
python examples/search.py --model outputs/english --language gl=outputs/gl --index outputs/gallery --query "un gato"
"""

import argparse

from PIL import Image

from datasets_scripts.reading.videos import read_frames

from ..cli.common import command
from ..files import printable
from ..loading.models import BASE, load_with_languages
from ..media import load_image
from ..processor_inputs import text_problem
from ..publishing.search_page import QueryRow, Result, draw_sheet, save_png
from ..recipes.limits import number
from .index import is_milvus
from .retriever import Hit, NrccrRetriever


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


def add_language_option(parser: argparse.ArgumentParser, does: str):
    """`--language`, which `load_with_languages` reads; `does`: what the first one does."""
    parser.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="CODE[=FOLDER]",
        help="a language of the model, or what add_language.py wrote (its folder or file), under this code; may be "
        f'given several times, and the first {does}; "{BASE}" is the model without a language',
    )


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
