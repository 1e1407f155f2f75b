"""Fills `model_card.md` with the numbers of a run."""

from pathlib import Path

from atomic import write_file
from table import format_markdown


TEMPLATE = Path(__file__).parent.parent / "model_card.md"
EXAMPLE_MEDIA = {
    "image": 'images=[Image.new("RGB", (64, 64))]',
    "video": 'videos=[[Image.new("RGB", (64, 64))] * 4]',
    "visual_feats": "visual_feats=[torch.zeros(4, {visual_feat_dim})]",
}
DRAWN = {"tuxpaint", "cldr_emoji", "animated_emoji"}
DRAWN_NOTE = (
    "Small: trained on drawn pictures and emoji with captions of a few words. Photographs are out of its domain."
)
TEXT_ENCODER_NOTES = {"multilingual-e5-small": "4-bit weights, dequantised (MIT licence)."}


def write_model_card(output_dir: Path, report: dict, rows: dict[str, dict], example_query: str):
    """Writes `output_dir/README.md` from the template, a run's `metrics.json` and the rows of its table."""
    settings = report["settings"]
    origin = "human" if settings["target"] == "human" else f"machine translation by {settings['translator']}"
    fields = settings | {f"{split}_pictures": count for split, count in settings["pictures"].items()}
    layers, drawn = settings["trained_text_layers"], set(settings["dataset"].split("+")) <= DRAWN
    fields |= {
        "example_media": EXAMPLE_MEDIA[settings["media"]].format(**settings),
        "text_encoder_trained": f"its top {layers} layers trained"
        if layers > 0
        else "trained"
        if layers
        else "frozen",
        "vision_encoder_trained": "trained" if settings["train_vision_tower"] else "frozen",
        "domain": DRAWN_NOTE
        if drawn
        else f"Trained on {settings['dataset']} alone: other media are out of its domain.",
        "target_origin": origin,
        "text_encoder_note": TEXT_ENCODER_NOTES.get(settings["text_encoder"], ""),
        "folder": output_dir.name,
        "example_query": example_query.replace('"', "'"),
        "table": format_markdown(rows),
    }
    write_file(output_dir / "README.md", TEMPLATE.read_text(encoding="utf-8").format_map(fields))
