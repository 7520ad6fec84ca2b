"""Lets `import timm` work where torchvision is missing: timm's models need none of it, its data loading does.

torchvision comes in builds for one torch each, and there is none for some torch in use here. Every class asked of the stub is
an empty one, enough for timm's `isinstance` checks and base classes; nothing that a model computes comes from it.
"""

import enum
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.InterpolationMode = InterpolationMode
        module.__getattr__ = self.empty_class
        return module

    def exec_module(self, module):
        pass

    @staticmethod
    def empty_class(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_timm():
    """timm, with the stub standing in for a missing torchvision only while timm is imported; ImportError without timm."""
    missing = importlib.util.find_spec("torchvision") is None
    if missing:
        sys.meta_path.insert(0, StubFinder())
    try:
        import timm
    finally:
        if missing:
            sys.meta_path.pop(0)
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    return timm
