#!/usr/bin/env bash
# Installs what the benches need: the peers and torch into VENV (default .venv), nginx from Debian.
# May be run again. The versions of requirements/dev.txt stay as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${VENV:-.venv}/bin/python"
torch_index="https://download.pytorch.org/whl/cpu" # asked only where the usual index has no CPU build

fail() {
  echo "bench-setup: $*" >&2
  exit 1
}

[ -x "$python" ] || fail "there is no $python; run make setup first"

install() {
  "$python" -m pip -qq --disable-pip-version-check install \
    --constraint requirements/dev.txt --requirement bench/requirements.txt "$@"
}

echo "bench-setup: peers and torch (CPU), versions from bench/requirements.txt"
install 2>/dev/null || {
  echo "bench-setup: asking $torch_index for torch"
  install --extra-index-url "$torch_index" || fail "pip could not install bench/requirements.txt"
}

if ! PATH="$PATH:/usr/sbin" command -v nginx >/dev/null; then
  command -v apt-get >/dev/null || fail "nginx is missing and there is no apt-get; install nginx and run this again"
  echo "bench-setup: nginx by apt-get"
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo)
  "${as_root[@]}" apt-get -qq update
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends nginx-light >/dev/null
fi

"$python" -m bench.requirements
echo "bench-setup: done"
