"""`check`: whether the adapters of a PEFT model train, have an effect, merge, and save and load."""

from __future__ import annotations

import copy
import math
import random
import statistics
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    PeftModel,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from .base import missing_layers
from .eligibility import unreadable_reason
from .kept import Kept, Tally, add_layer, format_kept
from .merge import FSDP1, as_peft
from .modules import hooks_of, is_linear4bit
from .report import format_table, group_rows
from .sharded import (
    is_dtensor,
    is_flattened,
    is_gathered_by_forward,
    reshard,
    whole_parameters,
)
from .swap import lora_layers
from .zero3 import is_partitioned

OK, WRONG, UNKNOWN = "✓", "✗", "–"

# The trained matrices of a layer; a layer in which one of them is 0 has no effect.
_FACTORS = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
# PEFT adds names of heads to `modules_to_save` for these tasks, whether the model has them or not.
_TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# Bits -> a limit of the relative error of a weight that is merged and quantized again. For normal
# weights the error is 0.09 in NF4, 0.13 in FP4 and 0.01 in int8. Twice that allows for outliers.
_REQUANTIZED = {4: 0.25, 8: 0.03}
# Names of `_gemm_precision` -> unit roundoff of operands in TF32 and bfloat16. "high" and "medium"
# are torch 2.8's.
_REDUCED_PRECISION = {"tf32": 2.0**-11, "high": 2.0**-11, "bf16": 2.0**-8, "medium": 2.0**-8}
# Minimum numbers of standard errors and of pairs of columns to decide the order of experts. With
# fewer pairs the standard error itself is uncertain.
_MIN_SIGMAS, _MIN_PAIRS = 4.0, 30


class CheckRow(NamedTuple):
    """One adapted module. Each verdict is "✓", "✗", or "–" if there is nothing to check.

    Attributes:
        layer: its name.
        gradient: a gradient reaches each trainable matrix of the adapter, and passes the base.
        effect: the adapter changes the module's output.
        scaling: the scaling is that of the configuration.
        merge: merging by PEFT gives the unmerged output within the merge's rounding.
        file: the saved file has the adapter's keys and loads to the same bits.
        experts: the columns of an experts' lora_B have the order that PEFT reads. "–" also if the
            order is undecided, as before training.
        reason: the reasons of "✗", and of some "–".
    """

    layer: str
    gradient: str
    effect: str
    scaling: str
    merge: str
    file: str
    experts: str
    reason: str

    @property
    def ok(self) -> bool:
        return WRONG not in self


