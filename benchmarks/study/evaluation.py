"""What a run of a study is asked: human target queries, their translation, both fused, and human English."""

import pandas as pd
import torch

from datasets_scripts.reading.splits import group_key
from modeling_nrccr.retrieval.encoding import encode_texts, picture_rows
from modeling_nrccr.retrieval.evaluation import galleries, metrics_by_source
from modeling_nrccr.retrieval.metrics import compute_retrieval_metrics, fuse_query_embeds, retrieval_ranks
from modeling_nrccr.training.experiment import best_fusion_weight


def evaluate(trainer, teacher, rows: dict[str, list[dict]]) -> tuple[dict, pd.DataFrame, float]:
    """
    Ask a trained model the queries of validation and test.

    Args:
        trainer: With the trained model.
        teacher: Answers the English queries in its place, where the model was made for the target language alone.
        rows: Of each split.

    Returns:
        `{"validation": {query: {gallery: metrics}}, "test": ...}`; the ranks of the test queries, a row each, with
        `query`, `gallery`, `direction`, `group` and `rank`; and the weight of the fusion, chosen on validation.
        `results["fusion"]`: SumR on test by that weight.
    """
    embeds = {split: embed(trainer, teacher, rows[split]) for split in ("validation", "test")}
    queries, images, owner = embeds["validation"]
    translated = queries.get("translated")  # of a language without a translator there is none
    weight = 0.0 if translated is None else best_fusion_weight(queries["target"], translated, images, owner)
    results, ranks = {}, []
    for split, (queries, images, owner) in embeds.items():
        if translated is not None:
            queries["fused"] = fuse_query_embeds(queries["target"], queries["translated"], weight)
        image_ids = list(picture_rows([row["image_id"] for row in rows[split]])[0])
        results[split] = {
            name: {
                gallery: {key: round(value, 4) for key, value in part["metrics"].items()}
                for gallery, part in metrics_by_source(image_ids, texts, images, owner).items()
            }
            for name, texts in queries.items()
        }
    queries, images, owner = embeds["test"]
    results["fusion"] = {}
    for share in (i / 10 for i in range(11) if translated is not None):
        fused = fuse_query_embeds(queries["target"], queries["translated"], share)
        results["fusion"][f"{share:g}"] = round(compute_retrieval_metrics(fused, images, owner)["sum_recall"], 2)
    groups = [group_key(row["reference_source_caption"]) for row in rows["test"]]
    first_rows, _ = picture_rows([row["image_id"] for row in rows["test"]])
    of_picture = [groups[row] for row in first_rows.values()]
    for gallery, (members, captions, numbers) in galleries(list(first_rows), owner).items():
        of_captions = [groups[row] for row in captions.nonzero()[:, 0].tolist()]
        of_images = [of_picture[image] for image in members.nonzero()[:, 0].tolist()]
        for name, texts in queries.items():
            t2v, v2t = retrieval_ranks(texts[captions], images[members], numbers)
            for direction, values, of in (("t2v", t2v, of_captions), ("v2t", v2t, of_images)):
                frame = {"query": name, "gallery": gallery, "direction": direction, "group": of, "rank": values}
                ranks.append(pd.DataFrame(frame))
    return results, pd.concat(ranks, ignore_index=True), weight


def embed(trainer, teacher, rows: list[dict]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return queries by kind `(num_captions, projection_dim)`, pictures, and the picture of each query."""
    target, images, owner = trainer.encode_dataset(rows, "target_caption")

    def english(column: str) -> torch.Tensor:
        if teacher is None:
            return trainer.encode_captions(rows, column)
        captions = [row[column] for row in rows]
        return encode_texts(
            teacher, captions, trainer.data_collator.processor, trainer.args.per_device_eval_batch_size
        )

    queries = {"target": target, "english": english("reference_source_caption")}
    if all(row["source_caption"] for row in rows):
        queries["translated"] = english("source_caption")
    return queries, images, owner
