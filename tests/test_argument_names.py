"""One idea, one argument name: read from the signatures of everything public, and from the command line's options."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import typer

import models
import tdgeom as tg
from tdgeom import cli, demo, text
from terminal import refused

# the name that no public callable has -> the name of the same idea
OTHER_SPELLINGS = {
    "max_tokens": "max_rows",
    "num_rows": "max_rows",
    "sample_limit": "sample_size",
    "n_samples": "sample_size",
    "seq_len": "max_length",
    "max_len": "max_length",
    "memory_limit": "memory",
    "measures": "metrics",
    "measure_names": "metrics",
    "label_key": "labels",
    "label_name": "labels",
    "n_neighbors": "k",
    "random_state": "seed",
    "show_progress": "progress",
}
# a seed's name that is kept: (where, its name, the name of everything here)
ALIASES = [
    (tg.analyze_model, "max_tokens", "max_rows"),
    (tg.analyze_model, "sample_limit", "sample_size"),
]


def public_callables():
    """Every public function and class, and the public methods of the classes, by dotted name."""
    for module in (tg, tg.functional, tg.plot, text, demo):
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, ModuleType):
                continue
            yield f"{module.__name__}.{name}", thing
            for method in vars(thing) if inspect.isclass(thing) else ():
                if not method.startswith("_") and callable(getattr(thing, method)):
                    yield f"{module.__name__}.{name}.{method}", getattr(thing, method)


def arguments(thing) -> list[str]:
    try:
        return list(inspect.signature(thing).parameters)
    except ValueError:  # an exception class of C
        return []


def test_no_public_callable_has_another_spelling() -> None:
    taken = {name: set(arguments(thing)) for name, thing in public_callables()}
    assert len(taken) > 300 and sum("sites" in own for own in taken.values()) > 10
    wrong = {name: own & set(OTHER_SPELLINGS) for name, own in taken.items() if own & set(OTHER_SPELLINGS)}
    assert not wrong


def test_no_option_of_the_command_line_has_another_spelling() -> None:
    options = {
        (command.name, parameter.name)
        for command in typer.main.get_command(cli.app).commands.values()
        for parameter in command.params
    }
    assert ("analyze", "max_rows") in options and ("compare", "metrics") in options
    wrong = {(name, option) for name, option in options if option in OTHER_SPELLINGS}
    assert wrong == {("analyze", "max_tokens")}


@pytest.mark.parametrize(("function", "alias", "name"), ALIASES)
def test_an_alias_is_documented_accepted_and_refused_beside_its_name(function, alias, name) -> None:
    assert f"``{alias}`` is the seed's name of it" in function.__doc__
    given = {
        "model": models.gpt2(),
        "dataloader": [models.text_batch()],
        "metrics": "sample",
        "progress": False,
    }
    by_name, by_alias = (function(**given, **{word: 20}) for word in (name, alias))
    assert by_alias.metrics.equals(by_name.metrics)
    recorded = {**by_alias.metadata, **by_alias.metadata["settings"]}
    assert recorded[name] == recorded[alias] == 20  # the seed's key is in the metadata too
    with pytest.raises(TypeError, match=f"analyze_model: {alias}= is another name of {name}=; got both"):
        function(**given, **{name: 20, alias: 20})


def test_the_commands_alias(command, folder, text, tmp_path) -> None:
    start = ("analyze", folder, "--text", text, "--metrics", "spectrum")
    assert command(*start, "--max-tokens", 30, "--out", tmp_path / "run")[0] == 0
    assert tg.AnalysisResults.load(tmp_path / "run").metadata["max_rows"] == 30
    both = command(*start, "--max-tokens", 30, "--max-rows", 30)
    assert refused(both, "--max-tokens is another name of --max-rows: give one of them")
