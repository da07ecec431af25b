#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a cable (veth) with the speed and delay of a
# network, to run a command in each.
# usage: two_hosts.sh [--rate 1gbit] [--delay 0.1ms] [--cut-after SECONDS] CMD0 CMD1
#   CMD0 and CMD1 are given to bash. Both see HOST=0 or 1, HOST_ADDR (10.99.0.1 or .2), MASTER_ADDR
#   (host 0's), GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (cable), and RANK, WORLD_SIZE=2, LOCAL_RANK=0,
#   LOCAL_WORLD_SIZE=1, MASTER_PORT=29500. Host 0's output passes through, host 1's lines begin with
#   "[host 1] ". At the end a line "cable: N bytes 0 -> 1, M bytes 1 -> 0" goes to stderr.
#   --cut-after takes the cable out after that time: both ends see a silent peer, not a closed socket.
# Exits with the first code that is not 0; 77 and the reason where namespaces or tc are not to be had.
set -u
rate=1gbit delay=0.1ms cut= plain=
while [ $# -gt 0 ]; do
  case $1 in
    --rate) rate=${2:?--rate needs a value}; shift 2 ;;
    --delay) delay=${2:?--delay needs a value}; shift 2 ;;
    --cut-after) cut=${2:?--cut-after needs a value}; shift 2 ;;
    *) break ;;
  esac
done
if [ $# != 2 ]; then
  sed -n '4,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

skip() {
  echo "SKIPPED: $1"
  exit 77
}
[ "$(id -u)" = 0 ] || skip 'network namespaces need root'
for tool in ip tc; do command -v $tool >/dev/null || skip "$tool is not installed (apt-get install iproute2)"; done

name=tailor-$$
pids=()
clean() {
  local pid
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null; done
  # What the commands left behind in their namespaces ends with them.
  for host in 0 1; do
    for pid in $(ip netns pids "$name-$host" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null; done
    ip netns del "$name-$host" 2>/dev/null
  done
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for host in 0 1; do ip netns add "$name-$host" 2>/dev/null || skip 'network namespaces cannot be made here'; done
ip link add cable netns "$name-0" type veth peer name cable netns "$name-1" || skip 'veth is not to be had'
for host in 0 1; do
  ip -n "$name-$host" addr add "10.99.0.$((host + 1))/24" dev cable
  ip -n "$name-$host" link set lo up
  ip -n "$name-$host" link set cable up
  # netem has both in one; where the kernel has none, the token bucket has at least the speed.
  tc -n "$name-$host" qdisc add dev cable root netem rate "$rate" delay "$delay" limit 20000 2>/dev/null ||
    { tc -n "$name-$host" qdisc add dev cable root tbf rate "$rate" burst 256kb latency 50ms 2>/dev/null &&
      plain=yes; } ||
    skip 'tc can shape nothing here'
done

[ -z "$plain" ] || echo "two_hosts: no netem here, so the speed only, no delay of $delay" >&2

start() { # HOST COMMAND
  HOST=$1 HOST_ADDR=10.99.0.$(($1 + 1)) MASTER_ADDR=10.99.0.1 MASTER_PORT=29500 RANK=$1 WORLD_SIZE=2 \
    LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 GLOO_SOCKET_IFNAME=cable NCCL_SOCKET_IFNAME=cable \
    exec ip netns exec "$name-$1" bash -c "$2" </dev/null
}
start 0 "$1" &
pids+=($!)
(start 1 "$2") > >(sed -u 's/^/[host 1] /') 2> >(sed -u 's/^/[host 1] /' >&2) &
pids+=($!)
if [ -n "$cut" ]; then
  (sleep "$cut"; ip -n "$name-0" link set cable down) &
  pids+=($!)
fi
code=0
for pid in "${pids[@]:0:2}"; do
  wait "$pid"
  one=$?
  [ $code != 0 ] || code=$one
done
sent() { ip netns exec "$name-$1" cat /proc/net/dev | sed -n 's/^ *cable: *//p' | { read -r -a field; echo "${field[8]}"; }; }
echo "cable: $(sent 0) bytes 0 -> 1, $(sent 1) bytes 1 -> 0" >&2
exit $code
