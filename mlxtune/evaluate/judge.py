"""A model that grades answers: LLM as judge (Zheng et al., 2023, arXiv:2306.05685).

Any OpenAI-compatible endpoint will do: an API, Ollama, llama-server. The judge is asked
at temperature 0 for a grade as JSON, and is not told which model an answer is from. Each
request's reply is kept on disk under the request's hash, so that asking again costs
nothing. An endpoint that fails leaves grades out; it never costs the other figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from mlxtune.errors import StorageError
from mlxtune.files import cache_folder, write_json
from mlxtune.recipe.judge import JudgeSection

_LONGEST_PAUSE = 30.0
_TELL_EVERY = 5.0  # seconds: where progress goes to a file, each is a line
_INSTRUCTION = """You grade answers. {rubric}

You are given a conversation, a reference for what comes next in it, and the answer to \
grade.

Grade from {lowest} (worst) to {highest} (best). Reply with one JSON object and nothing \
else: {{"reason": "one sentence", "grade": a whole number}}"""
_GRADE = re.compile(r'"grade"\s*:\s*"?(-?\d+)')


Messages = Sequence[Mapping[str, Any]]


class _GaveUp(Exception):
    """The endpoint cannot be used; asking on would fail likewise."""


class Judge:
    """Grades answers one by one, and counts what that costs.

    Args:
        section: `[judge]` of a suite.
        sleep: waits so many seconds.
        progress: is told which answer is graded, and what is waited for.
    """

    def __init__(
        self,
        section: JudgeSection,
        sleep: Callable[[float], None] = time.sleep,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._section = section
        self._sleep = sleep
        self._progress = progress
        self._cache = cache_folder() / "judge"
        self._client = httpx.Client(timeout=section.timeout)
        self._stopped: str | None = None
        self._tell_after = 0.0
        self._asked = self._graded = self._cached = self._unreadable = self._requests = 0
        self._tokens = {"prompt_tokens": 0, "completion_tokens": 0}
        key = section.api_key_env
        self._key = os.environ.get(key, "") if key is not None else ""
        if key is not None and not self._key:
            self._stopped = f"the environment variable {key} with its key is not set"

    def grade(
        self, messages: Messages, expected: str, answer: str, *, tools: Messages = ()
    ) -> float | None:
        """An answer's grade, scaled to [0, 1]; None where there is none.

        Args:
            messages: the conversation up to the answer, system prompt and all: the same
                answer may be right under one and wrong under another.
            expected: the answer of the data.
            answer: what is graded.
            tools: schemas of the functions that might have been called.
        """
        self._asked += 1
        if time.monotonic() >= self._tell_after:
            self._tell_after = time.monotonic() + _TELL_EVERY
            self._progress(f"judge: {self._section.model}, answer {self._asked}")
        body = self._body(messages, expected, answer, tools)
        place = self._cache / f"{_hash(self._section.endpoint, body)}.json"
        reply = _kept(place)
        if reply is not None:
            self._cached += 1
        elif self._stopped is not None:
            return None
        else:
            try:
                reply = self._request(body)
            except _GaveUp as error:
                self._stopped = str(error)
                return None
            with suppress(StorageError):  # a full disk costs the next evaluation, not this one
                write_json(place, reply)
        grade = self._read(reply)
        if grade is None:
            self._unreadable += 1
        else:
            self._graded += 1
        return grade

    def notes(self) -> list[str]:
        """What is missing, and why."""
        notes = []
        if self._stopped is not None:
            missing = self._asked - self._graded - self._unreadable
            notes.append(f"judge: {missing} of {self._asked} answers not graded: {self._stopped}")
        if self._unreadable:
            notes.append(
                f"judge: {self._unreadable} of {self._asked} replies hold no grade from "
                f"{self._section.lowest} to {self._section.highest}"
            )
        return notes

    def report(self) -> dict[str, Any]:
        """What was asked and what it cost, replies from the cache aside."""
        section, tokens = self._section, self._tokens
        cost = (
            tokens["prompt_tokens"] * section.price_input
            + tokens["completion_tokens"] * section.price_output
        ) / 1e6
        return {
            "model": section.model,
            "answers": self._asked,
            "graded": self._graded,
            "from_cache": self._cached,
            "requests": self._requests,
            **tokens,
            "cost": cost,
        }

    def _body(
        self, messages: Messages, expected: str, answer: str, tools: Messages
    ) -> dict[str, Any]:
        section = self._section
        instruction = _INSTRUCTION.format(
            rubric=section.rubric.strip(), lowest=section.lowest, highest=section.highest
        )
        # As JSON, an answer cannot pretend to be the end of itself.
        question: dict[str, Any] = {"conversation": list(messages)}
        if tools:
            question["tools"] = list(tools)
        question |= {"reference": expected, "answer": answer}
        return {
            "model": section.model,
            "temperature": 0,
            "max_tokens": section.max_tokens,
            "messages": [
                {"role": "system", "content": instruction},
                {"role": "user", "content": json.dumps(question, ensure_ascii=False)},
            ],
        }

    def _request(self, body: dict[str, Any]) -> dict[str, Any]:
        """The reply; overload, errors of the server and silence are met with patience.

        Raises:
            _GaveUp: they go on, or the request itself is refused.
        """
        problem, pause = "", 0.0
        for attempt in range(self._section.retries + 1):
            if attempt:
                self._progress(
                    f"judge: {problem}; try {attempt + 1} of {self._section.retries + 1}"
                )
                self._sleep(min(pause, _LONGEST_PAUSE))
            pause = 2.0**attempt
            self._requests += 1
            try:
                response = self._post(body)
            except httpx.TransportError as error:
                problem = f"{self._section.endpoint} does not answer ({type(error).__name__})"
                continue
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
                said = " ".join(str(error).split())[:200]
                raise _GaveUp(f"{self._section.endpoint} cannot be asked: {said}") from None
            if response.status_code == 429 or response.status_code >= 500:
                problem = f"{self._section.endpoint} says {response.status_code}"
                with suppress(ValueError):  # it may be a date too
                    pause = max(0.0, float(response.headers.get("Retry-After", "")))
                continue
            if response.status_code != 200:
                said = " ".join(response.text.split())[:200]
                raise _GaveUp(f"{self._section.endpoint} says {response.status_code}: {said}")
            return self._counted(response)
        raise _GaveUp(problem)

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        url = f"{self._section.endpoint.rstrip('/')}/chat/completions"
        return self._client.post(url, json=body, headers=headers)

    def _counted(self, response: httpx.Response) -> dict[str, Any]:
        try:
            reply = response.json()
            text = reply["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise _GaveUp(f"{self._section.endpoint} does not reply as OpenAI's API does") from None
        usage = reply.get("usage") or {}
        for name in self._tokens:
            count = usage.get(name)
            self._tokens[name] += count if isinstance(count, int) else 0
        return {"text": str(text)}

    def _read(self, reply: dict[str, Any]) -> float | None:
        # Reasoning before the object may quote it: the last one counts.
        found = _GRADE.findall(reply["text"])
        lowest, highest = self._section.lowest, self._section.highest
        if not found or not lowest <= int(found[-1]) <= highest:
            return None
        return (int(found[-1]) - lowest) / (highest - lowest)


def _hash(endpoint: str, body: dict[str, Any]) -> str:
    whole = json.dumps([endpoint, body], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


def _kept(place: Path) -> dict[str, Any] | None:
    try:
        reply = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return reply if isinstance(reply, dict) and isinstance(reply.get("text"), str) else None
