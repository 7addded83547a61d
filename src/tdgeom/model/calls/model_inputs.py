"""What a model's forward is called with, from the entries of a TensorDict."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

# Row identities that pipelines carry beside a batch; a model never gets them.
CARRIED = ("sequence_id", "document_id", "row_id", "sample_row_id")
_TARGETS = ("label", "label_ids", "start_positions", "end_positions")


@dataclass(frozen=True)
class Signature:
    """The parameters of a model's forward that can be given by name, and those that must be."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    positional_only: tuple[str, ...]


def read_signature(model: nn.Module) -> Signature:
    """The signature of ``model.forward``, through wrappers that take ``*args, **kwargs`` around another model.

    >>> read_signature(nn.Sequential(nn.Linear(2, 2))).required
    ('input',)
    """
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named and hasattr(model, "get_base_model"):
        return read_signature(model.get_base_model())
    return Signature(
        tuple(p.name for p in named),
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.kind is p.POSITIONAL_ONLY),
    )


def input_keys(
    model: nn.Module, signature: Signature, in_keys: Sequence[NestedKey] | Mapping[str, NestedKey] | None
) -> dict[str, NestedKey]:
    """Forward name -> TensorDict key of the inputs a Capture demands.

    By default the model's ``main_input_name``, or every parameter of forward without a default, or the first one.
    A list gives keys: those that forward names go there, the others fill the demanded parameters in order.
    A mapping gives forward name -> key.
    """
    main = getattr(model, "main_input_name", None)
    if isinstance(main, str) and (main in signature.names or not signature.names):
        default = (main,)
    else:
        default = signature.required or signature.names[:1]
    if in_keys is None:
        if not default:
            raise ValueError(
                f"expected a forward that names its inputs, {type(model).__name__}.forward names none. "
                "Remedy: Capture(..., in_keys={'<forward name>': '<key>'})."
            )
        return {name: name for name in default}
    if isinstance(in_keys, Mapping):
        return dict(in_keys)
    keys = [in_keys] if isinstance(in_keys, str | tuple) else list(in_keys)
    result = {key: key for key in keys if isinstance(key, str) and key in signature.names}
    free = iter([n for n in (*default, *signature.names) if n not in result])
    for key in keys:
        if key not in result:
            name = next(free, None)
            if name is None:
                raise ValueError(
                    f"in_keys={keys} has more keys than forward has parameters {signature.names}."
                )
            result[name] = key
    return result


def numbers_from_padding(model: nn.Module) -> bool:
    """Whether a model counts positions itself, from a padding index or in several dimensions."""
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and "position" in name.rpartition(".")[2]
            and module.padding_idx is not None
        ):
            return True
    config = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return isinstance(rope, Mapping) and "mrope_section" in rope


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted over attended tokens, (B, T) -> (B, T) int64; padding before the first token gets 0.

    >>> import torch
    >>> position_ids(torch.tensor([[0, 0, 1, 1]]))
    tensor([[0, 0, 0, 1]])
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def model_inputs(
    model: nn.Module,
    signature: Signature,
    tensordict: TensorDictBase,
    keys: Mapping[str, NestedKey],
    *,
    withhold: Iterable[str] = (),
    number_positions: bool = True,
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of one call of the model.

    Every tensor of the TensorDict that forward names is passed, except labels, row identities and ``withhold``.
    """
    given: dict[str, Any] = {}
    for name, key in keys.items():
        value = tensordict.get(key, None)
        if value is None:
            raise KeyError(
                f"Capture expected the model's input {name!r} under the key {key!r}; the TensorDict has "
                f"{sorted(map(str, tensordict.keys()))}. Remedy: add it, or Capture(..., in_keys={{{name!r}: <key>}})."
            )
        given[name] = value
    kept_back = {*CARRIED, *withhold}
    for name in signature.names:
        if name not in given and name not in kept_back and not is_target(name) and name in tensordict.keys():
            value = tensordict.get(name)
            if isinstance(value, Tensor):
                given[name] = value
    if number_positions and "position_ids" in signature.names and "position_ids" not in given:
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            given["position_ids"] = position_ids(mask)
    _refuse_too_long(model, given)
    if "use_cache" in signature.names:
        given.setdefault("use_cache", False)
    if needs_decoder_ids(signature, given) and "labels" in tensordict.keys():
        make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if make is not None:
            given["decoder_input_ids"] = make(tensordict.get("labels"))
    return [given.pop(name) for name in signature.positional_only if name in given], given


def _refuse_too_long(model: nn.Module, given: Mapping[str, Any]) -> None:
    """More tokens than a table of learned positions has rows would be an index error deep inside the model."""
    config, ids = getattr(model, "config", None), given.get("input_ids")
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not limits or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] <= max(limits):
        return  # so that nothing is looked for or waited for in the usual case
    numbered = given.get("position_ids")
    needed = ids.shape[1] if numbered is None else int(numbered.max()) + 1
    learned = (
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and ("position" in (own := name.rpartition(".")[2]) or own == "wpe")
    )
    if any(rows < needed for rows in learned):
        most = max(limits)
        raise ValueError(
            f"the batch has sequences of {needed} tokens, {type(model).__name__} takes {most}. Cut them: max_length={most} where "
            f"texts are tokenized (and truncation=True for a tokenizer of your own)."
        )


def ids_beyond_vocabulary(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """What to say where token ids have no row in the model's embedding; None where they all have one."""
    try:
        rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or not ids.numel():
        return None
    least, most = int(ids.min()), int(ids.max())
    if least >= 0 and most < rows:
        return None
    return (
        f"{type(model).__name__} has embeddings for token ids 0 to {rows - 1}, the batch holds {least} to {most}. Remedy: "
        f"the tokenizer that belongs to the model (padding is often -100 or -1 in labels, never in input_ids)."
    )


def needs_decoder_ids(signature: Signature, given: Mapping[str, Any]) -> bool:
    """Whether forward names decoder inputs and none are given."""
    return "decoder_input_ids" in signature.names and not {
        "decoder_input_ids",
        "decoder_inputs_embeds",
    } & set(given)


def made_up_inputs(
    model: nn.Module, signature: Signature, batch: int, length: int
) -> dict[str, Tensor | bool] | None:
    """Inputs of the right form for a model of token ids or pixels; ``None`` for any other model."""
    first = next(model.parameters(), None)
    device = None if first is None else first.device
    given: dict[str, Tensor | bool] = {}
    if "input_ids" in signature.names:
        ids = torch.arange(batch * length, device=device).reshape(batch, length)
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        given["input_ids"] = ids % size if isinstance(size, int) and size > 0 else torch.zeros_like(ids)
        if "attention_mask" in signature.names:
            given["attention_mask"] = torch.ones_like(ids)
        if "decoder_input_ids" in signature.names:
            given["decoder_input_ids"] = given["input_ids"]
    elif "pixel_values" in signature.names and isinstance(
        getattr(model.config, "image_size", None), int | list | tuple
    ):
        size = model.config.image_size
        size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        given["pixel_values"] = torch.linspace(-1, 1, size[0] * size[1], device=device).reshape(1, 1, *size)
        given["pixel_values"] = given["pixel_values"].expand(batch, model.config.num_channels, *size)
    else:
        return None
    if "use_cache" in signature.names:
        given["use_cache"] = False
    return given


def is_target(name: str) -> bool:
    """Whether an argument of forward is what a loss is computed from."""
    return name in _TARGETS or name.endswith("labels")


def bound_tensors(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one call under their forward names."""
    named = {**dict(zip(signature.names, args, strict=False)), **kwargs}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}
