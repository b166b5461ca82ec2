"""The base model, the adapters on it, and copies that share its weights."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..layers import adaptable_experts, quantize_experts
from ..layers.experts import unsupported_reason
from . import UsageError
from .checkpoints import count_more, translate_errors
from .options import MAX_LENGTH

if TYPE_CHECKING:
    from ..peft import Explanation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output embedding


def locate(model: Path, argument: str = "model") -> tuple[Path, str | None]:
    """Return the folder to load from and, if the weights are in a GGUF file, that file's name.

    model: a folder, a GGUF file, or a hub id whose snapshot is in the local cache.

    Raises UsageError if there is nothing to load, or nothing to load it with.
    """
    wanted = "give a transformers model folder, a GGUF file or a hub id that is in the local cache"
    if not model.exists() and (snapshot := cached_snapshot(str(model))):
        return snapshot, None
    if (model / "config.json").is_file():
        return model, None
    files = sorted(model.glob("*.gguf")) if model.is_dir() else [model]
    if not files:
        problem = f"{model} holds neither a config.json nor a .gguf file; {wanted}"
    elif len(files) > 1:
        names = ", ".join(f.name for f in files)
        problem = f"{model} holds several GGUF files ({names}); name one"
    elif not files[0].is_file():
        problem = f"there is no {model}; {wanted}"
    elif files[0].suffix != ".gguf":
        problem = f"{model} is no .gguf file; {wanted}"
    elif importlib.util.find_spec("gguf") is None:
        problem = f"reading {files[0].name} needs the package gguf: pip install gguf"
    else:
        return files[0].parent, files[0].name
    raise UsageError(f"{argument}: {problem}")


def cached_snapshot(name: str) -> Path | None:
    """Return the folder of a hub id's snapshot in the local cache, or None; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no hub id after all, such as "a..b"
        return None
    return Path(config).parent if isinstance(config, str) else None


def identifier(model: Path) -> str:
    """Return what names the model from any working directory: a full path, or the hub id."""
    return str(model.resolve()) if model.exists() else str(model)


# PEFT may save these layers whole beside an adapter.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte")


def load_adapter(base: Any, folder: Path) -> Any:
    """Return stock PEFT's model of `base` with the adapter that the folder holds, in eval mode.

    Raises UsageError if the adapter cannot be read or does not fit the base. PEFT would leave the
    weight of a missing key as it was initialized; here a missing, unexpected or misshapen one is an
    error, which names the first such key and counts the others.
    """
    import peft

    config = read_adapter_config(folder)
    config.inference_mode = True
    config.base_model_name_or_path = None  # PEFT warns where the base has moved
    unfit = f"adapter: {folder} does not fit the base"
    with translate_errors(unfit, ValueError, TypeError, RuntimeError), adaptable_experts(base):
        stock: Any = peft.get_peft_model(base, config)
    names = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((folder / name).is_file() for name in names):  # PEFT would ask a hub for it
        raise UsageError(f"adapter: {folder} holds no {names[0]}")
    with translate_errors(f"adapter: {folder} cannot be read"):
        state: dict[str, Tensor] = peft.load_peft_weights(str(folder), device=str(stock.device))
    want = peft.get_peft_model_state_dict(stock, save_embedding_layers=False)
    embeddings = {key for key in state if key.rpartition(".")[0].endswith(_EMBEDDINGS)}
    problems = {
        "lacks": want.keys() - state.keys(),
        "holds, without a layer for it,": state.keys() - want.keys() - embeddings,
        "holds": {
            f"{key} {list(state[key].shape)}, want {list(want[key].shape)}"
            for key in want.keys() & state.keys()
            if state[key].shape != want[key].shape
        },
    }
    for problem, keys in problems.items():
        if keys:
            raise UsageError(f"{unfit}: {problem} {count_more(sorted(keys))}")
    peft.set_peft_model_state_dict(stock, state)
    return stock.eval()


def read_adapter_config(folder: Path) -> Any:
    """Return PEFT's configuration of the adapter in the folder. Raises UsageError."""
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"adapter: {folder} holds no adapter_config.json; give a folder that PEFT has saved "
            "an adapter in"
        )
    # PEFT checks no field, so that a wrong one raises anything.
    with translate_errors(f"adapter: {folder}/adapter_config.json cannot be read"):
        return PeftConfig.from_pretrained(str(folder))


