package consul

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

var testChat = uuid.MustParse("6f1c2f2e-9d0b-4a51-8a6c-0e2b6c9a7d11")

func testSession() scheduler.Session {
	return scheduler.Session{
		SessionID:      uuid.MustParse("0b8f4a52-5a80-4a0f-9a5e-6f7d3f9f1c22"),
		ChatID:         testChat,
		AgentID:        "agent-1",
		VolumeHostPath: "/srv/volume",
		Runtime:        "nomad",
		CreatedAt:      time.Date(2031, time.March, 5, 14, 7, 30, 5, time.UTC),
		ExpiresAt:      time.Date(2031, time.March, 5, 14, 37, 30, 5, time.UTC),
		State:          scheduler.StateRunning,
	}
}

// edited returns the record of testSession, changed by edit.
func edited(t *testing.T, edit func(fields map[string]any)) string {
	t.Helper()
	value, _, err := encodeRecord(testSession(), "write-1")
	must.NoError(t, err)
	var fields map[string]any
	must.NoError(t, json.Unmarshal(value, &fields))
	edit(fields)
	value, err = json.Marshal(fields)
	must.NoError(t, err)
	return string(value)
}

// damage is values that must not be taken for a record, and what the error
// says about them.
func damage(t *testing.T) map[string]string {
	t.Helper()
	whole := edited(t, func(map[string]any) {})
	set := func(key string, value any) string {
		return edited(t, func(fields map[string]any) { fields[key] = value })
	}
	return map[string]string{
		"":                              "unexpected end",
		"garbage":                       "invalid character",
		"null":                          "schema version 0",
		"[]":                            "cannot unmarshal",
		whole[:len(whole)/2]:            "unexpected end",
		whole + "{}":                    "invalid character",
		set("v", 2):                     "schema version 2",
		set("chat_id", uuid.New()):      "holds chat",
		set("chat_id", "x"):             "invalid UUID",
		set("session_id", uuid.Nil):     "session_id missing",
		set("agent_id", ""):             "agent_id missing",
		set("expires_at", "tomorrow"):   "parsing time",
		set("expires_at", time.Time{}):  "expires_at missing",
		set("created_at", nil):          "created_at missing",
		set("state", "resting"):         "unknown state",
		set("a_field_of_tomorrow", "x"): "unknown field",
	}
}

func TestDamagedRecordsAreRefusedWithTheReason(t *testing.T) {
	for value, reason := range damage(t) {
		_, _, err := decodeRecord("some/key", testChat, []byte(value))
		must.ErrorIs(t, err, scheduler.ErrDamaged, must.Sprint(value))
		must.ErrorContains(t, err, "some/key", must.Sprint(value))
		must.ErrorContains(t, err, reason, must.Sprint(value))
	}
}

func TestSessionsThatCouldNotBeFoundAgainAreNotWritten(t *testing.T) {
	for name, spoil := range map[string]func(*scheduler.Session){
		"no chat":    func(s *scheduler.Session) { s.ChatID = uuid.Nil },
		"no session": func(s *scheduler.Session) { s.SessionID = uuid.Nil },
		"no agent":   func(s *scheduler.Session) { s.AgentID = "" },
		"no expiry":  func(s *scheduler.Session) { s.ExpiresAt = time.Time{} },
		"no start":   func(s *scheduler.Session) { s.CreatedAt = time.Time{} },
		"far expiry": func(s *scheduler.Session) { s.ExpiresAt = s.ExpiresAt.AddDate(9000, 0, 0) },
		"no state":   func(s *scheduler.Session) { s.State = "" },
		"bytes":      func(s *scheduler.Session) { s.VolumeHostPath = "/srv/\xff" },
	} {
		session := testSession()
		spoil(&session)
		_, _, err := encodeRecord(session, "write-1")
		must.ErrorIs(t, err, scheduler.ErrInvalid, must.Sprint(name))
	}
}

func TestBucketsSortAsTheirTimesDo(t *testing.T) {
	last := ""
	for at := time.Date(2029, time.December, 31, 23, 50, 0, 0, time.UTC); at.Year() < 2031; at = at.Add(7 * time.Minute) {
		bucket := bucketOf(at.In(time.FixedZone("elsewhere", -5*3600)))
		must.Less(t, bucket, last)
		last = bucket
	}
}

func FuzzDecodeRecord(f *testing.F) {
	value, _, err := encodeRecord(testSession(), "write-1")
	must.NoError(f, err)
	f.Add(value)
	f.Add([]byte(strings.Replace(string(value), `"v":1`, `"v":2`, 1)))
	f.Add([]byte(`{"v":1}`))
	f.Add(value[:40])
	f.Fuzz(func(t *testing.T, value []byte) {
		session, writeID, err := decodeRecord("some/key", testChat, value)
		if err != nil {
			must.ErrorIs(t, err, scheduler.ErrDamaged)
			must.Nil(t, session)
			return
		}
		// What was read can be written, and is then read as the same.
		again, _, err := encodeRecord(*session, writeID)
		must.NoError(t, err)
		reread, rewriteID, err := decodeRecord("some/key", testChat, again)
		must.NoError(t, err)
		must.Eq(t, session, reread)
		must.Eq(t, writeID, rewriteID)
	})
}
