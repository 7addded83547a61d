"""The table of architectures and kinds, from what the zoo reports; ``python -m model.zoo.table`` in ``tests`` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from model.zoo.checks import Report
from model.zoo.members import MEMBERS, Member

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
CROSS = ["attn_input", "q", "k", "v", "attn_scores", "attn_pattern", "z", "head_output", "attn_output"]
COLUMNS = {
    "stream": ["embed", "residual_input", "residual_output", "final_norm"],
    "mid": ["residual_mid"],
    "inputs": ["attn_norm", "attn_input", "mlp_norm", "mlp_input"],
    "attn_output": ["attn_output"],
    "mlp_output": ["mlp_output"],
    "q k v": ["q", "k", "v"],
    "rotary": ["q_rotary", "k_rotary"],
    "pattern": ["attn_scores", "attn_pattern"],
    "z": ["z"],
    "head_output": ["head_output"],
    "mlp_act": ["mlp_act"],
    "router": ["router_logits"],
    "cross": [f"cross_{kind}" for kind in CROSS],
}
HEAD = """# Architectures

What is read and changed at every kind of site, compared with the model itself for {count} architectures: tiny models with
random weights. A test runs all of it (`pytest -m slow tests/model/zoo`) and fails where a number differs or where this page is
not what it found; `python -m model.zoo.table`, in `tests`, writes the page.

For each architecture: `residual_input` and `residual_output` are the model's own `hidden_states` (or the tensors that hooks on
its blocks see), in both forms, without padding and with padding on either side, where the module form also gives for each row
what the sequence gives alone; `attn_output` and `mlp_output` add up onto the stream (a block of Gemma 4 multiplies the whole
stream by a number at its end), and a constant added to one of them is found there; patterns are those of the model's eager
attention, and weigh the values into `z`; heads sum to `attn_output`; without `z` and `mlp_act` nothing is left of what they are
projected to; router logits negated are the router's weight negated; and an edit is the same edit by a hook, in a plain call and
in cached `generate`.

**yes**: offered, and all of this holds. **part**: some kinds of the column, stacks or layers are refused, the rest holds.
**read**: can be read, edits are refused. **no**: refused, with the reason below. An empty cell: the architecture has no such
thing, or nothing to compare it with.

Columns: *stream* `embed`, `residual_input`, `residual_output`, `final_norm`; *mid* `residual_mid`; *inputs* `attn_norm`,
`attn_input`, `mlp_norm`, `mlp_input`; *rotary* `q_rotary`, `k_rotary`; *pattern* `attn_scores`, `attn_pattern`; *router*
`router_logits`; *cross* the kinds of attention to an encoder; *left*, *right* batches padded there, in the module form;
*generate* edits and captures in cached generation.

"""


def cells(member: Member, report: Report) -> list[str]:
    """One cell a column."""
    absent = {
        kind for kind, said in report.refused.items() if f"has no '{kind}'" in said or "found none" in said
    }
    refused = set(report.refused) - absent
    row = []
    for kinds in COLUMNS.values():
        there, lost = [k for k in kinds if k in report.offered], [k for k in kinds if k in refused]
        if not there:
            row.append("no" if lost else "")
        elif any(f"edit of {k}" in report.refused for k in kinds):
            row.append("read")
        else:
            row.append("part" if lost or any(k in report.partial for k in kinds) else "yes")
    for side in ("left padding", "right padding"):
        row.append("" if not member.masks or not report.compared else "no" if side in refused else "yes")
    generated = [said for said in refused if said.startswith("generate")]
    row.append(
        ""
        if not member.generates or not report.compared
        else "no"
        if len(generated) == 3
        else "part"
        if generated
        else "yes"
    )
    return row


def line(member: Member, report: Report) -> str:
    """The architecture's row."""
    return "| " + " | ".join([member.name, *cells(member, report)]) + " |"


def reasons(report: Report) -> list[str]:
    """What is refused, with the words of the reason."""
    by_words: dict[str, list[str]] = {}
    for what, said in report.refused.items():
        if f"has no '{what}'" not in said:
            by_words.setdefault(key_words(said), []).append(what)
    return [f"{report.name}: {', '.join(whats)}: {words}" for words, whats in by_words.items()]


PHRASES = (
    "the forward pass did not run these modules",
    "runs more than once",
    "does not give for a padded sequence what it gives for that sequence alone",
    "cannot be shown to change which experts are chosen",
    "needs a site with heads",
    "expected repeated blocks",
)


def key_words(said: str) -> str:
    """The reason in a refusal, without paths and numbers.

    >>> key_words("'q' of X is not where its structure says at the layers [0]: its heads, (2, 5), are not 'a.b'. Remedy: y")
    'its heads, (...), are not ...'
    """
    for phrase in PHRASES:
        if phrase in said.lower():
            return phrase
    core = re.split(r"\.?\s+Remedy", said)[0]
    core = re.sub(r"^.*?is not where its structure says( at the layers \[[^]]*\])?: ", "", core)
    core = re.sub(r"'[^']*'", "...", core)
    core = re.sub(r"[\[(][\d, ]+[\])]", "(...)", core)
    core = re.sub(r"\b[A-Z]\w+(For|LM|Model|Encoder)\w*|\b\d[\d.e+-]*\b", "...", core)
    return " ".join(core.replace("|", "/").split()[:24]).rstrip(".")


def page(reports: dict[str, Report]) -> str:
    """The whole page."""
    lines = [HEAD.format(count=len(MEMBERS))]
    for family in dict.fromkeys(member.family for member in MEMBERS):
        names = ["architecture", *COLUMNS, "left", "right", "generate"]
        lines.append(
            f"## {family[0].upper()}{family[1:]}\n\n| {' | '.join(names)} |\n|{' --- |' * len(names)}\n"
        )
        lines += [line(m, reports[m.name]) + "\n" for m in MEMBERS if m.family == family]
        lines.append("\n")
    lines.append("## What is refused\n\n")
    lines += [f"- {said}\n" for member in MEMBERS for said in reasons(reports[member.name])]
    return "".join(lines)


def main() -> None:
    """Run the zoo and write the page."""
    import warnings

    import transformers

    from model.zoo.checks import Zoo

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    reports = {}
    for member in MEMBERS:
        reports[member.name] = Zoo(member).run()
        for wrong in reports[member.name].wrong:
            print(f"{member.name}: {wrong}")
    PAGE.write_text(page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
