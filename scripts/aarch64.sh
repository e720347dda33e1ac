#!/usr/bin/env bash
# Builds everything for aarch64, whatever this machine is, and tries it: unit tests under qemu-user, and an emulated aarch64
# guest that answers `uname -m` and runs unit tests that want a kernel's newer system calls, which qemu-user lacks.
#
# usage: scripts/aarch64.sh build | test
#
#   build   static programs: target/aarch64-unknown-linux-musl/{guest/guest-*,release/{runner,vm0-api}}
#   test    the tests; scripts/test.sh --slow runs them
#
# Installs a cross compiler (for linking) and QEMU from the distribution, and Rust's target by rustup.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$top"

triple=aarch64-unknown-linux-musl
export CARGO_INCREMENTAL=0
unset RUSTFLAGS

guest_programs() {
    cargo build --quiet --locked --profile guest --target "$triple" -p guest-init -p guest-agent -p guest-mock-claude >&2
}

# Prints the programs of a crate's unit tests; further arguments choose them.
unit_tests_of() {
    local package=$1
    shift
    cargo test --locked --no-run --message-format json --target "$triple" -p "$package" "$@" 2>/dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}

build() {
    local guest=$target/$triple/guest
    say "Building the guest's programs for $triple"
    guest_programs
    say "Building the runner for $triple"
    GUEST_INIT_PATH=$guest/guest-init GUEST_AGENT_PATH=$guest/guest-agent GUEST_MOCK_CLAUDE_PATH=$guest/guest-mock-claude \
        cargo build --quiet --locked --release --target "$triple" -p runner >&2
    say "Building the Web API for $triple"
    cargo build --quiet --locked --release --target "$triple" -p web-api --bin vm0-api >&2
    say "$target/$triple/release/{runner,vm0-api}"
}

# Those of whole crates, which need no more of a kernel than qemu-user has.
under_qemu_user() {
    local program
    say "The programs for $triple under qemu-user"
    for program in runner vm0-api; do qemu-aarch64-static "$target/$triple/release/$program" --version >&2; done
    say "Unit tests for $triple under qemu-user"
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_RUNNER=qemu-aarch64-static \
        cargo test --locked --no-fail-fast --target "$triple" --lib --bins \
        -p guest-control -p guest-init -p guest-agent -p guest-mock-claude -p policy -p resolver -p sandbox \
        -p sandbox-firecracker -p sandbox-qemu -p api-types -p web-api
}

# A guest with the unit tests of the crates that open files with openat2 and start processes with clone3.
in_a_guest() {
    local work host runner
    work=$(mktemp -d "$target/aarch64.XXXXXX")
    # shellcheck disable=SC2064 # now, not then
    trap "rm -rf '$work'" EXIT
    say "Building the unit tests of host and runner for $triple"
    host=$(unit_tests_of host --lib)
    runner=$(unit_tests_of runner --bins)
    aarch64-linux-gnu-strip -o "$work/host-tests" "$host"
    aarch64-linux-gnu-strip -o "$work/runner-tests" "$runner"
    say "Making an image for aarch64"
    VM0_TEST_AARCH64_GUEST=$target/$triple/guest VM0_TEST_AARCH64_INTO=$work/image VM0_TEST_AARCH64_EXTRA=$work/host-tests:$work/runner-tests \
        cargo test --locked -p runner -- --exact image::foreign_tests::an_image_of_another_architecture_has_its_kernel_modules_and_init
    say "An emulated aarch64 guest"
    VM0_TEST_AARCH64_INTO=$work/image VM0_TEST_AARCH64_COMMANDS="/opt/host-tests --test-threads 2
/opt/runner-tests --test-threads 2 executor:: daemon:: home:: queue:: provider::" cargo test --locked -p sandbox-qemu --test aarch64
}

need_rust
case ${1-} in
build)
    need_cross_compiler aarch64
    build
    ;;
test)
    need_root "scripts/aarch64.sh test (the emulated guest)"
    need_packages qemu-user-static qemu-system-arm erofs-utils ca-certificates
    need_cross_compiler aarch64
    build
    under_qemu_user
    in_a_guest
    ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac
