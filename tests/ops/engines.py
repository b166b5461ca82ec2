"""Run a test once for each of `case.ENGINES`.

Placed above a test's other parametrizations the engine varies fastest, so that a case's reference
is computed once for all of them.
"""

import pytest

from lora_kernels.measure import case

_here = case.engines()


def _engines(*names: str) -> pytest.MarkDecorator:
    absent = pytest.mark.skip(reason="this machine or build lacks the instruction set")
    params = [pytest.param(name, marks=() if name in _here else absent) for name in names]
    return pytest.mark.parametrize("engine", params, indirect=True)


every_engine = _engines(*case.ENGINES)
every_native_engine = _engines(*case.ENGINES[1:])
every_tiled_engine = _engines("amxbf16", "amxbf16 single pass")
every_thread_count = pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
