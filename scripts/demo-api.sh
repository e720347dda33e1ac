#!/usr/bin/env bash
# API mode in small, on this host alone: NATS, two API replicas and two runners, each runner in a network namespace of its
# own. Runs are made through the API and one is followed live; meanwhile one replica and one runner are killed (kill -9).
# It ends when every run is answered, with a table of what happened on stdout, and with 0 if each was answered once.
#
# usage: scripts/demo-api.sh
#
# Installs what scripts/demo.sh does, and a NATS server into target/nats. Keeps: target/, and the runner's home
# ~/.vm0-runner (VM0_RUNNER_HOME) with the small image. Safe to run again.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

case ${1-} in
-h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit
    ;;
?*) die "unknown argument $1" "scripts/demo-api.sh --help" ;;
esac
group=vm0/demo-api
profile=vm0/small
name=runs.example.com
replicas=(198.18.43.2 198.18.43.3) # of the range that nobody on the internet has (RFC 2544)
lease=10

need_root "scripts/demo-api.sh"
need_disk 6
need_packages ca-certificates curl git build-essential pkg-config musl-tools util-linux procps iproute2 python3-venv
need_rust
exec 9>"$target/demo.lock"
flock -n 9 || { say "Waiting for another demo of this checkout"; flock 9; }

say "Building the runner and the API server"
"$top/scripts/build.sh" >&2
(cd "$top" && cargo build --locked --release -p web-api >&2)
runner=$target/release/runner
api=$target/release/vm0-api
need_nats
export VM0_RUNNER_HOME=${VM0_RUNNER_HOME:-$HOME/.vm0-runner}
(umask 077 && mkdir -p "$VM0_RUNNER_HOME")
root_runner() { as_root env VM0_RUNNER_HOME="$VM0_RUNNER_HOME" "$runner" "$@"; }

say "Preparing the host: runner setup, and building the image of $profile (a minute or two the first time)"
root_runner setup >&2
root_runner build --profile "$profile" >&2

work=$(mktemp -d)
chmod 0755 "$work"
web=vm0-demo-api-$$
hosts=("vm0-demo-a-$$" "vm0-demo-b-$$")
# Ends what was started, by the numbers that were noted when it was.
end() {
    local file pid
    for file in "$@"; do
        pid=$(cat "$work/$file.pid" 2>/dev/null) || continue
        as_root kill "-${signal:-TERM}" "$pid" 2>/dev/null || true
        # It is not our child where sudo is between us.
        while as_root kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
        rm -f "$work/$file.pid"
    done
}
finish() {
    local place
    trap - EXIT INT TERM
    say "Cleaning up"
    [ -z "${follower-}" ] || kill "$follower" 2>/dev/null || true
    end runner-1 runner-2
    end api-1 api-2 nats
    wait 2>/dev/null || true
    for place in "${hosts[@]}" "$web"; do
        as_root ip netns delete "$place" 2>/dev/null || true
    done
    as_root rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAMESPACE NAME COMMAND...: its process number is noted, its output goes to a log.
start() {
    local place=$1 what=$2
    shift 2
    # shellcheck disable=SC2016 # expanded by the inner shell, which becomes the program
    as_root ip netns exec "$place" sh -c 'echo $$ >"$1" && shift && exec "$@"' sh "$work/$what.pid" "$@" \
        >>"$work/$what.log" 2>&1 9>&- &
}
# until_so WHAT SECONDS COMMAND...
until_so() {
    local what=$1 deadline=$((SECONDS + $2))
    shift 2
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || die "not within its time: $what" "its log is in $work, which is removed now; see the end of it: $(tail -n 3 "$work"/*.log 2>/dev/null | tail -n 12)"
        sleep 0.2
    done
}

say "Making the network: the API's namespace, and one for each runner"
as_root ip netns add "$web"
as_root ip -n "$web" link set lo up
as_root ip -n "$web" link add hosts type bridge
for address in 198.18.43.1 "${replicas[@]}"; do as_root ip -n "$web" address add "$address/24" dev hosts; done
as_root ip -n "$web" link set hosts up
for i in 0 1; do
    as_root ip netns add "${hosts[i]}"
    as_root ip -n "${hosts[i]}" link set lo up
    as_root ip -n "${hosts[i]}" link add uplink type veth peer name "host$i" netns "$web"
    as_root ip -n "$web" link set "host$i" master hosts up
    as_root ip -n "${hosts[i]}" address add "198.18.43.$((10 + i))/24" dev uplink
    as_root ip -n "${hosts[i]}" link set uplink up
    as_root ip -n "${hosts[i]}" route add default via 198.18.43.1
done
cat /etc/hosts >"$work/hosts"
for address in "${replicas[@]}"; do echo "$address $name" >>"$work/hosts"; done
echo "nameserver 198.18.43.1" >"$work/resolv.conf"

say "Starting NATS and two API replicas: vm0-api serve"
cat >"$work/nats.conf" <<NATS
listen: "127.0.0.1:4222"
jetstream { store_dir: "$work/nats", sync_interval: always }
accounts { SYS { users: [{user: sys, password: sys}] }, APP { jetstream: enabled, users: [{user: app, password: app}] } }
system_account: SYS
NATS
start "$web" nats "$VM0_TEST_NATS" -c "$work/nats.conf"
in_web() { as_root ip netns exec "$web" env VM0_NATS_URL=nats://app:app@127.0.0.1:4222 VM0_NATS_SYSTEM_URL=nats://sys:sys@127.0.0.1:4222 "$@"; }
nats_is_up() { in_web bash -c 'exec 3<>/dev/tcp/127.0.0.1/4222' 2>/dev/null; }
until_so "NATS listens" 20 nats_is_up
in_web "$api" master-key --out "$work/master.key" >&2
key=$(in_web "$api" token create --kind client --group "$group" --name demo 2>/dev/null | grep -o 'vm0_key_[A-Za-z0-9_-]*')
token=$(in_web "$api" token create --kind runner --group "$group" --name demo 2>/dev/null | grep -o 'vm0_runner_[A-Za-z0-9_-]*')
for i in 0 1; do
    start "$web" "api-$((i + 1))" env VM0_NATS_URL=nats://app:app@127.0.0.1:4222 VM0_NATS_SYSTEM_URL=nats://sys:sys@127.0.0.1:4222 \
        "$api" serve --listen "${replicas[i]}:80" --master-key "$work/master.key" --lease-secs "$lease"
done
# In the API's namespace, as a client somewhere on the internet. Either replica answers: curl goes on to the next address.
call() {
    local method=$1 path=$2
    shift 2
    as_root ip netns exec "$web" curl -sS --fail-with-body --max-time 60 -X "$method" -H "Authorization: Bearer $key" \
        --resolve "$name:80:${replicas[0]},${replicas[1]}" "$@" "http://$name$path"
}
is_ready() { as_root ip netns exec "$web" curl -fs -o /dev/null "http://$1/readyz" 2>/dev/null; }
for address in "${replicas[@]}"; do until_so "the replica at $address is ready" 60 is_ready "$address"; done

say "Starting two runners: runner start --api-url http://$name"
(umask 077 && printf '%s\n' "$token" >"$work/runner.token")
for i in 1 2; do
    "$runner" config --name "demo-api-$i" --group "$group" --profile "$profile" >&2
    # In a mount namespace that knows the API by name.
    # shellcheck disable=SC2016 # expanded by the inner shell
    start "${hosts[i - 1]}" "runner-$i" env VM0_RUNNER_HOME="$VM0_RUNNER_HOME" USE_MOCK_CLAUDE=true unshare --mount sh -c \
        'mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf && shift 2 && exec "$@"' sh "$work/hosts" "$work/resolv.conf" \
        "$runner" start --config "$VM0_RUNNER_HOME/runners/demo-api-$i/runner.yaml" --api-url "http://$name" --api-token-file "$work/runner.token"
done
fleet() { call GET /api/runners | python3 -c 'import json,sys; print(sum(r["heartbeat"]["mode"] == "running" for r in json.load(sys.stdin)["runners"]))'; }
both_are_there() { [ "$(fleet)" = 2 ]; }
until_so "both runners are registered" 120 both_are_there

field() { python3 -c 'import json,sys; v=json.load(sys.stdin)
for k in sys.argv[1].split("."): v=(v or {}).get(k)
print("" if v is None else v)' "$1"; }
create() {
    python3 -c 'import json,sys; print(json.dumps({"group": sys.argv[1], "profile": sys.argv[2], "prompt": sys.argv[3],
"onRunnerLost": {"do": "retry", "maxAttempts": 3}}))' "$group" "$profile" "$1" |
        call POST /api/runs -H 'Content-Type: application/json' --data-binary @- | field runId
}
say "Making 6 runs through the API; each is to be tried again if its runner is lost"
runs=()
for n in 1 2 3 4 5 6; do
    seconds=$((n <= 2 ? 15 : 1))
    runs+=("$(create "for i in \$(seq $seconds); do echo \"run $n: step \$i of $seconds\"; sleep 1; done; exit $((n == 6 ? 7 : 0))")")
