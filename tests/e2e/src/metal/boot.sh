#!/bin/sh
# Boots a metal host in a mount namespace of its own, and becomes its container's manager.
#
#   boot.sh ROOT DIRECTORY NETNS NUMBER     DIRECTORY holds upper, work and merged
set -eu
root=$1 directory=$2 netns=$3 number=$4
mount -t overlay overlay -o "lowerdir=$root,upperdir=$directory/upper,workdir=$directory/work" "$directory/merged"
# Groups of its own in every hierarchy, or two hosts would share theirs. (cpuset's are born without CPUs.)
for group in /sys/fs/cgroup /sys/fs/cgroup/*; do
    case $group in */cpuset) continue ;; esac
    [ -e "$group/cgroup.procs" ] || continue
    mkdir -p "$group/vm0e2e-$number"
    echo $$ >"$group/vm0e2e-$number/cgroup.procs"
done
set -- --bind=/dev/net/tun
[ ! -e /dev/kvm ] || set -- "$@" --bind=/dev/kvm
# With control groups of the second version, its manager filters devices by programs of the kernel's.
[ -z "${SYSTEMD_NSPAWN_UNIFIED_HIERARCHY-}" ] || set -- "$@" --system-call-filter=bpf
export SYSTEMD_NSPAWN_API_VFS_WRITABLE=yes
exec systemd-nspawn --quiet --register=no --keep-unit --directory="$directory/merged" --machine="metal-$number" \
    --hostname=metal --network-namespace-path="$netns" --resolv-conf=off --link-journal=no --boot --capability=all --console=pipe "$@"
