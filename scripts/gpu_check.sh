#!/usr/bin/env bash
# Does this library work on your GPU, and how fast? Builds it, runs every test that needs a GPU, the sanitizer and the
# benchmarks, in one call of under nine minutes; the CUDA kernels come last, where there is nvcc:
#
#     scripts/gpu_check.sh                  # with the Python that is active: a CUDA build of torch, triton, pytest
#     PYTHON=.venv/bin/python OUT=/tmp/out scripts/gpu_check.sh
#
# Everything is written under $OUT (./gpu_out if it is not set): a log for each stage, JSON results, and summary.txt, the
# table that is printed last. The exit status is 0 if every stage passed; one that cannot run here says why.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-./gpu_out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
printf '%-14s %-8s %6s  %s\n' stage result time "last line" >"$summary"
failures=0
all=530 # seconds

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

stage build 180 "$python" setup.py build_ext --inplace
stage info 20 "$python" -m tp_kernels.info

if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    stage nvidia-smi 5 nvidia-smi
    export TPK_REQUIRE_BACKENDS=reference,triton
    stage tests 240 "$python" -m pytest tests/ops/test_*_triton.py tests/ops/test_*_library.py \
        -q --junit-xml="$out/tests.xml"
    if command -v compute-sanitizer >/dev/null; then
        stage sanitizer 45 compute-sanitizer --error-exitcode 1 "$python" -m pytest -q tests/ops/test_*_triton.py \
            -k "(test_forward or test_backward) and (T4-B17 or T3-B18 or 33 and 0.25) and not layer"
    else
        skip sanitizer "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    fi
    # In float32 all contenders are held to float32, cuDNN as well.
    export NVIDIA_TF32_OVERRIDE=0
    map=("$python" -m tp_kernels.regimes map --device cuda --seconds 3 --no-memory --step-limit 3)
    stage bench 60 "${map[@]}" --T 784 --N 64,128 --B 16,512 --contenders tp,tp-local,tp-jacobian,bp,nn.RNN,eager --out "$out/float32"
    stage bench-bf16 30 "${map[@]}" --T 784 --N 128,256 --B 16,512 --dtype bfloat16 --contenders tp,bp,nn.RNN --out "$out/bf16"
    stage bench-inverse 20 "$python" scripts/gpu_inverse.py "$out/inverse.json"
    stage bench-compile 30 "${map[@]}" --T 64 --N 64 --B 16 --contenders tp,bp,nn.RNN,eager,compile --out "$out/compile"
    # Last, so that a CUDA module that does not build stands in nobody's way.
    if command -v nvcc >/dev/null; then
        stage cuda-build 200 env TPK_CUDA=1 "$python" setup.py build_ext --inplace
    else
        skip cuda-build "there is no nvcc"
    fi
    if "$python" -c 'import torch, tp_kernels._cuda' 2>/dev/null; then
        export TPK_REQUIRE_BACKENDS=reference,cuda
        map+=(--backend cuda)
        cuda_tests=(tests/ops/test_*_cuda*.py tests/ops/test_rnn_library_chain.py)
        stage cuda-tests 150 "$python" -m pytest "${cuda_tests[@]}" -q --junit-xml="$out/cuda-tests.xml"
        stage cuda-bench 40 "${map[@]}" --T 784 --N 64,128,256,512 --B 16 --contenders tp,bp,nn.RNN --out "$out/cuda"
        stage cuda-inverse 20 "$python" scripts/gpu_inverse.py "$out/inverse.json"
        stage cuda-bf16 20 "${map[@]}" --T 784 --N 128,256 --B 16,512 --dtype bfloat16 --contenders tp,bp,nn.RNN \
            --out "$out/cuda-bf16"
        if command -v compute-sanitizer >/dev/null; then
            stage cuda-sanitizer 60 compute-sanitizer --error-exitcode 1 "$python" -m pytest -q "${cuda_tests[@]}" \
                -k "(test_forward or test_backward) and (T5-B7 or T3-B5-H3 or T3-B3-N129 or 33) and not layer"
            stage cuda-races 60 compute-sanitizer --tool racecheck --error-exitcode 1 "$python" -m pytest -q \
                "${cuda_tests[@]}" -k "(test_forward or test_backward) and (T3-B5-H3 or T3-B3-N129) and not layer"
        fi
    else
        skip cuda-tests "there is no module tp_kernels._cuda"
    fi
else
    for name in nvidia-smi tests sanitizer bench bench-bf16 bench-inverse bench-compile cuda-build cuda-tests; do
        skip "$name" "no CUDA device that this torch can use"
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