done

# The text of server-sent events, as it comes.
show='import json, sys
for line in iter(sys.stdin.readline, ""):
    if line.startswith("data:"):
        for text in json.loads(line[5:]).get("text", "").splitlines():
            print("          |", text, flush=True)'
say "Following run ${runs[0]%%-*} live (server-sent events, resumed where it broke off)"
(
    last=
    while :; do
        # Ends when the run does, or with the replica.
        { call GET "/api/runs/${runs[0]}/output" -N --max-time 120 ${last:+-H "Last-Event-ID: $last"} 2>/dev/null || true; } | tee "$work/feed" |
            python3 -uc "$show" >&2 || true
        last=$(sed -n 's/^id: *//p' "$work/feed" | tail -n 1)
        ! grep -q '^event: *end' "$work/feed" || break
    done
) 9>&- &
follower=$!

is_taken() { [ "$(call GET "/api/runs/$1" | field state)" = running ]; }
until_so "the first two runs have begun" 60 is_taken "${runs[0]}"
until_so "the first two runs have begun" 60 is_taken "${runs[1]}"
say "Killing a replica: ${replicas[0]}"
signal=KILL end api-1
victim=$(call GET "/api/runs/${runs[1]}" | field holder.runnerName)
say "Killing a runner: $victim, which has run ${runs[1]%%-*}"
signal=KILL end "runner-${victim##*-}"

all_done() {
    local run
    for run in "${runs[@]}"; do [ "$(call GET "/api/runs/$run" | field state)" = "done" ] || return 1; done
}
until_so "every run is answered" $((lease * 6 + 120)) all_done
wait "$follower" || true
follower=
say "Every run is answered"
status=0
printf '%-10s %-6s %-9s %-14s %s\n' run exit attempts runner ended
for n in "${!runs[@]}"; do
    run=$(call GET "/api/runs/${runs[n]}")
    code=$(field result.exitCode <<<"$run")
    printf '%-10s %-6s %-9s %-14s %s\n' "${runs[n]%%-*}" "$code" "$(field epoch <<<"$run")" "$(field holder.runnerName <<<"$run")" "$(field result.reason <<<"$run")"
    [ "$code" = $((n == 5 ? 7 : 0)) ] || status=1
done
[ "$status" = 0 ] || die "a run was not answered as it should have been"
