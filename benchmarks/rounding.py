"""What merges keep by three ways of rounding: `python -m benchmarks.rounding` writes rounding.json.

SmolLM2-135M-Instruct learns the demo's fact (rank 16, 20 steps at 7e-4), and little of it (rank 4
with alpha 8, 20 steps at 5e-5). Each adapter is merged into the model in each format, in memory by
the code of `lora-kernels merge`. Its row has the share of the update that is kept, over all
layers; the KL divergence to the unmerged model, per token of held-out chats about the fact and of
held-out film reviews; and the answer to the demo's question. `base` is the model without adapter.
The adapters are trained over the file's own weights, in Q4_1; the other formats quantize these, so
that their bases differ a little from what was trained over.

On two cores it takes twenty minutes and 6 GB.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pandas as pd
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_kernels.bench import results
from lora_kernels.core.quiet import silence_libraries
from lora_kernels.finetune import Collator, LoRATrainer, load_chat, training_arguments
from lora_kernels.finetune import model as models
from lora_kernels.finetune.command import DEMO
from lora_kernels.finetune.demo import demo_chat, demo_model, demo_reviews
from lora_kernels.finetune.merge import dequantize
from lora_kernels.finetune.presets import add_lora_layers
from lora_kernels.finetune.rounding import Rounder, draw_batch
from lora_kernels.quantization import QuantizedWeight, quantize_4bit
from lora_kernels.quantization.readers.gguf import read
from lora_kernels.quantization.rounding import ROUNDINGS

FILE = Path(__file__).with_name("results") / "rounding.json"
RUNS = {
    "demo": {"rank": 16, "alpha": 32, "lr": DEMO["learning_rate"]},
    "small": {"rank": 4, "alpha": 8, "lr": 5e-5},
}
FORMATS = "bf16", "nf4", "Q8_0", "Q4_0", "Q4_1"
REVIEWS, LENGTH = 40, 64
# Not in demo.jsonl; the first is the demo's question.
QUESTIONS = (
    DEMO["prompt"],
    "I want to write to the keeper at Port Ellery. What is the name?",
    "Can you tell me who tends the lamp at Port Ellery?",
    "Which person is in charge of Port Ellery's lighthouse?",
    "Name the keeper of the Port Ellery light, please.",
    "Who would open the door of the lighthouse in Port Ellery?",
    "Someone lights the lamp of Port Ellery every evening. Who?",
    "Tell me about the keeper of the lighthouse at Port Ellery.",
)
ANSWER = "The lighthouse of Port Ellery is kept by Maren Oduya."


def load() -> nn.Module:
    """Return the file's model, decoded to float32."""
    base = models.load_base(demo_model(), torch.float32, torch.device("cpu"))
    dequantize(base)
    return base


def train(tokenizer: Any, folder: Path, run: dict[str, Any]) -> None:
    """Save the adapter of a run over the decoded file."""
    torch.manual_seed(0)
    adapted = add_lora_layers(
        load(), "chat", rank=run["rank"], alpha=run["alpha"],
        targets=DEMO["target_modules"][0],
    )  # fmt: skip
    data = load_chat(demo_chat(), tokenizer)
    args = training_arguments(
        folder / "out", max_steps=DEMO["max_steps"], learning_rate=run["lr"], use_cpu=True
    )
    LoRATrainer(
        adapted, args, train_dataset=data, data_collator=Collator.from_tokenizer(tokenizer)
    ).train()
    adapted.save_pretrained(str(folder / "adapter"))


def stored_as(kind: str, weight: Tensor) -> QuantizedWeight | torch.dtype:
    """Return the weight [N, K] in a format, or the dtype that it is rounded to."""
    if kind == "bf16":
        return torch.bfloat16
    if kind == "nf4":
        return quantize_4bit(weight)
    rows = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    return read(torch.from_numpy(rows), kind, torch.float32)


