"""Train a small translation engine (Marian's architecture) on human caption pairs, and say how good it is.

    nrccr train-translator --data_dir FOLDER_OF_MULTI30K
    nrccr translate --data tuxpaint+cldr_emoji --language cs --translator seq2seq:outputs/marian-en-cs --output_dir out

Without `--recipe` it runs `marian_en_cs`; every field of a recipe is also a flag, and a flag wins. Writes into
`output_dir`, in the layout of OPUS-MT: the model (safetensors), `source.spm`, `target.spm`, `vocab.json`, and
`metrics.json`. Checkpoints go to `<output_dir>-checkpoints/`; `--resume_from_checkpoint true` goes on from the last
one; `--do_train false` tests what is in `output_dir`.
"""

import sys
from pathlib import Path

from ..recipes.fields import TranslatorArguments
from .common import RecipeParser, command


@command("checkpoints are kept: --resume_from_checkpoint true goes on from the last one")
def main(argv: list[str] | None = None):
    options = RecipeParser("train-translator", __doc__, TranslatorArguments)
    given, flags = options.parse_known_args(sys.argv[1:] if argv is None else argv)

    from ..training.translator import format_scores, parse_arguments, run

    script, args = parse_arguments([*flags, *["--help"] * given.help_all])
    output = Path(args.output_dir)  # training changes it
    print(format_scores(run(script, args)["scores"]))
    print(f"wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    print(f"next: nrccr translate --language {script.language} --translator seq2seq:{output} --output_dir FOLDER")
