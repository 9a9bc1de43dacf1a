#!/usr/bin/env bash
# Shows band at work: two machines made of network namespaces, an attack, a ban in the kernel, and the way back in.
# Everything lives in one temporary directory and in namespaces that end with this script; the machine itself is not
# touched. Ends with 0 if every step came out as told. At a terminal (or with BAND_DEMO_STAY=1) band stays afterwards.
#
# BAND_DEMO_BIN=DIR uses the binaries in DIR instead of building them.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin" LC_ALL=C

readonly server4=198.51.100.1 server6=2001:db8:1::1
readonly attacker4=198.51.100.66 attacker6=2001:db8:66::66 caller4=203.0.113.68 office4=198.51.100.7
# A condition that has not come true after so many tenths of a second never will.
readonly patience=100

bold='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' plain=$'\e[0m'
fi

# ---------------------------------------------------------------- outside: build, and go into the namespaces

outside() {
    local binaries=${BAND_DEMO_BIN:-}
    scripts/setup.sh run
    if [ -z "$binaries" ]; then
        scripts/setup.sh build
        echo "Building band (the first time takes a few minutes) ..."
        cargo build --release
        binaries=${CARGO_TARGET_DIR:-target}/release
    fi
    binaries=$(cd "$binaries" && pwd)

    local root=() enter=(unshare --net --mount)
    choose_namespaces
    directory=$(mktemp -d "${TMPDIR:-/tmp}/band-demo.XXXXXX")
    trap 'rm -rf -- "$directory"' EXIT
    # Ctrl-C reaches the inner script as well, which tidies up; then it is our turn. If we are ended, it is ended too.
    trap : INT
    chmod 0755 "$directory"
    local code=0
    "${root[@]}" "${enter[@]}" setpriv --pdeathsig TERM -- env NO_COLOR="${NO_COLOR:-}" \
        BAND_DEMO_STAY="${BAND_DEMO_STAY:-}" bash "$PWD/scripts/run.sh" --inside "$directory" "$binaries" || code=$?
    [ ${#root[@]} -eq 0 ] || "${root[@]}" rm -rf -- "$directory"
    exit "$code"
}

# Sets `root` and `enter`: root makes namespaces directly, a user through a user namespace, where that is allowed.
choose_namespaces() {
    if [ "$(id -u)" -eq 0 ] && "${enter[@]}" true 2>/dev/null; then
        return
    fi
    if unshare --user --map-root-user --net --mount true 2>/dev/null; then
        enter=(unshare --user --map-root-user --net --mount)
        return
    fi
    [ "$(id -u)" -ne 0 ] || give_up "this container may not make network namespaces (it needs CAP_SYS_ADMIN)"
    command -v sudo >/dev/null 2>&1 || give_up "users may not make namespaces here and there is no sudo; run it as root"
    echo "This system does not let users make namespaces of their own, so the demonstration asks for sudo."
    root=(sudo)
    [ -t 0 ] || root=(sudo -n)
}

give_up() {
    echo "run: $*" >&2
    exit 1
}

# ---------------------------------------------------------------- inside: tools

say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

# Shows a command as it is typed, and runs it.
show() {
    printf '  %s$ %s%s\n' "$1" "$2" "$plain"
    (eval "${3:-$2}") 2>&1 | sed -e '/^$/d' -e 's/^/    /' || true
}

failed() {
    echo
    echo "run: step $step did not come out as told: $*" >&2
    if [ -s "$directory/band.log" ]; then
        echo "run: the last lines of band's own log:" >&2
        tail -n 15 "$directory/band.log" >&2
    fi
    exit 1
}

step=0
step() {
    step=$((step + 1))
    say "$step. $*"
}

# Waits until a command succeeds; the rest of the words say what is waited for.
until_true() {
    local condition=$1 tries=0
    shift
    until eval "$condition" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt "$patience" ] || failed "waited 10 seconds in vain: $*"
        kill -0 "$band" 2>/dev/null || failed "band has ended"
        sleep 0.1
    done
}

# The kernel's packets decide: one echo request from an address of the attacker's machine.
ping_from() { attacker ping -n -c 1 -W 1 -I "$1" "$2"; }
must_pass() { ping_from "$1" "$2" >/dev/null 2>&1 || failed "a packet from $1 should pass, and it does not"; }
must_not_pass() { if ping_from "$1" "$2" >/dev/null 2>&1; then failed "a packet from $1 should be dropped, and it passes"; fi; }

# Who is banned in the kernel: the table without empty sets, the allowlist and the rules.
bans_in_kernel() {
    nft list table inet band | awk '
        /^\tset / { block = ""; inside = $2 !~ /^allow/; full = 0 }
        inside { block = block $0 "\n" }
        inside && /elements = / { full = 1 }
        inside && /^\t}/ { if (full) printf "%s", block; inside = 0 }'
}

