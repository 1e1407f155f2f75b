"""The languages of a `NrccrModel`: adapters that are added, chosen, saved and loaded while its text side stays."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from transformers.utils import cached_file

from .files import write_file
from .language_adapters import NrccrLanguageAdapter


LANGUAGE_FILE = "language_adapter.safetensors"
SAME_MODEL = 0.999  # cosine of probes: 1 up to the precision that a model runs in


def load_peft():
    """Imported when a language with LoRA is met, and inside `try`: the Hub's loader demands all other imports."""
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError('a language with LoRA needs peft: pip install "modeling_nrccr[lora]"') from error
    return peft, BaseTunerLayer


def is_of(language: str, name: str) -> bool:
    """Whether a module or tensor of the text tower is of the language's LoRA: peft names its parts so."""
    return language in name.split(".")


class NrccrLanguagesMixin:
    """Of a model with `text_tower`, `text_head` and `text_projection`."""

    def adapter(self, language: str) -> NrccrLanguageAdapter:
        """Raises ValueError for a language that was not added."""
        if language not in self.language_adapters:
            known = ", ".join(self.language_adapters) or "none"
            raise ValueError(
                f"no adapter for the language {language!r} (here: {known}): call load_language or add_language first, "
                "or take None for the model's own text side"
            )
        return self.language_adapters[language]

    def add_language(self, language: str, **settings) -> NrccrLanguageAdapter:
        """A new adapter, which starts as the identity; `settings` as in [`NrccrLanguageAdapter`]. It replaces what
        the language had."""
        if not language or "." in language:
            raise ValueError(f"a language is a code such as 'gl' or 'pt-BR', not {language!r}")
        if hasattr(nn.ModuleDict, language):  # Tongan
            raise ValueError(f"{language!r} is a name that torch keeps for itself: take another code, such as 'ton'")
        self.remove_language(language)
        adapter = NrccrLanguageAdapter(self.text_head.output_size, **settings)
        adapter.reset()
        adapter.to(self.device, self.dtype).train(self.training)
        if adapter.kind == "lora":
            self.insert_lora(language, adapter)
        self.language_adapters[language] = adapter
        self.list_languages()
        return adapter

    def remove_language(self, language: str):
        if language in self.language_adapters:
            if self.has_lora(language):
                with warnings.catch_warnings():  # that another becomes active: `lora` chooses anew for every batch
                    warnings.filterwarnings("ignore", "Adapter .* was active")
                    for layer in self.lora_layers():
                        layer.delete_adapter(language)
            self.language_adapters.pop(language)
            self.set_language(None if self.language == language else self.language)
            self.list_languages()

    def list_languages(self):
        settings = {name: adapter.settings() for name, adapter in self.language_adapters.items()}
        self.config.languages = settings or None

    def set_language(self, language: str | None):
        """Whose adapter reads texts from now on, of those that were added; None: no adapter's, as before any."""
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
        """One for each of `size` texts; by default the active one."""
        languages = self.language if languages is None else languages
        if languages is None or isinstance(languages, str):
            languages = [languages] * size
        if len(languages) != size:
            raise ValueError(f"{len(languages)} languages for {size} texts: give one for each, or one for all")
        for language in set(languages) - {None}:
            self.adapter(language)
        return list(languages)

    def adapt(self, features: torch.Tensor, languages: list[str | None]) -> torch.Tensor:
        """What the adapter of each row's language makes of what the head gives, `(batch_size, width)` to the same."""
        for language in dict.fromkeys(languages):
            if language is not None:
                rows = [i for i, of_row in enumerate(languages) if of_row == language]
                rows = torch.tensor(rows, device=features.device)
                features = features.index_copy(0, rows, self.language_adapters[language](features[rows]))
        return features

    def train_language(self, language: str):
        """Only this language's adapter is trained from now on; everything else is frozen, its dropout off."""
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

    def insert_lora(self, language: str, adapter: NrccrLanguageAdapter):
        peft, _ = load_peft()
        parent, name = self.text_tower.layer_list()
        layers = getattr(parent, name)
        if adapter.layers == -1:
            adapter.layers = len(layers)
        if not 0 < adapter.layers <= len(layers):
            raise ValueError(f"layers={adapter.layers}, but the text encoder has {len(layers)}")
        top = set(layers[len(layers) - adapter.layers :].modules())
        linear = [n for n, m in self.text_tower.named_modules() if m in top and isinstance(m, nn.Linear)]
        # a language that came before has wrapped them already
        linear = sorted({n.removesuffix(".base_layer") for n in linear if ".lora_" not in n})
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=linear)
        frozen = [p for p in self.text_tower.parameters() if not p.requires_grad]
        with warnings.catch_warnings():  # of a language that is there already, which is the purpose
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            peft.inject_adapter_in_model(config, self.text_tower, adapter_name=language)
        for parameter in frozen:
            parameter.requires_grad_(False)

    @contextmanager
    def lora(self, language: str | None) -> Iterator:
        """The text tower with this language's LoRA alone inside it."""
        layers = self.lora_layers()
        trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
        for layer in layers:
            layer.enable_adapters(language in layer.r)
            if language in layer.r:
                layer.set_adapter(language)
        try:
            yield
        finally:
            for parameter, requires_grad in trained:  # peft changes it with every switch
                parameter.requires_grad_(requires_grad)

    def merge_language(self, language: str):
        """Folds the language's LoRA into the text tower, for good: the model then reads that language alone, and
        loads where there is no peft."""
        if not self.has_lora(language):
            raise ValueError(f"{language!r} has no LoRA to merge: save_pretrained keeps its adapter as it is")
        wrapped = set(self.lora_layers())
        for name, module in list(self.text_tower.named_modules()):
            if module in wrapped:
                if language in module.r:
                    module.merge(adapter_names=[language])
                parent = self.text_tower.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], module.get_base_layer())
        for other in [name for name in self.language_adapters if name != language]:
            self.language_adapters.pop(other)
        self.language_adapters[language].kind = "linear"
        self.list_languages()
        return self.set_language(language)

    # ------------------------------------------------------------------------------------------------------ files

    def language_keys(self, language: str) -> set[str]:
        """The names of its parameters in the model's `state_dict`."""
        own = self.adapter(language).state_dict().keys()
        weights = self.language_weights(language)
        return {f"language_adapters.{language}.{key}" if key in own else key for key in weights}

    def language_weights(self, language: str) -> dict[str, torch.Tensor]:
        """Of its adapter, by their names there, and of its LoRA, by those in the model."""
        weights = dict(self.adapter(language).state_dict())
        if self.has_lora(language):
            inside = self.text_tower.state_dict().items()
            weights |= {f"text_tower.{key}": value for key, value in inside if is_of(language, key)}
        return weights

    @torch.no_grad()
    def probe(self) -> torch.Tensor:
        """Embeddings of four fixed texts by the model's own text side, `(4, projection_dim)`: they tell text towers,
        and revisions of one, apart, in any precision and on any device."""
        was_training, size = self.training, self.config.text_config.vocab_size
        self.eval()
        ids = (torch.arange(4 * 12) * 7919 + 13) % size
        embeds = self.get_text_features(ids.view(4, 12).to(self.device), languages=[None] * 4).pooler_output
        self.train(was_training)
        return embeds.float().cpu()

    def made_for(self) -> dict[str, str | None]:
        """Name and revision of the model that languages are added to."""
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
        """
        path = cached_file(str(directory), LANGUAGE_FILE, **hub_options)
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                weights = {key: file.get_tensor(key) for key in file.keys()}
            probe, settings, model = weights.pop("probe"), about["settings"], about["model"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no language file, or damaged ({error}): get it again") from error
        self.check_made_for(path, model, probe)
        adapter = self.add_language(language, **settings)
        names = self.language_weights(language)
        wanted = {name.replace(f".{language}.", f".{about['language']}."): name for name in names}
        if wanted.keys() != weights.keys():
            self.remove_language(language)
            raise ValueError(f"{path} lacks {sorted(wanted.keys() - weights.keys())}: it is of another version")
        inside = {wanted[k].removeprefix("text_tower."): v for k, v in weights.items() if k.startswith("text_tower.")}
        adapter.load_state_dict({k: v for k, v in weights.items() if not k.startswith("text_tower.")})
        if inside:
            self.text_tower.load_state_dict(inside, strict=False)
        return adapter

    def check_made_for(self, path: str, model: dict[str, str | None], probe: torch.Tensor):
        ours, here = self.probe(), self.made_for()
        same_size = ours.shape == probe.shape
        similarity = float(F.cosine_similarity(ours, probe).min()) if same_size else 0.0
        revisions = {model.get("revision"), here.get("revision")} - {None}
        if similarity < SAME_MODEL or (model["name"] == here["name"] and len(revisions) > 1):
            raise ValueError(
                f"{path} was made for {model['name']} (revision {model.get('revision')}), and this is {here['name']} "
                f"(revision {here.get('revision')}): the texts of a probe have similarity {similarity:.4f}, not 1. "
                "Load the model that it was made for, or add the language again"
            )
