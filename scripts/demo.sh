#!/usr/bin/env bash
# Prepares this host and runs a first job in a microVM, which also fetches a page over https through the runner's proxy,
# from a server that the demo starts. The job's result is the last line, and all of stdout:
#
#   {"run_id":"6f1c2f0e-…","exit_code":0,"error":null}
#
# usage: scripts/demo.sh [PROMPT]      with the mock agent, the prompt is a bash command line
#
# Installs (root, by sudo where you are not root): Debian packages for building and for QEMU; Rust by rustup where there
# is none. Keeps: target/, and the runner's home ~/.vm0-runner (VM0_RUNNER_HOME) with the small image.
# Safe to run again: what is there already is not made again.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=scripts/demo-upstream.sh
. "$(dirname "$0")/demo-upstream.sh"

case ${1-} in -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit
    ;;
esac
# shellcheck disable=SC2016 # expanded in the guest
prompt=${1:-'echo "Hello from $(uname -n), Linux $(uname -r), $(nproc) CPU"; free -m; curl -sS https://'$demo_host/}
name=demo
group=vm0/demo
profile=vm0/small

need_root "scripts/demo.sh"
need_disk 6
need_packages ca-certificates curl git build-essential pkg-config musl-tools util-linux procps iproute2 openssl
need_rust
# One demo of this checkout at a time: a second one would meet the first one's runner.
exec 9>"$target/demo.lock"
flock -n 9 || { say "Waiting for another demo of this checkout"; flock 9; }

say "Building the runner"
"$top/scripts/build.sh" >&2
runner=$target/release/runner
# Made here, so that it is yours also where root's commands fill it.
export VM0_RUNNER_HOME=${VM0_RUNNER_HOME:-$HOME/.vm0-runner}
(umask 077 && mkdir -p "$VM0_RUNNER_HOME")
root_runner() { as_root env VM0_RUNNER_HOME="$VM0_RUNNER_HOME" "$runner" "$@"; }

say "Preparing the host: runner setup"
root_runner setup >&2
say "Building the image of $profile: runner build (a minute or two the first time)"
root_runner build --profile "$profile" >&2
say "Writing the configuration: runner config"
"$runner" config --name "$name" --group "$group" --profile "$profile" >&2

work=$(mktemp -d)
daemon=
finish() {
    local pid
    trap - EXIT INT TERM
    if [ -n "$daemon" ] && pid=$(cat "$work/pid" 2>/dev/null) && kill -0 "$daemon" 2>/dev/null; then
        say "Stopping the runner"
        as_root kill -TERM "$pid" 2>/dev/null || true
        wait "$daemon" || true
    fi
    stop_upstream "$work"
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "Starting a web site for it: https://$demo_host/"
start_upstream "$work" 9>&-
# As it was written, but that the proxy also trusts the demo's own site.
config=$work/runner.yaml
sed "s|ssl_verify_upstream_trusted_ca:.*|ssl_verify_upstream_trusted_ca: $work/trusted.crt|" \
    "$VM0_RUNNER_HOME/runners/$name/runner.yaml" >"$config"
chmod 0755 "$work"

say "Starting the runner: runner start --local"
# In a mount namespace in which /etc/hosts knows the site.
# shellcheck disable=SC2016 # expanded by the inner shell, which becomes the runner
as_root env VM0_RUNNER_HOME="$VM0_RUNNER_HOME" USE_MOCK_CLAUDE=true unshare --mount \
    sh -c 'mount --bind "$4" /etc/hosts && echo $$ >"$1" && exec "$2" start --config "$3" --local' \
    sh "$work/pid" "$runner" "$config" "$work/hosts" >"$work/runner.log" 2>&1 9>&- &
daemon=$!

say "Submitting a job: runner local submit --group $group --profile $profile --prompt '$prompt'"
"$runner" local submit --group "$group" --profile "$profile" --prompt "$prompt" --follow >"$work/result" 9>&- &
submit=$!
# Whichever ends first: the job, or a runner that could not start.
status=0
wait -n "$submit" "$daemon" || status=$?
if ! kill -0 "$daemon" 2>/dev/null && [ ! -s "$work/result" ]; then
    kill "$submit" 2>/dev/null || true
    cat "$work/runner.log" >&2
    die "the runner ended before the job did" "its log is above; \`$runner doctor\` checks every prerequisite"
fi
wait "$submit" || status=$?
result=$(cat "$work/result")
run=$(printf '%s' "$result" | sed -n 's/^{"run_id":"\([^"]*\)".*/\1/p')
say "What it did on the network: runner logs ${run%%-*} --network"
[ -z "$run" ] || "$runner" logs "$run" --network >&2 || true
finish
printf '%s\n' "$result"
exit "$status"
