"""Publish a trained model, or a language: weights, processor, code and card, nothing pickled. Look at it first:

    nrccr push outputs/demo --dry_run outputs/upload
    nrccr push outputs/demo --repo_id YOU/nrccr-gl --private

A language of `nrccr add-language`: its file alone, a few megabytes, or the model with it inside:

    nrccr push outputs/gl --base google/siglip2-base-patch16-224 --repo_id YOU/gl
    nrccr push outputs/english --language gl=outputs/gl --repo_id YOU/english-gl

Uploading needs `hf auth login`. Pushed again, it replaces what it wrote before.
"""

from .common import command, parser, renamed


@command()
def main(argv: list[str] | None = None):
    options = parser("push", __doc__.split(". ")[0])
    options.add_argument("model", help="folder that `nrccr train` or `nrccr add-language` wrote")
    options.add_argument("--repo_id", help="where to, such as YOU/nrccr-gl")
    options.add_argument("--private", action="store_true", help="of a new repository: nobody else sees it")
    options.add_argument("--revision", help="branch to push to; made where it is not there; default: main")
    options.add_argument("--dry_run", metavar="FOLDER", help="write what would be uploaded to a new folder, and stop")
    options.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="CODE=FOLDER",
        help="that `nrccr add-language` wrote: published in the model; several times, the first is active",
    )
    options.add_argument("--base", help="hub id of the model that a language was added to, where that was a folder")
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of a model's weights; default: as they were saved"
    )
    renamed(options, "--model", "the first argument: nrccr push MODEL")
    renamed(options, "--base_model", "--base")
    args = vars(options.parse_args(argv))

    from ..publishing.push import publish

    files, where = publish(languages=args.pop("language"), **args)
    for name, size in files:
        print(f"{name}  {size:,} bytes")
    if args["dry_run"]:
        print(f"{len(files)} files: written to {where}, not uploaded")
        print(f"upload them: nrccr push {args['model']} --repo_id {args['repo_id'] or 'YOU/NAME'} ...")
    else:
        print(f"{len(files)} files: {where}")
