# Our binaries, and the two initramfs images: the guest's and the virtual host's.
# Uncompressed: unpacking in a software-emulated machine costs more than loading.

readonly target=x86_64-unknown-linux-gnu

# Static binaries in a target directory of their own, so that the ordinary build's cache survives.
build_binaries() {
    say "building static binaries"
    (cd "$root" && cargo build-dist --quiet --target-dir "$cache/build" "$@") || fail "cargo build failed"
}

binary() { echo "$cache/build/$target/dist/$1"; }

# pack DIRECTORY IMAGE: writes an initramfs.
pack() {
    (cd "$1" && find . -print0 | sort -z | cpio --null --create --format=newc --owner=0:0 --quiet) >"$2.part"
    mv "$2.part" "$2"
}

# stale IMAGE INPUT...: whether an input is newer than the image.
stale() {
    local image=$1 input
    shift
    [ -e "$image" ] || return 0
    for input in "$@"; do
        [ "$input" -nt "$image" ] && return 0
    done
    return 1
}

# What every image starts from: busybox as all commands, and mount points.
busybox_tree() {
    rm -rf "$1"
    mkdir -p "$1"/{bin,dev,proc,sys,tmp}
    cp "$(command -v busybox)" "$1/bin/busybox"
}

# The Linux guest: busybox, the workload, and an init that prints and then runs the workload.
ensure_guest_image() {
    local image="$cache/guest.cpio" tree="$cache/guest"
    stale "$image" "$here/guest/init" "$here/lib/images.sh" "$(binary linux-workload)" || return 0
    busybox_tree "$tree"
    install -m 755 "$here/guest/init" "$tree/init"
    install -m 755 "$(binary linux-workload)" "$tree/bin/linux-workload"
    pack "$tree" "$image"
}

# require_module NAME: appends a module of the kernel to `order`, behind those that it depends on.
require_module() {
    local name=$1 dependency
    [ -e "$cache/kernel/modules/$name.ko" ] || name=${1//_/-} # kvm_amd is in kvm-amd.ko
    [ -e "$cache/kernel/modules/$name.ko" ] || fail "Debian's kernel has no module $1 (see $here/host/modules)"
    [[ " ${order[*]} " == *" $name "* ]] && return
    for dependency in $(tr '\0' '\n' <"$cache/kernel/modules/$name.ko" | sed -n 's/^depends=//p' | tr ',' ' '); do
        require_module "$dependency"
    done
    order+=("$name")
}

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

# The virtual host: busybox, the modules that make it a KVM host, and the Linux guest's files.
ensure_host_image() {
    local image="$cache/host.cpio" tree="$cache/host"
    stale "$image" "$here"/host/* "$here/lib/images.sh" "$cache/kernel/complete" \
        "$cache/guest.cpio" || return 0
    busybox_tree "$tree"
    mkdir -p "$tree"/{guest,lib/drill,srv}
    install -m 755 "$here/host/init" "$tree/init"
    install -m 755 -t "$tree/lib/drill" "$here/host/agent" "$here/host/functions"
    cp "$cache/kernel/bzImage" "$cache/kernel/vmlinux" "$tree/guest/"
    cp "$cache/guest.cpio" "$tree/guest/initrd"
    modules_into "$tree" "$here/host/modules"
    pack "$tree" "$image"
}
