#!/usr/bin/env bash
# Makes a virtual environment with the service's requirements; start.sh calls it where there is none.
#   .install/python.sh VENV [FILE…]   with the packages of these requirement files, too
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 cache=$(dirname "$1")
shift
# shellcheck source=/dev/null
source .install/progress.sh

for base in python3 python3.{11..19} ''; do
    if "$base" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
done
[[ -n $base ]] || die 'Python 3.11 or later with its venv module is missing: apt-get install python3 python3-venv'

take_lock
# The import fails where an upgrade of the system's Python has left the packages behind
if [[ -e $venv/.complete ]] && "$venv/bin/python" -c 'import gunicorn' 2>/dev/null; then exit; fi

say "installing Python packages into $venv (about half a minute)"
echo "installing Python packages into $venv" >"$cache/install.progress"
export PIP_DISABLE_PIP_VERSION_CHECK=1
rm -rf "$venv"
if ! { tied "$base" -m venv "$venv" && tied "$venv/bin/python" -m pip install -q -r requirements.txt "${@/#/-r}"; }; then
    die "could not install the requirements into $venv (see above): it takes a package index and room on the disk"
fi
touch "$venv/.complete" # last, so that an interrupted installation is made anew
