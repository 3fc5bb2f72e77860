package simulate

import (
	"encoding/json"
	"net/http"
	"slices"
	"time"

	"github.com/google/uuid"
	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// These are the instance IDs of a run with a neighbour. The neighbour is
// another Bivouac of the same configured name on the same Nomad, with its own
// Consul.
const (
	ownInstance       = instance + "-aaaaaaaaaaaaaaaaaaaa"
	neighbourInstance = instance + "-bbbbbbbbbbbbbbbbbbbb"
)

// besideNeighbour is the name under which runs with a neighbour are counted.
const besideNeighbour = "beside another Bivouac"

// addNeighbour starts a sandbox of a neighbour, for a chat that both know. It
// also gives this Bivouac an identity, as if it had run before. Without one,
// Bivouac leaves it to an operator to decide who owns the sandbox.
func (w *world) addNeighbour() {
	identity, err := json.Marshal(consul.Identity{Version: 1, Instance: ownInstance, CreatedAt: w.began.UTC()})
	if err != nil {
		panic(err)
	}
	w.consul.SetKey(identityKey, string(identity))
	spec := runtime.Spec{
		SessionID: uuid.NewSHA1(uuid.NameSpaceURL, []byte("neighbour")).String(), ChatID: w.chatIDs[0].String(),
		AgentID: "agent-1", VolumeHostPath: "/volume", CreatedAt: w.began.UTC(), ExpiresAt: w.began.Add(time.Hour).UTC(),
	}
	job, err := w.templates[0].Job(spec, neighbourInstance)
	if err != nil {
		panic(err)
	}
	client, err := nomadapi.NewClient(&nomadapi.Config{HttpClient: &http.Client{Transport: network.Direct{Server: w.nomad}}})
	if err != nil {
		panic(err)
	}
	if _, _, err := client.Jobs().Register(job, nil); err != nil {
		panic(err)
	}
	w.hits.count(besideNeighbour, true)
}

func isNeighbours(meta map[string]string) bool { return meta[jobs.MetaInstance] == neighbourInstance }

// processes returns the live processes that are not the neighbour's.
func (w *world) processes() []nomadmodel.Process {
	return slices.DeleteFunc(w.nomad.Processes(), func(p nomadmodel.Process) bool { return isNeighbours(p.Meta) })
}

// checkNeighbour fails if the neighbour's job was stopped or if a caller was
// told of its session.
func (w *world) checkNeighbour() {
	if !w.neighbour {
		return
	}
	var session string
	for _, meta := range w.nomad.Jobs() {
		if isNeighbours(meta) {
			session = meta[jobs.MetaSessionID]
		}
	}
	if session == "" {
		w.violate("the job of another Bivouac was stopped")
	}
	for _, c := range w.history {
		if c.session != "" && c.session == session {
			w.violate("caller %d is told of session %s, which is another Bivouac's", c.caller, session)
		}
	}
}
