"""push and pull against a small stand-in for the model hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from qpeft.adapters import lora, soft_prompt
from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.cli import main
from qpeft.evaluation.calibration import Platt
from qpeft.evaluation.calibration_file import Calibration, ScoreOrigin, write_calibration
from qpeft.template import load_template


class Hub:
    """Repositories as `{repo: {branch: {path: bytes}}}`, and what was asked for."""

    def __init__(self):
        self.repos, self.private, self.asked = {}, {}, []

    def commit(self, repo, branch, lines):
        files = self.repos[repo].setdefault(branch, {})
        for line in lines:
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del files[line["value"]["path"]]

    def find(self, repo, revision):
        """Return the files of a branch, which may be named by its commit."""
        branches = self.repos.get(repo, {})
        return next((f for b, f in branches.items() if revision in (b, sha(repo, b))), None)


def sha(*words):
    return hashlib.sha1("/".join(words).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code="RepoNotFound"):
        self.answer({"error": "not found"}, 404, X_Error_Code=code)

    def do_POST(self):
        hub, parts = self.server.hub, [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(self.path)
        if parts == ["api", "repos", "create"]:
            made = json.loads(body)
            repo = f"{made['organization']}/{made['name']}"
            known = repo in hub.repos
            hub.repos.setdefault(repo, {"main": {}})
            hub.private.setdefault(repo, made.get("visibility") == "private")
            self.answer({"url": f"{self.server.url}/{repo}"}, 409 if known else 200)
        elif parts == ["api", "validate-yaml"]:
            self.answer({"warnings": [], "errors": []})
        elif "preupload" in parts:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "branch" in parts:
            hub.repos["/".join(parts[2:4])].setdefault(parts[5], {})
            self.answer({})
        elif "commit" in parts:
            repo, branch = "/".join(parts[2:4]), parts[5]
            hub.commit(repo, branch, [json.loads(line) for line in body.splitlines()])
            oid = sha(repo, branch)
            self.answer({"commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "success": True})
        else:
            self.refuse()

    def do_GET(self):
        hub, parts = self.server.hub, [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        hub.asked.append(self.path)
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo not in hub.repos:
            return self.refuse()
        branch = parts[5] if parts[0] == "api" and len(parts) > 5 else "main" if parts[0] == "api" else parts[3]
        files = hub.find(repo, branch)
        if files is None:
            return self.refuse("RevisionNotFound")
        commit = branch if branch not in hub.repos[repo] else sha(repo, branch)
        if "tree" in parts[:5]:
            listed = [{"type": "file", "path": p, "size": len(c), "oid": sha(p)} for p, c in files.items()]
            return self.answer(listed)
        if parts[0] == "api":
            return self.answer({"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self.refuse("EntryNotFound")
        return self.answer(content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub():
    """A hub that lives as long as the test."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.url = Hub(), f"http://127.0.0.1:{server.server_port}"
    server.hub.url = server.url
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def qpeft(hub, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command line against the hub and returns (exit code, standard error)."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def run(*arguments):
        return main(list(map(str, arguments))), capsys.readouterr().err

    return run


@pytest.fixture
def folder(make_lm, tmp_path):
    """An adapter folder with something in it that is no part of it."""
    lm = make_lm("llama")
    made = soft_prompt.build(soft_prompt.Config(length=2), lm)
    save_adapter(tmp_path / "made", "soft_prompt", made, lm, load_template("plain"), provenance={"seed": 1})
    (tmp_path / "made" / "notes.txt").write_text("mine")
    return tmp_path / "made"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["soft_prompt", "lora"])