def check_quant(quant: str | None) -> None:
    """Raise UsageError if a base model cannot be held in 4 bits."""
    if quant is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("quant: 4-bit layers need bitsandbytes: pip install bitsandbytes")


def display_name(model: Path) -> str:
    folder, gguf_file = locate(model)
    return Path(gguf_file).stem if gguf_file else folder.resolve().name


def load_base(
    model: Path, dtype: torch.dtype, device: torch.device, quant: str | None = None
) -> nn.Module:
    """Return the frozen causal language model, in eval mode; quant: see `quantize`."""
    from transformers import AutoModelForCausalLM

    check_quant(quant)
    base = load_float32(AutoModelForCausalLM, model, whole=True)
    cast_parameters(base, dtype)
    if quant is not None:
        quantize(base, quant, dtype, device)
    return base.to(device).requires_grad_(False).eval()


def load_float32(auto_class: Any, model: Path, whole: bool = False, **kwargs: Any) -> nn.Module:
    """Return the model as that class of transformers', in float32.

    whole: raise UsageError if a weight is missing, which transformers would draw at random.
    """
    how = {"dtype": torch.float32, "output_loading_info": True}
    loaded, report = _load(auto_class, model, **how, **kwargs)
    if whole and (missing := report["missing_keys"]):
        raise UsageError(f"model: {model} lacks the weight {count_more(sorted(missing))}")
    if locate(model)[1] is not None:
        # Decoded as it was read, yet marked as quantized, which Trainer and save_pretrained heed.
        del loaded.hf_quantizer, loaded.is_quantized, loaded.quantization_method
        del loaded.config.quantization_config
    return cast(nn.Module, loaded)


def load_config(model: Path) -> Any:
    """Return transformers' configuration of the model. Raises UsageError."""
    from transformers import AutoConfig

    return _load(AutoConfig, model)


def build_skeleton(model: Path) -> nn.Module:
    """Return the causal language model on the meta device; reads no weight."""
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    from_config: Any = AutoModelForCausalLM.from_config
    # A field that the model's code has no use for may raise anything.
    with translate_errors(f"model: transformers cannot build {model}"), torch.device("meta"):
        return cast(nn.Module, from_config(config))


def features(layer: Any) -> tuple[int, int]:
    """Return in- and out-features, of a 4-bit layer and GPT-2's Conv1D too."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    return int(layer.in_features), int(layer.out_features)


def check_length(asked: int | None, model: Any) -> int:
    """Return the most tokens of an example: `asked`, or by default `MAX_LENGTH` or, if fewer, the
    positions that the model has. Raises UsageError if more are requested.

    model: a model, a skeleton or a configuration.
    """
    config = getattr(model, "config", model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return MAX_LENGTH if asked is None else asked
    if asked is not None and asked > positions:
        raise UsageError(
            f"max_length: got {asked}, want at most {positions}, the positions of the model"
        )
    return min(MAX_LENGTH, positions) if asked is None else asked


def quantize(
    base: nn.Module, quant_type: str, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Make every linear layer but the output embedding or classifier a bitsandbytes `Linear4bit`.
    Experts of a mixture become 4-bit parameters.

    In place, in blocks of 64 with nested scales: as transformers loads a model for QLoRA, which it
    cannot do from a GGUF file.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    head = cast(Any, base).get_output_embeddings() or classifier(base)
    codes: Any = {"requires_grad": False, "quant_type": quant_type}
    how = {"compute_dtype": compute_dtype, "quant_type": quant_type, "device": "meta"}
    for name, linear in list(base.named_modules()):
        if type(linear) is not nn.Linear or linear is head:
            continue
        bias = linear.bias
        layer = Linear4bit(*features(linear), bias=bias is not None, **how)  # type: ignore[no-untyped-call]
        layer.weight = Params4bit(linear.weight.detach(), module=layer, **codes)
        layer.bias = bias
        base.set_submodule(name, layer.to(device))
    if any(unsupported_reason(module) is None for module in base.modules()):
        quantize_experts(base, quant_type)
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    rewrite_codes(base, False)


def classifier(model: nn.Module) -> nn.Module | None:
    """Return the head of transformers' `...ForSequenceClassification`, or None."""
    return getattr(model, "classifier", getattr(model, "score", None))


