"""From a loader's batch to rows: the per-batch stages, and what the streaming stages read of them, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, skip_existing
from torch import Tensor, nn

from tdgeom.core.keys import Key, KeyTable, key_tuple, optional_in_keys
from tdgeom.core.missing_parts import missing_part
from tdgeom.core.renamed import describe
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.split_loaders import SplitLoader
from tdgeom.core.warnings import FewRowsWarning, tell
from tdgeom.core.words import words_of
from tdgeom.model.calls.model_inputs import CARRIED
from tdgeom.numerics.on_host import on_host, remember
from tdgeom.rows.batches import as_batch, batch_length
from tdgeom.rows.same_documents import SAME_DOCUMENT, SameDocuments, sequence_contents, whole_numbers
from tdgeom.run.finish import call, give
from tdgeom.run.plan import Plan

__all__ = ["BatchStages"]

_SAMPLED = ("sample_carried", "document_id")


class BatchStages:
    """The per-batch part of a plan.

    Args:
        plan: the run's stages.
        inputs: results of an earlier run that per-batch stages may read.
        in_keys: names for the entries of tuple batches; default the first inputs that no stage writes.
        device: where batches go; default the first place that a per-batch stage wants (a Capture: its model's).

    Attributes: ``device``; ``keys``, what the streaming stages read and ``row_id``, by the row selection that they are of;
    ``main``, the ids of the selection that counts; ``selects``, the stages that select rows.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: TensorDictBase | None = None,
        in_keys: Sequence[Key] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.plan, self.inputs = plan, inputs
        self.selects = selections(plan)
        for select in self.selects:
            select.models_pad_id, select.models_image = _pad_id(plan), _image(plan)
            select.models_channels = _channels(plan)
        places = [place for unit in plan.batch if (place := _device_of(unit)) is not None]
        self.device = torch.device(device) if device is not None else places[0] if places else None
        self.keys = keys_by_selection(plan)
        self.main = next(iter(self.keys))
        self.optional = plan.optional_stream_keys
        self.sequences = self.batches = 0  # numbered so far
        self.part: tuple[int, int] = (0, 1)  # which part of the data these batches are, of how many
        self.places: SplitLoader | None = None  # the sampler that says where in the whole they stand
        self._in_keys, self._named = in_keys if in_keys is not None else _unwritten(plan), in_keys is not None
        self._begun = False
        grouped = any(key_tuple(key)[-1] == "document_id" for key in plan.stream_keys)
        read = any(SAME_DOCUMENT in unit.in_keys for unit in plan.batch)
        written = {key_tuple(key) for unit in (*plan.stream, *plan.end) for key in unit.out_keys}
        sampled = [unit for unit in plan.end if _SAMPLED in map(key_tuple, optional_in_keys(unit))]
        # rows that come selected say themselves whose they are
        self._forgetful = next(iter(sampled), None) if self.selects and _SAMPLED not in written else None
        self.same = SameDocuments() if read and (grouped or self._forgetful is not None) else None

    def td(self, batch: Any) -> TensorDict:
        """Whatever the loader yields, as a TensorDict on the right device."""
        return as_batch(batch, self._in_keys, self.device, named=self._named)

    def where_it_lies(self, batch: Any) -> TensorDict:
        """Whatever the loader yields, as a TensorDict: a batch that is another's is numbered and moved nowhere."""
        return as_batch(batch, self._in_keys, None, named=self._named)

    def number(self, td: TensorDict) -> Tensor:
        """Give a batch that brings no ``sequence_id`` the next ones in stream order; where in the order its sequences stand.

        Parts of split data are numbered past one another: by their place in the whole where a sampler says it, else each
        sequence by its index and then the rank.
        """
        numbers = self._number(td)
        if self.same is not None and td.get(SAME_DOCUMENT, None) is None:
            found = self._documents(td, td.get("sequence_id"))
            td.set(SAME_DOCUMENT, found)
            remember(td.get(SAME_DOCUMENT), found)
        return numbers

    def _documents(self, td: TensorDict, sequence: Tensor) -> Tensor:
        """Which document each of a batch's sequences is of."""
        assert self.same is not None  # some stage groups rows by documents
        given = td.get("document_id", None)
        if not isinstance(given, Tensor) or given.shape != sequence.shape:
            given = sequence
        mask_key = self.selects[0].mask_key if self.selects else "attention_mask"
        contents = sequence_contents(td, len(sequence), self._content_keys(), mask_key)
        found = self.same.of(on_host(whole_numbers(given)).tolist(), contents)
        if self.same.copies:
            self._say_which_documents("some came before, word for word")
        return found

    def _content_keys(self) -> list[Key]:
        """What a batch's sequences are made of: what models are called with, else what the stages of a batch read."""
        units = [
            unit for unit in self.plan.batch if getattr(unit, "model", None) is not None
        ] or self.plan.batch
        free = {key for unit in units for key in optional_in_keys(unit) if key_tuple(key)[-1] in CARRIED}
        return list(dict.fromkeys(key for unit in units for key in unit.in_keys if key not in free))

    def _number(self, td: TensorDict) -> Tensor:
        length = batch_length(td)
        if self.places is not None:
            if not self.places.fits(self.sequences, self.batches, length):
                raise ValueError(
                    f"run: {self.places.by} deals out the data in batches of {self.places.batch_size}, and the first batches "
                    f"were such, but batch {self.batches} holds {length} sequences: which of the whole they are cannot be told. "
                    f"Put a 'sequence_id' (B,) that is unique over all ranks into the batches."
                )
            numbers = self.places.places(self.sequences, self.batches, length)
        else:
            part, parts = self.part
            numbers = (self.sequences + torch.arange(length, device="cpu")) * parts + part
        self.batches += 1
        if td.get("sequence_id", None) is None or self.places is not None:
            self.sequences += length
        if td.get("sequence_id", None) is None:
            td.set("sequence_id", numbers)
            remember(td.get("sequence_id"), numbers)  # a batch that has a device moves what it is given there
        return numbers

    def ids(self, td: TensorDict) -> tuple[Tensor | None, bool]:
        """(what a batch itself calls its sequences, or its rows where it brings these; whether it is rows); None: nothing."""
        given, by_row = td.get("sequence_id", None), False
        written = (key for unit in self.plan.batch for key in unit.out_keys)
        if given is None and not any(key_tuple(key) == key_tuple(self.main) for key in written):
            given = td.get(self.main, None)
            by_row = given is not None
        return (on_host(given).flatten().long() if isinstance(given, Tensor) else None), by_row

    def rows(self, td: TensorDict) -> tuple[dict[Key, dict[Key, Any]], int]:
        """Run the per-batch stages on ``td``; (the rows that the streaming stages read, by selection; how many of the main)."""
        if not self._begun:
            self._refuse_results(td)
            if td.get("document_id", None) is not None:
                self._say_which_documents("the batches bring 'document_id'")
            self._begun = True
        for unit in self.plan.batch:
            give(unit, self.inputs, td)
            call(unit, td)
        self._number_rows(td)
        rows = {}
        for ids, keys in self.keys.items():
            count = None if (row_id := td.get(ids, None)) is None else row_id.shape[0]
            rows[ids] = {key: value for key in keys if (value := self._read(td, key, ids, count)) is not None}
        return rows, rows[self.main][self.main].shape[0]

    def tokens_and_padding(self, td: TensorDict) -> tuple[int, int]:
        """(attended positions, positions of padding) of a batch that ``rows`` has seen.

        A call with a cache (a step of ``generate``) sees its last positions only, its mask all of them.
        """
        for select in self.selects:
            if (counted := select.count_positions(td)) is not None:
                return counted
        mask, ids = td.get("attention_mask", None), td.get("input_ids", None)
        if mask is not None:
            attended = int(on_host(mask).bool().sum())
            return attended, mask.numel() - attended
        return (ids.numel() if ids is not None else td.get(self.main).shape[0]), 0

    def without(self, td: TensorDict, units: np.ndarray, rows: np.ndarray) -> TensorDict:
        """What ``tokens_and_padding`` reads of a batch, of some of its sequences and rows alone."""
        read = [key for select in self.selects for key in (select.mask_key, select.in_keys[0])]
        left = TensorDict({}, batch_size=[])
        for key in dict.fromkeys([*read, "attention_mask", "input_ids", self.main]):
            value = td.get(key, None)
            chosen = rows if key == self.main else units
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == len(chosen):
                left.set(key, value[torch.from_numpy(chosen).to(value.device)])
        return left

    def _say_which_documents(self, told: str) -> None:
        """Stages at the end would take sequences for documents where the sample does not keep which are whose."""
        if self._forgetful is not None:
            tell(
                f"{describe(self._forgetful)} takes every sequence for a document: {told}, and the sample does not keep it. "
                f"Remedy: RowSample(..., also=['document_id']).",
                FewRowsWarning,
            )
            self._forgetful = None  # once

    def _refuse_results(self, td: TensorDict) -> None:
        """A call of the pipeline would take these from the batch, where a run's end stages see results alone."""
        later = (*self.plan.stream, *self.plan.end)
        skipped = [u for u in later if all(td.get(key, None) is not None for key in u.out_keys)]
        if skip_existing() and skipped:
            raise ValueError(
                f"{describe(skipped[0])} would be skipped (set_skip_existing), since the batches hold all that it writes: "
                f"{list(skipped[0].out_keys)[:4]}. Leave that out of the batches, or the stage out of the pipeline."
            )
        made = KeyTable(key for unit in (*self.plan.batch, *later) for key in unit.out_keys)
        for unit in self.plan.end:
            for key in optional_in_keys(unit):
                if td.get(key, None) is not None and not made.touching(key):
                    raise ValueError(
                        f"{describe(unit)} runs once at the end and would read {key!r}, which batches hold and no stage writes. "
                        f"Leave it out of the batches, or name another key with in_keys=."
                    )

    def _number_rows(self, td: TensorDict) -> None:
        """Ids for rows that no selection numbered: one a sequence, or counted on from the first sequence."""
        values = [td.get(key, None) for key in self.keys[self.main]]
        first = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
        if td.get(self.main, None) is None and first is not None:
            sequence = td.get("sequence_id").to(first.device).long()
            if sequence.shape == first.shape[:1]:
                td.set(self.main, sequence << POSITION_BITS)
            else:
                ids = (sequence[:1] << POSITION_BITS) + torch.arange(first.shape[0], device=first.device)
                td.set(self.main, ids)

    def _read(self, td: TensorDict, key: Key, ids: Key, count: int | None) -> Any:
        value = td.get(key, None)
        if value is None and key in self.optional:
            return None
        if value is None:
            have = sorted(td.keys(True, True), key=str)
            usual = missing_part("", [key], have)
            raise KeyError(
                f"the streaming stages read {key!r}, which neither the batch nor a stage before them holds; there is "
                f"{have[:12]}. Name the right key with in_keys=, or add the stage that "
                f"writes it (SelectTokens writes ('tokens', site), also= carries further values).{' ' + usual if usual else ''}"
            )
        if not isinstance(value, Tensor):
            value = words_of(value, key, "a streaming stage")
        if value is None or value.ndim == 0 or value.shape[0] != count:
            raise ValueError(
                f"a streaming stage reads rows, tensors whose first dimension is that of {ids!r} ({count}), "
                f"but {key!r} has shape {tuple(getattr(value, 'shape', ()))}. Carry it to rows with "
                f"SelectTokens(also=[...])."
            )
        return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def models_of(plan: Plan) -> list[nn.Module]:
    """The models that per-batch stages run."""
    found = (getattr(getattr(unit, "_orig_mod", unit), "model", None) for unit in plan.batch)
    return [model for model in found if isinstance(model, nn.Module)]


def _device_of(unit: TensorDictModuleBase) -> torch.device | None:
    """Where a per-batch stage wants its batches: with its parameters, or (a Capture) with its model."""
    unit = getattr(unit, "_orig_mod", unit)
    first = next(unit.parameters(), None)
    if first is not None or isinstance(unit, TensorDictModule):  # whose .device is "cpu" for any function
        return None if first is None else first.device
    return getattr(unit, "device", None)


def _pad_id(plan: Plan) -> int | None:
    """The padding id that a captured model's configuration names."""
    told = (getattr(unit, "pad_token_id", None) for unit in plan.batch)
    return next((pad for pad in told if isinstance(pad, int)), None)


def _image(plan: Plan) -> Any:
    """What a captured model's sites know of the tokens before an image's patches."""
    sites = [site for unit in plan.batch for site in getattr(unit, "sites", ())]
    return next((image for site in sites if (image := getattr(site, "image", None))), None)


def _channels(plan: Plan) -> dict[str, Any]:
    """What captured models' sites know of the channels of feature maps."""
    sites = [site for unit in plan.batch for site in getattr(unit, "sites", ())]
    return {str(site): known for site in sites if (known := getattr(site, "channels", None))}


def selections(plan: Plan) -> list[Any]:
    """The per-batch stages that select rows."""
    return [unit for unit in plan.batch if hasattr(unit, "count_positions")]


def keys_by_selection(plan: Plan) -> dict[Key, list[Key]]:
    """What the streaming stages read, by the row ids that it goes with; the selection named "row_id", or the first, leads.

    Rows belong to the ids that the same per-batch stage writes (the last part of whose key ends in ``row_id``).
    """
    ids_of = KeyTable()
    for unit in plan.batch:
        own = [key for key in unit.out_keys if key_tuple(key)[-1].endswith("row_id")]
        for key in unit.out_keys if len(own) == 1 else ():
            ids_of.add(key, own[0])
    found: dict[Key, list[Key]] = {}
    for unit in plan.stream:
        groups = {ids for key in unit.in_keys for ids in ids_of.touching(key).values()}
        if len(groups) > 1:
            raise ValueError(
                f"{type(unit).__name__} reads {list(unit.in_keys)[:6]}, rows of two selections ({sorted(map(str, groups))}): one "
                f"stage reads rows of one. Name the row ids of its own selection with in_keys=."
            )
        ids = next(iter(groups), "row_id")
        keys = found.setdefault(ids, [])
        keys += [key for key in unit.in_keys if key not in (*keys, ids)]
    leading = "row_id" if "row_id" in found else next(iter(found))
    found = {leading: found.pop(leading), **found}
    return {ids: [*keys, ids] for ids, keys in found.items()}


def _unwritten(plan: Plan) -> list[Key]:
    """Inputs that no stage writes: what an unnamed tensor in a batch must be."""
    written: set[tuple[str, ...]] = set()
    wanted: list[Key] = []
    for unit in (*plan.batch, *plan.stream):
        wanted += [
            key
            for key in unit.in_keys
            if key_tuple(key) not in written and key not in (*wanted, "row_id", *optional_in_keys(unit))
        ]
        written |= {key_tuple(key) for key in unit.out_keys}
    return wanted
