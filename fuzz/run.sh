#!/usr/bin/env bash
# fuzz/run.sh SECONDS TARGET...: runs targets that `make fuzz` has built, as many at once as there are processors.
#
# Each begins with the committed corpus. What it finds on its way goes to target/fuzz/corpus and is used again the
# next time; what breaks goes to target/fuzz/artifacts, and belongs into fuzz/corpus once it is understood.
set -euo pipefail
cd "$(dirname "$0")"
seconds=$1
shift
out=${CARGO_TARGET_DIR:-$PWD/../target}/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')

one() {
  local target=$1 dictionary=
  mkdir -p "$out/corpus/$target" "$out/artifacts/$target"
  case $target in
    selector) dictionary=-dict=dictionaries/selector.dict ;;
    document | kubernetes) dictionary=-dict=dictionaries/manifest.dict ;;
  esac
  # Every input within ten seconds and a gigabyte. A run that only finds what it knew still ends after its time.
  if "$out/$host/release/$target" $dictionary -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 \
    -max_len=16384 -print_final_stats=1 -artifact_prefix="$out/artifacts/$target/" \
    "$out/corpus/$target" "corpus/$target" > "$out/$target.log" 2>&1; then
    echo "fuzz $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$out/$target.log") inputs, nothing found"
  else
    echo "fuzz $target: broken" >&2
    tail -n 40 "$out/$target.log" >&2
    return 1
  fi
}
export -f one
export seconds out host
printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} bash -euo pipefail -c 'one {}'
