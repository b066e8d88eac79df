# The Linux guest that serves Redis: Debian's, fetched and never installed, with the libraries that it asks for.
# Result: $cache/redis-server/ with the program and its libraries, $cache/redis.cpio with the guest.

# The packages of Redis and of all that its libraries need.
redis_packages() {
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
        redis-server 2>/dev/null | grep -E '^(redis|lib)' | sort -u
}

ensure_redis() {
    [ -e "$cache/redis-server/complete" ] && return
    local part="$cache/redis-server.part" packages=() loader library
    rm -rf "$part" "$cache/redis-server"
    mkdir -p "$part/packages"
    mapfile -t packages < <(redis_packages)
    if [ ${#packages[@]} -eq 0 ]; then
        refresh_package_lists
        mapfile -t packages < <(redis_packages)
    fi
    [ ${#packages[@]} -gt 0 ] || skip "no package redis-server in the package lists (is this Debian?)"
    say "fetching redis-server and its libraries"
    (cd "$part" && apt-get -qq download "${packages[@]}" >/dev/null 2>&1) ||
        skip "apt-get could not download ${packages[*]}"
    for package in "$part"/*.deb; do
        dpkg -x "$package" "$part/packages"
    done

    # What the loader of the packages themselves would load, wherever this machine has its own.
    local at="$part/packages" folders
    folders=$(find "$at" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
    loader=$(find "$at" -name 'ld-linux-x86-64.so.2' | head -n 1)
    mkdir -p "$part/bin" "$part/lib64" "$part/lib/x86_64-linux-gnu"
    cp -L "$at/usr/bin/redis-check-rdb" "$part/bin/redis-server"
    cp -L "$loader" "$part/lib64/ld-linux-x86-64.so.2"
    "$loader" --library-path "$folders" --list "$part/bin/redis-server" >"$part/libraries" ||
        fail "redis-server's libraries are not found in $at"
    while read -r library; do
        cp -L "$library" "$part/lib/x86_64-linux-gnu/"
    done < <(sed -n "s|.* => \($at[^ ]*\) .*|\1|p" "$part/libraries")
    ! grep -v "$at" "$part/libraries" | grep -q '=> /' || fail "redis-server needs a library that no package has: see $part/libraries"
    rm -rf "$at" "$part"/*.deb
    touch "$part/complete"
    mv "$part" "$cache/redis-server"
}

ensure_redis_image() {
    local image="$cache/redis.cpio" tree="$cache/redis"
    ensure_redis
    stale "$image" "$here"/redis/* "$here/lib/redis.sh" "$cache/redis-server/complete" || return 0
    busybox_tree "$tree"
    mkdir -p "$tree"/{data,etc}
    cp -r "$cache/redis-server"/{bin,lib,lib64} "$tree/"
    install -m 755 "$here/redis/init" "$tree/init"
    install -m 644 "$here/redis/redis.conf" "$tree/etc/redis.conf"
    modules_into "$tree" "$here/redis/modules"
    pack "$tree" "$image"
}

# The guest's files for the virtual hosts, as an initramfs that follows theirs.
ensure_redis_layer() {
    local image="$cache/redis-layer.cpio" tree="$cache/redis-layer"
    stale "$image" "$cache/redis.cpio" || return 0
    rm -rf "$tree"
    mkdir -p "$tree/guest"
    cp "$cache/redis.cpio" "$tree/guest/"
    pack "$tree" "$image"
}
