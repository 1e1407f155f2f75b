"""The formats that a model is exported to, by name. A format is a function `write(model, processor, folder, name=,
...)` that writes a folder, whole or not at all, and returns a report (its "summary" is what the command says); its
other parameters are its options, but for `languages`: as they were loaded."""

import inspect
from collections.abc import Sequence
from pathlib import Path

from ..registry import Registry


FORMATS = Registry(
    "export format",
    {
        "onnx": ".onnx:export_onnx",
        "transformers": ".transformers_folder:write_transformers",
        "sentence-transformers": ".sentence_transformers_folder:write_sentence_transformers",
        "open_clip": ".open_clip_folder:write_open_clip",
        "immich": ".immich:export_immich",
    },
    __package__,
)


def export_model(
    name: str,
    folder: str | Path,
    formats: Sequence[str],
    languages: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    **options,
) -> dict[str, tuple[Path, dict]]:
    """
    Write a model in each of `formats`, for applications that know nothing of this package.

    Args:
        name: folder or hub id of a trained model, or of another dual encoder.
        folder: of the files; of several formats each has a folder in it, named as the format.
        formats: names of `FORMATS`.
        languages: one, whose adapter reads the texts, as `load_with_languages` takes them.
        device, dtype: an export is made on the CPU in float32; anything else is refused.
        options: of the formats, such as `int8`; None is as good as absent.

    Returns:
        By format its folder and its report.

    Raises:
        ValueError: for an unknown format, an option that none of them has, a model that cannot be exported so.
    """
    from ..loading.models import load_with_languages  # what is wrong with the formats is said before torch is loaded

    if device not in (None, "cpu") or dtype not in (None, "float32"):
        raise ValueError("an export is made on the CPU in float32 and compared there: leave out --device and --dtype")
    if len(languages) > 1:
        raise ValueError(f"an export reads texts in one language: name one, not {', '.join(languages)}")
    writers = {kind: FORMATS[kind] for kind in dict.fromkeys(formats)}
    known = {kind: inspect.signature(write).parameters for kind, write in writers.items()}
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := [key for key in given if not any(key in parameters for parameters in known.values())]:
        raise ValueError(f"no option of {', '.join(writers)}: {', '.join(unknown)}")
    written, beside = {}, {"name": name, "languages": languages}
    model, processor = load_with_languages(name, languages, "cpu", "float32")
    for kind, write in writers.items():
        place = Path(folder, kind.replace(":", ".")) if len(writers) > 1 else Path(folder)
        own = {key: value for key, value in (given | beside).items() if key in known[kind]}
        written[kind] = place, write(model, processor, place, **own)
    return written
