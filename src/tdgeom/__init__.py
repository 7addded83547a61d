"""tdgeom: the geometry of neural representations, measured by TensorDict modules that compose."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# The public names stand in __init__.pyi. Each is imported when it is first asked for: torch alone takes seconds, and
# `tdgeom --help` needs none of it. With the environment variable EAGER_IMPORT=1 all are imported here.
_load, _, __all__ = lazy_loader.attach_stub(__name__, __file__)

# The room of rows and that of the command line hold these two; their short names are documented and importable.
_SHORT_NAMES = {"text": "tdgeom.rows.text", "demo": "tdgeom.cli.demo"}


def __getattr__(name: str) -> Any:
    if name in _SHORT_NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        importlib.import_module(f"{__name__}.core.pipeline")  # teaches sequences what an optional input is
        return _load(name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SHORT_NAMES})


class _ShortNames:
    """Finds ``tdgeom.text`` and ``tdgeom.demo``, each the very module that it is short for."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, _ShortNames) if package == __name__ and name in _SHORT_NAMES else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        short = module.__name__.rpartition(".")[2]
        sys.modules[module.__name__] = importlib.import_module(_SHORT_NAMES[short])


if not any(getattr(finder, "__name__", None) == _ShortNames.__name__ for finder in sys.meta_path):
    sys.meta_path.append(_ShortNames)
