"""Every architecture of the zoo: what is read and changed is what the model computes, or is refused in words."""

from __future__ import annotations

import pytest
import transformers

from model.zoo.checks import Zoo
from model.zoo.members import MEMBERS
from model.zoo.table import PAGE, line, reasons

QUICK = ("gpt2", "llama", "bert", "vit", "mixtral")
pytestmark = pytest.mark.filterwarnings("ignore")  # libraries announce changes of theirs


def checked(member):
    """The report of an architecture: nothing wrong, and what the page of architectures says."""
    transformers.logging.set_verbosity_error()
    report = Zoo(member).run()
    assert report.wrong == []
    written = PAGE.read_text(encoding="utf-8").splitlines()
    assert line(member, report) in written, (
        "docs/architectures.md is not what was found: python -m model.zoo.table"
    )
    said = [entry[2:] for entry in written if entry.startswith(f"- {member.name}: ")]
    assert reasons(report) == said
    return report


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.name in QUICK], ids=lambda member: member.name)
def test_the_page_of_architectures_is_what_is_found(member):
    checked(member)


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_architecture(member):
    checked(member)


def test_the_zoo_is_large_and_its_names_are_its_own():
    names = [member.name for member in MEMBERS]
    assert len(names) == len(set(names)) >= 100
    assert len({member.family for member in MEMBERS}) >= 9
