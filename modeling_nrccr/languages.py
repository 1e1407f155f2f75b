"""The languages of a `NrccrModel`: adapters that are added, chosen, saved and loaded while its text side stays."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from threading import Lock, RLock

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.utils import ModelOutput, cached_file

from .adapter_settings import ADAPTERS
from .files import write_file
from .language_adapters import NrccrLanguageAdapter


LANGUAGE_FILE = "language_adapter.safetensors"
# Cosine of probes, of one model in float32, and of it in half precision against float32: an EfficientNet whose weights
# are rounded to bfloat16 sees the test picture with 0.996, a deep text encoder reads the texts with 0.9999.
SAME_MODEL, SAME_IN_HALF = 0.999, 0.98
PROBED = 12  # tokens of a text of the probe
LORA = RLock()  # of peft's layers, which hold what is active: threads take turns through a tower that has any


def load_peft():
    """Import peft, when a language with LoRA is met, and inside `try`: the Hub's loader demands all other imports.
    Raises ImportError without it."""
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError('a language with LoRA needs peft: pip install "modeling_nrccr[lora]"') from error
    return peft, BaseTunerLayer


def is_of(language: str, name: str) -> bool:
    """Tell whether a module or tensor of the text tower is of the language's LoRA: peft names its parts so."""
    parts = name.split(".")
    return any(before.startswith("lora_") and part == language for before, part in zip(parts, parts[1:]))


def same_model(model: nn.Module, probe: Callable[[torch.dtype | None], torch.Tensor], made_by: torch.Tensor) -> float:
    """
    Compare what was stored, `(num_probes, width)`, with what the model gives for the same probe.

    Args:
        probe: gives it, with weights rounded to a precision (None: as they are).

    Returns:
        The similarity, 1 for the same model in any precision; below 1 for another one, whatever its precision.
    """
    in_half = getattr(model, "dtype", torch.float32) in (torch.bfloat16, torch.half)  # exported ones have one
    similarity = 0.0
    # who made it may have held its weights in half precision
    for dtype in (None,) if in_half else (None, torch.bfloat16, torch.half):
        ours = probe(dtype)
        if ours.shape != made_by.shape:
            return 0.0
        found = float(F.cosine_similarity(ours, made_by.float()).min())
        if found >= (SAME_IN_HALF if in_half else SAME_MODEL):
            return 1.0
        similarity = found if dtype is None else similarity
        if not found >= SAME_IN_HALF:  # NaN is not; nor is it a matter of precision
            break
    return similarity


