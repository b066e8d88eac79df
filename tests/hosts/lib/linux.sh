# Debian's kernel as a guest with devices: its initramfs, its root disk, and what the virtual host needs of them.

# Sizes of the guest's disks.
readonly disk_mib=48 qcow2_mib=16

# The file that clients download: numbered lines, so that a piece that is missing or twice there is seen.
download_content() { seq -f 'line %012.0f of the file.' 1 130000; }

# The initramfs, which loads the drivers of virtio devices, the root disk, an ext4 image that is made without mounting it,
# and a second one in qcow2.
ensure_linux_images() {
    local initramfs="$cache/linux.cpio" disk="$cache/linux.ext4" tree="$cache/linux" name
    if stale "$initramfs" "$here/linux/initramfs-init" "$here/linux/modules" "$here/lib/linux.sh" \
        "$cache/kernel/complete"; then
        busybox_tree "$tree"
        mkdir -p "$tree/root"
        install -m 755 "$here/linux/initramfs-init" "$tree/init"
        modules_into "$tree" "$here/linux/modules"
        pack "$tree" "$initramfs"
    fi
    if stale "$disk" "$here"/linux/* "$here"/linux/bin/* "$here/lib/linux.sh" "$(binary linux-vsock)"; then
        busybox_tree "$tree"
        mkdir -p "$tree"/{data,etc,qcow2,root,www}
        for name in $(busybox --list); do
            [ "$name" = busybox ] || ln -s busybox "$tree/bin/$name"
        done
        install -m 644 "$here/linux/inittab" "$tree/etc/inittab"
        install -m 755 "$here/linux/start" "$tree/etc/start"
        install -m 755 -t "$tree/bin" "$here"/linux/bin/* "$(binary linux-vsock)"
        echo "root::0:0:root:/root:/bin/sh" >"$tree/etc/passwd"
        download_content >"$tree/www/file"
        rm -f "$disk.part"
        mke2fs -q -t ext4 -d "$tree" -L root "$disk.part" "${disk_mib}M"
        mv "$disk.part" "$disk"
    fi
    if stale "$cache/linux.qcow2" "$here/lib/linux.sh"; then
        rm -f "$disk.part"
        mke2fs -q -t ext4 -L qcow2 "$disk.part" "${qcow2_mib}M" 2>&1
        qemu-img convert -f raw -O qcow2 "$disk.part" "$cache/linux.qcow2"
        rm "$disk.part"
    fi
    download_checksum=$(download_content | sha256sum | cut -d ' ' -f 1)
}

# The files of the Linux guest for the virtual host, as an initramfs that follows that of the host.
ensure_linux_layer() {
    local image="$cache/linux-layer.cpio" tree="$cache/linux-layer"
    stale "$image" "$cache/linux.cpio" "$cache/linux.ext4" "$cache/linux.qcow2" || return 0
    rm -rf "$tree"
    mkdir -p "$tree/guest"
    cp "$cache/linux.cpio" "$cache/linux.ext4" "$cache/linux.qcow2" "$tree/guest/"
    pack "$tree" "$image"
}
