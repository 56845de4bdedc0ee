#!/usr/bin/env bash
# Compiles every kernel for every architecture and shows what each function takes of a multiprocessor.
# Fails if one does not compile, or if a hot one spills registers to memory. Needs nvcc, see cuda-home.sh,
# and no GPU.
#
#   usage: check-kernels.sh [FILE.cu...]     default: all of kernels/
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
# shellcheck source=scripts/ensure.sh
. "$here/ensure.sh"

architectures=(80 90a)
# Families in which a spill costs speed in every step.
hot='^kernels/(attention|norm|quant|sample)/'

if [ "${1:-}" = --compile ]; then
    # One file for one architecture; called below, several at a time.
    architecture=${3##*.}
    exec "$NVCC" -cubin -O3 -std=c++17 --expt-relaxed-constexpr -Xptxas -v -I kernels/include \
        "-gencode=arch=compute_$architecture,code=sm_$architecture" -o "$3.cubin" "$2" >"$3.log" 2>&1
fi

if [ -z "${NVCC:-}" ]; then NVCC=$("$here/cuda-home.sh" | tail -n 1)/bin/nvcc; fi
export NVCC
if [ $# -gt 0 ]; then files=("$@"); else
    files=()
    while IFS= read -r file; do files+=("$file"); done < <(find kernels -name '*.cu' | sort)
fi
[ ${#files[@]} -gt 0 ] || die "there are no kernels"

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
say "compiling ${#files[@]} files for ${#architectures[@]} architectures"
for architecture in "${architectures[@]}"; do
    for file in "${files[@]}"; do
        printf '%s\0%s\0' "$file" "$logs/$(basename "$file" .cu).$architecture"
    done
done | xargs -0 -n 2 -P "$(nproc)" bash "$here/check-kernels.sh" --compile || failed=yes

# Lines of ptxas: "Compiling entry function 'NAME' for 'sm_80'", "Function properties for NAME",
# "N bytes stack frame, N bytes spill stores, N bytes spill loads", "Used N registers, ..., N bytes smem".
table() {
    local file architecture
    for file in "${files[@]}"; do
        for architecture in "${architectures[@]}"; do
            awk -v file="$file" -v architecture="$architecture" '
                function number_before(word, i) {
                    for (i = 2; i <= NF; i++) if (index($i, word) == 1) return $(i - 1)
                    return 0
                }
                /Compiling entry function/ { split($0, quoted, "\047"); name = quoted[2] }
                /Function properties for/ { part = $NF }
                /bytes stack frame/ {
                    spills = $5 + $9
                    stack = $1
                    if (part != name) print file, part, architecture, "-", spills, stack, 0
                }
                /Used [0-9]+ registers/ {
                    shared = 0
                    for (i = 3; i <= NF; i++) if (index($i, "smem") == 1) shared = $(i - 2)
                    print file, name, architecture, number_before("registers"), spills, stack, shared
                }' "$logs/$(basename "$file" .cu).$architecture.log"
        done
    done
}

# One line for each function, the architectures beside each other.
table | awk -v hot="$hot" -v num="${#architectures[@]}" '
    {
        key = $1 " " $2
        if (!(key in seen)) { seen[key] = ++count; keys[count] = key }
        for (i = 4; i <= 7; i++) cell[key, i] = cell[key, i] (cell[key, i] == "" ? "" : "/") $i
        if ($5 > 0 && $1 ~ hot) bad[key] = 1
        else if ($5 > 0) spilling[key] = 1
    }
    END {
        printf "%-34s %-44s %9s %9s %9s %12s\n", "file", "function", "registers", "spills", "stack", "shared"
        for (i = 1; i <= count; i++) {
            key = keys[i]
            split(key, part, " ")
            sub("kernels/", "", part[1])
            mark = key in bad ? "  <- spills" : key in spilling ? "  (spills)" : ""
            printf "%-34s %-44s %9s %9s %9s %12s%s\n", part[1], part[2], cell[key, 4], cell[key, 5], \
                cell[key, 6], cell[key, 7], mark
            num_bad += key in bad
        }
        printf "%d functions; registers a thread, the rest in bytes; for each architecture\n", count
        if (num_bad) { printf "%d hot functions spill\n", num_bad; exit 1 }
    }' || failed=yes

# What the compilers say beside the numbers.
for log in "$logs"/*.log; do
    if grep -vE '^ptxas info|^ *[0-9]+ bytes stack frame|^$' "$log"; then
        grep -qiE 'error|fatal' "$log" && failed=yes
    fi
done >&2
[ -z "${failed:-}" ] || die "the kernels are not as they should be"
