package conformance_test

import (
	"context"
	"fmt"
	"regexp"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

func ExampleVerify() {
	harness := conformance.Harness{
		Open: func(context.Context) (runtime.Driver, error) { return newDriver(), nil },
	}
	for result := range conformance.Verify(context.Background(), harness, regexp.MustCompile("^says who|not there$")) {
		fmt.Println(result.Verdict, result.Name)
	}
	// Output:
	// PASS says who it is
	// PASS does not find what is not there
}

// newDriver returns the driver to verify.
func newDriver() runtime.Driver { return sound{newMachine(), "own", context.Background()} }
