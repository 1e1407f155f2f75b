"""The pseudo-parallel columns of a data set, made by machine translation."""

from transformers.utils import logging

from .base import TranslationError, Translator


logger = logging.get_logger(__name__)


def _translate_column(split_name, dataset, column: str, translator: Translator, source: str, target: str) -> list[str]:
    texts = list(dataset[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            where = f"{split_name}, row {row} ({dataset['caption_id'][row]})"
            raise ValueError(f"{where}: {column} is {text!r}; fill it or leave the row out")
    try:
        return translator.translate(texts, source, target)
    except (ValueError, TranslationError) as error:
        raise type(error)(f"{split_name}, {column}: {error}") from error


def _replace_columns(dataset, columns: dict[str, list]):
    """Replace columns without rewriting the others (pictures); names, order and features stay."""
    order, features = dataset.column_names, dataset.features
    dataset = dataset.remove_columns(list(columns))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values, feature=features[name])
    return dataset.select_columns(order)


def add_translations(dataset_dict, translator: Translator, source: str = "en", target: str = "gl"):
    """
    Fill what machine translation has to fill in a `DatasetDict` with the columns of the builders.

    - `train`: `target_caption`, where there is none, from `source_caption`, with the engine's name as
      `target_origin`; `back_translation` from `target_caption`.
    - every other split: `source_caption` from the human `target_caption`, for query fusion. What was there is
      replaced: human English belongs in `reference_source_caption`. Where there is no human `target_caption`, the
      translation of `reference_source_caption` stands in, with the engine's name as `target_origin`, and a warning.

    Returns:
        `DatasetDict`: new, with the same columns, rows and pictures.

    Raises:
        ValueError: a split lacks a column, or is of another target language.
    """
    needed = ("caption_id", "source_caption", "target_caption", "back_translation", "target_origin", "target_language")
    result = {}
    for name, dataset in dataset_dict.items():
        missing = [column for column in needed if column not in dataset.column_names]
        if missing:
            raise ValueError(f"{name} lacks the columns {missing}; it has {dataset.column_names}")
        languages = set(dataset["target_language"])
        if languages - {target}:
            raise ValueError(f"{name} has target_language {languages}, not {target!r} alone")
        if not len(dataset):
            result[name] = dataset
        else:
            column = "source_caption" if name == "train" else "reference_source_caption"
            captions, origins = list(dataset["target_caption"]), list(dataset["target_origin"])
            rows = [row for row, caption in enumerate(captions) if caption is None]
            if rows and column in dataset.column_names:
                if name != "train":
                    logger.warning(
                        f"{name}: {len(rows)} of {len(captions)} rows have no human {target} caption; translations by "
                        f"{translator.name} stand in, so results on them are not results on human queries"
                    )
                subset = dataset.select_columns(["caption_id", column]).select(rows)
                made = _translate_column(name, subset, column, translator, source, target)
                for row, caption in zip(rows, made):
                    captions[row], origins[row] = caption, translator.name
                dataset = _replace_columns(dataset, {"target_caption": captions, "target_origin": origins})
            back = _translate_column(name, dataset, "target_caption", translator, target, source)
            filled = "back_translation" if name == "train" else "source_caption"
            result[name] = _replace_columns(dataset, {filled: back})
    return type(dataset_dict)(result)
