#!/bin/sh
# Makes the root file system of a metal host: the distribution of this machine with systemd, an ssh server, what
# `runner setup` would install, and a user who is not root and has passwordless sudo.
#
#   root.sh DIRECTORY SOURCES      SOURCES: apt's sources of the images, deb822
set -eu
directory=$1 sources=$2
# shellcheck source=/dev/null
. /etc/os-release
case $(uname -m) in
aarch64) qemu="qemu-system-arm" ;;
*) qemu="qemu-system-x86" ;;
esac
packages=systemd,systemd-sysv,dbus,openssh-server,sudo,curl,ca-certificates,procps,iproute2,nftables,python3-venv,mmdebstrap
packages=$packages,erofs-utils,e2fsprogs,lz4,xz-utils,zstd,openssl,util-linux,$qemu
# What building the full image needs beside: the slow tier verifies one.
rm -rf "$directory.new"
mmdebstrap --quiet --variant=minbase --include="$packages${EXTRA_PACKAGES:+,$EXTRA_PACKAGES}" "$VERSION_CODENAME" "$directory.new" - <"$sources"
chroot "$directory.new" useradd --create-home --shell /bin/bash --groups adm dev
echo 'dev ALL=(ALL) NOPASSWD: ALL' >"$directory.new/etc/sudoers.d/dev"
echo metal >"$directory.new/etc/hostname"
rm -rf "$directory.new/etc/apt/sources.list" "$directory.new"/etc/apt/sources.list.d/*
cp "$sources" "$directory.new/etc/apt/sources.list.d/build.sources"
# A container's own cgroups are read-only where they are of the first version; a metal host's are not.
cat >"$directory.new/etc/systemd/system/writable-cgroups.service" <<'UNIT'
[Unit]
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'for at in /sys/fs/cgroup /sys/fs/cgroup/*; do if mountpoint -q "$at"; then mount -o remount,bind,rw "$at"; fi; done'
[Install]
WantedBy=sysinit.target
UNIT
chroot "$directory.new" systemctl enable --quiet writable-cgroups.service
mv "$directory.new" "$directory"
