package consul

import (
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
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
		Owner:          "team-a",
		Labels:         map[string]string{"ticket": "4711", "tier": ""},
		AccessToken:    runtime.Secret(strings.Repeat("5e", 32)),
	}
}

// edited returns the record of testSession after edit has changed it.
func edited(t *testing.T, edit func(fields map[string]any)) string {
	t.Helper()
	value, _, err := encodeRecord(testSession(), "write-1", nil)
	must.NoError(t, err)
	var fields map[string]any
	must.NoError(t, json.Unmarshal(value, &fields))
	edit(fields)
	value, err = json.Marshal(fields)
	must.NoError(t, err)
	return string(value)
}

// damage returns values that must not be accepted as a record, with the errors
// that they cause.
func damage(t *testing.T) map[string]string {
	t.Helper()
	whole := edited(t, func(map[string]any) {})
	set := func(key string, value any) string {
		return edited(t, func(fields map[string]any) { fields[key] = value })
	}
	return map[string]string{
		"":                             "unexpected end",
		"garbage":                      "invalid character",
		"null":                         "record version 0",
		`{"v":2}`:                      "min_reader missing",
		"[]":                           "cannot unmarshal",
		whole[:len(whole)/2]:           "unexpected end",
		whole + "{}":                   "invalid character",
		set("v", 0):                    "record version 0",
		set("min_reader", 0):           "min_reader missing",
		set("min_reader", "2"):         "cannot unmarshal",
		set("labels", []string{"a"}):   "cannot unmarshal",
		set("chat_id", uuid.New()):     "holds chat",
		set("chat_id", "x"):            "invalid UUID",
		set("session_id", uuid.Nil):    "session_id missing",
		set("agent_id", ""):            "agent_id missing",
		set("expires_at", "tomorrow"):  "parsing time",
		set("expires_at", time.Time{}): "expires_at missing",
		set("created_at", nil):         "created_at missing",
		set("state", "resting"):        "unknown state",
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
		_, _, err := encodeRecord(session, "write-1", nil)
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
	value, _, err := encodeRecord(testSession(), "write-1", nil)
	must.NoError(f, err)
	f.Add(value)
	f.Add([]byte(strings.Replace(string(value), `"v":3,"min_reader":2`, `"v":4,"min_reader":4`, 1)))
	f.Add([]byte(strings.Replace(string(value), `"v":3,"min_reader":2`, `"v":4,"min_reader":2,"new":{"a":[1e400]},"Agent_ID":"x"`, 1)))
	f.Add([]byte(strings.Replace(string(value), `"v":3,"min_reader":2`, `"v":1`, 1)))
	f.Add([]byte(`{"v":1}`))
	f.Add(value[:40])
	f.Fuzz(func(t *testing.T, value []byte) {
		session, writeID, err := decodeRecord("some/key", testChat, value)
		if err != nil {
			must.True(t, errors.Is(err, scheduler.ErrDamaged) || errors.Is(err, scheduler.ErrNewerRecord))
			must.Nil(t, session)
			return
		}
		part, err := newerPartOf(value)
		must.NoError(t, err)
		// The decoded record can be encoded again, and then decodes to the
		// same.
		again, _, err := encodeRecord(*session, writeID, part)
		must.NoError(t, err)
		reread, rewriteID, err := decodeRecord("some/key", testChat, again)
		must.NoError(t, err)
		must.Eq(t, session, reread)
		must.Eq(t, writeID, rewriteID)
		kept, err := newerPartOf(again)
		must.NoError(t, err)
		must.Eq(t, fieldsOf(part), fieldsOf(kept))
	})
}

// fieldsOf returns the names of all unknown fields. Nested fields follow the
// field that contains them.
func fieldsOf(part *newerPart) []string { return names("", part.fields) }

func names(prefix string, o object) []string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(o)) {
		all = append(all, prefix+name)
		all = append(all, names(prefix+name+".", asObject(o[name]))...)
	}
	return all
}

func TestRecord(t *testing.T) {
	const newer = `"v":4,"min_reader":2,"seen":{"by":["a",1e400],"at":12345678901234567890},"Agent_ID":"agent-1",`
	value, _, err := encodeRecord(testSession(), "write-1", nil)
	must.NoError(t, err)
	tomorrow := strings.Replace(string(value), `"v":3,"min_reader":2,`, newer, 1)
	tomorrow = strings.Replace(tomorrow, `"port":`, `"tls":{"name":"x"},"port":`, 1)

	t.Run("keeps_what_a_newer_version_wrote", func(t *testing.T) {
		part, err := newerPartOf([]byte(tomorrow))
		must.NoError(t, err)
		renewed := testSession()
		renewed.ExpiresAt = renewed.ExpiresAt.Add(time.Hour)
		renewed.Endpoint.Port = 7
		value, _, err := encodeRecord(renewed, "write-2", part)
		must.NoError(t, err)

		var text map[string]json.RawMessage
		must.NoError(t, json.Unmarshal(value, &text))
		must.Eq(t, "4", string(text["v"]))
		must.Eq(t, "2", string(text["min_reader"]))
		must.Eq(t, `{"by":["a",1e400],"at":12345678901234567890}`, string(text["seen"]))
		must.Eq(t, `{"ip":"","port":7,"tls":{"name":"x"}}`, string(text["endpoint"]))
		read, writeID, err := decodeRecord("some/key", testChat, value)
		must.NoError(t, err)
		must.Eq(t, renewed, *read)
		must.Eq(t, "write-2", writeID)
	})
	t.Run("of_a_version_that_may_not_be_read_is_not_damaged", func(t *testing.T) {
		_, _, err := decodeRecord("some/key", testChat, []byte(strings.Replace(tomorrow, `"min_reader":2`, `"min_reader":4`, 1)))
		must.ErrorIs(t, err, scheduler.ErrNewerRecord)
		must.False(t, errors.Is(err, scheduler.ErrDamaged))
		must.ErrorContains(t, err, "some/key: record of a newer version: min_reader is 4, this replica reads up to version 3")
	})
	t.Run("of_a_version_that_may_not_be_read_need_hold_nothing_else", func(t *testing.T) {
		_, _, err := decodeRecord("some/key", testChat, []byte(`{"v":9,"min_reader":8,"agent_id":{}}`))
		must.ErrorIs(t, err, scheduler.ErrNewerRecord)
	})
	t.Run("of_version_1_has_the_default_owner", func(t *testing.T) {
		read, _, err := decodeRecord("some/key", testChat, []byte(recordOfVersion1))
		must.NoError(t, err)
		want := testSession()
		want.Owner, want.Labels, want.AccessToken = scheduler.DefaultOwner, nil, ""
		must.Eq(t, want, *read)
	})
}

// recordOfVersion1 is testSession as encoded by Bivouac before version 2.
const recordOfVersion1 = `{"v":1,"write":"write-1","session_id":"0b8f4a52-5a80-4a0f-9a5e-6f7d3f9f1c22","chat_id":"6f1c2f2e-9d0b-4a51-8a6c-0e2b6c9a7d11","agent_id":"agent-1","volume_host_path":"/srv/volume","runtime":"nomad","container_id":"","endpoint":{"ip":"","port":0},"created_at":"2031-03-05T14:07:30.000000005Z","expires_at":"2031-03-05T14:37:30.000000005Z","state":"running","reason":""}`

// An older version would take the sandbox of a warm session for that of another chat.
func TestRecord_of_a_warm_session_is_not_for_older_versions(t *testing.T) {
	session := testSession()
	for warm, reader := range map[bool]string{false: `"min_reader":2,`, true: `"min_reader":3,`} {
		session.Warm = warm
		value, _, err := encodeRecord(session, "write-1", nil)
		must.NoError(t, err)
		must.StrContains(t, string(value), reader)
		decoded, _, err := decodeRecord("some/key", testChat, value)
		must.NoError(t, err)
		must.Eq(t, session, *decoded)
	}
}
