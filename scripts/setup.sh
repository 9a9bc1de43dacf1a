#!/usr/bin/env bash
# Installs what is missing: scripts/setup.sh build|check|run|test. Does nothing, and needs no root, if all is there.
# build: Rust's linker; check: formatter and lints, too; run: what the demonstration needs; test: all of it and servers.
# Debian 12 and 13, Ubuntu 22.04 and 24.04; elsewhere it says what to install.
set -euo pipefail
cd "$(dirname "$0")/.."
# Where ordinary users do not look: nft, ip, sshd, nginx; and cargo where rustup puts it.
PATH="$HOME/.cargo/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"

# Services that come with packages for tests, and that must not start or stay enabled because of a test.
readonly services=(redis-server.service nginx.service ssh.service ssh.socket)

die() {
    echo "setup: $*" >&2
    exit 1
}

# Packages that are missing, one a line, for a list of COMMAND=PACKAGE.
missing_packages() {
    local need
    for need in "$@"; do
        command -v "${need%%=*}" >/dev/null 2>&1 || echo "${need#*=}"
    done
}

# A C compiler may be there without the files every program starts with.
missing_linker() {
    command -v cc >/dev/null 2>&1 || echo gcc
    if ! command -v cc >/dev/null 2>&1 || [ ! -e "$(cc -print-file-name=Scrt1.o)" ]; then
        echo libc6-dev
    fi
}

needs_of() {
    case "$1" in
    build | check) missing_linker ;;
    run) missing_packages nft=nftables ip=iproute2 ping=iputils-ping unshare=util-linux nsenter=util-linux ;;
    test)
        needs_of build
        needs_of run
        missing_packages make=make redis-server=redis-server nginx=nginx sshd=openssh-server ssh=openssh-client \
            sshpass=sshpass ps=procps curl=curl
        ;;
    *) die "write: scripts/setup.sh build, check, run or test" ;;
    esac
}

check_rust() {
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    if ! command -v cargo >/dev/null 2>&1; then
        die "Rust $wanted or newer is needed and cargo is not there; get it from https://rustup.rs (or, where" \
            "apt has it: apt-get install rustup && rustup default stable)"
    fi
    # The newest word on the rustc line: rustc 1.88.0 (...)
    have=$(rustc --version | awk '{ print $2 }')
    if [ "$(printf '%s\n' "$wanted" "${have%%-*}" | sort -V | head -n 1)" != "$wanted" ]; then
        die "Rust $wanted or newer is needed, here is $have; update it (rustup update), or get it from https://rustup.rs"
    fi
}

check_rust_tools() {
    local missing=()
    cargo fmt --version >/dev/null 2>&1 || missing+=(rustfmt)
    cargo clippy --version >/dev/null 2>&1 || missing+=(clippy)
    [ ${#missing[@]} -eq 0 ] && return
    command -v rustup >/dev/null 2>&1 || die "cargo lacks ${missing[*]}; install the distribution's package for it"
    echo "setup: rustup component add ${missing[*]}"
    rustup component add "${missing[@]}"
}

as_root=()
become_root() {
    [ "$(id -u)" -eq 0 ] && return
    command -v sudo >/dev/null 2>&1 || die "not root and no sudo; as root: apt-get install $*"
    as_root=(sudo)
    [ -t 0 ] || as_root=(sudo -n)
}

apt_get() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 "$@"
}

# Maintainer scripts ask this file whether they may start what they install.
readonly policy=/usr/sbin/policy-rc.d
own_policy=no
forbid_starting() {
    [ -e "$policy" ] && return
    local file
    file=$(mktemp)
    printf '#!/bin/sh\n# Put here by a set-up script for as long as it runs: services are installed, not started.\nexit 101\n' >"$file"
    "${as_root[@]}" install -m 0755 "$file" "$policy"
    rm -f "$file"
    own_policy=yes
}
allow_starting() {
    [ "$own_policy" = no ] || "${as_root[@]}" rm -f "$policy"
    own_policy=no
}

known_services() {
    command -v systemctl >/dev/null 2>&1 || return 0
    systemctl list-unit-files --no-legend --no-pager "${services[@]}" 2>/dev/null | awk '{ print $1 }' || true
}

disable_new_services() {
    local before=$1 unit
    for unit in $(known_services); do
        grep -qx -- "$unit" <<<"$before" && continue
        echo "setup: $unit came with a package; it is not started and not enabled"
        "${as_root[@]}" systemctl --quiet disable "$unit" 2>/dev/null || true
    done
}

install_packages() {
    become_root "$@"
    command -v apt-get >/dev/null 2>&1 || die "this system has no apt; install by hand what Debian calls: $*"
    local before
    before=$(known_services)
    trap allow_starting EXIT
    forbid_starting
    echo "setup: apt-get install $*"
    if ! apt-cache show "$@" >/dev/null 2>&1; then
        apt_get update
    fi
    if ! apt_get install -y --no-install-recommends "$@"; then
        echo "setup: once more, with fresh lists of packages"
        apt_get update
        apt_get install -y --no-install-recommends "$@" || die "apt-get could not install: $*"
    fi
    allow_starting
    disable_new_services "$before"
}

purpose=${1:-run}
[ "$purpose" = run ] || check_rust
[ "$purpose" != check ] || check_rust_tools
wanted=$(needs_of "$purpose" | sort -u)
[ -z "$wanted" ] && exit 0
mapfile -t packages <<<"$wanted"
install_packages "${packages[@]}"
still=$(needs_of "$purpose" | sort -u | tr '\n' ' ')
[ -z "$still" ] || die "installed, and yet something of these is missing: $still"
