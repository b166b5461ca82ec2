"""The memory of GGUF files: `python -m benchmarks.gguf` writes results/gguf.json.

The packed weights of each type beside the file's bytes; times of SmolLM2's file; and the peaks of
loading and of a training step beside PEFT's over the decoded model, each in a process of its own:
of SmolLM2's file in float32, and of a random file of Llama 3.2 1B's shape in Q4_K and Q6_K in
bfloat16. With llama-cpp-python also a token of `generate` beside llama.cpp's over that file. On
two cores it takes ten minutes, 12 GB and, for the file, 1 GB of disk.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_kernels.bench import end_to_end, process_memory, results
from lora_kernels.bench.end_to_end import GGUF, GGUF_16, SIZES, STEP, TOKEN, Cell
from lora_kernels.core.quiet import silence_libraries
from lora_kernels.finetune.demo import demo_model
from lora_kernels.integrations import load_gguf
from lora_kernels.peft.packed import packed_bytes
from lora_kernels.quantization.readers.gguf import BLOCKS, read
from lora_kernels.quantization.tensor import QuantizedTensor
from tests.support.gguf_files import random_blocks, write

FILE = Path(__file__).with_name("results") / "gguf.json"
SIDE = 2048  # of the weight whose bytes are counted for each type


def count_types() -> dict[str, dict[str, Any]]:
    """Return for each type the bytes of a weight in the file and packed, and its form."""
    found = {}
    for kind in BLOCKS:
        rows = random_blocks(kind, SIDE, SIDE, 1.0, np.random.default_rng(0))
        weight = read(torch.from_numpy(rows), kind, torch.float32)
        found[kind] = {
            "elements": SIDE * SIDE,
            "file": rows.nbytes,
            "packed": weight.nbytes,
            "bits": weight.codes.bits,
            "block": weight.blocksize,
        }
    return found


def load(file: Path, dtype: torch.dtype, name: str) -> Any:
    if name == "ours":
        return load_gguf(file, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)


def load_peak(file: Path, dtype: torch.dtype, name: str) -> int:
    """Return the peak bytes of loading, over what the process held before."""
    silence_libraries()
    cpu = torch.device("cpu")
    before = process_memory.reset_peak(cpu)
    if before is None:
        raise SystemExit("this system does not report its peak memory")
    load(file, dtype, name)
    return process_memory.peak(cpu) - before


def packed_share(file: Path, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of the packed weights, and of the same tensors in the file."""
    model = load_gguf(file, dtype=dtype)
    held = packed_bytes(model)
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    count = sum(isinstance(weight, QuantizedTensor) for weight in linear)
    tensors = [t for t in gguf.GGUFReader(file).tensors if t.name.startswith("blk.")]
    quantized = [t for t in tensors if t.tensor_type.name in BLOCKS]
    assert count == len(quantized), (count, len(quantized))
    return {"packed": held, "file": sum(int(t.n_bytes) for t in quantized)}


def in_process(call: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def measure(file: Path, base: str) -> dict[str, Any]:
    cell = Cell(str(file), base, STEP)
    found: dict[str, Any] = {"size": file.stat().st_size, "dtype": str(cell.dtype)}
    found |= in_process(packed_share, file, cell.dtype)
    threads = torch.get_num_threads()
    for name in ("ours", "peft"):
        found[f"load, {name}"] = in_process(load_peak, file, cell.dtype, name)
        found[f"step, {name}"] = in_process(end_to_end.peak_of, cell, name, threads)
        print(file.name, name, found, flush=True)
    return found


def write_1b(folder: Path) -> Path:
    """Write a random file of Llama 3.2 1B's shape: blocks in Q4_K, embeddings in Q6_K."""
    sizes: Any = SIZES["llama3.2-1b"]
    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True)
    return write(folder / "llama3.2-1b.Q4_K.gguf", config, "llama", "Q4_K", embedding="Q6_K")


def time_tokens(file: Path, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Return median seconds of a greedy token of ours and of llama.cpp's, by threads, in turns.

    Both have the same adapter on all linear layers, and a prompt of 128 tokens.
    """
    import llama_cpp

    from lora_kernels.bench.timing import TokenClock
    from lora_kernels.finetune import export_gguf

    cell = Cell(str(file), GGUF, TOKEN)
    model = end_to_end.build(cell, "cpu", ("ours",))["ours"]
    ids = torch.randint(1000, 40000, (1, 128), generator=torch.Generator().manual_seed(0))
    how: Any = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 16, "max_new_tokens": 16}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        lora = Path(folder) / "adapter.gguf"
        export_gguf(file, folder, lora)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            counts = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": 256}
            llama = llama_cpp.Llama(str(file), lora_path=str(lora), verbose=False, **counts)
            seconds: dict[str, list[float]] = {"ours": [], "llama.cpp": []}
            for turn in range(1 + rounds):
                clock = TokenClock()
                model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **how)
                llama.reset()
                tokens, times = llama.generate(ids[0].tolist(), temp=0.0), []
                for _ in range(16):
                    next(tokens)
                    times.append(time.perf_counter())
                steps = [b - a for a, b in itertools.pairwise(times)]
                if turn:
                    seconds["ours"] += clock.steps
                    seconds["llama.cpp"] += steps
            llama.close()
            found[str(threads)] = {name: statistics.median(s) for name, s in seconds.items()}
    return found


def time_mode(file: Path, mode: str) -> dict[str, float]:
    """Return median seconds of a step or a token of the frozen model, PEFT's and ours, in turns."""
    silence_libraries()
    row = end_to_end.measure(Cell(str(file), GGUF, mode), "cpu", 10.0)
    if row.misses:
        raise SystemExit(f"{mode}: {row.misses}")
    return row.p50


def main() -> None:
    silence_libraries()
    found: dict[str, Any] = {"provenance": results.provenance(["float32"], "cpu")}
    found["types"] = count_types()
    found["models"] = {}
    demo = demo_model()
    found["times"] = {mode: in_process(time_mode, demo, mode) for mode in (STEP, TOKEN)}
    if find_spec("llama_cpp") is not None:
        found["tokens"] = in_process(time_tokens, demo)
        found["llama-cpp-python"] = version("llama-cpp-python")
    found["models"][demo.name] = measure(demo, GGUF)
    with tempfile.TemporaryDirectory() as folder:
        large = write_1b(Path(folder))
        found["models"][large.name] = measure(large, GGUF_16)
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
