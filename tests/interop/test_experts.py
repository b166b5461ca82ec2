"""LoRA on fused experts: models of transformers by PEFT's `ParamWrapper`, unfused and fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_kernels.integrations
from lora_kernels.backends.eager import experts as eager_experts
from lora_kernels.backends.eager import quantized_stack
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.bench.counter import count
from lora_kernels.bench.experts import Shape, adapted, experts_module
from lora_kernels.layers import Experts, adaptable_experts, quantize_experts
from lora_kernels.layers.experts import stack
from lora_kernels.oracle import case as cases
from lora_kernels.oracle import tolerance
from lora_kernels.peft import explain, fuse, row_adapters, unfuse
from lora_kernels.peft.experts import FusedParamWrapper, experts_reason
from lora_kernels.peft.explain_rows import KERNELS
from lora_kernels.quantization import QuantizedWeight
from tests.support.assertions import (
    assert_as_exact,
    assert_close_derived,
    assert_close_to_reference,
    derived_rtol,
)
from tests.support.peft_models import in_float64, loss_and_gradients

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=8
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
}
MODULES = {"qwen3": "qwen3_moe"}  # transformers' modules of other names
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EXPERTS = "layers.0.mlp.experts"


def config(*parameters: str, **options: Any) -> LoraConfig:
    options = {"r": 5, "lora_alpha": 16, "target_modules": ["q_proj"], **options}
    return LoraConfig(target_parameters=list(parameters or BOTH), **options)


def make(name: str, *parameters: str, seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(MODELS[name](), config(*parameters))
    return start(model, seed + 1)


def start(model: PeftModel, seed: int = 1) -> PeftModel:
    """Give every adapter an effect, and biases and norms another value than 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def ids(rows: int = 2, length: int = 17) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def step(model: nn.Module) -> dict[str, Tensor]:
    return loss_and_gradients(model, ids())


def exact(model: nn.Module) -> Any:
    """An unfused float64 copy. transformers' grouped GEMM does not take float64."""
    twin = in_float64(model)
    for module in twin.modules():
        if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
            config._experts_implementation = "eager"
    return twin


def logits(model: Any, x: Tensor | None = None) -> dict[str, Tensor]:
    """The logits, by a name."""
    return {"y": model(input_ids=ids() if x is None else x).logits}


def fused_wrappers(model: nn.Module) -> list[FusedParamWrapper]:
    return [module for module in model.modules() if isinstance(module, FusedParamWrapper)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])
def test_fuse_of_experts_keeps_loss_and_gradients(name: str, parameters: tuple[str, ...]) -> None:
    model, seeds = make(name, *parameters), (1, 4)  # a second step has other adapters
    wants = [step(start(model, seed)) for seed in seeds]
    refs = [step(exact(start(model, seed))) for seed in seeds]
    fuse(model)
    assert len(fused_wrappers(model)) == 2 * len(parameters)
    assert_as_exact([step(start(model, seed)) for seed in seeds], refs, wants)
    assert_as_exact(step(unfuse(model)), refs[-1], wants[-1])
    assert not fused_wrappers(model)


@pytest.mark.parametrize("name", MODELS)
def test_fused_experts_in_bfloat16_are_nearer_to_float64_than_peft_s(name: str) -> None:
    """PEFT rounds W + s·B·A. One layer's experts, with the routing given, pooled over seeds."""
    pools: dict[str, dict[str, list[Tensor]]] = {kind: {} for kind in ("ours", "oracle", "peft")}
    for seed in range(4):
        layer = next(m for n, m in make(name, seed=seed).named_modules() if n.endswith(EXPERTS))
        E = layer.get_base_layer().num_experts
        generator = torch.Generator().manual_seed(3 + seed)
        x, dy = (torch.randn(40, 32, generator=generator) for _ in range(2))
        weights, index = torch.rand(40, E, generator=generator).topk(2)
        # Values of bfloat16, so that only the computation's roundings differ.
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(p.bfloat16())
        for kind, pool in pools.items():
            dtype = torch.float64 if kind == "oracle" else torch.bfloat16
            twin = copy.deepcopy(layer).to(dtype)
            if kind == "oracle":
                twin.get_base_layer().config._experts_implementation = "eager"
            if kind == "ours":
                fuse(nn.ModuleDict({"experts": twin}))
            own = x.bfloat16().to(dtype).requires_grad_()
            y = twin(own, index, weights.bfloat16().to(dtype))
            y.backward(dy.bfloat16().to(dtype))
            grads = {n: p.grad for n, p in twin.named_parameters() if "lora_" in n}
            for key, t in {"y": y.detach(), "dx": own.grad, **grads}.items():
                pool.setdefault(key, []).append(t)
    assert_close_to_reference(*pools.values(), lambda *_: tolerance.unit_roundoff(torch.bfloat16))
    ours, oracle, peft = (torch.cat(pool["y"]).double() for pool in pools.values())
    assert (ours - oracle).norm() < (peft - oracle).norm()


