package main

import (
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

func TestModel(t *testing.T) {
	const standing = 1000
	m := new(model)
	must.NoError(t, m.Configure(t.Context(), runtime.Config{JSON: []byte(`{"standing": 1000}`)}))
	listed := func() map[string]runtime.Sandbox {
		all := make(map[string]runtime.Sandbox)
		for sandbox, err := range m.List(t.Context()) {
			must.NoError(t, err)
			all[sandbox.SessionID] = sandbox
		}
		return all
	}

	t.Run("has_a_sandbox_for_each_standing_session", func(t *testing.T) {
		all := listed()
		must.MapLen(t, standing, all)
		for id, want := range all {
			got, err := m.Inspect(t.Context(), id)
			must.NoError(t, err)
			must.Eq(t, want, got)
		}
		_, err := m.Inspect(t.Context(), ofSession.id(standing).String())
		must.ErrorIs(t, err, runtime.ErrNotFound)
		_, err = m.Inspect(t.Context(), ofChat.id(0).String())
		must.ErrorIs(t, err, runtime.ErrNotFound)
	})

	t.Run("ends_standing_sandboxes_and_others_for_good", func(t *testing.T) {
		created := uuid.NewString()
		_, err := m.Create(t.Context(), runtime.Spec{SessionID: created}, func(runtime.Stage) {})
		must.NoError(t, err)
		must.MapLen(t, standing+1, listed())
		for _, id := range []string{created, ofSession.id(7).String()} {
			must.NoError(t, m.Delete(t.Context(), id))
			_, err := m.Inspect(t.Context(), id)
			must.ErrorIs(t, err, runtime.ErrNotFound)
			_, err = m.Create(t.Context(), runtime.Spec{SessionID: id}, func(runtime.Stage) {})
			must.ErrorIs(t, err, runtime.ErrConflict)
		}
		must.MapLen(t, standing-1, listed())
	})
}

func TestVerdict(t *testing.T) {
	for _, tc := range []struct {
		name string
		row  row
		want string
	}{
		{"no target", row{few: 1, many: 100}, ""},
		{"a ratio that is met", row{few: 10, many: 11, aim: atMost(1.1)}, "met"},
		{"a ratio that is missed", row{few: 10, many: 12, aim: atMost(1.1)}, "MISSED"},
		{"a value that is met", row{few: 900, many: 250, aim: most(maxStall)}, "met"},
		{"a value that is missed", row{few: 1, many: 251, aim: most(maxStall)}, "MISSED"},
	} {
		t.Run(tc.name, func(t *testing.T) { must.Eq(t, tc.want, tc.row.verdict()) })
	}
}
