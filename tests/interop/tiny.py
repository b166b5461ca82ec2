"""Names of `tests.support` for tests of other packages."""

from tests.support.assertions import FLOAT64_RTOL
from tests.support.assertions import assert_close_derived as assert_same
from tests.support.peft_models import count_ops

__all__ = ["FLOAT64_RTOL", "assert_same", "count_ops"]