def test_fused_experts_with_several_active_adapters_are_peft_s() -> None:
    model = make("mixtral")
    model.add_adapter("second", config(r=3, lora_alpha=5))
    start(model, seed=4)
    model.base_model.set_adapter(["default", "second"])
    want = step(model)
    assert sum("second" in name for name in want) > 4
    ref = step(exact(model))
    assert_as_exact(step(fuse(model)), ref, want)
    model.set_adapter("second")
    got = step(model)
    assert_as_exact(got, step(exact(model)), step(unfuse(model)))


def folded_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that gets False from each folded forward, and True from each folded backward."""
    calls: list[bool] = []
    fold_ = eager_experts._fold_
    monkeypatch.setattr(
        eager_experts, "_fold_", lambda *args: calls.append(args[-1]) or fold_(*args)
    )
    return calls


@pytest.mark.parametrize("order", ["low-rank", "folded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_both_orders_of_experts_on_a_gpu_s_path_train_as_peft_s(
    name: str, dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three SGD steps on a layer's experts: y, and each parameter's update, beside float64. Plain,
    and checkpointed in both ways."""
    least = {"low-rank": 1 << 30, "folded": 1}[order]
    monkeypatch.setattr(eager_experts, "fold_rows", lambda *_: least)
    calls = folded_calls(monkeypatch)
    ours: dict[bool | None, dict[str, list[Tensor]]] = {None: {}, False: {}, True: {}}
    others: dict[str, dict[str, list[Tensor]]] = {"oracle": {}, "peft": {}}
    for seed in range(2):
        layers, inputs = experts_to_train(name, dtype, seed)
        for kind, pool in others.items():
            pool_results(pool, train(layers[kind], inputs))
        for reentrant, pool in ours.items():
            calls.clear()
            pool_results(pool, train(copy.deepcopy(layers["ours"]), inputs, reentrant))
            backwards = 2 * 3 if order == "folded" else 0
            forwards = backwards * (1 if reentrant is None else 2)
            assert [calls.count(False), calls.count(True)] == [forwards, backwards]
    for pool in ours.values():
        assert_close_to_reference(pool, *others.values(), lambda *_: tolerance.unit_roundoff(dtype))


def pool_results(pool: dict[str, list[Tensor]], found: dict[str, Tensor]) -> None:
    for key, t in found.items():
        pool.setdefault(key, []).append(t)


def experts_to_train(name: str, dtype: torch.dtype, seed: int) -> tuple[dict[str, Any], Any]:
    """Return a layer's experts, fused, in float64 and as PEFT has them, and the steps' inputs."""
    torch.manual_seed(seed)
    shape = Shape(MODULES.get(name, name), 4, 2, 64, 64)
    peft: Any = adapted(experts_module(shape, dtype)).to(dtype)
    ours, oracle = copy.deepcopy(peft), copy.deepcopy(peft).double()
    oracle.get_base_layer().config._experts_implementation = "eager"
    fuse(nn.ModuleDict({"experts": ours}))
    x, dy = torch.randn(2, 3, 40, 64).to(dtype)
    weights, index = torch.rand(3, 40, 4).topk(2)
    steps = list(zip(x, index, weights.to(dtype), dy * 1e-3, strict=True))
    return {"ours": ours, "oracle": oracle, "peft": peft}, steps


