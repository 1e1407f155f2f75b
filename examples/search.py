"""Search any folder of pictures with a sentence in any language:

python examples/search.py --model outputs/demo --gallery DIR --query "un gato durmindo" --output sheet.png
"""

import argparse
import sys
from pathlib import Path

from search_page import QueryRow, Result, draw_sheet, save_png
from transformers import AutoProcessor

from modeling_nrccr import NrccrModel, NrccrProcessor, NrccrRetriever
from modeling_nrccr.processing_nrccr import load_image


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="outputs/demo", help="folder or hub id of a trained model")
    parser.add_argument("--gallery", required=True, help="folder of pictures, searched with its sub-folders")
    parser.add_argument("--query", required=True, action="append", help="may be given several times")
    parser.add_argument("--k", type=int, default=5, help="pictures for each query")
    parser.add_argument("--output", help="also draw the results to this PNG file")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--strict", action="store_true", help="stop at a corrupt picture rather than skip it")
    args = parser.parse_args(argv)
    try:
        search(args)
    except (ValueError, OSError) as error:  # what a user can put right: a line without a traceback
        sys.exit(f"error: {error}")


def load_model(name: str) -> tuple[NrccrModel, NrccrProcessor]:
    """A trained model, ready to encode, and its processor. Raises ValueError where there is none."""
    try:
        return NrccrModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    except OSError as error:
        missing = (
            "" if Path(name).is_dir() else "there is no such folder (`make demo` trains outputs/demo); as a hub id: "
        )
        raise ValueError(f"Cannot load the model {name!r}: {missing}{str(error).splitlines()[0]}") from error


def search(args: argparse.Namespace):
    retriever = NrccrRetriever(*load_model(args.model))
    skipped = retriever.add(args.gallery, strict=args.strict, batch_size=args.batch_size, show_progress=True)
    print(f"{len(retriever)} pictures in {args.gallery}" + (f", {len(skipped)} skipped" if skipped else ""))
    rows = []
    for query in args.query:
        hits = retriever.search(query, k=args.k)
        print(f"\n{query}", *(f"{i:4d}  {hit.score:.3f}  {hit.id}" for i, hit in enumerate(hits, 1)), sep="\n")
        if args.output:
            rows.append(QueryRow(query, None, [Result(load_image(h.metadata["path"]), h.id, h.score) for h in hits]))
    if args.output:
        save_png(draw_sheet(f"{len(retriever)} pictures", rows), args.output)
        print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
