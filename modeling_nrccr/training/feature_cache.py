"""Outputs of everything frozen, computed once: the vision tower's features and the text states at the boundary."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import BatchFeature
from transformers.utils import logging

from ..files import replacing
from ..heads import pool
from ..languages import in_eval_mode
from ..length_groups import length_groups, pad_right, row_lengths
from ..modeling_nrccr import NrccrModel
from ..retrieval.encoding import ahead


logger = logging.get_logger(__name__)

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
# Of what is computed: 1 let captions attend to padding, where heads were new over shared towers; 2 kept padding on the
# side of the tokenizer
VERSION = 3
EXACT, ABOUT = 1e-4, 2e-2  # differences of embeddings, of norm 1, by float32 and by half precision
SAMPLE = 8  # captions, by which cached states are compared with a full pass
HEADER_SIZE = 512  # of a file, with the 8 bytes that say how long it is


class FeatureCache:
    """Stands in for the processor: `cache(text=[...])` gives `boundary_states`, `cache(images=[image_id, ...])` gives
    `visual_feats`; what was not added is an error.

    Args:
        model: Its frozen part (`NrccrModel.set_trained_layers`) decides what is cached.
        processor: The model's processor.
        directory: Where the cache is kept between runs (None: in memory only). Files are named by a fingerprint of
            the frozen weights and of the processor's settings, and hold it, so a cache of another encoder is never
            read. They are mapped, not read into memory. Several processes may fill one directory.
        dtype: Of what is stored; `torch.bfloat16` halves it. Batches come in the model's own.

    Where a text encoder cannot go on from cached states to what a full pass gives (its layers share what they compute,
    say), captions are not cached: `cache(text=[...])` gives `input_ids`, and a warning says so.

    Raises:
        ValueError: `pool_padding`, another dtype, or a file in `directory` that is damaged or another encoder's.
    """

    def __init__(
        self,
        model: NrccrModel,
        processor,
        directory: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if model.config.pool_padding:
            raise ValueError("pool_padding=True pools the states of padding too, which are not cached: train uncached")
        if model.source_text_side is not None:
            raise ValueError("a model of two text sides is not trained: train its language_side()")
        self.model, self.processor = model, processor
        # the whole frozen tower and where it is cut: any other weights or cut give other states
        self.pooling = model.cached_text_pooling
        settings = processor_settings(processor)
        frozen = (model.text_tower, model.text_tower.num_trained_layers, self.pooling, settings)
        self.texts = Store(directory, "texts", frozen, dtype)
        self.images = Store(directory, "images", (model.visual_tower, settings), dtype)
        self.ids: dict[str, torch.Tensor] = {}  # of captions whose states are below trained layers
        self.is_exact: bool | None = None  # not known before there are captions

    def add_texts(self, captions: Iterable[str | None], batch_size: int = 128):
        """Add the states of every new caption at the boundary, as one pooled state where nothing reads more; None is
        passed over."""
        captions = sorted({c for c in captions if c}, key=lambda caption: (len(caption), caption))
        if captions and self.is_exact is None:
            self.is_exact = self.compare(captions[:-1][:: -(-len(captions) // SAMPLE)] + captions[-1:])
        if not self.is_exact:
            return

        def compute(chunk: list[str]) -> dict[str, torch.Tensor]:
            return dict(zip(chunk, self.boundary_states(chunk), strict=True))

        new = [caption for caption in captions if caption not in self.texts.rows]
        self.texts.fill(new, compute, batch_size, self.model)

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, each `(len(captions), sequence_length)`, padded on the right; of captions whose layers
        are trained the ids are kept."""
        inputs = self.processor(text=captions, return_tensors="pt")
        ids, mask = pad_right(inputs["input_ids"], inputs["attention_mask"])
        if self.model.text_tower.num_trained_layers:
            self.ids |= {caption: row[kept.bool()] for caption, row, kept in zip(captions, ids, mask)}
        return ids, mask

    @torch.no_grad()
    def compare(self, captions: list[str]) -> bool:
        """Tell whether embeddings from cached states are those of a full pass."""
        model = self.model

        def embed(inputs: BatchFeature) -> torch.Tensor:
            return model.get_text_features(**inputs.to(model.device), languages=[None] * len(captions)).pooler_output

        with in_eval_mode(model):
            full = embed(self.processor(text=captions, return_tensors="pt"))
            try:
                states = [states.to(self.texts.dtype) for states in self.boundary_states(captions)]
                mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in states], batch_first=True)
                cached = self.batch(captions, pad_sequence(states, batch_first=True), mask)
                difference = (embed(cached) - full).abs().max().item()
            except (
                AttributeError,
                IndexError,
                RuntimeError,
                TypeError,
                ValueError,
            ):  # layers that want more than states
                difference = torch.inf
        if math.isnan(difference):  # the fill names the caption
            return True
        if difference <= (EXACT if {model.dtype, self.texts.dtype} <= {torch.float32, torch.float64} else ABOUT):
            return True
        logger.warning(
            f"{type(model.text_tower.encoder).__name__} does not go on from cached states to what a full pass gives "
            f"(embeddings differ by {difference:.2g}): captions are not cached, and training takes longer"
        )
        return False

    def add_images(
        self, image_ids: Iterable[str], load: Callable, batch_size: int = 16, strict: bool = True
    ) -> dict[str, str]:
        """Add the features of every new picture or video; `load(image_id)` returns a picture, or a list of frames.

        Returns:
            Without `strict`, the ids that cannot be loaded, each with the reason; else that is a ValueError which
            names the first. What was computed before an error stays.
        """
        new = [image_id for image_id in dict.fromkeys(image_ids) if image_id not in self.images.rows]
        broken = {}

        def prepare(ids: list[str]) -> tuple[list[str], BatchFeature | None]:
            loaded = {}
            for image_id in ids:
                try:
                    loaded[image_id] = load_media(image_id, load)
                except ValueError as error:
                    if strict:
                        raise
                    broken[image_id] = str(error)
            if not loaded:
                return [], None
            kind = "videos" if isinstance(next(iter(loaded.values())), list) else "images"
            return list(loaded), self.processor(**{kind: list(loaded.values())}, return_tensors="pt")

        def features(prepared: tuple[list[str], BatchFeature | None]) -> dict[str, torch.Tensor]:
            loaded, inputs = prepared
            if inputs is None:
                return {}
            inputs = inputs.to(self.model.device)
            mask = inputs.pop("visual_attention_mask", None)
            feats = self.model.visual_tower(**inputs)
            parts = feats if mask is None else [row[of_row.bool()] for row, of_row in zip(feats, mask)]
            return dict(zip(loaded, parts, strict=True))

        self.images.fill(new, features, batch_size, self.model, prepare)
        return broken

    def boundary_states(self, captions: list[str]) -> list[torch.Tensor]:
        """Return the states of each caption at the boundary, `(sequence_length, hidden_size)`; pooled, `(1, ...)`."""
        ids, mask = (part.to(self.model.device) for part in self.tokenize(captions))
        result, lengths = {}, row_lengths(mask)
        for rows in length_groups(lengths):
            length = max(1, int(lengths[rows].max()))
            of_ids, of_mask = ids[rows, :length], mask[rows, :length]
            with self.model.lora(None):  # of the encoder alone: what languages add comes above the boundary
                states = self.model.text_tower.at_boundary(of_ids, of_mask)
            if self.pooling:
                parts = pool(states, of_mask, self.pooling).unsqueeze(1)
            else:
                parts = [row[kept.bool()] for row, kept in zip(states, of_mask)]
            result |= zip(rows.tolist(), parts)
        return [result[row] for row in range(len(captions))]

    def batch(self, captions: list[str], states: torch.Tensor, mask: torch.Tensor) -> BatchFeature:
        """Return states and mask, and below trained layers the ids, `(len(captions), sequence_length, ...)`."""
        batch = BatchFeature({"boundary_states": states.to(self.model.dtype), "attention_mask": mask})
        if self.model.text_tower.num_trained_layers:
            if wanting := [caption for caption in captions if caption not in self.ids]:  # their states are of a file
                self.tokenize(wanting)
            ids = [self.ids[caption] for caption in captions]
            batch["input_ids"] = pad_sequence(ids, batch_first=True, padding_value=self.model.pad_token_id)
        return batch

    def __call__(
        self, text: list[str] | None = None, images: list[str] | None = None, visual_feats=None, **kwargs
    ) -> BatchFeature:
        """Return `boundary_states (batch_size, sequence_length, hidden_size)` and `attention_mask` (below trained
        layers with the `input_ids`, which some encoders read in every layer), or
        `visual_feats (batch_size, num_frames, visual_feat_dim)`, of videos with `visual_attention_mask`. Pre-extracted
        `visual_feats` need no cache: they go to the processor."""
        batch, dtype = BatchFeature(), self.model.dtype
        if text is not None and self.is_exact is False:
            batch.update(self.processor(text=text, **kwargs))
        elif text is not None:
            batch.update(self.batch(text, *self.texts.batch(text)))
        if images is not None:
            feats, mask = self.images.batch(images)
            batch["visual_feats"] = feats.to(dtype)
            if mask.shape[1] > 1:
                batch["visual_attention_mask"] = mask
        if visual_feats is not None:
            batch.update(self.processor(visual_feats=visual_feats, **kwargs))
        return batch


