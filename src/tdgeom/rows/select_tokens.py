"""``SelectTokens``: attention masks and positions to rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.core.keys import Key, key_tuple, site_key
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.stage import Stage
from tdgeom.core.words import Words
from tdgeom.core.wrong_objects import site_list
from tdgeom.model.padding_masks import refuse_unknown, token_mask
from tdgeom.model.positions import Positions, check_positions, is_position, position_mask
from tdgeom.model.sites import HEAD_KINDS, choice_beside, is_pattern, is_router, token_side
from tdgeom.numerics.centring import upcast
from tdgeom.numerics.on_host import on_host, remember
from tdgeom.rows.same_documents import SAME_DOCUMENT, SameDocuments, contents_of_ids, whole_numbers

__all__ = ["SelectTokens", "selection_mask"]

# torch's own encoders know no attention_mask: True (or -inf) stands at padding.
_TORCH_PADDING = "src_key_padding_mask"


def selection_mask(
    mask: Tensor,
    positions: Positions = "all",
    *,
    input_ids: Tensor | None = None,
    special_tokens: Tensor | None = None,
    chosen: Tensor | None = None,
    special: Tensor | None = None,
    skip_first: int = 0,
    image: Any = None,
) -> tuple[Tensor, Tensor]:
    """Which positions become rows, and each position's rank among attended tokens: two (B, T) tensors.

    Args:
        mask: (B, T), true where a token is attended.
        positions: what is selected, in the vocabulary of :mod:`tdgeom.model.positions`: "all", "last", "first" (alias
            "cls"), "patches", "registers", "last-N", "special", "random-N", ints, slices, ``Between`` pivots; counted
            over attended tokens, negative from the end, sequence by sequence.
        input_ids: (B, T), for pivots. special_tokens: (B, T), for "special".
        chosen: (B, T) boolean mask that replaces ``positions``.
        special: (B, T), true at special tokens, which are left out (before positions are counted out, not renumbered).
        skip_first: leave out this many attended tokens at the start.
        image: ``site.image`` of a site, for "patches" and "registers".

    >>> mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    >>> selection_mask(mask, "last")[0].int().tolist()
    [[0, 0, 1], [0, 1, 0]]
    """
    keep, rank = position_mask(
        mask,
        "all" if chosen is not None else positions,
        input_ids=input_ids,
        special=special_tokens,
        image=image,
    )
    if chosen is not None:
        keep = keep & chosen.bool()
    if special is not None:
        keep = keep & ~special.bool()
    if skip_first:
        keep = keep & (rank >= skip_first)
    return keep, rank


class _Batch(NamedTuple):
    """What a batch tells about its positions, each where it is known."""

    chosen: Any  # a Tensor where ``positions`` is a key
    mask: Any  # a Tensor, or what says that there is a mask that is not known
    padding: Tensor | None
    tgt: Tensor | None
    sequence_id: Tensor | None
    input_ids: Tensor | None
    special: Tensor | None
    documents: Tensor | None = None
    same: Tensor | None = None


class SelectTokens(Stage):
    """Turn activations (B, T, D) of all sites into rows (N, D), one selection for all sites.

    The attention mask decides which positions are rows, always; in its place the ``src_key_padding_mask`` of torch's own
    encoders; without either all positions are (with a warning when ``pad_id`` occurs among the ids). Row ids are
    ``sequence << 20 | position`` with the position's rank among attended tokens, so padding and batch size change neither
    rows nor ids. (B, D) activations give one row a sequence; those of sites with heads, (B, T, H, Dh), rows of all heads
    side by side, (N, H·Dh): one head's with ``Capture(heads=)``.

    Args:
        sites: the sites to select from, such as ``capture.sites``.
        positions: "all" (default), "last", "first", "cls", "patches", "registers", "last-N", "special", "random-N", an
            int, a list of ints, a slice, ``Between`` pivots, ``SpecialTokens(ids)``, counted over attended tokens; or the key of
            a boolean (B, T) mask in the batch.
        pool: "mean" averages a sequence's selected rows into one (in float32 at least); its position is 0.
        skip_first: leave out this many attended tokens at the start of each sequence (attention sinks).
        skip_special: leave out special tokens, from ``special_tokens_mask`` in the batch or from ``special_ids``.
        special_ids: token ids that count as special (needs ``input_ids`` in the batch); implies ``skip_special``.
        documents: write ``("carried", "document_id")`` (N,) for every row, that of the batch (B,) or the sequence: which rows
            belong together, for error bars and splits. A document that begins with the content of an earlier one (the same
            token ids, 4 or more) is a copy and has its number: it is no further draw. None (default): unless ``also`` names
            it, or a list of ``out_keys`` leaves it out.
        also: keys of the batch carried to rows as ``("carried", name)``: (B, T, ...) values by position, (B, ...) values
            repeated for the sequence's rows. A nested key is carried under its last part. Words are carried too (text, None,
            lists of numbers: a value a sequence; lists of text: a word for each of its tokens).
        pad_id: the padding id to warn about when there is no mask. A ``Capture`` in ``run`` supplies its model's.
        mask_key: where the attention mask is.
        channels: "first" or "last", the axis of channels in feature maps, (B, C, H, W) or (B, H, W, C), whose positions become
            rows, line by line; None: what the site's module says of its channels (``out_channels`` of a convolution,
            ``num_features`` of a batch norm, the last such part of a block), where the shape agrees. With ``pool="mean"`` maps of
            several sizes go together, one row an image.

    Reads ``("acts", site)``, the keys of ``also``, and where present ``"attention_mask"``, ``"src_key_padding_mask"`` and
    ``"tgt"`` (torch's own transformers), ``"sequence_id"``, ``"input_ids"`` and ``"special_tokens_mask"`` (for sites of a
    decoder ``"decoder_input_ids"`` and ``"decoder_special_tokens_mask"``); writes
    ``("tokens", site)``, ``("carried", name)`` and ``"row_id"`` (int64). Beside ``router_logits`` it reads what the router has
    chosen, where the batch has it, and writes its rows as ``("chosen", site)``, (N, k) int64.

    Raises:
        ValueError: activations that do not fit the mask, a sequence beyond 2^20 attended tokens, no special-token mask.
        KeyError: a key of ``also`` or ``positions`` that the batch lacks.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"acts": {"x": torch.arange(6.0).reshape(2, 3, 1)},
        ...                  "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0]])})
        >>> td = tg.SelectTokens(["x"])(td)
        >>> td["tokens", "x"].flatten(), td["row_id"] >> 20, td["row_id"] & (2**20 - 1)
        (tensor([1., 2., 3., 4.]), tensor([0, 0, 1, 1]), tensor([0, 1, 0, 1]))
    """

    def __init__(
        self,
        sites: Iterable[str | int | tuple[str | int, ...]],
        *,
        positions: Positions | tuple[str, ...] = "all",
        pool: str | None = None,
        skip_first: int = 0,
        skip_special: bool = False,
        special_ids: Sequence[int] = (),
        also: Sequence[Key] = (),
        pad_id: int | None = None,
        mask_key: Key = "attention_mask",
        documents: bool | None = None,
        channels: str | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if isinstance(sites, str) or isinstance(also, str):
            raise TypeError(f"SelectTokens: sites and also are lists, got {sites!r} and {also!r}.")
        listed_sites, also = site_list("SelectTokens", sites), list(also)
        names = [site_key(site) for site in listed_sites]
        if not names:
            raise ValueError("SelectTokens needs at least one site, such as capture.sites, got none.")
        if pool not in (None, "mean"):
            raise ValueError(f"SelectTokens: pool takes 'mean' or None, got {pool!r}.")
        if channels not in (None, "first", "last"):
            raise ValueError(f"SelectTokens: channels takes 'first', 'last' or None, got {channels!r}.")
        if skip_first < 0:
            raise ValueError(f"SelectTokens: skip_first must be 0 or more, got {skip_first}.")
        carried = [key_tuple(key)[-1] for key in also]
        by_key = isinstance(positions, str | tuple) and not is_position(positions)
        if not by_key or (
            isinstance(positions, tuple) and not all(isinstance(part, str) for part in positions)
        ):
            check_positions(positions)
        given: list[Any] = [*(("acts", *name) for name in names), *also, *([positions] if by_key else [])]
        routers = [name for name in names if is_router(str(name[-1]))]
        choices: list[Any] = [("acts", *name[:-1], choice_beside(str(name[-1]))) for name in routers]
        sides = {token_side(str(name[-1])) for name in names}
        side = sides.pop() if len(sides) == 1 else ""  # a decoder's tokens are its own
        tokens = [side + "input_ids", side + "special_tokens_mask"]
        told = [mask_key, _TORCH_PADDING, "tgt", "sequence_id", *tokens]
        if documents is None and isinstance(out_keys, list):
            documents = len(out_keys) > len(names) + len(carried) + 1 + len(routers)
        self._documents = documents is not False and "document_id" not in carried
        told += ["document_id", SAME_DOCUMENT] * self._documents
        free = [key for key in told if key not in given]
        if in_keys is not None:  # renaming the activations leaves the mask where it is
            listed = in_keys if isinstance(in_keys, list) else [in_keys]
            further = [*free, *choices]
            in_keys = listed + further[len(listed) - len(given) :] if len(listed) >= len(given) else listed
        self._places = [given.index(positions) if by_key else None, *map([*given, *free].index, told)]
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=[*given, *free, *choices],
            optional=[*free, *choices],
            writes=[
                *(("tokens", *name) for name in names),
                *(("carried", name) for name in carried),
                *([("carried", "document_id")] * self._documents),
                "row_id",
                *(("chosen", *name) for name in routers),
            ],
        )
        self._routers = len(choices)
        self._sites, self._also, self._by_key = len(names), len(also), by_key
        self.channels = channels
        self._channels = [getattr(site, "channels", None) for site in listed_sites]
        self.models_channels: dict[str, Any] = {}  # run says it of sites that are only named
        self._images = [getattr(site, "image", None) for site in listed_sites]
        self.models_image: Any = None  # run says it of sites that are only named
        self.positions, self.pool, self.skip_first = positions, pool, skip_first
        self.skip_special = skip_special or bool(special_ids)
        self.special_ids = tuple(int(i) for i in special_ids)
        self.pad_id = pad_id
        self.models_pad_id: int | None = None  # run says it anew every time
        self.documents = documents
        self._same = SameDocuments()  # of batches that nobody has numbered before
        self.mask_key = self.in_keys[self._places[1]]
        self.sequences: Tensor
        self.register_buffer("sequences", torch.zeros((), dtype=torch.int64, device="cpu"))

    def read(self, tensordict: TensorDictBase) -> list[Any]:
        """The inputs; a batch size is refused, since rows would be taken for it where there are as many as sequences."""
        if tensordict.batch_dims:
            raise ValueError(
                f"SelectTokens makes rows of positions, got a TensorDict of batch size {list(tensordict.batch_size)}, which "
                f"rows do not have. Give it a TensorDict with batch_size=[] (td.auto_batch_size_(0))."
            )
        words = f"SelectTokens makes rows of what {self.mask_key!r} says is no padding"
        refuse_unknown(tensordict.get(self.mask_key, None), words)
        return super().read(tensordict)

    def may_be_words(self, place: int) -> bool:
        """What is carried may be."""
        return self._sites <= place < self._sites + self._also

    def compute(self, *inputs: Any) -> list[Any]:
        """Select the rows of one batch."""
        acts, carried = inputs[: self._sites], inputs[self._sites : self._sites + self._also]
        choices = inputs[len(inputs) - self._routers :]
        batch = self._told(inputs)
        acts = tuple(self._tokens_of_map(value, place, batch) for place, value in enumerate(acts))
        attended = self._attended(acts[0], batch)
        guessed = batch.mask is None and batch.padding is None and batch.input_ids is None
        keep, rank = self._keep(attended, batch)
        if self._is_cached_step(acts[0], attended, batch):
            # A step of generate with a cache sees its new tokens only; the mask covers the whole sequence so far.
            keep, rank = keep[:, -acts[0].shape[1] :], rank[:, -acts[0].shape[1] :]
        sequence = self._sequence(attended.shape[0], batch)
        row_id = (sequence[:, None] << POSITION_BITS) | rank
        chosen = _Chosen(keep)
        fitted = [self._fit(value, key, keep, guessed) for key, value in zip(self.in_keys, acts)]
        named = list(zip(self.in_keys[self._sites :], carried))
        if self._documents:
            named.append(("document_id", self._document(sequence, attended, batch)))
        if self.pool == "mean":
            used = _Chosen(keep.any(-1))
            rows = [used.of(_pooled(value, keep.to(value.device))) for value in fitted]
            extra = [used.of(self._one_per_sequence(value, key, keep)) for key, value in named]
            ids = used.of(sequence << POSITION_BITS)
        else:
            rows = [chosen.of(value) for value in fitted]
            extra = [
                self._words_by_row(value, key, keep, attended)
                if isinstance(value, Words)
                else chosen.of(self._per_position(value, key, keep))
                for key, value in named
            ]
            ids = chosen.of(row_id)
        here = acts[0].device  # rows are chosen on the host and lie where the activations do
        routed = [self._chosen(choice, chosen, ids).to(here) for choice in choices]
        extra = [value if isinstance(value, Words) else _moved(value, here) for value in extra]
        return [*rows, *extra, _moved(ids, here), *routed]

    def reset(self) -> None:
        """Start counting sequences at 0 again (for batches without ``sequence_id``)."""
        self.sequences.zero_()
        self._same = SameDocuments()

    def _tokens_of_map(self, value: Tensor, place: int, batch: _Batch) -> Tensor:
        """A feature map as (B, H·W, C), or (B, C) where an image's positions are averaged; other activations as they are."""
        key = self.in_keys[place]
        name = key_tuple(key)[-1]
        told = (batch.mask, batch.padding, batch.input_ids)
        is_text = any(one is not None for one in told)
        if value.ndim != 4 or is_pattern(name) or _has_heads(key) or (is_text and self.channels is None):
            return value
        known = self._channels[place] or self.models_channels.get(name)
        axis = {"first": 1, "last": 3}.get(self.channels or "")
        axis = known.axis(tuple(value.shape)) if axis is None and known is not None else axis
        if axis is None:
            count = None if known is None else known.count
            raise ValueError(
                f"SelectTokens got {key!r} of shape {tuple(value.shape)}, and "
                f"{'nothing says' if count is None else f'the {count} channels of its module do not say'} which axis counts "
                f"channels. For feature maps give channels='first', (B, C, H, W), or channels='last', (B, H, W, C); positions of "
                f"tokens need {self.mask_key!r} or 'input_ids'."
            )
        value = value.flatten(2).transpose(1, 2) if axis == 1 else value.flatten(1, 2)
        return upcast(value).mean(1) if self._whole_image else value

    @property
    def _whole_image(self) -> bool:
        return self.pool == "mean" and self.positions == "all" and not self.skip_first

    def _told(self, values: Sequence[Any]) -> _Batch:
        return _Batch(*(None if place is None else _small_on_host(values[place]) for place in self._places))

    def count_rows(self, tensordict: TensorDictBase) -> int | None:
        """How many rows a batch will give, from the batch alone; None when only the model's output tells."""
        given = [tensordict.get(key, None) for key in self.in_keys]
        batch = self._told([value if isinstance(value, Tensor) else None for value in given])
        known = (batch.mask, batch.padding, batch.input_ids, batch.chosen)
        shape = next((value.shape for value in known if value is not None and value.ndim == 2), None)
        if shape is None:
            return None
        keep, _ = self._keep(self._mask(batch, shape), batch)
        return int(keep.any(-1).sum() if self.pool else keep.sum())

    def count_positions(self, tensordict: TensorDictBase) -> tuple[int, int] | None:
        """(attended positions, positions of padding) of a batch that was selected from; None without a mask.

        A call with a cache (a step of ``generate``) sees its last positions only, its mask all of them.
        """
        mask, acts = tensordict.get(self.mask_key, None), tensordict.get(self.in_keys[0], None)
        mask = mask if isinstance(mask, Tensor) else None
        if mask is not None and acts is not None and acts.ndim > 2:
            mask = token_mask(mask, *acts.shape[:2]) if mask.ndim > 2 else mask
        if mask is None:
            return None
        mask = on_host(mask)
        if acts is not None and acts.ndim > 2 and mask.ndim == 2 and acts.shape[1] < mask.shape[1]:
            mask = mask[:, -acts.shape[1] :]
        attended = int(mask.bool().sum())
        return attended, mask.numel() - attended

    def _mask(self, batch: _Batch, shape: Sequence[int]) -> Tensor:
        mask = batch.mask
        if mask is None:
            mask = _not_padding(batch, shape)
        elif mask.ndim > 2:
            read = token_mask(mask, shape[0], shape[1])
            if read is None:
                raise ValueError(
                    f"SelectTokens expects {self.mask_key!r} of shape (B, T), got {tuple(mask.shape)}. Put the (B, T) padding "
                    f"mask there; this attention bias does not say which positions are padding."
                )
            mask = on_host(read)
        if mask is None:
            self._warn_about_padding(batch)
            return torch.ones(tuple(shape), dtype=torch.bool, device="cpu")
        return mask.bool()

    def _attended(self, first: Tensor, batch: _Batch) -> Tensor:
        if first.ndim == 2:
            return torch.ones((first.shape[0], 1), dtype=torch.bool, device="cpu")
        mask = self._mask(batch, first.shape[:2])
        if mask.ndim != 2:
            raise ValueError(
                f"SelectTokens expects {self.mask_key!r} of shape (B, T), got {tuple(mask.shape)}."
            )
        return mask

    def _keep(self, attended: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        special = chosen = None
        if attended.shape[1] >= 1 << POSITION_BITS:
            raise ValueError(
                f"SelectTokens numbers up to 2^{POSITION_BITS} positions, got T={attended.shape[1]}."
            )
        if self._by_key:
            chosen = batch.chosen
            if chosen.shape != attended.shape or chosen.is_floating_point():
                raise ValueError(
                    f"SelectTokens(positions={self.positions!r}) expects a boolean mask of shape {tuple(attended.shape)}, "
                    f"got {chosen.dtype} of shape {tuple(chosen.shape)}."
                )
        if self.skip_special:
            special = self._special(batch, attended)
        return selection_mask(
            attended,
            self.positions,  # type: ignore[arg-type]
            input_ids=batch.input_ids,
            special_tokens=batch.special,
            chosen=chosen,
            special=special,
            skip_first=self.skip_first,
            image=self._image(),
        )

    def _image(self) -> Any:
        """What is known of the tokens before an image's patches, the same at all sites."""
        if self.positions not in ("patches", "registers", "cls"):
            return None
        known = {id(image): image for image in (*self._images, self.models_image) if image}
        if not known:
            return None
        fronts = [image.front() for image in known.values()]
        if any(front != fronts[0] for front in fronts):
            raise ValueError(f"SelectTokens: the sites have different tokens before their patches, {fronts}.")
        return next(iter(known.values()))

    @staticmethod
    def _is_cached_step(acts: Tensor, attended: Tensor, batch: _Batch) -> bool:
        ids = batch.input_ids
        return (
            acts.ndim >= 3
            and attended.shape[1] > acts.shape[1]
            and ids is not None
            and ids.shape[1] == acts.shape[1]
        )

    def _special(self, batch: _Batch, attended: Tensor) -> Tensor:
        special = self._special_tokens(batch, attended)
        missing = attended.shape[1] - special.shape[1]  # tokens of earlier, cached steps
        return torch.nn.functional.pad(special, (missing, 0)) if missing > 0 else special

    def _special_tokens(self, batch: _Batch, attended: Tensor) -> Tensor:
        if self.special_ids:
            ids = batch.input_ids
            if ids is None:
                raise KeyError(
                    f"SelectTokens(special_ids={list(self.special_ids)}) needs 'input_ids' in the batch."
                )
            return torch.isin(ids, torch.tensor(self.special_ids, device="cpu"))
        special = batch.special
        if special is None:
            raise KeyError(
                "SelectTokens(skip_special=True) needs 'special_tokens_mask' in the batch (tokenizer(..., "
                "return_special_tokens_mask=True)) or special_ids= (for instance tokenizer.all_special_ids)."
            )
        return special

    def _sequence(self, count: int, batch: _Batch) -> Tensor:
        given = batch.sequence_id
        if given is not None:
            if given.shape != (count,):
                ids = batch.input_ids
                if ids is not None and ids.ndim == 1:
                    raise ValueError(
                        f"the batch's input_ids are {tuple(ids.shape)}, expected (B, T). One sequence is ids[None]."
                    )
                raise ValueError(
                    f"SelectTokens expects 'sequence_id' of shape ({count},), got {tuple(given.shape)}."
                )
            return given.long()
        numbers = self.sequences + torch.arange(count, device=self.sequences.device)
        self.sequences += count
        return numbers.cpu()

    def _document(self, sequence: Tensor, attended: Tensor, batch: _Batch) -> Tensor:
        """(B,), which document each sequence is of."""
        if batch.same is not None:
            return batch.same
        names = sequence if batch.documents is None else whole_numbers(batch.documents)
        if names.shape != sequence.shape:
            return names  # refused, or one a token, where it is laid out
        ids = batch.input_ids
        known = ids is not None and ids.shape == attended.shape and not ids.is_floating_point()
        contents = contents_of_ids(ids, attended) if known and ids is not None else None
        return self._same.of(names.tolist(), contents)

    def _fit(self, value: Tensor, key: Key, keep: Tensor, guessed: bool) -> Tensor:
        if value.ndim == 4 and is_pattern(key_tuple(key)[-1]):
            raise ValueError(
                f"SelectTokens turns activations of positions into rows; {key!r} holds attention between positions, "
                f"{tuple(value.shape)}. Remedy: GroupAttention or AggregateActs for patterns, or a site such as 'z'."
            )
        value = value.unsqueeze(1) if value.ndim == 2 and keep.shape[1] == 1 else value
        if value.ndim == 4:
            if guessed and not _has_heads(key):
                raise ValueError(
                    f"SelectTokens expects {key!r} of shape (B, T, D) or (B, D), got {tuple(value.shape)}, and the batch has "
                    f"neither {self.mask_key!r} nor 'input_ids' to tell positions by. Feature maps (B, C, H, W) become one row "
                    f"an image with Capture(..., callback=lambda site, x: x.mean((2, 3)))."
                )
            value = value.flatten(2)  # heads side by side
        if value.ndim != 3 or value.shape[:2] != keep.shape:
            raise ValueError(
                f"SelectTokens expects {key!r} of shape ({keep.shape[0]}, {keep.shape[1]}, D) to fit {self.mask_key!r}, got "
                f"{tuple(value.shape)}. Sites with another number of positions (a decoder's beside its encoder's) take a "
                f"SelectTokens of their own, with mask_key='decoder_attention_mask' and another name for its 'row_id' "
                f"(out_keys=)."
            )
        return value

    def _per_position(self, value: Tensor, key: Key, keep: Tensor) -> Tensor:
        if value.shape[:2] == keep.shape:
            return value
        if value.ndim >= 1 and value.shape[0] == keep.shape[0]:
            return value.unsqueeze(1).expand(*keep.shape, *value.shape[1:])
        raise ValueError(
            f"SelectTokens(also=[{key!r}]) expects a value a token, {tuple(keep.shape)} first, or a value a sequence, "
            f"({keep.shape[0]},) first; got {tuple(value.shape)}."
        )

    def _words_by_row(self, words: Words, key: Key, keep: Tensor, attended: Tensor) -> Words:
        """A sequence's words for its rows: a list of text has one a position, padding in or left out."""
        count, length = keep.shape
        if len(words) != count:
            raise ValueError(
                f"SelectTokens(also=[{key!r}]) expects a value a sequence, {count} of them; got a list of {len(words)}."
            )
        if not any(map(_is_word_list, words)):
            return words[keep.nonzero()[:, 0]]
        found: list[Any] = []
        for own, chosen, here in zip(words, keep, attended):
            places = torch.arange(length) if len(own or ()) == length else here.cumsum(0) - 1
            if own is None or len(own) not in (length, int(here.sum())):
                raise ValueError(
                    f"SelectTokens(also=[{key!r}]) takes a list of text for a word a token, as many as the sequence has tokens, "
                    f"{int(here.sum())} (or {length} with padding); got {0 if own is None else len(own)}. A list that says one "
                    f"thing of the whole sequence is given as one text: ' '.join(words)."
                )
            found += [own[place] for place in places[chosen].tolist()]
        return Words(found)

    def _chosen(self, choice: Tensor | None, chosen: _Chosen, ids: Tensor) -> Tensor:
        """The experts of each row, (N, k), of none where nobody told (or rows are means of positions)."""
        if choice is None or self.pool or choice.shape[:2] != chosen.keep.shape:
            return ids.new_empty(ids.shape[0], 0)
        return chosen.of(choice).long()

    def _one_per_sequence(self, value: Any, key: Key, keep: Tensor) -> Any:
        if isinstance(value, Words) and any(map(_is_word_list, value)):
            raise ValueError(
                f"SelectTokens(pool='mean') gives one row a sequence, but {key!r} has lists of text, a word a token. Carry one "
                f"text a sequence: ' '.join(words)."
            )
        if value.shape[:2] == keep.shape and keep.shape[1] > 1:
            raise ValueError(
                f"SelectTokens(pool='mean') gives one row a sequence, but {key!r} has a value a token, {tuple(value.shape)}. "
                f"Carry a value a sequence, ({keep.shape[0]},) first."
            )
        if value.shape[:1] != keep.shape[:1]:
            raise ValueError(
                f"SelectTokens(pool='mean', also=[{key!r}]) expects a value a sequence, ({keep.shape[0]},) first; got "
                f"{tuple(value.shape)}."
            )
        return value

    def _warn_about_padding(self, batch: _Batch) -> None:
        ids = batch.input_ids
        pad_id = self.models_pad_id if self.pad_id is None else self.pad_id
        if pad_id is not None and ids is not None and bool((ids == pad_id).any()):
            warnings.warn(
                f"the batch has no {self.mask_key!r} but its input_ids hold the padding id {pad_id}: every position "
                f"counts as a row. Pass the tokenizer's attention mask.",
                stacklevel=2,
            )


def _is_word_list(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, str) for one in value)


