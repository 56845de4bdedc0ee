# Sourced by the other scripts: says what it does, and installs what a bare Debian or Ubuntu lacks.
# shellcheck shell=bash

say() { printf '==> %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# apt_install PACKAGE...: installs them where that is possible without asking anyone.
apt_install() {
    command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" -eq 0 ] || return 1
    say "installing with apt-get: $*"
    apt-get update -qq >&2 </dev/null || say "apt-get update failed, trying with the lists at hand"
    DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >&2 </dev/null
}

ensure_c_compiler() {
    command -v cc >/dev/null 2>&1 && return
    apt_install build-essential ||
        die "a C compiler is needed. Install one, on Debian or Ubuntu: sudo apt-get install build-essential"
}

ensure_cargo() {
    [ -f "${CARGO_HOME:-$HOME/.cargo}/env" ] && . "${CARGO_HOME:-$HOME/.cargo}/env"
    command -v cargo >/dev/null 2>&1 && return
    say "cargo is missing, installing Rust"
    if apt_install rustup; then
        rustup default stable >&2 && command -v cargo >/dev/null 2>&1 && return
    fi
    apt_install cargo rustc && return
    die "Rust is needed: install it with rustup, or with your distribution's packages"
}

# A Python that can make virtual environments.
ensure_python_venv() {
    python3 -c 'import ensurepip, venv' >/dev/null 2>&1 && return
    apt_install python3 python3-venv && python3 -c 'import ensurepip, venv' >/dev/null 2>&1 && return
    die "Python with venv is needed. On Debian or Ubuntu: sudo apt-get install python3 python3-venv"
}

# Where cargo puts what it builds: CARGO_TARGET_DIR, the configuration, or target/.
cargo_target_dir() {
    local metadata directory
    metadata=$(cargo metadata --no-deps --format-version 1 2>/dev/null || true)
    directory=$(printf '%s' "$metadata" | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
    printf '%s\n' "${directory:-${CARGO_TARGET_DIR:-target}}"
}
