"""Uploads against a hub on this machine that speaks the calls of a commit; nothing is sent that nobody asked for."""

import base64
import http.server
import json
import sys
import threading

import pytest

from saejax import cli
from saejax.errors import UserError
from saejax.interop import hub, neuronpedia

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
SECRET = "hf_" + "x" * 34


class Hub(http.server.ThreadingHTTPServer):
    """Repositories in memory: `files` of the last commit, `calls` in order; `refuse` is a status to answer with."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.created: dict = {}
        self.refuse: int | None = None
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(http.server.BaseHTTPRequestHandler):
    """All files go into the commit itself; storage for large ones is the library's own business."""

    server: Hub

    def log_message(self, *arguments):
        """Quiet."""

    def _reply(self, tree, status=200):
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        """Facts about a repository."""
        self.server.calls.append(f"GET {self.path}")
        self._reply({"id": "me/sae", "sha": "0" * 40, "siblings": []}, 404 if self.server.refuse else 200)

    def do_POST(self):
        """The steps of an upload."""
        server, body = self.server, self._body()
        server.calls.append(self.path)
        if server.refuse:
            return self._reply({"error": "not yours"}, server.refuse)
        assert self.headers["Authorization"] == f"Bearer {SECRET}"
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            return self._reply({"url": f"{server.address}/me/sae"})
        if self.path == "/api/validate-yaml":
            return self._reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self._reply({"files": files})
        assert "/commit/" in self.path, self.path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                server.files[value["path"]] = base64.b64decode(value["content"])
        return self._reply({"commitUrl": f"{server.address}/me/sae/commit/1", "commitOid": "1" * 40, "success": True})


@pytest.fixture
def server(monkeypatch):
    served = Hub()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NO_PROXY", "*")
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def folder(trained, tmp_path):
    path = neuronpedia.export(trained("jumprelu"), tmp_path / "out")
    (path / "dashboards").mkdir()
    (path / "dashboards" / "batch-0.json").write_text('{"text": "private"}')
    return path


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_arrives_is_what_was_written_without_the_texts(server, folder):
    before = content(folder)
    assert hub.upload(folder, "me/sae", private=True) == f"{server.address}/me/sae"
    assert server.created["name"] == "sae" and server.created.get("visibility", "private") == "private"
    assert server.files == {name: data for name, data in before.items() if not name.startswith("dashboards")}
    assert {"README.md", "pretrained_saes.yaml", "blocks.3.hook_resid_post/sae_weights.safetensors"} <= set(
        server.files
    )
    assert content(folder) == before


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(status, server, folder):
    server.refuse, before = status, content(folder)
    with pytest.raises(UserError, match=r"hub=me/sae: nothing was published, .*out stays as it is \(.*") as caught:
        hub.upload(folder, "me/sae")
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    assert content(folder) == before and not server.files


def test_no_network_is_one_line(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match="nothing was published"):
        hub.upload(folder, "me/sae")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nothing was published.*offline"):
        hub.upload(folder, "me/sae")


def test_extra_and_token_are_missed_before_any_work(server, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    sae = folder / "blocks.3.hook_resid_post"
    assert cli.main(["export", f"run={sae}", f"path={tmp_path / 'never'}", "hub=me/sae"]) == 2
    assert "there is no token; log in with `hf auth login`" in capsys.readouterr().err
    with pytest.raises(UserError, match="hub=sae: must be owner/name"):
        hub.check("sae")

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["export", f"run={sae}", f"path={tmp_path / 'never'}", "hub=me/sae"]) == 2
    assert "pip install 'saejax[hub]'" in capsys.readouterr().err
    assert not (tmp_path / "never").exists() and not server.calls


def test_the_command_sends_only_where_it_is_asked_to(server, folder, tmp_path, capsys):
    sae = folder / "blocks.3.hook_resid_post"
    names = ["format=neuronpedia", "neuronpedia.model=tiny"]
    assert cli.main(["export", f"run={sae}", f"path={tmp_path / 'a'}", *names]) == 0
    assert not server.calls
    assert cli.main(["export", f"run={sae}", f"path={tmp_path / 'b'}", *names, "hub=me/sae"]) == 0
    assert f"uploaded: {server.address}/me/sae" in capsys.readouterr().out
    assert b"repo_id: me/sae" in server.files["pretrained_saes.yaml"]
    assert server.files == content(tmp_path / "b")
