"""Compiles the network's Triton kernels for GPUs that are not here: python -m benchmarks.gpu_compile [--targets 75 90]

Prints registers, bytes spilled to memory and instructions of each kernel. Any spill is an error.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rednet.model.inference.cuda.candidates import TENSOR_CORES
from rednet.model.inference.preparation import DTYPES
from rednet.model.ops import triton_fused, triton_generated, triton_ops

TARGETS = (75, 80, 86, 89, 90, 100, 120)  # T4, A100, A10, L4, H100, B200, RTX 50
INVOLUTIONS = ((3, 1), (3, 2), (7, 1), (7, 2))  # kernel size, stride
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Variant = tuple[str, Any, dict[str, str], dict[str, object], int]  # name, kernel, signature, constants, warps


def variants(dtype: str, target: int) -> Iterator[Variant]:
    """Every kernel of a network in this dtype, as the network launches it on this target."""
    value, single, sizes = f"*{dtype}", "*fp32", dict.fromkeys(triton_ops.UNSPECIALIZED, "i32")
    tensors = {"x": value, "kernel": value, "out": value, "bias": value, "scale": single, "shift": single}
    warps = 4 if dtype == "fp32" else 2
    for k, stride in INVOLUTIONS:
        constants = {"K": k, "STRIDE": stride, "GROUP_CHANNELS": 16, "BLOCK_C": 16, "ACC_DTYPE": tl.float32}
        constants |= {"STRIP": triton_ops.STRIP, "BLOCK": triton_ops.BLOCK_STRIPS}
        yield f"involution {k}x{k} s{stride}", triton_ops._forward, tensors | sizes, constants, warps
    if target >= 10 * TENSOR_CORES[0] + TENSOR_CORES[1]:  # others do not use it, and on sm_75 it spills
        sizes = dict.fromkeys(triton_generated.UNSPECIALIZED, "i32")
        tensors |= {"reduced": value, "span": value}
        warps = triton_generated.warps(DTYPES[dtype])
        for k, stride in INVOLUTIONS:
            constants = dict(triton_generated.constants(k, stride, 16))
            yield f"generated {k}x{k} s{stride}", triton_generated._forward, tensors | sizes, constants, warps
    sizes, block = dict.fromkeys(triton_fused.UNSPECIALIZED, "i32"), triton_fused.BLOCK
    normalised = {"pixels": "*u8", "scale": single, "shift": single, "out": value}
    constants = {"CHANNELS": 3, "BLOCK_C": 4, "BLOCK": block // 4}
    yield "normalise", triton_fused._normalise, normalised | sizes, constants, 4
    added = {"x": value, "bias": value, "residual": value}
    yield "bias, residual, ReLU", triton_fused._bias_relu, added | sizes, {"CHANNELS": 256, "BLOCK": block}, 4
    pooled = {"x": value, "bias": value, "out": value}
    constants = {"CHANNELS": 64, "BLOCK_C": 64, "BLOCK": block // 64}
    yield "pool, bias, ReLU", triton_fused._pool_bias_relu, pooled | sizes, constants, 4


def compiled(variant: Variant, target: int) -> dict[str, object]:
    """Compile a kernel, and count what the result uses."""
    name, kernel, signature, constants, warps = variant
    signature = {argument: signature[argument] for argument in kernel.arg_names if argument not in constants}
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constants.items()},
        attrs={
            (kernel.arg_names.index(argument),): [["tt.divisibility", 16]]  # tensors are aligned
            for argument, kind in signature.items()
            if kind.startswith("*")
        },
    )
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run([BIN / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK", "LOCAL"))
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
    return {"kernel": name, "registers": registers, "spilled bytes": stack + local, "instructions": instructions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="compute capabilities, without the dot")
    parser.add_argument("--dtypes", nargs="+", default=(*DTYPES,), choices=DTYPES)
    options = parser.parse_args()
    spilled = False
    for target in options.targets:
        for dtype in options.dtypes:
            for variant in variants(dtype, target):
                row = compiled(variant, target)
                spilled |= bool(row["spilled bytes"])
                print(f"sm_{target} {dtype} " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    sys.exit("a kernel spills registers" if spilled else 0)


if __name__ == "__main__":
    main()
