package main

import (
	"testing"

	"github.com/shoenig/test/must"
)

func TestNomadRow(t *testing.T) {
	row, err := nomadRow(t.Context(), fewRecords, 20_000)
	must.NoError(t, err)
	t.Logf("%s: %.0f bytes", row.what, row.many)
	must.Eq(t, "met", row.verdict())
}
