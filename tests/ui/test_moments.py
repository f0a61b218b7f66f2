"""Runs that begin, stop and go at the wrong moment."""

from __future__ import annotations

import shutil
import sys
import threading
import time

import pytest

from burnish.ui.runs import Watch


def asked(**more):
    return {"model": "root:models/vit", "data": "root:data/mails.csv", "recipe": "lora(rank=4)",
            "settings": {"max_steps": 9}, **more}


def until(check, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def put(page, upload, path, body=b"text\nhello\n"):
    return page.client.put(f"/api/uploads/{upload}/{path}", content=body)


SLOW = """
import sys, time
from pathlib import Path
import burnish.ui.child as child
child.confine = lambda *_: time.sleep(60)
sys.exit(child.main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
"""


def test_a_run_stops_while_its_data_are_looked_at(page):
    """Nothing of it has begun: it is stopped at once, and says so."""
    page.ui.runs.command = (sys.executable, "-c", SLOW)
    name = page.client.post("/api/runs", json=asked()).json()["id"]
    assert page.client.post(f"/api/runs/{name}/stop").status_code == 200
    found = until(lambda: (r := page.client.get(f"/api/runs/{name}").json())["state"] not in (
        "running", "stopping") and r, 20)
    assert found["state"] == "stopped" and found["why"] == "stopped before it began"
    assert not (page.root / "runs" / name / "out").exists()


def test_an_upload_is_of_one_run(page):
    """Two pages that start it at once make two runs, whose files are their own."""
    upload = page.client.post("/api/uploads").json()["id"]
    put(page, upload, "a.csv", b"text,label\na,b\n")
    names, go = [], threading.Barrier(4)

    def begin():
        go.wait()
        names.append(page.ui.runs.start(asked(data=f"upload:{upload}/a.csv")))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(names)) == 4 and upload in names
    for name in names:
        until(lambda name=name: (page.root / "runs" / name / "process.json").exists())
        page.client.post(f"/api/runs/{name}/stop")


def test_a_run_that_cannot_begin_is_none(page):
    upload = page.client.post("/api/uploads").json()["id"]
    put(page, upload, "a.csv", b"text,label\na,b\n")
    page.ui.runs.command = (str(page.root / "no such program"),)
    for data in (f"upload:{upload}/a.csv", "root:data/mails.csv"):
        told = page.client.post("/api/runs", json=asked(data=data))
        assert told.status_code >= 400 and "cannot start a process" in told.text
    assert not page.client.get("/api/runs").json()["runs"]
    assert [p.name for p in (page.root / "runs").iterdir()] == [upload], "the upload stays"


def test_letters_that_come_in_two_pieces_are_read_whole(page):
    name = page.client.post("/api/runs", json=asked()).json()["id"]
    until(lambda: (page.root / "runs" / name / "process.json").exists())
    watch, log = page.ui.runs.watch(name), page.root / "runs" / name / "log.txt"
    list(watch.news())
    for piece in ("caf\u00e9 ".encode()[:4], "caf\u00e9 ".encode()[4:]):
        with log.open("ab") as f:
            f.write(piece)
        said = [v for k, v in watch.news() if k == "log"]
    assert said == ["\u00e9 "]


def test_a_run_whose_folder_goes_says_so(page):
    name = page.client.post("/api/runs", json=asked()).json()["id"]
    folder = page.root / "runs" / name
    until(lambda: (folder / "process.json").exists())
    page.client.post(f"/api/runs/{name}/stop")
    until(lambda: not page.ui.runs.alive(folder))
    news, seen = page.ui.runs.watch(name).news, []

    def once(self):
        seen.append(1)
        if len(seen) > 1:
            shutil.rmtree(folder)
        return page.ui.runs.state(name) and news()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Watch, "news", once)
        patched.setattr(Watch, "over", property(lambda self: False))
        told = page.client.get(f"/api/runs/{name}/events").text
    assert told.rstrip().endswith("event: gone\ndata: null")
