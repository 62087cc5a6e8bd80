"""Compiling Triton kernels ahead of time, for GPUs that need not be there, and what each uses. Imports triton late."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tp_kernels.ops.recurrence.triton_blocks import Block

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

    def source(self) -> tuple[Any, dict[str, str], dict[str, object], dict[str, Any]]:
        """The kernel, types of its runtime arguments, values of the others, options. Everything arrives that can."""
        import triton.language as tl

        from tp_kernels.ops.recurrence import triton_kernel

        pointer = POINTERS[self.dtype]
        words = {"BLOCK_B": self.block.rows, "BLOCK_N": self.padded, "NONLINEARITY": self.nonlinearity}
        options = triton_kernel.options(self.block)
        if self.inverse == "jacobian":
            names = ("grad_h", "grad_last", "h", "weight", "carried_in", "through_in")
            types = dict.fromkeys((*names, "delta_out", "carried_out", "through_out"), pointer)
            types |= dict.fromkeys(("gram", "norms", "scaled", "missed_out"), "*fp32")
            types |= _integers(("T", "B", "N", "grad_time", "grad_batch", "grad_head")) | {"iterations_out": "*i32"}
            types |= dict.fromkeys(("step", "reg", "rtol"), "fp32")
            words |= {"UPDATE": self.update, "CHUNK": triton_kernel.CHUNK, "ALIGNED": True}
            return triton_kernel.jacobian_kernel, types, words, options
        words |= {"OPERAND": getattr(tl, self.dtype), "PRECISION": self.precision, "ALIGNED": True}
        if self.kernel == "forward":
            names = ("u", "weight", "h0", "h")
            sizes = ("T", "B", "N", "u_time", "u_batch", "u_head")
            return triton_kernel.forward_kernel, dict.fromkeys(names, pointer) | _integers(sizes), words, options
        names = ("grad_h", "grad_last", "h", "weight", "feedback", "carried_in", "through_in", "u", "h0")
        types = dict.fromkeys((*names, "delta_out", "carried_out", "through_out"), pointer)
        if self.update == "displacement":
            types["delta_out"] = "*fp32"
        types |= _integers(
            ("T", "B", "N", *(f"{of}_{over}" for of in ("grad", "u") for over in ("time", "batch", "head")))
        )
        types |= {"step": "fp32", "clip": "fp32"}
        words |= {"INVERSE": self.inverse, "UPDATE": self.update}
        return triton_kernel.backward_kernel, types, words, options


class Polar(NamedTuple):
    """The kernel of ``regularized_inverse``."""

    dtype: str
    block: tuple[int, int]
    power: float

    def __str__(self) -> str:
        return f"polar-{self.dtype}-{self.block[0]}x{self.block[1]}-power{self.power}"

    def source(self) -> tuple[Any, dict[str, str], dict[str, object], dict[str, Any]]:
        from tp_kernels.ops.regularized_inverse import triton_kernel

        pointer = POINTERS[self.dtype]
        types = {"weight": pointer, "reg": "*fp32", "inverse": pointer, "failed": "*i8", "scratch": "*fp32"}
        types |= _integers(("M", "N", "SIZE", "matrix_stride", "row_stride", "column_stride", "largest_count"))
        words = {"ROOT": self.power == 0.5, "TILE": self.block[0], "PRECISION": "tf32x3"}
        options = triton_kernel.options(triton_kernel.Block(*self.block))
        return triton_kernel.polar_kernel, types | {"tolerance": "fp32"}, words, options


def _integers(names: tuple[str, ...]) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def compiled(shape: Shape | Polar, capability: int, **others: object) -> Any:
    """The kernel, with other values of its constants where they are given."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, words, options = shape.source()
    words |= others
    place = {name: (kernel.arg_names.index(name),) for name in (*types, *words)}
    # As at run time with aligned memory and an N that is a multiple of 16: the widest loads, the most registers.
    odd = ("column_stride", "largest_count", *(given.name for given in kernel.params if given.do_not_specialize))
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        {place[name]: value for name, value in words.items()},
        {place[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind != "fp32" and name not in odd},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(shape: Shape | Polar, capability: int) -> dict[str, int]:
    """Registers and stack bytes of a thread (a stack is where spilled registers go), shared memory of a program."""
    import triton

    kernel = compiled(shape, capability)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say what {shape} uses: {report}")
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": kernel.metadata.shared}
