"""The CUDA module where there is no GPU: what its kernels ask of each architecture, and what it says without a device;
and that the emulation which stands in for a GPU sees what it is there to see.
"""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from _cuda import ARCHITECTURES, RESOURCES, NotBuilt, build, check_emulation, check_launching, parse

from conftest import absent

SHARED_MEMORY = 48 * 1024  # of a block, without asking for more
REGISTERS = 64 * 1024  # of a multiprocessor, and of a block
TABLE = json.loads(RESOURCES.read_text())


@pytest.fixture(scope="module")
def compiled():
    try:
        return build()
    except NotBuilt as reason:
        absent("nvcc", str(reason))


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    kernels = compiled.resources["kernels"]
    assert tuple(kernels) == ARCHITECTURES
    names = list(kernels["sm_80"])
    assert all(list(of_arch) == names for of_arch in kernels.values())
    count = Counter(name.split("<")[0] for name in names)
    assert count["rnn_forward_kernel"] == 9
    assert count["rnn_backward_kernel"] == 36
    assert count["rnn_jacobian_kernel"] == 18
    # Half precision to K = 64, 128, 256, float32 to K = 64, 128 in one or two parts. No backward of two matrices where
    # they do not fit: at 256, and at 128 in two parts.
    assert count["rnn_forward_mma_kernel"] == 2 * 3 + 2 * 2
    assert count["rnn_backward_mma_kernel"] == 4 * (2 * 3 + 2 * 2) - 2 - 1
    assert count["rnn_cluster_forward_kernel"] == 6
    assert count["rnn_cluster_backward_kernel"] == 16
    assert {"rnn_activation_kernel", "rnn_step_kernel"} < set(names)
    for kernel in ("regularized_solve_kernel", "regularized_polar_kernel"):
        assert [name for name in names if name.startswith(kernel)] == [
            f"{kernel}<{dtype}, {order}>" for dtype in ("float32", "float64") for order in (128, 32, 64)
        ]


def threads(name: str) -> int:
    """Of a block of that kernel."""
    if "cluster" in name:
        return 256
    padded = int(re.search(r"<(\w+, \d+, )?(\d+)", name)[2])
    return min(2 * padded, 256)


def test_nothing_spills(compiled):
    for arch, kernels in compiled.resources["kernels"].items():
        for name, needs in kernels.items():
            assert needs["local"] == 0, f"{name} on {arch} keeps {needs['local']} bytes of a thread in memory"
            assert needs["shared"] <= SHARED_MEMORY, f"{name} on {arch}: {needs['shared']} bytes of shared memory"
            if "<" in name and name.startswith("rnn"):
                assert threads(name) * needs["registers"] <= REGISTERS, (
                    f"{name} on {arch}: {needs['registers']} registers"
                )


def test_the_table_is_up_to_date(compiled):
    """Another compiler may need other registers, and shared memory only the source decides."""
    if compiled.resources["nvcc"] == TABLE["nvcc"]:
        assert compiled.resources == TABLE, "python tests/_cuda.py renews it"
    shared = [
        {arch: {name: needs["shared"] for name, needs in kernels.items()} for arch, kernels in table["kernels"].items()}
        for table in (compiled.resources, TABLE)
    ]
    assert shared[0] == shared[1], "python tests/_cuda.py renews it"


WITHOUT_DEVICE = """
import _cuda
assert _cuda.device_type == "cuda" and _cuda.build_info()["architectures"] == "80-real 90a-real 100-real 120"
pointers = dict.fromkeys(("input", "weight", "start", "h", "device", "stream"), 0) | {"dtype": "float32", "tf32": False}
print(_cuda.device_problem())
try:
    _cuda.recurrence_fwd(**pointers, input_strides=(0, 0, 0), sizes=(1, 1, 1, 1), cell="rnn_tanh")
except RuntimeError as error:
    print(error)
"""


