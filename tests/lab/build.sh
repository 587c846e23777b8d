#!/bin/sh
# Runs as root inside the new Debian tree, with the kernel's package in /katavm-lab, and leaves there:
#   root.erofs  vmlinux  modules/NN-NAME.ko  lib/  qemu/{bin,lib,share}
set -eu
cd /katavm-lab
mkdir -p kernel modules lib qemu/bin qemu/lib qemu/share

# The kernel, as the plain ELF file that QEMU boots by its PVH entry: no decompression under emulation.
dpkg -x linux-image-*.deb kernel
python3 - kernel/boot/vmlinuz-* >vmlinux.zst <<'PY'
import struct, sys
image = open(sys.argv[1], "rb").read()
setup_sectors = image[0x1F1] or 4
offset, length = struct.unpack_from("<II", image, 0x248)  # payload_offset, payload_length (boot protocol 2.08)
start = (setup_sectors + 1) * 512 + offset
sys.stdout.buffer.write(image[start : start + length - 4])  # the last 4 bytes are the unpacked size
PY
zstd -dq --rm vmlinux.zst

# Its modules, without those of hardware that the lab does not have, and unpacked: xz under emulation is slow.
release=$(ls kernel/usr/lib/modules)
modules=/usr/lib/modules/$release
mkdir -p /usr/lib/modules
mv "kernel$modules" /usr/lib/modules/
for unused in sound drivers/gpu drivers/media drivers/net/wireless drivers/net/ethernet drivers/net/usb \
    drivers/net/can drivers/infiniband drivers/iio drivers/hid drivers/usb drivers/scsi drivers/staging \
    drivers/bluetooth drivers/hwmon drivers/mmc drivers/mtd drivers/platform drivers/input drivers/ata; do
    rm -rf "$modules/kernel/$unused"
done
find "$modules/kernel" -name '*.ko.xz' -exec xz -d {} +
# And without their signatures: checking them takes more than a second of each boot.
find "$modules/kernel" -name '*.ko' -print0 >module-files
python3 - module-files <<'PY'
import struct, sys
MAGIC = b"~Module signature appended~\n"  # include/linux/module_signature.h: data, signature, 12 bytes of sizes, this
for path in filter(None, open(sys.argv[1], "rb").read().split(b"\0")):
    with open(path, "rb+") as file:
        data = file.read()
        if data.endswith(MAGIC):
            (length,) = struct.unpack_from(">I", data, len(data) - len(MAGIC) - 4)
            file.truncate(len(data) - len(MAGIC) - 12 - length)
PY
rm module-files
depmod "$release"

# What the initrd loads, in the order in which it must be loaded.
number=10
for module in virtio_blk erofs overlay 9pnet_virtio 9p kvm-amd tun loop; do
    for file in $(modprobe -S "$release" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'); do
        name=$(basename "$file")
        ls modules | grep -q -- "-$name\$" && continue
        cp "$file" "modules/$number-$name"
        number=$((number + 1))
    done
done

# The libraries of a Rust program, for the initrd.
for library in ld-linux-x86-64.so.2 libc.so.6 libm.so.6 libgcc_s.so.1; do
    cp -L "/usr/lib/x86_64-linux-gnu/$library" lib/
done

# QEMU, so that the machine outside can run this one whatever its own version is.
cp /usr/bin/qemu-system-x86_64 qemu/bin/
if python3 mend-qemu.py qemu/bin/qemu-system-x86_64 2>qemu/flaw; then rm qemu/flaw; else cat qemu/flaw; fi
ldd /usr/bin/qemu-system-x86_64 | sed -n 's/.* => \(\/[^ ]*\).*/\1/p' | while read -r library; do
    cp -L "$library" qemu/lib/
done
cp -L /lib64/ld-linux-x86-64.so.2 qemu/lib/
for firmware in bios-256k.bin bios-microvm.bin; do cp -L "/usr/share/seabios/$firmware" qemu/share/; done
cp -L /usr/share/qemu/pvh.bin /usr/share/qemu/linuxboot_dma.bin /usr/share/qemu/kvmvapic.bin qemu/share/

# containerd of other Debian releases, each with its client and its shim for runc. They need nothing but the C library.
for package in containerd_*.deb; do
    dpkg -x "$package" other
    version=$(echo "${package#containerd_}" | cut -d . -f 1,2)
    mkdir "/opt/containerd-$version"
    for program in containerd ctr containerd-shim-runc-v2; do mv "other/usr/bin/$program" "/opt/containerd-$version/"; done
    "/opt/containerd-$version/containerd" --version >/dev/null
    rm -rf other
done

# The root file system: no service of an engine starts by itself, and systemd skips what a disposable machine does
# not need: each process that it starts costs tens of milliseconds here.
systemctl set-default multi-user.target
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
    e2scrub_reap.service containerd.service podman.service podman.socket podman-auto-update.timer \
    podman-auto-update.service podman-restart.service podman-clean-transient.service netavark-firewalld-reload.service \
    netavark-dhcp-proxy.service netavark-dhcp-proxy.socket; do
    systemctl disable -q "$unit" 2>/dev/null || true
done
systemctl mask -q getty@.service serial-getty@.service getty.target systemd-firstboot.service \
    modprobe@configfs.service modprobe@efi_pstore.service modprobe@drm.service modprobe@fuse.service \
    systemd-modules-load.service kmod-static-nodes.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
    systemd-random-seed.service systemd-journal-flush.service systemd-journal-catalog-update.service \
    systemd-hwdb-update.service systemd-pstore.service systemd-remount-fs.service systemd-tpm2-setup.service \
    systemd-tpm2-setup-early.service sys-kernel-config.mount sys-fs-fuse-connections.mount ldconfig.service
mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\n' >/etc/systemd/journald.conf.d/lab.conf
touch /etc/.updated /var/.updated
: >/etc/machine-id
echo katavm-lab >/etc/hostname
echo '127.0.0.1 localhost katavm-lab' >/etc/hosts
rm -f /etc/resolv.conf
# By way of tar: mkfs.erofs would stumble over the mounts of the build itself.
tar -C / --one-file-system --xattrs --xattrs-include='*' --exclude=./katavm-lab --exclude=./proc --exclude=./sys --exclude=./dev \
    --exclude='./run/*' --exclude='./tmp/*' --exclude='./var/tmp/*' --exclude='./var/cache/apt/*' \
    --exclude='./var/lib/apt/lists/*' -cf root.tar .
mkfs.erofs -T0 --quiet --tar=f root.erofs root.tar
rm -rf root.tar kernel ./*.deb build.sh mend-qemu.py
