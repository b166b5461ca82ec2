"""Against vectors that bitsandbytes made once, without it: golden.py made them."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.quantization import QuantizedWeight, quantize_4bit
from tests.quantization import golden


@pytest.fixture(scope="module")
def tensors():
    return load_file(golden.FILE)


@pytest.mark.parametrize("name", golden.CASES)
def test_quantize_of_golden_weights_has_the_stored_bits(name, tensors):
    case = golden.CASES[name]
    stored = QuantizedWeight.from_state_dict(tensors, prefix=name)
    made = quantize_4bit(golden.weight(case), case.quant_type, case.blocksize, case.nested)
    for weight in (stored, made):
        assert (weight.shape, weight.dtype) == (case.shape, case.dtype)
        assert (weight.quant_type, weight.blocksize) == (case.quant_type, case.blocksize)
        assert weight.nested == case.nested
        state = weight.state_dict(name)
        assert state.keys() | {f"{name}.decoded"} == {k for k in tensors if k.split(".")[0] == name}
        for key, t in state.items():
            assert t.dtype is tensors[key].dtype and torch.equal(t, tensors[key]), key
        decoded = tensors[f"{name}.decoded"]
        assert weight.dequantize().dtype is decoded.dtype
        assert torch.equal(weight.dequantize(), decoded)


def test_golden_cases_cover_the_format(tensors):
    cases = golden.CASES.values()
    assert {case.quant_type for case in cases} == {"nf4", "fp4"}
    assert {case.nested for case in cases} == {False, True}
    assert len(tensors["two-nested-blocks.nested_absmax"]) == 2
    text = json.loads(bytes(tensors["odd.quant_state.bitsandbytes__nf4"].tolist()))
    assert text["shape"] == [11, 37] and text["nested_blocksize"] == 256
    assert golden.FILE.stat().st_size < 40_000


def test_golden_test_needs_no_bitsandbytes():
    """Neither does anything else but `from_bitsandbytes`."""
    program = (
        "import sys, torch; sys.modules['bitsandbytes'] = None\n"
        "from lora_kernels.quantization import QuantizedWeight, quantize_4bit\n"
        "state = quantize_4bit(torch.eye(4)).state_dict()\n"
        "assert torch.equal(QuantizedWeight.from_state_dict(state).dequantize(), torch.eye(4))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
