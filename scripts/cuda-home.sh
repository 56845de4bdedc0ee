#!/usr/bin/env bash
# Finds a CUDA toolkit that compiles the kernels, or puts one together.
#
#   usage: cuda-home.sh [DIRECTORY]
#
# An installed toolkit is taken if it is new enough: $CUDA_HOME, the nvcc on the PATH, /usr/local/cuda.
# Otherwise the compiler of CUDA 13.0 is unpacked from Python packages (about 220 MB, nothing is
# imported) into DIRECTORY, by default ~/.cache/qwen-server/cuda-13.0. That needs no GPU, no driver and
# no root. A second run does nothing; an interrupted one goes on where it stopped.
# The last line on standard output is the toolkit's path, for CUDA_HOME.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ensure.sh
. "$here/ensure.sh"

# 13.0 is what drivers from 580 on can run; PTX of a newer one they refuse.
pins=(
    nvidia-cuda-nvcc==13.0.88    # bin: nvcc, ptxas, fatbinary, cudafe++
    nvidia-nvvm==13.0.88         # nvvm: cicc, libdevice
    nvidia-cuda-crt==13.0.88     # include/crt
    nvidia-cuda-runtime==13.0.96 # cuda_runtime.h and what it includes
    nvidia-cuda-cccl==13.0.85    # headers that those include
)
# The first toolkit that is known to compile every kernel.
oldest=12.4

# version_of NVCC: its release, such as 13.0.
version_of() { "$1" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p'; }

is_new_enough() {
    local version
    version=$(version_of "$1")
    [ -n "$version" ] && [ "$(printf '%s\n%s\n' "$oldest" "$version" | sort -V | head -n 1)" = "$oldest" ]
}

# A program of whose source nvcc compiles the host's part, too.
ensure_host_compiler() {
    command -v "${CXX:-g++}" >/dev/null 2>&1 && return
    apt_install g++ || die "a C++ compiler is needed. On Debian or Ubuntu: sudo apt-get install g++"
}

# Compiles an empty kernel: what is incomplete shows here, and not in the middle of a build.
works() {
    local scratch code=0
    scratch=$(mktemp -d)
    echo 'extern "C" __global__ void nothing() {}' >"$scratch/nothing.cu"
    "$1/bin/nvcc" -cubin -arch=sm_90a -o "$scratch/nothing.cubin" "$scratch/nothing.cu" >&2 || code=1
    rm -rf "$scratch"
    return "$code"
}

installed_toolkit() {
    local nvcc
    for nvcc in "${CUDA_HOME:-/nonexistent}/bin/nvcc" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
        if [ -x "$nvcc" ] && is_new_enough "$nvcc"; then
            nvcc=$(readlink -f "$nvcc")
            dirname "$(dirname "$nvcc")"
            return
        fi
    done
    return 1
}

# Unpacks one package unless it is there.
unpack() {
    local pin=$1 place=$partial/${1%%==*}
    [ -e "$place.done" ] && return
    say "$pin"
    rm -rf "$place"
    "${pip[@]}" install --quiet --no-deps --no-compile --only-binary=:all: \
        --disable-pip-version-check --root-user-action=ignore --target "$place" "$pin" >&2
    touch "$place.done"
}

find_pip() {
    if python3 -m pip --version >/dev/null 2>&1; then
        pip=(python3 -m pip)
        return
    fi
    ensure_python_venv
    python3 -m venv "$partial/venv"
    pip=("$partial/venv/bin/python" -m pip)
}

# Every package unpacks below nvidia/cu13: together they are a toolkit.
put_together() {
    local pin name toolkit=$partial/toolkit
    mkdir -p "$partial"
    find_pip
    for pin in "${pins[@]}"; do unpack "$pin"; done
    rm -rf "$toolkit" && mkdir "$toolkit"
    for pin in "${pins[@]}"; do
        name=${pin%%==*}
        [ -d "$partial/$name/nvidia/cu13" ] || die "$pin has another layout than expected"
        cp -a "$partial/$name/nvidia/cu13/." "$toolkit/"
    done
    # Libraries are for programs that link to CUDA; ours opens the driver when it runs.
    rm -rf "$toolkit/lib" "$toolkit/.metadata"
    works "$toolkit" || die "the toolkit in $toolkit does not compile"
    printf '%s\n' "${pins[@]}" >"$toolkit/.pins"
    rm -rf "$home" && mv "$toolkit" "$home" && rm -rf "$partial"
}

ensure_host_compiler
if home=$(installed_toolkit) && works "$home"; then
    say "CUDA $(version_of "$home/bin/nvcc") is installed"
    echo "$home"
    exit
fi
home=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/qwen-server/cuda-13.0}
partial=$home.partial
mkdir -p "$(dirname "$home")"
# Two builds at once must not unpack to one place.
if command -v flock >/dev/null 2>&1; then
    exec 9>"$home.lock"
    flock 9
fi
if [ -x "$home/bin/nvcc" ] && cmp -s "$home/.pins" <(printf '%s\n' "${pins[@]}"); then
    say "$home is up to date"
else
    say "no CUDA $oldest or later here: unpacking the compiler of CUDA 13.0 to $home"
    put_together
fi
echo "$home"
