"""Whatever people hand over as data, as a loader of batches: texts, datasets, rows, images, or batches already.

One adapter for every entry point: ``run``, ``analyze_model``, ``compare``, ``Probing``. What came is told by its first element,
anew at each pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from tdgeom.rows.images import ImageBatches, is_image, is_image_processor
from tdgeom.rows.text import TextBatches
from tdgeom.rows.tokenizer_alignment import PairedTexts

__all__ = ["DataSource", "as_loader", "holds_texts", "named_tokenizer", "sequence_length", "texts_of"]

BATCH_SIZE, MAX_LENGTH = 8, 256


def as_loader(
    data: Any,
    *,
    owner: str,
    tokenizer: Any = None,
    text_column: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    models: Sequence[nn.Module] = (),
) -> Iterable[Any]:
    """Data as an iterable of batches; what are batches already is left as it is.

    Args:
        data: texts; a ``datasets.Dataset`` or ``IterableDataset``, a ``DataLoader`` over one, or a data frame; rows as dicts;
            images; batches.
        tokenizer: makes sequences of texts (or, an image processor, pixels of images); or its name.
        text_column: which column holds the text, where several do.
        batch_size, max_length: sequences a batch (8), and the longest sequence (longer texts come as several); default 256, or
            what the model takes.
        models: those that the batches are for. A sentence encoder brings its own tokenizer, and cuts texts off as it does.

    Raises:
        TypeError: what is no data. ValueError: texts without a tokenizer, several columns of text.
    """
    if isinstance(data, DataSource):
        return data
    if isinstance(data, dict) and data and all(map(_is_table, data.values())):
        raise TypeError(
            f"{owner} takes one dataset, got a dictionary of them with the splits {sorted(map(str, data))}: give one, such as "
            f"dataset[{next(iter(data))!r}]."
        )
    if isinstance(data, Mapping | Tensor | str) or not (
        isinstance(data, Iterable) or hasattr(data, "__getitem__")
    ):
        return data  # one batch, which run refuses with its remedy
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"{owner} takes batches, got a {type(data).__name__}, which gives single examples: "
            f"torch.utils.data.DataLoader(dataset, batch_size={batch_size or BATCH_SIZE})."
        )
    asked = [one is not None for one in (tokenizer, text_column, batch_size, max_length)]
    if isinstance(tokenizer, str):
        tokenizer = named_tokenizer(tokenizer)
    size = BATCH_SIZE if batch_size is None else batch_size
    return DataSource(data, owner, tokenizer, text_column, size, max_length, models, any(asked))


def named_tokenizer(name: str) -> Any:
    """The tokenizer of a Hugging Face id or directory."""
    from transformers import AutoTokenizer

    return knows_words(AutoTokenizer.from_pretrained(name), name, "Give tokenizer= of another name.")


def knows_words(tokenizer: Any, name: str, remedy: str) -> Any:
    """The tokenizer, unless it is the empty one that transformers makes of a folder without a vocabulary."""
    if not tokenizer("a word", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"{name!r} holds no tokenizer: the one made of it has no words, and texts no tokens. {remedy}"
        )
    return tokenizer


def sequence_length(models: Sequence[nn.Module], tokenizer: Any) -> int:
    """The longest sequence, unless another is asked for: 256, or the most that models and tokenizer take.

    >>> sequence_length([], None)
    256
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length")
    limits = [getattr(getattr(model, "config", None), name, None) for model in models for name in names]
    limits += [getattr(model, "max_seq_length", None) for model in models]
    limits.append(getattr(tokenizer, "model_max_length", None))
    # models that count positions on from the padding id have as many fewer
    return min([MAX_LENGTH, *(one for one in limits if isinstance(one, int) and 0 < one < 10**9)])


def holds_texts(data: Any) -> bool:
    """Whether data that can be looked into without using it up are texts, or a dataset."""
    return _is_table(data) or (isinstance(data, list | tuple) and bool(data) and isinstance(data[0], str))


def texts_of(data: Any, owner: str, text_column: str | None = None) -> Iterable[str]:
    """The texts alone, of anything that holds texts."""
    if isinstance(data, list | tuple) and data and isinstance(data[0], str):
        return data
    return _Texts(DataSource(data, owner, None, text_column, BATCH_SIZE, None, (), False))


