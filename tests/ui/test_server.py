"""What the command says before it serves, and where it serves."""

from __future__ import annotations

import socket
import sys

import pytest

from burnish.cli import main


@pytest.fixture
def served(monkeypatch):
    """What uvicorn would have been given."""
    import uvicorn

    kept = []

    def run(self, sockets):
        kept.append((self.config, sockets[0].getsockname()))
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return kept


def test_it_serves_this_machine_and_says_where(root, served, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["ui", str(root), "--port", "0", "--no-browser"]) == 0
    (config, address), = served
    assert address[0] == "127.0.0.1" and config.app.token is None
    told = capsys.readouterr()
    assert f"http://127.0.0.1:{address[1]}/\n" in told.out and not told.err
    assert not opened


def test_the_process_keeps_its_logging(root, served):
    """uvicorn's own configuration closed every handler there was, and what they wrote to."""
    import logging

    closed = []

    class Handler(logging.Handler):
        def close(self):
            closed.append(self)
            super().close()

    handler = Handler()
    assert main(["ui", str(root), "--port", "0", "--no-browser"]) == 0
    assert not closed and handler in [r() for r in logging._handlerList]


def test_wider_it_prints_a_token(root, served, capsys):
    assert main(["ui", str(root), "--port", "0", "--host", "0.0.0.0", "--no-browser"]) == 0
    (config, _), = served
    told = capsys.readouterr()
    assert f"/?token={config.app.token}\n" in told.out and "open to others" in told.err


def test_what_cannot_be_served_is_said(root, served, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for argv, why in (
                ([str(root), "--port", str(taken.getsockname()[1])], "cannot listen on"),
                ([str(root), "--host", "no.such.host.example"], "cannot listen on"),
                ([str(root / "nothing")], "is no folder"),
                ([str(root / "data/mails.csv")], "is no folder")):
            assert main(["ui", *argv, "--no-browser"]) == 2, argv
            assert why in capsys.readouterr().err
    for name in ("uvicorn", "starlette.applications"):
        with monkeypatch.context() as without:
            without.delitem(sys.modules, "burnish.ui.app", raising=False)
            without.setitem(sys.modules, name, None)
            assert main(["ui", str(root), "--no-browser"]) == 2
        assert "pip install 'burnish[ui]'" in capsys.readouterr().err
    assert not served
