"""The errors of the recipes."""

from __future__ import annotations


class UsageError(ValueError):
    """An argument that cannot be used.

    The message is one line: the argument's name, the problem, and the remedy. The command line
    prints the option's name in place of the argument's.
    """

    __module__ = "lora_kernels.finetune"  # tracebacks show the name that users import


class TrainingError(RuntimeError):
    """A computation that cannot teach or prove anything: NaN, infinity, or nothing but zeros.

    The message is one line: the step, the problem, and the remedy.
    """

    __module__ = "lora_kernels.finetune"
