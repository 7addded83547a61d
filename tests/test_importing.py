"""What an import costs: the names come when they are asked for, in any order, and the help needs no torch."""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import tdgeom as tg

PACKAGE = Path(tg.__file__).parent
STUB = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
LINES = [node for node in STUB.body if isinstance(node, ast.ImportFrom)]
HEAVY = "{'torch', 'tensordict', 'numpy', 'pandas', 'scipy', 'sklearn', 'transformers', 'matplotlib'}"


def python(program, **environment):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_stub_and_all_hold_the_same_names_and_each_is_what_it_says():
    names = [alias.asname for node in LINES for alias in node.names]
    assert tg.__all__ == sorted(names) and len(names) == len(set(names)) > 100
    for node in LINES:
        room = importlib.import_module(f"tdgeom.{node.module}" if node.module else "tdgeom")
        for alias in node.names:
            assert (
                alias.name == alias.asname
            )  # a type checker takes a name of a stub as public only if it is repeated
            assert getattr(tg, alias.name) is getattr(room, alias.name)
    assert tg.text is sys.modules["tdgeom.rows.text"] and tg.demo is sys.modules["tdgeom.cli.demo"]


def test_names_are_listed_completed_documented_and_pickled():
    assert {*tg.__all__, "text", "demo", "__version__", "__doc__"} <= set(dir(tg))
    page = pydoc.plain(pydoc.render_doc(tg))
    assert "class ForEach(" in page and "run(pipeline" in page
    for thing in (tg.run, tg.to_frame, tg.TwoNN, tg.text.TextBatches, tg.FewRowsWarning):
        assert pickle.loads(pickle.dumps(thing)) is thing
    with pytest.raises(AttributeError, match="module 'tdgeom' has no attribute 'Captur'") as caught:
        tg.Captur
    assert caught.value.name == "Captur" and caught.value.obj is tg  # from which Python says: did you mean
    assert not hasattr(tg, "texts")


def test_an_import_loads_nothing_heavy():
    assert python(f"import sys, tdgeom; print({HEAVY} & sys.modules.keys(), tdgeom.__version__)") == (
        f"set() {tg.__version__}\n"
    )


def test_the_help_of_every_command_loads_nothing_heavy():
    program = f"""
import sys, typer
from tdgeom import cli
def commands(group, path=()):
    yield path
    for name, command in getattr(group, "commands", dict()).items():
        yield from commands(command, (*path, name))
every = list(commands(typer.main.get_command(cli.app)))
assert len(every) > 15 and ("runs", "list") in every
for path in every:
    assert cli.main([*path, "--help"]) == 0, path
assert cli.main(["--version"]) == 0
assert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()
"""
    printed = python(program)
    assert printed.count("Usage: tdgeom") > 15 and f"tdgeom {tg.__version__}\n" in printed


# each in a process forked from one that has torch: a fresh import costs little there
FORKED = """
import os, sys, torch, tensordict, pandas, scipy.linalg, scipy.special, sympy
for program in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(program, {})
        except BaseException as error:
            print(program, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
"""


def failures(programs):
    """Those of the programs that fail, each in an interpreter that has torch and nothing of ours."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKED, *programs],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


RUN = "; import inspect; assert inspect.isfunction(tg.run) and tg.run.__module__ == 'tdgeom.run.run'"
ORDERS = [
    # the function is the public name, the room keeps importing
    "import tdgeom as tg; tg.run" + RUN,
    "import tdgeom.run; import tdgeom as tg" + RUN,
    "import tdgeom as tg; tg.run; import tdgeom.run.plan; from tdgeom.run.plan import make_plan" + RUN,
    "import tdgeom.run.plan; import tdgeom as tg; tg.run; from tdgeom.run.plan import make_plan" + RUN,
    "from tdgeom.run.plan import make_plan; from tdgeom import run; import tdgeom as tg; assert tg.run is run"
    + RUN,
    "from tdgeom.run import run; import tdgeom as tg; assert tg.run is run" + RUN,
    "import tdgeom as tg, importlib; importlib.import_module('tdgeom.run.run')" + RUN,
    "import tdgeom as tg; tg.Probing; tg.AnalysisResults" + RUN,
    "import tdgeom as tg; space = {}; exec('from tdgeom import *', space); assert space['run'] is tg.run"
    + RUN,
    "import tdgeom.plot, tdgeom.functional; import tdgeom as tg; assert tg.plot.profile and tg.functional.twonn",
    # a short name is the very module
    "import tdgeom.text, tdgeom.rows.text; assert tdgeom.text is tdgeom.rows.text",
    "import tdgeom.rows.text, tdgeom.text; assert tdgeom.text is tdgeom.rows.text",
    "import tdgeom; t = tdgeom.text; from tdgeom.rows.text import TextBatches; assert t.TextBatches is TextBatches",
    "from tdgeom.text import TextBatches; assert TextBatches.__module__ == 'tdgeom.rows.text'",
    "from tdgeom import demo; import tdgeom.demo, tdgeom.cli.demo; assert demo is tdgeom.demo is tdgeom.cli.demo",
    "import tdgeom.text, sys; assert sys.modules['tdgeom.text'].__spec__.name == 'tdgeom.rows.text'",
    # what is not asked for is not loaded, unless all is
    "import tdgeom as tg, sys; tg.Capture, tg.TwoNN, tg.run; assert not {'transformers', 'sklearn'} & sys.modules.keys()",
    "import os; os.environ['EAGER_IMPORT'] = '1'; import tdgeom; assert {*tdgeom.__all__} <= {*vars(tdgeom)}",
]


@pytest.mark.slow
def test_names_come_in_every_order_and_are_the_same():
    assert failures(ORDERS) == []


@pytest.mark.slow
def test_every_file_can_be_imported_first():
    files = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in files]
    assert len(modules) > 150
    assert failures([f"import {module}" for module in sorted(modules) if "__main__" not in module]) == []


@pytest.mark.slow
def test_a_type_checker_sees_every_name(tmp_path):
    program = tmp_path / "program.py"
    lines = ["import tdgeom as tg", *(f"tg.{name}" for name in tg.__all__)]
    lines += [
        "tg.nothing",
        "reveal_type(tg.run)",
        "reveal_type(tg.TwoNN())",
        "reveal_type(tg.text.TextBatches)",
    ]
    program.write_text("\n".join(lines))
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "--follow-imports=silent", str(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
        cwd=tmp_path,
    ).stdout
    assert "Found 1 error" in found and 'Module has no attribute "nothing"' in found
    assert '"tdgeom.measures.dimension.twonn.TwoNN"' in found and "max_rows" in found
    assert "tdgeom.rows.text.TextBatches" in found


def test_a_sequence_made_of_public_names_knows_optional_inputs_in_a_fresh_process() -> None:
    program = (
        "import tdgeom as tg\n"
        "from tensordict.nn import TensorDictSequential\n"
        "p = TensorDictSequential(tg.RowSample(), tg.SampleMetrics(), tg.TwoNN())\n"
        "assert len(list(p.select_subsequence(in_keys=['sample']).module)) == 2\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
