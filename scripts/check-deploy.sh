#!/usr/bin/env bash
# Checks the deployment examples in deploy/ with the tools of those who run them: systemd-analyze, docker-compose,
# kubernetes-validate and NATS itself. Starts nothing of them.
#
# usage: scripts/check-deploy.sh KUBERNETES_VALIDATE NATS_SERVER
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 2 ] || die "usage: scripts/check-deploy.sh KUBERNETES_VALIDATE NATS_SERVER"
deploy=$top/deploy
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# The programs that the units name are not installed here, which systemd-analyze counts as a fault.
for unit in "$deploy"/systemd/*.service; do
    sed "s|^ExecStart=/usr/local/bin/[a-z0-9-]*|ExecStart=$(command -v true)|" "$unit" >"$dir/${unit##*/}"
done
said=$(systemd-analyze verify --man=no "$dir"/*.service 2>&1) || die "systemd-analyze verify refuses a unit of deploy/systemd: $said"
# A setting that it does not know is only a warning.
[ -z "$said" ] || ! grep -F "$dir" <<<"$said" >&2 || die "systemd-analyze verify warns of a unit of deploy/systemd"

APP_PASSWORD=a SYS_PASSWORD=s VM0_UID=1:1 docker-compose --file "$deploy/compose/docker-compose.yml" config --quiet
if docker-compose --file "$deploy/compose/docker-compose.yml" --env-file /dev/null config --quiet 2>/dev/null; then
    die "deploy/compose/docker-compose.yml starts without passwords"
fi

"$1" --strict --quiet "$deploy"/kubernetes/*.yaml

# The three configurations of NATS, as NATS reads them.
sed -n 's/^    //p' <<<"$(sed -n '/^  nats.conf: |/,/^---/p' "$deploy/kubernetes/nats.yaml")" >"$dir/cluster.conf"
[ -s "$dir/cluster.conf" ] || die "deploy/kubernetes/nats.yaml holds no nats.conf"
for config in "$deploy/systemd/nats.conf" "$deploy/compose/nats.conf" "$dir/cluster.conf"; do
    APP_PASSWORD=a SYS_PASSWORD=s POD_NAME=n0 quietly "$2" -t -c "$config" || die "NATS refuses $config"
    grep -q 'sync_interval: always' "$config" || die "$config does not sync every write"
done
