# Sourced by quickstart and test: makes .venv with a Python of 3.11 or newer and installs bytelm into it, once.
# Needs nothing but python3. Sets PYTHON to the environment's interpreter. BYTELM_PYTHON names another interpreter.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 2; }

find_python() {
  local candidate
  for candidate in ${BYTELM_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# prepare_environment EXTRAS: the extras of pyproject.toml to install, such as "dev"; empty for none.
prepare_environment() {
  local extras=$1 base version constraints wanted have free
  base=$(find_python) || fail "no Python 3.11 or newer found (tried ${BYTELM_PYTHON:-python3, python3.13, python3.12, python3.11}).
Install one (Debian, Ubuntu: apt install python3 python3-venv) or name one: BYTELM_PYTHON=/path/to/python3.12 $0"
  PYTHON=.venv/bin/python
  if [ -n "${BYTELM_PYTHON:-}" ] && [ -x "$PYTHON" ] &&
    [ "$("$PYTHON" -c 'import sys; print(sys.version)' 2>/dev/null)" != "$("$base" -c 'import sys; print(sys.version)')" ]; then
    say "the environment .venv is of another Python: making it anew"
    rm -rf .venv
  fi
  if ! "$PYTHON" -c '' 2>/dev/null; then
    rm -rf .venv
    say "making the environment .venv with $("$base" --version)"
    "$base" -m venv .venv >.venv-log 2>&1 || { cat .venv-log >&2; rm -rf .venv .venv-log; fail "python3 -m venv failed (Debian, Ubuntu: apt install python3-venv; full disk?)"; }
    rm -f .venv-log
  fi
  version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  constraints=constraints/python$version.txt
  [ -f "$constraints" ] || { say "no tested set of versions for Python $version: taking the newest that fit"; constraints=/dev/null; }
  wanted="$(cat pyproject.toml "$constraints" | cksum) $PWD"
  for have in "${extras:-base}" dev; do
    if [ "$(cat ".venv/.bytelm-$have" 2>/dev/null)" = "$wanted" ]; then
      say "environment .venv is ready (Python $version)"
      return 0
    fi
  done
  free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
  [ "$free" -ge 2500 ] || fail "only $free MB free here; the environment needs about 2,500 MB"
  say "installing bytelm and what it needs into .venv (about 1,600 MB with the tests' packages; a few minutes) ..."
  if ! "$PYTHON" -m pip install --disable-pip-version-check --quiet --constraint "$constraints" --editable ".${extras:+[$extras]}" >.venv/install.log 2>&1; then
    tail -n 15 .venv/install.log >&2
    if grep -qiE 'no space left' .venv/install.log; then fail "the disk is full"; fi
    if grep -qiE 'connection|resolve|network|timed out|temporary failure|no matching distribution' .venv/install.log; then
      fail "the package index could not be reached (or lacks a package): is there a network? (full log: .venv/install.log)"
    fi
    fail "pip could not install bytelm (full log: .venv/install.log)"
  fi
  printf '%s\n' "$wanted" >".venv/.bytelm-${extras:-base}"
}