def train(layer: Any, steps: Any, reentrant: bool | None = None) -> dict[str, Tensor]:
    """Return y of the last step and each adapter's update; None for no checkpointing."""
    adapters = {n: p for n, p in layer.named_parameters() if "lora_" in n}
    before = {n: p.detach().clone() for n, p in adapters.items()}
    optimizer, dtype = torch.optim.SGD(adapters.values(), lr=1.0), next(iter(before.values())).dtype
    for x, index, weights, dy in steps:
        rows, weights = x.to(dtype).requires_grad_(), weights.to(dtype)
        with as_on_gpu(), lora_kernels.backend("eager"):
            if reentrant is None:
                y = layer(rows, index, weights)
            else:
                y = checkpoint(layer, rows, index, weights, use_reentrant=reentrant)
            y.backward(dy.to(dtype))
        optimizer.step()
        optimizer.zero_grad()
    return {"y": y.detach(), **{n: (p - before[n]).detach() for n, p in adapters.items()}}


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, experts and weights of tokens that all go to the first expert."""
    return torch.ones(tokens, 32), torch.zeros(tokens, 1).long(), torch.ones(tokens, 1)


TENANTS = ("law", "code", "bank", "mail")


def make_tenants(
    name: str, ranks: tuple[int, ...] = (4, 4, 4, 4), parameters: tuple[str, ...] = BOTH
) -> PeftModel:
    torch.manual_seed(0)
    options = [config(*parameters, r=rank, lora_alpha=2 * rank + i) for i, rank in enumerate(ranks)]
    model = get_peft_model(MODELS[name](), options[0], adapter_name=TENANTS[0])
    for tenant, each in zip(TENANTS[1:], options[1:], strict=True):
        model.add_adapter(tenant, each)
    for parameter, p in model.named_parameters():
        p.requires_grad_("lora_" in parameter)
    return start(model)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_four_tenants_in_one_batch_over_experts_equal_four_runs(
    name: str, quantized: bool, where: str
) -> None:
    """Of three SGD steps in one batch, beside those of each tenant alone; ranks differ."""
    model = make_tenants(name, (4, 8, 4, 2))
    fuse(quantize_experts(model) if quantized else model)
    alone = copy.deepcopy(model)
    names = ["code", "law", "mail", "code", "__base__", "bank", "law"]
    x = ids(len(names), 9)

    def train(model: Any, rows: list[int], *tenants: str) -> None:
        weights = [p for n, p in model.named_parameters() if n.split(".")[-2] in tenants]
        optimizer = torch.optim.SGD(weights, lr=0.1)
        for _ in range(3):
            with row_adapters(model, [names[row] for row in rows]):
                y = model(input_ids=x[rows]).logits
            torch.nn.functional.cross_entropy(
                y.flatten(0, 1), x[rows].flatten(), reduction="sum"
            ).backward()
            optimizer.step()
            optimizer.zero_grad()

    with as_on_gpu() if where == "gpu" else nullcontext():
        train(model, [*range(len(names))], *TENANTS)
        for tenant in TENANTS:
            train(alone, [row for row, each in enumerate(names) if each == tenant], tenant)
    before = dict(make_tenants(name, (4, 8, 4, 2)).named_parameters())
    for (key, got), want in zip(model.named_parameters(), alone.parameters(), strict=True):
        if "lora_" in key:
            old = before[key].double()
            update, update_alone = got.double() - old, want.double() - old
            assert update_alone.norm() > 0
            # Three steps of either run each round their sums, and the parameter.
            rounding = 2 * 3 * 2.0**-24 * old.norm() / update_alone.norm()
            limit = 3 * derived_rtol(got.dtype) + rounding.item()
            assert_close_derived(update, update_alone, limit)


def test_a_tenant_s_nan_over_experts_stays_there_and_absent_tenants_get_no_gradient() -> None:
    model = fuse(make_tenants("qwen3"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "experts" in key and ".code." in key:
                p.fill_(torch.nan)
    names, x, results = ["law", "code", "law"], ids(3, 9), []
    for each in (model, twin):
        with row_adapters(each, names):
            y = each(input_ids=x).logits
        y[[0, 2]].sum().backward()
        results.append((y.detach(), {n: p.grad for n, p in each.named_parameters()}))
    (y, grads), (want, wants) = results
    # NaN moves the other tenant's tokens to other experts, whose GEMMs then have other sizes.
    torch.testing.assert_close(y[[0, 2]], want[[0, 2]])
    assert y[1].isnan().all()
    for key in grads:
        if ".law." in key:
            torch.testing.assert_close(grads[key], wants[key])
        if ".bank." in key or ".mail." in key:
            assert grads[key] is None


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])
def test_adapter_names_over_experts_run_in_evaluation_and_refuse_what_peft_refuses(
    parameters: tuple[str, ...],
) -> None:
    model = fuse(make_tenants("mixtral", parameters=parameters)).eval()
    # A batch may begin with rows of the base.
    names, x = ["__base__", "law", "__base__", "mail"], ids(4, 9)
    with torch.no_grad():
        got = model(input_ids=x, adapter_names=names).logits
        for row, tenant in enumerate(names):
            model.set_adapter("law" if tenant == "__base__" else tenant)
            around = model.disable_adapter() if tenant == "__base__" else nullcontext()
            with around:
                want = model(input_ids=x[row : row + 1]).logits[0]
            assert_close_derived(got[row], want)
    wrapper = fused_wrappers(model)[0]
    for rows in (0, 2):
        with pytest.raises(ValueError, match=f"got {rows} for 9 tokens, want one a row"):
            wrapper(*routed(9), adapter_names=names[:rows])
    model.merge_adapter()
    with pytest.raises(ValueError, match="mixed adapter batches"):
        wrapper(*routed(3), adapter_names=names)


def test_fused_experts_disabled_or_merged_are_peft_s() -> None:
    model = make("gpt_oss").eval()
    with torch.no_grad():
        ref, want = logits(exact(model)), logits(model)
        with model.disable_adapter():
            base_ref, base = logits(exact(model)), logits(model)
        fuse(model)
        assert_as_exact(logits(model), ref, want)
        with model.disable_adapter():
            assert torch.equal(logits(model)["y"], base["y"])
        # A merged weight, and one that the adapter was taken out of again, is rounded like a
        # result.
        model.merge_adapter()
        assert_as_exact(logits(model), ref, want)
        rows = {row.layer: row.reason for row in explain(model).rows if "experts" in row.layer}
        assert all(reason.startswith("adapters are merged") for reason in rows.values())
        with model.disable_adapter():
            said = {row.reason for row in explain(model).rows if "experts" in row.layer}
            got = logits(model)
        assert said == {"adapters are disabled"}
        assert_as_exact(got, base_ref, base)
        model.merge_adapter()
        model.unmerge_adapter()
        assert_as_exact(logits(model), ref, want)
        assert_as_exact(logits(model.merge_and_unload()), ref, want)


def test_adapters_of_fused_experts_load_in_peft_and_back(tmp_path: Path) -> None:
    model = make("qwen3")
    ref, want = step(exact(model)), step(model)
    fuse(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = PeftModel.from_pretrained(MODELS["qwen3"](), tmp_path, is_trainable=True)
    assert_as_exact(step(other), ref, want)
    again = tmp_path / "again"
    other.save_pretrained(again)
    torch.manual_seed(0)
    third = fuse(PeftModel.from_pretrained(MODELS["qwen3"](), again, is_trainable=True))
    assert_as_exact(step(third), ref, want)


def test_explain_of_fused_experts_names_backend_and_strategy() -> None:
    model = fuse(make("mixtral"))
    rows = [row for row in explain(model).rows if "experts" in row.layer]
    assert len(rows) == 4
    assert {(row.state, row.backend) for row in rows} == {(KERNELS, "cpu")}
    assert all(row.reason.startswith("experts; native kernels") for row in rows)
    assert "4 × " not in str(explain(model))  # two projections, two layers each
    assert str(explain(model)).count("2 × ") == 3


@pytest.mark.parametrize("quantized", ["before", "after"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_fused_experts_in_4_bits_are_those_decoded(name: str, quantized: str) -> None:
    """Quantized before PEFT adds the adapters, or after."""
    model, decoded = make(name), make(name)
    if quantized == "before":
        torch.manual_seed(0)
        base = quantize_experts(MODELS[name](), blocksize=64, double_quant=False)
        parameters = {n for n, _ in base.named_parameters()}
        with adaptable_experts(base):
            model = get_peft_model(base, config())
        start(model)
        left = {n.replace(".base_layer", "") for n, _ in model.named_parameters()}
        assert {f"base_model.model.{n}" for n in parameters} <= left
    else:
        quantize_experts(model, blocksize=64, double_quant=False)
    for where, module in decoded.named_modules():
        for parameter in ("gate_up_proj", "down_proj") if hasattr(module, "has_gate") else ():
            # bitsandbytes' CPU kernel misreads blocks that straddle rows.
            own = cast(QuantizedWeight, stack(model.get_submodule(where), parameter))
            getattr(module, parameter).data.copy_(own.dequantize())
    fuse(model)
    assert len(fused_wrappers(model)) == 4
    assert_as_exact(step(model), step(exact(decoded)), step(decoded))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # gpt_oss stacks [E, K, N]
def test_explain_of_experts_on_a_gpu_says_whether_the_host_waits(name: str) -> None:
    def reasons(rank: int, dtype: torch.dtype, quantized: bool) -> set[str]:
        torch.manual_seed(0)
        model = get_peft_model(MODELS[name]().to(dtype), config(r=rank, target_modules=[]))
        fuse(quantize_experts(model) if quantized else model)
        with as_on_gpu(), lora_kernels.backend("eager"):
            found = {row.reason for row in explain(model).rows if "experts" in row.layer}
        start = "experts; the eager backend was requested; "
        assert all(reason.startswith(start) for reason in found)
        return {reason.removeprefix(start) for reason in found}

    no_kernel = "PyTorch's kernel for all experts takes bfloat16, not torch.float32"
    waits = "one expert at a time is {}, and the host waits for the GPU: "
    waits_not = "grouped_mm multiplies all experts, and the host does not wait"
    # The projections of MODELS' sizes have 2·E·N·K / (N + K) of these rows.
    folds = "; from {} rows of experts on, W + s·B·A, with fewer bytes and FLOPs"
    least = {"mixtral": {193, 154}, "gpt_oss": {193, 154}}[name]
    dense = reasons(8, torch.bfloat16, False)
    assert dense == {waits_not + folds.format(rows) for rows in least}
    for four_bit in reasons(8, torch.bfloat16, True):
        assert four_bit.startswith(f"{waits_not}; ") and "decodes" in four_bit
        assert four_bit.endswith(tuple(folds.format(rows) for rows in least))
    for reason in reasons(5, torch.bfloat16, True):
        assert reason.startswith(waits.format("decoded and multiplied") + "grouped_mm needs rows")
    for reason in reasons(5, torch.bfloat16, False):
        assert reason.startswith(waits.format("multiplied") + "grouped_mm needs rows of 16 bytes")
    assert reasons(8, torch.float32, True) == {waits.format("decoded and multiplied") + no_kernel}
    by_torch = "grouped_mm multiplies one expert at a time, and the host waits for the GPU: "
    found = {by_torch + no_kernel + folds.format(rows) for rows in least}
    assert reasons(8, torch.float32, False) == found


@pytest.mark.parametrize("budget", [1, 1 << 30])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # gpt_oss stacks [E, K, N]
def test_fused_4bit_experts_train_on_a_gpu_s_path_as_peft_s_decoded(
    name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of SGD on a layer's experts in bfloat16, with the routing given, beside float64.

    PEFT has the decoded weights: over 4 bits its forward leaves the adapter out. Pooled over seeds.
    """
    monkeypatch.setattr(quantized_stack, "PIECE_BYTES", budget)
    monkeypatch.setattr(eager_experts, "runs", None)  # none is computed expert by expert
    pools: dict[str, dict[str, list[Tensor]]] = {kind: {} for kind in ("ours", "oracle", "peft")}
    for seed in range(4):
        for kind, found in train_4bit_experts(name, seed).items():
            for key, t in found.items():
                pools[kind].setdefault(key, []).append(t)
    # Ours rounds x·Wᵀ and the sum of both branches, PEFT W + s·B·A and y.
    assert_close_to_reference(*pools.values(), lambda *_: tolerance.unit_roundoff(torch.bfloat16))


