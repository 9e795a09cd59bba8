"""A real S3 server on this machine, SeaweedFS, and a proxy that cuts connections to it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from tests.support.waiting import wait_for

KEY, SECRET, BUCKET = "thekeyofthetests", "thesecretofthetests", "hpo"


def free_port() -> int:
    """Return a free port. SeaweedFS takes the one that is 10000 higher too."""
    while True:
        port = random.SystemRandom().randrange(12_000, 22_000)
        with suppress(OSError):
            for one in (port, port + 10_000):
                socket.create_server(("127.0.0.1", one)).close()
            return port


class Server:
    """`weed mini` in a folder. It may be frozen, as a server that does not answer, or killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.start()

    def start(self) -> None:
        flags = {
            "dir": self._folder,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.port": self.port,
            "bucket": BUCKET,
            **dict.fromkeys(("admin.ui", "webdav", "master.telemetry"), "false"),
            **dict.fromkeys(("s3.port.iceberg", "s3.port.lance"), 0),  # their ports would be the same in each server
        }
        for name in ("master.port", "volume.port", "filer.port", "admin.port"):
            flags[name] = free_port()
        command = [
            str(Path(sys.executable).with_name("weed")),
            "mini",
            *(f"-{key}={value}" for key, value in flags.items()),
        ]
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        with (self._folder.parent / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=os.environ | keys, stdout=log, stderr=log)
        wait_for(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder.parent / "weed.log").read_text()[-2000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{BUCKET}", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 403  # the bucket is there, and wants a key
        except OSError:
            return False
        return True

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class CuttingProxy:
    """A proxy that lets so many bytes of a request through and then cuts the connection. None lets all through."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.cut_after: int | None = None
        self.cuts = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                for one, other, limit in ((near, far, self.cut_after), (far, near, None)):
                    threading.Thread(target=self._pass_on, args=(one, other, limit), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, limit: int | None) -> None:
        passed = 0
        with suppress(OSError), one, other:
            while received := one.recv(2**16):
                passed += len(received)
                if limit is not None and passed > limit:
                    other.sendall(received[: limit - passed])
                    self.cuts += 1
                    break
                other.sendall(received)
            for each in (one, other):
                each.shutdown(socket.SHUT_RDWR)
