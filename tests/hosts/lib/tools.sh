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

# ensure_tools [PROGRAM=PACKAGE...]: installs what is missing, of these too, and only then touches the package manager.
ensure_tools() {
    local tool missing=()
    for tool in qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils cpio=cpio lz4=lz4 mke2fs=e2fsprogs ip=iproute2 \
        ping=iputils-ping curl=curl "$@"; do
        command -v "${tool%%=*}" >/dev/null || missing+=("${tool##*=}")
    done
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
