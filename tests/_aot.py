"""Compiling Triton kernels ahead of time, for GPUs that need not be there, and what each uses. Imports triton late."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tp_kernels.ops.rnn.triton_blocks import Block

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""What one block may use, by compute capability."""
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


class Shape(NamedTuple):
    """One kernel as it is launched. ``str()`` of it is its id."""

    kernel: str
    dtype: str
    padded: int
    block: Block
    nonlinearity: str = "tanh"
    inverse: str = "none"
    update: str = "total"
    precision: str = "tf32x3"

    def __str__(self) -> str:
        words = [self.nonlinearity] if self.kernel == "forward" else [self.nonlinearity, self.inverse, self.update]
        precision = [self.precision] if self.dtype == "float32" else []
        return "-".join(
            [self.kernel, self.dtype, f"N{self.padded}", f"{self.block.rows}x{self.block.warps}", *words, *precision]
        )


def _types(shape: Shape) -> tuple[dict[str, str], dict[str, object]]:
    """Of the runtime arguments, and the values of the others. Everything arrives that can."""
    import triton.language as tl

    pointer = POINTERS[shape.dtype]
    words = {
        "BLOCK_B": shape.block.rows,
        "BLOCK_N": shape.padded,
        "OPERAND": getattr(tl, shape.dtype),
        "PRECISION": shape.precision,
        "NONLINEARITY": shape.nonlinearity,
    }
    sizes = dict.fromkeys(("T", "B", "N"), "i32")
    if shape.kernel == "forward":
        strides = dict.fromkeys(("u_time", "u_batch", "u_head"), "i32")
        return dict.fromkeys(("u", "weight", "h0", "h"), pointer) | sizes | strides, words
    names = ["grad_h", "grad_last", "h", "weight", "feedback", "carried_in", "through_in"]
    types = dict.fromkeys([*names, "delta_out", "carried_out", "through_out"], pointer)
    if shape.update == "displacement":
        types["delta_out"] = "*fp32"
    strides = dict.fromkeys(("grad_time", "grad_batch", "grad_head"), "i32")
    return types | sizes | strides | {"step": "fp32", "clip": "fp32"}, words | {
        "INVERSE": shape.inverse,
        "UPDATE": shape.update,
    }


def resources(shape: Shape, capability: int) -> dict[str, int]:
    """Registers and stack bytes of a thread (a stack is where spilled registers go), shared memory of a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tp_kernels.ops.rnn import triton_kernel

    kernel = getattr(triton_kernel, f"{shape.kernel}_kernel")
    types, words = _types(shape)
    place = {name: (kernel.arg_names.index(name),) for name in (*types, *words)}
    # As at run time with aligned memory and an N that is a multiple of 16: the widest loads, the most registers.
    aligned = [
        name for name, kind in types.items() if kind.startswith("*") or (kind == "i32" and name not in ("T", "B"))
    ]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        {place[name]: value for name, value in words.items()},
        {place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = triton_kernel.options(shape.block)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say what {shape} uses: {report}")
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": compiled.metadata.shared}
