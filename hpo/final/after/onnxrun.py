"""A script that runs an ONNX file in onnxruntime. It is a separate process, since onnxruntime may crash on a file.

python onnxrun.py MODEL.onnx BATCHES.npz OUTPUTS.npz
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def main() -> None:
    """Write the outputs of each batch under its number. An array is named after its batch's number and its input."""
    import onnxruntime

    model, given, found = sys.argv[1:]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    fed: dict[str, dict[str, Any]] = {}
    with np.load(given) as arrays:
        for key in arrays.files:
            number, _, name = key.partition(" ")
            fed.setdefault(number, {})[name] = arrays[key]
    np.savez(found, **{number: session.run(None, inputs)[0] for number, inputs in fed.items()})


if __name__ == "__main__":
    main()
