"""What a run is: its stages, their settings and the weights they compute with, as JSON values that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from tensordict import TensorDictBase, is_leaf_nontensor
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdgeom.core.keys import key_tuple
from tdgeom.core.renamed import describe
from tdgeom.core.stage_settings import Configured
from tdgeom.core.streaming_stage import text_tensor
from tdgeom.core.words import words_of
from tdgeom.files.json_text import canonical_json, plain
from tdgeom.files.shard_writing import bytes_of
from tdgeom.model.loading import config_summary
from tdgeom.model.structure.distributed_tensors import whole
from tdgeom.numerics.on_host import leading, read_together
from tdgeom.run.plan import Plan

__all__ = ["batch_digest", "pipeline_identity", "tensors_sha256", "weights_identity"]

_SAMPLED = 1024  # values of each tensor of a model that are compared
_LONGEST_LIST = 4096  # characters of JSON


def weights_identity(module: nn.Module) -> dict[str, Any]:
    """{"tensors": how many, "values": how many, "sha256": of their names, shapes, dtypes and sampled values}.

    Of each tensor in the ``state_dict`` 1,024 values are compared, evenly spaced from the first to the last: a model trained
    further, another seed or another precision differ; one value changed by hand in a large matrix need not. Tensors
    whose values cannot be had (on the meta device, offloaded) count by name, shape and dtype.

        >>> import torch
        >>> a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> weights_identity(a) == weights_identity(a), weights_identity(a) == weights_identity(b)
        (True, False)
    """
    held = {name: value for name, value in sorted(module.state_dict().items()) if isinstance(value, Tensor)}
    values = sum(value.numel() for value in held.values())
    return {"tensors": len(held), "values": values, "sha256": _sha256(held, _sampled)}


def _sha256(tensors: Mapping[Any, Tensor], read: Callable[[Tensor], bytes | memoryview]) -> str:
    """SHA-256 of tensors' names, shapes, dtypes and what is read of each."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        digest.update(read(value))
    return digest.hexdigest()


def _sampled(value: Tensor) -> bytes | memoryview:
    """The bytes of values evenly spaced in a tensor, without a copy of the whole."""
    try:
        value = whole(value)  # of parts on several ranks, all of them: each parameter is gathered by itself
        bits = (
            value.detach().view(torch.uint8) if value.element_size() == 1 else value.detach()
        )  # float8 has no indexing
        if bits.numel() > _SAMPLED:
            places = torch.arange(_SAMPLED, device=bits.device) * (bits.numel() - 1) // (_SAMPLED - 1)
            bits = bits[torch.unravel_index(places, bits.shape)]
        return bytes_of(bits)
    except (RuntimeError, TypeError):  # no values (meta), or a packed format that cannot be indexed
        return b""


def batch_digest(td: TensorDictBase) -> str:
    """SHA-256 of a batch's tensors by 1,024 values of each, which tells batches apart at next to no cost."""
    held = {key: value for key, value in td.items(True, True) if isinstance(value, Tensor)}
    return _sha256(held, _sampled)


def tensors_sha256(td: TensorDictBase) -> str:
    """SHA-256 of a batch's tensors (their names, shapes and first MiB), to see that a loader starts as it did before."""
    named = {key_tuple(key): td.get(key) for key in td.keys(True, True, is_leaf=is_leaf_nontensor)}
    held: dict[Any, Tensor] = {}
    for key, value in sorted(named.items()):
        if isinstance(value, Tensor):
            held[key] = value
            continue
        with suppress(TypeError):  # objects that are no words say nothing of themselves
            words = words_of(value, key, "run")
            held[key] = text_tensor("\n".join(words.texts() if words is not None else ()))
    read_together(held.values())
    return _sha256(held, lambda value: bytes_of(leading(value)))


def pipeline_identity(plan: Plan, *, end: bool = False) -> list[dict[str, Any]]:
    """Every stage up to the streaming ones (with ``end``, all): its name, its keys, and what else changes its numbers.

    That is the settings of the stage, its own weights, and, where it runs a model, the model's class, configuration and
    weights. Functions count by their name, objects of other kinds not at all.
    """
    models: dict[int, dict[str, Any]] = {}
    return [
        {
            "stage": describe(unit),
            "in_keys": ["/".join(key_tuple(key)) for key in unit.in_keys],
            "out_keys": ["/".join(key_tuple(key)) for key in unit.out_keys],
            "settings": _settings(unit),
            **(_computes_with(unit, models) if number < len(plan.batch) else {}),
        }
        for number, unit in enumerate((*plan.batch, *plan.stream, *(plan.end if end else ())))
    ]


def _settings(unit: TensorDictModuleBase) -> dict[str, Any]:
    """What every part was made with, by its place and name."""
    made = {where: part.settings() for where, part in unit.named_modules() if isinstance(part, Configured)}
    return {
        f"{where}.{name}".lstrip("."): _shortened(plain(value))
        for where, settings in made.items()
        for name, value in settings.items()
        if name not in ("in_keys", "out_keys")
    }


def _shortened(values: Any) -> Any:
    """Long settings by their hash: a record that holds every direction of a stage would outgrow what is read back."""
    text = canonical_json(values)
    if len(text) <= _LONGEST_LIST:
        return values
    return f"{len(text):,} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"


def _config_sha256(model: nn.Module) -> str:
    """Of all fields of a configuration but those that say where it lies and which version wrote it."""
    fields: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    told = {
        name: str(value)
        for name, value in fields.items()
        if name not in ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")
    }
    return hashlib.sha256(canonical_json(told).encode()).hexdigest() if told else ""


def _hooked(model: nn.Module) -> list[str]:
    """Modules with hooks: an edit that stands around a run is one."""
    return [
        name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]


def _computes_with(unit: TensorDictModuleBase, models: dict[int, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own = weights_identity(unit)
    if own.get("tensors"):
        found["weights"] = own
    model = getattr(unit, "model", None)
    if isinstance(model, nn.Module):
        if id(model) not in models:
            about = {
                "class": type(model).__name__,
                "config": plain(config_summary(model)),
                "config_sha256": _config_sha256(model),
                "hooked": _hooked(model),
            }
            models[id(model)] = {**about, "weights": weights_identity(model)}
        found["model"] = models[id(model)]
    return found
