#!/usr/bin/env bash
# Does this library work on your GPU, and how fast? In two calls, since time on a GPU may be short:
#
#     scripts/gpu_check.sh prebuild   # needs no GPU: builds for the Python of the machine that has one; says what to copy
#     scripts/gpu_check.sh first      # 150 seconds at most: which paths work, a few hundred tests, the first times
#     scripts/gpu_check.sh full       # 450 seconds at most: all tests, times, the map, the sanitizer, CUDA graphs
#     scripts/gpu_check.sh first --device cpu   # whether the script itself works, where there is no GPU
#
# Every path is a process of its own, with a time limit: a fault or a hang takes down that path only. Results are JSON
# files, a log for each stage and summary.txt, the table that is printed last, under $OUT (benchmarks/results/gpu_ and the
# date if it is not set) in a folder named like the call. The exit status is 0 if every stage passed.
#
# PYTHON is the Python to use: the active one, with a CUDA build of torch, triton and pytest; for prebuild python3.12.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "gpu_check.sh: $1; usage: scripts/gpu_check.sh prebuild|first|full [--device cuda|cpu]" >&2
    exit 2
}

call=${1:-}
device=cuda
case $call in
prebuild | first | full) shift ;;
'') usage "what to do is missing" ;;
*) usage "prebuild, first and full are there, got '$call'" ;;
esac
if [[ ${1:-} == --device ]]; then
    device=${2:-}
    [[ $device == cuda || $device == cpu ]] || usage "--device must be cuda or cpu, got '$device'"
    shift 2
fi
[[ $# == 0 ]] || usage "got '$1', which means nothing here"

stamp=build/gpu_sources.sha256 # of what the native modules beside it were built from

sources() {
    find csrc CMakeLists.txt setup.py -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

# Both native modules, for the H100 and H200 if CUDAARCHS says nothing else: all architectures take four times as long.
build() {
    TPK_CUDA=1 CUDAARCHS=${CUDAARCHS:-90a-real} "$python" setup.py -q build_ext --inplace && sources >"$stamp"
}

# The modules include nothing of torch's: they are built and imported without it.
prebuild() {
    local base=${PYTHON:-python3.12} venv=build/gpu_venv suffix module
    "$base" -c 'import venv' || usage "prebuild needs the Python of the machine that has the GPU, and '$base' does not run"
    "$base" -m venv "$venv" && "$venv/bin/python" -m pip install -q setuptools wheel pybind11 cmake ninja || exit 1
    PATH=$PWD/$venv/bin:$PATH python=$venv/bin/python
    build || exit 1
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    for module in _cpu _cuda; do
        (cd tp_kernels && "../$python" -c "import $module; print(f'$module: {$module.build_info()}')") || exit 1
    done
    echo "copy these along with the repository:"
    printf '%s\n' "tp_kernels/_cpu$suffix" "tp_kernels/_cuda$suffix" "$stamp"
}

if [[ $call == prebuild ]]; then
    prebuild
    exit
fi

python=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # it need not be installed
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH # cmake and ninja come with it
if [[ $device == cuda ]] && ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: there is no CUDA device that the torch of $python can use;" \
        "'--device cpu' tries the script itself without one" >&2
    exit 1
fi

out=${OUT:-benchmarks/results/gpu_$(date +%Y-%m-%d)}/$call
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
printf '%-16s %-9s %6s  %-24s %s\n' stage result time log "last line" >"$summary"
failures=0
case $call in
first) all=150 ;; # seconds
full) all=450 ;;
esac

line() { printf '%-16s %-9s %5ss  %-24s %.90s\n' "$@" >>"$summary"; }

skip() { line "$1" skipped 0 - "$2"; }

begun=()

# begin NAME SECONDS COMMAND...: runs it beside what was begun before, for so many seconds at most, into NAME.log.
begin() {
    local name=$1 limit=$2
    shift 2
    if ((limit > all - SECONDS)); then
        limit=$((all - SECONDS))
    fi
    if ((limit <= 0)); then
        line "$name" "left out" 0 - "the $all seconds of this call are used up"
        failures=$((failures + 1))
        return
    fi
    echo "== $name"
    begun+=("$name")
    (
        start=$SECONDS
        timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
        echo "$? $((SECONDS - start))" >"$out/$name.status"
    ) &
}

# Waits for all that was begun, and writes a line of the table for each.
finish() {
    local name status seconds result
    wait
    for name in "${begun[@]}"; do
        read -r status seconds <"$out/$name.status"
        rm "$out/$name.status"
        case $status in
        0) result=ok ;;
        124 | 137) result="timed out" ;;
        *) result=failed ;;
        esac
        if [[ $result != ok ]]; then
            failures=$((failures + 1))
            echo "-- $name $result:"
            tail -n 15 "$out/$name.log"
        fi
        line "$name" "$result" "$seconds" "$name.log" "$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1)"
    done
    begun=()
}

stage() {
    begin "$@"
    finish
}

smoke=("$python" scripts/gpu_smoke.py)
times=("$python" scripts/gpu_times.py)
map=("$python" -m tp_kernels.regimes map --no-memory --step-limit 3)
if [[ $device == cpu ]]; then
    suffix=(--device cpu --backend reference)
    contenders=(cpu torch)
    times+=(--device cpu --T 8,4 --N 16 --B 2)
    map+=(--device cpu --T 8 --N 8 --B 2 --seconds 0.1)
