"""A run's page while it trains, served to browsers on this machine alone."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rlpretrain.config import ConfigError
from rlpretrain.reporting.html import render
from rlpretrain.reporting.report import add_other, read_run

HOST = "127.0.0.1"


def live_page(folder: Path, every: int, against: str | Path | None = None) -> str:
    """The page of a run as it is now, which loads itself again after `every` seconds; without thoughts."""
    contents = read_run(folder)
    add_other(contents, against)
    contents.refresh = every
    contents.missing.append("thoughts, which `rlpretrain report` adds: they need the models")
    return render(contents)


def make_server(
    folder: str | Path, port: int = 0, every: int = 10, against: str | Path | None = None
) -> ThreadingHTTPServer:
    """A server of the live page of a run folder, beside the run `against`; port 0 takes a free one.

    It listens on the loopback address and answers requests to that address or localhost alone, so that no
    page of another host can read it. Raises ConfigError for a folder without a run, or a port that is taken.
    """
    folder = Path(folder)
    live_page(folder, every, against)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in (HOST, "localhost"):
                self.send_error(403, "only for this machine")
            elif self.path != "/":
                self.send_error(404)
            else:
                page = live_page(folder, every, against).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a page that loads itself would fill the console."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port}: {error}") from None