def train_4bit_experts(name: str, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return y of the second step and each parameter's update, of ours, in float64, and of PEFT."""
    torch.manual_seed(seed)
    peft: Any = adapted(experts_module(Shape(name, 4, 2, 64, 128), torch.bfloat16))
    ours: Any = copy.deepcopy(peft)
    quantize_experts(ours, blocksize=64)
    for parameter in ("gate_up_proj", "down_proj"):
        # Those of ours: with nested scales, decoded weights have others once quantized again.
        decoded = cast(QuantizedWeight, stack(ours.get_base_layer(), parameter)).dequantize()
        getattr(peft.get_base_layer(), parameter).data.copy_(decoded)
    oracle: Any = copy.deepcopy(peft).double()
    oracle.get_base_layer().config._experts_implementation = "eager"
    fuse(nn.ModuleDict({"experts": ours}))
    x, dy = torch.randn(2, 2, 40, 64).bfloat16()
    weights, index = torch.rand(2, 40, 4).topk(2)
    found = {}
    for kind, layer in {"ours": ours, "oracle": oracle, "peft": peft}.items():
        dtype = torch.float64 if kind == "oracle" else torch.bfloat16
        adapters = {n: p for n, p in layer.named_parameters() if "lora_" in n}
        before = {n: p.detach().clone() for n, p in adapters.items()}
        optimizer = torch.optim.SGD(adapters.values(), lr=0.02)
        with cases.engine("eager-gpu") if kind == "ours" else nullcontext():
            for i in range(2):
                y = layer(x[i].to(dtype), index[i], weights[i].bfloat16().to(dtype))
                optimizer.zero_grad()
                y.backward(dy[i].to(dtype))
                optimizer.step()
        moved = {n: p.detach() - before[n] for n, p in adapters.items()}
        found[kind] = {"y": y.detach(), **moved}
    return found


def test_fused_experts_never_write_effective_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on meta tensors: bytes at most a third of PEFT's with 128 experts, top 8."""
    sizes = {**SIZES, "hidden_size": 1024, "num_hidden_layers": 1}
    options = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 384}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **options, head_dim=64)).bfloat16()
        model = get_peft_model(model, config(r=16))
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    x = torch.empty(512, 1024, device="meta", dtype=torch.bfloat16, requires_grad=True)
    index = torch.empty(512, 8, device="meta", dtype=torch.int64)
    weights = torch.empty(512, 8, device="meta", dtype=torch.bfloat16)

    def run() -> None:
        y = layer(x, index, weights)
        y.backward(torch.empty_like(y))

    with monkeypatch.context() as patched:  # PEFT disables autocast, which knows no meta device
        patched.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        peft = count(run)
    fuse(model)
    ours = count(run)
    assert 3 * ours.bytes <= peft.bytes
    assert ours.peak < layer.get_base_layer().gate_up_proj.nbytes


