"""Documents to batches: readers of text files, and ``TextBatches``, a loader that ``run`` can read again and again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Documents",
    "Records",
    "TextBatches",
    "lines_of",
    "read_dataset",
    "read_fasta",
    "read_jsonl",
    "read_text",
    "readable_file",
]


class Documents:
    """Documents read afresh at every pass: an iterable of strings around a function that opens the source.

    >>> documents = Documents(lambda: iter(["one", "two"]), "a list")
    >>> list(documents), list(documents)
    (['one', 'two'], ['one', 'two'])
    """

    def __init__(self, opened: Callable[[], Iterator[str]], name: str) -> None:
        self._opened, self.name = opened, name

    def __iter__(self) -> Iterator[str]:
        found = False
        for text in self._opened():
            found = found or bool(text.strip())
            yield text
        if not found:
            raise ValueError(f"{self.name} holds no text: every document is empty.")

    def __repr__(self) -> str:
        return f"Documents({self.name!r})"


def read_text(path: str | Path) -> Documents:
    """The documents of a UTF-8 text file, separated by blank lines; read line by line.

    Raises:
        FileNotFoundError: no such file. ValueError (while reading): not UTF-8, or no text in it.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "two.txt")
        >>> _ = path.write_text("The first\\ndocument.\\n\\nThe second.\\n")
        >>> list(read_text(path))
        ['The first\\ndocument.', 'The second.']
    """
    path = readable_file(path)

    def opened() -> Iterator[str]:
        lines: list[str] = []
        for line in lines_of(path):
            if line.strip():
                lines.append(line.rstrip("\n"))
            elif lines:
                yield "\n".join(lines)
                lines = []
        if lines:
            yield "\n".join(lines)

    return Documents(opened, str(path))


def read_jsonl(spec: str) -> Documents:
    """One field of a JSON-lines file, ``"FILE:FIELD"``; without ``:FIELD`` the field is ``text``.

    Raises:
        FileNotFoundError: no such file. ValueError (while reading): a line that is no JSON object or lacks the field; the
            message names the line and the fields it has.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
        >>> _ = path.write_text('{"body": "one"}\\n{"body": "two"}\\n')
        >>> list(read_jsonl(f"{path}:body"))
        ['one', 'two']
    """
    name, _, field = str(spec).rpartition(":")
    if not name or _is_there(Path(spec)):
        name, field = str(spec), "text"
    path = readable_file(name)

    def opened() -> Iterator[str]:
        for number, line in enumerate(lines_of(path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected one JSON object a line ({error})."
                ) from None
            yield _field(row, field, f"{path}, line {number}", "FILE:FIELD")

    return Documents(opened, str(path))


def read_fasta(path: str | Path) -> Records:
    """The sequences of a FASTA file: what follows each ``>header`` line, its lines joined, without blanks and a final ``*``.

    A file without headers holds a sequence a line. Iterating gives the sequences; ``rows()`` gives each with its header as a
    column, ``("MKV", {"header": "sp|P1 name"})``.

    Raises:
        FileNotFoundError: no such file. ValueError (while reading): not UTF-8, no sequence in it, or a header without one.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "two.fasta")
        >>> _ = path.write_text(">one a protein\\nMKV\\nLA*\\n>two\\nGG\\n")
        >>> list(read_fasta(path)), [columns["header"] for _, columns in read_fasta(path).rows()]
        (['MKVLA', 'GG'], ['one a protein', 'two'])
    """
    path = readable_file(path)

    def opened() -> Iterator[tuple[str, dict[str, Any]]]:
        header: str | None = None
        parts: list[str] = []
        for number, line in enumerate(lines_of(path), 1):
            line = line.strip()
            if line.startswith(";") or not line:
                continue
            if line.startswith(">") or header is None:
                if header is not None:
                    yield _record(header, parts, path)
                if not line.startswith(">"):  # no headers: a sequence a line
                    yield _record(str(number), [line], path)
                    continue
                header, parts = line[1:].strip(), []
            else:
                parts.append(line)
        if header is not None:
            yield _record(header, parts, path)

    return Records(opened, str(path))


def _record(header: str, parts: list[str], path: Path) -> tuple[str, dict[str, Any]]:
    sequence = "".join("".join(parts).split()).removesuffix("*")
    if not sequence:
        raise ValueError(f"{path}: the record {header[:80]!r} has no sequence.")
    return sequence, {"header": header}


class Records(Documents):
    """Documents with further columns, read afresh at every pass."""

    def __init__(self, opened: Callable[[], Iterator[tuple[str, dict[str, Any]]]], name: str) -> None:
        super().__init__(lambda: (text for text, _ in opened()), name)
        self._records = opened

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each document with its columns."""
        return self._records()


