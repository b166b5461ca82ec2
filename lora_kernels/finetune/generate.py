"""`lora-kernels generate`: generate text by a model, with an adapter in fused layers or without."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from ..core.quiet import silence_libraries
from .demo import demo_model
from .model import check_quant, locate, read_adapter_config
from .options import GenerateOptions, add_options, fill_in_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answer a prompt by a model with an adapter, its layers fused, and say how fast. --run "
        "takes both from a folder that `lora-kernels finetune` wrote. Without an adapter the model "
        "answers alone, such as one that `lora-kernels merge` wrote."
    )
    add_options(parser, GenerateOptions)


def run(args: argparse.Namespace) -> int:
    options = resolve(vars(args))
    silence_libraries()
    generate(options)
    return 0


def resolve(given: dict[str, Any]) -> GenerateOptions:
    """Fill in --run and --demo, and check the arguments without loading the model."""
    known = {"model": demo_model()} if given.get("demo") else {}
    options = GenerateOptions(**known | fill_in_run(given))
    if options.adapter is not None:
        read_adapter_config(options.adapter)
    locate(options.model)
    check_quant(options.quant, options.model)
    return options


def generate(options: GenerateOptions) -> None:
    """Stream the answer to stdout, then print the decoding speed."""
    import torch
    from transformers import TextStreamer

    from ..bench.timing import TokenClock
    from ..core.weights import share
    from ..peft import explain, fuse
    from ..peft.quantize import rewrite_codes
    from . import model

    device = model.usable_device(options.device)
    dtype = model.DTYPES[options.dtype]
    tokenizer = model.load_tokenizer(options.model)
    base: Any = model.load_base(options.model, dtype, device, options.quant)
    inputs = model.question(tokenizer, options.prompt, device)
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    settings["pad_token_id"] = tokenizer.eos_token_id
    if options.temperature:
        settings |= {"do_sample": True, "temperature": options.temperature}

    def answer(asked: Any, shown: Any = None) -> tuple[torch.Tensor, str]:
        torch.manual_seed(options.seed)
        clock = TokenClock(shown)
        tokens = model.decode(asked, inputs, streamer=clock, **settings)
        said = f"first token after {clock.times[1] * 1e3:.0f} ms"
        if clock.steps:
            median = statistics.median(clock.steps)
            said += f", then {median * 1e3:.1f} ms each ({1 / median:.1f} tokens/s), median"
        return tokens, said

    words: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if options.adapter is None:
        got, speed = answer(base, words)
        print(f"the model alone: {len(got)} tokens; {speed}")
        return
    stock = model.load_adapter(base, options.adapter)
    fused = fuse(share(stock), linears=True)
    layers = explain(fused, x_dtype=dtype)
    got, speed = answer(fused, words)
    print(*model.layer_states(layers), sep="\n")
    print(f"fused: {len(got)} tokens; {speed}")
    if options.compare:
        want, speed = answer(rewrite_codes(stock, True))
        n = min(len(got), len(want))
        equal = (got[:n] == want[:n]).long().cumprod(0).sum().item()
        same = "the same" if equal == n else f"the first {equal} the same"
        print(f"stock PEFT: {len(want)} tokens, {same}; {speed}")
