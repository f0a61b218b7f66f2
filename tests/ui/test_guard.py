"""Who may ask: the name it was asked under, the page it was asked from, the token."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient
from tests.ui.conftest import HERE, OWN, Played

from burnish.ui.app import Ui, make
from burnish.ui.guard import POLICY, Guard, loopback
from burnish.ui.places import Places


def client(root, host="127.0.0.1", token=None, base=HERE, **headers):
    ui = Ui(Places.of(root, root / "runs"), desk=Played(), trying=Played())
    return TestClient(make(ui, host, token), base_url=base, headers=headers,
                      follow_redirects=False)


@pytest.mark.parametrize("host", ["127.0.0.1:7788", "localhost", "localhost:1", "[::1]:7788"])
def test_this_machine_answers_under_its_own_names(root, host):
    assert client(root).get("/api/browse", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:7788", "127.0.0.1.evil.example", "localhost.evil.example",
    "192.168.1.4:7788", "0.0.0.0:7788", "a@localhost", "localhost/x", "", "localhost#x",
    "evil.example?@localhost"])
def test_a_name_that_was_pointed_here_is_refused(root, host):
    """DNS rebinding: the browser sends the name of the page, which is not ours."""
    told = client(root).get("/api/browse", headers={"Host": host})
    assert told.status_code == 421 and "root" not in told.text


def test_other_pages_may_not_ask(root):
    here = client(root)
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"},
                    {"Origin": "http://127.0.0.1:9999"}, {"Origin": "http://localhost:7788"},
                    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
        assert here.get("/api/browse", headers=headers).status_code == 403, headers
        assert here.post("/api/uploads", headers=OWN | headers).status_code == 403, headers
    assert not (root / "runs").exists()
    ours = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    assert here.post("/api/uploads", headers=OWN | ours).status_code == 200


def test_a_form_elsewhere_cannot_change_anything(root):
    """It sends no header of its own, and where it could, the browser would ask first."""
    here = client(root)
    for method, path in (("POST", "/api/uploads"), ("POST", "/api/runs"), ("POST", "/api/ask/plan"),
                         ("PUT", "/api/uploads/x/a.csv"), ("DELETE", "/api/uploads/x"),
                         ("POST", "/api/runs/x/stop"), ("POST", "/api/runs/x/resume")):
        assert here.request(method, path).status_code == 403, path
    asked = here.options("/api/runs", headers={"Origin": "http://evil.example",
                                               "Access-Control-Request-Headers": "x-burnish"})
    assert asked.status_code == 403 and "access-control-allow-origin" not in asked.headers


def test_a_link_to_the_page_may_stand_anywhere_and_frames_may_not(root):
    here = client(root)
    told = here.get("/", headers={"Sec-Fetch-Site": "cross-site"})
    assert told.status_code == 200
    assert told.headers["content-security-policy"] == POLICY
    assert "frame-ancestors 'none'" in POLICY and "unsafe" not in POLICY
    assert told.headers["x-frame-options"] == "DENY"
    assert here.get("/page/app.js", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_opened_wider_it_needs_its_token(root):
    host, base = "0.0.0.0", "http://192.168.1.4:7788"
    made = make(Ui(Places.of(root, root / "runs"), desk=Played(), trying=Played()), host)
    assert made.token and len(made.token) > 30 and made.token not in repr(made)
    assert Guard.around(made.app, host).token != made.token
    here = TestClient(made, base_url=base, headers=OWN, follow_redirects=False)
    for path in ("/", "/page/app.js", "/api/browse", "/api/runs"):
        assert here.get(path).status_code == 401, path
    assert here.post("/api/uploads").status_code == 401
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": made.token},
                    {"Cookie": f"burnish_token_7788={made.token}x"},
                    {"Cookie": f"other={made.token}"}):
        assert here.get("/api/browse", headers=headers).status_code == 401, headers
    good = {"Authorization": f"Bearer {made.token}"}
    assert here.get("/api/browse", headers=good).status_code == 200
    assert here.get("/?token=wrong").status_code == 401
    entered = here.get(f"/?token={made.token}")
    assert entered.status_code == 303 and entered.headers["location"] == "/"
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert here.get("/api/browse").status_code == 200            # by the cookie
    assert here.get("/api/browse", headers={"Host": "evil.example"}).status_code == 421
    assert here.post("/api/uploads", headers={"Origin": "http://evil.example"}).status_code == 403


def test_a_name_it_was_opened_under_is_its_own(root):
    here = client(root, "box.lan", "secret", "http://box.lan:7788",
                  Authorization="Bearer secret")
    assert here.get("/api/browse").status_code == 200
    assert here.get("/api/browse", headers={"Host": "other.lan:7788"}).status_code == 421


def test_what_is_this_machine_alone():
    assert all(map(loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1")))
    assert not any(map(loopback, ("0.0.0.0", "::", "192.168.1.4", "box.lan", "", "localhost.lan")))
