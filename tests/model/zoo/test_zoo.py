"""Every architecture of the zoo: what is read and changed is what the model computes, or is refused in words."""

from __future__ import annotations

import pytest
import transformers

from model.zoo.checks import Zoo
from model.zoo.members import MEMBERS

QUICK = ("gpt2", "llama", "bert", "vit", "mixtral")
pytestmark = pytest.mark.filterwarnings("ignore")  # libraries announce changes of theirs


def checked(member):
    """The report of an architecture, with nothing wrong in it."""
    transformers.logging.set_verbosity_error()
    report = Zoo(member).run()
    assert report.wrong == []
    return report


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.name in QUICK], ids=lambda member: member.name)
def test_a_common_architecture(member):
    report = checked(member)
    assert report.compared and {"residual_output", "attn_output", "mlp_output", "z", "attn_pattern"} <= set(
        report.offered
    )


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_architecture(member):
    checked(member)


def test_the_zoo_is_large_and_its_names_are_its_own():
    names = [member.name for member in MEMBERS]
    assert len(names) == len(set(names)) >= 100
    assert len({member.family for member in MEMBERS}) >= 9
