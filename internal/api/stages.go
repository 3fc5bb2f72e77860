package api

import (
	"net/http"
	"sync"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
)

// wantsStages reports whether the caller asked for interim answers and can read them.
// HTTP/1.0 has none.
func wantsStages(r *http.Request) bool {
	return r.Header.Get(wire.HeaderStages) == "true" && r.ProtoAtLeast(1, 1)
}

// tellStages returns two functions. report sends a stage to the caller as an interim
// answer. It never waits for the caller to read, and may be called at any time, even
// after end. end stops the reports and waits until the last one is sent.
func tellStages(w http.ResponseWriter) (report func(runtime.Stage), end func()) {
	stages := make(chan runtime.Stage, 8) // more than there are stages
	done := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		for {
			select {
			case stage := <-stages:
				writeStage(w, stage)
			case <-done:
				for {
					select {
					case stage := <-stages:
						writeStage(w, stage)
					default:
						return
					}
				}
			}
		}
	})
	report = func(stage runtime.Stage) {
		select {
		case stages <- stage:
		default:
		}
	}
	end = sync.OnceFunc(func() {
		close(done)
		writer.Wait()
	})
	return report, end
}

func writeStage(w http.ResponseWriter, stage runtime.Stage) {
	w.Header().Set(wire.HeaderStage, string(stage))
	w.WriteHeader(http.StatusProcessing)
	w.Header().Del(wire.HeaderStage) // not for the final answer
}
