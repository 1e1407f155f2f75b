"""Measure how noisy a translated data set is, as a table, JSON and a page to read.

    nrccr noise --data tuxpaint+cldr_emoji --language gl --translator apertium --against_human
    nrccr noise --data outputs/pictures-gl --language gl --output_dir outputs/noise

The second is of a folder that `nrccr translate` wrote. `--against_human` compares the translations of training with
human captions too, where the data set has them.
"""

from pathlib import Path

from .common import command, number, parser, renamed


@command()
def main(argv: list[str] | None = None):
    options = parser("noise", *__doc__.split("\n\n", 1))
    options.add_argument("--data", default="tuxpaint+cldr_emoji", help='data sets, joined by "+", a file or a folder')
    options.add_argument("--language", default="gl", help="language of the translations")
    options.add_argument("--source_language", default="en", help="language of the captions")
    options.add_argument("--data_dir", help="folder of the data, or its Debian packages")
    options.add_argument("--translator", default="apertium", help="engine, where the data has no translations yet")
    options.add_argument("--split_seed", type=int, default=0, help="which pictures are in which split")
    options.add_argument("--splits", nargs="*", default=[], help="which; all if not given")
    options.add_argument("--against_human", action="store_true", help="compare with human captions of training too")
    options.add_argument("--num_worst", type=number(0), default=50, help="pairs to show of each split")
    options.add_argument("--output_dir", default="outputs/noise", help="for noise.json and noise.html")
    for old, new in {"--dataset": "--data", "--source": "--source_language", "--target": "--language"}.items():
        renamed(options, old, new)
    given = vars(options.parse_args(argv))

    from ..publishing.noise_report import format_entries, report_noise

    print(format_entries(report_noise(**given)))
    output = Path(given["output_dir"])
    print(f"\nwrote {output / 'noise.json'}\nnext: open {output / 'noise.html'} in a browser", flush=True)
