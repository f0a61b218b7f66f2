"""Every route, what it gives and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import zipfile

import pytest


def lines(answer):
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def asked(**more):
    return {"model": "root:models/vit", "data": "root:data/mails.csv", "recipe": "lora(rank=4)",
            "settings": {"max_steps": 9, "epochs": None}, **more}


def until(check, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_the_page_needs_nothing_from_elsewhere(page):
    names = ["/"] + [f"/page/{n}" for n in ("page.css", "app.js", "ask.js", "chart.js", "pick.js",
                                            "run.js", "try.js")]
    for name in names:
        told = page.client.get(name)
        assert told.status_code == 200, name
        text = told.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text, name
    assert page.client.get("/").headers["content-type"].startswith("text/html")
    for name in ("/page/../app.py", "/page/index.html", "/page/%2e%2e%2fapp.py", "/app.py"):
        assert page.client.get(name).status_code == 404, name


def test_the_server_imports_no_torch():
    code = ("import sys, burnish.ui.app, burnish.ui.server, burnish.ui.child\n"
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_page_knows_of_the_server(page):
    told = page.client.get("/api/here").json()
    assert told["root"] == "root" and told["limit"] == 1000 and ".csv" in told["kinds"]
    assert told["trust"] is False


def test_questions_go_to_the_desk_as_paths(page):
    told = lines(page.client.post("/api/ask/data", json={
        "data": "root:data/mails.csv", "model": "root:models/vit", "settings": {"max_length": "7"},
        "how": {"label": "label"}}))
    assert told == [{"progress": [1, 2]}, {"answer": {"said": "data"}}]
    what, how = page.ui.desk.asked[-1]
    assert what == "data" and how == {
        "data": str(page.root / "data/mails.csv"), "model": str(page.root / "models/vit"),
        "settings": {"max_length": 7}, "how": {"label": "label"}, "trust": False,
        "tops": [str(page.root), str(page.root / "runs")]}
    lines(page.client.post("/api/ask/machine"))
    lines(page.client.post("/api/ask/model", json={"model": "hub:google/vit"}))
    assert page.ui.desk.asked[-1] == ("model", {"model": "google/vit", "trust": False})
    lines(page.client.post("/api/ask/plan", json={
        "model": "root:models/vit", "memory": "8GB", "batch": 4, "length": None, "epochs": 2}))
    assert page.ui.desk.asked[-1][1]["batch"] == 4 and "length" not in page.ui.desk.asked[-1][1]


@pytest.mark.parametrize(("what", "body", "status"), [
    ("predict", {"run": "/etc"}, 404), ("nothing", {}, 404),
    ("model", {"model": "root:../outside"}, 403), ("model", {"model": "/etc"}, 400),
    ("model", {"model": "root:models/vit", "trust": True}, 400),
    ("data", {"data": "root:data/mails.csv", "tops": ["/"]}, 400),
    ("data", {"data": "root:data/mails.csv", "how": {"processor": "x"}}, 400),
    ("data", {"data": "root:data/mails.csv", "how": {"label": 3}}, 400),
    ("plan", {"model": "root:models/vit", "batch": True}, 400),
    ("plan", {"model": "root:models/vit", "batch": "4"}, 400),
    ("plan", {"model": "root:models/vit", "candidates": [3]}, 400),
    ("plan", {"model": "root:models/vit", "loss": "x"}, 400),
    ("machine", {"x": 1}, 400), ("machine", [1], 400)])
def test_what_is_no_question_is_refused(page, what, body, status):
    told = page.client.post(f"/api/ask/{what}", json=body)
    assert told.status_code == status and told.json()["error"], told.text
    assert not page.ui.desk.asked


def test_a_question_has_a_size_and_is_json(page):
    for body, status in ((b"{", 400), (b'{"epochs": NaN}', 400), (b'{"a": 1, "a": 2}', 400),
                         (b"x" * (2 << 20), 413)):
        assert page.client.post("/api/ask/model", content=body).status_code == status


# -- uploads ---------------------------------------------------------------------------------------
def put(page, upload, path, body=b"text\nhello\n"):
    return page.client.put(f"/api/uploads/{upload}/{path}", content=body)


def test_an_upload_is_data_of_a_run(page):
    upload = page.client.post("/api/uploads").json()["id"]
    assert put(page, upload, "a.csv").json() == {"size": 11}
    assert put(page, upload, "photos/cats/one.png", b"png").status_code == 200
    folder = page.root / "runs" / upload / "data"
    assert (folder / "photos/cats/one.png").read_bytes() == b"png"
    assert page.ui.places.named(f"upload:{upload}/a.csv") == str(folder / "a.csv")
    assert page.ui.places.named(f"upload:{upload}/") == str(folder)
    assert put(page, upload, "a.csv", b"other").status_code == 400          # not over it
    assert (folder / "a.csv").read_bytes() == b"text\nhello\n"
    assert page.client.get("/api/runs").json() == {"runs": []}
    run = page.client.post("/api/runs", json=asked(data=f"upload:{upload}/a.csv")).json()
    assert run["id"] == upload                                             # one folder for both
    assert put(page, upload, "b.csv").status_code == 404                   # a run's data stay
    assert page.client.delete(f"/api/uploads/{upload}").status_code == 404
    assert (folder / "a.csv").exists()


@pytest.mark.parametrize("path", [
    "../a.csv", "%2e%2e/a.csv", "..%2f..%2fa.csv", "a/../../b.csv", ".hidden.csv", "a/.b/c.csv",
    "a%5c..%5cb.csv", "a%00.csv", "a.exe", "a", "a.csv.sh", "x.html", "a.csv ", "a//b.csv",
    "/".join("abcdefghij") + ".csv", "a" * 200 + ".csv", "con:.csv", "%2fetc%2fpasswd.csv"])
def test_names_that_no_upload_has(page, path):
    upload = page.client.post("/api/uploads").json()["id"]
    assert put(page, upload, path).status_code in (403, 404, 405), path
    left = [p for p in page.root.parent.rglob("*") if p.suffix == ".csv"]
    assert sorted(p.name for p in left) == ["a.csv", "mails.csv", "outside.csv"]
    assert not list((page.root / "runs" / upload).iterdir())


def test_an_upload_has_a_limit(page):
    upload = page.client.post("/api/uploads").json()["id"]
    assert put(page, upload, "a.csv", b"x" * 600).status_code == 200
    told = put(page, upload, "b.csv", b"x" * 600)
    assert told.status_code == 413 and "at most" in told.json()["error"]

    def unannounced():
        for _ in range(9):
            yield b"x" * 100

    assert page.client.put(f"/api/uploads/{upload}/c.csv", content=unannounced()).status_code == 413
    folder = page.root / "runs" / upload / "data"
    assert [p.name for p in folder.iterdir()] == ["a.csv"]                 # nothing half-written
    assert put(page, upload, "d.csv", b"x" * 400).status_code == 200


def test_an_upload_that_nobody_used_can_go(page):
    upload = page.client.post("/api/uploads").json()["id"]
    put(page, upload, "a.csv")
    assert page.client.delete(f"/api/uploads/{upload}").status_code == 200
    assert not (page.root / "runs" / upload).exists()
    for name in (upload, "..", "20260101-000000-00000000"):
        assert page.client.delete(f"/api/uploads/{name}").status_code in (404, 405)
        assert put(page, name, "a.csv").status_code in (404, 405)
    assert (page.root / "data").exists()


# -- runs ------------------------------------------------------------------------------------------
def test_a_run_is_started_watched_stopped_and_goes_on(page):
    told = page.client.post("/api/runs", json=asked(
        promise={"peak": 99, "by": {"weights": 90, "temporary": 9, "odd": "x"}}))
    assert told.status_code == 201, told.text
    run = told.json()
    name, folder = run["id"], page.root / "runs" / run["id"]
    assert run["title"] == "vit on mails.csv" and run["state"] == "running"
    assert run["promise"] == {"peak": 99, "by": {"weights": 90, "temporary": 9}}
    assert json.loads((folder / "fit.json").read_text()) == {
        "model": str(page.root / "models/vit"), "data": str(page.root / "data/mails.csv"),
        "recipe": "lora(rank=4)", "max_steps": 9, "output": str(folder / "out")}
    assert page.client.post(f"/api/runs/{name}/resume").status_code == 400     # it goes on
    until(lambda: (folder / "process.json").exists())
    assert page.client.get(f"/api/runs/{name}").json()["process"]["now"] > 0
    assert page.client.post(f"/api/runs/{name}/stop").status_code == 200
    until(lambda: page.client.get(f"/api/runs/{name}").json()["state"] == "stopped")
    assert page.client.post(f"/api/runs/{name}/stop").status_code == 400
    assert page.client.get(f"/api/runs/{name}").json()["checkpoint"] == 3
    assert page.client.post(f"/api/runs/{name}/resume").json()["state"] == "running"
    assert json.loads((folder / "fit.json").read_text())["resume"] is True
    until(lambda: (folder / "process.json").exists())
    page.client.post(f"/api/runs/{name}/stop")
    until(lambda: page.client.get(f"/api/runs/{name}").json()["checkpoint"] == 6)
    assert [r["id"] for r in page.client.get("/api/runs").json()["runs"]] == [name]


def test_events_are_all_rows_and_end_with_the_run(page):
    name = page.client.post("/api/runs", json=asked()).json()["id"]
    folder = page.root / "runs" / name
    until(lambda: (folder / "process.json").exists())
    page.client.post(f"/api/runs/{name}/stop")
    told = page.client.get(f"/api/runs/{name}/events")
    assert told.headers["content-type"].startswith("text/event-stream")
    events = [(e.split("\n")[0][7:], json.loads(e.split("\ndata: ")[1]))
              for e in told.text.strip().split("\n\n") if e.startswith("event")]
    assert [v["step"] for k, v in events if k == "row"] == [1, 2, 3]
    assert [k for k, _ in events].index("reset") < [k for k, _ in events].index("row")
    assert "it began" in "".join(v for k, v in events if k == "log")
    assert [v for k, v in events if k == "run"][-1]["state"] == "stopped"
    assert events[-1] == ("over", None)


def test_a_file_that_was_written_anew_is_read_anew(page):
    name = page.client.post("/api/runs", json=asked()).json()["id"]
    metrics = page.root / "runs" / name / "out/metrics.jsonl"
    until(lambda: (page.root / "runs" / name / "process.json").exists())
    watch = page.ui.runs.watch(name)
    assert len([1 for k, _ in watch.news() if k == "row"]) == 3
    with metrics.open("a") as f:
        f.write('{"step": 4}\n{"step": ')
    assert [v for k, v in watch.news() if k == "row"] == [{"step": 4}]
    with metrics.open("a") as f:
        f.write('5}\n')
    assert [v for k, v in watch.news() if k == "row"] == [{"step": 5}]
    metrics.with_suffix(".new").write_text('{"step": 2}\n')
    metrics.with_suffix(".new").replace(metrics)
    assert [(k, v) for k, v in watch.news() if k in ("row", "reset")] == [
        ("reset", "row"), ("row", {"step": 2})]


@pytest.mark.parametrize(("change", "status"), [
    ({"model": "root:../outside"}, 403), ({"data": "root:../outside.csv"}, 403), 
    ({"data": None}, 400), ({"how": ["task"]}, 400), ({"settings": [1]}, 400),
    ({"settings": {"max_steps": 10**400}}, 400),
    ({"settings": {"trust_remote_code": True}}, 400), ({"settings": {"output": "/x"}}, 400),
    ({"settings": {"max_steps": 1.5}}, 400), ({"settings": {"max_steps": "many"}}, 400),
    ({"settings": {"points": 0}}, 400), ({"settings": {"language": ["x"]}}, 400),
    ({"settings": {"instance_prompt": "x" * 3000}}, 400),
    ({"settings": {"translate": "maybe"}}, 400),
    ({"settings": {"callbacks": 1}}, 400), ({"settings": {"epochs": True}}, 400),
    ({"how": {"processor": "x"}}, 400), ({"how": {"task": 3}}, 400), ({"recipe": ["lora"]}, 400),
    ({"recipe": "x" * 3000}, 400), ({"data": "upload:20260101-000000-00000000/a.csv"}, 404)])
def test_what_no_run_can_be_started_with(page, change, status):
    told = page.client.post("/api/runs", json=asked(**change))
    assert told.status_code == status, told.text
    assert not page.client.get("/api/runs").json()["runs"]


def test_remote_code_runs_only_where_the_command_line_said_so(page):
    page.ui.runs.trust = True
    name = page.client.post("/api/runs", json=asked()).json()["id"]
    config = page.root / "runs" / name / "fit.json"
    assert json.loads(config.read_text())["trust_remote_code"] is True
    until(lambda: (config.parent / "process.json").exists())
    page.client.post(f"/api/runs/{name}/stop")
    until(lambda: not page.ui.runs.alive(config.parent))
    page.ui.runs.trust = False                          # another server, without the flag
    page.client.post(f"/api/runs/{name}/resume")
    assert "trust_remote_code" not in json.loads(config.read_text())


def test_a_run_outlives_its_server(page):
    """Another server finds it going on, by the lock, and can stop it."""
    from burnish.ui.runs import Runs

    name = page.client.post("/api/runs", json=asked()).json()["id"]
    folder = page.root / "runs" / name
    until(lambda: (folder / "process.json").exists())
    code = ("import sys\nfrom pathlib import Path\nfrom burnish.ui.places import Places\n"
            "from burnish.ui.runs import Runs\n"
            "root = Path(sys.argv[1])\nruns = Runs(Places.of(root, root / 'runs'))\n"
            "assert runs.state(sys.argv[2])['state'] == 'running'\nruns.stop(sys.argv[2])")
    done = subprocess.run([sys.executable, "-c", code, str(page.root), name], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    until(lambda: Runs(page.ui.places).state(name)["state"] == "stopped")


def test_a_run_that_failed_says_why(page):
    """The real thing: a configuration that ``burnish fit`` refuses."""
    page.ui.runs.command = (sys.executable, "-m", "burnish.ui.child")
    name = page.client.post("/api/runs", json=asked(recipe="lorra(rank=4)")).json()["id"]
    found = until(lambda: (r := page.client.get(f"/api/runs/{name}").json())["state"] != "running"
                  and r, 60)
    assert found["state"] == "failed" and "did you mean 'lora'" in found["why"]
    ended = json.loads((page.root / "runs" / name / "ended.json").read_text())
    assert ended["code"] == 2


def test_a_run_reads_no_table_that_points_elsewhere(page):
    """Looked at where it is read, whatever the page was asked before."""
    page.ui.runs.command = (sys.executable, "-m", "burnish.ui.child")
    (page.root / "data/metadata.csv").write_text("file_name,label\n../../outside.png,a\n")
    name = page.client.post("/api/runs", json=asked(data="root:data/metadata.csv")).json()["id"]
    found = until(lambda: (r := page.client.get(f"/api/runs/{name}").json())["state"] != "running"
                  and r, 60)
    assert found["state"] == "failed" and "lies outside of the folder" in found["why"]
    assert not (page.root / "runs" / name / "out").exists()


# -- what a run leaves -----------------------------------------------------------------------------
@pytest.fixture
def left(page):
    """A finished run, as its files say."""
    name = page.ui.runs.new()
    folder = page.root / "runs" / name
    (folder / "out/checkpoint-9").mkdir(parents=True)
    (folder / "asked.json").write_text(json.dumps({"title": "t", "settings": {}, "created": 1.0}))
    (folder / "ended.json").write_text('{"code": 0, "time": 2.0}')
    (folder / "out/run.json").write_text(json.dumps({
        "data": {"task": "text-classification"}, "metrics": {"test": {"accuracy": 0.5}},
        "memory": {"measured": {"peak_bytes": 9, "by_category": {"weights": 9}, "timeline": []}}}))
    (folder / "out/report.html").write_text("<p>a report<script>alert(1)</script>")
    (folder / "out/adapter_model.safetensors").write_bytes(b"weights")
    (folder / "out/.burnish.json").write_text("{}")
    (folder / "out/leak").symlink_to(page.root.parent / "outside.csv")
    (folder / "out/checkpoint-9/big").write_bytes(b"x")
    return name


def test_a_finished_run_has_a_report_and_an_adapter(page, left):
    run = page.client.get(f"/api/runs/{left}").json()
    assert run["state"] == "finished" and run["report"] and run["adapter"]
    assert run["measured"] == {"peak": 9, "by": {"weights": 9}}
    report = page.client.get(f"/api/runs/{left}/report")
    assert report.text.startswith("<p>a report")
    policy = report.headers["content-security-policy"]
    assert policy.startswith("sandbox;") and "script" not in policy         # it may run nothing
    told = page.client.get(f"/api/runs/{left}/adapter.zip")
    assert left in told.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(told.content)) as archive:
        assert sorted(archive.namelist()) == ["adapter_model.safetensors", "report.html",
                                              "run.json"]
        assert archive.read("adapter_model.safetensors") == b"weights"


def test_a_finished_run_that_was_killed_going_on_is_not_finished(page, left):
    folder = page.root / "runs" / left
    assert page.client.get(f"/api/runs/{left}").json()["state"] == "finished"
    (folder / "ended.json").unlink()                    # as a resume does; it was killed with all
    (folder / "process.json").write_text(json.dumps({"pid": 2**22, "started": time.time() + 1}))
    assert page.client.get(f"/api/runs/{left}").json()["state"] == "failed"
    (folder / "process.json").write_text(json.dumps({"pid": 2**22, "started": time.time() - 9}))
    assert page.client.get(f"/api/runs/{left}").json()["state"] == "finished", "it wrote its end"


def test_it_is_asked_beside_its_base(page, left):
    page.ui.trying.says["predict"] = {"answer": {"said": "good", "base": "bad"}}
    told = page.client.post(f"/api/runs/{left}/predict", json={"text": "/etc/passwd.txt"})
    assert told.json() == {"said": "good", "base": "bad"}
    assert page.ui.trying.asked[-1] == ("predict", {
        "run": str(page.root / "runs" / left / "out"), "text": "/etc/passwd.txt", "tokens": 64})
    page.client.post(f"/api/runs/{left}/predict", content=b"png",
                     headers={"Content-Type": "image/png"})
    assert page.ui.trying.asked[-1][1]["file"].endswith(".png")
    for how, status in (
            ({"json": {"text": "  "}}, 400), ({"json": {"text": 3}}, 400),
            ({"json": {"file": "/etc/passwd"}}, 400), ({"json": {"inputs": ["/etc"]}}, 400),
            ({"content": b"x", "headers": {"Content-Type": "image/svg+xml"}}, 400),
            ({"content": b"x" * (33 << 20), "headers": {"Content-Type": "image/png"}}, 413),
            ({"content": b"x", "headers": {"Content-Type": "audio/midi"}}, 400)):
        assert page.client.post(f"/api/runs/{left}/predict", **how).status_code == status, how
    page.client.post(f"/api/runs/{left}/predict?text=a+cat&text=a%20dog", content=b"png",
                     headers={"Content-Type": "image/png"})
    assert page.ui.trying.asked[-1][1]["texts"] == ["a cat", "a dog"]
    for kind, ending in (("text/csv", ".csv"), ("text/tab-separated-values", ".tsv"),
                         ("application/jsonl", ".jsonl")):
        page.client.post(f"/api/runs/{left}/predict", content=b"text\na\n",
                         headers={"Content-Type": kind})
        assert page.ui.trying.asked[-1][1]["file"].endswith(ending)
    many = len(page.ui.trying.asked)
    for query in ("&".join(["text=a"] * 51), "text=" + "a" * 501):
        told = page.client.post(f"/api/runs/{left}/predict?{query}", content=b"png",
                                headers={"Content-Type": "image/png"})
        assert told.status_code == 400 and "up to 50 texts of 500 letters" in told.json()["error"]
    assert len(page.ui.trying.asked) == many
    page.ui.trying.says["predict"] = {"error": "no", "kind": "ConfigError"}
    told = page.client.post(f"/api/runs/{left}/predict", json={"text": "x"})
    assert told.status_code == 400 and told.json()["error"] == "no"


def test_what_is_not_there_yet_is_said(page):
    name = page.client.post("/api/runs", json=asked()).json()["id"]
    for path in ("report", "adapter.zip"):
        assert page.client.get(f"/api/runs/{name}/{path}").status_code == 404
    assert page.client.post(f"/api/runs/{name}/predict", json={"text": "x"}).status_code == 404
    for path in ("", "/events", "/report", "/adapter.zip"):
        for no in ("20260101-000000-00000000", "..", "x"):
            assert page.client.get(f"/api/runs/{no}{path}").status_code == 404, (no, path)
    for path in ("stop", "resume", "predict"):
        assert page.client.post(f"/api/runs/x/{path}").status_code == 404


# -- what files and pages may hold -----------------------------------------------------------------
def test_a_promise_that_is_no_number_is_none_and_a_figure_that_is_none_is_null(tmp_path):
    """The one was a ValueError after a folder was made; the other broke the whole list of runs."""
    from burnish.ui import files, runs

    asked = {"promise": {"peak": "abc", "by": {"weights": float("nan"), "x": [1], "a": 3.0}}}
    assert runs._promise(asked) == {"peak": 0, "by": {"a": 3}}
    (tmp_path / "run.json").write_text('{"metrics": {"loss": NaN, "many": [1, -Infinity]}}')
    assert files.read_json(tmp_path / "run.json") == {"metrics": {"loss": None, "many": [1, None]}}
