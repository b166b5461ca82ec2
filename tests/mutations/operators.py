"""Mutations of the kind that a hurried programmer makes, which Cosmic Ray lacks.

Half of the mistakes that the tests missed were of these kinds: a condition without one of its
operands, an argument that is not passed on, a step that is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

Edit = tuple[ast.AST, str]  # a node, and the text that takes its place


def edits(tree: ast.AST, source: str) -> Iterator[Edit]:
    """Yield the edits of a module: one node and its replacement each."""
    text = lambda node: ast.get_source_segment(source, node) or ""  # noqa: E731
    for node in ast.walk(tree):
        match node:
            case ast.BoolOp(op=op, values=values):
                word = " and " if isinstance(op, ast.And) else " or "
                for dropped in values:
                    kept = [f"({text(value)})" for value in values if value is not dropped]
                    yield node, f"({word.join(kept)})"
            case ast.If(test=test) | ast.While(test=test):
                yield test, f"(not ({text(test)}))"
            case ast.IfExp(body=body, orelse=orelse):
                yield node, f"({text(body)})"
                yield node, f"({text(orelse)})"
            case ast.comprehension(ifs=[test]):
                yield test, "True"
            case ast.Call(func=func, args=args, keywords=keywords):
                for dropped in keywords:
                    given = [*args, *(k for k in keywords if k is not dropped)]
                    yield node, f"{text(func)}({', '.join(map(text, given))})"
                if isinstance(func, ast.Attribute):
                    yield node, f"({text(func.value)})"
                elif len(args) == 1 and not keywords:
                    yield node, f"({text(args[0])})"
            case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Delete():
                yield node, "pass"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield node, "pass"


def apply(source: str, edit: Edit) -> str:
    """Return the source with one edit made.

    >>> edit = list(edits(ast.parse("y = a and b"), "y = a and b"))[0]
    >>> apply("y = a and b", edit)
    'y = ((b))'
    """
    node, replacement = edit
    lines = source.splitlines(keepends=True)

    def position(line: int, column: int) -> int:
        return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())

    start = position(node.lineno, node.col_offset)  # type: ignore[attr-defined]
    end = position(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
    return source[:start] + replacement + source[end:]
