#!/usr/bin/env bash
# Checks two_hosts.sh: bytes cross the cable at its speed and are counted, codes come back, a cut cable
# is silence, and nothing is left behind.
set -u
here=$(dirname "$(readlink -f "$0")")
before=$(ip netns list 2>/dev/null)
fail() { echo "error: $1"; exit 1; }

said=$("$here/two_hosts.sh" --rate 50mbit "python3 '$here/transfer.py' 5000000" "python3 '$here/transfer.py' 5000000" 2>&1)
code=$?
[ $code != 77 ] || { echo "$said"; exit 77; }
echo "$said"
[ $code = 0 ] || fail "a transfer exited with $code"
seconds=$(sed -n 's/^5000000 bytes in \([0-9.]*\) s from 10\.99\.0\.2$/\1/p' <<<"$said")
crossed=$(sed -n 's/^cable: .*, \([0-9]*\) bytes 1 -> 0$/\1/p' <<<"$said")
# 0.8 s at 50 Mbit/s, of which the bucket gives the first 256 KB at once.
awk -v s="$seconds" 'BEGIN { exit !(s > 0.6 && s < 3) }' || fail "5 MB at 50 Mbit/s took ${seconds:-no} s"
awk -v b="$crossed" 'BEGIN { exit !(b > 5000000 && b < 5600000) }' || fail "5 MB were counted as ${crossed:-no}"

"$here/two_hosts.sh" 'exit 0' 'exit 5' >/dev/null 2>&1
[ $? = 5 ] || fail "host 1's code did not come back"
said=$("$here/two_hosts.sh" --cut-after 2 "python3 '$here/transfer.py' 1000 --wait" "python3 '$here/transfer.py' 1000 --wait" 2>/dev/null)
grep -qx silence <<<"$said" || fail "a cut cable was not silence: $said"
[ "$(ip netns list 2>/dev/null)" = "$before" ] || fail "namespaces were left behind: $(ip netns list)"
echo ok
