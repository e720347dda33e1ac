#!/bin/sh
# Builds everything: the guest's static binaries, then the runner that carries them.
#
#   scripts/build.sh [--debug]      --debug: the runner unoptimized, for a quick try
#
# Prints the path of the runner on stdout; everything else goes to stderr. Does nothing that is already done.
set -eu
cd "$(dirname "$0")/.."

profile=release
directory=release
case "${1-}" in
  "") ;;
  --debug) profile=dev directory=debug ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

say() { printf '%s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$1" >&2; [ -z "${2-}" ] || printf 'hint: %s\n' "$2" >&2; exit 1; }

command -v cargo >/dev/null || PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
command -v cargo >/dev/null || fail "cargo was not found" "install Rust with https://rustup.rs"

target_root=${CARGO_TARGET_DIR:-target}
arch=$(uname -m)
musl=$arch-unknown-linux-musl
gnu=$arch-unknown-linux-gnu

# A static program of musl is smaller and starts faster in an emulated guest; a static one of glibc works too.
has_target() { [ -d "$(rustc --print sysroot)/lib/rustlib/$1/lib" ]; }
if ! has_target "$musl" && command -v rustup >/dev/null; then
  say "adding the Rust target $musl"
  rustup target add "$musl" >&2 || say "the target cannot be had here; the guest binaries will be static glibc programs"
fi
if has_target "$musl"; then
  guest_target=$musl
else
  guest_target=$gnu
fi

say "building the guest's binaries for $guest_target"
# +crt-static is musl's default; for glibc it makes the difference. The flags of the caller are for host programs.
RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --profile guest --target "$guest_target" \
  -p guest-init -p guest-agent -p guest-mock-claude >&2
guest=$(cd "$target_root/$guest_target/guest" && pwd)

say "building the runner"
GUEST_INIT_PATH=$guest/guest-init GUEST_AGENT_PATH=$guest/guest-agent GUEST_MOCK_CLAUDE_PATH=$guest/guest-mock-claude \
  cargo build --locked --profile "$profile" -p runner >&2
printf '%s\n' "$(cd "$target_root/$directory" && pwd)/runner"