class _Texts:
    """The texts of a source, at every pass anew."""

    def __init__(self, source: DataSource) -> None:
        self.source = source

    def __iter__(self) -> Iterator[str]:
        return (text for text, _ in self.source.rows())


class DataSource:
    """A loader around data of any kind; see ``as_loader``."""

    def __init__(
        self,
        data: Any,
        owner: str,
        tokenizer: Any,
        text_column: str | None,
        batch_size: int,
        max_length: int | None,
        models: Sequence[nn.Module],
        asked: bool,
    ) -> None:
        self.data, self.owner, self.tokenizer, self.text_column = data, owner, tokenizer, text_column
        self.batch_size, self.max_length, self.models, self.asked = batch_size, max_length, models, asked
        self.part = (
            0,
            1,
        )  # of the whole data, and of how many parts: documents are numbered past those of the others
        self.makes_documents = False  # known once it is read
        self._read = False

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.data, TextBatches | ImageBatches | PairedTexts):
            self.data.part = self.part
            self.makes_documents = True
        first, elements = self._opened()
        if first is None or isinstance(first, TensorDictBase):
            return elements
        if is_image(first) or self._image_column(first) is not None:
            self.makes_documents = not _numbered(first)
            images = ImageBatches(
                self._images(elements, first), self._processor(), batch_size=self.batch_size
            )
            images.part = self.part
            return iter(images)
        if self._holds_text(first):
            self.makes_documents = not _numbered(first)
            return self._of_texts(elements)
        if isinstance(first, Mapping) and _is_tokenized_row(first):
            return self._of_rows(elements)
        if _is_table(self.data):
            raise ValueError(
                f"{self.owner} reads rows of a dataset with the columns {_columns(self.data)}, none of which is text or "
                f"input_ids. Name the text with text_column=, or give a DataLoader whose batches hold the model's inputs."
            )
        if self.asked:
            held = sorted(map(str, first)) if isinstance(first, Mapping) else type(first).__name__
            raise ValueError(
                f"{self.owner} was given tokenizer=, text_column=, batch_size= or max_length=, which make batches of texts, but "
                f"the data are batches already: {held}. Leave them out: the dataloader has its own batch size."
            )
        if isinstance(first, list) and first and all(isinstance(one, Mapping) for one in first):
            return (collated(batch, self.tokenizer) for batch in elements)
        return elements

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(text, its other columns) of every row."""
        first, elements = self._opened()
        if first is None:
            return iter(())
        if not self._holds_text(first):
            raise TypeError(
                f"{self.owner} needs texts, got {_said(first)}. Give strings, or a dataset with a column of text."
            )
        return self._text_rows(elements)

    def _opened(self) -> tuple[Any, Iterator[Any]]:
        """The first element, and all of them."""
        if isinstance(self.data, Iterator):
            if self._read:
                raise RuntimeError(
                    f"{self.owner} reads its data a second time, but they came from an iterator, which can be read once. Give a "
                    f"list or a DataLoader."
                )
            self._read = True
        elements = _records(self.data) if _is_frame(self.data) else iter(self.data)
        found = list(islice(elements, 1))
        return (found[0] if found else None), chain(found, elements)

    # ------------------------------------------------------------------------------------------------ texts

    def _holds_text(self, element: Any) -> bool:
        if isinstance(element, str):
            return True
        if isinstance(element, Mapping):
            if "input_ids" in element or "pixel_values" in element:
                return False
            if self.text_column is not None and self.text_column not in element:
                raise ValueError(
                    f"{self.owner}: text_column={self.text_column!r} is none of the columns {list(element)[:24]}."
                )
            if not (_is_table(self.data) or self.tokenizer is not None or self.text_column is not None):
                return self._for_encoder(element)
            return bool(_text_columns(element))
        if isinstance(element, list | tuple) and element:
            of_texts = isinstance(element[0], str) or _all_text(element[0])
            return of_texts or (isinstance(element[0], Mapping) and self._holds_text(element[0]))
        return False

    def _for_encoder(self, element: Mapping[Any, Any]) -> bool:
        """Whether a batch holds text and nothing else that a sentence encoder could take."""
        others = any(isinstance(value, Tensor | np.ndarray) and value.ndim > 1 for value in element.values())
        return bool(_text_columns(element)) and not others and _sentence_encoder(self.models) is not None

    def _column(self, element: Mapping[Any, Any]) -> str:
        found = _text_columns(element)
        if self.text_column is not None:
            if self.text_column not in found:
                raise ValueError(
                    f"{self.owner}: text_column={self.text_column!r} holds {type(element.get(self.text_column)).__name__}, not "
                    f"text; text is in {found}."
                )
            return self.text_column
        if len(found) != 1:
            raise ValueError(
                f"{self.owner}: the columns {found} all hold text. Name the one that the model reads: text_column={found[0]!r}."
            )
        return found[0]

    def _text_rows(self, elements: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        column: str | None = None
        for element in elements:
            if isinstance(element, str):
                yield element, {}
                continue
            if isinstance(element, list | tuple) and isinstance(element[0], str):
                if isinstance(element, tuple) and isinstance(element[-1], str):
                    raise ValueError(
                        f"{self.owner} takes texts, got a tuple of {len(element)}: a batch of texts is a list; of pairs of texts "
                        f"give the tokenized batches."
                    )
                if isinstance(element, tuple) and len(element) == 2:
                    yield element[0], {"labels": element[1]}  # (text, label)
                else:
                    yield from ((text, {}) for text in element)
                continue
            if isinstance(element, list | tuple) and isinstance(element[0], Mapping):
                yield from self._text_rows(element)
                continue
            if isinstance(element, list | tuple):  # columns without names: texts, then labels
                if len(element) > 2:
                    raise ValueError(
                        f"{self.owner} takes batches of (texts, labels), got {len(element)} columns without names: give dicts."
                    )
                element = dict(zip(("text", "labels"), element))
            column = self._column(element) if column is None else column
            for row in _rows(element, column):
                text = row.pop(column, None)
                if not isinstance(text, str):
                    raise ValueError(
                        f"{self.owner} expects text in the column {column!r}, got {type(text).__name__} in one row: leave such "
                        f"rows out."
                    )
                yield text, row

    def _of_texts(self, elements: Iterator[Any]) -> Iterator[Any]:
        rows: Any = self._text_rows(elements)
        if self.tokenizer is None:
            encoder = _sentence_encoder(self.models)
            if encoder is None:
                raise ValueError(
                    f"{self.owner} was given texts: give tokenizer= as well (a tokenizer, or its name), or tokenized batches, "
                    f"such as tdgeom.text.TextBatches(texts, tokenizer)."
                )
            return _encoded(rows, encoder, self.batch_size, self.part)
        if is_image_processor(self.tokenizer):
            raise TypeError(f"{self.owner} was given texts, but tokenizer= is an image processor.")
        length = self.max_length or sequence_length(self.models, self.tokenizer)
        texts = _RowTexts(rows, self.tokenizer, batch_size=self.batch_size, max_length=length)
        texts.part = self.part
        return iter(texts)

    # ------------------------------------------------------------------------------------------------ rows and images

    def _of_rows(self, elements: Iterator[Any]) -> Iterator[Any]:
        while chunk := list(islice(elements, self.batch_size)):
            yield collated(chunk, self.tokenizer)

    def _image_column(self, element: Any) -> str | None:
        if not isinstance(element, Mapping):
            return None
        found = [name for name, value in element.items() if is_image(value)]
        if len(found) > 1:
            raise ValueError(
                f"{self.owner}: the columns {found} all hold images: keep one, dataset.select_columns([...])."
            )
        return found[0] if found else None

    def _images(self, elements: Iterator[Any], first: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        column = self._image_column(first)
        for element in elements:
            if column is None:
                yield element, {}
            else:
                row = dict(element)
                yield row.pop(column), row

    def _processor(self) -> Any:
        if not is_image_processor(self.tokenizer):
            raise ValueError(
                f"{self.owner} was given images: give the model's image processor as tokenizer=, such as "
                f"transformers.AutoImageProcessor.from_pretrained(name), or batches with 'pixel_values'."
            )
        return self.tokenizer


class _RowTexts(TextBatches):
    """Batches of rows that have further columns."""

    def documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each text with its columns."""
        given: Any = self.texts
        return iter(given)