append() { # FILE LINE: as the service would write it
    printf '    %s\n' "$2"
    printf '%s\n' "$2" >>"$directory/log/$1"
}

attack_sshd() { # ADDRESS USER
    append auth.log "$(date '+%b %e %T') server sshd[$((4000 + RANDOM % 999))]: Failed password for invalid user $2 from $1 port $((40000 + RANDOM % 999)) ssh2"
}
attack_nginx() { # ADDRESS PATH
    append access.log "$1 - - [$(date '+%d/%b/%Y:%T %z')] \"GET $2 HTTP/1.1\" 404 153 \"-\" \"Mozilla/5.0 (X11; Linux x86_64)\""
}
attack_asterisk() { # ADDRESS EXTENSION
    append messages.log "[$(date '+%b %e %T')] NOTICE[812] res_pjsip/pjsip_distributor.c: Request 'REGISTER' from '<sip:$2@$server4>' failed for '$1:5070' (callid: $2-$RANDOM) - No matching endpoint found"
}

# ---------------------------------------------------------------- inside: the stage

# Two machines and a cable: this namespace is the server, another one is the attacker's machine.
make_machines() {
    setpriv --pdeathsig KILL -- unshare --net sleep infinity &
    attacker=$!
    local tries=0
    while [ "$(readlink "/proc/$attacker/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt "$patience" ] || failed "a second network namespace does not come into being"
        sleep 0.02
    done
    ip link set lo up
    ip link add cable0 type veth peer name cable1 netns "$attacker"
    ip link set cable0 up
    ip address add $server4/24 dev cable0
    ip address add $server6/64 dev cable0 nodad
    ip route add 203.0.113.0/24 dev cable0
    ip route add 2001:db8:66::/64 dev cable0
    attacker ip link set lo up
    attacker ip link set cable1 up
    attacker ip address add $attacker4/24 dev cable1
    attacker ip address add $office4/24 dev cable1
    attacker ip address add $caller4/24 dev cable1
    attacker ip address add $attacker6/64 dev cable1 nodad
    attacker ip route add 2001:db8:1::/64 dev cable1
}

attacker() { nsenter --target "$attacker" --net -- "$@"; }

write_configuration() {
    mkdir "$directory/log" "$directory/state" "$directory/filters" "$directory/bin"
    touch "$directory/log/auth.log" "$directory/log/access.log" "$directory/log/messages.log"
    cat >"$directory/band.toml" <<TOML
[defaults]
maxretry = 3
findtime = "10m"
bantime  = "2m"

[allow]
networks = ["$office4"]             # your office

[jails.sshd]
logs = ["$directory/log/auth.log"]

[jails.nginx-scan]
logs = ["$directory/log/access.log"]

[jails.asterisk]
logs = ["$directory/log/messages.log"]

[paths]                             # only because this is a demonstration
state   = "$directory/state"
socket  = "$directory/band.sock"
filters = "$directory/filters"
TOML
    printf '#!/bin/sh\nexec nsenter --target %s --net -- "$@"\n' "$attacker" >"$directory/bin/attacker"
    chmod 0755 "$directory/bin/attacker"
}

