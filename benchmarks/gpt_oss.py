"""gpt-oss trained from its own checkpoint: memory and seconds a step, on a CPU.

    python -m benchmarks.gpt_oss [--layers 1] [--experts 32] [--tokens 512] [--steps 3]

It writes a checkpoint of random MXFP4 weights at gpt-oss-20b's widths, and trains adapters on the
experts and the attention. Each way runs in a process of its own: `packed_mxfp4` and `fuse`, the
same without `fuse`, and PEFT over the decoded model. Memory is what the process has written since
before loading, which files that are mapped do not add to.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.gpt_oss import WAYS, WIDTHS, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="gpt-oss packed and decoded, on a CPU")
    for name, default in (("layers", 1), ("experts", 32), ("tokens", 512), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_hidden_layers": options.layers, "num_local_experts": options.experts}
        size = write_checkpoint(Path(folder), **WIDTHS, **sizes)
        print(f"checkpoint {size / 1e6:,.0f} MB, {options.tokens} tokens")
        for way in WAYS:
            command = [sys.executable, "-m", "tests.support.gpt_oss", way, folder]
            command += [str(options.tokens), str(options.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{way:8} loading {result['loading'] / 1e6:7,.0f} MB, training "
                f"{result['training'] / 1e6:7,.0f} MB, {result['seconds']:6.2f} s a step, "
                f"loss {result['loss']:.4f}"
            )


if __name__ == "__main__":
    main()
