"""One thread: the mean of the scales is summed in an order that depends on their number."""

from importlib.util import find_spec

from tests.support.threads import threads as threads

if find_spec("bitsandbytes") is None:  # no test, but collected for its doctests
    collect_ignore = ["default_backend.py"]
