#!/bin/sh
# Runs before the package is removed or upgraded: "remove" and "upgrade" in Debian, 0
# and 1 in RPM. Sandboxes go on without the server.
set -e
case "$1" in
remove | 0)
	if [ -d /run/systemd/system ]; then
		systemctl disable --now bivouac.service bivouac-node.service
	fi
	;;
esac
