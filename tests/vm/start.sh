#!/bin/sh
# In the guest, after switch_root: what systemd would have made, then the command that the host left in /vm.
: > /vm/booted
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o mode=755,nosuid dev /dev
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
for folder in /run /tmp; do mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$folder"; done
# Device files work there, as in the root of a plain Debian.
mount -t tmpfs -o mode=1777,nosuid tmpfs /var/tmp
chmod 755 /run
for folder in /etc /var/lib/enclos-cluster; do
    mkdir -p "$folder"
    mount -t tmpfs -o mode=755 tmpfs "$folder"
done
tar -C /etc -xf /vm/etc.tar
mount --make-rshared /
# What systemd lets the kernel load at the first use: their nodes below /dev are there only then.
modprobe -a loop fuse
ln -sfn /proc/self/fd /dev/fd
ip link set lo up
hostname vm
date -s "@$(cat /vm/clock)" > /dev/null
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=vt100 LANG=C.UTF-8
. /vm/variables
# Only possible while there is no other network namespace.
if [ "${ENCLOS_RDMA:-}" = exclusive ]; then modprobe ib_core netns_mode=0; fi
# Programs lock the memory that they send from; sites with RDMA let them.
ulimit -l unlimited
sh /vm/command < /dev/console > /dev/console 2>&1
echo $? > /vm/status
dmesg > /vm/dmesg
sync
echo o > /proc/sysrq-trigger
# The first process must not end before the machine does.
while :; do read -r _ < /dev/console; done
