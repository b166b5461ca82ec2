"""Load base models and adapters, and copy models that share weights."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..layers import adaptable_experts
from .checkpoints import count_more, first_line, translate_errors
from .errors import UsageError
from .options import MAX_LENGTH

if TYPE_CHECKING:
    from ..peft import Explanation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the output embedding


def locate(model: Path) -> Path:
    """Return the folder or the GGUF file to load from.

    model: a folder, a GGUF file, or a hub id whose snapshot is in the local cache.

    Raises UsageError if there is no model.
    """
    wanted = (
        "give a transformers model folder, a .gguf file, or a hub id after `hf download HUB_ID`"
    )
    if not model.exists() and (snapshot := cached_snapshot(str(model))):
        return snapshot
    if (model / "config.json").is_file() or is_gguf(model):
        return model
    if files := sorted(model.glob("*.gguf")):
        raise UsageError(f"model: {model} holds GGUF; give a file, such as {files[0]}")
    if model.exists():
        raise UsageError(f"model: {model} holds no config.json; {wanted}")
    raise UsageError(f"model: there is no {model}; {wanted}")


def is_gguf(model: Path) -> bool:
    """Return True if the model is a file in GGUF, by its name."""
    return model.suffix == ".gguf" and model.is_file()


def cached_snapshot(name: str) -> Path | None:
    """Return the folder of a hub id's snapshot in the local cache, or None. Runs offline."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid hub id, such as "a..b"
        return None
    return Path(config).parent if isinstance(config, str) else None


def identifier(model: Path) -> str:
    """Return the model's absolute path or hub id, which are valid in any working directory."""
    return str(model.resolve()) if model.exists() else str(model)


# PEFT may save these layers along with an adapter.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte")


def read_adapter_weights(folder: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the adapter's tensors by key. Raises UsageError if they cannot be read."""
    import peft

    names = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((folder / name).is_file() for name in names):  # PEFT would try to download it
        raise UsageError(f"adapter: {folder} holds no {names[0]}")
    with translate_errors(f"adapter: {folder} cannot be read"):
        state: dict[str, Tensor] = peft.load_peft_weights(str(folder), device=device)
    return state


def load_adapter(base: Any, folder: Path) -> Any:
    """Return stock PEFT's model of `base` with the adapter in the folder, in eval mode.

    Raises UsageError if the adapter cannot be read, or if a key is missing, unexpected or of
    another shape. PEFT would silently keep the initial weight of a missing key.
    """
    import peft

    stock, state = adapt(base, folder)
    peft.set_peft_model_state_dict(stock, state)
    return stock.eval()


def adapt(base: Any, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return stock PEFT's model of `base`, which may be on meta, and the tensors of the adapter.

    The tensors, which have the names and the shapes of the model's, are not loaded into it. Raises
    as `load_adapter`.
    """
    import peft

    config = read_adapter_config(folder)
    config.inference_mode = True
    mismatch = misfit(folder, config)
    config.base_model_name_or_path = None  # PEFT warns if the base has moved
    with translate_errors(mismatch, ValueError, TypeError, RuntimeError), adaptable_experts(base):
        stock: Any = peft.get_peft_model(base, config)
    device = "cpu" if stock.device.type == "meta" else str(stock.device)
    state = read_adapter_weights(folder, device)
    want = peft.get_peft_model_state_dict(stock, save_embedding_layers=False)
    of_embeddings = (*_EMBEDDINGS, *(f"{name}.base_layer" for name in _EMBEDDINGS))
    embeddings = {key for key in state if key.rpartition(".")[0].endswith(of_embeddings)}
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
            raise UsageError(f"{mismatch}: {problem} {count_more(sorted(keys))}")
    return stock, state


def read_adapter_config(folder: Path) -> Any:
    """Return PEFT's configuration of the adapter in the folder. Raises UsageError."""
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"adapter: {folder} holds no adapter_config.json; give a folder that PEFT has saved "
            "an adapter in"
        )
    # PEFT does not check fields, so a wrong one may raise any error.
    with translate_errors(f"adapter: {folder}/adapter_config.json cannot be read"):
        return PeftConfig.from_pretrained(str(folder))


def misfit(folder: Path, config: Any) -> str:
    """Return the beginning of an error for an adapter that does not fit the base."""
    made_for = f", made for {name}," if (name := config.base_model_name_or_path) else ""
    return f"adapter: {folder}{made_for} does not fit the base"


def check_quant(quant: str | None, model: Path) -> None:
    """Raise UsageError if 4-bit layers are requested of GGUF, or bitsandbytes is missing."""
    if quant is not None and is_gguf(model):
        raise UsageError(
            f"quant: got {quant}, want none: {model} has its own codes, which are kept"
        )
    if quant is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("quant: 4-bit layers need bitsandbytes: pip install bitsandbytes")


def display_name(model: Path) -> str:
    return locate(model).resolve().name


def load_base(
    model: Path, dtype: torch.dtype, device: torch.device, quant: str | None = None
) -> nn.Module:
    """Return the frozen causal language model, in eval mode; quant: see `quantize`.

    Linear weights of a GGUF file stay in its codes.
    """
    from transformers import AutoModelForCausalLM

    from ..peft.quantize import quantize

    check_quant(quant, model)
    if is_gguf(model):
        with _as_model_error():
            from ..integrations import load_gguf

            packed: nn.Module = load_gguf(model, dtype=dtype)
        return packed.to(device).requires_grad_(False).eval()
    base = load_float32(AutoModelForCausalLM, model, whole=True)
    cast_parameters(base, dtype)
    if quant is not None:
        quantize(base, quant, dtype, device)
    return base.to(device).requires_grad_(False).eval()


def load_float32(auto_class: Any, model: Path, whole: bool = False, **kwargs: Any) -> nn.Module:
    """Load the model in float32, by an auto class of transformers.

    whole: whether to raise UsageError if a weight is missing. transformers would initialize it at
        random.
    """
    how = {"dtype": torch.float32, "output_loading_info": True}
    loaded, report = _load(auto_class, model, **how, **kwargs)
    if whole and (missing := report["missing_keys"]):
        raise UsageError(f"model: {model} lacks the weight {count_more(sorted(missing))}")
    return cast(nn.Module, loaded)


def load_config(model: Path) -> Any:
    """Return transformers' configuration of the model. Raises UsageError."""
    from transformers import AutoConfig

    if not is_gguf(model):
        return _load(AutoConfig, model)
    with _as_model_error():
        from ..integrations import load_gguf  # noqa: F401 # names what is missing
        from ..integrations.gguf import load_config as load_gguf_config

        return load_gguf_config(model)


def is_stored_quantized(model: Path) -> bool:
    """Return True for a GGUF file, and if a transformers model's folder has quantized weights."""
    return is_gguf(model) or hasattr(load_config(model), "quantization_config")


@contextmanager
def _as_model_error() -> Iterator[None]:
    """Raise UsageError on the model in place of the errors of `load_gguf`."""
    try:
        yield
    except (ImportError, ValueError) as error:
        reason = first_line(error).removeprefix("file: ")
        raise UsageError(f"model: {reason}") from error


def build_skeleton(model: Path) -> nn.Module:
    """Build the causal language model on the meta device, without reading weights."""
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    from_config: Any = AutoModelForCausalLM.from_config
    # A field that the model's code does not expect may raise any error.
    with translate_errors(f"model: transformers cannot build {model}"), torch.device("meta"):
        return cast(nn.Module, from_config(config))


def features(layer: Any) -> tuple[int, int]:
    """Return the in- and out-features of a linear layer, 4-bit linear or GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    return int(layer.in_features), int(layer.out_features)


def check_length(asked: int | None, model: Any) -> int:
    """Return the maximum number of tokens of an example.

    The default is `MAX_LENGTH`, or the model's number of positions if that is smaller.

    Args:
        asked: the requested number, or None.
        model: a model or a configuration.

    Raises UsageError if the requested number exceeds the model's positions.
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


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, model)