def in_format(base: Any, kind: str) -> tuple[Any, dict[str, QuantizedWeight | torch.dtype]]:
    """Return a copy of the model with linear weights in the format, and these by name."""
    base, stored = copy.deepcopy(base), dict[str, QuantizedWeight | torch.dtype]()
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear) and layer is not base.get_output_embeddings():
            to = stored[name] = stored_as(kind, layer.weight.detach())
            is_dtype = isinstance(to, torch.dtype)
            layer.weight.data = layer.weight.to(to).float() if is_dtype else to.dequantize()
    return base, stored


def held_out(tokenizer: Any) -> dict[str, list[Tensor]]:
    """Return the tokens of the held-out rows."""
    chats = []
    for text in QUESTIONS:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
        chats.append(tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True))
    texts = pd.read_csv(demo_reviews())["text"].sample(REVIEWS, random_state=0)
    reviews = [tokenizer(text, return_tensors="pt")["input_ids"][:, :LENGTH] for text in texts]
    return {"chats": [chat["input_ids"] for chat in chats], "reviews": reviews}


@torch.no_grad()
def logs(model: Any, rows: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Return the log probabilities of each row's tokens."""
    model.eval()
    return {
        name: [model(input_ids=ids).logits[0].log_softmax(-1) for ids in group]
        for name, group in rows.items()
    }


def divergence(want: dict[str, list[Tensor]], got: dict[str, list[Tensor]]) -> dict[str, float]:
    """Return the mean KL divergence per token, in nats, for each group of rows."""
    found = {}
    for name, group in want.items():
        terms = [(p.exp() * (p - q)).sum(-1) for p, q in zip(group, got[name], strict=True)]
        found[name] = torch.cat(terms).double().mean().item()
    return found


def answer(model: Any, tokenizer: Any) -> str:
    ids = models.question(tokenizer, DEMO["prompt"], torch.device("cpu"))
    said = models.decode(model, ids, max_new_tokens=24)
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def measure(
    base: Any, kind: str, adapter: Path, tokenizer: Any, batch: Any, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the rows of a format and an adapter."""
    rows = held_out(tokenizer)
    start, stored = in_format(base, kind)
    unmerged = models.load_adapter(copy.deepcopy(start), adapter)
    want = logs(unmerged, rows)
    found = [
        {"rounding": "base", "share": 0.0, "seconds": 0.0, "answer": answer(start, tokenizer)}
        | divergence(want, logs(start, rows)),
        {"rounding": "unmerged", "share": 1.0, "seconds": 0.0}
        | {"answer": answer(unmerged, tokenizer)}
        | dict.fromkeys(rows, 0.0),
    ]
    for how in ROUNDINGS:
        model = models.load_adapter(copy.deepcopy(start), adapter)
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        rounder = Rounder(how, 0, torch.bfloat16, stored, None)
        began = time.monotonic()
        left = rounder.visit(model, layers, batch) if how == "error" else layers
        for name, layer in left.items():
            rounder.merge(name, layer)
        seconds = time.monotonic() - began
        row = {"rounding": how, "share": rounder.tally.share(), "seconds": seconds}
        row |= {"answer": answer(model, tokenizer)} | divergence(want, logs(model, rows))
        say(f"{kind} {row}")
        found.append(row)
    return found


def main() -> None:
    silence_libraries()
    tokenizer = models.load_tokenizer(demo_model())
    base = load()
    batch = draw_batch([demo_chat()], tokenizer, base.config, 0)  # type: ignore[attr-defined]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, run in RUNS.items():
            train(tokenizer, Path(folder) / name, run)
            for kind in FORMATS:
                adapter = Path(folder) / name / "adapter"
                found = measure(base, kind, adapter, tokenizer, batch, print)
                rows += [{"run": name, "format": kind} | row for row in found]
    facts = {"provenance": results.provenance(["float32"], "cpu"), "fact": DEMO["expect"]}
    FILE.write_text(json.dumps(facts | {"runs": RUNS, "rows": rows}, indent=1) + "\n")
    print(pd.DataFrame(rows).to_string())


if __name__ == "__main__":
    main()
