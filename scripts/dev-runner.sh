#!/usr/bin/env bash
# Your runner on a remote host, from a laptop.
#
#   scripts/dev-runner.sh deploy                       build, upload, start: jobs from the API
#   scripts/dev-runner.sh deploy-local                 the same, but jobs from the file queue, with the mock agent
#   scripts/dev-runner.sh submit PROFILE PROMPT [OPTIONS of `runner local submit`]
#   scripts/dev-runner.sh exec RUN COMMAND…            in a running job's VM, by the beginning of the run's id
#   scripts/dev-runner.sh logs [--follow] [-n N]       the service's journal
#   scripts/dev-runner.sh remove [--force] [--all]     take it off the host; --all: with images and CA, where no other runner is
#
# The options of submit are about the host: --secret, --firewall and --collect mean variables, files and directories there, not
# here. Ctrl-C cancels the job and shows its result; a second one leaves at once.
#
# Results go to stdout, everything else to stderr. A deploy may be run again after any failure; until its last step the
# runner that is there goes on, and that step ends none of its jobs.
#
# Settings come from scripts/.env.local (RUNNER_ENV_FILE names another file); scripts/.env.example explains each.
set -euo pipefail
# shellcheck source=scripts/remote.sh
. "$(dirname "$0")/remote.sh"

case ${1-} in
deploy | deploy-local | submit | exec | logs | remove) ;;
-h | --help)
    usage "$0"
    exit
    ;;
*)
    usage "$0"
    exit 2
    ;;
