"""Writes the table of benchmarks/README.md from the lines that the speed benchmarks wrote.

python -m benchmarks.speed.report
"""

from collections.abc import Iterator

from benchmarks import ROOT
from benchmarks.machine import SPEED, load_report
from benchmarks.pages import fill
from modeling_nrccr.publishing.tables import markdown_table


PAGE = ROOT / "benchmarks/README.md"


def gpu_table() -> str:
    """Return the table of what a lent GPU gave; its scripts are those of the CPU."""
    encode, training = load("gpu encode"), load("gpu training")
    captions, pictures, step = encode["captions"], encode["pictures"], training["step"]
    sides = step["sides"]
    ours = captions["sides"]["captions"], pictures["sides"]["pictures"]
    rows = [
        [
            f"encode {ours[0]['captions']:,} captions, bf16",
            captions["peer"],
            seconds(captions, "captions", captions["peer"]),
            f"{captions['ratio']:.2f}",
            f"{ours[0]['tokens_per_second']:,} tokens/s",
            f"{ours[0]['utilisation']:.1%}",
        ],
        [
            f"encode {ours[1]['pictures']:,} pictures, bf16",
            pictures["peer"],
            seconds(pictures, "pictures", pictures["peer"]),
            f"{pictures['ratio']:.2f}",
            f"{ours[1]['pictures_per_second']:,} pictures/s",
            "–",
        ],
    ]
    for ours, peer in (("ours", "stock"), ("ours bf16", "stock bf16")):
        rows.append(
            [
                f"training step, {'bf16' if 'bf16' in ours else 'float32'}",
                f"stock Trainer, {peer[6:] or 'float32'}",
                seconds(step, ours, peer),
                f"{sides[ours]['seconds'] / sides[peer]['seconds']:.2f}",
                f"{sides[ours]['tokens_per_second']:,} tokens/s",
                f"{sides[ours]['utilisation']:.0%}",
            ]
        )
    return (
        f"{encode['accelerator']}, {encode['threads']} threads, torch {encode['versions']['torch']}; a bf16 product "
        f"at {encode['matmul_gflop_s'] / 1000:.0f} TFLOP/s (width 384), copies at "
        f"{encode['bandwidth_gb_s'] / 1000:.1f} TB/s; {encode['date']}, one round. A step: {training['batch']:,} "
        "captions in three views.\n\n"
        + markdown_table(["work", "peer", "ours / peer", "time", "rate", "model FLOPs utilisation"], rows)
        + "\n"
    )


def load(name: str) -> dict:
    return load_report(SPEED, name)


def seconds(report: dict, ours: str, peer: str) -> str:
    found = report["sides"]
    return f"{found[ours]['seconds']:.2f} s / {found[peer]['seconds']:.2f} s"


def verdict(value: float, wanted: float | None) -> str:
    if wanted is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({'wanted' if value <= wanted else '**missed**: wanted'} {wanted:g})"


def lines() -> Iterator[list[str]]:
    encode, training, evaluation = load("encode"), load("training"), load("evaluation")["evaluation"]
    for name, wanted, memory, floor in (("captions", 0.78, 1, 1.15), ("pictures", 0.8, None, None)):
        part = encode[name]
        yield [
            f"encode {part['sides'][name][name]:,} {name}",
            part["peer"],
            seconds(part, name, part["peer"]),
            verdict(part["ratio"], wanted),
            verdict(part["memory_ratio"], memory),
            verdict(part["over_floor"], floor),
        ]
    for side, wanted, memory in (("ours", 0.6, 1), ("ours recompute", 1, 0.5), ("ours bf16", 0.4, 1)):
        part = training["step"][side]
        name = {"ours": "float32", "ours recompute": "float32, `gradient_cache`", "ours bf16": "bf16"}[side]
        yield [
            f"training step, {name}",
            "stock Trainer, float32",
            seconds(training["step"], side, "stock"),
            verdict(part["ratio"], wanted),
            verdict(part["memory_ratio"], memory),
            f"{part['over_floor']:.2f}" if side != "ours bf16" else "–",
        ]
    part = training["contrast"]
    yield [
        "contrast of 2,048 pairs, exact gradient",
        part["peer"],
        seconds(part, "cached", part["peer"]),
        verdict(part["ratio"], 0.9),
        f"{part['memory_ratio']:.2f}; {part['sides']['cached']['peak_gb']:.1f} GB",
        "–",
    ]
    yield [
        "metrics, 5,000 x 25,000, both directions",
        "the bare product",
        seconds(evaluation, "metrics", "product"),
        verdict(evaluation["over_product"], 6),
        f"{evaluation['more_gb']:.2f} GB more",
        "–",
    ]
    for peer in ("torchmetrics", "ranx"):
        part = evaluation[peer]
        yield [
            f"metrics, {part['captions']:,} of the captions",
            peer,
            seconds(evaluation, f"{peer} metrics", peer),
            verdict(part["ratio"], 0.1),
            f"{part['memory_ratio']:.2f}",
            "–",
        ]
    if "large" in evaluation:
        part = evaluation["large"]
        yield [
            "metrics, 50,000 x 250,000",
            "the bare product",
            seconds(evaluation, "large metrics", "large product"),
            verdict(part["over_product"], 6),
            f"{part['more_gb']:.2f} GB more",
            "–",
        ]


def tables() -> str:
    encode, training = load("encode"), load("training")
    scaling = load("scaling")
    head = ["work", "peer", "ours / peer", "time", "memory", "time over floor"]
    peers = [load("evaluation")["evaluation"][name]["largest_difference"] for name in ("torchmetrics", "ranx")]
    equal = (
        f"Equal: captions to {encode['captions']['largest_difference']:.0e}, pictures to "
        f"{encode['pictures']['largest_difference']:.0e}; first loss of a step to "
        f"{training['step']['ours']['first_loss_difference']:.0e} (bf16 "
        f"{training['step']['ours bf16']['first_loss_difference']:.0e}); metrics to "
        f"{max(peers):.0e}."
    )
    slopes = "; ".join(f"{name} {slope:.2f}" for name, slope in scaling["slopes"].items())
    paper = scaling["on_paper"]
    return (
        f"{encode['machine']}, no accelerator, {encode['threads']} threads; products at "
        f"{encode['matmul_gflop_s']:.0f} GFLOP/s, copies at {encode['bandwidth_gb_s']:.0f} GB/s; {encode['date']}.\n\n"
        + markdown_table(head, list(lines()))
        + f"\n\n{equal}\n\nSlopes on logarithmic axes (1: linear): {slopes}. At the measured rates 10 million "
        f"pictures take {paper['pictures_hours_on_one']:.0f} hours of such a machine, 100 million captions "
        f"{paper['captions_hours_on_one']:.0f}: {paper['machines_for_a_day']} machines for a day. The index is "
        f"{paper['index_gigabytes']:.0f} GB (512 numbers, float32), cached states of the captions "
        f"{paper['cached_states_gigabytes']:.0f} GB.\n"
    )


def main():
    fill(PAGE, {"speed": tables(), "speed gpu": gpu_table()})


if __name__ == "__main__":
    main()
