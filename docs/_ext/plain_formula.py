"""Formulas as docstrings write them, in plain text that reads well in `help()`, set as MathML, which needs no script.

||XᵀY||²_F / (||XᵀX||_F ||YᵀY||_F)        a norm, superscripts and subscripts in unicode or behind ^ and _
(Σλ)²/Σλ²                                 a tight / divides what touches it, " / " the products on both sides
Σ_{j<k} ln(r_k/r_j), mean_i √(1 - σ_i²)   braces group what they do not show
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀ", "0123456789+−T"))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉ᵢⱼₖₙ₊₋₌", "0123456789ijkn+−="))
SIGNS = {"<=": "≤", ">=": "≥", "->": "→", "-": "−", "!=": "≠"}
WORDS = {  # upright, as functions are
    "ln", "log", "exp", "tr", "rank", "mean", "median", "max", "min", "argmin", "argmax", "sd", "std", "var", "arccos", "cos",
    "sin", "arcsin", "corr", "sign", "floor", "diag", "col", "HSIC", "KL", "RDM", "load", "row",
}  # fmt: skip
ACCENTS = {"̃": "~", "̄": "¯", "̂": "^"}
LARGE = {"Σ": "∑", "Π": "∏"}
UNDER = {"max", "min", "argmin", "argmax", "mean", *LARGE}
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?)|(?P<norm>\|\||‖)|(?P<sign><=|>=|->|!=)"
    r"|(?P<sup>[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀ]+)|(?P<sub>[₀₁₂₃₄₅₆₇₈₉ᵢⱼₖₙ₊₋₌]+)|(?P<word>(?:(?![ΣΠ⁰¹²³⁴⁵⁶⁷⁸⁹ᵀ₀₁₂₃₄₅₆₇₈₉ᵢⱼₖₙ])[^\W\d_][̀-ͯ]?)+)|(?P<other>.)"
)
BETWEEN = set("=≤≥<>≠≈→∝∈+−-±,:") | {"<=", ">=", "->", "!="}


@dataclass
class Token:
    kind: str
    text: str
    spaced: bool  # a space stands before it


@dataclass
class Item:
    """A part of a row: what it looks like, whether a space stands before it, and what it is for fractions."""

    xml: str
    spaced: bool
    kind: str = "atom"  # "atom", "operator", "slash", "group"
    inner: str = ""  # of a group: without its parentheses


def formula_xml(text: str) -> str:
    """The inside of a `<math>` element."""
    rest = tokens(text)
    row = fractions(items(rest, None))
    if rest:
        raise ValueError(f"{text!r} has a {rest[0].text!r} that closes nothing")
    return "".join(item.xml for item in row)


def mathml(text: str, *, display: bool = False) -> str:
    """The whole element; the plain text goes with it, for those who copy it or have it read."""
    kind = ' display="block"' if display else ""
    return f'<math{kind} alttext="{escape(text)}">{formula_xml(text)}</math>'


def tokens(text: str) -> list[Token]:
    """The words of a formula."""
    found, spaced = [], False
    for match in TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        if kind == "space":
            spaced = True
            continue
        parts = [match[0]]
        if (
            kind == "word"
            and match[0] not in WORDS
            and not re.fullmatch(r"[A-Za-z]?[a-z]{2,}|[a-z]+", match[0])
        ):
            parts = re.findall(r".[̀-ͯ]?", match[0])  # a product of matrices
        for number, part in enumerate(parts):
            found.append(Token(kind, part, spaced and number == 0))
        spaced = False
    return found


def items(rest: list[Token], closing: str | None) -> list[Item]:
    """Parts up to the closing sign, which is taken too."""
    row: list[Item] = []
    while rest:
        token = rest[0]
        if (
            closing
            and token.text == closing
            and not (closing in ("|", "||", "‖") and opens(token, rest, row))
        ):
            rest.pop(0)
            return row
        if token.text in (")", "]", "}", "⟩"):
            return row
        rest.pop(0)
        row.append(scripted(atom(token, rest), token, rest))
    if closing:
        raise ValueError(f"a {closing!r} is missing")
    return row


def opens(token: Token, rest: list[Token], row: list[Item]) -> bool:
    """Whether a bar opens another pair within one that is open: behind a space or a sign, before what touches it."""
    after = rest[1] if len(rest) > 1 else None
    behind = token.spaced or not row or row[-1].kind in ("operator", "slash")
    return behind and after is not None and not after.spaced and after.kind in ("word", "other", "norm")


def atom(token: Token, rest: list[Token]) -> Item:
    """One thing that may carry scripts."""
    text, spaced = token.text, token.spaced
    pairs = {"(": ")", "[": "]", "{": "}", "⟨": "⟩", "|": "|", "||": "||", "‖": "‖"}
    if text in pairs:
        inner = "".join(item.xml for item in fractions(items(rest, pairs[text])))
        left, right = ("‖", "‖") if text in ("||", "‖") else (text, pairs[text])
        if text == "{":
            return Item(f"<mrow>{inner}</mrow>", spaced)
        fence = '<mo fence="true" stretchy="{}" form="{}">{}</mo>'
        tall = "true" if text in ("(", "[") else "false"
        return Item(
            f"<mrow>{fence.format(tall, 'prefix', left)}{inner}{fence.format(tall, 'postfix', right)}</mrow>",
            spaced,
            "group" if text == "(" else "atom",
            inner,
        )
    if token.kind == "number":
        return Item(f"<mn>{text}</mn>", spaced)
    if text == "√" or text == "sqrt":
        if not rest:
            raise ValueError("a root of nothing")
        under = atom(rest[0], rest_after(rest))
        if under.kind != "group":
            under = scripted(under, Token("other", "", False), rest)
        return Item(f"<msqrt>{under.inner or under.xml}</msqrt>", spaced)
    if text in LARGE:
        return Item(f'<mo largeop="true" movablelimits="false">{LARGE[text]}</mo>', spaced)
    if token.kind == "word":
        return Item(word(text), spaced)
    if text == "/":
        return Item("<mo>/</mo>", spaced or bool(rest and rest[0].spaced), "slash")
    if text in BETWEEN:
        return Item(f"<mo>{escape(SIGNS.get(text, text))}</mo>", spaced, "operator")
    return Item(f"<mo>{escape(text)}</mo>", spaced, "times" if text in "·×∘" else "atom")


def rest_after(rest: list[Token]) -> list[Token]:
    """The list itself, its first one taken."""
    rest.pop(0)
    return rest


def word(text: str) -> str:
    """A variable in italics, a function upright, or words of the language."""
    if text in WORDS:
        return f'<mi mathvariant="normal">{text}</mi><mspace width="0.17em"/>'
    if len(text) == 1:
        return f"<mi>{text}</mi>"
    if len(text) == 2 and text[1] in ACCENTS:
        return f'<mover accent="true"><mi>{text[0]}</mi><mo stretchy="false">{ACCENTS[text[1]]}</mo></mover>'
    return f"<mtext>&#160;{escape(text)}&#160;</mtext>"


def scripted(base: Item, token: Token, rest: list[Token]) -> Item:
    """What stands behind it in small."""
    below, above = "", ""
    while rest and not rest[0].spaced:
        following = rest[0]
        if following.kind == "sup":
            above += small("".join(SUPERSCRIPTS[sign] for sign in rest.pop(0).text))
        elif following.kind == "sub":
            below += small("".join(SUBSCRIPTS[sign] for sign in rest.pop(0).text))
        elif following.text == "'":
            rest.pop(0)
            above += "<mo>′</mo>"
        elif following.text in ("_", "^") and len(rest) > 1:
            rest.pop(0)
            script = index(rest)
            below, above = (below + script, above) if following.text == "_" else (below, above + script)
        else:
            break
    if not below and not above:
        return base
    body, name = base.xml.replace('<mspace width="0.17em"/>', ""), token.text
    gap = '<mspace width="0.17em"/>' if name in WORDS else ""
    low, high = f"<mrow>{below}</mrow>", f"<mrow>{above}</mrow>"
    if name in UNDER and below:
        made = f"<munderover>{body}{low}{high}</munderover>" if above else f"<munder>{body}{low}</munder>"
    elif below and above:
        made = f"<msubsup>{body}{low}{high}</msubsup>"
    else:
        made = f"<msub>{body}{low}</msub>" if below else f"<msup>{body}{high}</msup>"
    # a mean over i is of the whole fraction behind it, while a sum may be its numerator
    kind = "operator" if name in UNDER and name not in LARGE and below else "atom"
    return Item(made + gap, base.spaced, kind)


def small(text: str) -> str:
    """The letters and digits of a script."""
    return "".join(
        f"<mn>{part}</mn>"
        if part[0].isdigit()
        else f"<mo>{part}</mo>"
        if not part[0].isalpha()
        else f"<mtext>{part}</mtext>"
        if len(part) > 2
        else "".join(f"<mi>{letter}</mi>" for letter in part)
        for part in re.findall(r"\d+|[^\W\d_]+|.", text)
    )


def index(rest: list[Token]) -> str:
    """What `_` or `^` takes: a group without its braces or parentheses, or letters and digits that touch."""
    first = rest[0]
    if first.text in ("{", "("):
        inner = atom(rest.pop(0), rest)
        return inner.inner or inner.xml
    taken = rest.pop(0).text
    while (
        rest
        and not rest[0].spaced
        and rest[0].kind in ("number", "word")
        and first.kind in ("number", "word")
    ):
        taken += rest.pop(0).text
    return small(SIGNS.get(taken, taken)) if taken != "-" else f"<mo>−</mo>{index(rest)}"


def fractions(row: list[Item]) -> list[Item]:
    """Divide: tight slashes first, then those with spaces."""
    for spaced in (False, True):
        at = next((i for i, item in enumerate(row) if item.kind == "slash" and item.spaced == spaced), None)
        while at is not None:
            first, last = at, at + 1
            kinds = ("atom", "group", "times") if spaced else ("atom", "group")
            while first > 0 and row[first - 1].kind in kinds:
                first -= 1
                if not spaced and row[first].spaced:
                    break
            while last < len(row) and row[last].kind in kinds:
                if not spaced and last > at + 1 and row[last].spaced:
                    break
                last += 1
            if first == at or last == at + 1:
                raise ValueError("a / with nothing on one side")
            parts = (bare(row[first:at]), bare(row[at + 1 : last]))
            made = Item(f"<mfrac><mrow>{parts[0]}</mrow><mrow>{parts[1]}</mrow></mfrac>", row[first].spaced)
            row = [*row[:first], made, *row[last:]]
            at = next(
                (i for i, item in enumerate(row) if item.kind == "slash" and item.spaced == spaced), None
            )
    return row


def bare(part: list[Item]) -> str:
    """The inside of one pair of parentheses, or all there is."""
    return part[0].inner if len(part) == 1 and part[0].kind == "group" else "".join(item.xml for item in part)


def entries(lines: list[str]) -> list[tuple[str, str, str]]:
    """The lines of a Formula section: name (or nothing), formula, and what is said behind a semicolon."""
    joined: list[str] = []
    for line in lines:
        if line.startswith(" ") and joined:
            joined[-1] += f" {line.strip()}"
        elif line.strip():
            joined.append(line.strip())
    found = []
    for line in joined:
        formula, _, said = line.partition("; ")
        named = re.fullmatch(r"(?!\w_\w )([a-z]\w+(?:, [a-z]\w+)*) = (.+)", formula)  # d_i is no name
        name, formula = (named[1], f"= {named[2]}") if named and named[1] not in WORDS else ("", formula)
        found.append((name, formula, said))
    return found


def section(lines: list[str]) -> list[str]:
    """A Formula section as Markdown: one table-like block, a row a formula."""
    made = ['<div class="formulas">']
    for name, formula, said in entries(lines):
        label = f'<code class="formula-name">{escape(name)}</code>' if name else ""
        note = f'<div class="formula-note">{prose(said)}</div>' if said else ""
        made.append(f'<div class="formula">{label}{mathml(formula, display=True)}{note}</div>')
    return [*made, "</div>"]


def prose(text: str) -> str:
    """What is said beside a formula, as HTML: of what stands in double backticks names are code, and formulas are set."""
    parts = text.split("``")
    for i, part in enumerate(parts):
        name = re.fullmatch(r"\w{3,}", part)
        parts[i] = escape(part) if i % 2 == 0 else f"<code>{escape(part)}</code>" if name else mathml(part)
    return "".join(parts)
