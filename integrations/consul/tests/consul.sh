#!/usr/bin/env bash
# Make a real Consul from its Go modules, where no binary is at hand: consul.sh FOLDER makes FOLDER/consul (about ten minutes on two cores).
set -euo pipefail
version=v1.20.1
folder=$(mkdir -p "${1:?consul.sh FOLDER}" && cd "$1" && pwd)
module=github.com/hashicorp/consul
export GOTOOLCHAIN=local GOFLAGS=-mod=mod
work=$(mktemp -d)
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
source=$(cd "$work" && go mod download -json "$module@$version" | python3 -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')
cp -r "$source" "$work/consul"
chmod -R u+w "$work/consul"
cd "$work/consul"
# Its own parts are modules of their own, which it expects beside it: their releases serve as well.
for part in api envoyextensions proto-public sdk troubleshoot; do go mod edit -dropreplace "$module/$part"; done
go mod edit -toolchain=none
go build -o "$folder/consul" .
"$folder/consul" version
