"""What the pages of docs/measures take from elsewhere, so that nothing on them can drift from it.

<!-- measure: linear_cka; LinearCKA -->      the docstring's definition of the first name, and where to find all of them
<!-- rows: linear_cka, unrelated -->         estimates against rows, as tests/benchmarks/rows_needed.py measured them
<!-- layers: d_pr | d_entropy -->            lines over MiniLM's layers, from the same file
<!-- matrices: linear_cka, rbf_cka -->       layer x layer
<!-- agrees: linear_cka, rbf_cka -->         the rows of tests/peers.py, which tests/test_peers.py holds true
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from api_reference import escaped, link, markdown
from small_charts import heat_map, line_chart, shown
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import tdgeom
from tdgeom import functional

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import peers  # noqa: E402

MARK = re.compile(r"<!-- (measure|rows|layers|matrices|agrees): (.*?) -->")
MEASURED = ROOT / "docs" / "measures" / "measured.json"
TOOLS = {
    "dadapy": "DADApy",
    "closed_form": "NumPy and SciPy, written out",
    "repsim": "repsim",
    "representation-geometry": "representation-geometry",
}
DATA = (
    "Every row is a test. `layers` are four synthetic layers of the same 600 rows, `x` and `y` the first two, `a` and `b` the "
    "three consecutive pairs; `F` is `tdgeom.functional`; `within` is the relative difference."
)
LEFT_OUT = ("Args:", "Raises:", "Attributes:")
NOT_A_DEFINITION = re.compile(r"(Args, |Args and |Arguments|Reads ``|Writes ``|For the other arguments)")


@cache
def measured() -> dict[str, Any]:
    """The committed measurements."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def listed(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def public(name: str) -> tuple[str, Any]:
    """A function of tdgeom.functional or a name of the top level, and where it is found."""
    for place, module in (("", tdgeom), ("functional.", functional)):
        if name in module.__all__:
            return f"{place}{name}", getattr(module, name)
    raise ExtensionError(f"docs/measures names {name}, which tdgeom has not")


def definition(docstring: str) -> str:
    """A docstring without its arguments, errors, keys and examples: what is computed, its range, invariances, bias, papers."""
    kept, leaving = [], False
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        inside = paragraph.startswith(" ")  # of the section before
        if not inside:
            leaving = paragraph.startswith(LEFT_OUT) or bool(NOT_A_DEFINITION.match(paragraph))
        if not leaving and not paragraph.lstrip().startswith(">>>"):
            kept.append(paragraph)
    return markdown("\n\n".join(kept))


def measure(text: str) -> str:
    """One entry: its name, definition, and links to the signatures."""
    source, _, further = text.partition(";")
    name, obj = public(source.strip())
    title, others = name.rpartition(".")[2], [public(other)[0] for other in listed(further)]
    title = next((other for other in others if "_from_" in title or title.endswith("_of")), title).rpartition(
        "."
    )[2]
    found = ", ".join(
        f"{link(one)} ({'stage' if inspect.isclass(public(one.rpartition('.')[2])[1]) else 'function'})"
        for one in (name, *others)
    )
    return "\n".join(
        [f"### `{title}`", "", definition(obj.__doc__ or ""), "", f"Signature, arguments, keys: {found}.", ""]
    )


def reached(points: list[list[float]], truth: float, within: float) -> str:
    """The fewest rows from which on the mean stays within a share of the truth (of 1, where the truth is 0)."""
    size = abs(truth) or 1.0
    far = [n for n, mean, *_ in points if abs(mean - truth) > within * size]
    after = [n for n, *_ in points if not far or n > max(far)]
    return f"{int(after[0]):,}" if after else f"more than {int(points[-1][0]):,}"


def unsettled(points: list[list[float]]) -> bool:
    """Whether the last doubling of rows still moved the mean by more than 2 %, and beyond the spread of the data sets."""
    (_, before, *_), (_, last, low, high) = points[-2:]
    return abs(last - before) > 0.02 * abs(last) and not low <= before <= high


