"""A script that runs an ONNX file in onnxruntime. It is a separate process, since onnxruntime may crash on a file.

python onnxrun.py MODEL.onnx BATCHES.npz OUTPUTS.npz
"""

from __future__ import annotations

import sys

import numpy as np


def main() -> None:
    """Write the outputs of each batch under its number. An array's name is the number of its batch and of its input."""
    import onnxruntime

    model, given, found = sys.argv[1:]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    with np.load(given) as arrays:
        numbers = sorted({key.split()[0] for key in arrays.files}, key=int)
        fed = {number: {name: arrays[f"{number} {at}"] for at, name in enumerate(names)} for number in numbers}
        np.savez(found, **{number: session.run(None, inputs)[0] for number, inputs in fed.items()})


if __name__ == "__main__":
    main()
