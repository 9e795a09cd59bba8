"""optuna-dashboard for one storage, behind a guard: read-only unless asked otherwise, and for this machine only."""

from __future__ import annotations

import _thread
import errno
import ipaddress
import socket
import sys
import threading
import time
from collections.abc import Collection

import waitress

from hpo import text
from hpo.errors import Fault, StorageGone
from hpo.storage.connect import FAILURES, Storage
from hpo.view import study_detail
from hpo.view.compressed import App, compressed
from hpo.view.guard import ANY_ADDRESS, LOOPBACK, guarded, is_address

THREADS = 4
LOOK_SECONDS = 1.0  # between two looks at whether the storage is still there


def app(place: Storage, write: bool, hosts: Collection[str] = ()) -> App:
    """Return the dashboard as a WSGI application.

    Args:
        write: let requests through that change studies.
        hosts: names and addresses it is served under besides those of the loopback; one of ANY_ADDRESS lets in every
            address in numbers, which no DNS name can stand behind.
    """
    return guarded(compressed(_safely_failing(study_detail.app(place.optuna))), write, hosts)


class ErrorLog:
    """Where the dashboard writes tracebacks of its own failures: standard error, made safe."""

    def write(self, said: str) -> None:
        for line in said.splitlines():
            text.say(f"  {line}", to=sys.stderr)

    def flush(self) -> None:
        """Do nothing: each line is printed at once."""


def _safely_failing(app: App) -> App:
    return lambda environ, start_response: app({**environ, "wsgi.errors": ErrorLog()}, start_response)


def serve(place: Storage, host: str = "127.0.0.1", port: int = 8080, write: bool = False) -> None:
    """Serve the dashboard until the process is told to end; Fault if the address cannot be taken, StorageGone once the file
    of the storage was removed or replaced.
    """
    hosts = {host, *((socket.gethostname(), socket.getfqdn()) if host in ANY_ADDRESS else ())}
    try:
        socket.getaddrinfo(host, port)
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError) as error:  # ValueError: what can be no name of a host
        raise Fault(_mend(error, host, port)) from None
    if not _is_loopback(host):
        text.say(
            f"warning: the dashboard has no login; whoever reaches {host} can "
            + ("read and change" if write else "read")
            + " every study in this storage",
            to=sys.stderr,
        )
    shown = f"[{host}]" if ":" in host else host
    rights = "changes are let in" if write else "read-only"
    text.say(f"dashboard of {place.shown}: http://{shown}:{listener.getsockname()[1]}/ ({rights}; Ctrl-C ends it)")
    gated = app(place, write, {name.lower() for name in hosts})
    server = waitress.create_server(gated, sockets=[listener], threads=THREADS, ident="")
    gone: list[StorageGone] = []
    if place.file is not None:
        threading.Thread(target=_end_when_gone, args=(place, gone), name="storage", daemon=True).start()
    try:
        server.run()
    finally:
        server.close()
    if gone:
        raise gone[0]


def _end_when_gone(place: Storage, gone: list[StorageGone]) -> None:
    """Interrupt the main thread once the storage's file is not at its path any more, and note it.

    Not at the next request, which may be long in coming: an idle connection keeps the old write-ahead log in use.
    """
    while not gone:
        time.sleep(LOOK_SECONDS)
        try:
            place.check()
        except StorageGone as error:
            gone.append(error)
            _thread.interrupt_main()
        except FAILURES:
            pass  # an outage: requests tell of it


def _is_loopback(host: str) -> bool:
    return host in LOOPBACK or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def _mend(error: Exception, host: str, port: int) -> str:
    if not isinstance(error, OSError):
        return f"--host {host}: is no name of a host; use 127.0.0.1 or an address of this machine"
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: another program uses it on {host}; end that one or name another port"
    if error.errno == errno.EACCES:
        return f"--port {port}: may not be used without root; name one above 1023"
    return f"--host {host}: cannot be served on: {error.strerror}; use 127.0.0.1 or an address of this machine"
