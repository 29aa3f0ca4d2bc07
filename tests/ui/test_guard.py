"""Who may ask, for what, and what every answer forbids the browser."""

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from keel.cli.main import app as commands
from keel.core.errors import RunError, UserError
from keel.ui.app import create_app, find_pages
from keel.ui.server import check_loopback, run_ui


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost", "LOCALHOST:1", "[::1]:8765"])
def test_own_names_are_answered(client, host):
    assert client.get("/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8765", "", "[::2]:8765", "localhost.", "10.0.0.1"]
)
def test_a_name_that_was_pointed_here_is_refused(client, host):
    answer = client.get("/runs", headers={"host": host})
    assert answer.status_code == 421 and "base" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(client, method):
    answer = client.request(method, "/runs")
    assert answer.status_code == 405 and answer.headers["allow"] == "GET"


@pytest.mark.parametrize("path", ["/runs", "/nowhere", "/points/base", "/static/ui.css", "/tokens?step=x"])
def test_every_answer_forbids_outside_requests_and_inline_scripts(client, path):
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_a_report_runs_its_scripts_in_an_origin_of_its_own(client):
    answer = client.get("/reports/base")
    assert "<title>base</title>" in answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;") and "allow-same-origin" not in policy
    assert "connect-src" not in policy and "default-src 'none'" in policy


def test_scripts_and_styles_are_kept_by_their_version_only(client):
    address = next(part for part in client.get("/runs").text.split('"') if part.startswith("/static/ui.css?v="))
    assert "immutable" in client.get(address).headers["cache-control"]
    assert client.get("/static/ui.css?v=older").headers["cache-control"] == "no-cache"
    plotly = client.get("/static/plotly.min.js")
    assert plotly.headers["content-type"].startswith("text/javascript") and b"plotly.js v" in plotly.content[:200]


@pytest.mark.parametrize("name", ["missing.js", "..%2Fapp.py", "..%2f..%2f..%2fetc%2fpasswd", "__init__.py", "%00"])
def test_nothing_but_scripts_and_styles_is_served(client, name):
    assert client.get(f"/static/{name}").status_code == 404


def test_a_fault_is_a_page_that_tells_no_details(tmp_path, monkeypatch, capsys):
    def fail(*given, **named):
        raise RuntimeError("secret detail")

    monkeypatch.setattr("keel.ui.pages.runs.count_runs", fail)
    (tmp_path / "keel.sqlite").touch()
    monkeypatch.setattr("keel.ui.reading.Store", lambda *given, **named: _Nothing())
    client = TestClient(create_app(tmp_path), base_url="http://127.0.0.1", raise_server_exceptions=False)
    answer = client.get("/runs")
    assert answer.status_code == 500 and "could not be made" in answer.text and "secret" not in answer.text
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "secret detail" in capsys.readouterr().err


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_the_pages_are_the_modules_of_their_folder(client):
    text = client.get("/runs").text
    for name, module in find_pages().items():
        assert f'href="/{name}"' in text and module.TITLE in text
    places = [text.index(f'href="/{name}"') for name, _ in sorted(find_pages().items(), key=lambda item: item[1].ORDER)]
    assert places == sorted(places)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "127.0.0.1.example.org"])
def test_no_address_that_other_machines_reach(host):
    with pytest.raises(UserError, match="other machines"):
        check_loopback(host)


def test_the_command_refuses_another_address():
    found = CliRunner().invoke(commands, ["ui", "--host", "0.0.0.0"])
    assert isinstance(found.exception, UserError) and found.exception.exit_code == 2


def test_a_port_in_use_is_an_error(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(RunError, match="--port"):
        run_ui(tmp_path, port=taken.getsockname()[1])
