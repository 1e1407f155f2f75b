"""Measure a model on human captions of a data set, both directions, beside chance.

    nrccr evaluate outputs/demo --data tuxpaint+cldr_emoji --query_language gl --output metrics.json
    nrccr evaluate outputs/english --language gl=outputs/gl --translator apertium
    nrccr evaluate outputs/demo --data xm3600 --data_dir xm3600 --query_language all

With --translator the translated query, and both fused, stand beside the model's own. Behind each SumR is its interval:
the middle 95 % of 1,000 draws of the test's groups of pictures. Of several languages come the mean and the worst.
"""

from .common import add_model_options, command, number, parser, renamed


@command()
def main(argv: list[str] | None = None):
    options = parser("evaluate", *__doc__.split("\n\n", 1))
    options.add_argument("model", metavar="MODEL", help="folder or hub id, also of a dual encoder such as CLIP")
    options.add_argument("--data", default="tuxpaint+cldr_emoji", help='data sets, joined by "+"; see nrccr list data')
    options.add_argument("--data_dir", metavar="FOLDER", help="of the data; fetched where not given")
    options.add_argument("--visual_feature", help="folder of features, or a name in data_dir/FeatureData")
    options.add_argument(
        "--media_dir", metavar="FOLDER", help="of pictures or videos; default: images or videos in data_dir"
    )
    options.add_argument("--num_frames", type=number(1), default=8, help="of each video, as in training")
    options.add_argument(
        "--query_language",
        dest="query_languages",
        action="append",
        default=[],
        metavar="CODE",
        help="of the captions; may be given several times; all: whatever the data has; default: those of --language, "
        "else those that were added to the model",
    )
    options.add_argument("--split", help="default: the test, or the only one")
    options.add_argument("--split_seed", type=int, help="default: the one that the model was trained with")
    options.add_argument("--translator", metavar="ENGINE", help="also ask in translation; see nrccr list engines")
    options.add_argument(
        "--translation_weight",
        type=number(0, 1, float),
        default=0.5,
        help="of the translated query in the fused one, from 0 to 1",
    )
    options.add_argument("--output", metavar="FILE", help="write all numbers to this JSON file")
    add_model_options(options, "reads captions that have none of their own", batch_size=64)
    old = {"--model": "MODEL, as in nrccr evaluate MODEL", "--dataset": "--data", "--target": "--query_language"}
    for name, new in (old | {"--seed": "--split_seed", "--source_query_weight": "--translation_weight"}).items():
        renamed(options, name, new)
    args = vars(options.parse_args(argv))
    output, args["languages"] = args.pop("output"), args.pop("language")

    import json

    from ..files import write_file
    from ..publishing.tables import format_table
    from ..retrieval.evaluation import evaluate

    found = evaluate(args.pop("model"), args.pop("data"), **args)
    print(f"\n{found.title}\n", format_table(found.rows), "", *found.notes, sep="\n")
    if output:
        write_file(output, json.dumps(found.report, indent=1) + "\n")
        print(f"\nwrote {output}")
