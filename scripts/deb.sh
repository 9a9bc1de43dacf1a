#!/usr/bin/env bash
# Builds dist/band_VERSION_ARCH.deb with dpkg-deb alone.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v dpkg-deb >/dev/null 2>&1 || {
    echo "deb: dpkg-deb is needed; this is no Debian or Ubuntu" >&2
    exit 1
}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# A pre-release sorts before the release: 1.0.0-rc1 is 1.0.0~rc1 to dpkg.
version=${version/-/\~}
architecture=$(dpkg --print-architecture)
package=dist/band_${version}_$architecture.deb

stage=$(mktemp -d)
trap 'rm -rf -- "$stage"' EXIT
chmod 0755 "$stage"
DESTDIR=$stage PREFIX=/usr UNITDIR=/usr/lib/systemd/system scripts/install.sh
strip --strip-unneeded "$stage/usr/bin/band" "$stage/usr/bin/banctl"

documents=$stage/usr/share/doc/band
install -D -m 0644 CHANGELOG.md "$documents/changelog"
gzip -9n "$documents/changelog"
[ ! -e README.md ] || install -m 0644 README.md "$documents/README.md"
cat >"$documents/copyright" <<TEXT
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: band

Files: *
Copyright: The band developers
License: MIT or Apache-2.0

License: Apache-2.0
 See /usr/share/common-licenses/Apache-2.0.

License: MIT
$(sed -e '1,4d' -e 's/^$/./' -e 's/^/ /' LICENSE-MIT)
TEXT

# The newest symbols of the C library that the programs use say which one they need.
libc=$(objdump -T "$stage/usr/bin/band" "$stage/usr/bin/banctl" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)
mkdir -m 0755 "$stage/DEBIAN"
cat >"$stage/DEBIAN/control" <<TEXT
Package: band
Version: $version
Architecture: $architecture
Maintainer: The band developers <band@localhost>
Installed-Size: $(du -k -s --exclude=DEBIAN "$stage" | cut -f 1)
Depends: adduser, libc6 (>= ${libc#GLIBC_}), libgcc-s1
Recommends: nftables
Section: net
Priority: optional
Description: shuts out who attacks this machine
 band follows the logs of servers and telephone systems (OpenSSH, nginx,
 Asterisk and others) and bans addresses that fail too often, in the kernel, by
 nftables. banctl shows who is banned and why, and lets them in again.
TEXT
echo /etc/band/band.toml >"$stage/DEBIAN/conffiles"
install -m 0755 packaging/debian/postinst packaging/debian/prerm packaging/debian/postrm "$stage/DEBIAN/"
(cd "$stage" && find usr etc -type f -print0 | sort -z | xargs -0 md5sum) >"$stage/DEBIAN/md5sums"

mkdir -p dist
dpkg-deb --root-owner-group --build -Zxz "$stage" "$package"
echo "built $package; install it with: apt install ./$package"
