"""Loads weights by one way: options are told apart, and a folder is looked at before a model is built from it."""

import json
import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import check_and_set_device_map
from transformers.utils import ContextManagers, cached_file


# where files are looked for; those of EVERYWHERE are right for another repository too
EVERYWHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "trust_remote_code")
HUB_OPTIONS = (*EVERYWHERE, "revision", "subfolder")
PLACE_OPTIONS = ("device_map", "max_memory", "offload_folder", "offload_buffers")
LOADING_OPTIONS = (*HUB_OPTIONS, *PLACE_OPTIONS, "dtype", "variant")

OPEN_CLIP, OPEN_CLIP_CONFIG = "open_clip:", "open_clip_config.json"
CONFIG_FILES = ("config.json", OPEN_CLIP_CONFIG)
LFS_POINTER = b"version https://git-lfs"
NO_WEIGHTS = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")  # pickles, which run code as they are read
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CACHE_LINE = 64  # bytes
# A model may hold a little more than its file: a pooler that is dropped, tied weights. One of 4 times its size is no
# model of that file.
SLACK, SPARE_NUMBERS, SPARE_TENSORS = 4, 10**7, 1000


def split_options(
    options: dict[str, Any], settings: Collection[str], of: str, loading: Collection[str] = LOADING_OPTIONS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tells options of loading from `settings` by their names. Raises TypeError for a name that is neither."""
    found = {name: options[name] for name in options if name in loading and options[name] is not None}
    rest = {name: options[name] for name in options if name not in loading}
    for name in rest:
        if name not in settings:
            meant = get_close_matches(name, [*settings, *loading], n=1)
            hint = f"did you mean {meant[0]!r}?" if meant else f"loading knows {', '.join(loading)}"
            raise TypeError(f"{of} takes no {name!r}: {hint}")
    return found, rest


def of_hub(options: dict[str, Any], names: Collection[str] = HUB_OPTIONS) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


# --------------------------------------------------------------------------------------------------------- names


def nearest(name: str, known: Collection[str] = ()) -> str:
    """Return words that name what may have been meant: of `known`, and of the models that lie where `name` would."""
    parent = Path(name).parent
    if parent.is_dir():
        for file, prefix in zip(CONFIG_FILES, ("", OPEN_CLIP)):
            known = [*known, *(f"{prefix}{path.parent}" for path in parent.glob(f"*/{file}"))]
    meant = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def check_name(name: str | os.PathLike, config_file: str = CONFIG_FILES[0], subfolder: str | None = None):
    """Looks at a name before a hub is asked for it. Raises ValueError for a folder without `config_file`, and for what
    is neither a folder nor can be a hub id."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            validate_repo_id(str(name))
        except ValueError as error:
            raise ValueError(f"there is no such folder as {name}, and no hub id is so{nearest(str(name))}") from error
    elif not (folder / (subfolder or "") / config_file).is_file():
        other = [file for file in CONFIG_FILES if (folder / (subfolder or "") / file).is_file()]
        hint = f"but {other[0]}: write {OPEN_CLIP}{folder}" if other == [OPEN_CLIP_CONFIG] else "so it is no model"
        raise ValueError(f"{folder / (subfolder or '')} holds no {config_file}, {hint}")


# --------------------------------------------------------------------------------------------------------- files


def find_file(name: str, file: str, **hub) -> str | None:
    """Finds a file of a folder or hub id; None where the repository is there and the file is not."""
    hub = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    return cached_file(str(name), file, _raise_exceptions_for_missing_entries=False, **hub)


def weight_files(name: str, config: PreTrainedConfig, variant: str | None = None, **hub) -> list[str]:
    """
    Finds the safetensors files of a folder or hub id; of the latter they are downloaded.

    Raises:
        ValueError: where there is none, pickled weights or not, or where an index names one that is not there.
    """
    part = f".{variant}" if variant else ""
    single, index = f"model{part}.safetensors", f"model.safetensors.index{part}.json"
    if own := getattr(config, "transformers_weights", None):
        single, index = (None, own) if own.endswith(".json") else (own, None)
    if single and (path := find_file(name, single, **hub)):
        return [path]
    if index is None or (path := find_file(name, index, **hub)) is None:
        folder = Path(name, hub.get("subfolder") or "")
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in NO_WEIGHTS)
        only = (
            f" but {', '.join(pickled)}, and pickled weights are not read, since they can run code" if pickled else ""
        )
        raise ValueError(
            f"{name} holds no {single or index}{only}: save the model again with save_pretrained, or take a revision "
            "that has safetensors"
        )
    try:
        shards = sorted(set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no index of safetensors files ({error}): get it again") from error
    paths = [find_file(name, shard, **hub) for shard in shards]
    if absent := [shard for shard, found in zip(shards, paths) if found is None]:
        raise ValueError(f"{name} lacks {', '.join(absent)}, which {index} names: get the folder again")
    return paths


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Reads the shape of each tensor of a safetensors file. Raises ValueError for what is none, or not a whole one."""
    with open(path, "rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder, or download it again"
            )
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): get it again") from error


# -------------------------------------------------------------------------------------------------------- models


@contextmanager
def at_most(numbers: int, tensors: int, where: str) -> Iterator[None]:
    """Stops, by a ValueError, the building of a model that has many more parameters than the file it is for."""
    built, thread = [0, 0], threading.get_ident()
    limits = SLACK * numbers + SPARE_NUMBERS, SLACK * tensors + SPARE_TENSORS

    def count(module: torch.nn.Module, name: str, parameter: torch.Tensor | None):
        if parameter is None or threading.get_ident() != thread:
            return
        built[0] += parameter.numel()
        built[1] += 1
        if built[0] > limits[0] or built[1] > limits[1]:
            raise ValueError(
                f"the config of {where} asks for a model far larger than its weights, {tensors:,} tensors of "
                f"{numbers:,} numbers in all: get its config.json again"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_shapes(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, shapes: dict[str, tuple], where: str, **arguments
):
    """Builds the model without memory, and compares it with `shapes` of its file. Raises ValueError where they differ,
    or where the config's sizes are absurd."""
    context = model_class.get_init_context(torch.get_default_dtype(), False, False, False)
    try:
        with at_most(sum(map(prod, shapes.values())), len(shapes), where), ContextManagers(context):
            model = model_class(config, **arguments)
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the config of {where} makes no model ({reason}): get its config.json again") from error
    for name, value in model.state_dict().items():
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise ValueError(
                f"{name} of {where} has the shape {shapes[name]}, and its config asks for {tuple(value.shape)}: its "
                "config.json and its weights are not of one model"
            )


@torch.no_grad()
def check_numbers(model: torch.nn.Module, where: str):
    """Raise ValueError for a weight that is NaN or infinite. What is offloaded to disk is not read."""
    for name, value in model.state_dict().items():
        if value.dtype in NUMBERS and value.device.type != "meta":
            # one pass; a sum that overflows is looked at again
            if not value.sum(dtype=torch.float32).isfinite() and not (right := value.isfinite()).all():
                raise ValueError(
                    f"{name} of {where} holds {int((~right).sum()):,} values that are NaN or infinite: its training "
                    "failed, or the file is damaged; take an earlier checkpoint, or get it again"
                )


@torch.no_grad()
def align(model: torch.nn.Module):
    """Copies what products read out of the file that it is mapped from, to addresses of whole cache lines: at others
    the last bit of a product may differ, so that equal weights of two files would give two embeddings."""
    for module in model.modules():
        if not isinstance(module, torch.nn.Embedding):  # of which a text reads a few rows
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if value.device.type == "cpu" and value.data_ptr() % CACHE_LINE:
                    value.data = value.data.clone()


def load_weights(
    load: Callable,
    model_class: type[PreTrainedModel],
    name: str,
    *arguments,
    config: PreTrainedConfig,
    may_lack: tuple[str, ...] = (),
    **options,
) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """
    Loads as `load`, a `from_pretrained`, does; before, headers and config are compared, and after, numbers are looked
    at.

    Args:
        model_class: What `load` builds.
        may_lack: How the names of tensors begin that need not be there.
        options: Of `load`; those that are neither its own nor of loading go to the class.

    Raises:
        ValueError: for a folder without weights, pickled ones, a Git LFS pointer, a truncated file, a tensor that is
            missing or of another shape, a config whose sizes are absurd, and weights that are not finite.
    """
    with_info = options.pop("output_loading_info", False)
    if options.pop("use_safetensors", True) is False:
        raise ValueError(f"{name}: use_safetensors=False asks for pickled weights, which are not read")
    files = weight_files(name, config, options.get("variant"), **of_hub(options))
    shapes = {key: shape for path in files for key, shape in read_shapes(path).items()}
    quantized = options.get("quantization_config") or getattr(config, "quantization_config", None)
    if not quantized and not options.get("ignore_mismatched_sizes"):
        of_class = {key: options[key] for key in ("add_pooling_layer",) if key in options}
        check_shapes(model_class, config, shapes, str(name), **of_class)
    model, info = load(name, *arguments, config=config, output_loading_info=True, use_safetensors=True, **options)
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(may_lack)):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{name} lacks {', '.join(missing[:5])}{more} of {model_class.__name__}: its weights are those of another "
            "model, or not all of them"
        )
    check_numbers(model, str(name))
    align(model)
    return (model, info) if with_info else model


def place(
    model: PreTrainedModel,
    device_map: str | int | dict | torch.device | None = None,
    max_memory: dict | None = None,
    offload_folder: str | os.PathLike | None = None,
    offload_buffers: bool = False,
) -> PreTrainedModel:
    """Puts a model that is built on the devices that `device_map` names, as `from_pretrained` would have."""
    if device_map is None:
        return model
    from accelerate import dispatch_model, infer_auto_device_map  # a moment to import
    from accelerate.utils import get_balanced_memory

    device_map, whole = check_and_set_device_map(device_map), model._no_split_modules
    if isinstance(device_map, str):
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=whole, low_zero=low)
        device_map = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole)
    if set(device_map) == {""} and device_map[""] != "disk":
        return model.to(device_map[""])
    return dispatch_model(model, device_map, offload_dir=offload_folder, offload_buffers=offload_buffers)
