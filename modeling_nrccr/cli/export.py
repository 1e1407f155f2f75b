"""Write a model for applications that know nothing of this package, and show that nothing changed:

    nrccr export outputs/demo outputs/demo-onnx --to onnx --int8
    nrccr export openai/clip-vit-base-patch32 outputs/gl-clip --language gl=outputs/gl \\
        --to transformers sentence-transformers open_clip

Random batches, or 200 texts and 20 pictures, are compared with the model, and where anything gives other embeddings
nothing is written. An export reads texts in one language, the model's or `--language gl` (`gl=FOLDER` for one of
`nrccr add-language`). `--data` counts what each file of onnx finds, `--report` keeps the numbers. See docs/export.md.
"""

import json

from ..export.formats import FORMATS
from .common import add_model_options, command, parser, renamed


@command()
def main(argv: list[str] | None = None):
    options = parser("export", __doc__.split("\n")[0].rstrip(":"))
    options.add_argument("model", help="folder or hub id of a trained model, or of a dual encoder such as CLIP")
    options.add_argument("folder", help="of the files; of several formats each has a folder in it")
    options.add_argument(
        "--to",
        nargs="+",
        default=["onnx"],
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}, or your own: module:function",
    )
    options.add_argument("--sides", nargs="+", choices=["text", "image"], help="of onnx and immich; default: both")
    options.add_argument("--int8", action="store_true", default=None, help="of onnx: also with weights of 8 bits")
    options.add_argument("--torch_export", metavar="FOLDER", help="of onnx: for torch.export programs, elsewhere")
    options.add_argument("--data", help='test each file on it: data sets, joined by "+", such as tuxpaint+cldr_emoji')
    options.add_argument("--data_dir", help="folder of its data; fetched where not given")
    options.add_argument("--query_language", metavar="CODE", help="of its queries; default: that of --language")
    options.add_argument("--report", metavar="FILE", help="write the numbers to this JSON file")
    add_model_options(options, "reads the texts")
    renamed(options, "--dataset", "--data")
    renamed(options, "--target", "--query_language")
    args = vars(options.parse_args(argv))

    from ..export.formats import export_model
    from ..export.report import format_report
    from ..files import write_file

    report, languages = args.pop("report"), args.pop("language")
    written = export_model(args.pop("model"), args.pop("folder"), args.pop("to"), languages, **args)
    for kind, (folder, found) in written.items():
        if kind == "onnx":
            print(f"{format_report(found)}\n")
        elif "summary" in found:
            print(found["summary"])
        print(f"{kind}: {folder}")
    if report:
        reports = {kind: found for kind, (_, found) in written.items()}
        write_file(report, json.dumps(reports if len(reports) > 1 else found, indent=1) + "\n")
        print(f"the numbers: {report}")
    print("what loads these files: README.md beside them, or docs/export.md")