end_processes() {
    local pid
    for pid in ${watcher:-} ${band:-} ${attacker:-}; do
        kill "$pid" 2>/dev/null || true
    done
    for pid in ${watcher:-} ${band:-} ${attacker:-}; do
        wait "$pid" 2>/dev/null || true
    done
    # Files of another owner are removed by their owner.
    rm -rf -- "${directory:?}"/*
}

# ---------------------------------------------------------------- inside: the story

story() {
    step "band starts on the server, with three jails: sshd, nginx-scan and asterisk."
    setpriv --pdeathsig KILL -- band --config "$directory/band.toml" >"$directory/band.log" 2>&1 &
    band=$!
    until_true 'banctl status' "band answers"
    show server "grep -v '^$' band.toml | head -n 8" "grep -v '^\$' '$directory/band.toml' | head -n 8"
    show server "banctl status"
    setpriv --pdeathsig KILL -- banctl watch >"$directory/watch.txt" 2>&1 &
    watcher=$!
    # It sleeps with a socket in its hand: it has asked, and waits for events.
    until_true "grep -q '^State:.S' /proc/$watcher/status && ls -l /proc/$watcher/fd | grep -q socket:" "banctl watch"

    step "The attacker, $attacker4, reaches the server: nobody is banned yet."
    show attacker "ping -n -c 1 -W 1 $server4" "ping_from $attacker4 $server4"
    must_pass $attacker4 $server4
    must_pass $attacker6 $server6
    must_pass $caller4 $server4

    step "It guesses passwords. These lines appear in auth.log:"
    local user path extension
    for user in admin oracle test; do attack_sshd $attacker4 $user; done
    until_true "nft list table inet band | grep -qF $attacker4" "$attacker4 is in the kernel's set"
    until_true "grep -q 'ban .*$attacker4' '$directory/watch.txt'" "banctl watch shows the ban of $attacker4"
    show server "banctl watch" "cat '$directory/watch.txt'"
    echo "  The kernel holds the ban, with a timeout of its own:"
    show server "nft list table inet band        # the sets in which somebody is banned" bans_in_kernel

    step "The same packet is dropped now, and so are all others from there."
    show attacker "ping -n -c 1 -W 1 $server4" "ping_from $attacker4 $server4"
    must_not_pass $attacker4 $server4

    step "The same for a scanner of web sites over IPv6 and for a guesser of telephone extensions."
    for path in /.env /wp-login.php /.git/config; do attack_nginx $attacker6 $path; done
    for extension in 100 101 102; do attack_asterisk $caller4 $extension; done
    until_true "nft list table inet band | grep -qF 2001:db8:66::" "the scanner's network is in the kernel's set"
    until_true "nft list table inet band | grep -qF $caller4" "$caller4 is in the kernel's set"
    must_not_pass $attacker6 $server6
    must_not_pass $caller4 $server4
    show server "banctl list"
    echo "  IPv6 attackers have a whole /64 to choose from, so the /64 is banned."

    step "Why is $attacker4 shut out? The lines that did it, and the packets dropped since:"
    show server "banctl why $attacker4"
    banctl why $attacker4 | grep -qF 'Failed password for invalid user oracle' || failed "banctl why does not show the line"

    step "It was a customer after all: let it in again. The packet passes."
    show server "banctl unban $attacker4"
    must_pass $attacker4 $server4
    show attacker "ping -n -c 1 -W 1 $server4" "ping_from $attacker4 $server4"

    step "The office, $office4, is on the allowlist: it fails five times and is not banned."
    for user in root root root root root; do attack_sshd $office4 $user; done
    until_true "[ \"\$(grep -c 'failure .*$office4 ' '$directory/watch.txt')\" -eq 5 ]" "band has read the office's lines"
    show server "banctl why $office4"
    must_pass $office4 $server4
    if banctl list | grep -qF "$office4 "; then failed "$office4 is banned in spite of the allowlist"; fi
}

ending() {
    step "Every step came out as told. Nothing on this machine was changed: all this happened in a network of its own" \
        "and in one temporary directory, and both are gone when this script ends."
    cat <<'TEXT'
  For real:
    make install            (or: make deb, and apt install ./dist/band_*.deb)
    edit /etc/band/band.toml, then: banctl config check
    systemctl enable --now band
TEXT
}

stay() {
    cd "$directory"
    if [ -t 0 ]; then
        local answer=''
        printf '\nband is still running. Press Enter for a shell beside it (banctl, nft, attacker ping ...), or type q to end: '
        read -r answer || answer=q
        [ "$answer" != q ] || return 0
        printf "Log lines go to log/*.log, 'attacker COMMAND' runs on the attacker's machine, 'exit' ends it all.\n"
        PS1='band demo$ ' bash --norc -i || true
    elif [ -n "${BAND_DEMO_STAY:-}" ]; then
        echo
        echo "band stays until this script is ended. To talk to it: export BAND_SOCKET=$BAND_SOCKET"
        wait "$band" || true
    fi
}

inside() {
    directory=$1
    export PATH="$directory/bin:$2:$PATH" BAND_SOCKET="$directory/band.sock"
    band=$$
    trap end_processes EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    make_machines
    write_configuration
    story
    ending
    stay
}

if [ "${1:-}" = --inside ]; then
    inside "$2" "$3"
else
    outside
fi