REASONS = {
    "gate_up_proj": "the base weight is trainable",
    "down_proj": "the base weight is trainable",
    "forward": "its forward was replaced",
    "implementation": "experts_implementation='deepgemm' has kernels of its own",
}


@pytest.mark.parametrize("kind", REASONS)
def test_fuse_leaves_experts_to_peft_with_the_reason(kind: str) -> None:
    model = make("mixtral")
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    if kind in ("gate_up_proj", "down_proj"):
        getattr(experts, kind).requires_grad_()
    elif kind == "forward":
        experts.forward = lambda *args: args[0]
    else:
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation = "deepgemm"
    fuse(model)
    assert len(fused_wrappers(model)) == 2  # those of the other layer
    reasons = [row.reason for row in explain(model).rows if "layers.0.mlp.experts" in row.layer]
    assert reasons == [REASONS[kind]] * 2


def test_fused_experts_with_one_projection_merged_and_disabled_say_so() -> None:
    (wrapper, *_) = fused_wrappers(fuse(make("mixtral")))
    inner = wrapper.base_layer
    inner.merge()
    inner._disable_adapters = True
    device = torch.device("cpu")
    reason = experts_reason(wrapper, device)
    assert reason == "adapters are merged and disabled: PEFT takes them out first"


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_adapter_names_beside_one_projection_merged_or_disabled_are_left_to_peft(
    state: str, index: int
) -> None:
    (wrapper, *_) = fused_wrappers(fuse(make("mixtral")))
    member, device = (wrapper, wrapper.base_layer)[index], torch.device("cpu")
    assert experts_reason(wrapper, device, ["default"]) is None
    if state == "merged":
        member.merge()
    else:
        member._disable_adapters = True
    reason = experts_reason(wrapper, device, ["default"])
    assert reason == "adapters are disabled or merged, where rows name their own"