@dataclass(frozen=True, repr=False)
class Check:
    """The result of `check`. `str()` prints a table with a line for each kind of module.

    Attributes:
        rows: a `CheckRow` for each LoRA layer.
        problems: faults that belong to no layer, such as a target that matches nothing.
        change: the relative change of the model's output by the adapter, of norms.
        merge_error: the error of a merged layer's output relative to the adapter's part of the
            output; the median of all layers.
        untrained: whether all adapters have their initial values. The check then uses random values
            for the matrices that are 0.
        kept: for each kind of layer, the share of the update that a merge into the base's own
            format keeps; empty if `untrained`. A share below 0.9 is a warning, and no fault.
    """

    rows: list[CheckRow]
    problems: list[str] = field(default_factory=list)
    change: float = 0.0
    merge_error: float = 0.0
    untrained: bool = False
    kept: list[Kept] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if there is no fault."""
        return not self.problems and all(row.ok for row in self.rows)

    def assert_ok(self) -> None:
        """Raise RuntimeError with the faulty layers and the problems.

        >>> Check([], ["target_modules: 'q_prj' matches nothing"]).assert_ok()
        Traceback (most recent call last):
        RuntimeError: 0 LoRA layers, 0 with a fault, 1 other fault
        target_modules: 'q_prj' matches nothing
        """
        if not self.ok:
            faulty = [row for row in self.rows if not row.ok]
            lines = [f"  {row.layer}: {row.reason}" for row in group_rows(faulty)]
            raise RuntimeError("\n".join([self.summary(), *lines, *self.problems]))

    def summary(self) -> str:
        """Return the numbers of layers and faults in one line."""
        faulty, n = sum(not row.ok for row in self.rows), len(self.problems)
        layers = "1 LoRA layer" if len(self.rows) == 1 else f"{len(self.rows)} LoRA layers"
        text = f"{layers}, {faulty} with a fault"
        return f"{text}, {n} other fault{'s' * (n > 1)}" if n else text

    def __str__(self) -> str:
        figures = f"the adapter changes the output by {self.change:.2g} of its norm"
        if self.untrained:
            figures += ", with random values for lora_B, which is still 0"
        elif self.merge_error:
            figures += f"; merging is off by {self.merge_error:.2g} of a layer's adapter (median)"
        table = format_table(CheckRow._fields, group_rows(self.rows))
        kept_table = [format_kept(self.kept)] if self.kept else []
        return "\n".join([table, figures, *kept_table, *self.problems, self.summary()])

    __repr__ = __str__


def check(model: nn.Module, batch: Any, *, saved: str | Path | None = None) -> Check:
    """Check that each active adapter of a PEFT model trains, works, merges, saves and loads.

    The model may be fused or not. The checks of each LoRA layer are:

    - A gradient reaches the adapter's matrices in a training step, also once lora_B is no longer 0.
      It passes the base to the earlier layers, which some inference-only formats prevent.
    - The adapter changes the layer's output.
    - The scaling is that of the configuration.
    - Merging gives the unmerged output within rounding.
    - The file that PEFT saves has the adapter's keys and loads to the same bits.
    - The lora_B of experts has the order that PEFT reads.

    Each target in the configuration has to match a module.

    An untrained adapter is checked with random values in place of zeros. Merging, into a copy of
    one layer at a time, is checked twice: with the adapter's scaling, and with a scaling that makes
    the adapter's part as large as the base's.

    The check runs a training step without an update, two forwards without gradients, a save and a
    load. Afterwards, also after an exception, the model is unchanged: parameters, gradients, modes,
    adapters, hooks, configurations, `requires_grad` and the state of the random generators.

    FSDP2 or ZeRO-3 may shard the model. Then all ranks call this function, each with a batch of its
    own, and hold the whole model meanwhile.

    Args:
        model: a `PeftModel` with LoRA layers. DDP and DeepSpeed's engine have it as `module`.
        batch: what the model is called with: a mapping of keyword arguments, a tuple or list of
            arguments, or one tensor. With labels the model's loss is used, otherwise a sum of its
            output with random signs.
        saved: the folder of the trained adapter, whose file is then compared with the model. A
            lora_B of zeros is a fault in it. None: PEFT saves to a temporary folder.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: it has no LoRA layers, an adapter is merged, FSDP1 or tensor parallelism shards
            its parameters, or `saved` is given for several active adapters.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> found = check(model, torch.randn(4, 8))
    >>> found.ok
    True
    >>> print(found)  # doctest: +ELLIPSIS
    layer               gradient  effect  scaling  merge  file  experts  reason
    base_model.model.0  ✓         ✓       ✓        ✓      ✓     –
    the adapter changes the output by ...
    1 LoRA layer, 0 with a fault
    """
    if not isinstance(model, PeftModel):
        got = type(model).__name__
        raise TypeError(f"model: got {got}, want a peft.PeftModel, such as DDP's module")
    layers = [_LayerRecord(name, layer) for name, layer, _ in lora_layers(model)]
    if not layers:
        raise missing_layers(model, "peft.get_peft_model(model, config) adds them")
    adapters = list(dict.fromkeys(name for layer in layers for name in layer.names))
    if saved is not None and len(adapters) != 1:
        raise ValueError(f"saved: got one folder for the active adapters {adapters}, want one")
    for name, module in model.named_modules():
        is_flat = any(getattr(p, "_is_flat_param", False) for p in module._parameters.values())
        is_flat = is_flat or (type(module) is nn.Linear and is_flattened(module, "weight"))
        if is_flat or type(module).__name__ == FSDP1:
            raise ValueError(f"model: {name} is FSDP1's, want a model before FSDP1 wraps it")
    for name, p in model.named_parameters():
        if is_dtensor(p) and not is_gathered_by_forward(model, name):
            raise ValueError(f"model: {name} is sharded by another API than FSDP2 or ZeRO-3")
    if any(layer.layer.merged for layer in layers):  # the disabled layer would unmerge in place
        raise ValueError("model: an adapter is merged, want none: call model.unmerge_adapter()")

    reshard(model)
    with torch.inference_mode(False), _restore_at_exit(model), _unsharded(model):
        problems = [text for adapter in adapters for text in _unmatched(model, adapter)]
        _check_scaling(model, layers)
        frozen = _check_frozen(model, layers)
        _check_experts(layers)
        for adapter in adapters:
            problems += _check_file(model, layers, adapter, saved)
        _replace_tensors(model, adapters)
        untrained = [_fill_zeros(layers, adapter, saved is not None) for adapter in adapters]
        change = _check_outputs(model, layers, batch)
        _check_gradients(model, layers, batch, frozen)
        if change == 0.0:
            problems.append("the active adapters do not change the model's output")
        tally = Tally()
        for layer in layers if not all(untrained) else ():
            if not any(p.is_meta for p in layer.layer.parameters()):
                with suppress(Exception):  # a kind of layer that PEFT cannot merge
                    add_layer(tally, layer.name, layer.layer)
    error = statistics.median(layer.merge_error for layer in layers)
    rows = [layer.row() for layer in layers]
    return Check(rows, problems, change, error, all(untrained), tally.rows())


class _LayerRecord:
    """A LoRA layer with the results of its checks."""

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.names: list[str] = []  # of its active adapters
        for adapter in layer.active_adapters:
            if any(adapter in getattr(layer, kind, ()) for kind in _FACTORS):
                self.names.append(adapter)
        self.verdicts = dict.fromkeys(CheckRow._fields[1:-1], UNKNOWN)
        self.reasons: list[str] = []
        self.merge_error = 0.0
        self.is_called = self.has_effect = False

    def mark_ok(self, column: str) -> None:
        if self.verdicts[column] != WRONG:
            self.verdicts[column] = OK

    def mark_wrong(self, column: str, reason: str) -> None:
        self.verdicts[column] = WRONG
        self.note(reason)

    def note(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def row(self) -> CheckRow:
        return CheckRow(self.name, **self.verdicts, reason="; ".join(self.reasons))

    def factors(self, adapter: str) -> dict[str, Tensor]:
        """Return the adapter's matrices, by the names in `_FACTORS`."""
        matrices: dict[str, Tensor] = {}
        for kind in _FACTORS:
            parameters = getattr(self.layer, kind, None)
            if parameters is not None and adapter in parameters:
                p = parameters[adapter]
                matrices[kind] = p if isinstance(p, Tensor) else p.weight
        return matrices