MODES: dict[nn.Module, tuple[int, list[nn.Module]]] = {}  # how many encode, and what trained before
MODES_LOCK = Lock()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep the model without dropout while any thread is in here; every module is then as it was, also after an
    error."""
    with MODES_LOCK:
        count, training = MODES.get(model) or (0, [module for module in model.modules() if module.training])
        for module in training:
            module.training = False
        MODES[model] = count + 1, training
    try:
        yield
    finally:
        with MODES_LOCK:
            count, training = MODES.pop(model)
            if count > 1:
                MODES[model] = count - 1, training
            else:
                for module in training:
                    module.training = True


class NrccrLanguagesMixin:
    """Of a model with `text_tower`, `text_head` and `text_projection`."""

    def adapter(self, language: str) -> NrccrLanguageAdapter:
        """Return the adapter of a language. Raises ValueError for one that was not added."""
        if language not in self.language_adapters:
            known = ", ".join(self.language_adapters) or "none"
            raise ValueError(
                f"no adapter for the language {language!r} (here: {known}): call load_language or add_language first, "
                "or take None for the model's own text side"
            )
        return self.language_adapters[language]

    def add_language(self, language: str, **settings) -> NrccrLanguageAdapter:
        """Add a new adapter, which starts as the identity; `settings` as in [`NrccrLanguageAdapter`]. It replaces what
        the language had, and is active where that was.

        Raises:
            ValueError: a code or a setting that cannot be, before anything changes.
        """
        self.check_code(language)
        if ":" in str(settings.get("kind")):
            ADAPTERS[settings["kind"]]  # imported: whoever calls this chooses it
        adapter = NrccrLanguageAdapter(self.text_head.output_size, **settings)
        if adapter.kind == "lora":
            load_peft()
            self.lora_targets(adapter)
        active = self.language == language
        self.remove_language(language)
        adapter.reset()
        adapter.to(self.device, self.dtype).train(self.training)
        if adapter.kind == "lora":
            self.insert_lora(language, adapter)
        self.language_adapters[language] = adapter
        self.list_languages()
        if active:
            self.set_language(language)
        return adapter

    def check_code(self, language: str):
        """Raise ValueError for what cannot name a language."""
        if not isinstance(language, str) or not language or "." in language:
            raise ValueError(f"a language is a code such as 'gl' or 'pt-BR', not {language!r}")
        if language == "base":
            raise ValueError("'base' names the model's own text side: take the language's code")
        # Tongan's is "to"; of peft's modules, in which a code is a name too, these are the same
        if hasattr(nn.ModuleDict(), language):
            raise ValueError(f"{language!r} is a name that torch keeps for itself: take another code, such as 'ton'")

    def remove_language(self, language: str):
        """Take a language out whole, where it is there: the text tower is then as if it had never been."""
        if language not in self.language_adapters:
            return
        if self.has_lora(language):
            with LORA, warnings.catch_warnings():  # that another becomes active: `lora` chooses anew for every batch
                warnings.filterwarnings("ignore", "Adapter .* was active")
                for layer in self.lora_layers():
                    if language in layer.r:
                        layer.delete_adapter(language)
                self.unwrap(lambda layer: not layer.r)
            self.text_tower.peft_config.pop(language, None)
        self.language_adapters.pop(language)
        self.set_language(None if self.language == language else self.language)
        self.list_languages()

    def unwrap(self, chosen: Callable[[nn.Module], bool]):
        """Put the encoder's own layer in the place of each of peft's that is `chosen`."""
        wrapped = set(self.lora_layers())
        for name, module in list(self.text_tower.named_modules()):
            if module in wrapped and chosen(module):
                parent, _, attribute = name.rpartition(".")
                setattr(self.text_tower.get_submodule(parent), attribute, module.get_base_layer())

    def list_languages(self):
        settings = {name: adapter.settings() for name, adapter in self.language_adapters.items()}
        self.config.languages = settings or None

    def set_language(self, language: str | None):
        """Choose whose adapter reads texts from now on; None: no adapter's, as before any. Raises ValueError for a
        language that was not added."""
        if language is not None:
            self.adapter(language)
        self.language = self.config.language = language
        return self

    @contextmanager
    def using_language(self, language: str | None) -> Iterator:
        before = self.language
        try:
            yield self.set_language(language)
        finally:
            self.set_language(before)

    def languages_of(self, size: int, languages: str | Sequence[str | None] | None) -> list[str | None]:
        """Return one language for each of `size` texts; by default the active one. Raises ValueError for another
        number of them."""
        languages = self.language if languages is None else languages
        if languages is None or isinstance(languages, str):
            languages = [languages] * size
        if len(languages) != size:
            raise ValueError(f"{len(languages)} languages for {size} texts: give one for each, or one for all")
        for language in set(languages) - {None}:
            self.adapter(language)
        return list(languages)

    def adapt(self, features: torch.Tensor, languages: list[str | None]) -> torch.Tensor:
        """Return what the adapter of each row's language makes of what the head gives, `(batch_size, width)` to the
        same."""
        for language in dict.fromkeys(languages):
            if language is not None:
                rows = [i for i, of_row in enumerate(languages) if of_row == language]
                rows = torch.tensor(rows, device=features.device)
                features = features.index_copy(0, rows, self.language_adapters[language](features[rows]))
        return features

    def train_language(self, language: str):
        """Train only this language's adapter from now on; everything else is frozen, its dropout off."""
        adapter = self.adapter(language)
        self.requires_grad_(False)
        trained = set(adapter.modules())
        if self.has_lora(language):
            trained |= {module for name, module in self.text_tower.named_modules() if is_of(language, name)}
        for module in trained:
            module.requires_grad_(True)
        self.text_tower.num_trained_layers = adapter.layers if adapter.kind == "lora" else 0
        self.kept_in_eval = [module for module in self.modules() if module not in trained and module is not self]
        return self.set_language(language).train(self.training)

    # ------------------------------------------------------------------------------------------------------- LoRA

    def has_lora(self, language: str | None) -> bool:
        return language is not None and self.language_adapters[language].kind == "lora"

    def lora_layers(self) -> list[nn.Module]:
        if not any(map(self.has_lora, self.language_adapters)):
            return []
        _, wrapper = load_peft()
        return [module for module in self.text_tower.modules() if isinstance(module, wrapper)]

    def lora_targets(self, adapter: NrccrLanguageAdapter) -> dict[str, nn.Linear]:
        """Return the Linear layers that its LoRA is put into, by their names in the text tower. Raises ValueError for
        a number of layers that the encoder does not have."""
        layers = getattr(*self.text_tower.layer_list())
        count = len(layers) if adapter.layers == -1 else adapter.layers
        if not 0 < count <= len(layers):
            raise ValueError(f"layers={adapter.layers}, but the text encoder has {len(layers)}")
        top = {module for layer in layers[len(layers) - count :] for module in layer.modules()}
        # a language that came before has wrapped them already
        return {
            name.removesuffix(".base_layer"): module
            for name, module in self.text_tower.named_modules()
            if module in top and isinstance(module, nn.Linear) and ".lora_" not in name
        }

    def insert_lora(self, language: str, adapter: NrccrLanguageAdapter):
        peft, _ = load_peft()
        targets = self.lora_targets(adapter)
        if adapter.layers == -1:
            adapter.layers = len(getattr(*self.text_tower.layer_list()))
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=sorted(targets))
        before = [(parameter, parameter.requires_grad) for parameter in self.text_tower.parameters()]
        with LORA, warnings.catch_warnings():  # of a language that is there already, which is the purpose
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            peft.inject_adapter_in_model(config, self.text_tower, adapter_name=language)
        for parameter, requires_grad in before:  # peft freezes all but the new
            parameter.requires_grad_(requires_grad)

    @contextmanager
    def lora(self, language: str | None) -> Iterator:
        """Keep this language's LoRA alone inside the text tower, for one thread at a time."""
        layers = self.lora_layers()
        if not layers:
            yield
            return
        with nullcontext() if torch.compiler.is_compiling() else LORA:
            trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
            for layer in layers:
                layer.enable_adapters(language in layer.r)
                if language in layer.r:
                    layer.set_adapter(language)
            for parameter, requires_grad in trained:  # peft changes it with every switch
                parameter.requires_grad_(requires_grad)
            yield

    def merge_language(self, language: str):
        """Folds the language's LoRA into the text tower, for good: the model then reads that language alone, and loads
        where there is no peft. Raises ValueError for a language without LoRA."""
        if not self.has_lora(language):
            raise ValueError(f"{language!r} has no LoRA to merge: save_pretrained keeps its adapter as it is")
        with LORA:
            for layer in self.lora_layers():
                if language in layer.r:
                    layer.merge(adapter_names=[language])
            self.unwrap(lambda layer: True)
        del self.text_tower.peft_config
        for other in [name for name in self.language_adapters if name != language]:
            self.language_adapters.pop(other)
        self.language_adapters[language].kind = "linear"
        self.list_languages()
        return self.set_language(language)

    # ------------------------------------------------------------------------------------------------------ files

    def language_keys(self, language: str) -> set[str]:
        """Return the names of its parameters in the model's `state_dict`."""
        own = self.adapter(language).state_dict().keys()
        weights = self.language_weights(language)
        return {f"language_adapters.{language}.{key}" if key in own else key for key in weights}

    def language_weights(self, language: str) -> dict[str, torch.Tensor]:
        """Return the weights of a language's adapter, by their names there, and of its LoRA, by those in the model."""
        weights = dict(self.adapter(language).state_dict())
        if self.has_lora(language):
            inside = self.text_tower.state_dict().items()
            weights |= {f"text_tower.{key}": value for key, value in inside if is_of(language, key)}
        return weights

    @torch.no_grad()
    def probe(self, rounded_to: torch.dtype | None = None) -> torch.Tensor:
        """Return embeddings of four fixed texts by the model's own text side, computed in float32, of shape
        `(4, projection_dim)`: they tell text towers, and revisions of one, apart, in any precision, on any device."""
        length = min(
            PROBED, self.config.text_length or getattr(self.config.text_config, "max_position_embeddings", PROBED)
        )
        ids = ((torch.arange(4 * length) * 7919 + 13) % self.config.text_config.vocab_size).view(4, -1).to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "languages": [None] * 4}
        side = self.language_side()
        with in_eval_mode(side):
            return side.in_float32(rounded_to, **inputs).text_embeds.float().cpu()

    def in_float32(self, rounded_to: torch.dtype | None = None, **inputs) -> ModelOutput:
        """Return what `forward` gives with the weights, in whatever precision they are held (or `rounded_to`), as
        float32: what was computed elsewhere in another precision is compared with that."""
        weights = {name: value for name, value in self.state_dict(keep_vars=True).items() if value.is_floating_point()}
        if any(value.is_meta for value in weights.values()):  # offloaded
            return self(**inputs)
        changed = {
            name: value.to(rounded_to or value.dtype).float()
            for name, value in weights.items()
            if rounded_to or value.dtype in (torch.bfloat16, torch.half)
        }
        return functional_call(self.unwrapped(), changed, kwargs=inputs)

    def unwrapped(self) -> "NrccrLanguagesMixin":
        """Return this model, all shared, without the autocast that accelerate puts around the forward of what was
        trained in half precision."""
        plain = copy(self)
        for name in ("forward", "_original_forward"):
            plain.__dict__.pop(name, None)
        return plain

    def made_for(self) -> dict[str, str | None]:
        """Return the name and revision of the model that languages are added to."""
        here = {"name": self.config._name_or_path, "revision": getattr(self.config, "_commit_hash", None)}
        return self.config.dual_encoder or here

    def save_language(self, language: str, directory: str | Path):
        """Writes the language's adapter, a few megabytes, as one safetensors file that names this model."""
        about = {"language": language, "settings": self.adapter(language).settings(), "model": self.made_for()}
        weights = {key: value.cpu().contiguous() for key, value in self.language_weights(language).items()}
        weights["probe"] = self.probe()
        path = Path(directory, LANGUAGE_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        # one entry: of several the order, and so the file's bytes, would be drawn anew
        write_file(path, save(weights, {"about": json.dumps(about)}))

    def load_language(self, language: str, directory: str | Path, **hub_options) -> NrccrLanguageAdapter:
        """
        Reads what `save_language` wrote, from a folder or a hub id, under any name.

        Raises:
            ValueError: for a file that is damaged, or was made for another model or another revision of this one.
            ImportError: for a kind of adapter that others wrote, whose module has not been imported.
        """
        path = cached_file(str(directory), LANGUAGE_FILE, **hub_options)
        about, weights = read_language_file(path)
        self.check_code(language)
        self.check_made_for(path, about["model"], weights.pop("probe"))
        wanted = self.shapes_of(path, about["settings"])
        weights = {name.replace(f".{about['language']}.", ".*."): value for name, value in weights.items()}
        if differing := sorted(wanted.keys() ^ weights.keys()):
            here = "lacks" if differing[0] in wanted else "has, and this version does not know,"
            raise ValueError(f"{path} {here} {differing[0]}: get it again, or add the language again")
        for name, value in weights.items():
            if value.shape != wanted[name] or not value.is_floating_point() or not value.isfinite().all():
                what = f"shape {tuple(value.shape)}, not {tuple(wanted[name])}"
                what = what if value.shape != wanted[name] else "values that are not finite"
                raise ValueError(f"{path}: {name} has {what}: it is damaged, get it again")
        adapter = self.add_language(language, **about["settings"])
        inside = {name: value for name, value in weights.items() if name.startswith("text_tower.")}
        adapter.load_state_dict({name: value for name, value in weights.items() if name not in inside})
        inside = {name.removeprefix("text_tower.").replace(".*.", f".{language}."): v for name, v in inside.items()}
        self.text_tower.load_state_dict(inside, strict=False)
        return adapter

    def shapes_of(self, path: str, settings: dict) -> dict[str, torch.Size]:
        """Return the shape of each tensor that a language of these settings has, with "*" for its code. Raises
        ValueError, that names `path`, for settings that cannot be."""
        try:
            with torch.device("meta"):  # nothing is allocated, whatever the file asks for
                adapter = NrccrLanguageAdapter(self.text_head.output_size, **settings)
            targets = self.lora_targets(adapter) if adapter.kind == "lora" else {}
        except ImportError as error:
            raise ImportError(f"{path}: {error}") from error
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{path} has settings that cannot be ({error}): it is damaged, get it again") from error
        shapes = {name: value.shape for name, value in adapter.state_dict().items()}
        for name, linear in targets.items():
            shapes[f"text_tower.{name}.lora_A.*.weight"] = torch.Size((adapter.rank, linear.in_features))
            shapes[f"text_tower.{name}.lora_B.*.weight"] = torch.Size((linear.out_features, adapter.rank))
        return shapes

    def check_made_for(self, path: str, model: dict[str, str | None], probe: torch.Tensor):
        """Raise ValueError for a language of another model, or of another revision of this one."""
        here, similarity = self.made_for(), same_model(self, self.probe, probe)
        revisions = {model.get("revision"), here.get("revision")} - {None}
        if similarity != 1 or (model["name"] == here["name"] and len(revisions) > 1):
            raise ValueError(
                f"{path} was made for {model['name']} (revision {model.get('revision')}), and this is {here['name']} "
                f"(revision {here.get('revision')}): the texts of a probe have similarity {similarity:.4f}, not 1. "
                "Load the model that it was made for, or add the language again"
            )


def read_language_file(path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return what a language file says of itself (`language`, `settings`, `model`), and its tensors. Raises ValueError
    for a file that is none."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            weights = {key: file.get_tensor(key) for key in file.keys()}
        kinds = {"language": str, "settings": dict, "model": dict}
        if not isinstance(about, dict) or "probe" not in weights:
            raise ValueError("it does not say what it is")
        for name, kind in kinds.items():
            if not isinstance(about.get(name), kind):
                raise ValueError(f"{name} is {about.get(name)!r}")
        if not isinstance(about["model"].get("name"), str):
            raise ValueError("it names no model")
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no language file, or damaged ({error}): get it again") from error
    return about, weights
