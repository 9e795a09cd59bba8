"""The dashboard's page without the buttons that a read-only dashboard would refuse, and a line that says so.

optuna-dashboard has no setting for it. Its page is one script, so a style sheet hides the buttons by their names and icons.
The server refuses all changes in any case.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hpo.view.compressed import App, Environ, Headers, StartResponse

NOTICE = "read-only: hpo dashboard --write allows changes"
#: Create a study, fail a trial, edit a note. Each icon of Material UI has its name in `data-testid`.
ICONS = ("AddBox", "StopCircle", "Edit")
NAMES = ("rename study", "delete study", "skip trial")
HIDDEN = ", ".join(
    [f'button:has(svg[data-testid="{icon}Icon"])' for icon in ICONS]
    + [f'button[aria-label="{name}"]' for name in NAMES]
)
STYLE = (
    f"<style>{HIDDEN} {{ display: none !important; }}\n"
    f'body::after {{ content: "{NOTICE}"; position: fixed; bottom: 8px; right: 8px; z-index: 2000; padding: 4px 10px; '
    "border-radius: 4px; background: #064787; color: white; font: 13px sans-serif; pointer-events: none; }</style>"
).encode()


def marked(app: App) -> App:
    """Return the dashboard with the style sheet in its page."""

    def answer(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET" or not environ["PATH_INFO"].startswith("/dashboard"):
            return app(environ, start_response)
        started: list[Any] = []
        body = app(environ, lambda *given: started.extend(given))
        try:
            page = b"".join(body).replace(b"</head>", STYLE + b"</head>", 1)
        finally:
            if hasattr(body, "close"):
                body.close()
        status, headers, *further = started
        kept: Headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*kept, ("Content-Length", str(len(page)))], *further)
        return [page]

    return answer
