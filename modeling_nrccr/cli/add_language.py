"""Add a language to a dual encoder that you have, from English captions and machine translation alone; no picture is
encoded again.

    nrccr add-language outputs/demo --language gl --data captions.csv
    nrccr add-language google/siglip2-base-patch16-224 --recipe recommended --language gl --data captions.csv \\
        --test human.csv

`captions.csv` has a column `caption` (or is a .txt file, a caption a line; or name data sets of `nrccr list data`).
BASE is the folder or hub id of a CLIP, SigLIP 2, ..., open_clip:NAME, or of a model of ours. Writes into `output_dir`
(default: outputs/CODE) the language file, a few megabytes, `report.json` and `README.md`. With `--test human.csv`
(columns `image` and `target_caption`, written by people; `caption`, their English, if you have it) the report says how
well the language is searched, beside the base, the translated query and what else a team would try (`--rivals all`),
and "do not use" where it is worse than the base. Run it again: it goes on where it was stopped.

Recipes: `linear` (default; seconds), `recommended` (LoRA in all layers; minutes), and `pictures`, which learns more
where captions have pictures (column `image`). Every field of a recipe is also a flag, and a flag wins. `--language
gl,ca,es` teaches one adapter several languages, each as often as the others.
"""

import sys
from pathlib import Path

from ..recipes.fields import LanguageArguments
from .common import RecipeParser, command


@command("what was translated and trained is kept: the same command goes on")
def main(argv: list[str] | None = None):
    options = RecipeParser("add-language", __doc__, LanguageArguments, arguments="BASE ")
    given, flags = options.parse_known_args(sys.argv[1:] if argv is None else argv)

    from ..publishing.tables import format_table
    from ..training.add_language import parse_arguments, run

    script, args = parse_arguments([*flags, *["--help"] * given.help_all])
    output = Path(args.output_dir)  # training changes it
    report = run(script, args)
    if report["found"]:
        print(format_table(report["found"]))
    print(f"{report['verdict']}{': ' if report['reasons'] else ''}{'; '.join(report['reasons'])}")
    print(f"wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    model = output / "model" if script.text_encoder else script.base
    print(f"next: nrccr index {model} PICTURES INDEX")
    print(f"      nrccr search INDEX QUERY --language {script.language.split(',')[0]}={output}")
