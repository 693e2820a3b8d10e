"""Run something once another package has been imported, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def import_after(package: str, module: str) -> None:
    """Import ``module`` as soon as ``package`` is imported, or now if it already is.

    This is how timm learns our models although ``import torch_meanfield`` needs torch alone and imports no timm.
    """
    if package in sys.modules:
        importlib.import_module(module)
    elif not any(isinstance(f, _After) and (f.package, f.module) == (package, module) for f in sys.meta_path):
        sys.meta_path.insert(0, _After(package, module))


class _After(importlib.abc.MetaPathFinder):
    """Finds ``package`` through the other finders, and has its loader import ``module`` afterwards."""

    def __init__(self, package: str, module: str) -> None:
        self.package, self.module = package, module

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.package:
            return None
        sys.meta_path.remove(self)  # once; and so that the search below does not come back here
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # not installed (yet)
            return None
        spec.loader = _Loader(spec.loader, self.module)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, module: str) -> None:
        self.loader, self.module = loader, module

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # as if this had never been here, for whoever asks the package for its loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.module)
