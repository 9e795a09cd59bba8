"""A program in the place of nvidia-smi. It prints what the real one of driver 550 prints, in its formats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPT = """#!/bin/sh
case "$1" in
-L) cat <<'END'
{listed}
END
;;
--query-gpu=uuid,memory.used) cat <<'END'
{memory}
END
;;
--query-gpu=memory.used,memory.total) cat <<'END'
{totals}
END
;;
--query-compute-apps=gpu_uuid,pid,used_memory,process_name) cat <<'END'
{apps}
END
;;
*) echo "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help."; exit 1
esac
"""
A, B = "GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f", "GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0"
MIG = (
    "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f",
    "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb",
)
TWO = (f"GPU 0: NVIDIA H200 (UUID: {A})", f"GPU 1: NVIDIA H200 (UUID: {B})")
DIVIDED = (
    f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})",
    f"  MIG 3g.20gb     Device  0: (UUID: {MIG[0]})",
    f"  MIG 2g.10gb     Device  1: (UUID: {MIG[1]})",
    f"GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})",
)


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    listed: Sequence[str] = TWO,
    *,
    used: Sequence[int] = (4, 4),
    apps: Sequence[str] = (),
) -> Path:
    """Put the program into a folder that is first on the PATH.

    Args:
        folder: the folder.
        listed: the lines of `nvidia-smi -L`.
        used: the MiB of memory in use of each GPU.
        apps: the lines of the compute processes.
    """
    program = folder / "nvidia-smi"
    program.write_text(
        SCRIPT.format(
            listed="\n".join(listed),
            memory="\n".join(f"{uuid}, {size}" for uuid, size in zip((A, B), used, strict=True)),
            totals="\n".join(f"{size}, 143771" for size in used),
            apps="\n".join(apps),
        )
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program
