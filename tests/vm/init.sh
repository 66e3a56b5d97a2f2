#!/bin/busybox sh
# First process of a guest: make the host's files its root, with what the guest writes on top in memory, and go on there.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
# The end of the first process is the end of the guest, which shows its console.
fail() { echo "init: cannot mount $1"; exit 1; }
while read -r module; do insmod "/lib/$module" || echo "init: $module not loaded"; done < /lib/order

# Nobody changes these files while a guest runs, so what was read once need not be asked for again.
read="trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro"
mount -t 9p -o "$read" host /lower || fail "the host's files"
mount -t tmpfs -o mode=755,size=75% upper /upper
mkdir /upper/upper /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work root /new || fail "the root"
mkdir -p /new/usr/lib/modules
mount -t 9p -o "$read" modules /new/usr/lib/modules
mkdir -p /new/vm
mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000" result /new/vm
umount /dev
umount /proc
exec switch_root /new /vm/start
