"""Extract features of pictures and videos by any vision tower, once, for trainings that read them:

    nrccr features videos FeatureData/lite0 --num_frames 8

Writes shards, which the builders of `datasets_scripts` read (`visual_feature`). An item's id is its file's name
without suffix. Run again, it goes on where it was ended, and adds what is new. On several devices:

    accelerate launch -m modeling_nrccr features videos FeatureData/lite0
"""

import time

from ..recipes.limits import number
from .common import command, parser, renamed


@command("shards that were written are kept: the same command goes on")
def main(argv: list[str] | None = None):
    options = parser("features", __doc__.split("\n")[0].rstrip(":"))
    options.add_argument("folder", help="of pictures and videos, read with its sub-folders")
    options.add_argument("output", help="folder of the shards")
    options.add_argument(
        "--vision_encoder", default="efficientnet-lite0", help="hub id, folder, or efficientnet-lite0"
    )
    options.add_argument("--visual_encoder_output", default="pooled", help="pooled, cls, mean, or projected (CLIP's)")
    options.add_argument("--no_pad", action="store_true", help="do not pad to a square (as CLIP was trained)")
    options.add_argument("--num_frames", type=number(1), default=8, help="of each video, sampled uniformly")
    options.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU where there is one")
    options.add_argument("--batch_size", type=number(1), default=8, help="pictures or videos at a time")
    options.add_argument("--shard_size", type=number(1), default=256, help="pictures or videos a shard")
    options.add_argument("--format", choices=("safetensors", "parquet"), default="safetensors")
    options.add_argument(
        "--feature_dtype", choices=("float32", "float16"), default="float32", help="of the numbers in safetensors"
    )
    options.add_argument("--strict", action="store_true", help="refuse what cannot be read, instead of leaving it out")
    renamed(options, "--media", "the first argument: nrccr features FOLDER OUTPUT")
    renamed(options, "--output", "the second argument: nrccr features FOLDER OUTPUT")
    renamed(options, "--dtype", "--feature_dtype")
    renamed(options, "--skip_broken", "how it is done anyway: --strict refuses what cannot be read")
    args = vars(options.parse_args(argv))

    from ..training.extract_features import extract_features

    started = time.perf_counter()
    args |= {"pad_to_square": not args.pop("no_pad"), "dtype": args.pop("feature_dtype")}
    extracted, found, left_out = extract_features(**args)
    for line in left_out:
        print(f"left out: {line}")
    seconds = time.perf_counter() - started
    print(f"{extracted} extracted, {found} were there, {len(left_out)} left out ({seconds:.0f} s): {args['output']}")
    print("to train on them: nrccr train ... --visual_feature NAME, the folder's name below FeatureData", flush=True)
