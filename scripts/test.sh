#!/usr/bin/env bash
# Runs every check and every test, on a fresh Debian or Ubuntu machine too, and ends with the line
#
#   N passed, N failed, N skipped
#
# above which every skip has its reason. Exit status 0 only if nothing failed.
#
# usage: scripts/test.sh [--lint | --fast | --slow | --soak ROUNDS] [-- FILTER…]
#
#   --lint   formatting, clippy, cargo deny, shellcheck, ruff, mypy, the examples in deploy/
#   --fast   those and the unit tests: no image, no VM, no root
#   (none)   those and the end-to-end tests in microVMs with the small image
#   --slow   those and the full image: the real agent CLI, Chromium, large volumes; and aarch64, emulated
#   --soak   the end-to-end tests ROUNDS times over
#   FILTER   run only the tests whose names contain one of these words
#
# Installs (root, by sudo where you are not root): Debian packages for building, for QEMU and for the checks; Rust by
# rustup where there is none; cargo-deny into target/tools; Python packages into target/addon-venv; a NATS server into target/nats,
# schemathesis into target/schemathesis. The image is built into target/test-home.
# Safe to run again, and beside another copy.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

tier=full rounds=1 filters=()
while [ $# -gt 0 ]; do
    case $1 in
    --lint | --fast | --slow) tier=${1#--} ;;
    --soak)
        tier=soak rounds=${2-}
        [[ $rounds =~ ^[1-9][0-9]{0,5}$ ]] || die "--soak wants a number of rounds"
        shift
        ;;
    --)
        shift
        filters=("$@")
        break
        ;;
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit
        ;;
    *) die "unknown option $1" "scripts/test.sh --help" ;;
    esac
    shift
done
cd "$top"

passed=0 failed=0 skipped=0
failures=() skips=() times=()
logs=$target/test-logs
mkdir -p "$logs"

# stage NAME COMMAND…: one check, passed or failed as a whole. Its output is shown as it comes.
stage() {
    local name=$1 begin=$SECONDS
    shift
    say "$name"
    if "$@" </dev/null >&2; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        failures+=("$name")
    fi
    times+=("$((SECONDS - begin)) $name")
}

# skip NAME REASON
skip() {
    skipped=$((skipped + 1))
    skips+=("$1: $2")
}

