"""Engines by their descriptions: what stands after `--translator`."""

import inspect
import re
from pathlib import Path

from ..registry import Registry, UnknownName
from .base import Translator
from .packages import apertium_root, freedict_index


ENGINES = Registry(
    "translation engine",
    {
        "apertium": ".apertium:ApertiumTranslator",
        "seq2seq": ".seq2seq:Seq2SeqTranslator",
        "ctranslate2": ".ctranslate2:CTranslate2Translator",
        "dictionary": ".dictionary:DictionaryTranslator",
        "chat": ".chat:ChatTranslator",
        "file": ".ready:FileTranslator",
    },
    __package__,
)
OF_PAPERS = {"google": "Google's", "baidu": "Baidu's"}  # named by recipes and data sets, never asked here
_FORMS = (
    "apertium, seq2seq:ID_OR_FOLDER, ctranslate2:FOLDER, dictionary:PAIR_OR_FILE, chat:MODEL@URL, file:PATH, and "
    'A+es+B for two in a row; what holds a "," or "+es+" of its own is put in double quotes: file:"a,b.tsv"'
)
_QUOTED = r'"[^"]*"'
_PIVOT = re.compile(rf"({_QUOTED})|\+([a-z]{{2,3}}(?:-[A-Za-z0-9]+)*)\+")


def split_engines(specs: str) -> list[str]:
    """Split the specs of several engines at ','; not at one that stands in double quotes, as in
    `apertium,file:"a,b.tsv"`. Raises ValueError for a quotation mark without its second."""
    if specs.count('"') % 2:
        raise ValueError(f"{specs!r} has an odd number of quotation marks: each opens or closes a path")
    return [part.strip() for part in re.findall(rf"(?:{_QUOTED}|[^,\"])+", specs) if part.strip()]


def split_spec(spec: str) -> tuple[list[str], list[str]]:
    """Split a spec into its engines and the languages between them: `apertium+es+apertium`, one engine twice by way of
    es. Nothing is split within double quotes, which stay."""
    engines, pivots, start = [], [], 0
    for match in _PIVOT.finditer(spec):
        if match[2]:
            engines.append(spec[start : match.start()])
            pivots.append(match[2])
            start = match.end()
    return [*engines, spec[start:]], pivots


def find_engine(spec: str) -> tuple[type[Translator], str]:
    """
    Return the class of one engine, and what follows its name: of `seq2seq:FOLDER` the folder, of
    `my_module:MyTranslator:FOLDER`, a class of one's own, the same.

    Raises:
        ValueError: no engine is called so; the message lists them.
    """
    kind, argument = ENGINES.split(spec)
    try:
        return ENGINES[kind], argument.replace('"', "")
    except UnknownName as error:
        if kind in OF_PAPERS:
            raise UnknownName(
                f"the paper used {OF_PAPERS[kind]} translations, which its data brought and these rows lack; no "
                f"engine here is called {kind}: name one with --translator (apertium, seq2seq:FOLDER, ...), or bring "
                "translations by file:PATH"
            ) from None
        raise UnknownName(f"{error}. Forms: {_FORMS}") from None


def prepare_translator(
    spec: str, source: str, target: str, data_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> tuple[str, dict]:
    """
    Fetch what the engines of `spec` need of Debian for `source` to `target` and back, and return what
    `load_translator` takes: the spec, in which `dictionary` has become `dictionary:FILE`, and `root` if Apertium needs
    it. Other engines are left alone.
    """

    engines, pivots = split_spec(spec)
    codes = [source, *pivots, target]
    pairs = []
    for i, engine in enumerate(engines):
        if engine == "apertium":
            pairs += [(codes[i], codes[i + 1]), (codes[i + 1], codes[i])]
        elif engine == "dictionary":
            engines[i] = f"dictionary:{freedict_index(codes[i], codes[i + 1], data_dir, cache_dir)}"
    root = apertium_root(pairs, data_dir, cache_dir) if pairs else None
    spec = engines[0] + "".join(f"+{code}+{engine}" for code, engine in zip(pivots, engines[1:]))
    return spec, {"root": root} if root is not None else {}


def load_translator(
    spec: "str | Translator", source: str | None = None, target: str | None = None, **kwargs
) -> Translator:
    """
    Return a translator by its description; one that is already made is returned as it is. With `source` and `target`
    it does what `--translator` does: what `apertium` and `dictionary` need of Debian is fetched, and `dictionary`
    alone is that of the two languages.

    - `apertium`, `apertium:ROOT`: rules, on the PATH or below a folder.
    - `seq2seq:Helsinki-NLP/opus-mt-en-gl`, `seq2seq:FOLDER`: a Transformers model.
    - `ctranslate2:FOLDER`: the same, converted, faster on a CPU.
    - `dictionary:eng-ces`, `dictionary:FILE.index`: word by word, below `root=`.
    - `chat:MODEL@URL`: a chat-completion server, such as `chat:qwen3@http://localhost:8000/v1`.
    - `file:PATH`: ready translations, TSV, JSONL or Parquet.
    - `A+es+B`: two engines in a row by way of Spanish (`apertium+es+apertium`); more are possible.
    - `my_module:MyTranslator`, `my_module:MyTranslator:ARGUMENT`: a subclass of `Translator` that Python can import.
    - `file:"a,b.tsv"`: a path with what parts engines stands in double quotes.

    Args:
        source, target: ISO 639-1 codes of the languages that it is to translate between, both ways.
        kwargs: for the engine; of several in a row each gets those that it knows.

    Raises:
        ValueError: no engine is called so; the message lists them.
        TranslationError: the engine is not to be had.
        ImportError: its library is not installed; the message has the `pip` command.
    """
    if isinstance(spec, Translator):
        return spec
    if source and target:
        spec, options = prepare_translator(spec, source, target)
        kwargs = options | kwargs
    parts, pivots = split_spec(spec)
    engines: dict[str, Translator] = {}
    unused = set(kwargs)
    for part in dict.fromkeys(parts):
        engine, argument = find_engine(part)
        parameters = inspect.signature(engine).parameters
        if not argument and any(parameter.default is parameter.empty for parameter in list(parameters.values())[:1]):
            hint = ", nor between which languages (source=, target=)" if part == "dictionary" else ""
            raise ValueError(f"{part!r} does not say which{hint}; known: {_FORMS}")
        accepted = kwargs.keys() & parameters if len(parts) > 1 else kwargs.keys()
        unused -= accepted
        engines[part] = engine(*filter(None, [argument]), **{key: kwargs[key] for key in accepted})
    if unused:
        raise TypeError(f"no engine of {spec!r} takes {', '.join(sorted(unused))}")
    if len(parts) == 1:
        return engines[spec]
    from .chain import ChainTranslator

    return ChainTranslator([engines[part] for part in parts], pivots)
