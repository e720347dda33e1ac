# shellcheck shell=bash
# What cf-ssh.sh and dev-runner.sh share: settings, ssh, quoting. Sourced, never run.
#
# These scripts run on laptops too, whose bash is 3.2: no associative arrays, no ${x,,}, no mapfile, and under `set -u` an
# empty array has to be written ${a[@]+"${a[@]}"}.

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf '[runner] %s\n' "$*" >&2; }

# die MESSAGE [HINT]
die() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

# Prints the comment at the top of a script.
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$1" >&2; }

# Reads the settings; what is not set there is empty. Nothing is exported: a secret is for the program that needs it.
load_settings() {
    local file=${RUNNER_ENV_FILE:-$scripts/.env.local} name
    if [ -f "$file" ]; then
        # shellcheck disable=SC1090 # the user's own
        . "$file"
    elif [ -n "${RUNNER_ENV_FILE-}" ]; then
        die "$file, which RUNNER_ENV_FILE names, is not there"
    fi
    for name in RUNNER_LOCAL_HOST RUNNER_LOCAL_USER RUNNER_SSH_KEY RUNNER_SSH_PORT RUNNER_SSH_KNOWN_HOSTS \
        RUNNER_DEFAULT_GROUP RUNNER_PROFILES RUNNER_CONFIG_OPTIONS RUNNER_BUILD_OPTIONS RUNNER_BINARY VM0_API_URL \
        VM0_RUNNER_TOKEN CF_ACCESS_CLIENT_ID CF_ACCESS_CLIENT_SECRET CF_ACCESS_CLIENT_ID_PROD \
        CF_ACCESS_CLIENT_SECRET_PROD CF_ACCESS_HOSTNAME; do
        eval "$name=\${$name-}"
    done
}

# The Access application of a host: its domain is the last two labels, the others are joined by hyphens, as one
# wildcard certificate covers one level of names only.
access_hostname() {
    local name=$1 domain rest
    case $name in
    *.*.*)
        rest=${name%.*.*}
        domain=${name#"$rest".}
        printf '%s-ssh.%s' "$(printf %s "$rest" | tr . -)" "$domain"
        ;;
    *) printf %s "$name" ;;
    esac
}

# connect HOST [SSH OPTIONS] -- [COMMAND…]: becomes ssh to the host.
connect() {
    local target=$1 id=$CF_ACCESS_CLIENT_ID secret=$CF_ACCESS_CLIENT_SECRET name
    shift
    # A connection that is gone is noticed within a minute, and a host that does not answer within half a one.
    set -- -o ServerAliveInterval=15 -o ServerAliveCountMax=3 -o ConnectTimeout=30 "$@"
    [ -z "$RUNNER_SSH_KEY" ] || set -- -i "$RUNNER_SSH_KEY" -o IdentitiesOnly=yes "$@"
    [ -z "$RUNNER_SSH_PORT" ] || set -- -p "$RUNNER_SSH_PORT" "$@"
    [ -z "$RUNNER_SSH_KNOWN_HOSTS" ] || set -- -o "UserKnownHostsFile=$RUNNER_SSH_KNOWN_HOSTS" "$@"
    case $target in
    *@*) ;;
    *) [ -z "$RUNNER_LOCAL_USER" ] || set -- -l "$RUNNER_LOCAL_USER" "$@" ;;
    esac
    name=${target#*@}
    case $name in
    -*) die "\"$name\" is not a host" ;;
    prod-*)
        id=${CF_ACCESS_CLIENT_ID_PROD:-$id}
        secret=${CF_ACCESS_CLIENT_SECRET_PROD:-$secret}
        ;;
    esac
    if [ -n "$id" ] && [ -n "$secret" ]; then
        command -v cloudflared >/dev/null ||
            die "cloudflared, which Cloudflare Access needs, is not installed" "install it, or empty CF_ACCESS_CLIENT_ID in scripts/.env.local for plain ssh"
        # cloudflared reads these two from its environment, which only you and root can look at.
        export TUNNEL_SERVICE_TOKEN_ID=$id TUNNEL_SERVICE_TOKEN_SECRET=$secret
        set -- -o "ProxyCommand=cloudflared access ssh --hostname $(quote "${CF_ACCESS_HOSTNAME:-$(access_hostname "$name")}")" "$@"
    elif [ -n "$id$secret" ]; then
        die "Cloudflare Access needs both CF_ACCESS_CLIENT_ID and CF_ACCESS_CLIENT_SECRET" "set both in scripts/.env.local, or neither for plain ssh"
    fi
    # Options end here: what follows is the host and its command.
    local all=("$@") before=() i=0
    while [ "${all[$i]}" != -- ]; do
        before[${#before[@]}]=${all[$i]}
        i=$((i + 1))
    done
    exec ssh "${before[@]}" -- "$target" ${all[@]+"${all[@]:$((i + 1))}"}
}

# Quotes one word for a POSIX shell, whatever is in it. (By hand: ${x//…} treats quotes differently from bash to bash,
# and printf %q writes $'…', which sh does not know.)
quote() {
    local rest=$1 out=
    while :; do
        case $rest in
        *\'*)
            out=$out${rest%%\'*}"'\\''"
            rest=${rest#*\'}
            ;;
        *) break ;;
        esac
    done
    printf "'%s'" "$out$rest"
}

# Quotes all its words.
quote_all() {
    local word
    for word in "$@"; do
        quote "$word"
        printf ' '
    done
}
