package ready_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

func ExampleCheck_Wait() {
	const sessionID = "3f0c6a52-5d1c-4b1f-9a6e-2f1b7a9d0c11"
	sandbox := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintln(w, sessionID) // the check notices
	}))
	defer sandbox.Close()
	addr := netip.MustParseAddrPort(strings.TrimPrefix(sandbox.URL, "http://"))

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	check := ready.Check{HTTPPath: "/healthz", WantSessionID: true}
	err := check.Wait(ctx, runtime.Endpoint{IP: addr.Addr(), Port: addr.Port()}, sessionID)
	fmt.Println(err)
	// Output: <nil>
}
