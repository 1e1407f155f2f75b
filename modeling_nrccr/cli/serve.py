"""Serve a model over HTTP: embeddings of texts and pictures, and the search of a gallery.

    nrccr serve outputs/demo --index outputs/gallery

    curl --json '{"texts": ["can correndo"]}' http://127.0.0.1:8000/embed
    curl --json '{"text": "can correndo", "k": 5}' http://127.0.0.1:8000/search

What arrives together is encoded in one batch, and everything is bounded. At Ctrl+C it answers what it has accepted.
It has one model and no password: for more, put a proxy before several of it. See docs/serve.md.
"""

from dataclasses import fields

from ..serving.limits import LOCAL, Limits
from .common import add_model_options, command, number, parser, renamed


@command("nothing is lost")
def main(argv: list[str] | None = None):
    options = parser("serve", *__doc__.split("\n\n", 1))
    options.add_argument("model", metavar="MODEL", help="folder or hub id, also of a dual encoder such as CLIP")
    options.add_argument("--index", help="what `nrccr index` made: folder, NAME.db, or the URI of a Milvus server")
    options.add_argument("--collection", default="gallery", help="name of the gallery within Milvus")
    options.add_argument(
        "--filter_by", dest="filters", action="append", default=[], help="metadata that a search may filter by"
    )
    options.add_argument("--host", default="127.0.0.1", help="address to listen at")
    options.add_argument(
        "--allowed_host",
        dest="allowed_hosts",
        action="append",
        help="name that requests may call the server by: search.example.org, *.example.org or *; may be given several "
        f"times; default: {', '.join(LOCAL)}; any, where --host is another",
    )
    options.add_argument("--port", type=number(0, 65535), default=8000, help="0: a free one")
    add_model_options(options, "is the default of requests", Limits.batch_size)
    names = [part.name for part in fields(Limits)]
    for part in fields(Limits):
        if part.name != "batch_size":
            options.add_argument(f"--{part.name}", type=int, default=part.default, help=part.metadata["help"])
    renamed(options, "--max_batch", "--batch_size")
    args = vars(options.parse_args(argv))
    args["languages"], args["limits"] = args.pop("language"), Limits(**{name: args.pop(name) for name in names})

    from ..serving.service import serve

    serve(args.pop("model"), **args)
