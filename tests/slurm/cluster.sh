#!/usr/bin/env bash
# A real Slurm on this machine for the tests: two nodes of four cores and four pretend GPUs each, a
# partition `spot` whose jobs a job of `urgent` puts back into the queue.
# usage: cluster.sh start DIR    everything it writes lies in DIR; use it with SLURM_CONF=DIR/slurm.conf
#        cluster.sh stop DIR     ends the daemons that start wrote down, and waits for them
#   TAILOR_SLURM_ACCOUNTING=1    with MariaDB and slurmdbd, so that sacct has records
# Exits with 77 and the reason where this is not possible: not root, or no packages to be had.
set -u
action=${1:-}
dir=$(realpath -m "${2:?usage: cluster.sh start|stop DIR}")
accounting=${TAILOR_SLURM_ACCOUNTING:-}
nodes=2 gpus=4 cores=4
export SLURM_CONF=$dir/slurm.conf

skip() {
  echo "SKIPPED: $1"
  exit 77
}

packages() {
  local wanted=(slurmctld slurmd slurm-client munge) missing=() package
  [ -z "$accounting" ] || wanted+=(slurmdbd mariadb-server)
  for package in "${wanted[@]}"; do
    [ "$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null)" = 'install ok installed' ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || skip "Debian packages are missing, and only root can install them: ${missing[*]}"
  command -v apt-get >/dev/null || skip "no apt-get here to install ${missing[*]}"
  # The daemons are ours to start; without this the packages would start theirs.
  local policy=/usr/sbin/policy-rc.d ours=
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && ours=yes
  fi
  { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" ||
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; }; } \
    >"$dir/log/install" 2>&1
  local code=$?
  [ -z "$ours" ] || rm -f $policy
  [ $code = 0 ] || skip "apt-get could not install ${missing[*]}: $(tail -n 1 "$dir/log/install")"
}

# A run of ports of which none answers.
free_ports() {
  local base=$((16000 + RANDOM % 3000)) port
  for ((port = base; port < base + 10; port++)); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      free_ports
      return
    fi
  done
  echo "$base"
}

# Waits until the command works, at most SECONDS.
until_works() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.1
  done
}

# KillWait and GraceTime are limits after which Slurm kills: wide, since a machine that builds and
# tests beside this needs its time to save, and nothing waits for them that leaves before.
configure() { # PORT
  local port=$1 i host billing= records=accounting_storage/none
  host=$(hostname -s)
  # slurmd opens what stands for a GPU: a copy of /dev/null is a device, too.
  for ((i = 0; i < gpus; i++)); do mknod "$dir/gpu$i" c 1 3 || skip 'device nodes cannot be made here'; done
  echo "Name=gpu File=$dir/gpu[0-$((gpus - 1))]" >"$dir/gres.conf"
  cat >"$dir/slurm.conf" <<END
ClusterName=tailor
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/pid/slurmctld
SlurmdPidFile=$dir/pid/slurmd.%n
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobRequeue=1
KillWait=120
MessageTimeout=60
TCPTimeout=10
BatchStartTimeout=60
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
  if [ -n "$accounting" ]; then
    records=accounting_storage/slurmdbd
    billing=' TRESBillingWeights=GRES/gpu=1.0'
    cat >>"$dir/slurm.conf" <<END
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$dir/munge/socket
AccountingStorageTRES=gres/gpu
END
    (umask 077 && cat >"$dir/slurmdbd.conf") <<END
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
LogFile=$dir/log/slurmdbd
PidFile=$dir/pid/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
END
  fi
  echo "AccountingStorageType=$records" >>"$dir/slurm.conf"
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$dir/spool.n$i"
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2 + i)) CPUs=$cores RealMemory=8000 Gres=gpu:$gpus"
  done >>"$dir/slurm.conf"
  cat >>"$dir/slurm.conf" <<END
PartitionName=spot Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120$billing
PartitionName=urgent Nodes=ALL State=UP PriorityTier=9 PreemptMode=OFF$billing
END
}