def _encoded(
    rows: Iterator[tuple[str, dict[str, Any]]], encoder: Any, batch_size: int, part: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Batches as a sentence encoder makes them of texts for itself."""
    make = getattr(encoder, "preprocess", None) or encoder.tokenize
    count = 0
    while chunk := list(islice(rows, batch_size)):
        batch = dict(make([text for text, _ in chunk]))
        known = {name: [columns.get(name) for _, columns in chunk] for name in chunk[0][1]}
        numbers = torch.arange(count, count + len(chunk), device="cpu") * part[1] + part[0]
        count += len(chunk)
        yield {"document_id": numbers, **known, **batch}


def collated(rows: Sequence[Mapping[str, Any]], tokenizer: Any = None) -> dict[str, Any]:
    """Rows as one batch: lists as long as a row's tokens are padded on the right, under a mask; other values stand as they are.

    >>> batch = collated([{"input_ids": [5, 6], "label": 0}, {"input_ids": [7], "label": 1}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["label"]
    ([[5, 6], [7, 0]], [[1, 1], [1, 0]], [0, 1])
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if "input_ids" not in columns:
        return columns
    lengths = [len(ids) for ids in columns["input_ids"]]
    fill = {
        "input_ids": getattr(tokenizer, "pad_token_id", None) or 0,
        "labels": -100,
        "special_tokens_mask": 1,
    }
    columns.setdefault("attention_mask", [[1] * length for length in lengths])
    for name, values in columns.items():
        listed = [value.tolist() if isinstance(value, Tensor | np.ndarray) else value for value in values]
        if all(
            isinstance(v, list) and len(v) == n and all(isinstance(x, int) for x in v)
            for v, n in zip(listed, lengths)
        ):
            padded = [v + [fill.get(name, 0)] * (max(lengths) - n) for v, n in zip(listed, lengths)]
            columns[name] = torch.tensor(padded, device="cpu")  # type: ignore[assignment]
    return columns


def _rows(element: Mapping[Any, Any], column: str) -> Iterator[dict[str, Any]]:
    """A row, or the rows of a batch in columns."""
    if isinstance(element[column], str):
        yield {str(name): value for name, value in element.items()}
        return
    count = len(element[column])
    for place in range(count):
        yield {
            str(name): value[place].tolist() if isinstance(value, Tensor | np.ndarray) else value[place]
            for name, value in element.items()
            if hasattr(value, "__getitem__") and len(value) == count
        }


def _numbered(element: Any) -> bool:
    """Whether data bring the numbers of their documents."""
    return isinstance(element, Mapping) and "document_id" in element


def _text_columns(element: Mapping[Any, Any]) -> list[str]:
    return [str(name) for name, value in element.items() if isinstance(value, str) or _all_text(value)]


def _all_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, str) for one in value)


def _is_tokenized_row(element: Mapping[Any, Any]) -> bool:
    ids = element.get("input_ids")
    return (isinstance(ids, list) and bool(ids) and isinstance(ids[0], int)) or (
        isinstance(ids, Tensor | np.ndarray) and ids.ndim == 1
    )


def _records(frame: Any) -> Iterator[dict[str, Any]]:
    """A data frame's rows; a missing value is None."""
    return iter(frame.astype(object).where(frame.notna(), None).to_dict("records"))


def _is_frame(data: Any) -> bool:
    return hasattr(data, "columns") and hasattr(data, "iloc")


def _is_table(data: Any) -> bool:
    """A dataset of Hugging Face's (their iterables too), or a data frame: it iterates over single rows."""
    return hasattr(data, "column_names") or _is_frame(data)


def _columns(data: Any) -> list[str]:
    return list(map(str, data.columns if _is_frame(data) else data.column_names or []))


def _sentence_encoder(models: Sequence[nn.Module]) -> Any:
    """The one sentence encoder among the models."""
    found = {id(model): model for model in models if hasattr(model, "encode") and hasattr(model, "tokenize")}
    return next(iter(found.values())) if len(found) == 1 == len({id(model) for model in models}) else None


def _said(value: Any) -> str:
    return (
        f"{type(value).__name__} of {sorted(map(str, value))[:12]}"
        if isinstance(value, Mapping)
        else type(value).__name__
    )
