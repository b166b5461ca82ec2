"""Labels on the assistant's tokens alone, bad lines by number, padded and flattened alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from lora_kernels.finetune import UsageError
from lora_kernels.finetune.chat import ChatData, Collator, check_flattening, load_chat
from tests.finetune.tiny import TEMPLATE, chat, gpt2, llama, tokenizer, write_lines
from tests.support.assertions import assert_close_derived

MARKED = (
    "{% for m in messages %}<im>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)
# As Qwen3's: what an earlier turn thought is left out once a later one follows.
FORGETFUL = (
    "{% for m in messages %}<im>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'][:1] }}{% endif %}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)

RTOL = 2.0**-15


def load(tmp_path: Path, records: list[Any], tok: Any = None, **options: Any) -> ChatData:
    file = write_lines(tmp_path / "chat.jsonl", records)
    return load_chat(file, tok or tokenizer(), **options)


def learnt(row: dict[str, list[int]], tok: Any) -> list[str]:
    """The stretches of the text that have labels."""
    parts: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label == -100:
            parts.append([])
        else:
            parts[-1].append(token)
    return [tok.decode(part) for part in parts if part]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["prefixes", "markers"])
def test_loss_on_the_assistants_turns_alone(tmp_path: Path, template: str) -> None:
    tok = tokenizer(template)
    record = chat("Who?", "Ada — née Byron.", "When?", "1815")
    record["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (row,) = load(tmp_path, [record], tok)
    assert learnt(row, tok) == ["Ada — née Byron.<end>", "1815<end>"]
    assert tok.decode(row["input_ids"]) == tok.apply_chat_template(
        record["messages"], tokenize=False
    )


@pytest.mark.parametrize(
    ("record", "want", "whole"),
    [
        ({"prompt": "2+2=", "completion": "4"}, ["4<eos>"], "2+2=4<eos>"),
        ({"text": "abc"}, ["bc<eos>"], "abc<eos>"),  # nothing predicts the first token
        (
            {
                "prompt": [*chat("1", "2", "3")["messages"]],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            ["4<end>"],
            "<im>user\n1<end>\n<im>assistant\n2<end>\n<im>user\n3<end>\n<im>assistant\n4<end>\n",
        ),
    ],
    ids=["completion", "text", "messages of a completion"],
)
def test_other_forms(tmp_path: Path, record: Any, want: list[str], whole: str) -> None:
    tok = tokenizer()
    (row,) = load(tmp_path, [record])
    assert learnt(row, tok) == want
    assert tok.decode(row["input_ids"]) == whole


@pytest.mark.parametrize("added", [(), ("eos",), ("pad",), ("pad", "eos")], ids=" ".join)
@pytest.mark.parametrize(
    ("record", "want"),
    [({"prompt": "2+2=", "completion": "4"}, "4<eos>"), ({"text": "abc"}, "abc<eos>")],
    ids=["completion", "text"],
)
def test_load_chat_of_a_tokenizer_that_adds_tokens_labels_one_end_of_sequence(
    tmp_path: Path, added: tuple[str, ...], record: Any, want: str
) -> None:
    """Llama's tokenizer adds a token before the text, T5's one behind it."""
    tok = tokenizer()
    form = ["$A", *(["<eos>"] if "eos" in added else [])]
    form = [*(["<pad>"] if "pad" in added else []), *form]
    special = [(token, tok.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>")]
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(form), special_tokens=special
    )
    (row,) = load(tmp_path, [record], tok)
    # Nothing predicts the first token of a row.
    first = 1 if "text" in record and "pad" not in added else 0
    assert learnt(row, tok) == [want[first:]]
    assert tok.decode(row["input_ids"]).count("<eos>") == 1


def test_a_token_across_the_border_belongs_to_the_prompt(tmp_path: Path) -> None:
    tok = tokenizer(merges=[("=", "4")])
    (row,) = load(tmp_path, [{"prompt": "2+2=", "completion": "42"}], tok)
    assert learnt(row, tok) == ["2<eos>"]


def test_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    """Windows' editors write one."""
    for name, content in (("a.jsonl", '{"text": "abc"}\n'), ("a.txt", "abc")):
        read = []
        for mark in ("", "\ufeff"):
            file = tmp_path / name
            file.write_text(mark + content, encoding="utf-8")
            read.append(load_chat(file, tokenizer()).rows)
        assert read[0] == read[1]


