#!/usr/bin/env bash
# A SLURM of one node on this machine, for tests and to try WHERE=slurm by hand; it needs no systemd and no root.
# Jobs of its partition `urgent` preempt those of `test`, the default.
#
#   scripts/slurm_local.sh start [FOLDER]               prints the line that makes a shell use it: eval "$(... start)"
#   scripts/slurm_local.sh stop [FOLDER]                ends it with its jobs, and removes the folder
#   scripts/slurm_local.sh restart-controller [FOLDER]
#   scripts/slurm_local.sh status [FOLDER]
#
# It has configuration, state, key and ports of its own, and stays apart from a SLURM that the machine may be part of.
# Debian, Ubuntu: apt install --no-install-recommends slurm-wlm munge
set -euo pipefail

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -ge 1 ] && [ $# -le 2 ] || usage
verb=$1
folder=${2:-${TMPDIR:-/tmp}/normlab-slurm-$(id -un)}
[[ $folder = /* ]] || folder=$PWD/$folder
PATH=$PATH:/usr/sbin:/sbin # where the daemons are
export SLURM_CONF=$folder/slurm.conf
NODE_CPUS=8                # more than there may be: the jobs of a test are small

fail() {
  echo "slurm_local: $*" >&2
  exit 1
}

alive() { # NAME: whether the daemon with that pid file runs; since it ended the number may be another program's
  local pid
  pid=$(cat "$folder/$1.pid" 2>/dev/null) && [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}

wait_until() { # SECONDS COMMAND...
  local tries=$(($1 * 10))
  shift
  until "$@" >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || return 1
    sleep 0.1
  done
}

end() { # NAME
  local pid
  alive "$1" || return 0
  pid=$(cat "$folder/$1.pid")
  kill "$pid" 2>/dev/null || return 0
  wait_until 10 eval "! kill -0 $pid" || kill -9 "$pid" 2>/dev/null || true
}

configure() {
  local user host ports
  user=$(id -un)
  host=$(hostname -s)
  ports=$(python3 -c 'import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in sockets))')
  mkdir -p "$folder/state" "$folder/spool"
  chmod 755 "$folder"
  dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 2>/dev/null
  chmod 600 "$folder/munge.key"
  cat >"$SLURM_CONF" <<CONF
ClusterName=normlab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports% *}
SlurmdPort=${ports#* }
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
AuthType=auth/munge
CredType=cred/munge
# Else a requeued job waits two minutes for its old credential to expire.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=600
KillWait=15
NodeName=$host NodeAddr=127.0.0.1 CPUs=$NODE_CPUS State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=$host MaxTime=INFINITE PriorityTier=2 State=UP
CONF
}

controller() {
  slurmctld >>"$folder/start.log" 2>&1 || fail "slurmctld did not start; see $folder/slurmctld.log"
  wait_until 20 scontrol ping || fail "slurmctld does not answer; see $folder/slurmctld.log"
}

start() {
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || fail "$program is not installed; Debian, Ubuntu: apt install slurm-wlm munge"
  done
  [ -e "$SLURM_CONF" ] || configure
  # --force: the folder may be one that only its owner can enter.
  alive munged || munged --force --num-threads=1 --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" \
    >>"$folder/start.log" 2>&1 || fail "munged did not start; see $folder/start.log"
  alive slurmctld || controller
  alive slurmd || slurmd >>"$folder/start.log" 2>&1 || fail "slurmd did not start; see $folder/slurmd.log"
  wait_until 20 eval '[ "$(sinfo --noheader --partition=test --format=%t)" = idle ] || [ -n "$(squeue --noheader)" ]' ||
    fail "the node does not come up; see $folder/slurmd.log"
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
  [ -e "$SLURM_CONF" ] || return 0
  if alive slurmctld && alive slurmd; then
    scancel --user "$(id -un)" || true
    wait_until 20 eval '[ -z "$(squeue --noheader)" ]' || true
  fi
  for name in slurmd slurmctld munged; do end "$name" & done
  wait
  rm -rf "$folder"
}

# What the configuration names is run, and the folder is removed in the end.
if [ -e "$folder" ]; then
  [ -O "$folder" ] || fail "$folder is somebody else's; name another folder"
  [ ! -e "$SLURM_CONF" ] || [ -e "$folder/munge.key" ] || fail "$SLURM_CONF is not of this script; name another folder"
fi

case $verb in
  start) start ;;
  stop) stop ;;
  restart-controller)
    [ -e "$SLURM_CONF" ] || fail "nothing runs in $folder; start it first"
    end slurmctld
    controller
    ;;
  status)
    [ -e "$SLURM_CONF" ] || fail "nothing runs in $folder"
    for name in munged slurmctld slurmd; do echo "$name: $(alive "$name" && echo "runs" || echo "is down")"; done
    sinfo
    squeue --array
    ;;
  *) usage ;;
esac
