"""A script that runs an ONNX file in onnxruntime. It is a separate process, since onnxruntime may crash on a file.

python onnxrun.py MODEL.onnx BATCHES.npz LOGITS.npz
"""

from __future__ import annotations

import sys

import numpy as np


def main() -> None:
    """Write the logits of each batch of images under the name of the batch."""
    import onnxruntime

    model, given, found = sys.argv[1:]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    with np.load(given) as batches:
        np.savez(found, **{key: session.run(None, {name: batches[key]})[0] for key in batches.files})


if __name__ == "__main__":
    main()