start_records() { # PORT
  local db=$dir/db client server
  mkdir -p "$db" && chown mysql: "$db"
  mariadb-install-db --no-defaults --datadir="$db" --user=mysql --auth-root-authentication-method=normal \
    >"$dir/log/mariadb" 2>&1
  mariadbd --no-defaults --user=mysql --datadir="$db" --socket="$db/socket" --pid-file="$db/pid" \
    --bind-address=127.0.0.1 --port=$(($1 + 2)) --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
    >>"$dir/log/mariadb" 2>&1 </dev/null &
  server=$!
  client=(mariadb --no-defaults -uroot -S "$db/socket")
  until ! kill -0 $server 2>/dev/null || "${client[@]}" -e 'select 1' >/dev/null 2>&1; do sleep 0.2; done
  "${client[@]}" -e "create database slurm_acct; create user slurm@'127.0.0.1' identified by 'slurm';
    create user slurm@localhost identified by 'slurm'; grant all on slurm_acct.* to slurm@'127.0.0.1';
    grant all on slurm_acct.* to slurm@localhost" || return 1
  slurmdbd
  until_works 60 timeout 2 sacctmgr -n list cluster || return 1
  {
    sacctmgr -i add cluster tailor
    sacctmgr -i add account default cluster=tailor
    sacctmgr -i add user root account=default
  } >>"$dir/log/sacctmgr" 2>&1
}

idle_nodes() { [ "$(timeout 2 sinfo -h -N -p spot -t idle -o %N 2>/dev/null | wc -l)" = $nodes ]; }

start() {
  [ "$(id -u)" = 0 ] || skip 'Slurm here needs root'
  [ ! -e "$dir/pid" ] || { echo "a cluster was started in $dir before" >&2; exit 2; }
  mkdir -p "$dir"/{pid,log,state,munge} && chmod 755 "$dir" && chmod 711 "$dir/munge"
  packages
  local port i
  port=$(free_ports)
  configure "$port"
  (umask 077 && head -c 256 /dev/urandom >"$dir/munge/key")
  munged --force --num-threads=2 --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
    --pid-file="$dir/pid/munged" --log-file="$dir/log/munged" --seed-file="$dir/munge/seed" || exit 1
  if [ -n "$accounting" ]; then start_records "$port" || { fail; exit 1; }; fi
  slurmctld -f "$SLURM_CONF" -i
  for ((i = 1; i <= nodes; i++)); do slurmd -f "$SLURM_CONF" -N "n$i"; done
  until_works 60 idle_nodes || { fail; exit 1; }
}

fail() {
  grep -hiE 'fatal|error' "$dir"/log/* | tail -n 20 >&2
  stop
}

stop() {
  local file pid pids=()
  if [ -s "$dir/pid/slurmctld" ]; then
    # Nothing is owed to a job that a test left behind: it need not save.
    timeout 5 scancel --user=root --quiet --signal=KILL --full >/dev/null 2>&1
    timeout 5 scancel --user=root --quiet >/dev/null 2>&1
    local end=$((SECONDS + 15))
    while [ -n "$(timeout 2 squeue -h 2>/dev/null)" ] && [ $SECONDS -lt $end ]; do sleep 0.2; done
  fi
  for file in "$dir"/pid/slurmd.* "$dir"/pid/{slurmctld,slurmdbd} "$dir/db/pid" "$dir/pid/munged"; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    pids+=("$pid")
    kill "$pid" 2>/dev/null
  done
  for pid in "${pids[@]}"; do
    for ((i = 0; i < 100; i++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    # A slurmd that never met its controller does not heed SIGTERM.
    kill -KILL "$pid" 2>/dev/null
  done
  rm -rf "$dir/pid"
}

case $action in
  start) start ;;
  stop) stop ;;
  *)
    sed -n '4,7s/^# \{0,1\}//p' "$0" >&2
    exit 2 ;;
esac