# rust_tests NAME ARGS…: `cargo test ARGS`, counted test by test.
#
# libtest has no way to skip at run time, so a test that cannot run here says `SKIP <test>: <reason>` past libtest's
# capture and returns; it is taken out of the passed ones.
rust_tests() {
    local name=$1 begin=$SECONDS status=0 log ok bad left
    shift
    log=$logs/${name// /-}-$$.log
    say "$name"
    cargo test --no-fail-fast "$@" </dev/null 2>&1 | tee "$log" | grep -v -e '^running 0 tests' -e '^$' >&2 || true
    status=${PIPESTATUS[0]}
    read -r ok bad < <(awk '/^test result:/ { ok += $4; bad += $6 } END { print ok + 0, bad + 0 }' "$log")
    while IFS= read -r left; do
        skip "${left%%: *}" "${left#*: }"
        ok=$((ok - 1))
    done < <(grep -o 'SKIP [A-Za-z0-9_:]*: .*' "$log" | cut -d' ' -f2- | sort -u)
    while IFS= read -r left; do
        skip "${left%% *}" "${left#*ignored, }"
    done < <(sed -n 's/^test \(.* \.\.\. ignored\(, .*\)\{0,1\}\)$/\1/p' "$log")
    while IFS= read -r left; do
        failures+=("$left")
    done < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$log")
    # A build that failed or a test binary that died counts no test of its own.
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then
        bad=1
        failures+=("$name: cargo test ended with status $status, see above")
    fi
    passed=$((passed + ok)) failed=$((failed + bad))
    times+=("$((SECONDS - begin)) $name")
}

# addon_tests: the proxy's addon, by pytest, counted test by test. Its tests with the real proxy need root.
addon_tests() {
    local name="proxy addon" begin=$SECONDS status=0 log ok bad left count run=()
    log=$logs/proxy-addon-$$.log
    say "$name"
    run=(env PYTHONDONTWRITEBYTECODE=1 "$addon_venv/bin/python" -m pytest -q --color=no -rfEs --rootdir "$addon" -c "$addon/pyproject.toml" "$addon/tests")
    # Words that are no part of a Python name are about Rust tests.
    left=$(printf '%s\n' "$@" | grep -x '[A-Za-z0-9_]*' | paste -sd' ' | sed 's/ / or /g' || true)
    [ $# = 0 ] || { [ -n "$left" ] && run+=(-k "$left"); } || return 0
    if [ "$tier" != fast ]; then run=(as_root "${run[@]}"); fi
    "${run[@]}" </dev/null 2>&1 | tee "$log" | grep -v '^$' >&2 || true
    status=${PIPESTATUS[0]}
    read -r ok bad < <(tail -n 1 "$log" | awk '{ for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) ok = $(i-1); if ($i ~ /^(failed|error)/) bad += $(i-1) } print ok + 0, bad + 0 }')
    while IFS=$'\t' read -r count left; do
        skipped=$((skipped + count))
        skips+=("$name, $count tests: $left")
    done < <(awk '/^SKIPPED \[/ { n = $2; gsub(/[][]/, "", n); $1 = $2 = $3 = ""; sum[$0] += n }
        END { for (why in sum) printf "%d\t%s\n", sum[why], substr(why, 4) }' "$log")
    while IFS= read -r left; do
        failures+=("$name: $left")
    done < <(sed -n 's/^\(FAILED\|ERROR\) \([^ ]*\).*$/\2/p' "$log")
    # 5: no test has such a name.
    if [ "$status" != 0 ] && [ "$status" != 5 ] && [ "$bad" = 0 ]; then
        bad=1
        failures+=("$name: pytest ended with status $status, see above")
    fi
    passed=$((passed + ok)) failed=$((failed + bad))
    times+=("$((SECONDS - begin)) $name")
}

# In the addon's directory, where the tools find their settings.
in_addon() { (cd "$addon" && RUFF_CACHE_DIR=$target/ruff-cache MYPY_CACHE_DIR=$target/mypy-cache "$addon_venv/bin/$1" "${@:2}"); }

shell_scripts() { shellcheck --external-sources scripts/*.sh tests/e2e/src/metal/*.sh .ci/run crates/runner/mitm-addon/pin.sh; }

# The examples in deploy/.
check_deploy() {
    local venv
    need_nats
    need_pinned kubernetes-validate "$top/deploy/kubernetes/requirements.txt"
    scripts/check-deploy.sh "$venv/bin/kubernetes-validate" "$VM0_TEST_NATS"
}

advisories() {
    local log=$logs/advisories-$$.log
    if timeout 60 "$cargo_deny" check advisories >"$log" 2>&1; then
        passed=$((passed + 1))
    elif grep -q 'failed to fetch advisory database' "$log"; then
        skip "cargo deny: advisories" "the advisory database cannot be reached from here"
    else
        cat "$log" >&2
        failed=$((failed + 1))
        failures+=("cargo deny: advisories")
    fi
}

# Results must not depend on somebody's settings.
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto} CARGO_INCREMENTAL=0
unset RUSTFLAGS VM0_RUNNER_HOME VM0_RUNNER_RUN_DIR VM0_RUNNER_UID_BASE

packages=(ca-certificates curl git build-essential pkg-config musl-tools shellcheck util-linux procps python3-venv iproute2 nftables openssl systemd docker-compose)
case $tier in full | slow | soak)
    need_root "scripts/test.sh (the microVM tests)"
    # A metal host is a container with systemd and an ssh server.
    packages+=(tmux e2fsprogs libfaketime squashfs-tools systemd-container mmdebstrap openssh-client)
    # Where systemd runs, the package starts a server of its own: not on somebody's machine. The test then says SKIP.
    [ -d /run/systemd/system ] || packages+=(prometheus)
    ;;
esac
need_disk 10
need_packages "${packages[@]}"
need_rust
need_rust_components
addon=$top/crates/runner/mitm-addon addon_venv=
[ "$tier" = soak ] || need_addon_venv || skip "proxy addon" "the distribution's Python is older than 3.11"

if [ "$tier" != soak ] && [ ${#filters[@]} = 0 ]; then
    need_cargo_deny
    stage "rustfmt" cargo fmt --all --check
    stage "shellcheck" shell_scripts
    stage "cargo deny: bans, licences, sources" "$cargo_deny" --log-level error check --hide-inclusion-graph bans licenses sources
    advisories
    stage "clippy" cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
    if [ -n "$addon_venv" ]; then
        others=("$top/crates/web-api/tests/schemathesis" "$top/tests/e2e")
        stage "ruff format" in_addon ruff format --quiet --config pyproject.toml --check . "${others[@]}"
        stage "ruff" in_addon ruff check --quiet --config pyproject.toml . "${others[@]}"
        stage "mypy" in_addon mypy --no-error-summary
        stage "deployment examples" check_deploy
    else
        skip "deployment examples" "kubernetes-validate wants Python 3.11"
    fi
fi

if [ "$tier" != lint ] && [ "$tier" != soak ]; then
    need_nats
    [ -z "$addon_venv" ] || need_schemathesis
    # The engine's conformance suite wants the image that the full tier builds below.
    exclude=(--exclude e2e)
    [ "$tier" = fast ] || exclude+=(--exclude sandbox-qemu)
    rust_tests "unit tests" --workspace "${exclude[@]}" --locked "${filters[@]+"${filters[@]}"}"
    [ -z "$addon_venv" ] || addon_tests "${filters[@]+"${filters[@]}"}"
fi

# What the end-to-end tests need: the release binary and the images, in a home that each test links them from.
prepare_images() {
    local profile
    export VM0_RUNNER_BIN=$target/release/runner
    export VM0_TEST_IMAGES=$target/test-home
    (umask 077 && mkdir -p "$VM0_TEST_IMAGES")
    as_root env VM0_RUNNER_HOME="$VM0_TEST_IMAGES" "$VM0_RUNNER_BIN" setup "${@/#/--profile=}" && for profile in "$@"; do
        as_root env VM0_RUNNER_HOME="$VM0_TEST_IMAGES" "$VM0_RUNNER_BIN" build --profile "$profile" || return
    done
}

# What a test installs inside a VM with pip.
fetch_wheels() {
    local wheels=$target/test-wheels
    export VM0_TEST_WHEELS=$wheels
    [ ! "$wheels/complete" -nt tests/e2e/wheels.txt ] || return 0
    rm -rf "$wheels"
    "$addon_venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary :all: --platform any \
        --require-hashes --dest "$wheels" --requirement tests/e2e/wheels.txt && touch "$wheels/complete"
}

case $tier in full | slow | soak)
    stage "release build" scripts/build.sh
    profiles=(vm0/small)
    [ "$tier" != slow ] || profiles+=(vm0/default)
    stage "images: ${profiles[*]}" prepare_images "${profiles[@]}"
    if [ "$tier" = soak ]; then
        # The unit tests bring both in the other tiers.
        need_nats
        stage "vm0-api for the tests" cargo build --quiet --locked -p web-api --bin vm0-api
    fi
    if ! is_root; then
        # Test binaries start the daemon, which needs root.
        triple=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
        # With every variable that a test asks for, by their sources.
        kept=$(grep -rhoE 'VM0_TEST_[A-Z0-9_]+' --include='*.rs' tests crates | sort -u | paste -sd,)
        export "CARGO_TARGET_${triple}_RUNNER=sudo --preserve-env=CARGO_TARGET_DIR,VM0_RUNNER_BIN,$kept --"
    fi
    if [ "$tier" != soak ]; then
        small=$(as_root env VM0_RUNNER_HOME="$VM0_TEST_IMAGES" "$VM0_RUNNER_BIN" build --profile vm0/small --dry-run 2>/dev/null | sed -n 's/^rootfs_hash=//p')
        VM0_TEST_IMAGE_DIR=$VM0_TEST_IMAGES/images/$small rust_tests "QEMU engine" --package sandbox-qemu --locked "${filters[@]+"${filters[@]}"}"
    fi
    if [ "$tier" = slow ]; then
        export VM0_TEST_SLOW=1
        [ -z "$addon_venv" ] || stage "wheels for the tests" fetch_wheels
        [ ${#filters[@]} != 0 ] || stage "release: tarball and Debian package" scripts/dist.sh
        [ ${#filters[@]} != 0 ] || stage "release: the package installed and purged by apt" scripts/dist.sh test
        [ ${#filters[@]} != 0 ] || stage "aarch64: all programs, unit tests, an emulated guest" scripts/aarch64.sh test
    elif [ "$tier" = full ] && [ ${#filters[@]} = 0 ]; then
        skip "release" "only --slow builds the static programs, packs them all and installs them in a fresh root (scripts/dist.sh, scripts/dist.sh test)"
        skip "aarch64" "only --slow builds for it and emulates it (scripts/aarch64.sh test)"
    fi
    for ((round = 1; round <= rounds; round++)); do
        name="end-to-end tests"
        [ "$rounds" = 1 ] || name+=", round $round of $rounds"
        # More VMs at once than cores only makes each of them slower.
        rust_tests "$name" --package e2e --locked "${filters[@]+"${filters[@]}"}" -- --test-threads "$(nproc)"
        [ "$tier" != soak ] || [ "$failed" = 0 ] || break
    done
    ;;
esac

{
    printf '\nTime per stage:\n'
    for entry in "${times[@]}"; do printf '%6d s  %s\n' "${entry%% *}" "${entry#* }"; done
    printf '%6d s  in all\n' "$SECONDS"
    if [ ${#skips[@]} -gt 0 ]; then
        printf '\nSkipped:\n'
        printf '  %s\n' "${skips[@]}"
    fi
    if [ ${#failures[@]} -gt 0 ]; then
        printf '\nFailed:\n'
        printf '  %s\n' "${failures[@]}"
    fi
    echo
} >&2
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
