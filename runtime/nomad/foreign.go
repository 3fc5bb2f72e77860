package nomad

import (
	"fmt"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// instance is the ID in the jobs of a Bivouac instance.
type instance struct {
	id     string
	legacy string // the ID in its older jobs; empty if there are none
}

func (i *instance) owns(id string) bool { return id != "" && (id == i.id || id == i.legacy) }

// foreign returns why a job does not belong to this instance although it is named
// like a session's job. It returns "" if the job belongs to it. A foreign job is
// somebody else's or was damaged. The driver reports it and leaves it alone.
func (d *Driver) foreign(jobID string, meta map[string]string) string {
	sessionID, _ := sessionOf(jobID)
	switch id := meta[jobs.MetaInstance]; {
	case id == "" || meta[jobs.MetaSessionID] != sessionID:
		return "its meta is not that of a sandbox"
	case !d.instance.owns(id): // safeguard: instance of each job
		return fmt.Sprintf("it belongs to instance %q", id)
	default:
		return ""
	}
}

// notForeign returns an error that wraps [runtime.ErrConflict] if the job exists
// and is foreign.
func (d *Driver) notForeign(s state) error {
	if !s.known {
		return nil
	}
	if why := d.foreign(s.job.ID, s.job.Meta); why != "" {
		return fmt.Errorf("nomad: %w: job %s is left alone: %s", runtime.ErrConflict, s.job.ID, why)
	}
	return nil
}
