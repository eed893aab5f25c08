"""Work that waits until a module is imported, so that importing retention does not import it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Finder(MetaPathFinder):
    """Finds one module as all other finders do, and acts once it was executed."""

    def __init__(self, module: str, action: Callable[[], None]):
        self.module = module
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        spec = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]  # of this one
        return spec


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Calls ``action`` right after the first import of ``module``: now, if that is past."""
    if module in sys.modules:
        action()
    else:
        # Never removed: another thread may be on its way through the list.
        sys.meta_path.insert(0, _Finder(module, action))
