package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// agents is how many AI agents the standing sessions belong to.
const agents = 500

// kind is what an ID is for.
type kind byte

const (
	ofChat kind = iota
	ofSession
	ofContainer
	ofEvaluation
	ofNode
)

// id returns the ID of the i-th standing session, chat or container. The IDs are spread as
// evenly as random ones.
func (k kind) id(i uint32) uuid.UUID {
	x := uint64(k)<<32 | uint64(i)
	for range 2 { // the finalizer of MurmurHash3, which is a bijection
		x = (x ^ x>>33) * 0xff51afd7ed558ccd
		x = (x ^ x>>33) * 0xc4ceb9fe1a85ec53
		x ^= x >> 33
	}
	var id uuid.UUID
	binary.BigEndian.PutUint64(id[:8], x)
	binary.BigEndian.PutUint32(id[12:], i)
	id[6], id[8] = id[6]&0x0f|0x40, 0x80
	return id
}

// indexOf returns which standing session has an ID. ok is false if none of them has it.
func indexOf(sessionID string) (i uint32, ok bool) {
	id, err := uuid.Parse(sessionID)
	if err != nil {
		return 0, false
	}
	i = binary.BigEndian.Uint32(id[12:])
	return i, ofSession.id(i) == id
}

// sandboxOf returns the sandbox of the i-th standing session.
func sandboxOf(i uint32) runtime.Sandbox {
	return runtime.Sandbox{
		SessionID: ofSession.id(i).String(), ChatID: ofChat.id(i).String(), ContainerID: ofContainer.id(i).String(),
		Endpoint: runtime.Endpoint{IP: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), Port: 8080},
		State:    runtime.StateRunning,
	}
}

// sessionOf returns the i-th standing session. It expires a day from now at the earliest,
// and about 700 of a million sessions expire within the same minute.
func sessionOf(i uint32, now time.Time) scheduler.Session {
	sandbox := sandboxOf(i)
	return scheduler.Session{
		SessionID: ofSession.id(i), ChatID: ofChat.id(i), AgentID: fmt.Sprintf("agent-%d", i%agents),
		VolumeHostPath: "/srv/volumes/" + sandbox.ChatID, Runtime: modelName,
		ContainerID: sandbox.ContainerID, Endpoint: sandbox.Endpoint,
		CreatedAt: now, ExpiresAt: now.Add(24*time.Hour + time.Duration(i%1440)*time.Minute),
		State: scheduler.StateRunning, Owner: scheduler.DefaultOwner,
	}
}