def load_media(image_id: str, load: Callable):
    """Return what `load` gives. Raises ValueError that names `image_id` where that fails, whatever a decoder raises,
    or where a video has no frames."""
    try:
        media = load(image_id)
        if isinstance(media, Image):
            media.load()  # Pillow opens a file without a look at its pixels
    except (ImportError, MemoryError):  # not the picture's fault
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise ValueError(
            f"{image_id} cannot be read ({str(error) or type(error).__name__}): repair it, or leave it out"
        ) from error
    if media is None or (isinstance(media, list) and not media):
        what = "no picture" if media is None else "a video of no frames"
        raise ValueError(f"{image_id} is {what}: leave it out")
    return media


class Store:
    """
    Named sequences of vectors of one width, in one matrix. Row 0 of the matrix is zeros, for padding: that makes a
    padded batch one `index_select`, without a look at each sequence.

    With a directory, the matrix is a view of one mapped safetensors file: `vectors (1 + total, width)` and `index`,
    the names and lengths of the sequences as JSON. It is replaced as a whole or not at all, by one process at a time.
    """

    def __init__(self, directory: str | Path | None, kind: str, frozen: tuple, dtype: torch.dtype = torch.float32):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.kind, self.dtype, self.path = kind, dtype, None
        self.matrix: torch.Tensor | None = None
        self.rows: dict[str, int] = {}  # the number of each sequence
        self.lengths = self.starts = torch.empty(0, dtype=torch.long)
        if directory:
            self.fingerprint = fingerprint(VERSION, *frozen, dtype)
            self.path = Path(directory) / f"{kind}-{self.fingerprint}.safetensors"
            self.read()

    def __getitem__(self, key: str) -> torch.Tensor:
        """Return the vectors of one sequence, of shape `(length, width)`."""
        number = self.numbers([key])
        start = int(self.starts[number])
        return self.matrix[start : start + int(self.lengths[number])]

    def numbers(self, keys: Sequence[str]) -> torch.Tensor:
        """Return the numbers of sequences for [`gather`], of shape `(len(keys),)`; they hold until something is added.
        Raises KeyError for a sequence that was not added."""
        try:
            return torch.tensor(list(map(self.rows.__getitem__, keys)), dtype=torch.long)
        except KeyError as error:
            raise KeyError(
                f"{error.args[0]!r} is not among the cached {self.kind}: call add_{self.kind} first"
            ) from None

    def gather(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sequences as one batch `(batch_size, length, width)`, padded with zeros, and its mask `(batch_size,
        length)`."""
        lengths = self.lengths[numbers]
        position = torch.arange(int(lengths.max()))
        mask = position < lengths[:, None]
        index = torch.where(mask, self.starts[numbers][:, None] + position, 0)
        return self.matrix.index_select(0, index.flatten()).view(*index.shape, -1), mask.long()

    def batch(self, keys: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gather(self.numbers(keys))

    @torch.no_grad()
    def fill(
        self, keys: Sequence[str], compute: Callable, batch_size: int, model: NrccrModel, prepare: Callable = list
    ):
        """Adds what `compute(prepare(keys))` gives, a dict of vectors of shape `(length, width)`, of those `keys` that
        are wanting, here and in the file; batches are prepared while others are computed. Where it fails, what it gave
        before is kept, and its error is raised."""
        if not keys:
            return
        failures = []

        def until_failure(batches: Iterator) -> Iterator:
            try:
                yield from batches
            except (Exception, KeyboardInterrupt) as error:
                failures.append(error)

        was_training = model.training
        model.eval()
        try:
            with self.lock():
                held = copy(self)
                self.read()  # what other processes have added since
                wanting = [key for key in keys if key not in self.rows]
                lost = {key: held[key] for key in held.rows if key not in self.rows}
                del held  # what it has in memory is copied and freed
                batches = until_failure(self.batches(wanting, prepare, compute, batch_size, lost, model.device))
                if (first := next(batches, None)) is not None:  # else nothing is to be written
                    add = self.keep if self.path is None else self.write
                    add(itertools.chain([first], batches))
        finally:
            model.train(was_training)
        if failures:
            raise failures[0]

    @contextmanager
    def lock(self):
        """Hold the right to replace the file. Whoever waits for it finds what it was going to compute."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.warning(f"waiting for another process that fills {self.path}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def batches(
        self,
        keys: Sequence[str],
        prepare: Callable,
        compute: Callable,
        batch_size: int,
        lost: dict[str, torch.Tensor],
        device: torch.device,
    ) -> Iterator[tuple[dict[str, int], torch.Tensor]]:
        """Yield the lengths of some sequences, and their vectors in a row. `lost`: what this process holds and the
        file no longer has, because somebody removed it and another process began anew. `device`: where `compute`
        runs."""
        is_first = self.matrix is None
        if lost:
            yield {key: len(vectors) for key, vectors in lost.items()}, torch.cat(list(lost.values()))
        chunks = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
        prepared = tqdm(
            ahead(chunks, prepare, device),
            desc=f"frozen {self.kind}",
            unit="batch",
            total=len(chunks),
            disable=not keys,
        )
        for chunk in prepared:
            parts = compute(chunk)
            if not parts:
                continue
            vectors = torch.cat(list(parts.values())).to("cpu", self.dtype)
            if not vectors.isfinite().all():
                bad = next(key for key, part in parts.items() if not part.to(self.dtype).isfinite().all())
                raise ValueError(
                    f"the encoder gives NaN or infinity for {bad!r} in {self.dtype}: check this input and the weights"
                )
            if empty := [key for key, part in parts.items() if not len(part)]:
                raise ValueError(f"the encoder gives nothing for {empty[0]!r}: leave it out")
            yield {key: len(part) for key, part in parts.items()}, F.pad(vectors, (0, 0, int(is_first), 0))
            is_first = False

    def keep(self, batches: Iterator):
        """Adds to the matrix in memory."""
        lengths, parts = self.index(), [] if self.matrix is None else [self.matrix]
        for added, vectors in batches:
            lengths |= added
            parts.append(vectors)
        self.matrix = None
        matrix, end = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=self.dtype), 0
        while parts:  # freed one by one: never all of it twice
            part = parts.pop(0)
            matrix[end : (end := end + len(part))] = part
        self.set(matrix, lengths)

    def write(self, batches: Iterator):
        """
        Replaces the file by one that holds more, batch by batch as it is computed, so in little memory: that is why
        safetensors' own `save_file`, which wants all of it, is not used (the format:
        https://huggingface.co/docs/safetensors/index#format).
        """
        lengths = self.index()
        with replacing(self.path) as file:
            file.seek(HEADER_SIZE)  # the header comes last, when the sizes are known
            if self.matrix is not None:
                file.write(as_bytes(self.matrix))
            for added, vectors in batches:
                lengths |= added
                width = vectors.shape[1]
                file.write(as_bytes(vectors))
            middle = file.tell() - HEADER_SIZE
            file.write(json.dumps([list(lengths), list(lengths.values())]).encode())
            end = file.tell() - HEADER_SIZE
            shape = [1 + sum(lengths.values()), width]
            header = {
                "__metadata__": {"fingerprint": self.fingerprint},
                "vectors": {"dtype": DTYPES[self.dtype], "shape": shape, "data_offsets": [0, middle]},
                "index": {"dtype": "U8", "shape": [end - middle], "data_offsets": [middle, end]},
            }
            text = json.dumps(header).encode().ljust(HEADER_SIZE - 8)
            file.seek(0)
            file.write(len(text).to_bytes(8, "little") + text)
            file.seek(HEADER_SIZE + end)
        self.read()

    def read(self):
        """Maps the file, if there is one."""
        state = None
        # safetensors opens it twice, for the header and for the rest; again, where it was replaced in between
        while (current := file_state(self.path)) not in (None, state):
            state, damage = current, None
            try:
                with safe_open(self.path, "pt") as file:
                    found = (file.metadata() or {}).get("fingerprint")
                    if found == self.fingerprint:
                        keys, lengths = json.loads(file.get_tensor("index").numpy().tobytes())
                        matrix, lengths = file.get_tensor("vectors"), dict(zip(keys, lengths, strict=True))
            except (SafetensorError, ValueError, FileNotFoundError) as error:
                damage = error
        if state is None:
            return
        if damage is not None:
            raise ValueError(f"{self.path} is damaged ({damage}): remove it, and it is computed again") from damage
        if found != self.fingerprint:
            raise ValueError(
                f"{self.path} holds {self.kind} of another encoder or processor (fingerprint {found}, here "
                f"{self.fingerprint}), so it was renamed or copied by hand: remove it, or name another directory"
            )
        self.set(matrix, lengths)

    def set(self, matrix: torch.Tensor, lengths: dict[str, int]):
        self.matrix, self.rows = matrix, {key: number for number, key in enumerate(lengths)}
        self.lengths = torch.tensor(list(lengths.values()), dtype=torch.long)
        self.starts = 1 + self.lengths.cumsum(0) - self.lengths

    def index(self) -> dict[str, int]:
        """Return the length of each sequence."""
        return dict(zip(self.rows, self.lengths.tolist()))


def file_state(path: Path | None) -> tuple | None:
    """Return what tells a file from the one that takes its place; None where there is none."""
    try:
        stat = path.stat() if path is not None else None
    except FileNotFoundError:
        return None
    return stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def as_bytes(vectors: torch.Tensor):
    """Return the vectors' memory, for writing; no copy."""
    return vectors.contiguous().view(torch.uint8).numpy()


def processor_settings(processor) -> str:
    """Return all that decides what a processor gives, wherever it was loaded from and whatever code it carries."""
    settings = re.sub(r'"auto_map": \{[^}]*\},\s*', "", repr(processor))
    backend = getattr(getattr(processor, "tokenizer", None), "backend_tokenizer", None)
    if backend is None:  # of a slow tokenizer the folder alone tells the vocabulary
        return settings
    settings = re.sub(r"name_or_path='.*?', vocab_size", "vocab_size", settings)
    return settings + backend.to_str().partition('"added_tokens"')[2]  # before it what the last call has set


def fingerprint(*parts) -> str:
    """Return a fingerprint of modules (their weights) and of anything with a faithful `repr` or `to_dict`."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
