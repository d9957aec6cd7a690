#!/usr/bin/env bash
# Schemathesis against a controller: requests made from the API's own description, right and wrong ones, as an administrator,
# as a viewer and as nobody. No answer may be a server error, be undescribed, or accept what the description forbids.
#
#   tests/api/fuzz.sh BINARY [EXAMPLES]        EXAMPLES: requests per operation and phase, 20 unless told otherwise
set -euo pipefail
binary=$(realpath "$1")
examples=${2:-20}
cd "$(dirname "$0")/../.."
tools=$(realpath -m "${CARGO_TARGET_DIR:-target}")/schemathesis
# One version, so that what it finds does not change by itself.
version=4.32.5
if [ "$("$tools/bin/schemathesis" --version 2>/dev/null)" != "schemathesis, version $version" ]; then
  rm -rf "$tools"
  python3 -m venv "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version"
fi

work=$(mktemp -d)
controller=
finish() {
  if [ -n "$controller" ]; then kill "$controller" 2>/dev/null || true; wait "$controller" 2>/dev/null || true; fi
  rm -rf "$work"
}
trap finish EXIT
"$binary" controller --data-dir "$work/data" --socket "$work/controller.sock" --listen 127.0.0.1:0 --listen-agents 127.0.0.1:0 \
  --log-format json 2> "$work/log" &
controller=$!
export BULKHEAD_SERVER="unix://$work/controller.sock"
address=
for _ in $(seq 100); do
  address=$(sed -n 's/.*"api":"\([^"]*\)".*/\1/p' "$work/log" | head -1)
  if [ -n "$address" ]; then break; fi
  kill -0 "$controller" || { cat "$work/log" >&2; exit 1; }
  sleep 0.1
done
[ -n "$address" ] || { echo "the controller does not start" >&2; cat "$work/log" >&2; exit 1; }

cat > "$work/roles.yaml" <<'YAML'
apiVersion: bulkhead.dev/v1
kind: RoleBinding
metadata: {name: viewers}
spec: {role: Viewer, groups: [viewers]}
YAML
"$binary" apply -f "$work/roles.yaml" > /dev/null
token() {
  "$binary" token create --operator "$1" --group "$2" -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)["token"])'
}
# Streams do not end, so nothing can be said about them here.
python3 - crates/controller/openapi.json "$work/api.json" <<'PYTHON'
import json, sys
document = json.load(open(sys.argv[1]))
for item in document["paths"].values():
    for operation in [item, *item.values()]:
        if isinstance(operation, dict) and "parameters" in operation:
            operation["parameters"] = [p for p in operation["parameters"] if p.get("name") not in ("watch", "follow")]
json.dump(document, open(sys.argv[2], "w"))
PYTHON

common=(--tls-verify "$work/data/identity/ca.crt" --url "https://$address" --request-timeout 10 --continue-on-failure --rate-limit 150/s
  --suppress-health-check filter_too_much --seed 1 --warnings off --no-color)
described=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
status=0
attempt() {
  echo "== as $1"
  shift
  (cd "$work" && "$tools/bin/schemathesis" run api.json "${common[@]}" "$@") || status=1
}
attempt administrator -H "Authorization: Bearer $(token fuzz bulkhead:admins)" --max-examples "$examples" --phases coverage,fuzzing \
  --checks "$described,negative_data_rejection,unsupported_method,ignored_auth"
attempt viewer -H "Authorization: Bearer $(token eve viewers)" --max-examples "$(((examples + 3) / 4))" --phases fuzzing --checks "$described"
attempt nobody --max-examples "$(((examples + 3) / 4))" --phases fuzzing --checks not_a_server_error
# It still serves, and nothing in it has panicked.
"$binary" status > /dev/null
if grep -q panicked "$work/log"; then grep panicked "$work/log" >&2; status=1; fi
exit "$status"