class Packed(nn.Parameter):
    """A parameter in a format of its own."""


@pytest.mark.parametrize("part", ["base", "lora_A", "lora_B"])
def test_fused_experts_of_other_tensors_are_left_to_peft(part: str) -> None:
    wrapper = fused_wrappers(fuse(make("mixtral")))[0]
    inner, device = wrapper.base_layer, torch.device("cpu")
    module, name = inner.get_base_layer(), "gate_up_proj"
    if part != "base":
        module, name = getattr(inner, part)["default"], "weight"
    found = getattr(module, name)
    assert experts_reason(wrapper, device) is None
    setattr(module, name, nn.Parameter(found.detach().to("meta"), found.requires_grad))
    assert experts_reason(wrapper, device) == "it has a tensor on meta, x on cpu"
    setattr(module, name, Packed(found.detach(), found.requires_grad))
    assert experts_reason(wrapper, device) == "it has a Packed"


@pytest.mark.parametrize("count", [1, 3])
def test_fuse_leaves_what_is_no_projection_of_experts_to_peft(count: int) -> None:
    experts: Any = Experts(count, 16, 24)
    experts.other = nn.Parameter(torch.zeros(count, 8, 8), requires_grad=False)
    parameter = "experts.down_proj" if count == 1 else "experts.other"
    options = {"target_parameters": [parameter], "target_modules": []}
    model = get_peft_model(nn.ModuleDict({"experts": experts}), LoraConfig(r=2, **options))
    (row,) = explain(fuse(model)).rows
    name = parameter.partition(".")[2]
    assert row.reason == f"PEFT's ParamWrapper over {name}, which is no experts' projection"


