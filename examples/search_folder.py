"""
Search a folder of pictures in two languages. The second run encodes new pictures alone.

    python examples/search_folder.py outputs/english pictures --language gl=outputs/gl --language ca=outputs/ca \\
        --ask gl "un gato durmindo" --ask ca "dos gossos" --index outputs/index

`gl=outputs/gl` is a folder that `nrccr add-language` wrote; `gl` alone is a language that the model has already. The
language `base` is the model's own, without any that was added.
"""

import argparse

from modeling_nrccr import Hit, NrccrRetriever
from modeling_nrccr.loading.models import language_code, load_with_languages


def search_folder(
    model: str, folder: str, language: list[str], ask: list[tuple[str, str]], index: str | None = None, k: int = 5
) -> list[list[Hit]]:
    """
    Return the hits of each question, best first.

    Args:
        model: folder or hub id.
        folder: of pictures, searched with its sub-folders.
        language: codes of languages, each with its folder where the model has not got it.
        ask: pairs of a language's code and a query.
        index: folder that keeps the embeddings.
        k: hits of each.
    """
    loaded, processor = load_with_languages(model, language)
    retriever = NrccrRetriever(loaded, processor, index)
    skipped = retriever.add(folder, skip_existing=True, show_progress=True)
    for id, reason in skipped:  # a broken picture stops nothing
        print(f"left out: {id}, {reason}")
    if index is not None:
        retriever.save()
    # the language goes with each query: threads may ask in different ones
    return [retriever.search(query, k, language=language_code(code)) for code, query in ask]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="folder or hub id, also of a CLIP")
    options.add_argument("folder", help="of pictures")
    options.add_argument("--language", action="append", default=[], metavar="CODE[=FOLDER]", help="of queries")
    options.add_argument("--ask", action="append", nargs=2, required=True, metavar=("CODE", "QUERY"))
    options.add_argument("--index", help="folder that keeps the embeddings")
    options.add_argument("--k", type=int, default=5, help="hits of each query")
    args = options.parse_args()
    for (code, query), hits in zip(args.ask, search_folder(**vars(args))):
        print(f"{query} ({code})", *(f"  {hit.score:.3f} {hit.id}" for hit in hits), sep="\n")


if __name__ == "__main__":
    main()