# Leave the model as it was


@contextmanager
def _restore_at_exit(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes, the configurations and the random state at exit.

    Each attribute gets its former object back. Dictionaries, lists and sets get their former
    elements back. Tensors are not restored, so they must not be written: see `_replace_tensors`.
    """
    objects: list[Any] = [*model.modules(), *model.peft_config.values()]  # type: ignore[operator]
    snapshots = [(obj, type(obj), dict(vars(obj)), _contents(obj)) for obj in objects]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        for obj, cls, attributes, contents in snapshots:
            if type(obj) is not cls:
                obj.__class__ = cls
            current = vars(obj)
            for name in current.keys() - attributes.keys():
                del current[name]
            current.update(attributes)
            for container, elements in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(elements)


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Give each rank the whole parameters, and modules that FSDP2 or ZeRO-3 does not manage.

    `_restore_at_exit` gives the modules their parameters and hooks back.
    """
    modules = list(model.modules())
    with whole_parameters(modules):
        for module in modules:
            if any(map(is_partitioned, module._parameters.values())):
                # ZeRO-3's dictionary gathers what is read from it.
                vars(module)["_parameters"] = dict(module._parameters)
            state_hooks: Any = [getattr(module, name) for name in _STATE_HOOKS]
            for hooks in (*hooks_of(module), *state_hooks):
                for key in [key for key, hook in hooks.items() if _gathers(hook)]:
                    del hooks[key]
        yield


_STATE_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _gathers(hook: Any) -> bool:
    """Return True for a hook by which FSDP2 or ZeRO-3 gathers, frees or reads its parameters."""
    return getattr(hook, "__module__", "").startswith(("torch.distributed.fsdp.", "deepspeed."))


def _contents(obj: Any) -> list[tuple[Any, Any]]:
    """Return the containers among an object's attributes, each with a copy."""
    kinds = (dict, OrderedDict, list, set)
    return [(value, value.copy()) for value in vars(obj).values() if type(value) in kinds]


def _replace_tensors(model: nn.Module, adapters: Sequence[str]) -> None:
    """Replace the tensors that a training step or the check writes to.

    Parameters that train or belong to an adapter are replaced by parameters with the same memory,
    but with their own gradients and hooks. Assigning `.data` gives these other values. Floating and
    scalar buffers, such as those of batch norm, are copied.
    """
    adapter_ids = {id(p) for a in adapters for p in _adapter_parameters(model, a).values()}
    replacements: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None and (p.requires_grad or id(p) in adapter_ids):
                if id(p) not in replacements:
                    replacements[id(p)] = nn.Parameter(p.data, requires_grad=p.requires_grad)
                module._parameters[key] = replacements[id(p)]
        for key, b in module._buffers.items():
            if b is not None and (b.is_floating_point() or not b.dim()):
                module._buffers[key] = b.detach().clone()


def _adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters that a saved adapter holds, by their names in the model."""
    parameters = {}
    wrappers: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            # Other parameters follow from the configuration: AdaLoRA's ranknum.
            others = {"base_layer", "original_module", *getattr(module, "other_param_names", ())}
            for key, p in module.named_parameters(remove_duplicate=False):
                if adapter in (parts := key.split(".")) and not others & set(parts):
                    parameters[f"{name}.{key}"] = p
    return parameters


# The configuration


def _unmatched(model: Any, adapter: str) -> Iterator[str]:
    """Yield a sentence for each entry of the configuration that matches no module."""
    config = model.peft_config[adapter]
    modules: list[str] = []
    parameters: list[str] = []
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, ParamWrapper):
            if adapter in layer.lora_A:
                parameters.append(_parameter_key(name, layer))
        elif isinstance(layer, LoraLayer):
            modules.append(name)
    targets = config.target_modules
    for target in sorted(targets) if isinstance(targets, set | list | tuple) else ():
        single_target = copy.copy(config)
        single_target.target_modules = {target}
        if not any(check_target_module_exists(single_target, key) for key in modules):
            yield f"target_modules: {target!r} matches nothing"
    for target in getattr(config, "target_parameters", None) or ():
        if not any(f".{key}".endswith(f".{target}") for key in parameters):
            yield f"target_parameters: {target!r} matches nothing"
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option, None) or ():
            keys = [*modules, *parameters]
            if not any(get_pattern_key([pattern], key) == pattern for key in keys):
                yield f"{option}: {pattern!r} matches nothing"
    wrappers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    ]
    for target in getattr(config, "modules_to_save", None) or ():
        is_known = getattr(config, "task_type", None) in _TASKS_WITH_HEADS
        if not is_known and not any(name.endswith(target) for name in wrappers):
            yield f"modules_to_save: {target!r} matches nothing"


def _parameter_key(name: str, wrapper: Any) -> str:
    """Return the name of the wrapped parameter in the model without adapters."""
    path = [part for part in name.split(".") if part != "base_layer"]
    return ".".join([*path, wrapper.parameter_name])


def _check_scaling(model: Any, layers: Sequence[_LayerRecord]) -> None:
    for record in layers:
        key = record.name.removeprefix("base_model.model.")
        if isinstance(record.layer, ParamWrapper):
            key = _parameter_key(key, record.layer)
        for adapter in record.names:
            want = _configured_scaling(model.peft_config[adapter], key)
            got = float(record.layer.scaling[adapter])
            if math.isclose(got, want, rel_tol=1e-6):
                record.mark_ok("scaling")
            else:
                record.mark_wrong(
                    "scaling", f"scaling {got:.4g}, the configuration says {want:.4g}"
                )


def _configured_scaling(config: Any, key: str) -> float:
    if config.peft_type == "ADALORA":
        return float(config.lora_alpha if config.lora_alpha > 0 else config.init_r)

    def pick(patterns: Any, default: float) -> float:
        return float(patterns.get(get_pattern_key(patterns.keys(), key), default))

    r = pick(config.rank_pattern or {}, config.r)
    alpha = pick(config.alpha_pattern or {}, config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def _check_frozen(model: Any, layers: Sequence[_LayerRecord]) -> set[tuple[str, str]]:
    """Return (adapter, kind) of the matrices that a method freezes, of kind "A", "B" or "E".

    LoRA-FA freezes lora_A of every layer. MiCA freezes lora_B, which is not 0 there. Other frozen
    matrices are faults, unless the adapter was loaded for inference.
    """
    frozen_kinds: set[tuple[str, str]] = set()
    for adapter in {name for record in layers for name in record.names}:
        if model.peft_config[adapter].inference_mode:
            continue
        matrices = [
            (record, kind, p) for record in layers for kind, p in record.factors(adapter).items()
        ]
        trained_kinds = {kind[-1] for _, kind, p in matrices if p.requires_grad}
        for record, kind, p in matrices:
            if p.requires_grad:
                continue
            if trained_kinds and kind[-1] not in trained_kinds and p.any():
                frozen_kinds.add((adapter, kind[-1]))
                record.note(f"{kind} is frozen in every layer")
            else:
                record.mark_wrong("gradient", f"{kind} is frozen")
    return frozen_kinds


# Experts


def _check_experts(layers: Sequence[_LayerRecord]) -> None:
    """Check the order of lora_B's columns by their directions.

    In training each column of an expert's B moves within the span of the same tokens' gradients.
    So the columns of one expert have more similar directions than those of different experts. PEFT
    reads column j·E + e as rank j of expert e. If columns e·r + j are more similar instead, the
    file was written in that order. The scores of all layers of a kind are added.
    """
    kinds: dict[tuple[str, str], list[_LayerRecord]] = {}
    for record in layers:
        for adapter in record.names if isinstance(record.layer, ParamWrapper) else ():
            kinds.setdefault((adapter, record.layer.parameter_name), []).append(record)
    for (adapter, _), members in kinds.items():
        scores, pairs = [], 0
        for record in members:
            B, E = record.layer.lora_B[adapter].weight.detach().float(), record.layer.num_experts
            N, r = B.shape[0], B.shape[1] // E
            if E < 2 or r < 2 or not B.any():
                continue  # with one expert or rank both orders are the same
            peft_order = _squared_cosines(B.reshape(N, r, E).permute(2, 1, 0))
            expert_order = _squared_cosines(B.reshape(N, E, r).permute(1, 2, 0))
            standard_error = (
                peft_order.var() / peft_order.numel() + expert_order.var() / expert_order.numel()
            ).sqrt()
            scores.append(float((expert_order.mean() - peft_order.mean()) / standard_error))
            pairs += peft_order.numel()
        score = sum(scores) / math.sqrt(max(1, len(scores)))
        for record in members if pairs >= _MIN_PAIRS else ():
            if score > _MIN_SIGMAS:
                reason = "lora_B looks stacked expert by expert, PEFT reads it rank by rank"
                record.mark_wrong("experts", reason)
            elif score < -_MIN_SIGMAS:
                record.mark_ok("experts")


def _squared_cosines(vectors: Tensor) -> Tensor:
    """Return the squared cosine of each pair of vectors in a group. vectors: [groups, n, size]."""
    unit = nn.functional.normalize(vectors, dim=-1)
    n = unit.shape[1]
    upper = torch.triu_indices(n, n, 1, device=unit.device)
    return (unit @ unit.mT)[:, upper[0], upper[1]].square()


# The file


def _check_file(
    model: Any, layers: Sequence[_LayerRecord], adapter: str, saved: str | Path | None
) -> list[str]:
    """Save the adapter, unless `saved` is given, load it over NaN, and compare the bits."""
    saved_values = {name: p.data for name, p in _adapter_parameters(model, adapter).items()}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            path = Path(saved or folder)
            if saved is None:
                model.save_pretrained(folder, selected_adapters=[adapter])
                path = path / adapter if adapter != "default" else path
            state = load_peft_weights(str(path), device="cpu")
            with _restore_at_exit(model):
                _replace_tensors(model, [adapter])
                parameters = _adapter_parameters(model, adapter)
                written_ids = {id(p) for p in parameters.values()}
                for p in parameters.values():
                    p.data = torch.full_like(p.data, math.nan if p.is_floating_point() else -1)
                # Loading a file with embeddings writes to the base, so copy these parameters.
                for name, module in model.named_modules():
                    for key, q in module._parameters.items():
                        if f"{name}.{key}" in state and id(q) not in written_ids:
                            module._parameters[key] = nn.Parameter(q.data.clone(), False)
                result: Any = set_peft_model_state_dict(model, state, adapter)
                loaded_values = {name: p.data for name, p in parameters.items()}
        except Exception as error:
            text = str(error).partition("\n")[0]
            problems.append(f"{adapter}: saving and loading raises {type(error).__name__}: {text}")
            for record in layers:
                record.verdicts["file"] = (
                    WRONG if adapter in record.names else record.verdicts["file"]
                )
            return problems
    if result.unexpected_keys:
        first_key, n = result.unexpected_keys[0], len(result.unexpected_keys)
        problems.append(
            f"{adapter}: the model has no parameter for {n} keys of the file: {first_key}"
        )
    differences = {
        name: _difference(loaded_values[name], saved_values[name]) for name in saved_values
    }
    for name, reason in differences.items():
        owner = max(
            (record for record in layers if name.startswith(f"{record.name}.")),
            key=lambda record: len(record.name),
            default=None,
        )
        if owner is None and reason:
            problems.append(f"{adapter}: {name} {reason}")
        elif owner is not None and reason:
            owner.mark_wrong("file", f"{name.removeprefix(owner.name + '.')} {reason}")
        elif owner is not None:
            owner.mark_ok("file")
    return problems


def _difference(loaded: Tensor, original: Tensor) -> str | None:
    if torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (loaded, original))):
        return None
    if loaded.is_floating_point() and loaded.isnan().all():
        return "is not in the file"
    return "loads to other values"


# The training step and the outputs


def _fill_zeros(layers: Sequence[_LayerRecord], adapter: str, is_trained: bool) -> bool:
    """Give random values to matrices of zeros or with NaN; return True if the adapter is untrained.

    Every layer of an untrained adapter has a matrix of zeros. In a trained adapter such a matrix is
    a fault. NaN is replaced, because one NaN makes the outputs and gradients of all layers NaN.
    """
    generator = torch.Generator().manual_seed(0)
    records = [record for record in layers if adapter in record.names]
    zeros = [not all(p.any() for p in record.factors(adapter).values()) for record in records]
    is_untrained = all(zeros) and not is_trained
    for record in records:
        for kind, p in record.factors(adapter).items():
            is_finite = bool(p.isfinite().all())
            if is_finite and p.any():
                continue
            p.data = (0.02 * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)
            if not is_finite:
                record.mark_wrong("effect", f"{kind} is not finite")
            elif kind == "lora_E" and not is_untrained:
                record.note("AdaLoRA has pruned all ranks")
            elif not is_untrained:
                record.mark_wrong("effect", f"{kind} is 0")
    return is_untrained


def _check_gradients(
    model: Any, layers: Sequence[_LayerRecord], batch: Any, frozen: set[tuple[str, str]]
) -> None:
    """Check the gradients of a training step without an update."""
    for module in model.modules():
        module.training = True  # not `train()`, which classes override
    trained = []
    for record in layers:
        for adapter in record.names:
            for kind, p in record.factors(adapter).items():
                if model.peft_config[adapter].inference_mode:
                    p.requires_grad_(True)
                if p.requires_grad and (adapter, kind[-1]) not in frozen:
                    trained.append((record, kind, p))
    # Autocast of torch 2.8 keeps casts without a graph that a call under `no_grad` made.
    torch.clear_autocast_cache()
    with torch.enable_grad(), ExitStack() as stack:
        for record in layers:
            _watch_base(record, stack)
        loss = _loss(_call(model, batch))
        if loss.requires_grad:
            loss.backward()
    for record, kind, p in trained:
        if p.grad is not None and not p.grad.isfinite().all():
            record.mark_wrong("gradient", f"the gradient of {kind} is not finite")
        elif p.grad is not None and p.grad.any():
            record.mark_ok("gradient")
        elif record.is_called or record.layer.disable_adapters:
            record.mark_wrong("gradient", f"no gradient reaches {kind}")
        else:
            record.mark_wrong("gradient", "the batch does not reach it")


def _watch_base(record: _LayerRecord, stack: ExitStack) -> None:
    """Mark a base that is called and returns a result without a graph, if x needs a gradient."""
    base, factors = record.layer.get_base_layer(), [record.factors(name) for name in record.names]
    device = next((p.device for matrices in factors for p in matrices.values()), None)
    if isinstance(record.layer, ParamWrapper) or isinstance(base, nn.Embedding) or device is None:
        return
    if unreadable_reason(base, device) is None:
        return  # a fused layer reads this base and does not call it

    def watch(module: nn.Module, args: Any, y: Any) -> Any:
        if not (isinstance(y, Tensor) and args and isinstance(args[0], Tensor)):
            return None
        if y.requires_grad or not args[0].requires_grad:
            return None
        record.mark_wrong(
            "gradient",
            f"its base {type(module).__name__} passes no gradient on: gradients of the layers "
            "before it lack the base's part",
        )
        return y.detach().requires_grad_()  # without a graph a fused layer would raise

    stack.callback(base.register_forward_hook(watch).remove)


def _check_outputs(model: Any, layers: Sequence[_LayerRecord], batch: Any) -> float:
    """Compare each layer's output with and without its adapter, and merged.

    Returns the relative change of the model's output by the adapters.
    """
    for module in model.modules():
        # In eval mode on a CPU, bitsandbytes would repack the weight and lose its scales.
        module.training = is_linear4bit(module)
    handles = []
    for members in _units(layers):

        def measure(
            module: Any, args: Any, kwargs: Any, output: Any, members: Any = members
        ) -> None:
            _measure(members, args, kwargs, _tensor(output))

        handles.append(members[0].layer.register_forward_hook(measure, with_kwargs=True))
    with torch.no_grad():
        try:
            with_adapters = _tensor(_call(model, batch))
        finally:
            for handle in handles:
                handle.remove()
        with _disable(layers):
            without_adapters = _tensor(_call(model, batch))
    for record in layers:
        if record.is_called and record.has_effect:
            record.mark_ok("effect")
        elif record.is_called:
            disabled = record.layer.disable_adapters
            reason = "the adapters are disabled" if disabled else "the adapter has no effect"
            record.mark_wrong("effect", reason)
    return _norm(with_adapters - without_adapters) / max(
        _norm(without_adapters), torch.finfo(torch.float32).tiny
    )


def _units(layers: Sequence[_LayerRecord]) -> list[list[_LayerRecord]]:
    """Return the layers in groups that are called together: PEFT nests those of one module."""
    by_layer = {record.layer: record for record in layers}
    nested = {record.layer.base_layer for record in layers}
    units = []
    for record in layers:
        if record.layer not in nested and record.names:
            members, layer = [], record.layer
            while layer in by_layer:
                members.append(by_layer[layer])
                layer = layer.base_layer
            units.append(members)
    return units


def _measure(members: Sequence[_LayerRecord], args: Any, kwargs: Any, y: Tensor) -> None:
    """Check a layer's call with these arguments and the output y."""
    layer = members[0].layer

    def run(*inputs: Any) -> Tensor:
        return _tensor(layer.forward(*(inputs or args), **kwargs))

    with _disable(members):
        y_base = run()
    for record in members:
        record.is_called = True
        if len(members) == 1:
            y_without = y_base
        else:
            with _disable([record]):
                y_without = run()
        if not y.isfinite().all():
            record.mark_wrong("effect", "its output is not finite")
        record.has_effect |= not torch.equal(y, y_without)
    adapter_norm = _norm(y - y_base)
    if not 0.0 < adapter_norm < math.inf or any(p.is_meta for p in layer.parameters()):
        return
    # The second factor makes the adapter's part of y as large as the base's, so that rounding hides
    # no fault.
    for factor in sorted({1.0, max(1.0, _norm(y_base) / adapter_norm)}):
        with ExitStack() as stack:
            stack.enter_context(_scale(members, factor))
            unmerged = run()
            try:
                stack.enter_context(_merge_into_copy(layer))
            except Exception as exception:
                text = f"{type(exception).__name__}: {exception}".partition("\n")[0].rstrip(": ")
                for record in members:
                    if isinstance(exception, ValueError):  # NaN in the adapter
                        record.mark_wrong("merge", f"PEFT does not merge it: {text}")
                    else:  # a kind of layer that PEFT cannot merge
                        record.note(f"PEFT does not merge it: {text}")
                return
            error = _norm(run() - unmerged)
            # The norm of y with random signs of x estimates the norm of the sums' terms, each of
            # which has its own error.
            flipped_args = args
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                flipped_args = (args[0] * _signs(args[0].shape[-1:]).to(args[0]), *args[1:])
            terms = _norm(run(*flipped_args))
        # Both results round x·Aᵀ, the sums and y; the merge rounds ΔW and W + ΔW.
        limit = 4 * _roundoff(y, layer) * (terms + _norm(unmerged) + _norm(unmerged - y_base))
        limit += _requantization(layer.get_base_layer()) * terms
        for record in members:
            if factor == 1.0:
                record.merge_error = max(record.merge_error, error / adapter_norm)
            if error <= limit:
                record.mark_ok("merge")
            else:
                relative_error = error / _norm(unmerged - y_base)
                record.mark_wrong(
                    "merge", f"merged, it is off by {relative_error:.1g} of the adapter's part"
                )


@contextmanager
def _disable(layers: Sequence[_LayerRecord]) -> Iterator[None]:
    """Disable adapters without PEFT's change of `requires_grad`."""
    states = [(record.layer, record.layer._disable_adapters) for record in layers]
    try:
        for layer, _ in states:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in states:
            layer._disable_adapters = value


@contextmanager
def _scale(layers: Sequence[_LayerRecord], factor: float) -> Iterator[None]:
    states = [(record.layer.scaling, dict(record.layer.scaling)) for record in layers]
    try:
        for scaling, values in states:
            scaling.update({name: value * factor for name, value in values.items()})
        yield
    finally:
        for scaling, values in states:
            scaling.update(values)


@contextmanager
def _merge_into_copy(layer: Any) -> Iterator[None]:
    """Let PEFT merge the layer's active adapters into a copy of its base."""
    base = layer.base_layer
    try:
        layer.base_layer = inner_layer = copy.deepcopy(base)
        with as_peft(layer.modules()):
            layer.merge(safe_merge=True)
            while isinstance(inner_layer, LoraLayer):
                inner_layer.merge(safe_merge=True)
                inner_layer = inner_layer.base_layer
        yield
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()


def _roundoff(y: Tensor, layer: nn.Module) -> float:
    """Return the largest unit roundoff among the dtypes of a layer's call with the output y."""
    dtypes = {t.dtype for t in (y, *layer.parameters()) if t.is_floating_point()}
    if torch.is_autocast_enabled(y.device.type):
        dtypes.add(torch.get_autocast_dtype(y.device.type))
    unit = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)
    if unit < 1e-6:
        # The factor 16 is for sums of thousands of terms. 16-bit dtypes need none: their sums are
        # float32.
        unit = max(16 * unit, _REDUCED_PRECISION.get(_gemm_precision(y.device.type), 0.0))
    return unit


