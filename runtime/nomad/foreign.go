package nomad

import (
	"fmt"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// instance is the ID that the jobs of a Bivouac bear.
type instance struct {
	id     string
	legacy string // what its older jobs bear, empty if there are none
}

func (i *instance) owns(id string) bool { return id != "" && (id == i.id || id == i.legacy) }

// foreign says why a job is none of this instance's though it bears the name of
// a session's, and is empty where it is one. Such a job is somebody else's, or
// was damaged: it is told of and left alone.
func (d *Driver) foreign(jobID string, meta map[string]string) string {
	sessionID, _ := sessionOf(jobID)
	switch id := meta[jobs.MetaInstance]; {
	case id == "" || meta[jobs.MetaSessionID] != sessionID:
		return "its meta is not that of a sandbox"
	case !d.instance.owns(id): // safeguard: instance of each job
		return fmt.Sprintf("it is of instance %q", id)
	default:
		return ""
	}
}

// notForeign returns an error that wraps [runtime.ErrConflict] where a job that
// stands is foreign.
func (d *Driver) notForeign(s state) error {
	if !s.known {
		return nil
	}
	if why := d.foreign(s.job.ID, s.job.Meta); why != "" {
		return fmt.Errorf("nomad: %w: job %s is left alone: %s", runtime.ErrConflict, s.job.ID, why)
	}
	return nil
}