else
    suffix=()
    contenders=(cuda triton torch)
    map+=(--device cuda)
    export NVIDIA_TF32_OVERRIDE=0 # float32 is float32, for cuDNN as well
    export TPK_REQUIRE_BACKENDS=reference,triton,cuda
fi

# Triton compiles nearly every case anew: several at a time, with pytest-xdist where it is there.
workers() {
    if "$python" -c 'import xdist' &>/dev/null; then
        echo "-n $1 --dist worksteal"
    fi
}

paths() {
    for path in "$@"; do
        begin "$path" "$seconds" "${smoke[@]}" "$path" "${suffix[@]}" --out "$out/$path.json"
    done
}

# measure SECONDS FLAGS...: each contender by itself, alone on the GPU.
measure() {
    local limit=$1 contender
    shift
    for contender in "${contenders[@]}"; do
        stage "times-$contender" "$limit" "${times[@]}" --contenders "$contender" --seconds $((limit - 8)) \
            --out "$out/times-$contender.json" "$@"
    done
}

on_gpu() { [[ $device == cuda ]]; }

cuda_tests=(tests/ops/test_*_cuda*.py tests/ops/test_*_chain.py)
all_tests=("${cuda_tests[@]}" tests/ops/test_*_triton.py tests/ops/test_*_products.py)

if on_gpu; then
    if [[ ! -f $stamp || $(<"$stamp") != "$(sources)" ]] ||
        ! "$python" -c 'import torch, tp_kernels._cpu, tp_kernels._cuda' &>/dev/null; then
        export -f build sources
        export python stamp
        rm -f "$stamp"
        stage build 100 bash -c build
    fi
    stage nvidia-smi 10 nvidia-smi
fi
stage info 20 "$python" -m tp_kernels.info

if [[ $call == first ]]; then
    seconds=60 paths cuda cluster chain triton inverse
    if on_gpu; then
        # shellcheck disable=SC2046
        begin tests 60 "$python" -m pytest $(workers 8) "${cuda_tests[@]}" -q --maxfail=20 \
            -k "test_forward or test_layouts" --junit-xml="$out/tests.xml"
    else
        skip tests "they run on a GPU, and in the emulation, which CI does"
    fi
    finish
    if on_gpu; then
        measure 22 --N 128,256 --B 16
    else
        measure 22
    fi
else
    if on_gpu; then
        # shellcheck disable=SC2046
        stage tests 120 "$python" -m pytest $(workers 15) "${all_tests[@]}" -q --junit-xml="$out/tests.xml"
        measure 25 --N 128,256,64,512,100 --B 16,1,128
        # Two lengths: the cost of a pass and that of a step. Widths on either side of where cuDNN changes its algorithm.
        grid=(--T 112,784 --B 1,16,128,1024 --seconds 1)
        stage map-cuda 50 "${map[@]}" "${grid[@]}" --N 64,128,256,257,384,385 --backend cuda \
            --contenders tp,tp-local,bp,nn.RNN --out "$out/map-cuda"
        stage map-triton 25 "${map[@]}" "${grid[@]}" --N 64,128 --backend triton --contenders tp,bp \
            --out "$out/map-triton"
        stage inverse 20 "$python" scripts/gpu_inverse.py "$out/inverse.json"
        if command -v compute-sanitizer >/dev/null; then
            # The caching allocator hides what is read or written beyond a tensor; some calls that fail are only
            # questions. Of this library's kernels only: its namespace.
            sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1
                --report-api-errors no --kernel-name kernel_substring=3tpk)
            few="T3-B5-H3-N17 or T3-B3-N129 or T3-B1001-N100 and weight-total" # on threads, a cluster, tensor cores
            begin memcheck 70 "${sanitizer[@]}" "$python" -m pytest -q "${cuda_tests[@]}" \
                -k "(test_forward or test_backward) and ($few or T5-B7-N33 or 33 and 0.25) and not layer"
            begin racecheck 70 "${sanitizer[@]}" --tool racecheck "$python" -m pytest -q "${cuda_tests[@]}" \
                -k "(test_forward or test_backward) and ($few or 17 and 0.25) and not layer"
            finish
        else
            skip memcheck "compute-sanitizer is not installed; it comes with the CUDA toolkit"
            skip racecheck "compute-sanitizer is not installed; it comes with the CUDA toolkit"
        fi
    else
        skip tests "they run on a GPU, and in the emulation, which CI does"
        measure 25
        stage map 60 "${map[@]}" --contenders tp,bp,nn.RNN --out "$out/map"
        skip inverse "it compares kernels for a GPU"
    fi
    # Last: what goes wrong in a recording is beyond repair for its process, and perhaps for more.
    seconds=45 paths graphs-cuda graphs-cluster graphs-chain graphs-triton
    if on_gpu; then
        seconds=45 paths graphs-compile
    else
        skip graphs-compile "torch.compile records nothing on a CPU"
    fi
    finish
fi

echo
for folder in "$out"/map*/; do
    if [[ -f $folder/ratios.md ]]; then
        printf '%s: time of TP over that of each\n' "$(basename "$folder")" && cat "$folder/ratios.md" && echo
    fi
done
cat "$summary"
echo "logs and results: $out"
exit $((failures > 0))