def _gemm_precision(device_type: str) -> str:
    """Return PyTorch's name of the precision in which a device's float32 GEMMs may run."""
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    # torch 2.8 has one setting for all devices. Later versions refuse to read it once a device's
    # own was set.
    matmul = getattr(backend, "matmul", None)
    return getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()


def _requantization(base: nn.Module) -> float:
    """Return the limit of the error of weights that are quantized again after a merge, or 0."""
    weight = getattr(base, "weight", None)
    if is_linear4bit(base):
        return _REQUANTIZED[4]
    is_integer = isinstance(weight, Tensor) and not weight.is_floating_point()
    return _REQUANTIZED[8] if is_integer else 0.0


def _call(model: nn.Module, batch: Any) -> Any:
    def detach(value: Any) -> Any:
        is_leaf = isinstance(value, Tensor) and value.requires_grad
        return value.detach().requires_grad_() if is_leaf else value

    if isinstance(batch, Mapping):
        return model(**{key: detach(value) for key, value in batch.items()})
    return model(*map(detach, batch if isinstance(batch, tuple | list) else [batch]))


def _tensor(output: Any) -> Tensor:
    """Return the logits of an output, or its first floating tensor."""
    logits: Any = getattr(output, "logits", None)
    if logits is None and not isinstance(output, Tensor):
        values = list(output.values()) if isinstance(output, Mapping) else list(output)
        tensors = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
        logits = max(tensors, key=Tensor.dim)  # a loss has fewer dimensions
    return output if logits is None else logits  # type: ignore[no-any-return]


def _loss(output: Any) -> Tensor:
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is not None:
        return loss.sum()
    y = _tensor(output)
    return (y.float() * _signs(y.shape).to(y.device)).sum()


def _signs(shape: Sequence[int]) -> Tensor:
    """Return 1 or −1 for each element, the same ones for the same shape."""
    generator = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(2, tuple(shape), generator=generator) - 1.0


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t.float() if t.element_size() < 4 else t))
