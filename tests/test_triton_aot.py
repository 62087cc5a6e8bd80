"""Every Triton kernel, compiled ahead of time for GPUs that need not be there: no spills, shared memory within limits.

What each uses with one version of Triton is written down in ``benchmarks/results/triton_resources.json``; with that
version a change that needs more registers or more shared memory fails. This writes it anew, for a commit that says why:

    TPK_REWRITE_RESOURCES=1 python -m pytest tests/test_triton_aot.py
"""

import importlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _aot import SHARED_MEMORY, Polar, Shape, compiled, resources

from conftest import absent
from tp_kernels import _triton
from tp_kernels.ops.recurrence import triton_blocks
from tp_kernels.ops.recurrence.triton_blocks import Block
from tp_kernels.rules import Sweep

REPORT = Path(__file__).parent.parent / "benchmarks" / "results" / "triton_resources.json"
REWRITE = os.environ.get("TPK_REWRITE_RESOURCES") == "1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What differs between nonlinearities and rules, at one width: tanh, "layer" and "direct" are the most of each kind.
WORDS = (
    *(("forward", word, "none", "total") for word in ("relu", "identity")),
    *(
        ("backward", word, inverse, "total")
        for word in ("relu", "identity")
        for inverse in ("layer", "difference", "direct")
    ),
    *(
        ("backward", "tanh", inverse, update)
        for inverse in ("identity", "weight", "difference")
        for update in ("total", "local")
    ),
    *(("backward", "tanh", inverse, "local") for inverse in ("layer", "direct")),
    ("backward", "relu", "jacobian", "total"),
    ("backward", "tanh", "jacobian", "local"),
)


def shapes() -> list[tuple[Shape | Polar, int]]:
    """Every dtype and block, on every GPU, in the heaviest kernels; every other kernel in one block and on one GPU."""
    listed = []
    for name, dtype in DTYPES.items():
        for padded, entries in triton_blocks.table()[triton_blocks.name(dtype)].items():
            n = int(padded)
            for _, *numbers in entries:
                block = Block(*numbers)
                if name == "float16" and (n < 64 or block.rows > 16):
                    continue  # instruction for instruction those of bfloat16
                for capability, limit in SHARED_MEMORY.items():
                    listed += [(shape, capability) for shape in _heaviest(name, dtype, n, block, capability, limit)]
            if padded in triton_blocks.table()["jacobian"] and (name != "float16" or n >= 64):
                for _, *numbers in triton_blocks.table()["jacobian"][padded]:
                    shape = Shape("backward", name, n, Block(*numbers), inverse="jacobian")
                    fitting = (at for at, limit in SHARED_MEMORY.items() if _needs(shape) <= limit)
                    listed += [(shape, capability) for capability in fitting]
            if n == 64:
                listed += [(Shape(kind, name, n, Block(16, 4), *words), 90) for kind, *words in WORDS]
    block = Block(*triton_blocks.table()["float32"]["128"][0][1:])
    listed += [(Shape("forward", "float32", 128, block, precision="tf32"), 90)]
    polar = [Polar("float32", block, power) for block in ((16, 1), (32, 4)) for power in (1.0, 0.5)]
    listed += [(shape, capability) for shape in polar for capability in SHARED_MEMORY]
    return listed + [(Polar(name, (32, 4), 1.0), 90) for name in ("bfloat16", "float16")]


def _needs(shape: Shape) -> int:
    """The shared memory that ``triton_blocks`` says, when it decides."""
    if shape.inverse == "jacobian":
        return triton_blocks.jacobian_shared_memory(shape.padded)
    two = Sweep(shape.inverse).uses_inverse and shape.update == "total"
    return triton_blocks.shared_memory(shape.padded, DTYPES[shape.dtype], 2 if two else 1)


def _launched(n: int, dtype: torch.dtype, inverse: str) -> set[Block]:
    """The blocks that a sweep back with this inverse is cut in."""
    entries = triton_blocks.table()[triton_blocks.name(dtype)][str(n)]
    return {triton_blocks.choose(n, rows, dtype, inverse) for rows, *_ in entries}