def test_without_a_device(compiled):
    """The module imports with no driver, and says why nothing can run."""
    environment = {"PYTHONPATH": str(compiled.folder), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", WITHOUT_DEVICE], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    problem, error = ran.stdout.splitlines()
    assert problem.startswith("no CUDA device can be used: ")
    assert error == problem


def test_the_driver_is_not_linked(compiled):
    (module,) = compiled.folder.glob("_cuda.*.so")
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libcud" not in needed


REPORT = """
ptxas info    : Compiling entry function '_ZN3tpk3_GL18rnn_forward_kernelILi32ELi4EEEvNS_17RecurrenceForwardIfEE' for 'sm_90a'
ptxas info    : Function properties for _ZN3tpk3_GL18rnn_forward_kernelILi32ELi4EEEvNS_17RecurrenceForwardIfEE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 10.0 ms
ptxas info    : Compiling entry function '_ZN3tpk3_GL19rnn_backward_kernelILi128ELi1ELb0ELb1EEEvNS_18RecurrenceBackwardIffEE' for 'sm_80'
ptxas info    : Function properties for x
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers, 544 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN3tpk3_GL22rnn_forward_mma_kernelINS_8bfloat16ELi1ELi256EEEvNS_17RecurrenceForwardIT_EE' for 'sm_80'
ptxas info    : Function properties for x
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 8192 bytes smem
ptxas info    : Compiling entry function '_ZN3tpk3_GL22rnn_forward_mma_kernelIfLi2ELi64EEEvNS_17RecurrenceForwardIT_EE' for 'sm_80'
ptxas info    : Function properties for x
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 8192 bytes smem
ptxas info    : Compiling entry function '_ZN3tpk3_GL24regularized_solve_kernelIdLi32EEEvNS_20RegularizedSolveCudaIT_EENS0_6LayoutIS3_EE' for 'sm_80'
ptxas info    : Function properties for x
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 60 registers, used 1 barriers, 544 bytes cmem[0]
"""  # noqa: E501


def test_reports_are_understood():
    """A spill would be seen."""
    assert parse(REPORT) == {
        "sm_80": {
            "regularized_solve_kernel<float64, 32>": {"registers": 60, "shared": 0, "local": 0},
            "rnn_backward_kernel<128, 1, 0, 1>": {"registers": 30, "shared": 0, "local": 0},
            "rnn_forward_mma_kernel<bfloat16, 1, 256>": {"registers": 31, "shared": 8192, "local": 0},
            "rnn_forward_mma_kernel<float32, 2, 64>": {"registers": 32, "shared": 8192, "local": 0},
        },
        "sm_90a": {"rnn_forward_kernel<32, 4>": {"registers": 40, "shared": 1024, "local": 24}},
    }


def test_emulation():
    """Races, barriers and shuffles that some threads skip, shared memory read before it is written; in a cluster also
    stores into blocks that are not there yet or no more; and what products on tensor cores are made of.
    """
    try:
        printed = check_emulation()
    except NotBuilt as reason:
        absent("cuda-emulated", str(reason))
    stuck = "emulation: threads wait at a barrier that others never reach"
    assert printed.splitlines() == [
        "race: different, NaN",
        "no race: same, numbers",
        f"divergent barrier: {stuck}",
        f"divergent shuffle: {stuck}",
        "unwritten: same, NaN",
        "cluster race: different, numbers",
        "no cluster race: same, numbers",
        "one buffer: different, numbers",
        "not started: emulation: a store into a block that has not started",
        "ended: emulation: a store into a block that has ended",
        f"divergent cluster: {stuck}",
        "product in bfloat16: exact",
        "product in float16: exact",
        "product in tf32: exact",
        "sums: cut off",
        "split: exact",
        "layout: each word once, no conflicts",
    ]


def test_launching(tmp_path):
    """No context is created on a device that nobody uses. What a kernel is allowed and how many clusters run at once
    are asked for once for each kernel, device, number of blocks and bytes, and not mixed up.
    """
    try:
        printed = check_launching(tmp_path)
    except NotBuilt as reason:
        absent("cuda-emulated", str(reason))
    assert printed.splitlines() == [
        "from 0 unused to 1: then 1, contexts on 1",
        "from 0 to 1: then 0, contexts on 0 1",
        "from 1 to 0: then 1, contexts on 0 1",
        "from 1 to 1: then 1, contexts on 1",
        "shared memory, first launch: DeviceGetAttribute 1 FuncSetAttribute 1 LaunchKernel 1",
        "second launch: LaunchKernel 1",
        "another kernel: DeviceGetAttribute 1 FuncSetAttribute 1 LaunchKernel 1",
        "another device: DeviceGetAttribute 1 FuncSetAttribute 1 LaunchKernel 1",
        "clusters, first launch: FuncSetAttribute 1 LaunchKernelExC 1 OccupancyMaxActiveClusters 1",
        "second launch: LaunchKernelExC 1",
        "more blocks: LaunchKernelExC 1 OccupancyMaxActiveClusters 1",
        "more bytes: LaunchKernelExC 1 OccupancyMaxActiveClusters 1",
        "another kernel: FuncSetAttribute 1 LaunchKernelExC 1 OccupancyMaxActiveClusters 1",
        "another device: DeviceGetAttribute 1 FuncSetAttribute 2 LaunchKernelExC 1 OccupancyMaxActiveClusters 1",
        "at once on 0, of 4 blocks: 25",
        "at once on 0, of 8 blocks: 12",
        "at once on 1, of 4 blocks: 26",
        "at once on 1, of 8 blocks: 13",
    ]
