"""Our distribution and its extras: which optional packages an extra installs, and the command for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import hpo
from hpo.text import quoted

ROOT = Path(hpo.__file__).resolve().parents[1]  # our checkout; site-packages, if `hpo` is installed from a wheel
DISTRIBUTION = "hpo-torch"
FORMER = "hpo"  # an environment of before may still have this one; on the package index it is a stranger's
#: extra -> the packages that it is named for, as they are imported
EXTRAS = {
    "int8": ("torchao",),
    "lightning": ("lightning",),
    "mlflow": ("mlflow",),
    "plots": ("matplotlib",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "soap": ("pytorch_optimizer",),
    "timm": ("timm",),
    "transformers": ("transformers", "accelerate"),
}


def missing(extra: str) -> str | None:
    """Return what an extra's missing packages are and the command that installs them, None if none is missing."""
    absent = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    if not absent:
        return None
    return f"needs {', '.join(absent)}, which is not installed: {install(extra)}"


def require(extra: str) -> None:
    """Raise ImportError if a package of an extra is missing."""
    if (why := missing(extra)) is not None:
        raise ImportError(f"hpo.integrations.{extra} {why}")


def install(extra: str) -> str:
    """Return the command that installs an extra. An editable install stays editable."""
    if not (ROOT / "pyproject.toml").is_file():
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install --constraint {quoted(ROOT / 'constraints.txt')} --editable {quoted(f'{ROOT}[{extra}]')}"
