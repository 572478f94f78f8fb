"""A stand-in of the Hub's HTTP interface: repositories, large files by their contents, commits, reading."""

import base64
import hashlib
import json
import re
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import close_session, constants, hf_api
from transformers import dynamic_module_utils
from transformers.utils import hub as transformers_hub

from innerloop.model import run_folder

LARGE = ".safetensors"


@contextmanager
def standing_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let huggingface_hub take a stand-in for the Hub."""
    server = Hub()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_TOKEN", "hf_a_token")
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # which it took from the constants once and for all
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # so does this one
    run_folder._shared.cache_clear()
    yield server
    close_session()  # which keeps its connections
    server.shutdown()
    server.server_close()
    run_folder._shared.cache_clear()


class Hub(ThreadingHTTPServer):
    """Attributes:
    repos: files of each repository, by name; those of the last commit.
    commits: how many each has had.
    objects: large files by the digest of their contents.
    asked: how often each kind of request came.
    refuses: called with the kind of a request before it is answered; a status that it returns is the answer.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.commits, self.objects, self.asked = {}, Counter(), {}, Counter()
        self.refuses = lambda kind: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def answer(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        for pattern, function in ROUTES:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                kind = function.__name__
                self.server.asked[kind] += 1
                if status := self.server.refuses(kind):
                    return self.send({"error": "refused"}, status)
                return function(self, body, *found.groups())
        return self.send({"error": f"no {method} {path}"}, 404)

    def send(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body):
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        exists = name in self.server.repos
        self.server.repos.setdefault(name, {})
        self.send({"url": f"{self.server.url}/{name}", "id": name}, 409 if exists else 200)

    def validate(self, body):
        self.send({"errors": [], "warnings": []})

    def preupload(self, body, name):
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": p, "uploadMode": "lfs" if p.endswith(LARGE) else "regular"} for p in files]
        self.send({"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, body, name):
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.server.objects:
                one["actions"] = {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}
        self.send({"transfer": "basic", "objects": objects})

    def large(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.send({})

    def commit(self, body, name):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.repos[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.repos[name][value["path"]] = self.server.objects[value["oid"]]
        self.server.commits[name] += 1
        self.send({"commitUrl": f"{self.server.url}/{name}/commit/{self.sha(name)}", "commitOid": self.sha(name)})

    def sha(self, name):
        return f"{self.server.commits[name]:040d}"

    def info(self, body, name):
        if name not in self.server.repos:
            return self.send({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        files = [{"rfilename": path} for path in self.server.repos[name]]
        return self.send({"id": name, "sha": self.sha(name), "siblings": files})

    def tree(self, body, name):
        files = self.server.repos[name].items()
        digest = [(path, data, hashlib.sha256(data).hexdigest()) for path, data in files]
        self.send([{"type": "file", "path": path, "size": len(data), "oid": oid} for path, data, oid in digest])

    def resolve(self, body, name, file):
        files = self.server.repos.get(name, {})
        if file not in files:
            return self.send({"error": "none"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.sha(name))
        tag = hashlib.sha256(files[file]).hexdigest()
        return self.send(files[file], ETag=f'"{tag}"', X_Repo_Commit=self.sha(name))


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{NAME}/preupload/main", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /large/(\w+)", Handler.large),
    (rf"POST /api/models/{NAME}/commit/main", Handler.commit),
    (rf"GET /api/models/{NAME}/tree/\w+", Handler.tree),
    (rf"GET /api/models/{NAME}(?:/revision/\w+)?", Handler.info),
    (rf"(?:GET|HEAD) /{NAME}/resolve/\w+/(.+)", Handler.resolve),
]
