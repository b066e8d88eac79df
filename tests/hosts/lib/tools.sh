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

# Runs a command as root, if that is possible without asking anybody.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

has_static_busybox() {
    command -v busybox >/dev/null && ! ldd "$(command -v busybox)" >/dev/null 2>&1
}

# Installs what is missing, and only then touches the package manager.
ensure_tools() {
    local missing=()
    command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
    command -v qemu-img >/dev/null || missing+=(qemu-utils)
    command -v cpio >/dev/null || missing+=(cpio)
    command -v lz4 >/dev/null || missing+=(lz4)
    command -v mke2fs >/dev/null || missing+=(e2fsprogs)
    command -v ip >/dev/null || missing+=(iproute2)
    command -v ping >/dev/null || missing+=(iputils-ping)
    command -v curl >/dev/null || missing+=(curl)
    has_static_busybox || missing+=(busybox-static)
    [ ${#missing[@]} -eq 0 ] && return

    command -v apt-get >/dev/null || skip "missing ${missing[*]}, and there is no apt-get to install them with"
    say "installing ${missing[*]}"
    refresh_package_lists
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 \
        install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        skip "apt-get could not install ${missing[*]} (try: apt-get install ${missing[*]})"
}

refresh_package_lists() {
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update >/dev/null 2>&1 ||
        say "apt-get update failed; going on with the package lists that are there"
}
