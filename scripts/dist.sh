#!/usr/bin/env bash
# Makes what a release consists of: a tarball and a Debian package for each architecture, and their checksums.
#
#   scripts/dist.sh [OPTIONS] [ARCH…]       into target/dist; ARCH: x86_64 (default: this host's), aarch64
#   scripts/dist.sh test                    installs this host's package with apt into a fresh root, and purges it again
#
#   --no-api        without vm0-api
#   --runner FILE   packs this program, which must be of the one ARCH, instead of building it
#   --out DIR       there instead of target/dist
#
# The same programs give the same bytes: files carry the time of the last commit (SOURCE_DATE_EPOCH overrides it), no owner
# and one order. Programs are static; the proxy wants Python 3.11, so a package is for Debian 12 and later and Ubuntu 24.04 and later.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$top"

dist=$target/dist
host_arch=$(uname -m)
version=$(sed -n '/^\[workspace\.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
[ -n "$version" ] || die "Cargo.toml has no workspace.package.version"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
umask 022

work='' remover=''
# Never into what is mounted there, whatever ended us.
clean() { [ -z "$work" ] || $remover rm -rf --one-file-system "$work"; }
trap clean EXIT
trap 'exit 130' INT TERM HUP

# Debian's name of an architecture.
debian_arch() {
    case $1 in
    x86_64) echo amd64 ;;
    aarch64) echo arm64 ;;
    *) die "$1 is not an architecture that runners are built for" "x86_64 or aarch64" ;;
    esac
}

# All programs have C in them (cryptography, SQLite), and build scripts are this host's.
need_compilers() {
    need_packages build-essential
    if [ "$1" = "$host_arch" ]; then need_packages musl-tools; else need_cross_compiler "$1"; fi
}

# Builds vm0-api and prints where it is.
api() {
    local triple=$1-unknown-linux-musl
    need_compilers "$1"
    RUSTFLAGS='' cargo build --locked --release --target "$triple" -p web-api --bin vm0-api >&2
    printf '%s\n' "$target/$triple/release/vm0-api"
}

# Prints where the runner for an architecture is, building it unless one was given.
runner_for() {
    if [ -n "$given" ]; then printf '%s\n' "$given"; else scripts/build.sh --target "$1"; fi
}

