# Debian's kernel as a guest with devices: its initramfs, its root disk, and the virtual host with a bridge that it runs on.

# Size of the guest's disk.
readonly disk_mib=32

# The file that clients download: numbered lines, so that a piece that is missing or twice there is seen.
download_content() { seq -f 'line %012.0f of the file' 1 200000; }

# modules_into TREE LIST: copies the modules that LIST names, and those that they depend on, with the order to load them.
modules_into() {
    local tree=$1 list=$2 module order=()
    mkdir -p "$tree/lib/modules"
    while read -r module; do
        require_module "$module"
    done <"$list"
    for module in "${order[@]}"; do
        cp "$cache/kernel/modules/$module.ko" "$tree/lib/modules/"
    done
    printf '%s\n' "${order[@]}" >"$tree/lib/modules/order"
}

# The initramfs, which loads the drivers of virtio devices, and the root disk.
ensure_linux_images() {
    local initramfs="$cache/linux.cpio" disk="$cache/linux.ext4" tree="$cache/linux" name
    if stale "$initramfs" "$here/linux/initramfs-init" "$here/linux/modules" "$here/lib/linux.sh" "$cache/kernel/complete"; then
        busybox_tree "$tree"
        mkdir -p "$tree/root"
        install -m 755 "$here/linux/initramfs-init" "$tree/init"
        modules_into "$tree" "$here/linux/modules"
        pack "$tree" "$initramfs"
    fi
    if stale "$disk" "$here"/linux/* "$here/lib/linux.sh"; then
        busybox_tree "$tree"
        mkdir -p "$tree"/{etc,root,www}
        for name in $(busybox --list); do
            [ "$name" = busybox ] || ln -s busybox "$tree/bin/$name"
        done
        install -m 644 "$here/linux/inittab" "$tree/etc/inittab"
        install -m 755 "$here/linux/start" "$tree/etc/start"
        install -m 755 -t "$tree/bin" "$here"/linux/{count,ticks,check-disk}
        download_content >"$tree/www/file"
        rm -f "$disk"
        mke2fs -q -t ext4 -d "$tree" -L root "$disk.part" "${disk_mib}M"
        mv "$disk.part" "$disk"
    fi
}