def test_plain_text_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "prose.txt"
    text = "".join(map(chr, range(97, 123)))
    file.write_text(text)
    data = load_chat(file, tokenizer(), max_length=10)
    assert [len(row["input_ids"]) for row in data] == [10, 10, 7]
    ids = [token for row in data for token in row["input_ids"]]
    assert tokenizer().decode(ids) == f"{text}<eos>"
    assert data.report.cut == []


def test_truncation_is_counted_and_named(tmp_path: Path) -> None:
    data = load(tmp_path, [chat("Hi", "x" * 100), chat("Hi", "short")], max_length=40)
    whole = len("<im>user\nHi<end>\n<im>assistant\n") - 3 - 4 - 3 + 100 + 2  # 3 specials, <end>, \n
    assert [len(row["input_ids"]) for row in data] == [40, len(data[1]["input_ids"])]
    assert data.report.lost == whole - 40
    said = str(data.report)
    assert f"1 examples cut to 40 tokens, {whole - 40} tokens lost" in said
    assert f"chat.jsonl:1: {whole} tokens" in said
    assert "raise the maximum length" in said


BAD: list[tuple[Any, str]] = [
    ('{"messages": [', "invalid JSON (Expecting value at column 15); mend the line: want one"),
    ("[", "want one whole JSON object a line, not one list over many lines"),
    ("[1]", "got a JSON list, want an object like"),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "no assistant turn, so nothing to learn"),
    ({"messages": []}, "messages: got an empty list, want a list of messages"),
    ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0]: content: got NoneType"),
    (chat("Hi", " "), "messages[1]: the assistant's content is empty"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "put a user or system message first"),
    ({"mesages": []}, "got the keys mesages; did you mean messages?"),
    ({"conversations": []}, 'rename "conversations" to "messages"'),
    ({"prompt": "x", "completion": ""}, "completion: empty; give what the model is to answer"),
    ({"text": ""}, "text: got an empty string, want a string"),
    (chat("x" * 600, "y"), "tokens, and nothing to learn in the first 512; raise the maximum"),
]


