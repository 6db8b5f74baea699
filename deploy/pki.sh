#!/usr/bin/env bash
# A small public-key infrastructure for tests and pilots; `pki.sh --help` explains how to use it.
#
# Rules of this file:
# 1. There are two authorities, so that no board can pass for an operator, whatever its name: `ca` signs broker and
#    devices, `operators-ca` signs operators.
# 2. A common name is a place in the topic tree: SITE/DEVICE for a device, SITE for an operator. The broker inserts it
#    into the patterns of its access list (mosquitto/acl).
# 3. Nothing is overwritten. A folder is written under a temporary name and renamed when it is complete.
# 4. One folder holds all that one machine needs. Nothing else has to leave the machine that runs this script.
set -euo pipefail
umask 077

readonly CA_DAYS=3650
readonly WARNING='WARNING: a PKI for TESTS AND PILOTS. Its authority keys are stored unencrypted in this script'\''s output:
anyone who reads them can pose as any device or operator. In production, use an authority whose keys stay in hardware.'

usage() {
  cat <<END
usage: pki.sh [--dir DIR] [--days N] COMMAND

  init                       create both authorities and their revocation lists
  broker HOST...             certify the broker for these host names and addresses
  device SITE/DEVICE         certify a board; its folder is DIR/devices/SITE/DEVICE
  operator SITE NAME         certify a person or program that controls SITE: DIR/operators/SITE/NAME
  revoke FOLDER              revoke the certificate in such a folder, and renew DIR/broker/*crl.pem (then restart the broker)

  --dir DIR    folder for everything (default: pki)
  --days N     validity of broker, device and operator certificates (default: 825); the authorities' is $CA_DAYS

Keys are EC P-256. You can repeat every command: existing files are kept.

$WARNING
END
}

fail() { echo "pki.sh: $*" >&2; exit 1; }
note() { echo "pki.sh: $*" >&2; }

dir=pki days=825
while [ $# -gt 0 ]; do
  case $1 in
    --dir) dir=${2:?--dir needs a folder}; shift 2 ;;
    --days) days=${2:?--days needs a number}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "$1: unknown option; see pki.sh --help" ;;
    *) break ;;
  esac
done
[[ $days =~ ^[1-9][0-9]{0,3}$ ]] || fail "--days $days: a whole number from 1 to 9999 is needed"
command -v openssl >/dev/null || fail "openssl is not installed: apt-get install openssl"

# The folder that is being written; removed if anything fails.
fresh=
trap '[ -z "$fresh" ] || rm -rf "$fresh"' EXIT

begin() { # FOLDER: starts a new folder beside its final place, or returns 1 if that exists
  if [ -e "$1" ]; then note "kept $1"; return 1; fi
  mkdir -p "$(dirname "$1")"
  fresh=$(mktemp -d "$(dirname "$1")/.partial-XXXXXX")
}

finish() { # FOLDER
  # -T: not into a folder that another run has made in the meantime
  chmod 0755 "$fresh" && mv -T "$fresh" "$1" && fresh=
  note "made $1"
}

key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }

issue() { # CA_FOLDER ARGUMENT...: openssl ca, with the authority's records
  EDGEEAR_CA=$1 openssl ca -config "$1/ca.cnf" "${@:2}" 2>/dev/null
}

authority() { # NAME COMMON_NAME
  begin "$dir/$1" || return 0
  key "$fresh/ca.key"
  openssl req -x509 -new -key "$fresh/ca.key" -sha256 -days "$CA_DAYS" -subj "/CN=$2" -out "$fresh/ca.crt" \
    -addext 'basicConstraints=critical,CA:TRUE,pathlen:0' -addext 'keyUsage=critical,keyCertSign,cRLSign'
  : >"$fresh/index.txt"
  # The revocation list must stay valid as long as the authority: with an expired list OpenSSL admits nobody.
  cat >"$fresh/ca.cnf" <<END
[ca]
default_ca = this
[this]
database = \$ENV::EDGEEAR_CA/index.txt
crlnumber = \$ENV::EDGEEAR_CA/crlnumber
certificate = \$ENV::EDGEEAR_CA/ca.crt
private_key = \$ENV::EDGEEAR_CA/ca.key
default_md = sha256
default_crl_days = $CA_DAYS
END
  echo 01 >"$fresh/crlnumber"
  issue "$fresh" -gencrl -out "$fresh/crl.pem"
  chmod 0644 "$fresh/ca.crt" "$fresh/crl.pem"
  finish "$dir/$1"
  chmod 0700 "$dir/$1"
}

needs_init() { [ -e "$dir/ca/ca.crt" ] && [ -e "$dir/operators-ca/ca.crt" ] || fail "$dir: no authorities; run init first"; }

certificate() { # AUTHORITY SUBJECT USAGE NAME [SAN]: NAME.key and NAME.crt in $fresh
  local extensions="basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=$3
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid${5:+
subjectAltName=$5}"
  key "$fresh/$4.key"
  openssl req -new -key "$fresh/$4.key" -sha256 -subj "$2" |
    openssl x509 -req -sha256 -days "$days" -CA "$dir/$1/ca.crt" -CAkey "$dir/$1/ca.key" \
      -set_serial "0x$(openssl rand -hex 16 | sed 's/^./4/')" -extfile <(echo "$extensions") \
      -out "$fresh/$4.crt" 2>/dev/null
  chmod 0644 "$fresh/$4.crt"
}

ca_for_clients() { install -m 0644 "$dir/ca/ca.crt" "$fresh/ca.crt"; }

alternatives() { # HOST...: DNS:a,IP:b
  local host kind out=
  for host in "$@"; do
    [[ $host =~ ^[A-Za-z0-9.:_-]+$ ]] || fail "$host: not a host name or address"
    kind=DNS
    if [[ $host == *:* || $host =~ ^[0-9]+(\.[0-9]+){3}$ ]]; then kind=IP; fi
    out+="${out:+,}$kind:$host"
  done
  echo "$out"
}

named() { # WHAT VALUE: one level of a topic
  [[ $2 =~ ^[A-Za-z0-9_-]{1,64}$ ]] || fail "$1 ${2@Q}: 1 to 64 of A-Z a-z 0-9 _ - are needed (it is a level of a topic)"
}

init() {
  note "$WARNING"
  mkdir -p "$dir"
  authority ca 'edgeear pilot CA'
  authority operators-ca 'edgeear pilot operators CA'
}

broker() {
  [ $# -gt 0 ] || fail "broker: at least one host name or address that devices use for it is needed"
  local names
  names=$(alternatives "$@")
  needs_init
  if [ -e "$dir/broker" ] && [ "$(cat "$dir/broker/names")" != "$names" ]; then
    fail "$dir/broker is for $(cat "$dir/broker/names"), not $names: move it away to create another"
  fi
  begin "$dir/broker" || return 0
  certificate ca "/CN=edgeear broker" serverAuth server "$names"
  ca_for_clients
  install -m 0644 "$dir/operators-ca/ca.crt" "$fresh/operators-ca.crt"
  install -m 0644 "$dir/ca/crl.pem" "$fresh/crl.pem"
  install -m 0644 "$dir/operators-ca/crl.pem" "$fresh/operators-crl.pem"
  echo "$names" >"$fresh/names"
  finish "$dir/broker"
}

device() {
  [[ $# = 1 && $1 == */* ]] || fail "device: one SITE/DEVICE is needed"
  local site=${1%%/*} name=${1#*/}
  named site "$site"
  named device "$name"
  [ ${#1} -le 64 ] || fail "device $1: ${#1} characters; a certificate's common name holds 64 at most, choose shorter names"
  needs_init
  begin "$dir/devices/$1" || return 0
  certificate ca "/CN=$site\\/$name" clientAuth device
  ca_for_clients
  finish "$dir/devices/$1"
}

operator() {
  [ $# = 2 ] || fail "operator: a SITE and a NAME are needed"
  named site "$1"
  named name "$2"
  needs_init
  begin "$dir/operators/$1/$2" || return 0
  certificate operators-ca "/CN=$1/OU=$2" clientAuth operator
  ca_for_clients
  finish "$dir/operators/$1/$2"
}

revoke() {
  [ $# = 1 ] || fail "revoke: one folder is needed, such as $dir/devices/SITE/DEVICE"
  needs_init
  local authority=ca list=crl.pem file=$1/device.crt
  if [ -e "$1/operator.crt" ]; then authority=operators-ca list=operators-crl.pem file=$1/operator.crt; fi
  [ -e "$file" ] || fail "$1: no device.crt or operator.crt in it"
  local ca=$dir/$authority serial
  openssl verify -no_check_time -CAfile "$ca/ca.crt" "$file" >/dev/null 2>&1 || fail "$file: $ca did not sign it"
  serial=$(openssl x509 -in "$file" -noout -serial)
  if grep -q "^R.*[[:space:]]${serial#serial=}[[:space:]]" "$ca/index.txt"; then
    note "kept: $file was revoked before"
  else
    issue "$ca" -revoke "$file"
  fi
  issue "$ca" -gencrl -out "$ca/.crl.pem"
  chmod 0644 "$ca/.crl.pem" && mv "$ca/.crl.pem" "$ca/crl.pem"
  if [ -e "$dir/broker" ]; then
    install -m 0644 "$ca/crl.pem" "$dir/broker/.$list" && mv "$dir/broker/.$list" "$dir/broker/$list"
  fi
  note "renewed $list: copy it to the broker and restart the broker, which also closes open connections"
}

command=${1:-}
[ -n "$command" ] || { usage >&2; exit 2; }
shift
case $command in
  init | broker | device | operator | revoke) "$command" "$@" ;;
  *) fail "$command: unknown command; see pki.sh --help" ;;
esac