def read_dataset(spec: str) -> Documents:
    """A Hugging Face dataset, ``"NAME[:CONFIG[:SPLIT[:FIELD]]]"``, streamed; split ``train`` and field ``text`` by default.

    ``"wikitext:wikitext-2-raw-v1:test"``, ``"imdb::test"`` and a local directory all work. Needs the optional package
    ``datasets``.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed. ValueError: no such dataset, configuration, split or field.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "read_dataset needs the package 'datasets': pip install datasets, or give the text itself "
            "(--text FILE, --jsonl FILE:FIELD)."
        ) from None
    name, config, split, field, *more = [*str(spec).split(":"), "", "", ""][: max(4, spec.count(":") + 1)]
    if more or not name:
        raise ValueError(f"read_dataset: a dataset is NAME[:CONFIG[:SPLIT[:FIELD]]], got {spec!r}.")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # offline, misspelt, gated: datasets has a class for each
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"read_dataset could not open {spec!r}: {said} Give NAME[:CONFIG[:SPLIT[:FIELD]]] of a dataset that is reachable "
            f"or in the cache, or a local directory."
        ) from error

    def opened() -> Iterator[str]:
        for number, row in enumerate(rows):
            yield _field(row, field or "text", f"{name}, row {number}", "NAME:CONFIG:SPLIT:FIELD")

    return Documents(opened, str(spec))


def readable_file(path: str | Path, expected: str = "a text file") -> Path:
    """The file of that name; a ``FileNotFoundError`` where there is none, a ``ValueError`` where it is closed to this user."""
    path = Path(path).expanduser()
    if not _is_there(path) or path.is_dir():  # a pipe will do
        what = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: expected {expected}.")
    return path


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file; a ``ValueError`` where it is none or cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as handle:
            yield from handle
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it, for instance "
            f"iconv -f LATIN1 -t UTF-8 {path.name}."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} cannot be read: {error.strerror or error}. Give a file that this user may read (ls -l {path})."
    )


def _field(row: object, field: str, where: str, form: str) -> str:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where}: expected a JSON object with the field {field!r}, got {type(row).__name__}."
        )
    if not isinstance(row.get(field), str):
        came = "no such field" if field not in row else type(row[field]).__name__
        raise ValueError(
            f"{where}: expected a string under {field!r}, got {came}; the fields are {sorted(map(str, row))}. "
            f"Name the one that holds the text: {form}."
        )
    return row[field]


def padded(fields: Mapping[str, list[list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """A tokenizer's fields as (B, T) int64 tensors, padded on the right, with the attention mask that says what is padding."""
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    fill = {"input_ids": next(token for token in pads if token is not None), "special_tokens_mask": 1}
    cpu = torch.device("cpu")  # where loaders make batches, whatever the default device is
    lengths = torch.tensor([len(row) for row in fields["input_ids"]], device=cpu)
    longest = int(lengths.max())
    batch = {
        name: torch.tensor(
            [row + [fill.get(name, 0)] * (longest - len(row)) for row in rows], dtype=torch.int64, device=cpu
        )
        for name, rows in fields.items()
    }
    return {**batch, "attention_mask": (torch.arange(longest, device=cpu) < lengths[:, None]).long()}


