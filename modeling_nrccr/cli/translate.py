"""Translate the captions of a data set both ways, once, for every training that reads them.

    nrccr translate --data tuxpaint+cldr_emoji --language cs --translator dictionary --output_dir outputs/pictures-cs
    nrccr train --data outputs/pictures-cs --language cs --output_dir outputs/demo-cs

Training gets `target_caption` and `back_translation`, validation and test `source_caption`. Of several engines
(`--translator apertium,file:mine.tsv`) these are the first one's, and each engine's are in columns of its own:
`target_caption_apertium`, `back_translation_apertium`, `source_caption_apertium`. Every finished batch goes to a cache
on disk: run again after it was ended in whatever way, it goes on from there.

`datasets.load_dataset("parquet", data_dir="outputs/pictures-cs")` reads the result too (features: after `import
datasets_scripts.reading.features`). Pictures, videos and features that a data set has as files stay where they are.
"""

import os
import sys
import time

from .common import WORKER, command, number, parser, renamed


@command("what was translated is kept: the same command goes on")
def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    options = parser("translate", *__doc__.split("\n\n", 1))
    options.add_argument("--data", default="tuxpaint+cldr_emoji", help='data sets, joined by "+", a file or a folder')
    options.add_argument("--data_dir", help="folder of the data; Debian packages are fetched where it is not given")
    options.add_argument("--visual_feature", help="features: a folder, a name in data_dir/FeatureData, or none")
    options.add_argument("--media_dir", help="folder of pictures or videos; default: images or videos in data_dir")
    options.add_argument("--source_language", default="en", help="language of the captions that exist")
    options.add_argument("--language", required=True, help="language of the searches")
    options.add_argument(
        "--translator", default="apertium", help="engines, joined by ',': the first one's are trained on"
    )
    options.add_argument("--num_beams", type=number(1), default=1, help="of neural engines; 1 is greedy")
    options.add_argument("--split_seed", type=int, default=0, help="of data that is split here, by groups of captions")
    options.add_argument("--output_dir", required=True, help="folder of the Parquet files, one a split")
    options.add_argument("--overwrite", action="store_true", help="replace an earlier output in output_dir")
    options.add_argument("--cache", help="file of what was translated before; default: in the cache folder")
    options.add_argument("--num_processes", type=number(1), default=1, help="processes that share the captions")
    for old, new in {"--dataset": "--data", "--source": "--source_language", "--target": "--language"}.items():
        renamed(options, old, new)
    given = vars(options.parse_args(argv))
    if given.pop("num_processes") > 1 and WORKER not in os.environ:
        from .launch import start_processes

        return start_processes("translate", argv, options.parse_args(argv).num_processes)
    from ..data.translate import translate_captions

    started, process = time.perf_counter(), int(os.environ.get("RANK", 0))
    record, counts = translate_captions(**given)
    for engine, (translated, found) in counts.items():
        which = f"process {process}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{which}{engine}: {translated:,} distinct texts translated, {found:,} found", flush=True)
    if process == 0:
        rows = ", ".join(f"{count:,} {split}" for split, count in record["rows"].items())
        print(f"wrote {given['output_dir']}: {rows} ({time.perf_counter() - started:.0f} s)")
        print(f"next: nrccr train --data {given['output_dir']} --language {given['language']}", flush=True)