def test_there_and_back(hub, qpeft, folder, make_lm, tmp_path, kind):
    if kind == "lora":
        lm = make_lm("llama")
        save_adapter(folder, "lora", lora.build(lora.Config(), lm), lm, load_template("plain"))
        (folder / "notes.txt").write_text("mine")
    opened = load_adapter(folder, make_lm("llama"))
    origin = ScoreOrigin.of(
        {"name": "tiny-llama"},
        {
            "template": {"name": "plain", "fingerprint": opened.template.fingerprint},
            "adapter": {"name": kind, "sha256": opened.sha256},
        },
    )
    write_calibration(Calibration(Platt(1.0, 2.0), origin), folder / "calibration.json")
    code, said = qpeft("push", "--folder", folder, "--repo", "me/adapter", "--private")
    assert code == 0, said
    assert "/me/adapter/commit/" in said
    assert hub.private == {"me/adapter": True}
    sent = hub.repos["me/adapter"]["main"]
    assert sent == {name: content for name, content in contents(folder).items() if name != "notes.txt"}

    sent |= {"model.safetensors": b"large", ".gitattributes": b"", "training.png": b"of an earlier one"}
    assert qpeft("push", "--folder", folder, "--repo", "me/adapter")[0] == 0
    assert "training.png" not in sent
    assert {"model.safetensors", ".gitattributes"} <= set(sent)
    code, said = qpeft("pull", "--repo", "me/adapter", "--output", tmp_path / "fetched")
    assert code == 0, said
    assert f"{kind} for tiny-llama" in said
    expected = contents(folder)
    del expected["notes.txt"]
    assert contents(tmp_path / "fetched") == expected
    fetched = load_adapter(tmp_path / "fetched", make_lm("llama"))
    assert fetched.name == kind
    assert fetched.calibration([-2.0]) == [0.5]
    assert not [path for path in hub.asked if "model.safetensors" in path.replace("adapter_model", "")]
    assert not list(tmp_path.glob(".*"))


def test_revisions_and_what_stands_there(hub, qpeft, folder, tmp_path):
    assert qpeft("push", "--folder", folder, "--repo", "me/adapter")[0] == 0
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"max_passage_tokens": 5}))
    assert qpeft("push", "--folder", folder, "--repo", "me/adapter", "--revision", "short")[0] == 0
    assert set(hub.repos["me/adapter"]) == {"main", "short"}
    assert not hub.private["me/adapter"]
    output = tmp_path / "fetched"
    for revision, expected in ((None, None), ("short", 5), (sha("me/adapter", "main"), None)):
        which = ["--revision", revision] if revision else []
        assert qpeft("pull", "--repo", "me/adapter", "--output", output, *which)[0] == 0
        assert json.loads((output / "adapter_config.json").read_text())["max_passage_tokens"] == expected
    code, said = qpeft("pull", "--repo", "me/adapter", "--output", output, "--revision", "long")
    assert (code, "'me/adapter' on the model hub" in said) == (2, True)
    (output / "notes.txt").write_text("mine")
    code, said = qpeft("pull", "--repo", "me/adapter", "--output", output)
    assert (code, "holds 'notes.txt', which is no part of an adapter" in said) == (2, True)
    assert (output / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    code, said = qpeft("pull", "--repo", "me/adapter", "--output", tmp_path / "other")
    assert (code, "is no adapter folder" in said) == (2, True)


def test_what_is_no_adapter_is_neither_sent_nor_fetched(hub, qpeft, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    code, said = qpeft("push", "--folder", tmp_path / "empty", "--repo", "me/adapter")
    assert (code, "adapter_config.json is missing" in said) == (2, True)
    (folder / "adapter_model.safetensors").unlink()
    code, said = qpeft("push", "--folder", folder, "--repo", "me/adapter")
    assert (code, "adapter_model.safetensors is missing" in said) == (2, True)
    assert not hub.asked, "nothing was said to the hub"

    config = (folder / "adapter_config.json").read_bytes()
    hub.repos |= {
        "me/model": {"main": {"config.json": b"{}", "model.safetensors": b"large"}},
        "me/peft": {"main": {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"large"}},
        "me/half": {"main": {"adapter_config.json": config}},
    }
    words = {"me/model": "adapter_config.json is missing", "me/peft": "(peft_type 'LORA')", "me/half": "adapter_model"}
    for repo, expected in words.items():
        code, said = qpeft("pull", "--repo", repo, "--output", tmp_path / "fetched")
        assert code == 2
        assert repo in said
        assert expected in said
        assert ".tmp" not in said, "names of temporary folders say nothing"
    assert not any("safetensors" in path for path in hub.asked)
    assert not (tmp_path / "fetched").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_no_network(folder, tmp_path, verb):
    options = ["--folder", folder] if verb == "push" else ["--output", tmp_path / "fetched"]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "qpeft", verb, "--repo", "me/adapter", *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("qpeft: error: 'me/adapter' on the model hub cannot be reached")
    assert not (tmp_path / "fetched").exists()


def test_a_name_that_cannot_be(qpeft, folder, hub):
    code, said = qpeft("push", "--folder", folder, "--repo", "a/b/c")
    assert (code, "'a/b/c' on the model hub" in said, hub.asked) == (2, True, [])
