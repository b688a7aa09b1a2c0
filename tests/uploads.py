"""The writing half of `fakehub`: it creates repos, stores LFS uploads, and makes commits."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hub_repos import GOOD_TOKEN, Commit, etag, is_lfs

if TYPE_CHECKING:
    from fakehub import FakeHub, _Handler

_ROUTE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<kind>preupload|commit)/(?P<rev>.+)")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_OBJECT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})")
_LICENSES = {"apache-2.0", "mit", "other", "llama3.1", "cc-by-4.0", "openrail"}
_PIECE = 1_000_000
_FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)


def answer(handler: "_Handler", path: str) -> None:
    """Answer a POST or PUT."""
    if match := _OBJECT.fullmatch(path):
        return _store(handler, match["oid"])
    length = int(handler.headers.get("Content-Length") or 0)
    body = handler.rfile.read(length)
    if len(body) < length:  # the client was killed
        return handler.error(400, "", "The request was cut short")
    if handler.headers.get("Transfer-Encoding") == "chunked":
        body = _chunked(handler)
    if path == "/api/validate-yaml":
        return _validate(handler, json.loads(body))
    token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
    if token != GOOD_TOKEN:
        message = "You don't have the rights." if token else "Invalid username or password."
        return handler.error(403 if token else 401, "", message)
    if path == "/api/repos/create":
        return _create(handler, json.loads(body))
    if match := _BATCH.fullmatch(path):
        return _batch(handler, json.loads(body))
    if (match := _ROUTE.fullmatch(path)) and match["repo"] in handler.hub.repos:
        if match["kind"] == "preupload":
            return _modes(handler, match["repo"], json.loads(body))
        return _commit(handler, match["repo"], match["rev"], body)
    return handler.error(404, "RepoNotFound", "Repository not found")


def _store(handler: "_Handler", oid: str) -> None:
    size = int(handler.headers["Content-Length"])
    limit = handler.hub.drop_after
    if handler.hub.drops or (limit is not None and len(handler.hub.stored) >= limit):
        handler.hub.drops = max(0, handler.hub.drops - 1)
        for _ in range(0, size // 2, _PIECE):
            handler.hub.received(len(handler.rfile.read(min(_PIECE, size // 2))))
        handler.connection.shutdown(socket.SHUT_RDWR)
        return None
    digest = hashlib.sha256()
    path = handler.hub.scratch / oid
    with path.open("wb") as file:
        while size and (piece := handler.rfile.read(min(size, _PIECE))):
            handler.hub.received(len(piece))
            digest.update(piece)
            file.write(piece)
            size -= len(piece)
    if digest.hexdigest() != oid:
        return handler.error(400, "", "The content has another sha256")
    handler.hub.stored[oid] = path
    return handler.send(200, b"", {})


def _chunked(handler: "_Handler") -> bytes:
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


def _validate(handler: "_Handler", request: dict[str, Any]) -> None:
    """Answer as the hub does: metadata must be YAML, with types and values that the hub knows."""
    errors = metadata_errors(request["content"])
    body = {"errors": [{"message": error} for error in errors], "warnings": []}
    headers = {"Content-Type": "application/json"}
    handler.send(400 if errors else 200, json.dumps(body).encode(), headers)


def metadata_errors(card: str) -> list[str]:
    """Return the hub's errors for a card's metadata."""
    front = _FRONT.match(card)
    if front is None:
        return ["no metadata"]
    try:
        metadata = yaml.safe_load(front[1])
    except Exception as error:  # noqa: BLE001  (a tag that lies of its value raises anything)
        return [f"not YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["metadata is no table"]
    errors = []
    for key, kind in {"license_name": str, "license_link": str, "library_name": str}.items():
        if key in metadata and not isinstance(metadata[key], kind):
            errors.append(f"{key!r} must be a string")
    if metadata.get("license", "other") not in _LICENSES:
        errors.append('"license" must be one of a list')
    if metadata.get("base_model_relation", "quantized") not in ("quantized", "finetune", "merge"):
        errors.append('"base_model_relation" must be one of a list')
    if "base_model_relation" in metadata and "base_model" not in metadata:
        errors.append('"base_model_relation" without "base_model"')
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        errors.append('"tags" must be strings')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", metadata.get("base_model", "a/b")):
        errors.append('"base_model" must be a repo id')
    return errors


def _create(handler: "_Handler", request: dict[str, Any]) -> None:
    repo_id = f"{request['organization']}/{request['name']}"
    if repo_id in handler.hub.repos:
        url = {"url": f"{handler.hub.url}/{repo_id}"}
        body = json.dumps({**url, "error": "You already created this model repo"}).encode()
        return handler.send(409, body, {"Content-Type": "application/json"})
    folder = handler.hub.scratch / "empty" / repo_id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    private = request.get("visibility") == "private" or request.get("private") is True
    handler.hub.add(repo_id, folder, access="private" if private else "public")
    return handler.json({"url": f"{handler.hub.url}/{repo_id}", "name": repo_id})


def _batch(handler: "_Handler", request: dict[str, Any]) -> None:
    objects: list[dict[str, Any]] = []
    for item in request["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in handler.hub.stored:
            # The upload goes to the CDN's host, which must not get the token.
            entry["actions"] = {"upload": {"href": f"{handler.hub.cdn}/lfs/{item['oid']}"}}
        objects.append(entry)
    handler.json({"transfer": "basic", "objects": objects})


def _modes(handler: "_Handler", repo_id: str, request: dict[str, Any]) -> None:
    repo = handler.hub.repos[repo_id]
    folder = repo.folders[repo.revisions["main"]]
    files = []
    for item in request["files"]:
        path = folder / item["path"]
        files.append(
            {
                "path": item["path"],
                "uploadMode": "lfs" if is_lfs(item["path"]) else "regular",
                "shouldIgnore": False,
                "oid": etag(path) if path.is_file() else None,
            }
        )
    handler.json({"files": files})


def _commit(handler: "_Handler", repo_id: str, branch: str, body: bytes) -> None:
    hub = handler.hub
    repo = hub.repos[repo_id]
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    if hub.before_commit:
        hub.before_commit.pop(0)()
    if lines[0]["value"].get("parentCommit") not in (None, repo.revisions[branch]):
        return handler.error(412, "", "A commit has happened since. Please refresh and try again.")
    old = repo.folders[repo.revisions[branch]]
    new = hub.scratch / f"{len(hub.commits)}" / repo_id
    shutil.copytree(old, new, copy_function=os.link)
    added, deleted = [], []
    for line in lines[1:]:
        path = new / line["value"]["path"]
        path.unlink(missing_ok=True)
        if line["key"] == "deletedFile":
            deleted.append(line["value"]["path"])
            continue
        if path.name == hub.loses:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if line["key"] == "lfsFile":
            os.link(hub.stored[line["value"]["oid"]], path)
        else:
            path.write_bytes(base64.b64decode(line["value"]["content"]))
        added.append(line["value"]["path"])
    message = lines[0]["value"]["summary"]
    hub.commits.append(Commit(repo_id, message, tuple(added), tuple(deleted)))
    commit = hub.add(repo_id, new, revision=branch, access=repo.access)
    if hub.lost_answers:
        hub.lost_answers -= 1
        return handler.error(504, "", "")
    return handler.json({"commitUrl": f"{hub.url}/{repo_id}/commit/{commit}", "commitOid": commit})


def commit_of_another(hub: "FakeHub", repo_id: str, files: dict[str, bytes]) -> str:
    """Add or replace files in a repo, as another's commit would; return the commit."""
    repo = hub.repos[repo_id]
    new = Path(tempfile.mkdtemp(dir=hub.scratch)) / "repo"
    shutil.copytree(repo.folders[repo.revisions["main"]], new, copy_function=os.link)
    for name, content in files.items():
        (new / name).unlink(missing_ok=True)
        (new / name).write_bytes(content)
    return hub.add(repo_id, new, access=repo.access)


__all__ = ["answer", "commit_of_another", "metadata_errors"]
