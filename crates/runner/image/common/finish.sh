#!/bin/sh
# Every flavour, last: files that must not come from the host, and nothing that differs from build to build. $1 is the root tree.
set -eu
root=$1

printf 'sandbox\n' > "$root/etc/hostname"
cat > "$root/etc/hosts" <<'EOF'
127.0.0.1 localhost sandbox
::1 localhost ip6-localhost ip6-loopback
EOF
# A link here (to systemd-resolved's file, say) would be followed out of the tree.
rm -f "$root/etc/resolv.conf"
# The gateway of every VM; it has no IPv6, so nobody need ask for such addresses.
printf 'nameserver 192.168.241.1\noptions timeout:2 attempts:2 no-aaaa\n' > "$root/etc/resolv.conf"
rm -f "$root/etc/machine-id" "$root/var/lib/dbus/machine-id"
: > "$root/etc/machine-id"

for dir in var/log var/cache/apt var/cache/debconf var/cache/ldconfig var/lib/apt/lists tmp var/tmp run root/.npm root/.cache; do
  [ -d "$root/$dir" ] || continue
  find "$root/$dir" -xdev -mindepth 1 ! -type d -delete
done
home=$root/root
rm -rf --one-file-system "$home/.npm" "$home/.cache" "$root/var/lib/apt/lists/partial"
rm -f "$root"/etc/passwd- "$root"/etc/group- "$root"/etc/shadow- "$root"/etc/gshadow- "$root"/etc/subuid- "$root"/etc/subgid- \
  "$root"/var/lib/dpkg/*-old "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/.dockerenv"
chmod 0755 "$root"
chmod 1777 "$root/tmp" "$root/var/tmp"
