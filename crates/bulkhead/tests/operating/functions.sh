set -u
cd /src
export HOME=/root PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin
declare -A pids

fail() {
  echo "FAILED at line $1: $2" >&2
  for log in ./*.log; do echo "--- $log" >&2; tail -n 15 "$log" >&2; done
  exit 1
}

# A command of the document, by its line. What the one before has said is in `last`.
at() {
  if [ -e out ]; then mv out last; fi
  if ! timeout 120 bash -euc "$2" > out 2>&1 < /dev/null; then
    cat out >&2
    fail "$1" "$2"
  fi
  echo "line $1: $2"
}

# One that must fail.
refused() {
  if timeout 120 bash -euc "$2" > out 2>&1 < /dev/null; then fail "$1" "must be refused: $2"; fi
}

# One that goes on.
daemon() {
  bash -c "exec $3" > "$2.log" 2>&1 < /dev/null &
  pids[$2]=$!
  echo "line $1: $3"
}

stop() {
  kill -"${2:-TERM}" "${pids[$1]}"
  wait "${pids[$1]}"
}

# Waits until a command succeeds.
eventually() {
  for _ in $(seq 300); do
    if timeout 20 bash -euc "$2" > out 2>&1 < /dev/null; then return; fi
    sleep 0.2
  done
  cat out >&2
  fail "$1" "in vain: $2"
}

# Python over the answer of a command, as `a`.
cat > /usr/local/bin/answer <<'PYTHON'
#!/usr/bin/env python3
import json, sys
a = json.load(sys.stdin)
found = eval(sys.argv[1])
if found is False or found is None: sys.exit(1)
if found is not True: print(found)
PYTHON
chmod +x /usr/local/bin/answer

# Whether this host's agent has a session and is up to date.
cat > /usr/local/bin/connected <<'SH'
#!/bin/bash
bulkhead status -o json | answer 'any(x["host"] == "web1" and x["connected"] and x["enforcedRevision"] > 0 for x in a["fleet"]["agents"])'
SH
chmod +x /usr/local/bin/connected

policy() {
  printf 'apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: %s}\nspec: {appliesTo: "role == '"'db'"'", ingress: [{action: Allow, from: {selector: "role == '"'$2'"'"}}]}\n' "$1"
}
revision() { bulkhead status -o json | answer 'a["fleet"]["controller"]["revision"]'; }

# What systemd does with the controller's unit, as far as it concerns files and the user.
start_controller() {
  mkdir -p /run/bulkhead /var/lib/bulkhead/controller
  chown bulkhead: /run/bulkhead /var/lib/bulkhead/controller
  local start
  start=$(sed -n 's/^ExecStart=//p' /etc/systemd/system/bulkhead-controller.service)
  daemon "$1" controller "setpriv --reuid bulkhead --regid bulkhead --clear-groups --no-new-privs --bounding-set=-all $start"
  eventually "$1" 'bulkhead whoami'
}

start_agent() {
  daemon "$1" agent "$(sed -n 's/^ExecStart=//p' /etc/systemd/system/bulkhead-agent.service)"
  eventually "$1" connected
}
