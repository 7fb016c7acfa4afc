#!/bin/bash
# Runs a command with CANN's variables set.
set -e
for file in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do
    if [ -f "$file" ]; then
        source "$file"
        exec "$@"
    fi
done
echo "error: neither /usr/local/Ascend/ascend-toolkit/set_env.sh nor /usr/local/Ascend/cann/set_env.sh is there;" \
    "take an image with CANN's toolkit, or mount it" >&2
exit 1