def test_implementation_of_other_modules_names_what_they_lack() -> None:
    forward = lora_kernels.integrations.experts.lora_kernels_experts_forward
    with pytest.raises(TypeError, match="experts_implementation='lora_kernels': got Linear witho"):
        forward(nn.Linear(2, 2), torch.ones(1, 2), torch.zeros(1, 1), torch.ones(1, 1))


@pytest.mark.parametrize("inside", ["MixtralExperts", "ParamWrapper"])
def test_fused_experts_with_a_hook_inside_are_peft_s(inside: str) -> None:
    model = fuse(make("mixtral"))
    inner = fused_wrappers(model)[0].base_layer
    module = inner if inside == "ParamWrapper" else inner.get_base_layer()
    called: list[int] = []
    module.register_forward_hook(lambda *_: called.append(1))
    got = step(model)
    assert called == [1]
    stock = make("mixtral")
    assert_as_exact(got, step(exact(stock)), step(stock))
    rows = [row for row in explain(model).rows if "layers.0.mlp.experts" in row.layer]
    said = [f"a hook or another forward sits on its {inside}" in r.reason for r in rows]
    assert any(said) and (all(said) or inside == "ParamWrapper")


@pytest.mark.parametrize("name", MODELS)
def test_experts_implementation_of_transformers_gives_the_model_s_logits(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().requires_grad_(False)
    ref, want = logits(exact(model)), logits(model)
    model.set_experts_implementation(lora_kernels.integrations.experts.NAME)
    assert_as_exact(logits(model), ref, want)


def test_fused_experts_decoding_after_an_update_uses_the_new_adapter() -> None:
    """The adapter is changed in place, copied with its model, added, and switched."""
    model = fuse(make("mixtral")).eval()
    twin = make("mixtral").eval()

    def check() -> None:
        with torch.no_grad():
            for x in (ids(1, 1), ids(1, 1)):
                assert_as_exact(logits(model, x), logits(exact(twin), x), logits(twin, x))

    check()
    for each in (model, twin):
        start(each, seed=7)
    check()
    copied = copy.deepcopy(model)
    for each in (copied, twin):
        start(each, seed=8)
    model = copied
    check()
    for each in (model, twin):
        torch.manual_seed(5)
        each.add_adapter("second", config(r=3))
        start(each, seed=9)
        each.set_adapter("second")
    check()


def test_fused_experts_compile_whole_and_checkpoint() -> None:
    """With the eager call's results; activation checkpointing runs the forward again."""
    model = fuse(make("gpt_oss"))
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weights, index = torch.rand(20, 4).topk(2)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def gradients(call: Any) -> list[Tensor]:
        y = call(x, index, weights)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]

    want = gradients(layer)
    compiled = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    checkpointed = gradients(lambda *args: checkpoint(layer, *args, use_reentrant=False))
    assert all(map(torch.equal, checkpointed, want))
    for got, each in zip(compiled, want, strict=True):
        torch.testing.assert_close(got, each)
