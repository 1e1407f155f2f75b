"""
Add a language to a picture search that you have, and ask it in this language.

    python examples/add_language.py openai/clip-vit-base-patch32 captions.txt pictures "un gato durmindo" "dous cans"

`captions.txt` holds English captions, one a line, 200 at least; Apertium translates them. No picture is needed to
learn, and none is encoded again: the new language finds what was indexed before.
"""

import argparse

from modeling_nrccr import NrccrRetriever
from modeling_nrccr.loading.models import load_model
from modeling_nrccr.training.add_language import add_language


def add_and_ask(base: str, captions: str, pictures: str, queries: list[str], language: str, output: str, **fields):
    """
    Return what is said of the new language, and of each query its hits.

    Args:
        fields: of the recipe, such as `translator="apertium"`, `test="human.csv"`, `num_train_epochs=10`.
    """
    # what `nrccr add-language` does: it translates, trains, tests, and writes the folder `output`
    report = add_language(base, captions, language, recipe="linear", output_dir=output, **fields)

    model, processor = load_model(base)
    retriever = NrccrRetriever(model, processor)
    retriever.add(pictures)

    model.load_language(language, output)  # after the pictures, whose embeddings stay as they are
    return report, {query: retriever.search(query, k=3, language=language) for query in queries}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("base", help="folder or hub id of a CLIP, SigLIP 2, ..., or a model of ours")
    options.add_argument("captions", help="English captions: .txt, one a line; or .csv with a column caption")
    options.add_argument("pictures", help="folder to search")
    options.add_argument("queries", nargs="+", help="in the new language")
    options.add_argument("--language", default="gl", help="its code")
    options.add_argument("--translator", default="apertium", help="engine: `nrccr list engines`")
    options.add_argument("--test", help="human captions, a .csv of image and target_caption: says how good it is")
    options.add_argument("--output", default="outputs/gl", help="folder of the language")
    report, answers = add_and_ask(**vars(options.parse_args()))
    print(report["verdict"], *report["reasons"], sep="\n  ")
    for query, hits in answers.items():
        print(query, *(f"  {hit.score:.3f} {hit.id}" for hit in hits), sep="\n")


if __name__ == "__main__":
    main()
