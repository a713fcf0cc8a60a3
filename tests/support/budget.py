"""A pytest plugin: how much processor time each test takes, and how much it may take.

A test or fixture that takes more than `LIMIT` seconds fails the run, unless the test, or the
one that asked for the fixture, is marked slow. Processor time, not wall time: a busy machine
does not change the outcome. The budget of a property is for its few examples in `make test`:
`make test-all` draws more, others each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from support.process import processor_seconds
from support.properties import ALL

LIMIT = 20.0
SHOWN = 10


@dataclass(frozen=True)
class Spent:
    """Processor seconds of a test or a fixture."""

    seconds: float
    name: str
    slow: bool


class Meter:
    """In each process that runs tests: measures phases of tests, and fixtures apart."""

    def __init__(self) -> None:
        self._of_fixtures = 0.0
        self._fixtures: list[tuple[str, float]] = []
        self._phase = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        start, others = processor_seconds(), self._of_fixtures
        try:
            return (yield)
        finally:
            own = processor_seconds() - start - (self._of_fixtures - others)
            self._of_fixtures += own
            self._fixtures.append((fixturedef.argname, own))

    def _measured(self):
        start, others = processor_seconds(), self._of_fixtures
        try:
            return (yield)
        finally:
            self._phase = processor_seconds() - start - (self._of_fixtures - others)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item):
        return (yield from self._measured())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item):
        return (yield from self._measured())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item):
        return (yield from self._measured())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        # Attributes of a report reach the process that prints, as plain values.
        report.processor_seconds = self._phase
        report.fixtures, self._fixtures = self._fixtures, []
        more_examples = ALL and getattr(item.obj, "is_hypothesis_test", False)
        report.slow = more_examples or item.get_closest_marker("slow") is not None
        return report


class Budget:
    """In the process that prints: adds up, shows the most expensive, and refuses too much."""

    def __init__(self) -> None:
        self._tests: dict[str, Spent] = {}
        self._fixtures: list[Spent] = []

    def pytest_runtest_logreport(self, report) -> None:
        seconds = getattr(report, "processor_seconds", 0.0)
        before = self._tests.get(report.nodeid)
        total = seconds + (before.seconds if before else 0.0)
        slow = getattr(report, "slow", False)
        self._tests[report.nodeid] = Spent(total, report.nodeid, slow)
        for name, own in getattr(report, "fixtures", ()):
            self._fixtures.append(Spent(own, f"fixture {name}, for {report.nodeid}", slow))

    def _all(self) -> list[Spent]:
        return sorted([*self._tests.values(), *self._fixtures], key=lambda s: -s.seconds)

    def _over(self) -> list[Spent]:
        return [spent for spent in self._all() if spent.seconds > LIMIT and not spent.slow]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session) -> None:
        if self._over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        everything = self._all()
        total = sum(spent.seconds for spent in everything)
        terminalreporter.section(f"processor time: {total:.0f} s, the most expensive first")
        for spent in everything[:SHOWN]:
            terminalreporter.write_line(f"{spent.seconds:7.1f} s  {spent.name}")
        for spent in self._over():
            terminalreporter.write_line(
                f"FAILED {spent.name}: {spent.seconds:.1f} s of processor time; a test that is "
                f"not marked slow may take {LIMIT:.0f} s",
                red=True,
            )


def pytest_configure(config) -> None:
    config.pluginmanager.register(Meter(), "processor-time-meter")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budget(), "processor-time-budget")
