#!/bin/sh
# The full image's npm packages, fetched by the host's npm and copied into the tree. $1 is the root tree; the current directory
# holds this directory's files. Nothing of the packages runs on the host: no install scripts, and the checks run in the tree.
set -eu
root=$1

case $IMAGE_ARCH in
  amd64) cpu=x64 ;;
  arm64) cpu=arm64 ;;
  *) echo "the full image cannot be built for $IMAGE_ARCH: its tools exist for amd64 and arm64" >&2; exit 1 ;;
esac
command -v npm >/dev/null || { echo "npm is not installed; try: apt-get install npm" >&2; exit 1; }

# Fails when a package is not bit for bit what package-lock.json says.
npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error

take() { # FILE TARGET: a program; the optional packages of other processors are not there, so its absence is an error.
  [ -f "node_modules/$1" ] || { echo "npm did not bring $1" >&2; exit 1; }
  install -D -m 0755 "node_modules/$1" "$root$2"
}
licence() { install -D -m 0644 "node_modules/$1" "$root/usr/local/share/licenses/$2"; }

take "@anthropic-ai/claude-code-linux-$cpu/claude" /usr/local/bin/claude
licence "@anthropic-ai/claude-code-linux-$cpu/LICENSE.md" claude-code
take "node-linux-$cpu/bin/node" /usr/local/bin/node
licence "node-linux-$cpu/LICENSE" node
take "agent-browser/bin/agent-browser-linux-$cpu" /usr/local/lib/agent-browser/bin/agent-browser
licence agent-browser/LICENSE agent-browser

cp -R node_modules/agent-browser/skills node_modules/agent-browser/skill-data "$root/usr/local/lib/agent-browser/"
mkdir -p "$root/usr/local/lib/node_modules"
cp -R node_modules/npm "$root/usr/local/lib/node_modules/npm"
for program in npm npx; do
  chmod 0755 "$root/usr/local/lib/node_modules/npm/bin/$program-cli.js"
  ln -s "../lib/node_modules/npm/bin/$program-cli.js" "$root/usr/local/bin/$program"
done
chown -R 0:0 "$root/usr/local/lib" "$root/usr/local/bin"
chmod -R go=rX "$root/usr/local/lib"

install -m 0755 agent-browser.sh "$root/usr/local/bin/agent-browser"

# Browsers look into a list of their own for authorities that are not built in. The key database beside it is empty, and its random salt
# is all that differs from build to build.
for home in user:/home/user root:/root; do
  account=${home%%:*} list=${home#*:}/.pki/nssdb
  chroot --userspec="$account:$account" "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME="${home#*:}" sh -eu -c '
    umask 077
    mkdir -p "$1"
    certutil -N -d "sql:$1" --empty-password
    certutil -A -d "sql:$1" -n vm0-runner-proxy -t C,, -i /usr/local/share/ca-certificates/vm0-runner-proxy.crt
    certutil -L -d "sql:$1" -n vm0-runner-proxy >/dev/null' sh "$list" </dev/null
done

# A tool that does not start is found here and not by the first job.
for check in 'claude --version' 'node --version' 'npm --version' 'agent-browser --version' 'chromium-headless-shell --version' \
  'python3 --version' 'rg --version' 'jq --version' 'git --version'; do
  chroot --userspec=1000:1000 "$root" /usr/bin/env -i HOME=/tmp PATH=/usr/local/bin:/usr/bin:/bin \
    sh -c "$check" >/dev/null </dev/null || { echo "\`$check\` fails in the new image" >&2; exit 1; }
done
find "$root/tmp" -mindepth 1 -delete
