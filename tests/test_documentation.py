"""The site's own machinery: formulas that are set, pages that hold all they should, measurements that can be made again."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import typer

import tdgeom
from tdgeom import functional

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
import plain_formula  # noqa: E402


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_looks(text: str) -> str:
    """MathML as nested names and texts: what is set, not how wide its spaces are."""

    def told(element) -> str:
        if element.tag == "mspace":
            return ""
        inner = "".join(told(child) for child in element) or (element.text or "").strip()
        return (
            inner if element.tag in ("mi", "mn", "mo", "mtext", "math", "mrow") else f"{element.tag}({inner})"
        )

    return told(
        ElementTree.fromstring(f"<math>{plain_formula.formula_xml(text)}</math>".replace("&#160;", " "))
    )


@pytest.mark.parametrize(
    "plain, set_",
    [
        ("(Σλ)²/Σλ²", "mfrac(msup((∑λ)2)∑msup(λ2))"),
        ("a/b c", "mfrac(ab)c"),
        ("a b / c d", "mfrac(abcd)"),
        ("1 - x/(n-1)", "1−mfrac(xn−1)"),
        ("||XᵀY||²_F", "msubsup(‖msup(XT)Y‖F2)"),
        ("||A||_F ||B||_F", "msub(‖A‖F)msub(‖B‖F)"),
        ("|x_i - x_j|²", "msup(|msub(xi)−msub(xj)|2)"),
        ("Σ_{j<k} ln(r_k/r_j)", "munder(∑j<k)ln(mfrac(msub(rk)msub(rj)))"),
        ("mean_i √(1 - σ_i²)", "munder(meani)msqrt(1−msubsup(σi2))"),
        ("μ^(-d)", "msup(μ−d)"),
        ("λ₁", "msub(λ1)"),
        ("HSIC₁(K, L)", "msub(HSIC1)(K,L)"),
        ("r_2k", "msub(r2k)"),
        ("w'_ij", "msubsup(wij′)"),
        ("x̄ - x", "mover(x¯)−x"),
        ("a <= b", "a≤b"),
        ("(S + αI)⁻¹Wh₂", "msup((S+αI)−1)Wmsub(h2)"),
        ("mean of Rows", "meanofRows"),
        ("mean_i a / b", "munder(meani)mfrac(ab)"),
        ("Σ a / Σ b", "mfrac(∑a∑b)"),
    ],
)
def test_formulas_are_set_as_they_read(plain, set_):
    assert without_looks(plain) == set_


@pytest.mark.parametrize("broken", ["(a", "a)", "||X", "a /", "√"])
def test_a_formula_that_is_none_is_an_error(broken):
    with pytest.raises(ValueError):
        plain_formula.formula_xml(broken)


def formula_sections() -> dict[str, list[str]]:
    found = {}
    for module in (tdgeom, functional):
        for name in module.__all__:
            obj = getattr(module, name)
            text = (
                inspect.cleandoc(obj.__doc__ or "") if inspect.isclass(obj) or inspect.isroutine(obj) else ""
            )
            section = re.search(r"^Formula:\n((?: +.*\n|\n(?= ))+)", text + "\n", re.MULTILINE)
            if section:
                found[name] = inspect.cleandoc("\n" + section[1]).splitlines()
    return found


def test_every_formula_of_a_docstring_can_be_set():
    sections = formula_sections()
    assert len(sections) > 30
    for name, lines in sections.items():
        for label, formula, said in plain_formula.entries(lines):
            assert plain_formula.formula_xml(formula), (name, label)
            assert plain_formula.prose(said) or not said


def test_names_stand_before_the_formula_and_variables_in_it():
    lines = ["d_pr = a/b; said", "d_i = c", "kl = p - q;", "    further"]
    assert plain_formula.entries(lines) == [
        ("d_pr", "= a/b", "said"),
        ("", "d_i = c", ""),
        ("kl", "= p - q", "further"),
    ]


def test_the_prose_of_a_formula_is_text_and_no_markup():
    assert plain_formula.prose("a < b & ``k_used``") == "a &lt; b &amp; <code>k_used</code>"


def test_every_question_of_the_start_page_leads_somewhere():
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    table = page.split("## Which piece do I need?")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"\]\(\w[^)]*\)|\{py:obj\}|\{doc\}", row), row


def test_every_measure_by_name_has_a_page():
    from tdgeom.measures.registry import known_measures

    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "measures").glob("*.md"))
    named = set(re.findall(r"\w+", pages))
    missing = {
        name for name in known_measures() if name not in named and name.removesuffix("_ba") not in named
    }
    missing -= {"cka", "spectrum", "sample", "novelty", "router"}  # groups
    assert not missing


def test_every_command_and_option_is_in_the_reference():
    from command_reference import chapter, commands

    from tdgeom.cli.app import app

    found = dict(commands(typer.main.get_command(app)))
    assert {"tdgeom analyze", "tdgeom runs list", "tdgeom diff"} <= set(found)
    for name, command in found.items():
        text = "\n".join(chapter(name, command))
        for option in command.params:
            assert option.help, (name, option.name)
            if option.param_type_name == "option":
                assert all(one in text for one in option.opts), (name, option.opts)


def test_the_index_for_assistants_names_pages_that_there_are():
    text = (DOCS / "llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([\w/]+)\.html\)", text)
    assert len(links) > 30
    assert not [link for link in links if not (DOCS / f"{link}.md").is_file()]


def test_links_sizes_and_requests_of_a_site_are_looked_at(tmp_path):
    from whole_site import LARGEST, faults

    (tmp_path / "a.html").write_text('<h1 id="top">a</h1><a href="b.html#there">b</a><a href="#top">t</a>')
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="https://example.org">out</a>')
    assert faults(tmp_path) == []
    (tmp_path / "b.html").write_text(
        '<script src="https://example.org/x.js"></script><a href="c.html">c</a>' + " " * LARGEST
    )
    found = "\n".join(faults(tmp_path))
    for words in ("#there, an anchor", "c.html, which is no file", "from elsewhere", "split it"):
        assert words in found


measuring = module_of(ROOT / "tests" / "benchmarks" / "rows_needed.py")
MEASURED = json.loads((DOCS / "measures" / "measured.json").read_text(encoding="utf-8"))["rows"]


def same_again(name: str, rows: list[int]) -> None:
    again = measuring.curve(name, rows=rows)
    for key, one in again.items():
        held = {point[0]: point[1:] for point in MEASURED[name][key]["points"]}
        for n, *values in one["points"]:
            assert values == pytest.approx(held[n], rel=2e-3, abs=2e-3), (name, key, n)


def test_the_curves_are_of_all_that_is_measured():
    assert set(MEASURED) == set(measuring.experiments())
    for path in (DOCS / "measures").glob("*.md"):
        for name in re.findall(r"<!-- rows: (.*?) -->", path.read_text(encoding="utf-8")):
            assert name in MEASURED, path.name


@pytest.mark.parametrize("name", ["spectrum", "linear_cka, related", "ratios", "router", "labels"])
def test_a_measured_curve_can_be_made_again(name):
    same_again(name, measuring.experiments()[name][1][:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MEASURED))
def test_every_measured_curve_can_be_made_again(name):
    same_again(name, measuring.experiments()[name][1][:4])
