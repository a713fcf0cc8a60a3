"""A client of Ollama's REST API, as far as making a model takes.

Files are sent as blobs named by their SHA-256, then a model is made of them. API:
https://docs.ollama.com/api (blobs, create, version).
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from mlxtune.errors import ExportError
from mlxtune.export.modelfile import Modelfile, Value
from mlxtune.files import sha256
from mlxtune.models.ollama_store import parse_name

_PORTS = {"http": 80, "https": 443}
_CHUNK = 1 << 20
# Ollama reads a file once more, to check its digest, before it answers.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)

# What is being done, how many bytes of it are done, and of how many; 0 of 0 if unknown.
Progress = Callable[[str, int, int], None]


def _quiet(_: str, _done: int, _total: int) -> None:
    pass


def base_url(host: str | None = None) -> str:
    """Where Ollama answers.

    Args:
        host: `[scheme://]host[:port][/path]`; `$OLLAMA_HOST` by default, else
            127.0.0.1:11434. An address that only servers listen at, 0.0.0.0 or ::, stands
            for this machine. The port is 11434, or the scheme's own where one is given.

    Raises:
        ExportError: it is no such address.
    """
    given = os.environ.get("OLLAMA_HOST", "") if host is None else host
    text = given.strip().strip("\"'").strip()
    scheme, colon, rest = text.rpartition("://")
    scheme = scheme.lower() if colon else "http"
    address, _, path = rest.partition("/")
    name, port = _split_port(address)
    default = _PORTS.get(scheme, 0) if colon else 11434
    number = int(port) if port.isdecimal() else default
    if scheme not in _PORTS or (port and not port.isdecimal()) or not 0 < number < 65536:
        raise ExportError(
            "this is no address of a server",
            where=f"OLLAMA_HOST={given}" if host is None else given,
            remedy="it has the form HOST, HOST:PORT or https://HOST:PORT",
        )
    path = f"/{path.strip('/')}" if path.strip("/") else ""
    return f"{scheme}://{_connectable(name)}:{number}{path}"


def _split_port(address: str) -> tuple[str, str]:
    if found := re.fullmatch(r"\[(.*)\](?::(.*))?", address):
        return found[1], found[2] or ""
    if address.count(":") > 1:  # IPv6 without brackets
        return address, ""
    name, _, port = address.partition(":")
    return name, port


def _connectable(name: str) -> str:
    try:
        address = ipaddress.ip_address(name or "127.0.0.1")
    except ValueError:
        return name
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return str(address) if address.version == 4 else f"[{address}]"


class Refused(ExportError):
    """Ollama does not do what it was asked for: the request is at fault, not the server."""


class Ollama:
    """A connection to a server; close it, or use it in a `with` block.

    Args:
        host: as `base_url` takes it.
    """

    def __init__(self, host: str | None = None) -> None:
        self.url = base_url(host)
        try:
            # A proxy for the web has no business with this machine.
            self._http = httpx.Client(
                base_url=self.url, timeout=_TIMEOUT, trust_env=not is_local(self.url)
            )
        except httpx.InvalidURL as error:
            raise ExportError(f"this is no address: {error}", where=self.url) from None

    def __enter__(self) -> Ollama:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def version(self) -> str:
        """The server's version.

        Raises:
            ExportError: nobody answers, or it is no Ollama.
        """
        with self._told("asking for its version"):
            answer = self._http.get("/api/version")
        try:
            return str(answer.raise_for_status().json()["version"])
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError):
            raise ExportError(
                "what answers there is no Ollama",
                where=self.url,
                remedy="OLLAMA_HOST says where Ollama is",
            ) from None

    def send(self, path: Path, progress: Progress = _quiet) -> str:
        """Give the server a file, unless it has it.

        Returns:
            Its digest, `sha256:…`.

        Raises:
            ExportError: the server refuses it, or breaks off.
        """
        size = path.stat().st_size
        progress(f"reading {path.name}", 0, 0)
        digest = f"sha256:{sha256(path)}"
        address = f"/api/blobs/{digest}"
        with self._told("asking for a file"):
            there = self._http.head(address)
        if there.status_code == 404:
            with self._told(f"sending {path.name}"):
                sent = self._http.post(
                    address,
                    content=_chunks(path, size, progress),
                    headers={"Content-Length": str(size)},
                )
            self._require_success(sent, f"took no {path.name}")
        else:
            self._require_success(there, "does not say whether it has the file")
        progress(f"sending {path.name}", size, size)
        return digest

    def create(self, body: dict[str, Any], progress: Progress = _quiet) -> None:
        """Make a model of what the server has.

        Args:
            body: of `POST /api/create`.
            progress: is told what the server says that it does.

        Raises:
            ExportError: the server says why not, or breaks off.
        """
        finished = False
        with (
            self._told("making the model"),
            self._http.stream("POST", "/api/create", json=body | {"stream": True}) as answer,
        ):
            if not answer.is_success:
                answer.read()
                self._require_success(answer, "made no model")
            for line in answer.iter_lines():
                finished = self._reported(line, progress) or finished
        if not finished:
            raise ExportError("Ollama stopped before the model was made", where=self.url)

    def prompt(
        self,
        name: str,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        think: bool | None = None,
    ) -> str:
        """What a model is asked, as text, where a client sends these messages.

        Args:
            name: of the model.
            messages: as `POST /api/chat` has them.
            tools: likewise.
            think: what the client says of thinking; None for nothing.

        Raises:
            Refused: the model cannot be asked so, such as with tools.
            ExportError: the server does not tell it.
        """
        asked = {"model": name, "messages": messages, "tools": tools or None, "think": think}
        told = self._chat(asked | {"_debug_render_only": True})
        try:
            return str(told["_debug_info"]["rendered_template"])
        except (KeyError, TypeError):
            raise ExportError("Ollama does not say what it asks a model", where=self.url) from None

    def answer(
        self,
        name: str,
        messages: list[dict[str, Any]],
        tokens: int,
        *,
        think: bool | None = None,
    ) -> str:
        """What a model answers: the likeliest token each time, `tokens` of them at most.

        Raises:
            ExportError: the server gives no answer.
        """
        options = {"temperature": 0, "num_predict": tokens}
        asked = {"model": name, "messages": messages, "options": options, "think": think}
        told = self._chat(asked)
        return str((told.get("message") or {}).get("content") or "")

    def delete(self, name: str) -> None:
        """Take a model away; one that is not there is no error.

        Raises:
            ExportError: the server breaks off.
        """
        with self._told("taking a model away"):
            self._http.request("DELETE", "/api/delete", json={"model": name})

    def _chat(self, asked: dict[str, Any]) -> dict[str, Any]:
        body = {key: value for key, value in asked.items() if value is not None}
        with self._told("asking a model"):
            answer = self._http.post("/api/chat", json=body | {"stream": False})
        self._require_success(answer, "does not run the model")
        return _json(answer.text) or {}

    def _reported(self, line: str, progress: Progress) -> bool:
        """Pass a line on; whether it says that all is done."""
        if not line.strip():
            return False
        value = _json(line)
        if value is None:
            raise ExportError(f"Ollama answers what is no JSON: {line[:80]!r}", where=self.url)
        if "error" in value:
            raise ExportError(f"Ollama made no model: {value['error']}", where=self.url)
        status = str(value.get("status", ""))
        done, total = value.get("completed"), value.get("total")
        if isinstance(done, int) and isinstance(total, int):
            progress(status, done, total)
        else:
            progress(status, 0, 0)
        return status == "success"

    def _require_success(self, answer: httpx.Response, what: str) -> None:
        if answer.is_success:
            return
        value = _json(answer.text)
        said = value["error"] if value and "error" in value else answer.text.strip()[:200]
        kind = Refused if answer.is_client_error else ExportError
        raise kind(
            f"Ollama {what}: {said or answer.reason_phrase} ({answer.status_code})",
            where=self.url,
        )

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise ExportError(
                "Ollama does not answer",
                where=self.url,
                remedy="start it (`ollama serve`, or the app); OLLAMA_HOST says where it is",
            ) from None
        except httpx.TimeoutException:
            raise ExportError(f"Ollama fell silent while {doing}", where=self.url) from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise ExportError(
                f"the connection to Ollama broke off while {doing}: {reason}",
                where=self.url,
                remedy="Ollama's log says more",
            ) from None


def create(
    name: str,
    modelfile: Modelfile,
    gguf: Path | None,
    *,
    adapter: Path | None = None,
    host: str | None = None,
    progress: Progress = _quiet,
) -> str:
    """Make a model in Ollama; one of the same name is replaced.

    Args:
        name: what it is called there, `[namespace/]model[:tag]`.
        modelfile: of the model; its paths give way to the files named here.
        gguf: the model; None to make it from what Ollama has (`modelfile.from_`).
        adapter: an adapter in GGUF on top. Newer versions of Ollama take none.
        host: as `base_url` takes it.
        progress: is told what is being done, and how many bytes of it.

    Returns:
        The version of Ollama that has it now.

    Raises:
        ExportError: nobody answers, or Ollama refuses; what was sent stays there.
    """
    require_name(name)
    with Ollama(host) as server:
        version = server.version()
        # Names that a server on any system takes; where the files are is nobody's business.
        files = {"model.gguf": server.send(gguf, progress)} if gguf else None
        adapters = {"adapter.gguf": server.send(adapter, progress)} if adapter else None
        body: dict[str, Any] = {
            "model": name,
            "files": files,
            "from": None if gguf else modelfile.from_,
            "adapters": adapters,
            "template": modelfile.template,
            "system": modelfile.system,
            "parameters": _parameters(modelfile.parameters),
            "license": modelfile.license,
            "messages": [{"role": r, "content": c} for r, c in modelfile.messages] or None,
        }
        server.create({key: value for key, value in body.items() if value is not None}, progress)
    return version


def require_name(name: str, where: str = "name") -> None:
    """See that Ollama takes a name.

    Args:
        name: of a model.
        where: the option that it is of.

    Raises:
        ExportError: it does not.
    """
    if parse_name(name) is None:
        raise ExportError(
            f"Ollama takes no model called {name!r}",
            where=where,
            remedy="use letters, digits, dots, hyphens and underscores, as in shell, shell:v2 "
            "or me/shell:v2",
        )


def _parameters(pairs: tuple[tuple[str, Value], ...]) -> dict[str, Any] | None:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name == "stop":
            made.setdefault(name, []).append(value)
        else:
            made[name] = value
    return made or None


def _chunks(path: Path, size: int, progress: Progress) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            progress(f"sending {path.name}", done, size)
            yield chunk
            done += len(chunk)


def is_local(url: str) -> bool:
    """Whether a server's address is this machine's."""
    name = httpx.URL(url).host
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _json(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
