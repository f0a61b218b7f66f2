"""What the page may name: the root and the runs, to the end of every link."""

from __future__ import annotations

import os

import pytest

from burnish.core.errors import BurnishError, ConfigError
from burnish.ui.places import Missing, Places, Refused

OUT = ["../outside.csv", "data/../../outside.csv", "/etc/passwd", "~/x", "..", "data/../..",
       "data/\0/mails.csv", "..\\outside.csv", "C:/x", "data//../..//outside.csv"]


@pytest.fixture
def places(root):
    return Places.of(root, root / "runs")


@pytest.mark.parametrize("path", OUT)
def test_nothing_above_the_root(places, page, path):
    with pytest.raises(Refused):
        places.below_root(path)
    with pytest.raises(Refused):
        places.named(f"root:{path}")
    told = page.client.get("/api/browse", params={"path": path})
    assert told.status_code == 403 and "outside" not in told.json()["error"]


def test_a_folder_is_listed_with_its_models(page):
    told = page.client.get("/api/browse").json()
    assert [(e["name"], e["kind"]) for e in told["entries"]] == [("data", "folder"),
                                                                ("models", "folder")]
    told = page.client.get("/api/browse", params={"path": "models"}).json()
    assert told["entries"] == [{"name": "vit", "kind": "model", "size": 0, "path": "models/vit"}]
    assert told["path"] == "models" and told["root"] == "root"
    assert page.client.get("/api/browse", params={"path": "no"}).status_code == 404
    assert page.client.get("/api/browse", params={"path": "data/mails.csv"}).status_code == 400


def test_links_are_followed_to_their_end(places, root):
    inner, outer = root / "data/inner", root / "data/outer"
    inner.symlink_to(root / "models/vit")
    outer.symlink_to(root.parent / "outside")
    assert [e["name"] for e in places.browse("data")["entries"]] == ["inner", "mails.csv"]
    assert places.named("root:data/inner") == str(root / "models/vit")
    for path in ("data/outer", "data/outer/a.csv"):
        with pytest.raises(Refused):
            places.named(f"root:{path}")
    with pytest.raises(Refused, match="holds outer, a link to outside"):
        places.named("root:data")
    outer.unlink()
    assert places.named("root:data") == str(root / "data")


def test_what_would_be_read_for_ever_is_refused(places, root):
    os.mkfifo(root / "data/pipe.csv")
    for path in ("data/pipe.csv", "data"):
        with pytest.raises(Refused):
            places.named(f"root:{path}")


def test_names_on_the_hub_are_no_paths(places):
    assert places.named("hub:google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert places.named("hub:owner/name:split") == "owner/name:split"
    assert places.named("builtin:digits") == "digits"
    for bad in ("hub:/etc/passwd", "hub:../x", "hub:a/../b", "hub:a/b/c", "hub:~/x", "hub:",
                "hub:.", "hub:mails.csv", "hub:a/b.safetensors", "builtin:other", "file:/etc",
                "/etc/passwd", "digits", "", None, 3, "root:" + "a" * 5000):
        with pytest.raises(BurnishError):
            places.named(bad)


@pytest.mark.parametrize("name", ["..", "x", "20260101-000000-zzzzzzzz", "../root", ""])
def test_a_run_has_a_run_s_name(places, name):
    with pytest.raises(Missing):
        places.run(name)
    with pytest.raises((Missing, ConfigError)):
        places.named(f"upload:{name}/a.csv")
