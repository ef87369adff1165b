#!/bin/sh
# Prints an interpreter for kvlab: $PYTHON if set, else the first of the usual names that is new enough.
# With an argument such as 3.11, prints an interpreter of exactly that version, or fails silently.
exact="$1"

suits() {
    "$1" -c "
import sys
exact = '$exact'
version = '%d.%d' % sys.version_info[:2]
sys.exit(0 if (version == exact if exact else sys.version_info >= (3, 12)) else 1)" >/dev/null 2>&1
}

candidates="python3 python3.12 python3.13 python3.14 python"
[ -n "$exact" ] && candidates="python$exact python3"
if [ -n "$PYTHON" ] && [ -z "$exact" ]; then
    if suits "$PYTHON"; then
        echo "$PYTHON"
        exit 0
    fi
    found=$("$PYTHON" --version 2>&1 | head -n 1)
    echo "kvlab needs Python >= 3.12, but PYTHON=$PYTHON is: ${found:-not a program}" >&2
    exit 1
fi
for name in $candidates; do
    if suits "$name"; then
        command -v "$name"
        exit 0
    fi
done
# Interpreters that pyenv holds but has not activated.
for name in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
    if [ -x "$name" ] && suits "$name"; then
        echo "$name"
        exit 0
    fi
done
[ -n "$exact" ] && exit 1
cat >&2 <<'END'
kvlab needs Python >= 3.12, and none was found (looked for python3, python3.12, python3.13, python3.14, python, pyenv's).
Install one, or point at it:  make demo PYTHON=/path/to/python3.12
END
exit 1
