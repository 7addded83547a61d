"""Load a model, and say what it is."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["config_summary", "load_model", "model_identity", "model_structure", "software_versions"]

CONFIG_FIELDS = (
    "model_type",
    "architectures",
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "intermediate_size",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "vocab_size",
)
# which checkpoint is meant: its configuration is looked up where its weights are
_WHERE = (
    "cache_dir",
    "revision",
    "code_revision",
    "subfolder",
    "token",
    "local_files_only",
    "force_download",
    "proxies",
)


def load_model(
    name: str, *, trust_remote_code: bool = False, model_kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """A Hugging Face model by id or local directory, in eval mode, with the head its configuration names.

    The class is the one listed under ``architectures`` when transformers has it, else ``AutoModel``. Code that comes with
    a checkpoint runs only under ``trust_remote_code=True``. ``model_kwargs`` are what ``from_pretrained`` takes; those that say
    where a checkpoint is (``revision``, ``subfolder``, ``cache_dir``, ``token``, ``config``, ...) hold for its configuration too.
    A folder of a PEFT adapter is its base model with the adapter in it.

    Raises:
        ValueError: no such model (the message repeats what transformers said in one line).
    """
    options = {"trust_remote_code": trust_remote_code, **dict(model_kwargs or {})}
    try:
        _, loader = _configured(name, options)
        return loader.from_pretrained(name, **options).eval()
    except (OSError, ValueError) as error:
        raise _unreadable("load the model", name, error, "config.json and weights") from error


def model_structure(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """The module that ``load_model`` would fill, from its configuration alone: on the meta device where that works.

    Raises:
        ValueError: no such configuration.
    """
    try:
        config, kind = _configured(name, {"trust_remote_code": trust_remote_code})
    except (OSError, ValueError) as error:
        raise _unreadable("read the configuration of", name, error, "config.json") from error

    def build() -> nn.Module:
        if hasattr(kind, "from_config"):
            return kind.from_config(config, trust_remote_code=trust_remote_code)
        return kind(config)

    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):  # a constructor that computes with its weights
        return build()


def _configured(name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """A configuration, and the class that it names (``AutoModel`` where transformers has none of that name)."""
    import transformers

    trusted = options["trust_remote_code"]
    config = options.get("config") or name
    if isinstance(config, str | Path):
        where = {key: options[key] for key in _WHERE if key in options}
        if base := _adapted(name, where):
            return _configured(base, {"trust_remote_code": trusted})
        config = transformers.AutoConfig.from_pretrained(config, trust_remote_code=trusted, **where)
    named = [getattr(transformers, one, None) for one in config.architectures or []]
    native = next((one for one in named if one is not None), None)
    has_own_code = bool(getattr(config, "auto_map", None)) and trusted
    return config, transformers.AutoModel if native is None or has_own_code else native


def _adapted(name: str, where: Mapping[str, Any]) -> str | None:
    """The base model that an adapter's folder names; None for a model of its own."""
    from transformers.utils import cached_file

    lenient = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if cached_file(name, "config.json", **where, **lenient) is not None:
        return None
    found = cached_file(name, "adapter_config.json", **where, **lenient)
    return None if found is None else json.loads(Path(found).read_text())["base_model_name_or_path"]


def _unreadable(doing: str, name: str, error: Exception, files: str) -> ValueError:
    return ValueError(
        f"could not {doing} {name!r}: {first_reason(name, error)} Give a Hugging Face id that is in the cache or reachable, or "
        f"a local directory with {files}."
    )


def first_reason(name: str, error: Exception) -> str:
    """Why a name could not be loaded, in a line; where it is no folder, that first."""
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return said if Path(name).is_dir() else f"there is no folder {name}, and as an id: {said}"


def model_identity(model: nn.Module, name: str | None = None) -> tuple[str, str]:
    """(key, label) of a model: a label for people, a key safe for file names."""
    config = getattr(model, "config", None)
    label = (
        name
        or getattr(model, "name_or_path", None)
        or getattr(config, "_name_or_path", None)
        or type(model).__name__
    )
    return re.sub(r"[^a-z0-9._-]+", "_", str(label).lower()).strip("_.") or "model", str(label)


def config_summary(model: nn.Module) -> dict[str, Any]:
    """The configuration fields that say what kind of model this is."""
    config = getattr(model, "config", None)
    values = {field: getattr(config, field, None) for field in CONFIG_FIELDS}
    return {field: value for field, value in values.items() if value is not None}


def software_versions() -> dict[str, str]:
    """Versions of everything that the numbers pass through."""
    found = {"python": platform.python_version()}
    for package in (
        "tdgeom",
        "torch",
        "tensordict",
        "numpy",
        "scipy",
        "scikit-learn",
        "pandas",
        "transformers",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["blas"] = "mkl" if torch.backends.mkl.is_available() else "other"
    return found
