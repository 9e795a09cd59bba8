"""What processes of test_sources.py run; apart from it, so that they load nothing but what they need."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.queues import Queue
from pathlib import Path

import torch

from hpo.data import Source
from hpo.data.cache import cached, keep


def make_entry(place: str, log: Path, found: Queue[tuple[list[int], tuple[str, ...] | None]], is_killed: bool) -> None:
    """Take an entry of the cache, made here unless it is there or somebody else makes it; die amid the making if told so."""
    os.environ["HPO_DATA_DIR"] = place  # the server may have been started in another test

    def write(folder: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        (folder / "images.npy").write_bytes(b"half")
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        images = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1)
        keep(folder, Source(inputs=images, targets=torch.arange(16) % 2, num_classes=2, classes=("a", "b")))

    entry = cached("entry", 1, write)
    assert isinstance(entry.images, torch.Tensor)
    found.put((entry.images.flatten().tolist(), entry.classes))
