#!/bin/sh
# Builds everything: the guest's static binaries, then the runner that carries them.
#
#   scripts/build.sh [--debug] [--target ARCH]
#
#   --debug         the runner unoptimized, for a quick try
#   --target ARCH   a static runner for other hosts of this architecture: x86_64 or aarch64. The linker is
#                   the one that comes with Rust; the cryptography is C and assembler, so another architecture than
#                   this host's needs a C compiler for it (Debian: gcc-aarch64-linux-gnu), or the variable
#                   CC_<arch>_unknown_linux_musl.
#
# Prints the path of the runner on stdout; everything else goes to stderr. Does nothing that is already done.
set -eu
cd "$(dirname "$0")/.."

profile=release
directory=release
arch=
while [ $# -gt 0 ]; do
  case $1 in
    --debug) profile=dev directory=debug ;;
    --target)
      arch=${2-}
      case $arch in x86_64 | aarch64) ;; *) echo "error: --target wants x86_64 or aarch64" >&2; exit 2 ;; esac
      shift
      ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0" >&2; exit 2 ;;
  esac
  shift
done

say() { printf '%s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$1" >&2; [ -z "${2-}" ] || printf 'hint: %s\n' "$2" >&2; exit 1; }

command -v cargo >/dev/null || PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
command -v cargo >/dev/null || fail "cargo was not found" "install Rust with https://rustup.rs"

target_root=${CARGO_TARGET_DIR:-target}
host_arch=$(uname -m)
musl=${arch:-$host_arch}-unknown-linux-musl
gnu=$host_arch-unknown-linux-gnu

# A static program of musl is smaller and starts faster in an emulated guest; a static one of glibc works too.
has_target() { [ -d "$(rustc --print sysroot)/lib/rustlib/$1/lib" ]; }
if ! has_target "$musl" && command -v rustup >/dev/null; then
  say "adding the Rust target $musl"
  rustup target add "$musl" >&2 || say "the target cannot be had here"
fi
if has_target "$musl"; then
  guest_target=$musl
elif [ -n "$arch" ]; then
  fail "a runner for other hosts needs the Rust target $musl" "rustup target add $musl"
else
  say "the guest binaries will be static glibc programs"
  guest_target=$gnu
fi
if [ -n "$arch" ] && [ "$arch" != "$host_arch" ]; then
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld
  CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_LINKER
  if ! printenv "CC_${arch}_unknown_linux_musl" >/dev/null; then
    command -v "$arch-linux-gnu-gcc" >/dev/null || fail "there is no C compiler for $arch" \
      "install $arch-linux-gnu-gcc (Debian: gcc-$(printf %s "$arch" | tr _ -)-linux-gnu), or set CC_${arch}_unknown_linux_musl"
    export "CC_${arch}_unknown_linux_musl=$arch-linux-gnu-gcc"
  fi
fi

say "building the guest's binaries for $guest_target"
# +crt-static is musl's default; for glibc it makes the difference. The flags of the caller are for host programs.
RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --profile guest --target "$guest_target" \
  -p guest-init -p guest-agent -p guest-mock-claude >&2
guest=$(cd "$target_root/$guest_target/guest" && pwd)

say "building the runner"
set -- --locked --profile "$profile" -p runner
[ -z "$arch" ] || { set -- "$@" --target "$musl"; directory=$musl/$directory; }
GUEST_INIT_PATH=$guest/guest-init GUEST_AGENT_PATH=$guest/guest-agent GUEST_MOCK_CLAUDE_PATH=$guest/guest-mock-claude \
  cargo build "$@" >&2
printf '%s\n' "$(cd "$target_root/$directory" && pwd)/runner"