# The files of a package below $1, for architecture $2.
furnish() {
    local root=$1 arch=$2 runner vm0_api
    runner=$(runner_for "$arch")
    install -D -m 755 "$runner" "$root/usr/bin/runner"
    if [ "$with_api" = 1 ]; then
        vm0_api=$(api "$arch")
        install -D -s --strip-program="$(strip_program "$arch")" -m 755 "$vm0_api" "$root/usr/bin/vm0-api"
    fi
    install -D -m 644 LICENSE "$root/usr/share/doc/vm0-runner/copyright"
    install -m 644 README.md CHANGELOG.md "$root/usr/share/doc/vm0-runner"
    mkdir -p "$root/usr/share/doc/vm0-runner/docs" "$root/usr/share/vm0-runner"
    cp docs/*.md "$root/usr/share/doc/vm0-runner/docs"
    cp -R deploy/. "$root/usr/share/vm0-runner"
    mkdir -p "$root/usr/share/bash-completion/completions" "$root/usr/share/zsh/vendor-completions" "$root/usr/share/fish/vendor_completions.d"
    # The same for all architectures, so by the program that this host can run.
    "$host_runner" completion bash >"$root/usr/share/bash-completion/completions/runner"
    "$host_runner" completion zsh >"$root/usr/share/zsh/vendor-completions/_runner"
    "$host_runner" completion fish >"$root/usr/share/fish/vendor_completions.d/runner.fish"
    chmod -R u=rwX,go=rX "$root"
    find "$root" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
}

# Programs of Rust are stripped by cargo; this is for what C left.
strip_program() { if [ "$1" = "$host_arch" ]; then echo strip; else echo "$1-linux-gnu-strip"; fi; }

# What `runner setup` would install for every profile; `dist.sh test` compares.
depends() {
    local qemu="qemu-system-x86"
    [ "$1" != aarch64 ] || qemu="qemu-system-arm"
    echo "$qemu, nftables, python3-venv, python3 (>= 3.11), iproute2, mmdebstrap, erofs-utils, e2fsprogs, dpkg, util-linux, lz4, xz-utils, zstd, gzip, openssl, ca-certificates"
}

# The package's control files below $1/DEBIAN.
control() {
    local root=$1 arch=$2
    mkdir -p "$root/DEBIAN"
    cat >"$root/DEBIAN/control" <<CONTROL
Package: vm0-runner
Version: $version
Architecture: $(debian_arch "$arch")
Maintainer: The runner's maintainers <maintainers@example.com>
Installed-Size: $(du -sk --apparent-size --exclude=DEBIAN "$root" | cut -f1)
Depends: $(depends "$arch")
Recommends: systemd
Suggests: npm, squashfs-tools
Section: admin
Priority: optional
Description: runs coding-agent jobs, each in a microVM of its own
 Each job gets a virtual machine restored from a memory snapshot, and all its
 traffic goes through an intercepting proxy. After the installation:
 sudo runner setup, then sudo runner build --profile vm0/small.
CONTROL
    # A unit whose program is gone would fail at every boot, and its jobs would be nobody's.
    cat >"$root/DEBIAN/prerm" <<'PRERM'
#!/bin/sh
set -e
[ "$1" = remove ] || exit 0
units=$(grep -ls '^ExecStart=.*/usr/bin/runner' /etc/systemd/system/vm0-runner-*.service /run/systemd/system/vm0-runner-*.service || true)
[ -n "$units" ] || exit 0
echo "error: these services run /usr/bin/runner:" $units >&2
echo "hint: runner service uninstall --name NAME for each, or runner uninstall for all, then remove the package" >&2
exit 1
PRERM
    chmod 755 "$root/DEBIAN/prerm"
    (cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' md5sum) >"$root/DEBIAN/md5sums"
    find "$root/DEBIAN" "$root" -maxdepth 1 -exec touch --date="@$SOURCE_DATE_EPOCH" {} +
}

make_one() {
    local arch=$1 stem root
    stem=vm0-runner-$version-linux-$arch
    root=$work/$stem
    say "Making $stem"
    furnish "$root" "$arch"
    tar --create --directory "$work" --sort=name --owner=0 --group=0 --numeric-owner --format=gnu "$stem" | gzip -9n >"$work/$stem.tar.gz"
    control "$root" "$arch"
    dpkg-deb --root-owner-group -Zxz --build "$root" "$work/vm0-runner_${version}_$(debian_arch "$arch").deb" >&2
    mv "$work"/*.tar.gz "$work"/*.deb "$dist"
}

make_all() {
    local arch
    [ $# -gt 0 ] || set -- "$host_arch"
    for arch in "$@"; do debian_arch "$arch" >/dev/null; done
    mkdir -p "$dist"
    work=$(mktemp -d "$target/dist.XXXXXX")
    [ -z "$given" ] || [ "$*" = "$host_arch" ] || die "--runner packs a program for $host_arch alone" "leave it out, and all are built"
    # The host's program prints the completions of all. In a subshell: what vm0-api wants of the environment is its own.
    if [ -z "$given" ]; then for arch in "$host_arch" "$@"; do (need_compilers "$arch"); done; fi
    host_runner=$(runner_for "$host_arch")
    case $("$host_runner" version) in *"$version"*) ;; *) die "$host_runner is not of version $version" ;; esac
    for arch in "$@"; do make_one "$arch"; done
    (cd "$dist" && LC_ALL=C sha256sum -- *.tar.gz *.deb >SHA256SUMS)
    say "$dist:"
    cat "$dist/SHA256SUMS"
}

# Files of a root, without what apt and dpkg keep for themselves and what their triggers cache.
listing() {
    (cd "$1" && find . -xdev \( -path ./proc -o -path ./sys -o -path ./dev -o -path ./tmp -o -path ./run -o -path ./var/cache -o -path ./var/lib/apt \
        -o -path ./var/lib/dpkg -o -path ./var/log \) -prune -o -printf '%y %p\n') | LC_ALL=C sort
}

# A root without Rust and this checkout, in which apt installs and purges the package.
try() {
    local deb root said needs
    need_root "scripts/dist.sh test (a root file system)"
    need_packages mmdebstrap
    deb=$dist/vm0-runner_${version}_$(debian_arch "$host_arch").deb
    [ -f "$deb" ] || die "$deb is not made" "run scripts/dist.sh first"
    (cd "$dist" && sha256sum --check --quiet SHA256SUMS) || die "the checksums do not fit"
    work=$(mktemp -d "$target/dist.XXXXXX")
    remover=as_root
    root=$work/root
    # shellcheck source=/dev/null
    . /etc/os-release
    # What the package needs is there before it, so that a difference afterwards is its own.
    needs=$(depends "$host_arch" | sed 's/ *([^)]*)//g; s/, */,/g')
    say "Making a root with $needs"
    quietly as_root unshare --mount --fork --kill-child -- mmdebstrap --variant=apt --include="$needs" "$VERSION_CODENAME" "$root" || die "mmdebstrap failed"
    as_root cp "$deb" "$root/tmp/"
    in_root() { as_root unshare --mount --pid --fork --net --kill-child --mount-proc="$root/proc" -- chroot "$root" env PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C "$@"; }
    listing "$root" >"$work/before"
    say "Installing it with apt"
    quietly in_root apt-get install -y "/tmp/${deb##*/}" || die "apt could not install the package, or it lacks a dependency"
    said=$(in_root runner version)
    case $said in *"$version"*) ;; *) die "the installed runner says: $said" ;; esac
    if [ -x "$root/usr/bin/vm0-api" ]; then in_root vm0-api --help >/dev/null || die "the installed vm0-api does not start"; fi
    # Nothing that `runner setup` wants is missing from Depends.
    # It exits with 1: the proxy is not made yet.
    said=$(in_root runner setup --check --engine qemu --json || true)
    case $said in *'"missing":[]'*) ;; *) die "the package's dependencies are not all that \`runner setup\` needs: $said" ;; esac
    in_root bash -c '. /usr/share/bash-completion/completions/runner' || die "bash does not take the completions"
    say "A service that runs the package's program forbids its removal"
    echo 'ExecStart=/usr/bin/runner start' | as_root tee "$root/etc/systemd/system/vm0-runner-test.service" >/dev/null
    ! in_root apt-get purge -y vm0-runner >"$work/said" 2>&1 || die "apt removed the program of a service"
    grep -q 'runner service uninstall' "$work/said" || die "the refusal does not say what to do: $(cat "$work/said")"
    as_root rm "$root/etc/systemd/system/vm0-runner-test.service"
    say "Purging it"
    quietly in_root apt-get purge -y vm0-runner || die "apt could not purge the package"
    listing "$root" >"$work/after"
    diff "$work/before" "$work/after" >&2 || die "the package left something"
    say "installed, run, purged; nothing is left"
}

with_api=1
given=
case ${1-} in
test)
    try
    exit
    ;;
-h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit
    ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
    --no-api) with_api=0 ;;
    --runner)
        given=$(realpath -e -- "${2-}") || die "--runner wants the path of a program"
        shift
        ;;
    --out)
        [ -n "${2-}" ] || die "--out wants a directory"
        dist=$2
        shift
        ;;
    -*) die "dist.sh does not know $1" "scripts/dist.sh --help" ;;
    *) break ;;
    esac
    shift
done
if [ -z "$given" ] || [ "$with_api" = 1 ]; then need_rust; fi
command -v dpkg-deb >/dev/null || die "dpkg-deb is not installed" "packages are made on Debian or Ubuntu"
make_all "$@"
