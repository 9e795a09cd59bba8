"""optuna-dashboard for one storage, behind a gate: read-only unless asked otherwise, and for this machine only.

The dashboard has no login. Its gate refuses every method but GET, names of hosts that are not ours (a web page could
otherwise reach it through a DNS name of its own that points here), and changes that another site's page sends.
"""

from __future__ import annotations

import _thread
import errno
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

import waitress

from hpo import text
from hpo.errors import Fault, StorageGone
from hpo.storage.connect import FAILURES, Storage
from hpo.view import study_detail
from hpo.view.compressed import App, Environ, StartResponse, compressed

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
ANY_ADDRESS = frozenset({"0.0.0.0", "::"})
THREADS = 4
LOOK_SECONDS = 1.0  # between two looks at whether the storage is still there


def app(place: Storage, write: bool, hosts: Collection[str] = ()) -> App:
    """Return the dashboard as a WSGI application.

    Args:
        write: let requests through that change studies.
        hosts: names and addresses it is served under besides those of the loopback; one of ANY_ADDRESS lets in every
            address in numbers, which no DNS name can stand behind.
    """
    dashboard = compressed(study_detail.app(place.optuna))

    def gate(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        reason = _refusal(environ, write, hosts)
        if reason is None:
            return dashboard(environ, start_response)
        body = json.dumps({"reason": reason}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response("403 Forbidden", headers)
        return [body]

    return gate


def _refusal(environ: Environ, write: bool, hosts: Collection[str]) -> str | None:
    """Return why a request is refused, None if it is let in."""
    host = environ.get("HTTP_HOST", "")
    if not _is_ours(_name(f"//{host}"), hosts):
        return f"the dashboard is not served under the name {host!r}; open it as http://127.0.0.1 with its port"
    if environ["REQUEST_METHOD"] == "GET":
        return None
    if not write:
        return "the dashboard is read-only; `hpo dashboard --write` lets changes in"
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None and urlsplit(origin).netloc != host:
        return f"a page of {origin} may not change studies here"
    return None


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets that hold no address
        return ""


def _is_ours(name: str, hosts: Collection[str]) -> bool:
    return name in LOOPBACK or name in hosts or (not ANY_ADDRESS.isdisjoint(hosts) and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


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
    server = waitress.create_server(gated, sockets=[listener], threads=THREADS)
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
    return host in LOOPBACK or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _mend(error: Exception, host: str, port: int) -> str:
    if not isinstance(error, OSError):
        return f"--host {host}: is no name of a host; use 127.0.0.1 or an address of this machine"
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: another program uses it on {host}; end that one or name another port"
    if error.errno == errno.EACCES:
        return f"--port {port}: may not be used without root; name one above 1023"
    return f"--host {host}: cannot be served on: {error.strerror}; use 127.0.0.1 or an address of this machine"
