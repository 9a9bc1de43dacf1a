#!/usr/bin/env bash
# Builds and installs: programs, unit, configuration (an existing one stays). Variables:
#   PREFIX    where the programs go                  /usr
#   DESTDIR   stages everything there; makes no user  (empty)
#   UNITDIR   where the unit goes                    /lib/systemd/system
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin"
prefix=${PREFIX:-/usr} destination=${DESTDIR:-} units=${UNITDIR:-/lib/systemd/system}

if [ -z "$destination" ] && [ "$(id -u)" -ne 0 ]; then
    echo "install: needs root (sudo make install), or a DESTDIR to stage into" >&2
    exit 1
fi
if [[ "$prefix" != /* || ( -n "$destination" && "$destination" != /* ) ]]; then
    echo "install: PREFIX and DESTDIR are whole paths, from / on" >&2
    exit 1
fi

build() {
    scripts/setup.sh build
    cargo build --release --locked
}

# sudo make install of what an ordinary user has built: cargo is that user's, and need not be root's.
binaries=${CARGO_TARGET_DIR:-target}/release
if command -v cargo >/dev/null 2>&1; then
    build
elif [ ! -x "$binaries/band" ] || [ ! -x "$binaries/banctl" ]; then
    echo "install: cargo is not there for this user; run cargo build --release as yourself first" >&2
    exit 1
fi

make_user() {
    if ! getent passwd band >/dev/null; then
        useradd --system --user-group --home-dir /var/lib/band --no-create-home \
            --shell "$(command -v nologin || echo /bin/false)" --comment "band" band
        echo "made the user and group band (no login)"
    fi
    local group
    for group in adm systemd-journal; do
        getent group "$group" >/dev/null && usermod --append --groups "$group" band
    done
    return 0
}

install -D -m 0755 "$binaries/band" "$destination$prefix/bin/band"
install -D -m 0755 "$binaries/banctl" "$destination$prefix/bin/banctl"
install -d "$destination$units"
sed "s|/usr/bin/|$prefix/bin/|" packaging/band.service >"$destination$units/band.service"
chmod 0644 "$destination$units/band.service"
install -d -m 0755 "$destination/etc/band" "$destination/etc/band/band.d" "$destination/etc/band/filters"
if [ -e "$destination/etc/band/band.toml" ]; then
    echo "kept $destination/etc/band/band.toml as it is"
else
    install -m 0644 packaging/band.toml "$destination/etc/band/band.toml"
fi

if [ -n "$destination" ]; then
    echo "staged in $destination"
    exit 0
fi
make_user
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
cat <<TEXT
installed. What is next:
  1. edit /etc/band/band.toml: put your own networks into [allow], switch on the jails you want;
     then: banctl config check
  2. systemctl enable --now band      (after an upgrade: systemctl restart band)
  3. banctl status                    says whether this machine is protected
TEXT
if getent group asterisk >/dev/null; then
    echo "  Asterisk's logs belong to the group asterisk; let band read them: usermod -aG asterisk band"
fi