def _has_heads(key: Key) -> bool:
    name = key_tuple(key)[-1]
    return ":" not in name and any(part in HEAD_KINDS for part in name.rpartition("/")[2].split("."))


def _not_padding(batch: _Batch, shape: Sequence[int]) -> Tensor | None:
    padding = batch.padding
    if padding is None or batch.tgt is not None:  # of two stacks it tells about one
        return None
    if tuple(padding.shape) != tuple(shape):
        raise ValueError(
            f"SelectTokens expects activations (B, T, ...) of the shape of {_TORCH_PADDING!r}, {tuple(padding.shape)}, got "
            f"{tuple(shape)} first. Build the encoder with batch_first=True: (T, B, D) would take sequences for positions."
        )
    return ~padding if padding.dtype == torch.bool else padding == 0


def _small_on_host(value: Any) -> Any:
    """Masks, ids and numbers of sequences on the host, where rows are chosen; a bias of all pairs stays where it is."""
    return on_host(value) if isinstance(value, Tensor) and value.ndim <= 2 else value


def _moved(value: Tensor, device: torch.device) -> Tensor:
    moved = value.to(device, non_blocking=True)
    remember(moved, value)
    return moved


class _Chosen:
    """The places that became rows, and the values there: the places go to a device once, and no device is asked."""

    def __init__(self, keep: Tensor) -> None:
        self.keep, self.whole = keep, bool(keep.all())
        self.places: dict[torch.device, Tensor] = {}

    def of(self, value: Any) -> Any:
        """(N, ...) of values whose first dimensions are those of ``keep``; words where there is one a sequence."""
        if isinstance(value, Words):
            return value if self.whole else value[self.keep]
        flat = value.flatten(0, self.keep.ndim - 1)
        if self.whole:
            return flat
        if not self.places:
            self.places[self.keep.device] = self.keep.flatten().nonzero()[:, 0]
        at = self.places.get(value.device)
        if at is None:
            at = self.places[value.device] = self.places[self.keep.device].to(value.device, non_blocking=True)
        return flat.index_select(0, at)


def _pooled(value: Tensor, keep: Tensor) -> Tensor:
    value = upcast(value)
    weight = keep.to(value.dtype)
    # where(), not a product: a NaN at a padding position must not reach the mean.
    total = torch.where(
        keep.unsqueeze(-1), value, torch.zeros((), dtype=value.dtype, device=value.device)
    ).sum(1)
    return total / weight.sum(1, keepdim=True).clamp(min=1)
