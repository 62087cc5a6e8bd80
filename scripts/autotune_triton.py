"""Chooses the block shapes of the Triton kernels by timing them, on the GPU at hand:

    python scripts/autotune_triton.py            # writes tp_kernels/ops/recurrence/triton_blocks.json; minutes

Timed is a forward pass and a backward pass of ``TargetProp()`` over T = 128 steps, and for the kernel of "jacobian",
whose blocks are one table for all dtypes, its backward pass in float32. A block that spills registers here is left out;
whether it spills on other GPUs, ``tests/test_triton_aot.py`` says.
"""

import json

import torch
import triton

from tp_kernels.ops.recurrence import triton_blocks, triton_kernel
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.triton_blocks import Block
from tp_kernels.rules import Sweep

CELL = CELLS["rnn_tanh"]
STEPS = 128
BATCHES = (16, 128, 1024, 8192)
CANDIDATES = [Block(rows, warps) for rows in (16, 32, 64) for warps in (1, 2, 4, 8, 16)]
DTYPES = {"float32": torch.float32, "half": torch.bfloat16}


def milliseconds(block: Block, N: int, B: int, dtype: torch.dtype, inverse: str) -> float:
    """Infinite where the block does not fit, or spills."""
    generator = torch.Generator("cuda").manual_seed(0)
    u = torch.randn(STEPS, B, N, device="cuda", generator=generator).to(dtype)
    weight = (torch.randn(N, N, device="cuda", generator=generator) / N**0.5).to(dtype)
    launch, spills, nothing = triton_kernel.launch, [], u.new_empty(0)
    name = "choose_jacobian" if inverse == "jacobian" else "choose"
    choose, states = getattr(triton_blocks, name), u.tanh()

    def step() -> None:
        h = states if inverse == "jacobian" else triton_kernel.forward(CELL, u, weight, None, None, keep=False)[0]
        triton_kernel.backward(
            CELL,
            Sweep(inverse),
            grad_h=None,
            grad_last=u[0],
            h=h,
            kept=nothing,
            weight=weight,
            feedback=weight,
            carried=None,
            through=None,
            u=None,
            start=None,
        )

    setattr(triton_blocks, name, lambda *given: block)
    triton_kernel.launch = lambda *given, **words: spills.append(launch(*given, **words).n_spills)
    try:
        step()
        torch.cuda.synchronize()
        triton_kernel.launch = launch
        return float("inf") if any(spills) else triton.testing.do_bench(step)
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        print(f"    {block}: {error}")
        return float("inf")
    finally:
        setattr(triton_blocks, name, choose)
        triton_kernel.launch = launch


def best(N: int, dtype: torch.dtype, inverse: str = "weight") -> list[list[int]]:
    """From which number of rows on, then the block."""
    entries: list[list[int]] = []
    for B in BATCHES:
        times = {block: milliseconds(block, N, B, dtype, inverse) for block in CANDIDATES}
        block = min(times, key=times.get)
        print(f"  N={N} B={B}: {block}, {times[block]:.3f} ms", flush=True)
        if not entries or entries[-1][1:] != list(block):
            entries.append([B if entries else 0, *block])
    return entries


def main() -> None:
    blocks = {}
    for name, dtype in DTYPES.items():
        print(name)
        probe = torch.empty(1, device="cuda", dtype=dtype)
        # A width that does not fit on this GPU keeps the block that it has.
        blocks[name] = {
            str(n): best(n, dtype) if triton_blocks.fits(probe, 1, n) else triton_blocks.table()[name][str(n)]
            for n in triton_blocks.SIZES[dtype]
        }
    print("jacobian")
    blocks["jacobian"] = {
        str(n): best(n, torch.float32, "jacobian")
        if triton_blocks.jacobian_fits(torch.device("cuda"), n)
        else triton_blocks.table()["jacobian"][str(n)]
        for n in triton_blocks.JACOBIAN_SIZES
    }
    lines = []
    for name, entries in blocks.items():
        inner = ",\n".join(f'      "{n}": {json.dumps(entry)}' for n, entry in entries.items())
        lines.append(f'    "{name}": {{\n{inner}\n    }}')
    chosen_by = f"scripts/autotune_triton.py on {torch.cuda.get_device_name()}, triton {triton.__version__}"
    text = f'{{\n  "chosen_by": {json.dumps(chosen_by)},\n  "blocks": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    triton_blocks.TABLE.write_text(text)


if __name__ == "__main__":
    main()
