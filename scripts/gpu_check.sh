#!/usr/bin/env bash
# Does this library work on your GPU, and how fast? Builds it, runs every test that needs a GPU, the sanitizer and the
# benchmarks, in one call of under nine minutes; the CUDA kernels come last, where there is nvcc:
#
#     scripts/gpu_check.sh                  # with the Python that is active: a CUDA build of torch, triton, pytest
#     scripts/gpu_check.sh triton           # one half of it, with all of the time; the other is called cuda
#     PYTHON=.venv/bin/python OUT=/tmp/out scripts/gpu_check.sh
#
# Everything is written under $OUT (./gpu_out if it is not set): a log for each stage, JSON results, and summary.txt, the
# table that is printed last. The exit status is 0 if every stage passed; one that cannot run here says why.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # it need not be installed
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH # cmake and ninja come with it
parts=${*:-triton cuda}
for part in $parts; do
    if [[ $part != triton && $part != cuda ]]; then
        echo "gpu_check.sh: the halves are triton and cuda, got '$part'" >&2
        exit 2
    fi
done
out=${OUT:-./gpu_out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
printf '%-14s %-8s %6s  %s\n' stage result time "last line" >"$summary"
failures=0
all=530 # seconds

wanted() { [[ " $parts " == *" $1 "* ]]; }

line() { printf '%-14s %-8s %5ss  %.90s\n' "$@" >>"$summary"; }

skip() { line "$1" skipped 0 "$2"; }

# stage NAME SECONDS COMMAND...: runs it for so many seconds at most, and writes NAME.log and a line of the table.
stage() {
    local name=$1 limit=$2 start=$SECONDS status result=passed
    shift 2
    if ((limit > all - SECONDS)); then
        limit=$((all - SECONDS))
    fi
    if ((limit <= 0)); then
        skip "$name" "the $all seconds of this call are used up"
        failures=$((failures + 1))
        return
    fi
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    if ((status == 124 || status == 137)); then
        result=TIMEOUT
    elif ((status != 0)); then
        result=FAILED
    fi
    if [[ $result != passed ]]; then
        failures=$((failures + 1))
        tail -n 15 "$out/$name.log"
    fi
    line "$name" "$result" $((SECONDS - start)) "$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1)"
}

# Triton compiles nearly every case anew, a second or two each: several at a time, with pytest-xdist where it is there.
workers=()
if "$python" -c 'import xdist' &>/dev/null; then
    workers=(-n 8)
fi
# The caching allocator hides what is read or written beyond a tensor; some calls that fail are only questions.
sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --report-api-errors no)

check_triton() {
    export TPK_REQUIRE_BACKENDS=reference,triton
    stage tests 240 "$python" -m pytest "${workers[@]}" tests/ops/test_*_triton.py tests/ops/test_*_products.py \
        -q --junit-xml="$out/tests.xml"
    if command -v compute-sanitizer >/dev/null; then
        stage sanitizer 60 "${sanitizer[@]}" "$python" -m pytest -q tests/ops/test_*_triton.py \
            -k "(test_forward or test_backward) and (T4-B17 or T3-B18 or 33 and 0.25) and not layer"
    else
        skip sanitizer "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    fi
    stage bench 60 "${map[@]}" --T 784 --N 64,128 --B 16,512 --contenders tp,tp-local,tp-jacobian,bp,nn.RNN,eager \
        --out "$out/float32"
    stage bench-bf16 30 "${map[@]}" --T 784 --N 128,256 --B 16,512 --dtype bfloat16 --contenders tp,bp,nn.RNN \
        --out "$out/bf16"
    stage bench-inverse 20 "$python" scripts/gpu_inverse.py "$out/inverse.json"
    stage bench-compile 30 "${map[@]}" --T 64 --N 64 --B 16 --contenders tp,bp,nn.RNN,eager,compile \
        --out "$out/compile"
}

check_cuda() {
    if command -v nvcc >/dev/null; then
        rm -f tp_kernels/_cuda.*.so
        # For this GPU only: all of them take four times as long.
        stage cuda-build 200 env TPK_CUDA=1 CUDAARCHS="$architecture" "$python" setup.py build_ext --inplace
    else
        skip cuda-build "there is no nvcc"
    fi
    if ! "$python" -c 'import torch, tp_kernels._cuda' 2>/dev/null; then
        skip cuda-tests "there is no module tp_kernels._cuda"
        return
    fi
    export TPK_REQUIRE_BACKENDS=reference,cuda
    map+=(--backend cuda)
    local tests=(tests/ops/test_*_cuda*.py tests/ops/test_rnn_library_chain.py)
    stage cuda-tests 150 "$python" -m pytest "${workers[@]}" "${tests[@]}" -q --junit-xml="$out/cuda-tests.xml"
    stage cuda-bench 40 "${map[@]}" --T 784 --N 64,128,256,512 --B 16 --contenders tp,bp,nn.RNN --out "$out/cuda"
    stage cuda-inverse 20 "$python" scripts/gpu_inverse.py "$out/inverse.json"
    stage cuda-bf16 20 "${map[@]}" --T 784 --N 128,256 --B 16,512 --dtype bfloat16 --contenders tp,bp,nn.RNN \
        --out "$out/cuda-bf16"
    if command -v compute-sanitizer >/dev/null; then
        sanitizer+=(--kernel-name kernel_substring=3tpk) # the namespace, and none of torch's kernels
        local few="T3-B5-H3-N17 or T3-B3-N129 or T3-B1001-N100 and weight-total" # on threads, a cluster, tensor cores
        stage cuda-sanitizer 60 "${sanitizer[@]}" "$python" -m pytest -q "${tests[@]}" \
            -k "(test_forward or test_backward) and ($few or T5-B7-N33 or 33 and 0.25) and not layer"
        stage cuda-races 60 "${sanitizer[@]}" --tool racecheck "$python" -m pytest -q "${tests[@]}" \
            -k "(test_forward or test_backward) and ($few or 17 and 0.25) and not layer"
    else
        skip cuda-sanitizer "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    fi
}

if wanted triton; then # the other half builds all
    stage build 180 "$python" setup.py build_ext --inplace
fi
stage info 20 "$python" -m tp_kernels.info

# The code that this GPU runs of all that is built for a release; empty without a GPU.
architecture=$("$python" -c 'import torch
if torch.cuda.is_available():
    major = torch.cuda.get_device_capability()[0]
    print("90a-real" if major == 9 else f"{major}0-real")')

if [[ -n $architecture ]]; then
    stage nvidia-smi 20 nvidia-smi
    # In float32 all contenders are held to float32, cuDNN as well.
    map=(env NVIDIA_TF32_OVERRIDE=0 "$python" -m tp_kernels.regimes map)
    map+=(--device cuda --seconds 3 --no-memory --step-limit 3)
    if wanted triton; then
        check_triton
    fi
    # Last, so that a CUDA module that does not build stands in nobody's way.
    if wanted cuda; then
        check_cuda
    fi
else
    for part in $parts; do
        skip "$part" "no CUDA device that this torch can use"
    done
fi

echo
for folder in float32 bf16 compile cuda cuda-bf16; do
    if [[ -f $out/$folder/ratios.md ]]; then
        printf '%s\n' "$folder: time of TP over that of each" && cat "$out/$folder/ratios.md" && echo
    fi
done
cat "$summary"
exit $((failures > 0))
