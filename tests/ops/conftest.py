import pytest

from tests.ops.engines import ABSENT
from tests.support.threads import threads as threads


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip each test once, not with each case, for an engine that this machine lacks."""
    met: set[object] = set()
    again: list[pytest.Item] = []
    for item in items:
        if isinstance(item, pytest.Function) and ABSENT.mark in item.own_markers:
            key = (item.function, item.callspec.params["engine"])
            again += [item] * (key in met)
            met.add(key)
    config.hook.pytest_deselected(items=again)
    items[:] = [item for item in items if item not in {*again}]
