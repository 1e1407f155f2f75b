"""Train a cross-lingual picture search by a recipe, and say how good it is, beside what a user would try first:

    nrccr train --recipe demo
    nrccr train --recipe paper/vatex --data_dir FOLDER
    nrccr train --recipe mine.yaml --language ca --output_dir outputs/ca
    nrccr train --num_processes 2 --recipe joint

Without `--recipe` it runs `joint`. Every field of a recipe is also a flag, and a flag wins. Writes into `output_dir`:
the model (safetensors), its processor and card, `metrics.json`, `search.html`, `search.png`. Checkpoints go to
`<output_dir>-checkpoints/`; `--resume_from_checkpoint true` goes on from the last one of each part.

`accelerate launch examples/train.py` takes the same flags and starts processes by a configuration of its own; told
`--quiet`, it adds no traceback to the line in which a run ends.
"""

import os
import sys

from ..recipes.fields import ExperimentArguments, ModelArguments
from ..recipes.limits import number
from .common import RecipeParser, command


@command("checkpoints are kept: --resume_from_checkpoint true goes on from the last one")
def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    options = RecipeParser(
        "train",
        "Train a model by a recipe, and test it.",
        ExperimentArguments,
        ModelArguments,
        epilog="Writes output_dir; checkpoints go to output_dir-checkpoints.",
    )
    options.add_argument(
        "--num_processes", type=number(1), default=1, help="processes of this machine, one a GPU, or on CPUs"
    )
    given, flags = options.parse_known_args(argv)
    if given.num_processes > 1:
        from .launch import start_processes

        return start_processes("train", flags, given.num_processes)
    from ..publishing.tables import format_table
    from ..training.run import parse_arguments, report_rows, run

    script, model, args = parse_arguments([*flags, *["--help"] * given.help_all])
    report = run(script, model, args, flags)
    if not int(os.environ.get("RANK", 0)):
        print(format_table(report_rows(report)))
        print(f"wrote {args.output_dir}; next: nrccr evaluate {args.output_dir}")
