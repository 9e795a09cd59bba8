"""Export of models to torch.export's .pt2 and to ONNX. Each file is loaded again and compared with the model."""

from __future__ import annotations

import hashlib
import json
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

from hpo import data
from hpo.data import each
from hpo.errors import StudyError
from hpo.files import atomic_write
from hpo.final.after import onnxrun
from hpo.final.after.deployed import Deployed
from hpo.final.after.extras import quietly
from hpo.final.after.raw import named, rows
from hpo.final.after.steps import refuse_missing
from hpo.train.inputs import Batch

RECEIPT = "hpo_receipt"  # the key of the receipt in a file
LOGITS, PREDICTIONS = "logits", "predictions"  # names of an ONNX file's output, the second one for a regression
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # terminal colours in torch's messages
TOLERANCE = 1e-4  # of the largest logit or standardised prediction, for a model in float32
ROUNDING = 4 * torch.finfo(torch.float32).eps  # of a prediction in original units
COARSE_TOLERANCE = 5e-2  # for 16 and 8 bits, where another order of sums changes a value by a whole step


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported file whose outputs agree with the model's."""

    file: str
    format: str
    bytes: int
    sha256: str
    images: int  # number of rows it was compared on
    largest_difference: float  # of all outputs


Receipt = Mapping[str, Any]
Outputs = Sequence[Tensor]
Batches = Sequence[Batch]
Write = Callable[[ExportedProgram, Path, Receipt, Batches], Outputs]


def pt2(program: ExportedProgram, path: Path, receipt: Receipt, batches: Batches) -> Outputs:
    """Write a `torch.export.save` archive with the receipt. Return the outputs of the loaded file for each batch."""
    torch.export.save(program, path, extra_files={RECEIPT: json.dumps(receipt)})
    loaded = torch.export.load(path).module()
    return [loaded(inputs) for inputs in batches]


def onnx(program: ExportedProgram, path: Path, receipt: Receipt, batches: Batches) -> Outputs:
    """Write ONNX with a dynamic batch size and the receipt as metadata. Return onnxruntime's outputs for each batch."""
    output = PREDICTIONS if receipt.get("task") == "regression" else LOGITS
    names = list(named(batches[0], _input_name(batches[0])))
    made = torch.onnx.export(program, dynamo=True, input_names=names, output_names=[output], verbose=False)
    assert made is not None
    made.model.metadata_props[RECEIPT] = json.dumps(receipt)
    made.save(path)
    return _run_by_onnxruntime(path, batches)


def _input_name(inputs: Batch) -> str:
    """Return the name of an ONNX file's input, if it has one alone."""
    return "images" if data.some(inputs).ndim == 4 else "inputs"


def _run_by_onnxruntime(path: Path, batches: Batches) -> Outputs:
    """Return the outputs of each batch, computed in another process; RuntimeError if it fails or crashes."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = f"{folder}/given.npz", f"{folder}/found.npz"
        arrays: dict[str, Any] = {
            f"{index} {name}": one.numpy()
            for index, inputs in enumerate(batches)
            for name, one in named(inputs, _input_name(inputs)).items()
        }
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
def export(model: Deployed, inputs: Batch, path: Path, receipt: Receipt, *, is_coarse: bool) -> Exported:
    """Write the model in the format of the path's suffix and compare the file with the model.

    The exported graph takes any batch size.

    Args:
        model: the model, on the CPU.
        inputs: raw inputs of N >= 2 rows, on the CPU.
        path: the file to write.
        receipt: stored in the file.
        is_coarse: whether the model computes in 16 or 8 bits.

    Raises StudyError if the format's extra is not installed, if torch cannot export the model, if the format lacks an operation,
    or if the outputs differ. No file is left then.
    """
    kind = path.suffix[1:]
    refuse_missing(EXTRA_OF.get(kind), f"--export {kind}")
    with atomic_write(path) as part:
        found = _written(kind, model, inputs, part, path.name, receipt)
        expected = model(inputs)
        difference = (found - expected).abs()
        largest = ((expected - model.origin) / model.unit).abs().max().item()
        allowed = (COARSE_TOLERANCE if is_coarse else TOLERANCE) * max(1.0, largest) * model.unit
        if not bool((difference <= allowed + ROUNDING * expected.abs()).all()):
            raise StudyError(
                f"{path.name}: its outputs differ from the model's by {difference.max():.3g}, more than {allowed.max():.3g}; the "
                "file was removed; export it in another format or number type"
            )
    return Exported(
        file=path.name,
        format=kind,
        bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        images=len(expected),
        largest_difference=difference.max().item(),
    )


def _written(kind: str, model: Deployed, inputs: Batch, part: Path, name: str, receipt: Receipt) -> Tensor:
    """Write the model to the file `part`, and return the file's outputs.

    Args:
        kind: the format.
        model: the model, on the CPU.
        inputs: raw inputs.
        part: the temporary file.
        name: the final file name, for messages.
        receipt: stored in the file.
    """
    try:
        with quietly():
            batch = Dim("batch")
            shapes = each(inputs, lambda _: {0: batch})
            program = torch.export.export(model, (rows(inputs, slice(2)),), dynamic_shapes=(shapes,))
            # A batch of one is tried too, since a graph may treat the example's batch size as a constant.
            return torch.cat(
                list(FORMATS[kind](program, part, receipt, [rows(inputs, slice(1)), rows(inputs, slice(1, None))]))
            )
    except Exception as error:  # torch.export, the exporter and the runtimes raise many types
        told = _told(error).replace(str(part), name)
        raise StudyError(
            f"{name}: {kind} cannot hold this model: {told}; export it in another format or number type"
        ) from error


def _told(error: BaseException) -> str:
    """Return the root cause of an exception in one line. torch's exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in COLOUR.sub("", str(error)).splitlines()]
    return f"{type(error).__name__}: {next(filter(None, lines), '')[:400]}"