esac
action=$1
shift
load_settings
[ -n "$RUNNER_LOCAL_HOST" ] || die "RUNNER_LOCAL_HOST is not set" "copy scripts/.env.example to scripts/.env.local and fill it in"
[ -n "$RUNNER_DEFAULT_GROUP" ] || die "RUNNER_DEFAULT_GROUP is not set" "set it in scripts/.env.local, such as vm0/local-$(id -un)"
name=${RUNNER_DEFAULT_GROUP##*/}
case $RUNNER_DEFAULT_GROUP in
*[!a-z0-9/-]* | */*/* | /* | */) die "RUNNER_DEFAULT_GROUP \"$RUNNER_DEFAULT_GROUP\" is not of the form org/name, in lowercase letters, digits and hyphens" ;;
*/*) ;;
*) die "RUNNER_DEFAULT_GROUP \"$RUNNER_DEFAULT_GROUP\" is not of the form org/name" ;;
esac
profiles=${RUNNER_PROFILES:-vm0/default}

# Every remote script begins with this. Nothing of the caller's is put into a script as it is: only quoted words.
preamble="set -eu
name=$(quote "$name") group=$(quote "$RUNNER_DEFAULT_GROUP")
home=\$HOME/.vm0-runner
dir=\$home/bin/\$name
root() { if [ \"\$(id -u)\" = 0 ]; then \"\$@\"; else sudo -n -- \"\$@\"; fi; }
"

# become_remote SCRIPT: becomes an ssh that runs it there with sh; our stdin is its stdin.
become_remote() { connect "$RUNNER_LOCAL_HOST" -T -- "exec sh -c $(quote "$preamble$1")"; }

# remote SCRIPT: runs it there.
remote() { (become_remote "$1"); }

# One word of what a local file is.
checksum() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -d' ' -f1
}

# Writes a file to stdout and how far it is to stderr, where somebody looks.
send() {
    local file=$1 size=$2 sent=0 block=1048576 i=0
    while [ "$sent" -lt "$size" ]; do
        # A reader that is gone ends this; ssh says why.
        dd if="$file" bs=$block skip=$i count=1 2>/dev/null || return
        i=$((i + 1))
        sent=$((i * block))
        [ "$sent" -le "$size" ] || sent=$size
        [ ! -t 2 ] || printf '\r[runner] uploading %3d%% of %d MiB' $((sent * 100 / size)) $((size / block)) >&2
    done
    [ ! -t 2 ] || printf '\n' >&2
}

# Uploads the runner beside the one that is there, named by its checksum, and sets `staged` to its path as the remote shell
# reads it. Nothing is sent that is there already. The staged file stays for other deploys of the same build; it costs
# nothing while it is a link to the one that runs.
upload() {
    local file=$1 sum size
    sum=$(checksum "$file")
    size=$(wc -c <"$file" | tr -d ' ')
    # shellcheck disable=SC2016 # expanded on the host
    staged='"$dir"/.staged-'$sum
    if remote "umask 077
        [ -d \"\$home\" ] || mkdir -m 711 \"\$home\"
        mkdir -p \"\$dir\"
        # What a deploy that was cut off left, and what has not been deployed for a day.
        find \"\$dir\" -name '.upload-*' -mmin +60 -exec rm -f {} +
        find \"\$dir\" -name '.staged-*' -mmin +1440 -exec rm -f {} +
        [ ! -x $staged ] || exit 0
        [ -e \"\$dir/runner\" ] && [ \"\$(sha256sum <\"\$dir/runner\" | cut -d' ' -f1)\" = $sum ] || exit 3
        ln -f \"\$dir/runner\" $staged" </dev/null; then
        say "this runner is on the host already"
        return
    else
        [ $? = 3 ] || die "the host cannot be prepared" "what it said stands above"
    fi
    say "uploading the runner, $((size / 1048576)) MiB"
    send "$file" "$size" | remote "umask 077
        new=\$dir/.upload-\$\$
        trap 'rm -f \"\$new\"' EXIT
        cat >\"\$new\"
        # Half a file is what a connection that broke leaves.
        [ \"\$(sha256sum <\"\$new\" | cut -d' ' -f1)\" = $sum ]
        chmod 755 \"\$new\"
        mv \"\$new\" $staged" || die "the upload was not complete" "run it again"
}

# deploy api|local
deploy() {
    local mode=$1 arch binary profile hashes rootfs snapshot options config=
    if [ "$mode" = api ] && { [ -z "$VM0_API_URL" ] || [ -z "$VM0_RUNNER_TOKEN" ]; }; then
        die "API mode needs VM0_API_URL and VM0_RUNNER_TOKEN" "set both in scripts/.env.local, or use deploy-local"
    fi
    say "connecting to $RUNNER_LOCAL_HOST"
    arch=$(remote 'uname -sm' </dev/null) || die "$RUNNER_LOCAL_HOST cannot be reached" "try: scripts/cf-ssh.sh $RUNNER_LOCAL_HOST"
    case $arch in
    "Linux x86_64" | "Linux aarch64") arch=${arch#Linux } ;;
    *) die "$RUNNER_LOCAL_HOST is $arch, and runners are built for Linux on x86_64 and aarch64" ;;
    esac
    binary=$RUNNER_BINARY
    if [ -z "$binary" ]; then
        say "building for $arch"
        binary=$("$scripts/build.sh" --target "$arch")
    fi
    [ -f "$binary" ] || die "$binary, the runner to deploy, is not there"
    upload "$binary"

    options=
    # shellcheck disable=SC2086 # words
    for profile in $profiles; do options="$options --profile $(quote "$profile")"; done
    say "preparing the host"
    remote "root $staged setup$options >&2" </dev/null || die "\`runner setup\` failed on the host"
    say "removing what is not needed any more"
    remote "root $staged gc --keep-latest 3 >&2" </dev/null || die "\`runner gc\` failed on the host"
    # shellcheck disable=SC2086 # words
    for profile in $profiles; do
        say "building $profile"
        # shellcheck disable=SC2086 # words
        hashes=$(remote "root $staged build --profile $(quote "$profile") $(quote_all $RUNNER_BUILD_OPTIONS)" </dev/null) ||
            die "\`runner build --profile $profile\` failed on the host"
        rootfs=$(printf '%s\n' "$hashes" | sed -n 's/^rootfs_hash=//p')
        snapshot=$(printf '%s\n' "$hashes" | sed -n 's/^snapshot_hash=//p')
        case $rootfs:$snapshot in
        :* | *:) die "\`runner build --profile $profile\` printed no hashes" ;;
        esac
        config="$config --profile $(quote "$profile") --rootfs-hash $rootfs --snapshot-hash $snapshot"
    done
    # shellcheck disable=SC2086 # words
    config="$config $(quote_all $RUNNER_CONFIG_OPTIONS)"

    # The swap is one script that goes on when the connection breaks. The new runner takes the name only when it is ready;
    # where it does not become ready, the file of the old one is put back, and the old one has run all the time.
    say "starting vm0-runner-$name"
    options="--env-file \"\$PWD/service.env\""
    [ "$mode" = api ] || options="--local --env USE_MOCK_CLAUDE=true"
    environment "$mode" | remote "trap '' HUP PIPE
        umask 077
        mkdir -p \"\$home/runners/\$name\"
        cd \"\$home/runners/\$name\"
        exec 9>.deploy.lock
        flock 9
        cat >.service.env.new
        # An environment that did not arrive whole has no last line.
        [ \"\$(tail -n 1 .service.env.new)\" = '# end' ]
        keep() { rm -f \"\$2\"; [ ! -e \"\$1\" ] || ln \"\$1\" \"\$2\"; }
        back() { [ ! -e \"\$2\" ] || mv \"\$2\" \"\$1\"; }
        restore() {
            back runner.yaml .runner.yaml.old
            back service.env .service.env.old
            back \"\$dir/runner\" \"\$dir/.runner.old\"
            exit 1
        }
        keep runner.yaml .runner.yaml.old
        keep service.env .service.env.old
        keep \"\$dir/runner\" \"\$dir/.runner.old\"
        mv .service.env.new service.env
        $staged config --name \"\$name\" --group \"\$group\"$config >&2 || restore
        [ $staged -ef \"\$dir/runner\" ] || ln -f $staged \"\$dir/.runner.new\"
        [ ! -e \"\$dir/.runner.new\" ] || mv -f \"\$dir/.runner.new\" \"\$dir/runner\"
        root \"\$dir/runner\" service start --name \"\$name\" --config \"\$PWD/runner.yaml\" $options >&2 || restore
        rm -f .runner.yaml.old .service.env.old \"\$dir/.runner.old\"" ||
        die "the runner was not started" "what the host said stands above; a runner that was there before goes on"
    say "vm0-runner-$name runs on $RUNNER_LOCAL_HOST"
}

# The service's environment file: secrets travel on stdin.
environment() {
    if [ "$1" = api ]; then
        case $VM0_API_URL$VM0_RUNNER_TOKEN in *[[:cntrl:]]*) die "VM0_API_URL or VM0_RUNNER_TOKEN has a control character in it" ;; esac
        printf 'VM0_API_URL=%s\nVM0_API_TOKEN=%s\n' "$(env_value "$VM0_API_URL")" "$(env_value "$VM0_RUNNER_TOKEN")"
    fi
    echo '# end'
}

# A value as systemd reads it from a file: in double quotes, with ", \, $ and ` escaped.
env_value() { printf '"%s"' "$(printf %s "$1" | sed 's/[\\"$`]/\\&/g')"; }

submit() {
    [ $# -ge 2 ] || die "submit wants a profile and a prompt" "scripts/dev-runner.sh submit vm0/default 'nproc && free -m'"
    local profile=$1 prompt=$2 size pipe ssh status again
    shift 2
    # The prompt goes on stdin, where it may be as long as the runner takes it, after its length: that stdin ends, whatever ended
    # it, is how the host learns that nobody waits any more.
    size=$(printf %s "$prompt" | wc -c | tr -d ' ')
    pipe=$(mktemp -d)
    mkfifo "$pipe/stdin"
    # 5 for both ways, so that opening one of them does not wait for the other.
    # shellcheck disable=SC2094 # it is a pipe
    exec 5<>"$pipe/stdin" 3<"$pipe/stdin" 4>"$pipe/stdin" 5>&-
    rm -r "$pipe"
    # Where Ctrl-C does not reach it: the result of a cancelled job comes that way, too.
    (trap '' INT && become_remote "exec 3<&0
        umask 077
        prompt=\$(mktemp)
        read -r size <&3
        head -c \"\$size\" <&3 >\"\$prompt\"
        exec 4<\"\$prompt\"
        arrived=\$(wc -c <\"\$prompt\")
        rm -f \"\$prompt\"
        # Half a prompt is what a connection that broke leaves.
        [ \"\$arrived\" -eq \"\$size\" ]
        \"\$dir/runner\" local submit --group \"\$group\" --profile $(quote "$profile") --prompt-file - $(quote_all "$@") <&4 3<&- &
        submit=\$!
        { while read -r _; do :; done; kill -TERM \$submit; } <&3 >/dev/null 2>&1 &
        watch=\$!
        status=0
        wait \$submit || status=\$?
        kill \$watch 2>/dev/null || true
        exit \$status") <&3 3<&- 4>&- &
    ssh=$!
    exec 3<&-
    { printf '%s\n' "$size" && printf %s "$prompt"; } >&4 2>/dev/null &
    again=
    interrupted() {
        [ -z "$again" ] || kill "$ssh" 2>/dev/null || true
        again=1
        exec 4>&-
        say "cancelling the job; once more: leave at once"
    }
    trap interrupted INT TERM HUP
    # A signal ends the wait, too.
    while :; do
        status=0
        wait "$ssh" || status=$?
        kill -0 "$ssh" 2>/dev/null || break
    done
    if [ -n "$again" ]; then
        # It may have ended just then. 127: its status was told already.
        again=0
        wait "$ssh" 2>/dev/null || again=$?
        [ "$again" = 127 ] || status=$again
    fi
    return "$status"
}

in_vm() {
    [ $# -ge 2 ] || die "exec wants the beginning of a run's id and a command" "scripts/dev-runner.sh exec 6f1c 'ps aux'"
    local run=$1
    shift
    # As `runner exec` has it, and pnpm passes it on.
    [ "$1" != -- ] || [ $# = 1 ] || shift
    remote "exec \"\$dir/runner\" exec $(quote "$run") -- $(quote_all "$@")"
}

remove() {
    local force='' everything=''
    while [ $# -gt 0 ]; do
        case $1 in
        --force) force=--force ;;
        --all) everything=1 ;;
        *) die "remove does not know $1" "scripts/dev-runner.sh remove [--force] [--all]" ;;
        esac
        shift
    done
    # The files last, and the queue's group only when nobody else watches it: whatever breaks, running it again goes on.
    remote "trap '' HUP PIPE
        [ -d \"\$home\" ] || exit 0
        unit=vm0-runner-\$name.service
        if [ -x \"\$dir/runner\" ]; then
            root \"\$dir/runner\" service uninstall --name \"\$name\" $force >&2
        elif [ \"\$(systemctl show --property LoadState --value \"\$unit\")\" != not-found ]; then
            root systemctl disable --now --quiet \"\$unit\" >&2 || root systemctl stop \"\$unit\" >&2
            root rm -f \"/etc/systemd/system/\$unit\" \"/run/systemd/system/\$unit\"
            root systemctl daemon-reload
        fi
        others=\$(ls \"\$home/runners\" 2>/dev/null | grep -vx \"\$name\" || true)
        if [ -n '$everything' ] && [ -n \"\$others\" ]; then
            echo \"images and CA stay: they are also of\" \$others >&2
        elif [ -n '$everything' ]; then
            root rm -rf \"\$home\"
            exit 0
        fi
        # Logs of this runner's jobs: its own log names them.
        for log in \"\$home/logs/runner-\$name.log\" \"\$home/logs/runner-\$name.log.1\"; do
            [ -f \"\$log\" ] || continue
            sed -n 's/.*job starts run=\\([0-9a-f-]*\\) .*/\\1/p' \"\$log\" | while read -r run; do
                root rm -f \"\$home/logs/system-\$run.log\" \"\$home/logs/network-\$run.jsonl\"
            done
        done
        root rm -rf \"\$home/logs/runner-\$name.log\" \"\$home/logs/runner-\$name.log.1\" \"\$home/locks/service-\$name\" \"\$home/runners/\$name\"
        grep -ls \"^group: \$group\$\" \"\$home\"/runners/*/runner.yaml >/dev/null 2>&1 || root rm -rf \"\$home/groups/\$group\"
        root rm -rf \"\$dir\"" </dev/null || die "the runner was not removed" "what the host said stands above; --force also ends running jobs"
    say "runner $name is removed from $RUNNER_LOCAL_HOST"
}

case $action in
deploy) deploy api ;;
deploy-local) deploy local ;;
submit) submit "$@" ;;
exec) in_vm "$@" ;;
logs) remote "root \"\$dir/runner\" service logs --name \"\$name\" $(quote_all "$@")" </dev/null ;;
remove) remove "$@" ;;
esac