def rows(name: str) -> str:
    """A chart and a table of one curve."""
    curves = measured()["rows"][name]
    lines = {key: [(n, mean) for n, mean, *_ in one["points"]] for key, one in curves.items()}
    bands = {key: [(n, low, high) for n, _, low, high in one["points"]] for key, one in curves.items()}
    truths = {key: one["truth"] for key, one in curves.items() if one["exact"]}
    chart = line_chart(
        lines, title=f"Estimates against the number of rows: {name}", x_title="rows", y_title="estimate", bands=bands,
        truths=truths, log_y=max(max(y for _, y in points) for points in lines.values()) > 60,
    )  # fmt: skip
    table = ["| | truth | within 10 % from rows | within 2 % from rows |", "|---|---|---|---|"]
    for key, one in curves.items():
        truth = shown(one["truth"]) + ("" if one["exact"] else f", at {int(one['points'][-1][0]):,} rows")
        if not one["exact"] and unsettled(one["points"]):
            table.append(f"| `{key}` | {truth} | has not settled | |")
            continue
        table.append(
            f"| `{key}` | {truth} | {reached(one['points'], one['truth'], 0.1)} | {reached(one['points'], one['truth'], 0.02)} |"
        )
    note = "Lines: means over ten data sets; shaded: their 10 % to 90 % quantiles; dashed: the truth, where it has a closed form."
    return (
        f'<figure class="measured">{chart}<figcaption>{note}</figcaption></figure>\n\n'
        + "\n".join(table)
        + "\n"
    )


def short(site: str) -> str:
    """A site's name on an axis."""
    return site.replace("residual_output.", "layer ")


def layers(text: str) -> str:
    """Lines over depth."""
    held, names = measured()["layers"], [name.strip() for name in text.split("|")]
    lines = {name: list(enumerate(held["lines"][name])) for name in names}
    high = max(y for points in lines.values() for _, y in points)
    low = min(y for points in lines.values() for _, y in points)
    chart = line_chart(
        lines, title="Over the layers of MiniLM", x_title="2,000 tokens at each layer of all-MiniLM-L6-v2", y_title="",
        x_labels=[site.rpartition(".")[2] for site in held["sites"]], log_y=low > 0 and high > 8 * low,
    )  # fmt: skip
    return f'<figure class="measured">{chart}</figure>\n'


def matrices(text: str) -> str:
    """Heat maps, layer by layer."""
    held = measured()["layers"]
    sites = [site.rpartition(".")[2] for site in held["sites"]]
    maps = "".join(heat_map(held["tables"][name], sites, title=name) for name in listed(text))
    note = "The layers of all-MiniLM-L6-v2 beside one another, 500 tokens; the fuller the colour, the larger the number."
    return f'<figure class="measured matrices">{maps}<figcaption>{note}</figcaption></figure>\n'


def agrees(text: str) -> str:
    """Whose numbers these are, too."""
    wanted, known = set(listed(text)), peers.tools()
    rows_of = [peer for peer in peers.PEERS if peer.measure in wanted]
    if not rows_of:
        raise ExtensionError(f"tests/peers.py has no row for any of {text}")
    said = any(peer.note for peer in rows_of)
    table = ["| tool | its call | ours | within |" + " |" * said, "|---|---|---|---|" + "---|" * said]
    for peer in rows_of:
        tool = f"{TOOLS.get(peer.tool, peer.tool)} {peers.version(peer.tool, known)}".strip()
        ours, within = peer.ours.replace("|", "\\|"), f"10⁻{'⁰¹²³⁴⁵⁶⁷⁸⁹'[round(-math.log10(peer.tolerance))]}"
        table.append(f"| {tool} | {escaped(peer.theirs)} | `{ours}` | {within} |" + f" {peer.note} |" * said)
    return f"{DATA}\n\n" + "\n".join(table) + "\n"


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put everything where a page asks for it."""
    made = {"measure": measure, "rows": rows, "layers": layers, "matrices": matrices, "agrees": agrees}
    if docname.startswith("measures/"):
        source[0] = MARK.sub(lambda found: made[found[1]](found[2]), source[0])


def always_read(app: Sphinx, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """These pages depend on docstrings, measurements and tests."""
    return [name for name in env.found_docs if name.startswith("measures/")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
    app.connect("env-get-outdated", always_read)
    return {"parallel_read_safe": True}
