"""A W&B server on this machine that knows enough GraphQL to take runs, views and reports; it keeps what it is sent."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "somebody"
STRANGER = "a-stranger"


class WandbServer:
    """What it was sent.

    Attributes:
        sent: operation and variables of each GraphQL request.
        rows: of each run by its id, at the line where the client said that they belong.
        summaries: of each run, the last one.
        lost: whether a report that was saved is no longer there.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.lost = False
        self.url = ""

    def of(self, operation: str) -> list[dict[str, Any]]:
        """Variables of the requests for `operation`."""
        return [variables for name, variables in self.sent if name == operation]

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {
            "id": "UHJvamVjdA==",
            "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==",
            "name": given.get("project") or given.get("projectName") or "normlab",
            "entityName": ENTITY,
            "entity": {"id": "RW50aXR5", "name": ENTITY},
        }
        viewer = {"id": "VXNlcjox", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
        run = {"id": "UnVu", "name": given.get("name"), "displayName": "", "config": "{}", "project": project}
        if name in ("Viewer", "GetDefaultEntity"):
            return {"viewer": viewer}
        if name == "GetProjects":
            pages = {"endCursor": None, "hasNextPage": False}
            return {"models": {"edges": [], "pageInfo": pages}}
        if name == "UpsertView2":
            return {"upsertView": {"view": {"id": "Vmlldw==", "name": given["name"]}, "inserted": True}}
        if name == "upsertView":
            view = {"id": "UmVwb3J0", "type": "runs", "name": given["name"], "displayName": given["displayName"]}
            view |= {"description": "", "project": project, "spec": given["spec"], "updatedAt": "2026-01-01T00:00:00"}
            return {"upsertView": {"view": view, "inserted": True}}
        if name == "UpsertBucket":
            return {"upsertBucket": {"bucket": run, "inserted": True}}
        if name == "RunResumeStatus":
            rows = self.rows.get(given["name"])
            if rows is None:
                return {"model": {**project, "bucket": None}}
            tail = json.dumps([json.dumps(rows[max(rows)])])
            counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
            known = {"historyTail": tail, "wandbConfig": '{"t": 1}', "tags": [], "summaryMetrics": "{}"}
            return {"model": {**project, "bucket": {**run, **counts, **known}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run_id: str, files: dict[str, Any]) -> None:
        history = files.get("wandb-history.jsonl", {"content": []})
        for number, line in enumerate(history["content"], history.get("offset", 0)):
            self.rows.setdefault(run_id, {})[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            self.summaries[run_id] = json.loads(line)


@contextmanager
def serving() -> Iterator[WandbServer]:
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, values: object) -> None:
            body = json.dumps(values).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

        def do_HEAD(self) -> None:
            self.reply({})

        def do_GET(self) -> None:
            self.reply({})

        def do_PUT(self) -> None:
            self.body()
            self.reply({})

        def do_POST(self) -> None:
            content = self.body()
            stream = re.search(r"/([^/]+)/file_stream$", self.path)
            if stream is not None:
                server.stream(stream[1], json.loads(content).get("files", {}))
            if not self.path.endswith("/graphql"):
                return self.reply({})
            request = json.loads(content)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            name, variables = operation[1] if operation else "", request.get("variables") or {}
            server.sent.append((name, variables))
            if variables.get("entityName") == STRANGER:
                return self.reply({"errors": [{"message": "permission denied"}]})
            if server.lost and name == "upsertView" and variables.get("id"):
                return self.reply({"errors": [{"message": "no such view"}]})
            return self.reply({"data": server.answer(name, variables)})

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
