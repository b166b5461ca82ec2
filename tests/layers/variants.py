"""Names of `tests.support` for tests of other packages."""

from tests.support.models import check, check_memory, every_variant, hidden

__all__ = ["check", "check_memory", "every_variant", "hidden"]
