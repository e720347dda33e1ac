#!/bin/sh
# agent-browser with this image's browser, and with what its own command line lacks: `--screenshot [FILE]` after a navigation.
# Everything else is passed through as it is.
real=/usr/local/lib/agent-browser/bin/agent-browser
export AGENT_BROWSER_EXECUTABLE_PATH="${AGENT_BROWSER_EXECUTABLE_PATH:-/usr/bin/chromium-headless-shell}"

navigates='' shoots=''
for argument in "$@"; do
  case $argument in
    open | navigate | goto) navigates=1 ;;
    --screenshot | --screenshot=*) shoots=1 ;;
  esac
done
[ "$navigates$shoots" = 11 ] || exec "$real" "$@"

# Takes the screenshot's part out of the arguments, and keeps what says where it is to be taken.
file='' session='' json='' left=$#
while [ "$left" -gt 0 ]; do
  argument=$1
  shift
  left=$((left - 1))
  case $argument in
    --screenshot=*) file=${argument#*=} ;;
    --screenshot)
      case ${1-} in
        '' | -*) ;; # No file: agent-browser chooses one and says which.
        *) [ "$left" -eq 0 ] || { file=$1; shift; left=$((left - 1)); } ;;
      esac ;;
    --session)
      set -- "$@" "$argument"
      [ "$left" -eq 0 ] || { session=$1; set -- "$@" "$1"; shift; left=$((left - 1)); } ;;
    --session=*) session=${argument#*=}; set -- "$@" "$argument" ;;
    --json) json=1; set -- "$@" "$argument" ;;
    *) set -- "$@" "$argument" ;;
  esac
done
# The browser's daemon has a current directory of its own.
case $file in '' | /*) ;; *) file=$PWD/$file ;; esac

"$real" "$@" || exit
exec "$real" ${session:+--session "$session"} ${json:+--json} screenshot ${file:+"$file"}
