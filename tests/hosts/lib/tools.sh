# Messages, and the programs that the testbed needs from the machine.

# Exit status of a drill that could not be run here: neither passed nor failed.
readonly SKIPPED=77

say() { printf 'hosts: %s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# The reason is printed by the caller's format (human or JSON) through `report_skip`, which `drill` defines.
skip() {
    say "SKIPPED, nothing was tested: $*"
    report_skip "$*"
    exit "$SKIPPED"
}

has_static_busybox() {
    command -v busybox >/dev/null && ! ldd "$(command -v busybox)" >/dev/null 2>&1
}

# ensure_tools [PROGRAM=PACKAGE...]: installs what is missing, of these too.
ensure_tools() {
    local tools=(qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils cpio=cpio lz4=lz4 mke2fs=e2fsprogs ip=iproute2
        ping=iputils-ping curl=curl "$@")
    ensure_programs "${tools[@]}" || skip "missing $(missing_packages "${tools[@]}" | tr '\n' ' ')"
    has_static_busybox || install_packages busybox-static || skip "missing busybox-static"
}
