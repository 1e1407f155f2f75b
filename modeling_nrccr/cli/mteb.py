"""Test a model on tasks of MTEB, or on a data set of this repository as such a task.

    nrccr mteb outputs/demo --task XM3600T2IRetrieval --task XM3600I2TRetrieval --task_language spa --output mteb.json
    nrccr mteb outputs/english --language gl=outputs/gl --data tuxpaint+cldr_emoji --output mteb.json

The first fetches its task from the Hub (so do Multi30kT2IRetrieval, XFlickr30kCoT2IRetrieval, ...); the second gives
the R@k of `nrccr evaluate`. Needs mteb (the extra `mteb`).
"""

from .common import add_model_options, command, parser, renamed


@command()
def main(argv: list[str] | None = None):
    options = parser("mteb", *__doc__.split("\n\n", 1))
    options.add_argument("model", metavar="MODEL", help="folder or hub id, also of a dual encoder such as CLIP")
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--task", dest="tasks", action="append", default=[], help="name of a task of mteb; may be given several times"
    )
    what.add_argument("--data", help='data sets of this repository, joined by "+"')
    options.add_argument(
        "--task_language",
        dest="task_languages",
        action="append",
        help="of --task, as mteb names it (spa); default: all",
    )
    options.add_argument(
        "--query_language",
        dest="query_languages",
        action="append",
        default=[],
        metavar="CODE",
        help="of --data; may be given several times; all: whatever it has; default: those of --language, else those "
        "that were added to the model",
    )
    options.add_argument("--data_dir", metavar="FOLDER", help="of --data; fetched where not given")
    options.add_argument("--output", metavar="FILE", help="write all scores to this JSON file")
    add_model_options(options, "reads texts that have none of their own", batch_size=64)
    renamed(options, "--model", "MODEL, as in nrccr mteb MODEL")
    renamed(options, "--dataset", "--data")
    renamed(options, "--target", "--query_language")
    args = vars(options.parse_args(argv))
    output, args["languages"] = args.pop("output"), args.pop("language")

    import json

    from ..files import write_file
    from ..publishing.tables import format_markdown
    from ..retrieval.mteb_tasks import both_directions, evaluate_tasks

    report = evaluate_tasks(args.pop("model"), **args)
    for task, languages in report["scores"].items():
        for language, row in languages.items():
            print(f"{task}, {language}: " + ", ".join(f"{k} {row[k]:.4f}" for k in ("main_score", "ndcg_at_10")))
    if rows := both_directions(report["scores"]):
        print(f"\n{format_markdown(rows)}")
    if output:
        write_file(output, json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {output}")