@pytest.mark.parametrize(("record", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_a_bad_line_is_named(tmp_path: Path, record: Any, words: str) -> None:
    records = [chat("Hi", "there")] * 16 + [record] + [chat("Hi", "there")]
    with pytest.raises(UsageError) as error:
        load(tmp_path, records)
    assert str(error.value).startswith(f"data: {tmp_path / 'chat.jsonl'}:17: ")
    assert words in str(error.value)


def test_a_template_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    """One answer a line passes; the second turn would change what the first one said."""
    tok = tokenizer(FORGETFUL)
    with pytest.raises(UsageError, match=r"chat.jsonl:1: the chat template renders what stands"):
        load(tmp_path, [chat("Who?", "Ada", "When?", "1815")], tok)


def test_a_template_that_refuses(tmp_path: Path) -> None:
    tok = tokenizer("{{ raise_exception('no such role') }}")
    with pytest.raises(UsageError, match=r":1: the chat template refuses .*: no such role"):
        load(tmp_path, [chat("Hi", "there")], tok)


def test_no_chat_template(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"chat.jsonl:2: .* has no chat template; take the"):
        load(tmp_path, [{"text": "a"}, chat("a", "b")], tokenizer(None))


def test_files_without_examples(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(" \n\n")
    with pytest.raises(UsageError, match=r"data: .*empty.jsonl is empty; give one example a line"):
        load_chat(empty, tokenizer())
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UsageError, match=r":1: not UTF-8 \(byte 13 of the line\)"):
        load_chat(file, tokenizer())


def test_split_is_drawn_once(tmp_path: Path) -> None:
    data = load(tmp_path, [{"text": f"line {i}"} for i in range(10)])
    train, val = data.split(0.2, seed=3)
    assert (len(train), len(val)) == (8, 2)
    rows = [str(row) for row in (*train, *val)]
    assert sorted(rows) == sorted(map(str, data))
    assert list(map(str, data.split(0.2, seed=3)[1])) == list(map(str, val))


def documents(tmp_path: Path) -> ChatData:
    records = [chat("Hi", "there"), {"text": "abc"}, chat("a", "b", "c", "d"), {"text": "lonely"}]
    return load(tmp_path, [*records, {"prompt": "p", "completion": "q"}])


def results(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss summed over tokens, the gradients of all parameters, the logits."""
    model.zero_grad()
    count = int((batch["labels"][:, 1:] != -100).sum())
    out = model(**batch, use_cache=False)
    (out.loss * count).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach() * count, grads, out.logits.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_flattened_padded_and_alone_are_the_same(tmp_path: Path, make: Any, attention: str) -> None:
    """Loss, gradients and logits. In float32, as transformers' norms and losses are whatever the
    model's dtype: a hundred sums in another order, each off by 2⁻²⁴ times the root of its few
    hundred terms at most. A document that saw another one moves them by more than 2⁻¹⁰."""
    model = make(attn_implementation=attention)
    data = documents(tmp_path)
    collate = Collator.from_tokenizer(tokenizer())
    want_loss, want = torch.zeros(()), {}
    alone = {}
    for row in data:
        loss, grads, logits = results(model, collate([row]))
        want_loss = want_loss + loss
        want = {n: want.get(n, 0) + g for n, g in grads.items()}
        alone[str(row["input_ids"])] = logits[0]

    flatten = DataCollatorWithFlattening()
    for collator in (collate, flatten):
        batch = collator(list(data))
        loss, grads, logits = results(model, batch)
        torch.testing.assert_close(loss, want_loss, rtol=RTOL, atol=0)
        assert_close_derived(grads, want, rtol=RTOL)
        if collator is collate:
            for ids, mask, row_logits in zip(
                batch["input_ids"], batch["attention_mask"], logits, strict=True
            ):
                ref = alone[str(ids[mask.bool()].tolist())]
                torch.testing.assert_close(
                    row_logits[mask.bool()], ref, rtol=0, atol=RTOL * ref.abs().max().item()
                )


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_check_flattening_passes_what_keeps_examples_apart(make: Any) -> None:
    model = make().train()
    check_flattening(model)
    assert model.training


def test_check_flattening_notices_a_model_that_does_not() -> None:
    class Heedless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
            return self.model(input_ids, **kwargs)  # positions run on, so it is one document

    with pytest.raises(UsageError, match="in this model an example sees the one before"):
        check_flattening(Heedless())


@pytest.mark.parametrize(("pad", "eos", "want"), [(0, 5, 0), (None, 5, 5), (None, None, 0)])
def test_collator_pads_with_the_padding_token_or_the_last(pad: Any, eos: Any, want: int) -> None:
    tok = tokenizer()
    tok.pad_token = None if pad is None else "<pad>"
    tok.eos_token = None
    if eos is not None:
        tok.eos_token = tok.convert_ids_to_tokens(eos)
    assert Collator.from_tokenizer(tok).pad_token_id == want
    assert Collator.from_tokenizer(None).pad_token_id == 0
    row = {"input_ids": [7, 8], "labels": [7, 8]}
    batch = Collator(3)([row, {"input_ids": [9], "labels": [9]}])
    assert batch["input_ids"].tolist() == [[7, 8], [9, 3]]
    assert batch["labels"].tolist() == [[7, 8], [9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("training", [True, False])
def test_check_flattening_keeps_the_mode_of_a_model_without_positions(training: bool) -> None:
    class Unordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, input_ids: Tensor, use_cache: bool) -> None: ...

    model = Unordered().train(training)
    with pytest.raises(UsageError, match="padding_free: this model cannot keep examples apart"):
        check_flattening(model)
    assert model.training is training


def test_split_leaves_a_row_on_each_side(tmp_path: Path) -> None:
    data = load(tmp_path, [{"text": f"line {i}"} for i in range(3)])
    for share, sizes in ((0.01, (2, 1)), (0.99, (1, 2))):
        assert tuple(map(len, data.split(share))) == sizes
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match=f"share: got {share}"):
            data.split(share)
    with pytest.raises(UsageError, match="data: got 1 rows, want at least 2"):
        data.split(0.99)[0].split(0.5)