def _load(auto_class: Any, model: Path, **kwargs: Any) -> Any:
    place = locate(model)
    if is_gguf(place):
        place, kwargs = place.absolute().parent, {"gguf_file": place.name} | kwargs
    # Each library raises other errors for a damaged file.
    with translate_errors(f"model: transformers cannot load {model}"):
        return auto_class.from_pretrained(place, local_files_only=True, **kwargs)


def usable_device(name: str) -> torch.device:
    """Return the device of that name. Without a name: a GPU if there is one, else the CPU."""
    # torch raises AssertionError if it was built without CUDA.
    with translate_errors(
        f"device: got {name}, which cannot be used", RuntimeError, AssertionError
    ):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    return device


def default_dtype(device: torch.device) -> str:
    """Return the name of the base's dtype if none was chosen: no GPU kernel of ours takes float32.

    >>> default_dtype(torch.device("cpu"))
    'fp32'
    """
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if is_fast else "fp32"


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters in place, and set the dtype to which 4-bit codes are decoded.

    Buffers keep their dtype, because rotary frequencies need fp32.
    """
    from ..peft.quantize import linears_4bit

    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    for layer in linears_4bit(model):
        layer.compute_dtype = layer.weight.quant_state.dtype = dtype
    return model


def linear_layers(base: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that LoRA can adapt, including GPT-2's Conv1D, by full name.

    For a layer with an adapter, the base layer is returned under the layer's name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    found: dict[str, nn.Module] = {}
    adapted = "."  # no name starts with a dot
    for name, module in base.named_modules():
        if name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            module, adapted = module.get_base_layer(), f"{name}."
        if isinstance(module, nn.Linear | Conv1D):
            found[name] = module
    return found


def layer_states(layers: Explanation) -> list[str]:
    """Return lines with the number of layers in each state, by backend and reason."""
    kinds = {"LoRA": layers.rows, "linear": layers.linears}
    states = Counter(
        f"{kind} layers: {row.state} ({row.backend}: {row.reason})"
        for kind, rows in kinds.items()
        for row in rows
    )
    return [f"{n} {state}" for state, n in states.items()]


def adapters(model: nn.Module) -> dict[str, Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def question(tokenizer: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
    """Tokenize the prompt, with the tokenizer's chat template if it has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(messages, **how)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return {name: t.to(device) for name, t in inputs.items()}


def decode(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Return new tokens int64 [n] from transformers' `generate`, greedy by default.

    The model runs in eval mode, and its training mode is restored.
    """
    training = model.training
    model.eval()
    out: Tensor = model.generate(**inputs, **{"do_sample": False, "pad_token_id": 0} | kwargs)
    model.train(training)
    return out[0, inputs["input_ids"].shape[1] :]