def _heaviest(name: str, dtype: torch.dtype, n: int, block: Block, capability: int, limit: int) -> list[Shape]:
    if triton_blocks.shared_memory(n, dtype, 1) > limit:
        return []
    chosen = [Shape("forward", name, n, block)]
    updates = ["total"] if triton_blocks.shared_memory(n, dtype, 2) <= limit else ["displacement", "local"]
    inverses = [inverse for inverse in ("layer", "direct") if block in _launched(n, dtype, inverse)] or ["weight"]
    chosen += [Shape("backward", name, n, block, "tanh", *words) for words in product(inverses, updates)]
    if capability == 90:
        chosen.append(Shape("backward", name, n, block))
    return chosen


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    """What every shape uses, on every GPU."""
    if _triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set, and the interpreter compiles nothing")
    if _triton.import_error() is not None:
        absent("triton", f"triton could not be imported: {_triton.import_error()}")
    listed = shapes()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(resources, *zip(*listed, strict=True), chunksize=4))
    return {f"{shape} sm_{capability}": result for (shape, capability), result in zip(listed, results, strict=True)}


@pytest.fixture
def triton_kernel() -> ModuleType:
    if _triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set, and the interpreter compiles nothing")
    if _triton.import_error() is not None:
        absent("triton", f"triton could not be imported: {_triton.import_error()}")
    return importlib.import_module(f"{triton_blocks.__package__}.triton_kernel")


def test_another_length_or_batch_is_no_other_kernel(triton_kernel):
    """What depends on T and B is not looked at when a kernel is compiled …"""
    for kernel in (triton_kernel.forward_kernel, triton_kernel.backward_kernel, triton_kernel.jacobian_kernel):
        varying = {name for name in kernel.arg_names if name in ("T", "B") or name.endswith(("_time", "_batch"))}
        assert len(varying) >= 4
        assert {given.name for given in kernel.params if given.do_not_specialize} == varying


def test_what_is_aligned_is_loaded_as_such(triton_kernel):
    """… but for whether the strides keep to 16: with an N that does, they do in every contiguous tensor."""
    for shape in (Shape("forward", "float32", 64, Block(16, 4)), Shape("backward", "float32", 64, Block(16, 4))):
        found = [compiled(shape, 90, ALIGNED=aligned).asm["ptx"] for aligned in (True, False)]
        one_by_one = ["ld.global.b32" in ptx for ptx in found]
        assert one_by_one == [False, True]
    for B in (13, 20):
        assert triton_kernel.aligned(48, torch.empty(7, B, 48), None, torch.empty(7, B, 2, 48))
        assert not triton_kernel.aligned(100, torch.empty(7, B, 100))
    assert not triton_kernel.aligned(48, torch.empty(7, 3, 49)[..., :48])


def test_nothing_spills(found):
    """With any version of Triton."""
    assert len(found) == len(shapes())
    assert {name: use["stack"] for name, use in found.items() if use["stack"]} == {}


def test_shared_memory_is_there(found):
    """Within the GPU's limit, and within what ``triton_blocks`` says: with any version of Triton."""
    for (shape, capability), use in zip(shapes(), found.values(), strict=True):
        if isinstance(shape, Polar):
            assert use["shared"] <= SHARED_MEMORY[capability], f"{shape} on sm_{capability}"
            continue
        assert use["shared"] <= min(_needs(shape), SHARED_MEMORY[capability]), f"{shape} on sm_{capability}"


def test_nothing_grew(found):
    """Against the report, where it was made with this version of Triton."""
    import triton

    if REWRITE:
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(use)}" for name, use in found.items())
        REPORT.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    report = json.loads(REPORT.read_text())
    assert set(report["kernels"]) == set(found), "the report is of other shapes: rewrite it"
    if report["triton"] != triton.__version__:
        pytest.skip(f"the report is of triton {report['triton']}, and this is {triton.__version__}")
    grown = {
        name: (report["kernels"][name], use)
        for name, use in found.items()
        if any(use[what] > report["kernels"][name][what] for what in use)
    }
    assert grown == {}
