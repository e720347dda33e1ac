#!/usr/bin/env bash
# The numbers of docs/performance.md, reproduced: `runner benchmark` beside what other runtimes of this host need for
# the same nothing (`runc run` of busybox's true, gVisor's `runsc do /bin/true`), all in one run.
#
# Absolute milliseconds mean little on a shared machine: compare the ratios. The floors are measured before and after
# the benchmark; when the two differ much, the machine was busy and the run is worth repeating.
#
#   scripts/bench.sh [RUNS]      RUNS of each floor, default 40
#
# Needs root. Installs runc, runsc and busybox-static from the distribution where they are missing.
set -euo pipefail

runs=${1:-40}
top=$(cd "$(dirname "$0")/.." && pwd)
home=${VM0_BENCH_HOME:-$top/target/bench-home}
runner=${VM0_RUNNER_BIN:-$top/target/release/runner}

say() { printf '%s\n' "$*" >&2; }

[ "$(id -u)" = 0 ] || { say "error: benchmarks start microVMs and containers: run this as root"; exit 1; }

missing=()
for package in runc runsc busybox-static; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi
[ -x "$runner" ] || "$top/scripts/build.sh"
(umask 077 && mkdir -p "$home")
"$runner" --home "$home" setup --profile=vm0/small >&2
"$runner" --home "$home" build --profile vm0/small >&2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bundle/rootfs/bin"
cp /bin/busybox "$work/bundle/rootfs/bin/busybox"
(cd "$work/bundle" && runc spec)
sed -i -e 's/"terminal": true/"terminal": false/' -e 's#"sh"$#"/bin/busybox", "true"#' "$work/bundle/config.json"

# Prints the sorted wall times of $runs runs of a command, in microseconds, one a line.
times_of() {
    local i begin end
    for ((i = 0; i < runs; i++)); do
        begin=${EPOCHREALTIME/[.,]/}
        "$@" >/dev/null 2>"$work/stderr" || { say "error: $* failed:"; cat "$work/stderr" >&2; return 1; }
        end=${EPOCHREALTIME/[.,]/}
        echo $((end - begin))
    done | sort -n
}

# p50 and p95 of sorted microseconds on stdin, as milliseconds.
summary() {
    awk '{ v[NR] = $1 } END {
        printf "p50 %.1f ms, p95 %.1f ms, n %d\n", v[int((NR + 1) / 2)] / 1000, v[int(NR * 0.95 + 0.999)] / 1000, NR }'
}

number=0
one_runc() {
    number=$((number + 1))
    runc --root "$work/runc" run --bundle "$work/bundle" "vm0-bench-$$-$number"
}
# The systrap and ptrace platforms need no KVM; ptrace is what the distribution's release carries.
# It gives its standard streams to the user it drops to, so they must not be /dev/null.
: >"$work/empty"
one_runsc() {
    runsc --root "$work/runsc" --network=none --ignore-cgroups --platform=ptrace "do" /bin/true \
        <"$work/empty" >"$work/stdout"
}

floors() {
    say "runc run of busybox true, $1: $(times_of one_runc | tee "$work/runc-$1" | summary)"
    say "runsc do /bin/true, $1:       $(times_of one_runsc | tee "$work/runsc-$1" | summary)"
}

floors before
say "runner benchmark"
"$runner" --home "$home" benchmark --json | tee "$work/benchmark.json"
floors after

median() { sort -n "$@" | awk '{ v[NR] = $1 } END { printf "%.2f", v[int((NR + 1) / 2)] / 1000 }'; }
runc_ms=$(median "$work"/runc-before "$work"/runc-after)
runsc_ms=$(median "$work"/runsc-before "$work"/runsc-after)
submit_ms=$(sed -n 's/.*"submit_to_result_ms": *{"p50": *\([0-9.]*\).*/\1/p' "$work/benchmark.json")
say ""
say "runc run (busybox true)  p50 $runc_ms ms"
say "runsc do /bin/true       p50 $runsc_ms ms"
if [ -n "$submit_ms" ]; then
    say "submit of true → result  p50 $submit_ms ms = $(awk -v a="$submit_ms" -v b="$runc_ms" 'BEGIN { printf "%.2f", a / b }') × runc run"
fi
