package apiclient

import (
	"context"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"sync"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
)

// traceStages returns a context for a request. It reports the stages in the request's
// interim answers until end is called. net/http reads answers in a separate goroutine,
// which may outlive a request whose context ended.
func traceStages(ctx context.Context, report func(runtime.Stage)) (traced context.Context, end func()) {
	var mu sync.Mutex
	ended := false
	traced = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse: func(status int, header textproto.MIMEHeader) error {
			mu.Lock()
			defer mu.Unlock()
			if stage := header.Get(wire.HeaderStage); status == http.StatusProcessing && stage != "" && !ended {
				report(runtime.Stage(stage))
			}
			return nil
		},
	})
	end = func() {
		mu.Lock()
		defer mu.Unlock()
		ended = true
	}
	return traced, end
}
