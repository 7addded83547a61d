"""What a model's forward is called with, from the entries of a TensorDict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdgeom.core.keys import Key, optional_in_keys
from tdgeom.model.calls.forward_signature import (
    Signature,
    read_forward,
    read_signature,
    reads_tokens,
    unwrapped,
)
from tdgeom.model.calls.input_device import where_inputs_go

# Row identities that pipelines carry beside a batch; a model never gets them.
CARRIED = ("sequence_id", "document_id", "row_id", "sample_row_id")
_TARGETS = ("label", "label_ids", "start_positions", "end_positions")

InKeys = Sequence[Key] | Mapping[str, Key]


class ModelInputs:
    """What a model is called with, and under which keys it lies in a TensorDict.

    ``demanded`` is forward name -> key, ``optional`` are names that are keys. Demanded is by default the model's
    ``main_input_name``, or every parameter of forward without a default, or the first one; optional is every other one that may
    hold a tensor, except labels, row identities and ``withhold``. Of ``in_keys``, a list gives demanded keys: those that forward
    names go there, the others fill the demanded parameters in order. A mapping gives forward name -> key.

    A model that is itself a TensorDict module gets a copy of the TensorDict; a model that takes one mapping of features gets
    one, with what the first model inside that names token ids takes.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: object,
        in_keys: InKeys | None = None,
        withhold: Iterable[str] = (),
    ) -> None:
        self.owner, self.withhold = type(owner).__name__, tuple(withhold)
        bare = unwrapped(model)
        self.is_policy = isinstance(bare, TensorDictModuleBase)
        features = None if self.is_policy else read_forward(bare).features
        inner = None if features is None else reads_tokens(bare)
        self.features = None if inner is None else features
        self.called = bare if inner is None else inner
        self.signature = read_signature(self.called)
        self.demanded = self._demanded(in_keys)
        # under their own names
        self.optional = _optional_inputs(self.signature, tuple(self.demanded.items()), self.withhold)
        # a decoder's ids are made from the labels where they are missing
        self.from_labels = "decoder_input_ids" in self.optional and hasattr(
            self.called, "prepare_decoder_input_ids_from_labels"
        )

    @property
    def optional_keys(self) -> list[Key]:
        """Every key that is read where it is present."""
        return [*self.optional, *(["labels"] if self.from_labels else [])]

    @property
    def position_names(self) -> list[str]:
        """The position arguments that the model may be given."""
        names = ("position_ids", "decoder_position_ids")
        return [n for n in names if n in self.signature.names and n not in self.withhold]

    @property
    def recorded(self) -> list[Key] | None:
        """Which of a call's tensors are inputs; all of them where a model does not write to what it is called with."""
        return list(self.called.in_keys) if isinstance(self.called, TensorDictModuleBase) else None

    def tokens(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Callable[[str], tuple[int, int] | None]:
        """How many sequences and tokens a call has, by the prefix of the names of their ids."""
        named = dict(zip(self.signature.positional_only, args, strict=False)) | dict(kwargs)
        if args and isinstance(args[0], Mapping | TensorDictBase):
            named = dict(args[0].items())

        def count(side: str) -> tuple[int, int] | None:
            given = [named.get(side + name) for name in ("input_ids", "inputs_embeds")]
            return next(
                ((v.shape[0], v.shape[1]) for v in given if isinstance(v, Tensor) and v.ndim > 1), None
            )

        return count

    def _demanded(self, in_keys: InKeys | None) -> Mapping[str, Key]:
        model = self.called
        if isinstance(in_keys, Mapping):
            return dict(in_keys)
        if isinstance(model, TensorDictModuleBase):
            own = [key for key in model.in_keys if key not in optional_in_keys(model)]
            listed = (
                own if in_keys is None else [in_keys] if isinstance(in_keys, str | tuple) else list(in_keys)
            )
            if len(listed) != len(own):
                raise ValueError(f"in_keys={listed} expected a key for each of {own}.")
            return dict(zip(own, listed))
        main = getattr(model, "main_input_name", None)
        default = _default_inputs(self.signature, main if isinstance(main, str) else None)
        if in_keys is None:
            if not default:
                raise ValueError(
                    f"expected a forward that names its inputs, {type(model).__name__}.forward names none. "
                    f"Remedy: {self.owner}(..., in_keys={{'<forward name>': '<key>'}})."
                )
            return default
        keys: list[Key] = [in_keys] if isinstance(in_keys, str | tuple) else list(in_keys)
        names = self.signature.names
        result: dict[str, Key] = {key: key for key in keys if isinstance(key, str) and key in names}
        free = iter([n for n in (*default, *names) if n not in result])
        for key in keys:
            if key not in result.values():
                name = next(free, None)
                if name is None:
                    raise ValueError(f"in_keys={keys} has more keys than forward has parameters {names}.")
                result[name] = key
        return result

    def given(self, tensordict: TensorDictBase) -> dict[str, Any]:
        """What the model is given of a batch: forward name -> value."""
        given: dict[str, Any] = {}
        present = set(tensordict.keys())
        for name, key in self.demanded.items():
            value = tensordict.get(key, None)
            if value is None:
                raise KeyError(
                    f"{self.owner} expected the model's input {name!r} under the key {key!r}; the TensorDict has "
                    f"{sorted(map(str, tensordict.keys()))}. Remedy: add it, or {self.owner}(..., in_keys={{{name!r}: <key>}})."
                )
            given[name] = value
        for name in self.optional:
            if name in present and isinstance(value := tensordict.get(name), Tensor):
                given[name] = value
        _refuse_too_long(self.called, given)
        if "use_cache" in self.signature.names:
            given.setdefault("use_cache", False)
        if self.from_labels and needs_decoder_ids(self.signature, given):
            labels = tensordict.get("labels", None)
            if labels is not None:
                make: Any = self.called.prepare_decoder_input_ids_from_labels
                given["decoder_input_ids"] = make(labels)
        return given

    def arguments(
        self, given: Mapping[str, Any], tensordict: TensorDictBase
    ) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of one call of the model with what it is ``given`` of a batch."""
        if self.is_policy:
            whole = tensordict.copy()
            withheld = (*CARRIED, *self.withhold)
            whole = whole.exclude(*(key for key in withheld if key in whole.keys() and key not in given))
            if any(given[name] is not whole.get(name, None) for name in given):
                entries = TensorDict({}, batch_size=whole.batch_size)
                for name, value in (*whole.items(), *given.items()):
                    entries.set(name, value)
                whole = entries
            return [whole], {}
        if self.features is not None:
            return [dict(given)], {}
        kwargs = dict(given)
        return [kwargs.pop(name) for name in self.signature.positional_only if name in kwargs], kwargs


@lru_cache
def _default_inputs(signature: Signature, main: str | None) -> Mapping[str, Key]:
    """Name -> key of what a model has to be called with, where nobody says: its main input, or what has no default."""
    known = main is not None and (main in signature.names or not signature.names)
    names = (main,) if main is not None and known else signature.required or signature.names[:1]
    return {name: name for name in names}


@lru_cache
def _optional_inputs(
    signature: Signature, demanded: tuple[tuple[str, Key], ...], withhold: tuple[str, ...]
) -> tuple[str, ...]:
    """The names, and keys, of what else may be given."""
    apart = {*CARRIED, *withhold, *(part for pair in demanded for part in pair)}
    return tuple(name for name in signature.tensors if name not in apart and not is_target(name))


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted over attended tokens, (B, T) -> (B, T) int64; padding before the first token gets 0.

    >>> import torch
    >>> position_ids(torch.tensor([[0, 0, 1, 1]]))
    tensor([[0, 0, 0, 1]])
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def _refuse_too_long(model: nn.Module, given: Mapping[str, Any]) -> None:
    """More tokens than a table of learned positions has rows would be an index error deep inside the model."""
    config, ids = getattr(model, "config", None), given.get("input_ids")
    if config is None:
        return
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return
    known: list[int] = []
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            if ids.shape[1] <= limit:
                return  # so that nothing is looked for or waited for in the usual case
            known.append(limit)
    if not known:
        return
    numbered, mask = given.get("position_ids"), given.get("attention_mask")
    needed = ids.shape[1] if numbered is None else int(numbered.max()) + 1
    if numbered is None and isinstance(mask, Tensor) and mask.ndim == 2:
        needed = int(mask.bool().sum(-1).max())  # padding needs no position of its own
    learned = (
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and ("position" in (own := name.rpartition(".")[2]) or own == "wpe")
    )
    if any(rows < needed for rows in learned):
        raise ValueError(
            f"the batch has sequences of {needed} tokens, {type(model).__name__} takes {max(known)}. Cut them: "
            f"max_length={max(known)} where texts are tokenized (and truncation=True for a tokenizer of your own)."
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
    """Inputs of the right form for a model of token ids, pixels or sound; ``None`` for any other model."""
    first = next(model.parameters(), torch.zeros(()))
    device, config = where_inputs_go(model), getattr(model, "config", None)
    given: dict[str, Tensor | bool] = {}
    if "input_ids" in signature.names:
        ids = torch.arange(batch * length, device=device).reshape(batch, length)
        size = getattr(config, "vocab_size", None)
        ids = ids % size if isinstance(size, int) and size > 0 else torch.zeros_like(ids)
        given["input_ids"] = ids
        if "attention_mask" in signature.names:
            given["attention_mask"] = torch.ones_like(ids)
        if "decoder_input_ids" in signature.names:
            given["decoder_input_ids"] = ids
    elif "pixel_values" in signature.names and isinstance(
        size := getattr(config, "image_size", None), int | list | tuple
    ):
        height, width = (size, size) if isinstance(size, int) else size
        plane = torch.linspace(-1, 1, height * width, device=device, dtype=first.dtype)
        channels = int(getattr(config, "num_channels", 3))
        given["pixel_values"] = plane.reshape(1, 1, height, width).expand(batch, channels, height, width)
    elif (sound := _made_up_sound(signature, config, batch, length)) is not None:
        name, shape = sound
        count = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
        given[name] = torch.sin(0.7 * count + 0.001 * count.square()).reshape(shape).to(first.dtype)
    else:
        return None
    if "use_cache" in signature.names:
        given["use_cache"] = False
    return given


def _made_up_sound(
    signature: Signature, config: Any, batch: int, length: int
) -> tuple[str, tuple[int, ...]] | None:
    """The argument and shape of some sound: frames of features, or a wave that convolutions make into frames."""
    width, strides = (getattr(config, name, None) for name in ("feature_projection_input_dim", "conv_stride"))
    if "input_features" in signature.names and isinstance(width, int):
        return "input_features", (batch, 2 * length, width)
    if "input_values" in signature.names and isinstance(strides, list | tuple):
        return "input_values", (batch, (2 * length + 2) * torch.Size(strides).numel())
    return None


def is_target(name: str) -> bool:
    """Whether an argument of forward is what a loss is computed from."""
    return name in _TARGETS or name.endswith("labels")
