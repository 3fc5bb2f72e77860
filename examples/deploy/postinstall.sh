#!/bin/sh
# Runs after the package was installed or upgraded. It starts and restarts nothing: a
# new server needs its configuration first, and replicas are upgraded one by one.
set -e
systemd-sysusers bivouac.conf
# Other users need not read the configuration. bivouac.env is root's alone.
chown root:bivouac /etc/bivouac.d
chmod 0750 /etc/bivouac.d
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
