# Programs that tests need, and the Debian packages that have them. Sourced, not run.

# as_root COMMAND...: runs a command as root, if that is possible without asking anybody.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

# missing_packages PROGRAM=PACKAGE...: prints those whose program is not here, a line each.
missing_packages() {
    local tool
    for tool in "$@"; do
        command -v "${tool%%=*}" >/dev/null || echo "${tool##*=}"
    done
}

# ensure_programs PROGRAM=PACKAGE...: installs what is missing, and only then touches the package manager. Fails if anything is
# missing then.
ensure_programs() {
    local missing
    # Twice: a package can push out another that was there, as qemu-system-x86 does with qemu-utils of another release.
    for _ in 1 2; do
        mapfile -t missing < <(missing_packages "$@")
        [ ${#missing[@]} -gt 0 ] || return 0
        echo "installing ${missing[*]}" >&2
        install_packages "${missing[@]}" || return 1
        hash -r
    done
    [ -z "$(missing_packages "$@")" ]
}

refresh_package_lists() {
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update >/dev/null 2>&1 ||
        echo "apt-get update failed; going on with the package lists that are there" >&2
}

# install_packages PACKAGE...
install_packages() {
    refresh_package_lists
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 \
        install -y --no-install-recommends "$@" >/dev/null
}
