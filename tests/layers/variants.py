"""What tests of other packages take from `tests.support`."""

from tests.support.models import check, check_memory, every_variant, hidden

__all__ = ["check", "check_memory", "every_variant", "hidden"]
