"""`lora-kernels generate`: what a model answers with its adapter, through fused layers."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from . import UsageError
from .command import quiet
from .inputs import demo_model
from .model import check_quant, locate, read_adapter_config
from .options import check_seed, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answer a prompt by a model with an adapter, its layers fused, and say how fast. --run "
        "takes both from a folder that `lora-kernels finetune` wrote."
    )
    parser.add_argument(
        "--run", type=Path, metavar="DIR",
        help="what `lora-kernels finetune` wrote: gives --model, --adapter, --dtype and --quant",
    )  # fmt: skip
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR|GGUF|ID",
        help="transformers model folder, GGUF file, or a cached hub id",
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter in PEFT's format")
    parser.add_argument("--demo", action="store_true", help="SmolLM2-135M-Instruct as the model")
    parser.add_argument("--prompt", required=True, help="what is answered")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the model (default fp32)")
    parser.add_argument(
        "--quant", choices=("nf4", "fp4"), help="hold the linear layers in 4 bits, by bitsandbytes"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default: the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument(
        "--device", default="", help="torch device (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="let stock PEFT answer too, and print both speeds"
    )


def run(args: argparse.Namespace) -> int:
    options = resolve(args)
    quiet()
    generate(options)
    return 0


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with --run and --demo filled in, checked as far as that needs no model."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    known: dict[str, Any] = {"dtype": "fp32", "quant": None}
    if args.demo:
        known["model"] = demo_model()
    if args.run:
        saved = read_run(args.run)
        known |= {"model": Path(saved["model"]), "adapter": args.run / "adapter"}
        known |= {name: saved.get(name) for name in ("dtype", "quant")}
    options = argparse.Namespace(**known | given)
    for name in ("model", "adapter"):
        if name not in options:
            raise UsageError(f"--{name} is missing; give it, or --run")
    read_adapter_config(options.adapter, "--adapter")
    check_seed(options.seed)
    if not options.prompt:
        raise UsageError("--prompt: got none, want a text that is answered")
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: got {options.max_new_tokens}, want at least 1")
    if not 0.0 <= options.temperature < float("inf"):
        raise UsageError(f"--temperature: got {options.temperature}, want 0 or a positive number")
    locate(options.model)
    check_quant(options.quant)
    return options


def generate(options: argparse.Namespace) -> None:
    """Print the answer as it comes, then how fast it came."""
    import torch
    from transformers import TextStreamer

    from ..peft import explain, fuse
    from . import model

    device = model.usable_device(options.device)
    dtype = model.DTYPES[options.dtype]
    tokenizer = model.load_tokenizer(options.model)
    base: Any = model.load_base(options.model, dtype, device, options.quant)
    stock = model.load_adapter(base, options.adapter, "--adapter")
    inputs = model.question(tokenizer, options.prompt, device)
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    settings["pad_token_id"] = tokenizer.eos_token_id
    if options.temperature:
        settings |= {"do_sample": True, "temperature": options.temperature}

    class Shown(model.Clock):
        """Prints each word as it comes."""

        def __init__(self) -> None:
            self.text: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            super().__init__()

        def put(self, tokens: torch.Tensor) -> None:
            super().put(tokens)
            self.text.put(tokens)

        def end(self) -> None:
            self.text.end()

    def speed(clock: model.Clock) -> str:
        rest = clock.steps
        text = f"first token after {clock.prefill * 1e3:.0f} ms"
        if rest:
            median = statistics.median(rest)
            text += f", then {median * 1e3:.1f} ms each ({1 / median:.1f} tokens/s), median"
        return text

    fused = fuse(model.share(stock), linears=True)
    layers = explain(fused, x_dtype=dtype)
    torch.manual_seed(options.seed)
    shown = Shown()
    got = model.decode(fused, inputs, streamer=shown, **settings)
    print(*model.layer_states(layers), sep="\n")
    print(f"fused: {len(got)} tokens; {speed(shown)}")
    if options.compare:
        torch.manual_seed(options.seed)
        clock = model.Clock()
        want = model.decode(model.rewrite_codes(stock, True), inputs, streamer=clock, **settings)
        n = min(len(got), len(want))
        equal = (got[:n] == want[:n]).long().cumprod(0).sum().item()
        same = "the same" if equal == n else f"the first {equal} the same"
        print(f"stock PEFT: {len(want)} tokens, {same}; {speed(clock)}")
