"""Write the folder that is the Space (model, index, clips, code), to be tried here and pushed as it is:

    nrccr space
    python outputs/space/app.py

By default Galician, Catalan and Spanish, as `nrccr add-language` adds them to outputs/english (docs/languages.md). Of
one model as it is, such as that of `make demo`, or with other languages:

    nrccr space outputs/demo
    nrccr space outputs/english --language gl=outputs/gl
"""

from .common import add_model_options, command, parser, renamed


@command()
def main(argv: list[str] | None = None):
    options = parser("space", __doc__.split("\n")[0].rstrip(":"))
    options.add_argument(
        "model",
        nargs="?",
        help="folder of a trained model; default: outputs/english with outputs/gl-ca-es",
    )
    options.add_argument("folder", nargs="?", default="outputs/space", help="replaced, if it is a Space already")
    options.add_argument("--data_dir", help="folder with the contents of the Debian packages; by default fetched")
    options.add_argument("--clips_dir", help="folder of animated emoji (1f600.webp); by default fetched with npm")
    options.add_argument("--emoji_only", action="store_true", help="without Tux Paint's stamps")
    options.add_argument("--no_clips", action="store_true", help="without animated emoji")
    add_model_options(options, "is the model's active one")
    renamed(options, "--model", "the first argument: nrccr space MODEL FOLDER")
    renamed(options, "--output", "the second argument: nrccr space MODEL FOLDER")
    args = vars(options.parse_args(argv))

    from ..space.build import build_space

    left_out = {"stamps": not args.pop("emoji_only"), "clips": not args.pop("no_clips")}
    size = build_space(languages=args.pop("language"), **left_out, **args)
    print(f"wrote {args['folder']} ({size / 1e6:.0f} MB)")
    print(f"try it: python {args['folder']}/app.py")
    print(f"publish it: hf upload YOU/search-pictures {args['folder']} --repo-type space")
