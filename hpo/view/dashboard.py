"""optuna-dashboard for one storage, with access control: by default read-only and for this machine only."""

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
from hpo.view import failed_by_hand, read_only, study_detail
from hpo.view.compressed import App, compressed
from hpo.view.guard import ANY_ADDRESS, LOOPBACK, guarded, is_address

THREADS = 4
LOOK_SECONDS = 1.0  # between two checks whether the database file still exists


def app(place: Storage, write: bool, hosts: Collection[str] = ()) -> App:
    """Return the dashboard as a WSGI application.

    Args:
        place: the storage.
        write: allow requests that change studies.
        hosts: host names and addresses to accept in addition to the loopback. An entry of ANY_ADDRESS accepts all numeric
            addresses; they are safe from DNS rebinding.
    """
    served = study_detail.app(place.optuna)
    served = failed_by_hand.app(served, place) if write else read_only.marked(served)
    return guarded(compressed(_safely_failing(served)), write, hosts)


class ErrorLog:
    """Prints tracebacks of the dashboard's own failures to standard error, made safe."""

    def write(self, said: str) -> None:
        for line in said.splitlines():
            text.say(f"  {line}", to=sys.stderr)

    def flush(self) -> None:
        """Do nothing, since each line is printed at once."""


def _safely_failing(app: App) -> App:
    return lambda environ, start_response: app({**environ, "wsgi.errors": ErrorLog()}, start_response)


def serve(place: Storage, host: str = "127.0.0.1", port: int = 8080, write: bool = False) -> None:
    """Serve the dashboard until the process is interrupted.

    Args:
        place: the storage.
        host: the address to serve on.
        port: the port to serve on.
        write: allow requests that change studies.

    Raises Fault if the address cannot be used, and StorageGone when the database file was removed or replaced.
    """
    hosts = {host, *((socket.gethostname(), socket.getfqdn()) if host in ANY_ADDRESS else ())}
    try:
        socket.getaddrinfo(host, port)
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError) as error:  # ValueError: not a valid host name
        raise Fault(_mend(error, host, port)) from None
    if not _is_loopback(host):
        text.say(
            f"warning: the dashboard has no login; anybody who can reach {host} can "
            + ("read and change" if write else "read")
            + " every study in this storage",
            to=sys.stderr,
        )
    shown = f"[{host}]" if ":" in host else host
    rights = "changes allowed" if write else "read-only"
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
    """Interrupt the main thread when the database file is no longer at its path, and append the error to `gone`.

    The check does not wait for the next request, since an idle connection keeps the old write-ahead log in use.
    """
    while not gone:
        time.sleep(LOOK_SECONDS)
        try:
            place.check()
        except StorageGone as error:
            gone.append(error)
            _thread.interrupt_main()
        except FAILURES:
            pass  # an outage, which requests report


def _is_loopback(host: str) -> bool:
    return host in LOOPBACK or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def _mend(error: Exception, host: str, port: int) -> str:
    if not isinstance(error, OSError):
        return f"--host {host}: is not a host name; use 127.0.0.1 or an address of this machine"
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: another program uses it on {host}; end that program or name another port"
    if error.errno == errno.EACCES:
        return f"--port {port}: needs root; name a port above 1023"
    return f"--host {host}: cannot be served on: {error.strerror}; use 127.0.0.1 or an address of this machine"
