"""`make ui` by real requests: loopback only, and no page of another origin gets at the runs."""

import http.client
import re
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
SEARCH = "/ajax-api/2.0/mlflow/experiments/search"
CREATE = "/ajax-api/2.0/mlflow/experiments/create"


@pytest.fixture(scope="module")
def port(free_port, serve, tmp_path_factory):
    """The server of `make ui`, with the options that stand in the Makefile, on a free port."""
    folder = tmp_path_factory.mktemp("ui")
    recipe = MAKEFILE.read_text().split("\nui: ")[1].split("\n\n")[0].replace("\\\n", " ")
    options = re.search(r"mlflow ui (.*)", recipe)[1].replace("$(PORT)", str(free_port))
    options = options.replace("$(CURDIR)/runs", str(folder)).split()
    with serve(free_port, folder, options):
        yield free_port


def ask(port, method, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = '{"max_results": 1, "name": "made up"}' if method == "POST" else None
    headers = {"Content-Type": "application/json", **headers}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    answer.read()
    return answer


def test_it_answers_its_own_pages(port):
    here = f"http://127.0.0.1:{port}"
    assert ask(port, "POST", SEARCH).status == 200
    assert ask(port, "POST", SEARCH, Origin=here).status == 200
    assert ask(port, "GET", "/", Host=f"localhost:{port}").status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{}", "10.0.0.1", "192.168.1.7:{}"])
@pytest.mark.parametrize("method, path", [("POST", SEARCH), ("GET", "/")])
def test_a_foreign_host_is_refused(host, method, path, port):
    """A page whose name is made to point at this machine would have it."""
    assert ask(port, method, path, Host=host.format(port)).status == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "https://evil.example:5000", "null"])
def test_a_foreign_origin_changes_and_reads_nothing(origin, port):
    assert ask(port, "POST", CREATE, Origin=origin).status == 403
    assert ask(port, "POST", SEARCH, Origin=origin).status == 403
    readable = ask(port, "GET", SEARCH + "?max_results=1", Origin=origin)
    assert readable.getheader("Access-Control-Allow-Origin") is None  # so no browser shows it
    graphql = ask(port, "POST", "/graphql", Origin=origin)
    assert graphql.status == 403 or not graphql.getheader("Access-Control-Allow-Origin")


def test_it_listens_on_loopback_only(port):
    states = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [line.split()[1] for line in states if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening
