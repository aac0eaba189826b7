#!/bin/sh
# Installs Chromium for the explorer's tests where it is missing and Debian's packages are at hand. Never fails: without
# a browser those tests are skipped, and say why. Time is bounded; what the network may hold up is fetched first.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done

skipped() {
    echo "no Chromium ($1): the explorer's browser tests will be skipped" >&2
    exit 0
}

command -v apt-get >/dev/null || skipped "it isn't installed, and there is no apt-get"
[ "$(id -u)" = 0 ] || skipped "it isn't installed; as root, apt-get install chromium"

export DEBIAN_FRONTEND=noninteractive
install="apt-get -qq -y -o DPkg::Lock::Timeout=60 -o Acquire::Retries=1 -o Acquire::http::Timeout=20"
install="$install install --no-install-recommends chromium"
echo "installing Chromium for the explorer's tests" >&2
timeout -k 10 120 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 update </dev/null >/dev/null 2>&1 ||
    skipped "apt-get update failed"
timeout -k 10 300 $install --download-only </dev/null >/dev/null 2>&1 || skipped "apt-get has no chromium"
timeout -k 10 300 $install --no-download </dev/null >/dev/null 2>&1 || skipped "apt-get could not install it"
exit 0
