"""Turn a checkpoint of the released implementation (arXiv 2208.12526) into a folder that `AutoModel` loads:

    nrccr convert model_best.pth.tar outputs/converted --tokenizer bert-base-multilingual-cased

The file is pickled. It is read with an allow-list (tensors, numbers, the training options); anything else is refused.
"""

from .common import command, parser


@command()
def main(argv: list[str] | None = None):
    options = parser("convert", __doc__.split("\n")[0].rstrip(":"))
    options.add_argument("path", help="the .pth.tar file")
    options.add_argument("folder", help="a new one")
    options.add_argument("--text_config", help="the text encoder's: hub id, folder or JSON file; default: a BERT")
    options.add_argument("--tokenizer", help="the text encoder's: hub id or folder; default: no processor is written")
    args = vars(options.parse_args(argv))

    from ..training.convert_original import convert_original

    print(convert_original(**args) + ("" if args["tokenizer"] else " Give --tokenizer for one."))
    print(f"wrote {args['folder']}: model, {'processor, ' if args['tokenizer'] else ''}model card")
    print(f"to test it: nrccr evaluate {args['folder']}")
