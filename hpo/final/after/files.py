"""A model as a file that others read: torch.export's .pt2 and ONNX, each loaded back and held against the model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from hpo.errors import StudyError
from hpo.final.after import onnxrun
from hpo.final.after.deployed import Deployed
from hpo.final.after.extras import need, quietly

RECEIPT = "hpo_receipt"  # the key under which a file carries what it was made from
INPUT, OUTPUT = "images", "logits"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in messages of torch's
TOLERANCE = 1e-4  # of the largest logit, for a model in float32
COARSE_TOLERANCE = 5e-2  # in 16 and 8 bits, where another order of sums moves a value by a whole step


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written and found to give the model's own logits."""

    file: str
    format: str
    bytes: int
    sha256: str
    images: int  # that it was compared on
    largest_difference: float  # of a logit


Receipt = Mapping[str, Any]
Batches = Sequence[Tensor]
Write = Callable[[ExportedProgram, Path, Receipt, Batches], Batches]


def pt2(program: ExportedProgram, path: Path, receipt: Receipt, batches: Batches) -> Batches:
    """Write `torch.export.save`'s archive, the receipt beside the program; return what the file makes of the batches."""
    torch.export.save(program, path, extra_files={RECEIPT: json.dumps(receipt)})
    loaded = torch.export.load(path).module()
    return [loaded(images) for images in batches]


def onnx(program: ExportedProgram, path: Path, receipt: Receipt, batches: Batches) -> Batches:
    """Write ONNX with the batch size free and the receipt as metadata; return what onnxruntime makes of the batches."""
    made = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert made is not None
    made.model.metadata_props[RECEIPT] = json.dumps(receipt)
    made.save(path)
    return _run_by_onnxruntime(path, batches)


def _run_by_onnxruntime(path: Path, batches: Batches) -> Batches:
    """Return the logits of each batch, found in a process of its own; RuntimeError if that fails or crashes."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = f"{folder}/given.npz", f"{folder}/found.npz"
        arrays: dict[str, Any] = {str(index): images.numpy() for index, images in enumerate(batches)}
        np.savez(given, **arrays)
        command = [sys.executable, "-P", onnxrun.__file__, str(path), given, found]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            raise RuntimeError(f"onnxruntime crashes on the file ({signal.Signals(-done.returncode).name})")
        if done.returncode:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        with np.load(found) as logits:
            return [torch.from_numpy(logits[str(index)]) for index in range(len(batches))]


FORMATS: dict[str, Write] = {"pt2": pt2, "onnx": onnx}
EXTRA_OF = {"onnx": "onnx"}  # format -> the extra of ours that it needs


@torch.no_grad()
def export(model: Deployed, images: Tensor, path: Path, receipt: Receipt, *, is_coarse: bool) -> Exported:
    """Write the model, which is on the CPU, in the format that the path's suffix names, and compare it on raw images.

    The graph takes any number of images. Raises StudyError if torch cannot export the model, if the format lacks one of its
    operations, or if the file gives other logits; nothing is left at the path then.

    Args:
        images: raw, at least 2, on the CPU.
        is_coarse: the model does not compute in float32 alone.
    """
    kind = path.suffix[1:]
    part = path.with_name(f"part.{os.getpid()}.{path.name}")
    try:
        with quietly():
            program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: Dim("batch")},))
            # A batch of one as well: a graph may have taken the size of its example for a constant.
            found = torch.cat(list(FORMATS[kind](program, part, receipt, [images[:1], images[1:]])))
    except Exception as error:  # torch.export, the exporter and the runtimes tell in many types what they lack
        part.unlink(missing_ok=True)
        told = _told(error).replace(str(part), path.name)
        raise StudyError(
            f"{path.name}: {kind} cannot hold this model: {told}; export it in another format or number type"
        ) from error
    expected = model(images)
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    allowed = (COARSE_TOLERANCE if is_coarse else TOLERANCE) * max(1.0, largest)
    if not difference <= allowed:
        part.unlink()
        raise StudyError(
            f"{path.name}: gives logits that differ by {difference:.3g} from the model's, more than {allowed:.3g}; not kept"
        )
    os.replace(part, path)
    return Exported(
        file=path.name,
        format=kind,
        bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        images=len(images),
        largest_difference=difference,
    )


def check(formats: list[str]) -> None:
    """Raise Fault if a format needs packages that are not here."""
    for one in formats:
        if one in EXTRA_OF:
            need(EXTRA_OF[one], f"--export {one}")


def _told(error: BaseException) -> str:
    """Return what is at the bottom of an exception, in a line: torch's exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in COLOUR.sub("", str(error)).splitlines()]
    return f"{type(error).__name__}: {next(filter(None, lines), '')[:400]}"