def rewrite_codes(model: nn.Module, allowed: bool) -> nn.Module:
    """Set whether bitsandbytes may rewrite codes for its CPU kernel, which rounds their scales.

    By default it rewrites them for good at the first forward in eval mode without gradients, on a
    processor with AVX-512 BF16. Returns the model.
    """
    if layers := linears_4bit(model):
        from bitsandbytes.functional import has_avx512bf16

        for layer in layers:
            able: bool = has_avx512bf16()  # type: ignore[no-untyped-call]
            layer.support_avx512bf16_for_cpu = allowed and able
    return model


def linears_4bit(model: nn.Module) -> list[Any]:
    from ..peft.base import is_linear4bit

    return [m for m in model.modules() if is_linear4bit(m)]


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, model)


def _load(auto_class: Any, model: Path, **kwargs: Any) -> Any:
    folder, gguf_file = locate(model)
    kwargs |= {"gguf_file": gguf_file, "local_files_only": True}
    # A damaged file makes each library raise something of its own.
    with translate_errors(f"model: transformers cannot load {model}"):
        return auto_class.from_pretrained(folder, **kwargs)


def usable_device(name: str) -> torch.device:
    """Return the device of that name; without a name a GPU if there is one, else the CPU."""
    # AssertionError where torch has no CUDA at all.
    with translate_errors(
        f"device: got {name}, which cannot be used", RuntimeError, AssertionError
    ):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    return device


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters in place, and the dtype that 4-bit codes are decoded to.

    Buffers keep their dtype: rotary frequencies need fp32.
    """
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    for layer in linears_4bit(model):
        layer.compute_dtype = layer.weight.quant_state.dtype = dtype
    return model


def share(model: nn.Module, frozen: bool = False) -> Any:
    """Return a copy with modules and trainable parameters of its own on the same frozen weights.

    frozen: share all weights, which train in the model alone.
    """
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(t): t for t in tensors if not t.requires_grad}
    if frozen:
        memo |= {id(p): Parameter(p.detach(), False) for p in tensors if p.requires_grad}
    return copy.deepcopy(model, memo)


def linear_layers(base: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that LoRA adapts, GPT-2's Conv1D among them, by full name.

    If a layer has an adapter, the base layer stands under the name that it had.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    found: dict[str, nn.Module] = {}
    adapted = "."  # no name begins so
    for name, module in base.named_modules():
        if name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            module, adapted = module.get_base_layer(), f"{name}."
        if isinstance(module, nn.Linear | Conv1D):
            found[name] = module
    return found


def layer_states(layers: Explanation) -> list[str]:
    """Return how many layers are fused or streamed, or not, by backend and reason: a line each."""
    kinds = {"LoRA": layers.rows, "linear": layers.linears}
    states = Counter(
        f"{kind} layers {row.state} ({row.backend}: {row.reason})"
        for kind, rows in kinds.items()
        for row in rows
    )
    return [f"{n} {state}" for state, n in states.items()]


def adapters(model: nn.Module) -> dict[str, Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and 4-bit scales; shared ones count once."""
    tensors = (t for t in model.state_dict().values() if isinstance(t, Tensor))
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def question(tokenizer: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
    """Return the prompt's inputs, in the tokenizer's chat template if it has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(messages, **how)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return {name: t.to(device) for name, t in inputs.items()}


def decode(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Return the new tokens int64 [n] by transformers' `generate`, greedily by default.

    In eval mode; the mode is put back.
    """
    training = model.training
    model.eval()
    out: Tensor = model.generate(**inputs, **{"do_sample": False, "pad_token_id": 0} | kwargs)
    model.train(training)
    return out[0, inputs["input_ids"].shape[1] :]


class Clock:
    """A `streamer` for `generate` that notes when each token came; another one may get them too."""

    def __init__(self, shown: Any = None) -> None:
        self.shown, self.times = shown, list[float]()
        self.start = time.perf_counter()

    def put(self, tokens: Tensor) -> None:  # at first the prompt's
        self.times.append(time.perf_counter() - self.start)
        if self.shown:
            self.shown.put(tokens)

    def end(self) -> None:
        if self.shown:
            self.shown.end()

    @property
    def steps(self) -> list[float]:
        """Return the seconds of each token after the first, which took times[1]."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]
