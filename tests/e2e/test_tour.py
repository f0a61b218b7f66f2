"""The rest of the demo: texts, an adapter that peft reads, the page; each ends in a check."""

from __future__ import annotations

import urllib.request

import pytest

from burnish.cli import tour as tours
from burnish.core.errors import ConfigError


@pytest.mark.slow
def test_texts_an_export_and_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(tours, "EPOCHS", 1)
    monkeypatch.setattr(tours, "TEXTS", {"linear_probe": 1e-9, "lora(rank=2)": 3e-3})
    said: list[str] = []
    tour = tours.Tour(tmp_path, said.append)
    tour.take()
    assert not tour.left and [r["recipe"] for r in tour.rows] == list(tours.TEXTS)
    assert all(holds for _, holds in tour.checks) and len(tour.checks) == 4
    assert (tmp_path / "texts" / "peft" / "adapter_config.json").is_file()
    assert "read by peft" in "\n".join(said) and "http://127.0.0.1" in "\n".join(said)
    assert tour.to_dict()["checks"][0]["holds"]


def test_what_is_not_installed_is_left_out_and_said(tmp_path, monkeypatch):
    def absent():
        raise ConfigError("pip install something")

    said: list[str] = []
    tour = tours.Tour(tmp_path, said.append)
    monkeypatch.setattr(tour, "texts", absent)
    monkeypatch.setattr(tour, "page", absent)
    monkeypatch.setattr(tour, "exported", lambda run: pytest.fail("there is no run to export"))
    tour.take()
    assert tour.left == ["pip install something"] * 2 and not tour.checks
    assert said.count("  left out: pip install something") == 2


def test_a_served_page_ends_with_who_asked_for_it(tmp_path):
    with tours.served(tmp_path) as address:
        assert urllib.request.urlopen(address, timeout=30).status == 200
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=5)


def test_a_page_that_cannot_be_served_says_why(tmp_path):
    from burnish.core.errors import BurnishError

    with pytest.raises(BurnishError, match="is no folder"), tours.served(tmp_path / "nowhere"):
        pass
