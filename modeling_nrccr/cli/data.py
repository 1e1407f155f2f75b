"""Check a data set, or push its captions to the Hub:

    nrccr data check multi30k --data_dir multi30k
    nrccr data check caption_files --data_dir my-pictures --decode
    nrccr data push multi30k --config task1-de --data_dir multi30k --dry_run upload
    nrccr data push multi30k --config task1-de --data_dir multi30k --repo_id me/multi30k-captions

`check` compares counts with the expected ones, and says what is missing, where to get it, and under which terms.
`push` publishes captions and ids, never media, as Parquet with a dataset card.
"""

import sys

from .common import command, parser


FOLDERS = {"image_dir": "pictures", "media_dir": "videos or pictures", "visual_feature": "features"}


@command()
def main(argv: list[str] | None = None):
    options = parser("data", __doc__.split("\n")[0].rstrip(":"))
    commands = options.add_subparsers(required=True, metavar="check|push")
    check_options = commands.add_parser("check", allow_abbrev=False, help="compare a folder with what is expected")
    push_options = commands.add_parser("push", allow_abbrev=False, help="publish captions and ids, never media")
    for part, run in ((check_options, check), (push_options, push)):
        part.set_defaults(run=run)
        part.add_argument("name", help="of the data set: `nrccr list data`")
        part.add_argument("--data_dir", metavar="FOLDER", help="of the data; downloaded where a data set can be")
        part.add_argument(
            "--config",
            dest="configs",
            metavar="NAME",
            action="append",
            default=[],
            help="one configuration; may be given several times; default: all with known counts, or all to push",
        )
    for option, what in FOLDERS.items():
        check_options.add_argument(f"--{option}", metavar="FOLDER", help=f"of the {what}, where it is another")
    check_options.add_argument("--decode", action="store_true", help="open every picture too")
    push_options.add_argument("--repo_id", help="where to, such as me/multi30k-captions")
    push_options.add_argument("--private", action="store_true", help="of a new repository: nobody else sees it")
    push_options.add_argument("--license", help="of the captions, as the Hub names it; default: the data set's")
    push_options.add_argument("--dry_run", metavar="FOLDER", help="write what would be uploaded to it, and stop")
    args = vars(options.parse_args(argv))
    args.pop("run")(**args)


def check(name: str, **options):
    """Show what `verify` finds; ends with exit code 1 where something is amiss."""
    from datasets_scripts.tools.verify import find_builder, verify, where_and_terms

    table, problems = verify(name, **options)
    print("\n".join([*table, "", where_and_terms(find_builder(name)), "", *problems]))
    if problems:
        sys.exit(f"{len(problems)} things are not as expected")
    known = getattr(find_builder(name), "EXPECTED", {})
    print("all as expected" if known else "all readable; no counts are known to compare with")


def push(name: str, **options):
    """Show what `publish` wrote or uploaded."""
    from datasets_scripts.tools.push_to_hub import publish

    files, where, terms = publish(name, **options)
    for file, size in files:
        print(f"{file}  {size:,} bytes")
    print(f"{len(files)} files: " + (f"written to {where}, not uploaded" if options["dry_run"] else where))
    print(f"Terms of the captions: {terms}")
