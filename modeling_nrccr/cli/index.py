"""Index a folder of pictures and videos; run again, it adds what is new.

    nrccr index outputs/english PICTURES outputs/gallery
    nrccr index google/siglip2-base-patch16-224 PICTURES outputs/gallery --language gl=outputs/gl
    torchrun --nproc_per_node 2 -m modeling_nrccr index outputs/english PICTURES outputs/gallery

INDEX is a folder (faiss), NAME.db (Milvus Lite) or http://localhost:19530 (a Milvus server). It remembers its model
and languages, so that `nrccr search INDEX "a cat"` needs neither. What is left out stands in left_out.csv.
"""

from ..files import printable
from .common import add_model_options, command, number, parser, renamed


@command("what was encoded is kept: the same command goes on")
def main(argv: list[str] | None = None):
    options = parser("index", *__doc__.split("\n\n", 1))
    options.add_argument("model", metavar="MODEL", help="folder or hub id, also of a dual encoder such as CLIP")
    options.add_argument("folder", metavar="FOLDER", help="of pictures and videos, with its sub-folders")
    options.add_argument("index", metavar="INDEX", help="folder, NAME.db, or the URI of a Milvus server")
    options.add_argument("--collection", default="gallery", help="name of the gallery within Milvus")
    options.add_argument("--copy_from", metavar="INDEX", help="another index of this folder, to begin with")
    options.add_argument("--num_frames", type=number(1), default=8, help="of each video, sampled uniformly")
    options.add_argument("--shard_size", type=number(1), default=256, help="files between two writes")
    options.add_argument("--remove_missing", action="store_true", help="remove from the index what left the folder")
    options.add_argument("--strict", action="store_true", help="stop at a broken file rather than leave it out")
    options.add_argument("--retry", action="store_true", help="try again what was broken and has not changed")
    add_model_options(options, "is what `nrccr search` asks in")
    for old, new in (("--model", "MODEL"), ("--gallery", "FOLDER"), ("--index", "INDEX")):
        renamed(options, old, f"{new}, as in nrccr index MODEL FOLDER INDEX")
    args = vars(options.parse_args(argv))
    args["languages"] = args.pop("language")

    from ..retrieval.indexer import index_folder

    done = index_folder(**args)
    if done is None:  # one of several processes, of which the first prints
        return
    for file, reason in done.skipped:
        print(f"skipped {printable(file)}: {printable(reason)}")
    print(done.summary())
    print(f'{args["index"]} has {done.size:,}: search it by nrccr search {args["index"]} "a cat"')