class TextBatches:
    """Documents as tokenized batches: a loader for ``run`` and ``analyze_model``.

    Documents longer than ``max_length`` tokens come as several sequences, each with the tokenizer's own special tokens. A
    batch is padded to its longest sequence, on the right, with the pad token or else the end-of-text token (the attention
    mask says which positions count). Documents are read lazily; empty ones give no sequence.

    Each batch is a dict of int64 tensors: ``input_ids``, ``attention_mask``, ``special_tokens_mask`` (B, T),
    ``document_id`` (B,) (the document's index in ``texts``), ``token_type_ids`` if the tokenizer makes them, and ``label``
    (B,) if ``labels`` are given (a list where they are names).

    Args:
        texts: an iterable of strings. Something that can be iterated again (a list, ``read_text(...)``) makes the loader
            re-iterable; a generator is read once.
        tokenizer: a Hugging Face tokenizer, fast or slow.
        batch_size: sequences a batch.
        max_length: longest sequence, special tokens included.
        labels: one number, or the name of a class, a document.

    Raises:
        TypeError: ``texts`` is one string, or holds something else than strings. ValueError: settings
            out of range, labels that do not match. RuntimeError: a second pass over a generator.

        >>> from tdgeom.demo import demo_model
        >>> model, tokenizer = demo_model()
        >>> batch = next(iter(TextBatches(["One document.", "Another, longer document."], tokenizer)))
        >>> batch["input_ids"].shape, batch["document_id"].tolist()
        (torch.Size([2, 7]), [0, 1])
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        *,
        batch_size: int = 8,
        max_length: int = 256,
        labels: Sequence[Any] | None = None,
    ) -> None:
        if isinstance(texts, str):
            raise TypeError("TextBatches expects an iterable of documents, got one string: put it in a list.")
        special = tokenizer.num_special_tokens_to_add()
        if batch_size < 1 or max_length <= special:
            raise ValueError(
                f"TextBatches expects batch_size >= 1 and max_length > {special} (the tokenizer adds {special} special tokens), "
                f"got {batch_size} and {max_length}."
            )
        if labels is not None and isinstance(texts, Sized) and len(labels) != len(texts):
            raise ValueError(f"TextBatches expects one label a document, got {len(labels)} for {len(texts)}.")
        self.texts, self.tokenizer, self.labels = texts, tokenizer, labels
        self.batch_size, self.max_length = batch_size, max_length
        self.part = (0, 1)  # see DataSource
        self._read = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if isinstance(self.texts, Iterator):
            if self._read:
                raise RuntimeError(
                    "TextBatches reads its documents a second time, but they came from an iterator, which can be read once. "
                    "Give a list, or a reader such as read_text(path)."
                )
            self._read = True
        sequences = self._sequences()
        while chunk := list(islice(sequences, self.batch_size)):
            yield self._batch(chunk)

    def documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each document with what else is known of it, by column."""
        given: Any = (
            self.texts.rows() if isinstance(self.texts, Records) else ((text, {}) for text in self.texts)
        )
        for index, (text, columns) in enumerate(given):
            checked = self._checked(text, index)
            yield checked, columns if self.labels is None else {**columns, "label": self.labels[index]}

    def _sequences(self) -> Iterator[tuple[dict[str, Any], dict[str, list[int]]]]:
        """(what is known of a document, its next sequence), in the order of the text."""
        documents = (
            (text, {"document_id": index * self.part[1] + self.part[0], **columns})
            for index, (text, columns) in enumerate(self.documents())
        )
        documents = (pair for pair in documents if pair[0].strip())
        cut = self._cut_fast if getattr(self.tokenizer, "is_fast", False) else self._cut_slow
        while group := list(islice(documents, self.batch_size)):
            for member, sequence in cut([text for text, _ in group]):
                if sequence["input_ids"]:
                    yield group[member][1], sequence

    def _checked(self, text: object, index: int) -> str:
        if not isinstance(text, str):
            raise TypeError(
                f"TextBatches expects documents that are strings, got {type(text).__name__} at {index}."
            )
        if self.labels is not None and index >= len(self.labels):
            raise ValueError(
                f"TextBatches has {len(self.labels)} labels, but there are more documents than that."
            )
        return text

    def _cut_fast(self, texts: list[str]) -> Iterator[tuple[int, dict[str, list[int]]]]:
        made = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        for row, member in enumerate(made["overflow_to_sample_mapping"]):
            yield member, {name: made[name][row] for name in self._fields(made)}

    def _cut_slow(self, texts: list[str]) -> Iterator[tuple[int, dict[str, list[int]]]]:
        width = self.max_length - self.tokenizer.num_special_tokens_to_add()
        for member, text in enumerate(texts):
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids), width):
                made = self.tokenizer.prepare_for_model(
                    ids[start : start + width], add_special_tokens=True, return_special_tokens_mask=True
                )
                yield member, {name: list(made[name]) for name in self._fields(made)}

    @staticmethod
    def _fields(made: Mapping[str, Any]) -> list[str]:
        return [name for name in ("input_ids", "token_type_ids", "special_tokens_mask") if name in made]

    def _batch(self, chunk: list[tuple[dict[str, Any], dict[str, list[int]]]]) -> dict[str, Any]:
        fields = {name: [sequence[name] for _, sequence in chunk] for name in chunk[0][1]}
        batch: dict[str, Any] = dict(padded(fields, self.tokenizer))
        for name in chunk[0][0]:
            column = [known.get(name) for known, _ in chunk]
            numbers = all(isinstance(one, int | float | np.generic) for one in column)
            batch.setdefault(name, torch.as_tensor(column, device="cpu") if numbers else column)
        return batch
