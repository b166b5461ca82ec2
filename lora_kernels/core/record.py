"""The record of an adapted layer, and the operands that a code path takes of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Final, NamedTuple

from torch import Tensor


class Record(NamedTuple):
    """The operands of an adapted layer: of its base, and of one adapter.

        y = c ⊙ (x·Wᵀ + scaling · ((D(x)·Aᵀ) ⊙ rank_gate)·Bᵀ) + bias

    A reader makes it from the live layer in each call: `peft/read.py` for PEFT's layers,
    `LoRALayer.record` for this package's. PEFT's records have the layer's own tensors. What is
    computed of them, such as DoRA's norm or a stack of adapters, is the code path's: it puts a
    column scale, a gate or a float scaling in their place. Several active adapters are several
    records of one base.

    The first six fields are those of plain LoRA, in the order of `peft.direct.State`. The fields
    from the ninth on are further operands. None, or False, means that the layer has no such
    operand.

    Args:
        weight: W [N, K] as it is stored, dense or packed in 4 bits; an embedding's is [K, N]. None:
            no base GEMM.
        lora_A, lora_B: [R, K] and [N, R]. None: no adapter.
        bias: [N] or None.
        scaling: alpha / r. A tensor if PEFT has prepared the model for hot-swapping.
        dropout_p: of this call.
        name: of the adapter.
        variant: of LoRA, with an article, for reasons.
        lora_bias: [N], scaled by `scaling`.
        rank_gate: [R]; of AdaLoRA E [R, 1].
        ranknum: AdaLoRA's number of ranks, [1], by which the rank gate is divided.
        magnitude: DoRA's, [N]. The column scale c is magnitude ⊘ ‖W + scaling·B·A‖.
        column_scale: c, [N].
        has_row_index: whether the adapter is active in some rows of x alone, from a sequence's
            invocation tokens on (aLoRA).
        is_transposed: whether W is stored as [K, N].
        called: why the base is called as a module, and `weight` is None.
        formula: of a variant that is unknown: its class.
    """

    weight: Any
    lora_A: Any
    lora_B: Any
    bias: Tensor | None = None
    scaling: Any = 1.0
    dropout_p: float = 0.0
    name: str = ""
    variant: str | None = None
    lora_bias: Tensor | None = None
    rank_gate: Tensor | None = None
    ranknum: Tensor | None = None
    magnitude: Tensor | None = None
    column_scale: Tensor | None = None
    has_row_index: bool = False
    is_transposed: bool = False
    called: str | None = None
    formula: str | None = None


PLAIN: Final = 6  # the number of fields of plain LoRA
OPERANDS: Final = 8  # the index of the first further operand
_FIELDS = Record._fields

# What a reason calls an operand. Operands without an entry are called by their field.
_WORDS = {
    "dropout_p": "active dropout",
    "scaling": "scaling in a tensor (hot-swapping)",
    "rank_gate": "rank gate",
    "ranknum": "rank gate",
    "magnitude": "column scale",
    "column_scale": "column scale",
    "has_row_index": "row index",
    "is_transposed": "base weight stored as [K, N]",
    "called": "base that is called as a module",
    "others": "other active adapters",
}


# The operands that are no variant's own.
_SHARED = {"lora_bias", "scaling", "dropout_p", "is_transposed", "called", "others"}


class CodePath(NamedTuple):
    """A code path: the operands that it takes beyond plain LoRA's.

    Args:
        name: for reasons, such as "a block".
        taken: sets of operands, by field. The code path takes the operands of one set together.
            "others" stands for other active adapters, "scaling" for a tensor.
    """

    name: str
    taken: tuple[frozenset[str], ...]


def operands_of(record: Record) -> list[str]:
    """Return the fields of the operands that a record has beyond plain LoRA's.

    >>> operands_of(Record(None, None, None, dropout_p=0.1, has_row_index=True))
    ['has_row_index', 'dropout_p']
    """
    # Torch 2.8 can trace neither `_fields` nor a slice of a NamedTuple.
    values = list(record)
    fields = _FIELDS if len(values) == len(_FIELDS) else record._fields
    pairs = zip(fields[OPERANDS:], values[OPERANDS:], strict=True)
    names = [name for name, t in pairs if t is not None and t is not False]
    if record.dropout_p:
        names.append("dropout_p")
    if isinstance(record.scaling, Tensor):
        names.append("scaling")
    return names


def path_reason(records: Sequence[Record], path: CodePath) -> str | None:
    """Return why a code path does not compute a layer, by the operands; None if it does.

    records: of the layer's active adapters.

    >>> path = CodePath("a block", (frozenset({"rank_gate"}),))
    >>> path_reason([Record(None, None, None, dropout_p=0.1, name="law")], path)
    "adapter 'law' has an active dropout, which a block does not take"
    """
    others = ["others"] if len(records) > 1 else []
    for record in records:
        operands = operands_of(record) + others
        if operands and not any([all([o in taken for o in operands]) for taken in path.taken]):
            return _words(record, operands, path)
    return None


def _words(record: Record, operands: list[str], path: CodePath) -> str:
    """Return the reason for an operand in no set, or for two operands in no set together."""
    order = sorted(operands, key=lambda name: (name in _SHARED, name))
    unknown = [name for name in order if not any(name in taken for taken in path.taken)]
    pairs = combinations(order, 2)
    apart = [pair for pair in pairs if not any({*pair} <= taken for taken in path.taken)]
    refused, *others = unknown[:1] or (apart[0] if apart else order)
    words = " beside ".join([_noun(record, refused), *(_article(_noun(record, o)) for o in others)])
    subject = f"adapter {record.name!r}" if record.name else "the layer"
    if record.variant is not None and refused not in _SHARED:
        return f"{subject} is {record.variant}, whose {words} {path.name} does not take"
    verb = "stands beside" if refused == "others" else "has"
    return f"{subject} {verb} {_article(words)}, which {path.name} does not take"


def _noun(record: Record, operand: str) -> str:
    noun = _WORDS.get(operand, operand)
    return f"{noun} ({record.called})" if operand == "called" else noun


def _article(noun: str) -> str:
    if noun.startswith("other "):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
