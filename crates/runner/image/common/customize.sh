#!/bin/sh
# Every flavour: the agent's account, its rights, locale and time zone. $1 is the root tree.
set -eu
root=$1

chroot "$root" groupadd --gid 1000 user
chroot "$root" useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash user
printf 'user ALL=(ALL:ALL) NOPASSWD:ALL\n' > "$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"
# sudo looks its own host name up; without a network that must not wait for a resolver.
printf 'Defaults !fqdn\n' > "$root/etc/sudoers.d/no-fqdn"
chmod 0440 "$root/etc/sudoers.d/no-fqdn"

cat > "$root/etc/environment" <<'EOF'
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LANG=C.UTF-8
TZ=UTC
EOF
# The proxy that carries all of the VM's traffic speaks for every host with certificates of this authority. Most programs trust the
# system's list, which it joins; the variables are for those that bring a list of their own.
install -D -m 0644 proxy-ca.crt "$root/usr/local/share/ca-certificates/vm0-runner-proxy.crt"
chroot "$root" update-ca-certificates --fresh >/dev/null
bundle=/etc/ssl/certs/ca-certificates.crt
sed -n 2p proxy-ca.crt | grep -qFf - "$root$bundle" || { echo "the proxy's authority is missing in the image's list" >&2; exit 1; }
cat >> "$root/etc/environment" <<EOF
SSL_CERT_FILE=$bundle
CURL_CA_BUNDLE=$bundle
GIT_SSL_CAINFO=$bundle
REQUESTS_CA_BUNDLE=$bundle
PIP_CERT=$bundle
CARGO_HTTP_CAINFO=$bundle
AWS_CA_BUNDLE=$bundle
NODE_EXTRA_CA_CERTS=/usr/local/share/ca-certificates/vm0-runner-proxy.crt
UV_NATIVE_TLS=true
DENO_TLS_CA_STORE=system
EOF
printf 'LANG=C.UTF-8\n' > "$root/etc/default/locale"
printf 'Etc/UTC\n' > "$root/etc/timezone"
# One archive instead of twelve files, which every program that looks at LANG would open one after the other: a bash that starts
# executes 15 % fewer instructions.
chroot "$root" localedef --add-to-archive /usr/lib/locale/C.utf8 >/dev/null
