"""
Both directions of cross-lingual retrieval as a metric of `evaluate`; what it computes is
`modeling_nrccr.compute_retrieval_metrics`, which needs no `evaluate`.

    metric = evaluate.load("examples/metrics/nrccr_retrieval")
    metric.compute(predictions=text_embeds, references=caption_to_image, image_embeds=image_embeds)
"""

import datasets
import evaluate
import torch

from modeling_nrccr.retrieval.metrics import compute_retrieval_metrics


_DESCRIPTION = """
Ranks every picture for every caption (t2v_) and every caption for every picture (v2t_) by cosine similarity: recall@1,
@5, @10 in percent, median and mean rank, mAP, and the sum and mean of the six recalls. Equally good items count half.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: embeddings of the captions, of shape (num_captions, embed_dim).
    references: for each caption, the row of its picture in image_embeds.
    image_embeds: embeddings of the pictures, of shape (num_images, embed_dim).
    source_text_embeds, translation_weight: translated queries and their weight, see compute_retrieval_metrics.
Returns:
    A dict of floats, see compute_retrieval_metrics.
Examples:
    >>> metric = evaluate.load("examples/metrics/nrccr_retrieval")
    >>> images = [[1.0, 0.0], [0.0, 1.0]]
    >>> results = metric.compute(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[0, 1], image_embeds=images)
    >>> results["sum_recall"]
    600.0
"""

_CITATION = """
@inproceedings{wang2022nrccr,
  title = {Cross-Lingual Cross-Modal Retrieval with Noise-Robust Learning},
  author = {Wang, Yabing and Dong, Jianfeng and Liang, Tianxiang and Zhang, Minsong and Cai, Rui and Wang, Xun},
  booktitle = {ACM Multimedia},
  year = {2022},
  url = {https://arxiv.org/abs/2208.12526}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class NrccrRetrieval(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    # float64 holds float32 and half precision exactly
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references, image_embeds, source_text_embeds=None, translation_weight=0.0):
        image_embeds = torch.as_tensor(image_embeds)
        if source_text_embeds is not None:
            source_text_embeds = torch.as_tensor(source_text_embeds)
        return compute_retrieval_metrics(
            torch.tensor(predictions, dtype=image_embeds.dtype),
            image_embeds,
            torch.tensor(references),
            source_text_embeds,
            translation_weight,
        )
