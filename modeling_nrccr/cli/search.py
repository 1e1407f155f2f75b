"""Search an index, or a folder of pictures, with sentences in any language.

    nrccr search outputs/gallery "un gato durmindo" "dous cans" --output sheet.png
    nrccr search outputs/gallery "un gato" --translation "a cat"
    nrccr search --folder PICTURES --model outputs/english --language gl=outputs/gl "un gato"

An index of `nrccr index` remembers its model and languages; --model takes the place of both.
"""

from ..files import printable
from .common import add_model_options, command, number, parser, renamed


@command()
def main(argv: list[str] | None = None):
    options = parser("search", *__doc__.split("\n\n", 1))
    options.add_argument(
        "words", nargs="*", metavar="INDEX QUERY", help="what `nrccr index` wrote (not after --folder), then queries"
    )
    options.add_argument("--folder", help="of pictures, searched with its sub-folders, in the place of an index")
    options.add_argument("--model", help="folder or hub id; default: the one that the index remembers")
    options.add_argument("--collection", default="gallery", help="name of the gallery within Milvus")
    options.add_argument(
        "--translation", dest="translations", action="append", help="of each query, in English: both are asked"
    )
    options.add_argument(
        "--translation_weight", type=number(0, 1, float), default=0.5, help="of the translation, from 0 to 1"
    )
    options.add_argument("--k", type=number(1), default=5, help="pictures for each query")
    options.add_argument("--output", metavar="FILE", help="also draw the results to this PNG file")
    options.add_argument("--strict", action="store_true", help="stop at a broken picture rather than skip it")
    add_model_options(options, "reads the queries")
    renamed(options, "--gallery", "--folder")
    renamed(options, "--index", "INDEX, as in nrccr search INDEX QUERY")
    renamed(options, "--query", "QUERY, as in nrccr search INDEX QUERY")
    renamed(options, "--source_query_weight", "--translation_weight")
    args = vars(options.parse_intermixed_args(argv))
    words, output, args["languages"] = args.pop("words"), args.pop("output"), args.pop("language")
    place = args["folder"]
    if place is None:
        place, words = (words[0], words[1:]) if words else (None, words)
        args["index"] = place
    if place is None or not words:
        options.error("give an index and queries: nrccr search INDEX QUERY, or --folder PICTURES --model NAME QUERY")

    from ..retrieval.search import search

    found = search(words, **args)
    print(f"{found.size} pictures in {place}" + (f", {len(found.skipped)} skipped" if found.skipped else ""))
    for query, _, hits in found.answers:
        lines = (f"{i:4d}  {hit.score:.3f}  {printable(str(hit.id))}" for i, hit in enumerate(hits, 1))
        print(f"\n{printable(query)}", *lines, sep="\n")
    if output:
        draw(found, output)
        print(f"\nwrote {output}")


def draw(found, output: str):
    """Draw what was found into a PNG file."""
    from ..publishing.search_page import QueryRow, Result, draw_sheet, save_png
    from ..retrieval.search import read_hit

    rows = []
    for query, translation, hits in found.answers:
        shown = [(hit, *read_hit(hit)) for hit in hits]
        for problem in (problem for _, _, problem in shown if problem):
            print(printable(problem))
        rows.append(QueryRow(query, translation, [Result(picture, hit.id, hit.score) for hit, picture, _ in shown]))
    save_png(draw_sheet(f"{found.size} pictures", rows), output)
