"""Neural engines for translation: any Transformers encoder-decoder, by Transformers itself or by CTranslate2."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from .base import TranslationError, Translator, file_fingerprint
from .language_codes import standard_code, standard_codes


logger = logging.get_logger(__name__)

_CHUNK = 20_000  # texts tokenized and sorted by length at a time
_FEW = 8  # texts that are a batch for any length
# Files of a folder that decide an answer; not metrics.json, README.md and the like.
_DECISIVE = re.compile(
    r"(?!training_args).*\.(safetensors|bin|spm|model|txt)"
    r"|.*(config|vocab\w*|tokenizer|tokens|token_map|\.index)\.json"
)
_NO_LIMIT = 1_000_000  # tokenizers without a limit say 1e30


@dataclass
class LanguageScheme:
    """
    How a model is told its languages. `sources` and `targets` map standard codes to the tokenizer's own.

    Attributes:
        prefix (`str`, *optional*): what the text begins with, with `{}` for the target's code.
        forces_target (`bool`): the tokenizer's `src_lang` is set, and the first token of the answer is forced to be
            the target's code.
        pairs (`list`, *optional*): the only pairs; by default, all sources with all targets.
    """

    sources: dict[str, str]
    targets: dict[str, str]
    prefix: str | None = None
    forces_target: bool = False
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self):
        self.pairs = self.pairs or [(a, b) for a in self.sources for b in self.targets if a != b]


def language_scheme(tokenizer, name: str, pairs: Sequence[tuple[str, str]] | None = None) -> LanguageScheme:
    """
    Return the languages that a tokenizer lists: the tags `>>cs<<` of Marian, or its `source_lang` and `target_lang`;
    the codes of M2M100 (`gl`), NLLB (`glg_Latn`) and mBART-50 (`gl_ES`); the tokens `<2gl>` of MADLAD.

    Args:
        name (`str`): of the model, for messages.
        pairs (`list` of `(source, target)`, *optional*): of a model that cannot say them (`opus-mt-ROMANCE-en`).

    Raises:
        ValueError: it lists none, or not those of `pairs`.
    """
    vocabulary = tokenizer.get_vocab()
    if hasattr(tokenizer, "lang_code_to_id"):  # M2M100, mBART-50
        codes = standard_codes(tokenizer.lang_code_to_id)
        scheme = LanguageScheme(codes, codes, forces_target=True)
    elif hasattr(tokenizer, "src_lang"):  # NLLB
        codes = standard_codes(sorted(token for token in vocabulary if re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", token)))
        scheme = LanguageScheme(codes, codes, forces_target=True)
    elif found := [token for token in vocabulary if re.fullmatch(r"<2[a-z]{2,3}(_[A-Za-z]+)*>", token)]:  # MADLAD
        codes = standard_codes(sorted(token[2:-1] for token in found))
        scheme = LanguageScheme(codes, codes, prefix="<2{}> ")
    else:
        scheme = _marian_scheme(tokenizer, name, pairs)
    if pairs is not None:
        unknown = {target for _, target in pairs if scheme.prefix and target not in scheme.targets}
        unknown |= {code for pair in pairs for code in pair if scheme.forces_target and code not in scheme.targets}
        if unknown:
            raise ValueError(f"{name} has no {', '.join(sorted(unknown))}; it has {', '.join(scheme.targets)}")
        scheme.pairs = [(source, target) for source, target in pairs]
    return scheme


def _marian_scheme(tokenizer, name: str, pairs) -> LanguageScheme:
    tags = [tag[2:-2] for tag in tokenizer.get_vocab() if re.fullmatch(r">>\S+<<", tag)]
    source, target = (getattr(tokenizer, side, None) for side in ("source_lang", "target_lang"))
    targets = standard_codes(tags) if tags else {standard_code(target): target} if target else {}
    sources = {standard_code(source): source} if source else {}
    if pairs is None and not (sources and targets):
        raise ValueError(
            f"{name}: the tokenizer lists no languages (Marian, M2M100, NLLB, mBART-50 and MADLAD do): pass "
            'pairs=[("en", "gl")], or write "source_lang" and "target_lang" into its tokenizer_config.json'
        )
    if sources.keys() <= targets.keys() and tags:  # it translates into its own source too: any way
        sources = targets
    return LanguageScheme(sources, targets, prefix=">>{}<< " if tags else None)


class Seq2SeqTranslator(Translator):
    """
    Neural translation by a Transformers encoder-decoder: Marian (OPUS-MT), M2M100, NLLB, mBART-50, MADLAD. Batches
    hold texts of about one length. Decoding is greedy or by beams, never at random.

    Args:
        model (`str` or `Path`): a hub id or a folder with model and tokenizer.
        num_beams (`int`, defaults to 1): 1 is greedy; more is slower and usually a little better.
        max_batch_tokens (`int`, defaults to 4096): of a batch, padding included.
        max_length (`int`, *optional*): source tokens of a text; what is longer is cut, with a warning. The model's own
            limit by default (512 where it has none).
        max_new_tokens (`int`, *optional*): of an answer; by default three times the text's and 20 more.
        device (`str`, *optional*): a GPU where there is one.
        dtype (`str`, defaults to "float32"): of the weights.
        pairs (`list` of `(source, target)`, *optional*): see [`language_scheme`].
        name (`str`, *optional*): the engine's name; the hub id or the folder's name by default.
        revision (`str`, *optional*): of the hub id.

    Raises:
        TranslationError: there is no such model.
        ValueError: the tokenizer lists no languages.
    """

    def __init__(
        self,
        model: str | Path,
        num_beams: int = 1,
        max_batch_tokens: int = 4096,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        pairs: Sequence[tuple[str, str]] | None = None,
        name: str | None = None,
        revision: str | None = None,
    ):
        is_folder = Path(model).is_dir()
        self.name = name or (Path(model).resolve().name if is_folder else str(model))
        self.num_beams, self.max_batch_tokens, self.max_new_tokens = num_beams, max_batch_tokens, max_new_tokens
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self._positions: int | None = None  # of the decoder
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        except ImportError as error:
            raise ImportError('its tokenizer needs: pip install "modeling_nrccr[seq2seq]"') from error
        except (OSError, ValueError) as error:
            says = " ".join(str(error).split())[:300]
            raise TranslationError(
                f"{model}: name a folder with a Transformers model and its tokenizer, or a hub id; some tokenizers "
                f'need `pip install "modeling_nrccr[seq2seq]"`. Transformers says: {says}'
            ) from error
        self.scheme = language_scheme(self.tokenizer, self.name, pairs)
        # Language tokens are special in NLLB's tokenizer, but not in M2M100's of Transformers 5.
        forced = self.scheme.targets if self.scheme.forces_target else ()
        self._special_ids = {self._forced_token(code) for code in forced} | set(self.tokenizer.all_special_ids)
        commit = self._load(model, revision)
        limits = [max_length, self.tokenizer.model_max_length, self._positions]
        self.max_length = min([limit for limit in limits if limit and limit < _NO_LIMIT] or [512])
        source = commit or file_fingerprint(p for p in sorted(Path(model).iterdir()) if _DECISIVE.fullmatch(p.name))
        settings = [f"beams={num_beams}", f"dtype={dtype}", f"max_length={self.max_length}"]
        settings += [f"max_new_tokens={max_new_tokens}"] if max_new_tokens else []
        self.version = " ".join([source, *settings])

    def _load(self, model: str | Path, revision: str | None) -> str | None:
        """Load the model; its commit on the hub, if it is from there."""
        try:
            self.model = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=self.dtype, revision=revision)
        except (OSError, ValueError) as error:
            raise TranslationError(f"{model} cannot be loaded as an encoder-decoder model: {error}") from error
        self.model.to(self.device).eval()
        self._positions = getattr(self.model.config, "max_position_embeddings", None)
        return getattr(self.model.config, "_commit_hash", None)

    def supported_pairs(self) -> list[tuple[str, str]]:
        return self.scheme.pairs

    def _encode(self, texts: list[str], source: str, target: str) -> list[list[int]]:
        """Return the token ids of each text with the special tokens of its pair, cut to `max_length`."""
        if self.scheme.forces_target:
            self.tokenizer.src_lang = self.scheme.sources[source]
        elif self.scheme.prefix:
            texts = [self.scheme.prefix.format(self.scheme.targets[target]) + text for text in texts]
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    def _forced_token(self, target: str) -> int | None:
        if not self.scheme.forces_target:
            return None
        return self.tokenizer.convert_tokens_to_ids(self._target_token(target))

    def _target_token(self, target: str) -> str:
        code = self.scheme.targets[target]
        return self.tokenizer.get_lang_token(code) if hasattr(self.tokenizer, "get_lang_token") else code

    def _batches(self, texts: list[str], source: str, target: str) -> Iterator[list[str]]:
        cut, example = 0, ""
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            lengths = [len(ids) for ids in self._encode(chunk, source, target)]
            for text, length in zip(chunk, lengths):
                # a text of exactly max_length may be whole: its characters are looked at only then
                if length >= self.max_length and self._is_cut(text, source, target):
                    cut, example = cut + 1, example or text
            batch: list[str] = []
            longest = 0
            for i in sorted(range(len(chunk)), key=lambda i: -lengths[i]):  # the largest first: no memory, no start
                longest = longest or lengths[i]
                is_short = len(batch) >= _FEW and lengths[i] < longest / 2  # it would wait for the long ones
                if batch and (is_short or (len(batch) + 1) * longest > self.max_batch_tokens):
                    yield batch
                    batch, longest = [], lengths[i]
                batch.append(chunk[i])
            if batch:
                yield batch
        if cut:
            logger.warning(
                f"{self.name} {source}-{target}: {cut} of {len(texts)} texts are longer than {self.max_length} tokens "
                f"and were cut, such as {example[:80]!r}..."
            )

    def _is_cut(self, text: str, source: str, target: str) -> bool:
        whole = self.tokenizer((self.scheme.prefix or "").format(self.scheme.targets.get(target)) + text)["input_ids"]
        return len(whole) > self.max_length

    def _translate(self, texts: list[str], source: str, target: str) -> list[str]:
        ids = self._encode(texts, source, target)
        longest = max(map(len, ids))
        room = (self._positions or _NO_LIMIT) - 2  # a start and a language token come first
        last = min(self.max_new_tokens or 3 * longest + 20, room)
        answers: list[list[int]] = [[]] * len(texts)
        rows = range(len(texts))
        # A batch goes on until its last row has ended, and a model may repeat a word for ever: rows that have not
        # ended when most should have are begun again among themselves.
        for limit in sorted({min(longest + longest // 2 + 10, last), last}):
            try:
                made = self._generate([ids[row] for row in rows], self._forced_token(target), limit, target)
            except RuntimeError as error:  # no memory, most of all
                raise TranslationError(
                    f"{self.name} {source}-{target} failed on a batch of {len(rows)} x {longest} tokens; fewer "
                    f"max_batch_tokens need less memory. It says: {' '.join(str(error).split())[:300]}"
                ) from error
            for row, answer in zip(rows, made):
                # without an end, an answer is as long as it would be alone
                answer = answer[: min(self.max_new_tokens or 3 * len(ids[row]) + 20, room) - 2]
                answers[row] = [token for token in answer if token not in self._special_ids]
            rows = [row for row, answer in zip(rows, made) if len(answer) >= limit - 2]
            if not rows:
                break
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    @torch.inference_mode()
    def _generate(
        self, ids: list[list[int]], forced_token: int | None, max_new_tokens: int, target: str
    ) -> list[list[int]]:
        """Generate the answers' token ids, up to the end token."""
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)
        made = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            forced_bos_token_id=forced_token,
            num_beams=self.num_beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        end = self.tokenizer.eos_token_id  # some begin with it
        return [row[: row.index(end)] if end in row else row for row in made[:, 1:].tolist()]
