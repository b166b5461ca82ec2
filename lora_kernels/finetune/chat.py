"""Tokenize chats, prompts with completions and plain text, with labels; pad examples."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .data import decode_text, is_json, read_file
from .errors import UsageError
from .options import check_numbers, suggest

IGNORED = -100  # transformers' label of a token that adds nothing to the loss
ROLES = ("system", "user", "assistant", "tool", "developer")
FORMS = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, '
    '{"prompt": ..., "completion": ...} or {"text": ...}'
)
TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".parquet", ".arrow")
TO_LINES = "pandas.read_csv(FILE).to_json('data.jsonl', orient='records', lines=True)"
_LISTED = 5  # the number of places that a report names
Example = dict[str, list[int]]


class BadLine(ValueError):
    """The problem with one example, and the remedy. `load_chat` adds file and line."""


@dataclass
class Report:
    """Counts of the examples read and truncated; `str()` describes them in words.

    Attributes:
        learnt: number of tokens with a label.
        cut: the places of examples longer than max_length, with their lengths.
        lost: number of tokens beyond max_length.
    """

    max_length: int
    examples: int = 0
    tokens: int = 0
    learnt: int = 0
    cut: list[str] = field(default_factory=list)
    lost: int = 0

    def __str__(self) -> str:
        text = (
            f"{self.examples:,} examples, {self.tokens:,} tokens, loss on {self.learnt:,} of them"
        )
        if self.cut:
            text += (
                f"\n{len(self.cut):,} examples cut to {self.max_length} tokens, {self.lost:,} "
                f"tokens lost ({_list_some(self.cut)}); raise the maximum length or split them"
            )
        return text

    def fit(self, row: Example, place: str) -> Example:
        """Return the row truncated to the maximum length, and count it."""
        total, limit = len(row["input_ids"]), self.max_length
        cut = {name: values[:limit] for name, values in row.items()}
        learnt = sum(label != IGNORED for label in cut["labels"])
        if not learnt and total > limit:
            raise BadLine(
                f"{total} tokens, and nothing to learn in the first {limit}; raise the maximum "
                "length or shorten what stands before the assistant's turn"
            )
        if not learnt:
            raise BadLine("holds no token to learn; give an answer that is not empty")
        if total > limit:
            self.cut.append(f"{place}: {total} tokens")
            self.lost += total - limit
        self.examples += 1
        self.tokens += len(cut["input_ids"])
        self.learnt += learnt
        return cut


def _list_some(places: Sequence[str]) -> str:
    more = f"; and {len(places) - _LISTED:,} more" if len(places) > _LISTED else ""
    return "; ".join(places[:_LISTED]) + more


class ChatData(torch.utils.data.Dataset[Example]):
    """A dataset of examples for transformers' Trainer, with a `report` on reading them.

    Items are dicts of equally long lists: input_ids and labels.
    """

    def __init__(self, rows: Sequence[Example], report: Report) -> None:
        self.rows, self.report = list(rows), report

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]

    def split(self, share: float, seed: int = 0) -> tuple[ChatData, ChatData]:
        """Split the rows at random into (training, evaluation), at least one row each.

        Args:
            share: the fraction of evaluation rows, in (0, 1).
            seed: of the random choice.

        Raises UsageError if share is out of range or there are fewer than two rows.
        """
        if not 0.0 < share < 1.0:
            raise UsageError(f"share: got {share}, want a number in (0, 1)")
        if len(self) < 2:
            raise UsageError(f"data: got {len(self)} rows, want at least 2 to split off some")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        count = min(max(1, round(share * len(self))), len(self) - 1)
        parts = (sorted(order[count:]), sorted(order[:count]))
        train, val = (ChatData([self.rows[i] for i in part], self.report) for part in parts)
        return train, val


def load_chat(
    files: str | Path | Iterable[str | Path],
    tokenizer: Any,
    *,
    max_length: int = 512,
) -> ChatData:
    """Read examples from files and tokenize them, with labels on the tokens to learn.

    Args:
        files: files of JSON lines (`.jsonl`, `.json`), each line one of

            {"messages": [{"role": ..., "content": ...}, ...]}   rendered by the chat template; the
                loss is on every assistant turn and its end marker
            {"prompt": ..., "completion": ...}   two strings without a template, or two lists of
                messages; the loss is on the completion
            {"text": ...}   the loss is on all tokens

            Files with any other suffix are plain text, split into documents of max_length tokens.
            Without a template, text ends in the tokenizer's end-of-sequence token.
        tokenizer: a fast tokenizer of transformers.
        max_length: the largest number of tokens of an example, at least 2. Longer examples are
            truncated and counted in `.report`.

    Raises UsageError that names file and line.

    >>> import pathlib, tempfile
    >>> from lora_kernels.finetune.chat import load_chat
    >>> file = pathlib.Path(tempfile.mkdtemp(), "chat.jsonl")
    >>> _ = file.write_text('{"text": ')
    >>> load_chat(file, tokenizer=None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    lora_kernels.finetune.UsageError: data: ...chat.jsonl:1: invalid JSON (Expecting value at ...
    """
    check_numbers({"max_length": max_length})
    report, rows = Report(max_length), []
    for file in [files] if isinstance(files, str | Path) else files:
        for place, read in _examples(Path(file), tokenizer, max_length):
            try:
                rows.append(report.fit(read(), place))
            except (BadLine, UsageError) as error:
                raise UsageError(f"data: {place}: {error}") from error
    if not rows:
        raise UsageError("data: holds no example of two tokens or more")
    return ChatData(rows, report)


def read_data(file: Path) -> bytes:
    """Return the bytes of a file of examples. Raises UsageError if it is missing or blank."""
    if file.suffix.lower() in TABLES:
        raise UsageError(
            f"data: {file} is a table, which would be read as plain text with its header; write "
            f"JSON lines with the fields prompt and completion, or text: {TO_LINES}"
        )
    raw = read_file(file, "data", "JSON lines or plain text")
    if not raw.strip():
        raise UsageError(f"data: {file} is empty; give one example a line, like {FORMS}")
    return raw


def _examples(
    file: Path, tokenizer: Any, max_length: int
) -> Iterator[tuple[str, Callable[[], Example]]]:
    """Yield each example's place, `file:line`, and a function that tokenizes it."""
    raw = read_data(file)
    if not is_json(file):
        text = {"text": decode_text(raw, file, "data")}
        ids = encode(text, tokenizer)["input_ids"]
        for part in (ids[i : i + max_length] for i in range(0, len(ids), max_length)):
            if len(part) > 1:
                yield str(file), partial(_row, part, [True] * len(part))
        return
    for place, line in _lines(raw, file):
        yield place, partial(_read_line, line, tokenizer)


def check_files(files: Iterable[Path]) -> None:
    """Raise UsageError for files that `load_chat` refuses, as far as that needs no tokenizer.

    Needs no slow import, so a command can call it first.
    """
    for file in files:
        raw = read_data(file)
        if not is_json(file):
            decode_text(raw, file, "data")
            continue
        for place, line in _lines(raw, file):
            try:
                _parse_line(line)
            except BadLine as error:
                raise UsageError(f"data: {place}: {error}") from error


def _lines(raw: bytes, file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each line that is not blank, after its place: `file:line`."""
    # str.splitlines would also break at separators that JSON allows in a string.
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            yield f"{file}:{number}", line


def _read_line(line: bytes, tokenizer: Any) -> Example:
    return encode(_parse_line(line), tokenizer)


def _parse_line(line: bytes) -> Any:
    """Return the record of a line. Raises BadLine."""
    try:
        record = json.loads(line.decode("utf-8"))
        if rb"\ud" in line.lower():  # half of a surrogate pair is valid JSON, but not valid text
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadLine("holds half of a surrogate pair (\\ud…), which is no text; mend it") from None
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 (byte {error.start} of the line); convert the file") from None
    except json.JSONDecodeError as error:
        hint = "one whole JSON object a line"
        if line.strip() in (b"[", b"]") or line.strip().endswith(b","):
            hint += ", not one list over many lines"
        raise BadLine(
            f"invalid JSON ({error.msg} at column {error.colno}); mend the line: want {hint}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise BadLine(f"invalid JSON ({error}); mend the line") from None
    check_record(record)
    return record


def _row(ids: Sequence[int], learnt: Iterable[Any]) -> Example:
    """Return the tokens, with labels for the tokens whose `learnt` is true.

    The first label is -100, because no token of the document precedes and predicts it.
    """
    labels = [token if on else IGNORED for token, on in zip(ids, learnt, strict=True)]
    return {"input_ids": list(ids), "labels": [IGNORED, *labels[1:]]}


def _kind(value: Any) -> str:
    """Describe a JSON value for an error message."""
    if value in ([], ""):
        return f"an empty {'list' if value == [] else 'string'}"
    return f"a JSON {type(value).__name__}"


def encode(record: Any, tokenizer: Any) -> Example:
    """Return tokens and labels of one JSON object in a form that `load_chat` accepts.

    Raises BadLine for any other object, and UsageError if the tokenizer cannot encode it.
    """
    check_record(record)
    if "messages" in record:
        return _encode_chat(record["messages"], tokenizer)
    if "prompt" not in record or "completion" not in record:
        return _encode_text(record["text"], [(0, None)], tokenizer)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list):
        return _encode_chat(prompt + completion, tokenizer, first=len(prompt))
    return _encode_text(prompt + completion, [(len(prompt), None)], tokenizer)


def check_record(record: Any) -> None:
    """Raise BadLine unless `load_chat` accepts an object of this form."""
    if not isinstance(record, Mapping):
        raise BadLine(f"got {_kind(record)}, want an object like {FORMS}")
    if "messages" in record:
        _check_messages(record["messages"], "messages")
        return
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            _check_messages(prompt, "prompt")
            _check_messages(completion, "completion")
            return
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not isinstance(text, str):
                raise BadLine(f"{name}: got {_kind(text)}, want a string")
        if not completion.strip():
            raise BadLine("completion: empty; give what the model is to answer")
        return
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            got = _kind(text.strip() if isinstance(text, str) else text)
            raise BadLine(f"text: got {got}, want a string that is not empty")
        return
    names = ("messages", "completion", "text")
    close = (difflib.get_close_matches(str(key), names, 1) for key in record)
    hint = next((f"did you mean {name}? " for (name,) in filter(None, close)), "")
    if isinstance(record.get("conversations"), list):
        hint = 'rename "conversations" to "messages", from/value to role/content. '
    if "instruction" in record and "output" in record:  # Alpaca's
        hint = (
            'put "instruction", and "input" below it, into "prompt", "output" into "completion". '
        )
    raise BadLine(f"got the keys {', '.join(map(str, record)) or 'none'}; {hint}want {FORMS}")


def _check_messages(value: Any, name: str) -> None:
    if not isinstance(value, list) or not value:
        raise BadLine(f"{name}: got {_kind(value)}, want a list of messages that is not empty")
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadLine(f'{where}: want {{"role": ..., "content": ...}}, both strings')
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise BadLine(f"{where}: got the role {role!r}; {suggest(role, ROLES)}")
        if not isinstance(content, str):
            raise BadLine(f"{where}: content: got {type(content).__name__}, want a string")
        if role == "assistant" and not content.strip():
            raise BadLine(f"{where}: the assistant's content is empty; give the answer")


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Any, first: int = 0) -> Example:
    """Encode by the chat template, with labels on assistant turns, starting at messages[first]."""
    turns = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
    if not turns:
        raise BadLine("no assistant turn, so nothing to learn; add one, or take the line out")
    if turns[0] == 0:
        raise BadLine("the first message is the assistant's; put a user or system message first")
    if not tokenizer.chat_template:
        raise UsageError(
            "a conversation, but the tokenizer has no chat template; take the tokenizer of an "
            "instruct model, set tokenizer.chat_template, or give prompt/completion or text lines"
        )
    if first == 0 and re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        markers = {"return_dict": True, "return_assistant_tokens_mask": True}
        done = _render(messages, tokenizer, tokenize=True, **markers)
        return _row(done["input_ids"], done["assistant_masks"])
    full = _render(messages, tokenizer)
    spans: list[tuple[int, int | None]] = []
    for i in turns:
        before = _render(messages[:i], tokenizer, add_generation_prompt=True)
        upto = _render(messages[: i + 1], tokenizer)
        if not (full.startswith(upto) and upto.startswith(before)):
            raise BadLine(
                f"the chat template renders what stands before messages[{i}] in another way once "
                "more follows, so that the assistant's part cannot be told from the text; put "
                "{% generation %} … {% endgeneration %} around it in the template, or give one "
                "answer a line"
            )
        # White space after the turn's end marker does not belong to the turn.
        spans.append((len(before), len(upto.rstrip())))
    return _encode_text(full, spans, tokenizer, templated=True)


def _render(messages: list[Any], tokenizer: Any, tokenize: bool = False, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadLine(f"the chat template refuses this conversation: {error}") from error


def _encode_text(
    text: str, spans: Sequence[tuple[int, int | None]], tokenizer: Any, templated: bool = False
) -> Example:
    """Encode the text, with labels on tokens whose first character lies in one of the spans.

    A template includes special tokens. Other text gets the tokenizer's special tokens and an
    end-of-sequence token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"tokenizer: got {type(tokenizer).__name__}, which does not say where its tokens stand "
            "in the text; want a fast tokenizer (PreTrainedTokenizerFast)"
        )
    # verbose=False: the tokenizer warns of long sequences, which are truncated later.
    masks = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    done = tokenizer(text, add_special_tokens=not templated, verbose=False, **masks)
    ids = list(done["input_ids"])
    learnt = [
        # Special tokens that the tokenizer added have empty offsets.
        (end > start or not special)
        and any(a <= start and (b is None or start < b) for a, b in spans)
        for (start, end), special in zip(
            done["offset_mapping"], done["special_tokens_mask"], strict=True
        )
    ]
    eos = tokenizer.eos_token_id
    if not templated and eos is not None:
        if not ids or ids[-1] != eos:
            ids.append(eos)
            learnt.append(True)
        learnt[-1] = True
    return _row(ids, learnt)


@dataclass(frozen=True)
class Collator:
    """Collate rows of `ChatData` into a batch, int64 [rows, longest], padded on the right.

    The batch has input_ids, labels (-100 on padding) and attention_mask (0 on padding).
    """

    pad_token_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Collator:
        """Pad with the tokenizer's padding token, else its end-of-sequence token, else 0."""
        names = ("pad_token_id", "eos_token_id")
        found = (getattr(tokenizer, name, None) for name in names)
        return cls(next((int(token) for token in found if token is not None), 0))

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {n: pad_sequence(c, True, fill.get(n, 0)) for n, c in columns.items()}


@torch.no_grad()
def check_flattening(model: nn.Module) -> None:
    """Raise UsageError if examples that share a row attend to each other.

    transformers' `DataCollatorWithFlattening` puts a batch into one row without a mask, and its
    models tell the examples apart by positions that restart. Here the logits of an example must not
    depend, bit for bit, on the tokens of the example before it. The model's training mode is
    restored.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4, 5, 3, 2, 1, 4], [6, 7, 5, 4, 2, 3, 2, 1, 4]], device=device)
    positions = torch.tensor([[*range(5), *range(4)]], device=device)
    training = model.training
    model.eval()
    try:
        logits = [
            model(input_ids=row[None], position_ids=positions, use_cache=False).logits[:, 5:]
            for row in ids
        ]
    except TypeError as error:  # the forward has no position_ids
        raise UsageError(
            f"padding_free: this model cannot keep examples apart ({error}); leave it off"
        ) from error
    finally:
        model.train(training)
    if not torch.equal(*logits):
        raise UsageError(
            "padding_free: in this model an example sees the one before it in its row, since its "
            "attention does not heed position_ids; leave it off"
        )
