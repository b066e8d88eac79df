# Debian's unmodified cloud kernel: fetched once, unpacked, never installed.
# Result: $cache/kernel/{bzImage,vmlinux,version,modules/}.

# The versioned package behind Debian's name for "the current cloud kernel".
kernel_package() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1
}

ensure_kernel() {
    [ -e "$cache/kernel/complete" ] && return
    local package part="$cache/kernel.part"
    rm -rf "$part" "$cache/kernel"
    mkdir -p "$part/package"

    package=$(kernel_package)
    if [ -z "$package" ]; then
        refresh_package_lists
        package=$(kernel_package)
    fi
    [ -n "$package" ] || skip "no package linux-image-cloud-amd64 in the package lists (is this Debian on amd64?)"

    say "fetching $package"
    (cd "$part" && apt-get -qq download "$package" >/dev/null 2>&1) ||
        skip "apt-get could not download $package"
    dpkg -x "$part/$package"_*.deb "$part/package"

    cp "$part"/package/boot/vmlinuz-* "$part/bzImage"
    extract_vmlinux "$part/bzImage" "$part/vmlinux"
    mkdir "$part/modules"
    find "$part/package" -name '*.ko.xz' -exec xz -d {} +
    find "$part/package" -name '*.ko' -exec cp -t "$part/modules" {} +
    echo "${package#linux-image-}" >"$part/version"
    rm -rf "$part/package" "$part"/*.deb
    touch "$part/complete"
    mv "$part" "$cache/kernel"
}

# unsigned FILE OFFSET BYTES: a little-endian number in a file.
unsigned() { od -An "-tu$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# extract_vmlinux BZIMAGE VMLINUX: undoes the kernel's compression. Places are those of the setup header
# (Linux Documentation/arch/x86/boot.rst): setup_sects 0x1f1, payload_offset 0x248, payload_length 0x24c.
# The payload's last four bytes are the size of what was compressed, not compressed data.
extract_vmlinux() {
    local bzimage=$1 vmlinux=$2 start length size magic unpack
    start=$((($(unsigned "$bzimage" $((0x1f1)) 1) + 1) * 512 + $(unsigned "$bzimage" $((0x248)) 4)))
    length=$(($(unsigned "$bzimage" $((0x24c)) 4) - 4))
    size=$(unsigned "$bzimage" $((start + length)) 4)

    magic=$(od -An -tx1 -j "$start" -N 4 "$bzimage" | tr -d ' ')
    case $magic in
    02214c18) unpack="lz4 -dc" ;;
    28b52ffd) unpack="zstd -dc" ;;
    1f8b*) unpack="gzip -dc" ;;
    fd377a58) unpack="xz -dc" ;;
    *) fail "$bzimage: payload with unknown compression (it starts with $magic)" ;;
    esac
    dd if="$bzimage" bs=1M iflag=skip_bytes,count_bytes skip="$start" count="$length" status=none |
        $unpack >"$vmlinux" || fail "$bzimage: the payload could not be unpacked with: $unpack"
    [ "$(stat -c %s "$vmlinux")" = "$size" ] ||
        fail "$vmlinux has $(stat -c %s "$vmlinux") bytes; the header of $bzimage promises $size"
}
