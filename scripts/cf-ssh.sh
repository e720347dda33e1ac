#!/usr/bin/env bash
# A shell or a command on a host, through Cloudflare Access when its credentials are set, by plain ssh otherwise.
#
#   scripts/cf-ssh.sh HOST [SSH OPTIONS] [-- COMMAND]
#
#   scripts/cf-ssh.sh metal-1.example.com
#   scripts/cf-ssh.sh metal-1.example.com -- 'nproc && free -m'
#   scripts/cf-ssh.sh metal-1.example.com -t -- top
#
# Settings come from scripts/.env.local (RUNNER_ENV_FILE names another file); scripts/.env.example explains each.
# Exit status: the command's, 255 where ssh itself failed.
set -euo pipefail
# shellcheck source=scripts/remote.sh
. "$(dirname "$0")/remote.sh"

case ${1-} in '' | -*)
    usage "$0"
    [ "${1-}" = -h ] || [ "${1-}" = --help ] || exit 2
    exit
    ;;
esac
host=$1
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options[${#options[@]}]=$1
    shift
done
[ $# = 0 ] || shift
load_settings
connect "$host" ${options[@]+"${options[@]}"} -- "$@"
