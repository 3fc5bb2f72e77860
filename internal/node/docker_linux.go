package node

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

const (
	dockerSocket = "/var/run/docker.sock"
	// dockerLimit is how long Docker may take to answer.
	dockerLimit = 5 * time.Second
	// maxContainer is the maximum size of the description of a container, in bytes.
	maxContainer = 4 << 20
	// allocIDLabel is the label that Nomad gives to each container.
	allocIDLabel = "com.hashicorp.nomad.alloc_id"
)

// dockerEngine asks the Docker engine of this node.
type dockerEngine struct {
	http http.Client
}

func newDockerEngine(socket string) *dockerEngine {
	return &dockerEngine{http.Client{
		Timeout: dockerLimit,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
			MaxIdleConnsPerHost: maxOrders,
			IdleConnTimeout:     time.Minute,
		},
	}}
}

// container returns the ID and the first process of a task's container.
func (d *dockerEngine) container(ctx context.Context, order nodeapi.Order) (id string, pid int, err error) {
	// Nomad names a container TASK-ALLOCATION. Only its label says what it is.
	name := strings.ReplaceAll(order.Task, "/", "_") + "-" + order.AllocID
	var found struct {
		ID    string `json:"Id"`
		State struct {
			Running bool
			Pid     int
		}
		Config struct {
			Labels map[string]string
			Env    []string // as Nomad set it; a sandbox can change only its own copy
		}
	}
	if err := d.get(ctx, "/containers/"+url.PathEscape(name)+"/json", &found); err != nil {
		return "", 0, err
	}
	switch {
	case found.Config.Labels[allocIDLabel] != order.AllocID:
		return "", 0, fmt.Errorf("%w: container %s is not of allocation %s", runtime.ErrNotFound, name, order.AllocID)
	case !slices.Contains(found.Config.Env, "BIVOUAC_SESSION_ID="+order.SessionID):
		return "", 0, fmt.Errorf("%w: container %s is not of session %s", runtime.ErrNotFound, name, order.SessionID)
	case !found.State.Running || found.State.Pid <= 0:
		return "", 0, fmt.Errorf("%w: container %s does not run", runtime.ErrNotFound, name)
	case len(found.ID) != 64:
		return "", 0, fmt.Errorf("%w: docker returned the container ID %q", runtime.ErrUnavailable, found.ID)
	}
	return found.ID, found.State.Pid, nil
}

func (d *dockerEngine) get(ctx context.Context, path string, answer any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return fmt.Errorf("%w: docker: %w", runtime.ErrInvalid, err)
	}
	resp, err := d.http.Do(req)
	if err != nil {
		return fmt.Errorf("%w: docker: %w", runtime.ErrUnavailable, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxContainer))
	switch {
	case err != nil:
		return fmt.Errorf("%w: docker: %w", runtime.ErrUnavailable, err)
	case resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%w: docker has no such container", runtime.ErrNotFound)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("%w: docker: %s", runtime.ErrUnavailable, resp.Status)
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return fmt.Errorf("%w: docker: %w", runtime.ErrUnavailable, err)
	}
	return nil
}
